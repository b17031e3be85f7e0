"""Machine code of compiled kernels (SASS): instructions of a cubin, and what its loops do."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

SIZE = 16  # bytes of an instruction on all architectures that are compiled for


@dataclass(frozen=True)
class Instruction:
    """An instruction at a byte of a listing, with its operands as nvdisasm writes them."""

    at: int
    opcode: str
    operands: str

    def jumps_to(self) -> int | None:
        """Where a branch to a fixed address goes; None for other instructions."""
        target = self.operands.rpartition(" ")[2]
        return int(target, 16) if self.opcode.startswith("BRA") and target.startswith("0x") else None


def disassemble(cubins: Sequence[bytes], capability: int) -> list[list[Instruction]]:
    """Instructions of each cubin, padding included.

    All cubins go to nvdisasm at once, since it takes longer to start than to work.
    """
    if not cubins:
        return []
    codes = [code_of(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        listing = tool("nvdisasm", "--binary", f"SM{capability}", file.name)
    instruction = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+{?\s*(?:@\S+\s+)?([A-Z][\w.]*)\s*([^;]*)", re.MULTILINE)
    found = {
        int(at, 16) // SIZE: Instruction(int(at, 16), opcode, operands.strip())
        for at, opcode, operands in instruction.findall(listing)
    }
    assert found.keys() == set(range(sum(map(len, codes)) // SIZE)), "nvdisasm left instructions out"
    each = iter(found[at] for at in sorted(found))
    return [[next(each) for _ in range(len(code) // SIZE)] for code in codes]


def loops_of(code: Sequence[Instruction]) -> list[list[str]]:
    """Steps of each innermost loop that has a product of the tensor cores, in order.

    "QK" is a run of products of two operands in shared memory, "PV" of one whose first operand is in registers,
    "wait 1" until one product is left in flight. "CTA barrier" and "spill" are what such a loop should not have.
    """
    jumps = [(target, one.at) for one in code if (target := one.jumps_to()) is not None and target < one.at]
    bodies = []
    for start, end in jumps:
        inner = any(start <= other and last <= end and (other, last) != (start, end) for other, last in jumps)
        body = [one for one in code if start <= one.at <= end]
        if not inner and any(one.opcode.startswith("HGMMA") for one in body):
            bodies.append([step for step, _ in groupby(filter(None, map(step_of, body)))])
    return bodies


def step_of(instruction: Instruction) -> str | None:
    """The step of a loop that an instruction belongs to; None for arithmetic and for barriers of a warp group."""
    opcode, operands = instruction.opcode, instruction.operands.split(", ")
    if opcode.startswith("HGMMA"):
        return "QK" if operands[1].startswith("gdesc") else "PV"
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return f"wait {int(operands[1], 16)}"
    if opcode.startswith("BAR.SYNC") and len(operands) == 1:  # without a number of threads
        return "CTA barrier"
    return "spill" if opcode.startswith(("LDL", "STL")) else None


def code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin's only kernel: its .text section, as ELF-64 lays it out."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_index = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + size * at) for at in range(count)]
    names = sections[names_index][4]
    (code,) = [section for section in sections if cubin.startswith(b".text.", names + section[0])]
    _, _, _, _, start, length = code
    return cubin[start : start + length]


def tool(name: str, *args: str) -> str:
    """Output of one of the binaries that come with Triton."""
    import triton

    place = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(place), *args], capture_output=True, text=True, check=True).stdout
