"""Compile the GPU kernels for every architecture they are declared for, on a machine without a GPU.

Kernels are compiled in processes of their own, behind a stand-in driver that only knows an architecture's name. A
table for each supported Triton version lies in `compiled/`, so that a change of any value in it shows: registers,
stack, shared memory, numbers of instructions, and a hash. It proves that a kernel assembles, fits and uses the tensor
cores; not that it is right or fast. `executed` runs the same calls on a GPU and inspects what ran, so that the table is
about it.

A row holds only what every compile gives. ptxas assigns some registers by the addresses of its own data, which Linux
draws at random, so that the cubin of a few kernels has another hash each time. Such a row has the hash of the PTX.

Run: inferix bench kernels --compile-only
Write a table: python -m inferix.bench.compile_gate write
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..errors import InferixError, UsageError, one_line_errors
from ..kernels.catalog import SPECS, kernel_spec
from ..kernels.spec import ARCHITECTURES, has_triton
from ..runtime.files import write_atomically
from .sass import disassemble, loops_of, tool, touched_in_flight

Row = dict[str, Any]
TABLES = Path(__file__).with_name("compiled")
HASHES = ("cubin", "ptx")  # what a row may have the hash of, the nearest to what runs first
RUNS = 10  # compiles that a table is written from
WIDTH = re.compile(r" [cdh]\d+$")  # of a variant: channels, dimensions or heads
SHARED_LIMIT = {80: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may have; 80 has 163, but 86 runs its code
MATRIX = {  # instructions of the tensor cores: float16 and bfloat16, FP8, INT8
    80: "HMMA|IMMA",
    89: "HMMA|QMMA|IMMA",
    90: "HGMMA|QGMMA|IGMMA",
    100: "UTCHMMA|UTCQMMA|UTCIMMA|IMMA",  # Triton 3.6 has no UTCIMMA
    120: "HMMA|QMMA|IMMA",
}

ROLES = "QK, PV, wait 1, wait 0"  # of the loop of a kernel whose warps have roles: two products in flight


def compile_all(
    ops: Sequence[str] = (), cache: Path | None = None, names: Collection[str] | None = None
) -> dict[str, Row]:
    """Compile every variant of these ops, or of all, for every architecture: "op, variant, sm_90" -> `inspect`'s row.

    cache: folder of Triton's cache, Triton's own choice if None. names: the rows to compile, such as `sample` chooses;
    all if None. Raises UsageError for an op that does not exist and InferixError without Triton or where a kernel does
    not compile.
    """
    for op in ops:
        kernel_spec(op)
    if not has_triton():
        raise InferixError("Triton is not installed, so nothing can be compiled; pip install triton")
    env = {**os.environ, "TRITON_DISABLE_LINE_INFO": "1", "TRITON_INTERPRET": "0"}
    if cache is not None:
        env["TRITON_CACHE_DIR"] = str(cache)

    def compile_apart(capabilities: Sequence[int]) -> dict[str, Row]:
        listed = ",".join(map(str, capabilities))
        command = [sys.executable, "-m", "inferix.bench.compile_gate", "compile", listed, *ops]
        for name in names or ():
            command += ["--row", name]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InferixError(f"compiling for sm_{listed} failed: {done.stderr.strip()[-1500:]}")
        rows: dict[str, Row] = json.loads(done.stdout)
        return rows

    count = min(os.cpu_count() or 1, len(ARCHITECTURES))  # a process takes seconds to import torch and Triton
    with ThreadPoolExecutor(count) as processes:
        shares = [ARCHITECTURES[first::count] for first in range(count)]
        return {name: row for rows in processes.map(compile_apart, shares) for name, row in rows.items()}


def sample(names: Iterable[str]) -> list[str]:
    """Choose rows that hold each variant of a form at one width and architecture, and two architectures of a form."""
    variants: dict[str, list[str]] = {}
    forms: dict[str, list[str]] = {}
    for name in names:
        variants.setdefault(WIDTH.sub("", name.rpartition(", ")[0]), []).append(name)
        forms.setdefault(form_and_architecture(name)[0], []).append(name)
    uses, chosen = Counter[tuple[str, str]](), list[str]()

    def take(rows: Iterable[str]) -> None:
        """Take the row whose architecture the form, then all forms, have used least."""
        name = min(rows, key=lambda name: (uses[form_and_architecture(name)], uses["", form_and_architecture(name)[1]]))
        form, architecture = form_and_architecture(name)
        uses[form, architecture] += 1
        uses["", architecture] += 1
        chosen.append(name)

    for rows in variants.values():
        take(rows)
    for rows in forms.values():
        unused = [name for name in rows if not uses[form_and_architecture(name)]]
        if unused and len({form_and_architecture(name) for name in chosen if name in rows}) == 1:
            take(unused)
    return chosen


def form_and_architecture(name: str) -> tuple[str, str]:
    """("adaln by other", "sm_90") of the row "adaln by other, affine bf16 d1536, sm_90"."""
    return name.partition(", ")[0], name.rpartition(", ")[2]


def triton_version() -> str:
    """Version of the installed Triton, without a build's suffix."""
    import triton

    version: str = triton.__version__
    return version.partition("+")[0]


