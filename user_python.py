"""Python files that a user names: loaded as modules, and functions of them by `FILE.py:FUNCTION`.

The file is the user's own program, and runs as one. The errors are UsageError that names the file, its line and what it
raised.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import UsageError, cut, nearest, quoted, quoted_all
from .user_files import check_regular

SUFFIX = ".py"


def is_function_of_file(text: str) -> bool:
    """Return True for `FILE.py:FUNCTION`."""
    return text.rpartition(":")[0].endswith(SUFFIX)


def load_function(text: str, name: str) -> Callable[..., Any]:
    """The function that `FILE.py:FUNCTION` names; UsageError, which calls the text `name`, where there is none."""
    file, _, wanted = text.rpartition(":")
    if not is_function_of_file(text) or not wanted.isidentifier():
        raise UsageError(f"{name} is {quoted(text)}; expected FILE.py:FUNCTION, such as my_file.py:my_function")
    content = vars(load_module(file, name))
    function = content.get(wanted)
    if not callable(function):
        own = [key for key, value in content.items() if getattr(value, "__module__", "") == content["__name__"]]
        has = f"it has {quoted_all(own)}" if own else "it has none"
        what = "no function" if function is None else f"{quoted(function, 60)}, no function, under"
        raise UsageError(f"{name}: {quoted(file)} has {what} {quoted(wanted)}{nearest(wanted, own)}; {has}")
    loaded: Callable[..., Any] = function
    return loaded


def load_module(path: str | Path, name: str) -> ModuleType:
    """Run a Python file as a module of its own; UsageError for one that cannot be read or raises.

    The module is in `sys.modules` under a name made of the path, as Triton and dataclasses need it.
    """
    file = check_regular(path, name).resolve()
    title = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = spec_from_file_location(title, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{name} {quoted(str(path))} is no Python file; expected FILE{SUFFIX}")
    module = sys.modules[title] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the file is the user's, and so is what it raises
        del sys.modules[title]
        raise UsageError(f"{name} {quoted(str(path))} cannot be loaded: {raised(error, str(file))}") from error
    return module


def raised(error: BaseException, file: str) -> str:
    """An error in one line, with the last line of `file` on its way: `ValueError: no, at line 7 of 'a.py'`."""
    text = " ".join(str(error).split())
    message = f"{type(error).__name__}{': ' if text else ''}{cut(text)}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    return f"{message}, at line {lines[-1]} of {quoted(file)}" if lines else message
