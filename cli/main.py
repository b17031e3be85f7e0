"""The `inferix` command and its exit codes.

0: success, 1: a run failed, 2: bad input, 130: interrupted. Only the package's own errors become one line on stderr,
with the flags of the arguments that they name (`flags.py`); any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import Any

import typer

from ..errors import InferixError, exit_code, no_memory, one_line
from ..version import __version__
from . import bench, checkpoint, evaluate
from .doctor import doctor
from .export import export
from .flags import with_flags
from .generate import PromptAt, generate
from .graph import graph
from .help import Command, Group, group
from .plan import plan
from .play import play
from .route import route
from .serve import serve


class Commands(Group):
    """The group of all commands; it prints the errors that any of them raises while it parses options or runs."""

    def invoke(self, ctx: Any) -> Any:  # the context's class has moved between versions of typer
        try:
            return super().invoke(ctx)
        except InferixError as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            typer.echo(with_flags(one_line(error)), err=True)
            raise typer.Exit(exit_code(error)) from error
        except (MemoryError, RuntimeError) as error:
            if not no_memory(error) or ctx.params.get("debug"):
                raise
            message = next(iter(str(error).splitlines()), type(error).__name__)
            typer.echo(f"error: out of memory: {message}; inferix plan shows what fits and what needs less", err=True)
            raise typer.Exit(1) from error


app = group(Commands)
app.command(cls=PromptAt)(generate)
app.command(cls=Command)(play)
app.command(cls=Command)(serve)
app.command(cls=Command)(route)
app.command(cls=Command)(plan)
app.command(cls=Command)(doctor)
app.command(cls=Command)(graph)
app.command(cls=Command)(export)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(evaluate.app, name="eval")
app.add_typer(bench.app, name="bench")


OF_RANKS = (["generate"], ["play"], ["serve"], ["bench", "parallel"])  # commands that several ranks run


def print_version(value: bool) -> None:
    if value:
        typer.echo(f"inferix {__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=print_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Run block-diffusion video models, block by block.

    Start with generate, which makes a video of the small world in this package. play walks through it in the terminal
    and serve in the browser, doctor shows what works on this machine, and plan shows what a real model needs. Every
    option is also an environment variable, such as INFERIX_GENERATE_SEED=7.

    Example: inferix generate --out video.mp4
    """


def main() -> None:
    """Run the command in sys.argv and exit with its code; typer exits with 2 and 130 itself.

    A rank above 0 of torchrun or srun takes everything from rank 0.
    """
    is_of_ranks = any(sys.argv[1 : 1 + len(words)] == words for words in OF_RANKS)
    if is_of_ranks and {"RANK", "SLURM_STEP_NUM_TASKS"} & set(os.environ):
        from ..runtime.parallel.rank_process import serve_if_ranked

        serve_if_ranked()
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    app(prog_name="inferix")
