"""Checks of arguments at the public edge, before anything is made.

Each takes a name and a value and returns the value in the type that the runtime uses. UsageError names the argument,
its value and what is expected. numpy's numbers are accepted where Python's are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UsageError, nearest, quoted
from ..user_files import check_reachable

Check = Callable[[str, Any], Any]
LONGEST_SIDE = 1 << 16  # pixels


def expected(name: str, value: object, what: str) -> UsageError:
    return UsageError(f"{name} is {quoted(value)}; expected {what}")


def checked(checks: Mapping[str, Check], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, each as its check returns it."""
    return {name: checks[name](name, value) for name, value in arguments.items()}


def optional(check: Check) -> Check:
    """A check that also takes None."""
    return lambda name, value: None if value is None else check(name, value)


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise expected(name, value, "text")
    return value


def listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise expected(name, value, "a list")
    return list(value)


def choice(known: Collection[str]) -> Check:
    """A check for one of some names."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            raise UsageError(f"{name} is {quoted(value)}{hint}; expected {', '.join(known)}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise expected(name, value, "True or False")
    return bool(value)


def integer(least: int | None = None, most: int | None = None) -> Check:
    """A check for a whole number within bounds."""
    bounds = "" if least is None else f" of {least} or more" if most is None else f" of {least} to {most}"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise expected(name, value, f"a whole number{bounds}")
        number = int(value)
        if (least is not None and number < least) or (most is not None and number > most):
            raise expected(name, value, f"{least} or more" if most is None else f"a whole number{bounds}")
        return number

    return check


def number(name: str, value: Any) -> float:
    """A finite number."""
    try:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise expected(name, value, "a finite number")
        return float(value)
    except OverflowError as error:
        raise expected(name, value, "a finite number") from error


def above_zero(what: str = "a number", most: float = math.inf) -> Check:
    """A check for a finite number above 0, up to `most`."""

    def check(name: str, value: Any) -> float:
        bounds = f"{what} above 0" + ("" if most == math.inf else f", up to {most:g}")
        if not 0 < number(name, value) <= most:
            raise expected(name, value, bounds)
        return float(value)

    return check


def path(name: str, value: Any) -> Path:
    """A path as text or a path object. It need not exist."""
    if not isinstance(value, str | os.PathLike):
        raise expected(name, value, "a path")
    written = os.fspath(value)
    if not isinstance(written, str) or not written or "\0" in written:
        raise expected(name, value, "a path")
    return check_reachable(written, name)


def path_text(name: str, value: Any) -> str:
    """A path as the text that was given."""
    path(name, value)
    return os.fspath(value)


def size(name: str, value: Any) -> tuple[int, int]:
    """(width, height) in pixels."""
    if (isinstance(value, list | tuple) and len(value) == 2) or (isinstance(value, np.ndarray) and value.shape == (2,)):
        width, height = value
    else:
        raise expected(name, value, "(width, height) in pixels")
    side = integer(1, LONGEST_SIDE)
    return side(f"{name}[0]", width), side(f"{name}[1]", height)


def names(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts; one text is none."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise expected(name, value, "a list of names")
    items = tuple(value)
    if not all(isinstance(item, str) for item in items):
        raise expected(name, value, "a list of names")
    return items


def pixels(name: str, value: Any) -> Any:
    """A path, or an array uint8 [H, W, 3] or [T, H, W, 3]."""
    if isinstance(value, str | os.PathLike):
        return path(name, value)
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim not in (3, 4) or value.shape[-1] != 3:
        given = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else quoted(value)
        raise UsageError(f"{name} is {given}; expected a path, or an array uint8 [H, W, 3] or [T, H, W, 3]")
    return value


def embeddings(name: str, value: Any) -> Tensor | Path:
    """A tensor, or the path of a file of one."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, str | os.PathLike):
        raise expected(name, value, "a tensor [L, text_dim] or a path")
    return path(name, value)


def callback(name: str, value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise expected(name, value, "a function")
    return value


def instance(kind: type[Any]) -> Check:
    """A check for an object of a class."""

    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise expected(name, value, f"an object of {kind.__name__}")
        return value

    return check


def noise_source(name: str, value: Any) -> Any:
    """An object with a method `draw`, such as InjectedNoise."""
    if not callable(getattr(value, "draw", None)) or isinstance(value, type):
        raise expected(name, value, "InjectedNoise, or an object with a method draw")
    return value