def table_file(version: str) -> Path:
    return TABLES / f"triton-{version}.json"


def read_table(version: str) -> dict[str, Row]:
    """Read the table of a Triton version; UsageError for one without a table."""
    if not table_file(version).is_file():
        known = ", ".join(sorted(file.stem.removeprefix("triton-") for file in TABLES.glob("triton-*.json")))
        raise UsageError(
            f"no table of compiled kernels for Triton {version}; expected one of {known}; install one of these, "
            "or write a table: python -m inferix.bench.compile_gate write"
        )
    table: dict[str, Row] = json.loads(table_file(version).read_text("utf-8"))
    return table


def reproducible_rows(compiled: Sequence[Mapping[str, Row]]) -> dict[str, Row]:
    """Reduce several compiles of the same kernels to a table of what is equal in all of them.

    The hash is that of the first of `HASHES` that has one value. Raises InferixError for a row that has none, or of
    which anything else differs.
    """
    table = {}
    for name, first in compiled[0].items():
        rows = [one[name] for one in compiled]
        for key in first.keys() - {"sha256"}:
            if any(row[key] != first[key] for row in rows):
                values = dict(Counter(row[key] for row in rows))
                raise InferixError(f"{name}: {key} differs between compiles, expected one value: {values}")
        stable = [kind for kind in HASHES if len({row["sha256"][kind] for row in rows}) == 1]
        if not stable:
            raise InferixError(f"{name}: {' and '.join(HASHES)} differ between compiles, expected one to be stable")
        table[name] = first | {"hash_of": stable[0], "sha256": first["sha256"][stable[0]]}
    return table


def differences(compiled: Mapping[str, Row], table: Mapping[str, Row]) -> list[str]:
    """Compare compiled kernels with a table: a line for each row that is missing on either side or differs."""
    wrong = [f"{name}: not in the table" for name in compiled.keys() - table.keys()]
    wrong += [f"{name}: in the table, but not compiled" for name in table.keys() - compiled.keys()]
    for name in compiled.keys() & table.keys():
        row, known = compiled[name], table[name]
        kind = known["hash_of"]
        got = row | {"hash_of": kind, "sha256": row["sha256"][kind]}
        for key in sorted(got.keys() | known.keys()):
            if got.get(key) != known.get(key):
                label = f"sha256 of the {kind}" if key == "sha256" else key
                wrong.append(f"{name}: {label} is {got.get(key)}; the table has {known.get(key)}")
    return sorted(wrong)


def problems(table: Mapping[str, Row]) -> list[str]:
    """Check compiled kernels, or a table of them, against the limits of their architectures: a line for each fault."""
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
        if "loops" in row:
            wrong += [f"{name}: {fault}" for fault in faults_of_roles(row)]
    return wrong


def faults_of_roles(row: Row) -> list[str]:
    """Faults of a kernel whose warps have roles: tiles not loaded by TMA, or products one at a time in a loop."""
    wrong = [] if row["copies"] else ["no UTMALDG instruction, so no tile is loaded by TMA"]
    wrong += [] if row["loops"] else ["no loop has a tensor core's product"]
    wrong += [f"{row['touched']} instructions touch registers of a product in flight"] if row["touched"] else []
    wrong += [f"its loop is {loop}; expected {ROLES}" for loop in row["loops"] if loop != ROLES]
    return wrong


def is_unproved(name: str) -> bool:
    """Return True for a row of a form that no card has run."""
    form = name.partition(",")[0].partition(" by ")[2] or "triton"
    return bool(SPECS[op_of(name)].form(form).unproved)


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
        """A number for each architecture, since Triton keeps compiled kernels by device."""
        return int(self.target.arch)

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
def intercepted(launch: Callable[..., Any]) -> Iterator[None]:
    """Within the block, a launch of a Triton kernel calls `launch(run, kernel, *args, **kwargs)`.

    run: Triton's own launch, to call with the kernel and the arguments.
    """
    import triton

    run = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = lambda self, *args, **kwargs: launch(run, self, *args, **kwargs)
    try:
        yield
    finally:
        triton.runtime.jit.JITFunction.run = run


