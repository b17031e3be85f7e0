"""Python programs in processes that are forked from one with torch in it, since importing torch takes seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["inferix.models.registry"])


def run_code(code: str, *arguments: str, environment: Mapping[str, str]) -> tuple[int, str, str]:
    """Exit code, output and errors of `python -c code arguments`, in an environment of its own."""
    with TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=run_here, args=(code, arguments, dict(environment), folder))
        process.start()
        process.join()
        out, errors = (Path(folder, name).read_text("utf-8") for name in ("out", "errors"))
        return process.exitcode, out, errors


def run_here(code: str, arguments: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for handle, name in ((1, "out"), (2, "errors")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, handle)
        os.close(file)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
