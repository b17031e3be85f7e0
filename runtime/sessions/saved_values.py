"""Checks of the values in a saved session: each names the field, its value and what is expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import quoted

LARGEST = 1 << 53  # of numbers of frames and blocks


class InvalidField(Exception):
    """A field of a saved session that no session can have; the message names it."""


def invalid(field: str, value: object, expected: str) -> InvalidField:
    return InvalidField(f"{field} is {quoted(value)}; expected {expected}")


def fields_of(field: str, value: Any, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object with just these names."""
    if not isinstance(value, dict):
        raise invalid(field, value, "a JSON object")
    for name in names:
        if name not in value:
            raise InvalidField(f"{field} lacks {name!r}")
    if extra := set(value) - {*names, *optional}:
        raise invalid(field, min(extra), f"no names but {', '.join((*names, *optional))}")
    return value


def list_of(field: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise invalid(field, value, "a list")
    return value


def integer(field: str, value: Any, least: int = 0, most: int = LARGEST) -> int:
    """A whole number of `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise invalid(field, value, f"a whole number of {least} to {most}")
    return value


def finite(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise invalid(field, value, "a finite number")
    return value


def boolean(field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(field, value, "true or false")
    return value


def ascending(field: str, value: Any, stop: int) -> list[int]:
    """Whole numbers below `stop`, each larger than the one before."""
    numbers = [integer(field, number, 0, stop - 1) for number in list_of(field, value)]
    if any(later <= earlier for earlier, later in zip(numbers, numbers[1:], strict=False)):
        raise invalid(field, value, "numbers in ascending order, each once")
    return numbers


def places(field: str, value: Any, stop: int) -> dict[int, int]:
    """Pairs of a frame below `stop` and its position, each frame once."""
    pairs = list_of(field, value)
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise invalid(field, value, "pairs of a frame and its position")
    found = {integer(field, frame, 0, stop - 1): integer(field, at, -LARGEST) for frame, at in pairs}
    if len(found) < len(pairs):
        raise invalid(field, value, "each frame once")
    return found


def check_tensor(
    name: str, tensor: Tensor | None, shape: Sequence[int | None], dtype: torch.dtype | None = None
) -> None:
    """InvalidField unless a tensor has a shape, None standing for any length, and a dtype, None for any float."""
    if tensor is None:
        raise InvalidField(f"the file lacks tensor {name!r}")
    sizes = len(tensor.shape) == len(shape) and all(
        size is None or size == length for length, size in zip(tensor.shape, shape, strict=True)
    )
    if not sizes or (dtype is None and not tensor.dtype.is_floating_point) or (dtype and tensor.dtype != dtype):
        there, wanted = [f"{tensor.dtype} {list(tensor.shape)}", f"{dtype or 'floats'} {list(shape)}"]
        raise InvalidField(f"tensor {name!r} is {there}; expected {wanted}".replace("None", "any"))
