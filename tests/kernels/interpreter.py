"""Repairs of Triton's interpreter, without which bfloat16 and FP8 kernels give wrong numbers in silence.

It multiplies the bits of bfloat16 operands, and rounds down to bfloat16 and FP8 by cutting. Here conversions go
through ml_dtypes (nearest even, FP8 clipped to its range as GPUs do), dots are computed in float32, and any
other arithmetic on bfloat16 fails aloud: kernels convert to float32 first. For the versions in constraints/.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NUMPY = {
    "bf16": ml_dtypes.bfloat16,
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "fp8e5": ml_dtypes.float8_e5m2,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
}
LARGEST = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot
_binary = interpreter.InterpreterBuilder.binary_op


def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Values of one floating dtype as another, both as the interpreter holds them (bits for small ones)."""
    if source.name not in NUMPY or target.name not in NUMPY:
        return _convert(values, source, target, rounding)
    typed = values if values.dtype == NUMPY[source.name] else values.view(NUMPY[source.name])
    wide = typed.astype(np.float64 if "fp64" in (source.name, target.name) else np.float32)
    if target.name in LARGEST:
        limit = LARGEST[target.name]
        wide = np.where(np.isnan(wide), wide, np.clip(wide, -limit, limit))
    rounded = wide.astype(NUMPY[target.name])
    return rounded.view(f"uint{target.primitive_bitwidth}").reshape(values.shape)


def widened(handle: Any) -> Any:
    if handle.dtype != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(handle.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)


def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _dot(self, widened(a), widened(b), *rest)


def binary(self: Any, left: Any, right: Any, op: Any) -> Any:
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar) and op not in (np.bitwise_and, np.bitwise_or):
        raise TypeError("arithmetic on bfloat16: convert to float32 first")
    return _binary(self, left, right, op)


def repair() -> None:
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.binary_op = binary
