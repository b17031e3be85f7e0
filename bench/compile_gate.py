"""What the GPU kernels compile to, for every architecture they are declared for, on a machine without a GPU.

Each architecture is compiled in a process of its own, behind a stand-in driver that only knows its name. The
table (registers, stack, shared memory, matrix instructions, hash of the code) is kept beside this file, so that
a change of any of them shows. It proves that a kernel assembles, fits and uses the matrix units; not that it is
right or fast. `executed` runs the same calls on a GPU and hashes what ran, so that the table is about that very code.
Run: inferix bench kernels --compile-only
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import InferixError, UsageError, nearest
from ..kernels.catalog import SPECS
from ..kernels.spec import ARCHITECTURES, has_triton

TABLE = Path(__file__).with_name("compiled.json")
SHARED_LIMIT = {80: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have; 80 has 163, but 86 runs its code
MATRIX = {  # instructions of the tensor cores: float16 and bfloat16, FP8, INT8
    80: "HMMA|IMMA", 89: "HMMA|QMMA|IMMA", 90: "HGMMA|QGMMA|IGMMA", 100: "UTCHMMA|UTCQMMA|IMMA", 120: "HMMA|QMMA|IMMA"
}  # fmt: skip


def compile_all(ops: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """A row for every variant and architecture of these ops, or of all: "op, variant, sm_90" -> what it compiled to."""
    for op in ops:
        if op not in SPECS:
            raise UsageError(f"no op {op!r}{nearest(op, SPECS)}; there are {', '.join(SPECS)}")
    if not has_triton():
        raise InferixError("Triton is not installed, so nothing can be compiled; pip install triton")
    env = {**os.environ, "TRITON_DISABLE_LINE_INFO": "1", "TRITON_INTERPRET": "0"}

    def compile_apart(capability: int) -> dict[str, dict[str, Any]]:
        command = [sys.executable, "-m", "inferix.bench.compile_gate", str(capability), *ops]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InferixError(f"compiling for sm_{capability} failed: {done.stderr.strip()[-1500:]}")
        rows: dict[str, dict[str, Any]] = json.loads(done.stdout)
        return rows

    with ThreadPoolExecutor(os.cpu_count()) as processes:
        return {name: row for rows in processes.map(compile_apart, ARCHITECTURES) for name, row in rows.items()}


def problems(table: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with compiled kernels, one line each."""
    wrong = []
    for name, row in table.items():
        capability, spec = row["architecture"], SPECS[op_of(name)]
        if row["shared"] > SHARED_LIMIT[capability] * 1024:
            limit = SHARED_LIMIT[capability]
            wrong.append(f"{name}: {row['shared'] / 1024:.0f} KiB of shared memory; sm_{capability} has {limit}")
        if row["stack"] > spec.stack:
            wrong.append(f"{name}: {row['stack']} bytes on the stack: registers are spilled")
        if spec.tensor_cores and not row["matrix"]:
            wrong.append(f"{name}: no {MATRIX[capability]} instruction, so no tensor core is used")
        if row["tf32"]:
            wrong.append(f"{name}: float32 products run as TF32")
    return wrong


def op_of(name: str) -> str:
    """Op of a row: "adaln" of "adaln, affine bf16 d1536, sm_90" and of "adaln by other, ..., sm_90"."""
    return name.partition(",")[0].partition(" by ")[0]


class StandInDriver:
    """What Triton asks a driver while it compiles: which GPU, and nothing that needs one."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True


def cases_for(capability: int, ops: Sequence[str] = ()) -> Iterator[tuple[str, Callable[..., None], dict[str, Any]]]:
    """Name, form and arguments of every call of these ops, or of all, that has a row in the table."""
    for spec in [SPECS[op] for op in ops] or SPECS.values():
        for form in spec.implementations:
            if capability not in form.architectures or not hasattr(form.module(), "compile_cases"):
                continue
            label = spec.name if form.name == "triton" else f"{spec.name} by {form.name}"
            for variant, inputs in form.module().compile_cases(capability).items():
                yield f"{label}, {variant}, sm_{capability}", form.load(), inputs


@contextmanager
def launches(**options: Any) -> Iterator[list[Any]]:
    """The compiled kernels of what is launched within the block, each launched with these options besides its own."""
    import triton

    compiled: list[Any] = []
    launch = triton.runtime.jit.JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(launch(self, *args, **kwargs | options))
        return compiled[-1]

    triton.runtime.jit.JITFunction.run = noted
    try:
        yield compiled
    finally:
        triton.runtime.jit.JITFunction.run = launch


def compile_for(capability: int, ops: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All variants of these ops, or of all, for one architecture, through their own launch functions."""
    import triton

    triton.runtime.driver.set_active(StandInDriver(capability))
    found = {}
    for name, run, inputs in cases_for(capability, ops):
        with launches(warmup=True) as compiled:
            run(**inputs)
        (kernel,) = compiled
        found[name] = inspect(kernel, capability)
    return found


def executed(device: str) -> dict[str, str]:
    """Runs the table's calls on a GPU: name -> hash of the code that ran. TRITON_DISABLE_LINE_INFO=1 must be set."""
    major, minor = torch.cuda.get_device_capability(device)
    found = {}
    for name, run, inputs in cases_for(10 * major + minor):
        there = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        with launches() as compiled:
            run(**there)
        torch.cuda.synchronize(device)
        (kernel,) = compiled
        found[name] = hashlib.sha256(kernel.asm["cubin"]).hexdigest()
    return found


def not_inspected(ran: Mapping[str, str], table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What ran on a GPU and is not the code in the table, one line each."""
    return [
        f"{name}: {'other code than was inspected' if name in table else 'not in the table'}"
        for name, code in ran.items()
        if table.get(name, {}).get("sha256") != code
    ]


def inspect(kernel: Any, capability: int) -> dict[str, Any]:
    """Resources and instructions of one compiled kernel."""
    code: bytes = kernel.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        listing = tool("nvdisasm", file.name)
    return {
        "architecture": capability,
        "registers": int(found[1]) if (found := re.search(r"REG:(\d+)", usage)) else 0,
        "stack": int(found[1]) if (found := re.search(r"STACK:(\d+)", usage)) else 0,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "matrix": len(re.findall(rf"\b(?:{MATRIX[capability]})\b", listing)),
        "tf32": "tf32" in kernel.asm["ptx"],
        "sha256": hashlib.sha256(code).hexdigest(),
    }


def tool(name: str, *args: str) -> str:
    """What one of the binaries that come with Triton prints."""
    import triton

    place = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(place), *args], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps(compile_for(int(sys.argv[1]), sys.argv[2:])))