@contextmanager
def launches(**options: Any) -> Iterator[list[Any]]:
    """The compiled kernels of what is launched within the block, each launched with these options besides its own."""
    compiled: list[Any] = []

    def noted(run: Callable[..., Any], kernel: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(run(kernel, *args, **kwargs | options))
        return compiled[-1]

    with intercepted(noted):
        yield compiled


def compile_for(capability: int, ops: Sequence[str], names: Collection[str] = ()) -> dict[str, Row]:
    """Compile all variants of these ops, or of all, for one architecture, through their own launch functions.

    names: the rows to compile; all without any.
    """
    import triton

    triton.runtime.driver.set_active(StandInDriver(capability))
    kernels = {}
    for name, run, inputs in cases_for(capability, ops):
        if names and name not in names:
            continue
        with launches(warmup=True) as compiled:
            run(**inputs)
        (kernels[name],) = compiled
    return inspect(kernels, capability)


def executed(device: str) -> dict[str, Row]:
    """Run the table's calls on a GPU: name -> row of the code that ran. TRITON_DISABLE_LINE_INFO=1 must be set.

    Forms that no card has run are left out, since a fault of theirs would end the process.
    """
    major, minor = torch.cuda.get_device_capability(device)
    capability, kernels = 10 * major + minor, {}
    for name, run, inputs in cases_for(capability):
        if is_unproved(name):
            continue
        there = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        with launches() as compiled:
            run(**there)
        torch.cuda.synchronize(device)
        (kernels[name],) = compiled
    return inspect(kernels, capability)


def inspect(kernels: Mapping[str, Any], capability: int) -> dict[str, Row]:
    """Resources, instructions and hashes of kernels that Triton compiled for one architecture."""
    rows = {}
    listings = disassemble([kernel.asm["cubin"] for kernel in kernels.values()], capability)
    for (name, kernel), code in zip(kernels.items(), listings, strict=True):
        opcodes = [instruction.opcode for instruction in code]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        matrix = re.compile(MATRIX[capability])
        rows[name] = {
            "architecture": capability,
            "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
            "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
            "shared": kernel.metadata.shared,
            "warps": kernel.metadata.num_warps,
            "instructions": len(opcodes),
            "local": sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),  # among them spilled registers
            "matrix": sum(bool(matrix.fullmatch(opcode.partition(".")[0])) for opcode in opcodes),
            "tf32": "tf32" in kernel.asm["ptx"],
            "sha256": {kind: sha256(kernel.asm[kind]) for kind in HASHES},
        }
        if "USETMAXREG" in {opcode.partition(".")[0] for opcode in opcodes}:  # its warps have roles of their own
            copies = sum(opcode.startswith("UTMALDG") for opcode in opcodes)
            loops = [", ".join(loop) for loop in loops_of(code)]
            rows[name] |= {"copies": copies, "loops": loops, "touched": len(touched_in_flight(code))}
    return rows


def sha256(artefact: str | bytes) -> str:
    return hashlib.sha256(artefact.encode() if isinstance(artefact, str) else artefact).hexdigest()


app = typer.Typer(help="The compile gate's parts; `inferix bench kernels --compile-only` shows what it finds.")


@app.command("compile")
def print_compiled(
    capabilities: Annotated[str, typer.Argument(help="Compute capabilities times ten, as in 80,90.")],
    ops: Annotated[list[str] | None, typer.Argument(help="Ops to compile; all without any.")] = None,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Rows to compile; all without any.")] = None,
) -> None:
    """Compile for these architectures and print the rows as JSON."""
    compiled = [compile_for(int(capability), ops or [], rows or []) for capability in capabilities.split(",")]
    print(json.dumps({name: row for one in compiled for name, row in one.items()}))


@app.command("write")
def write_table(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops whose rows to write; all without any.")] = None,
    runs: Annotated[int, typer.Option(help="Compiles to compare, each with an empty cache.", min=2)] = RUNS,
    only: Annotated[list[str] | None, typer.Option("--row", help="Rows to write; others stay as they are.")] = None,
) -> None:
    """Compile several times and write the rows into the table of the installed Triton version.

    What differs from compile to compile does not go into the table. Nothing is written if a row breaks a rule.
    """
    compiled = []
    for run in range(runs):
        print(f"compile {run + 1} of {runs}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as cache:
            compiled.append(compile_all(ops or (), Path(cache), only))
    rows = reproducible_rows(compiled)
    if wrong := problems(rows):
        raise InferixError("; ".join(wrong))
    file = table_file(triton_version())
    kept = read_table(triton_version()) if (ops or only) and file.is_file() else {}
    kept = {name: row for name, row in kept.items() if only or op_of(name) not in (ops or ())}
    text = json.dumps(kept | rows, indent=1, sort_keys=True) + "\n"
    file.parent.mkdir(exist_ok=True)
    print(write_atomically(file, lambda part: part.write_text(text, "utf-8")))


if __name__ == "__main__":
    with one_line_errors():
        app()
