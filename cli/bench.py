"""`inferix bench`: how fast, as a share of what the machine can do, and against what."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from ..errors import InferixError, UsageError, nearest

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def common() -> None:
    """Measure speed, with the machine's limit beside it.

    Example: inferix bench kernels --op block_attention
    """


@app.command()
def kernels(
    op: list[str] = typer.Option([], help="An op by name; repeatable.  [default: all]"),
    case: list[str] = typer.Option([], help="A case by name; repeatable.  [default: all that fit the machine]"),
    shape: str | None = typer.Option(None, metavar="NAME=N,...", help="Sizes of your own, for one op."),
    dtype: str = typer.Option("bfloat16", help="bfloat16, float16 or float32."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    out: Path | None = typer.Option(None, help="Folder for kernels.json and kernels.png."),
    compile_only: bool = typer.Option(False, "--compile-only", help="Compile for every architecture; needs no GPU."),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Time each kernel after checking it against its reference; on a CPU, time the references.

    Example: inferix bench kernels --op block_attention --shape q=4680,kv=32760,heads=12,dim=128

    Example: inferix bench kernels --compile-only
    """
    console = Console(stderr=True)
    if compile_only:
        return tell_compiled(as_json)

    from ..bench.kernels import Wanted, draw, run, shown
    from ..runtime.config import DTYPES, check_device, default_device

    if dtype not in ("bfloat16", "float16", "float32"):
        raise UsageError(f"--dtype is {dtype!r}{nearest(dtype, DTYPES)}; expected bfloat16, float16 or float32")
    device = device or default_device()
    check_device(device)
    if device == "cpu":
        console.print("no GPU is used: these are times of the plain references on a CPU", highlight=False)
    wanted = Wanted(tuple(op), tuple(case), shape, DTYPES[dtype], device)
    result = run(wanted, lambda said: console.print(said, highlight=False, soft_wrap=True))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        if draw(result, out / "kernels.png") is None:
            console.print("no picture: matplotlib is not installed; pip install matplotlib")
    if as_json:
        typer.echo(json.dumps(result))
        return
    table = Table("op", "case", "form", "time", "TFLOP/s", "GB/s", "of matmul", "of copy")
    for row in result["rows"]:
        for name, form in row["forms"].items():
            if "refused" in form:
                table.add_row(row["op"], row["case"], name, "refused", form["refused"], "", "", "")
            else:
                table.add_row(
                    row["op"], row["case"], name, shown(form["seconds"]), f"{form['tflops']:.3g}",
                    f"{form['gbytes']:.3g}", f"{form['of_matmul']:.0%}", f"{form['of_copy']:.0%}",
                )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def tell_compiled(as_json: bool) -> None:
    """The compile gate's table; InferixError if something in it is wrong."""
    from ..bench.compile_gate import compile_all, problems

    found = compile_all()
    if as_json:
        typer.echo(json.dumps(found))
    else:
        table = Table("kernel", "registers", "stack", "shared", "warps", "matrix instructions")
        for name, row in found.items():
            cells = (row["registers"], row["stack"], row["shared"], row["warps"], row["matrix"])
            table.add_row(name, *map(str, cells))
        Console(width=120).print(table)
    if wrong := problems(found):
        raise InferixError("; ".join(wrong))
