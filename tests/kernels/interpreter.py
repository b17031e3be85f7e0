"""Repairs of Triton's interpreter, without which bfloat16 and FP8 kernels give wrong numbers in silence.

It multiplies the bits of bfloat16 operands, and rounds down to bfloat16 and FP8 by cutting. Here conversions go
through ml_dtypes (nearest even, FP8 clipped to its range as GPUs do), dots are computed in float32, and any
other arithmetic on bfloat16 fails aloud: kernels convert to float32 first. For the versions in constraints/.

Repaired for speed: it replaces the members of `triton.language` at every call of a function in a kernel, here once in a
process, and looks for overflows of integers by eight operations of its own, here by one of numpy.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

NUMPY = {
    "bf16": ml_dtypes.bfloat16,
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "fp8e5": ml_dtypes.float8_e5m2,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
}
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
LARGEST = {"fp8e4nv": 448.0, "fp8e5": 57344.0}
_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot
_binary = interpreter.InterpreterBuilder.binary_op
_patch = interpreter._patch_lang
_of_scalar = cache(interpreter._get_np_dtype)
_patched: set[int] = set()  # ids of modules


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


def patch_once(kernel: Any) -> Any:
    """Replace the members of the language modules that a kernel's module has, where no kernel before it had them."""
    modules = {id(value) for value in kernel.__globals__.values() if value is tl or value is tl.core}
    if not modules <= _patched:
        _patched.update(modules)
        _patch(kernel)
    return interpreter._LangPatchScope()  # nothing to restore


def numpy_dtype(dtype: Any) -> Any:
    """Dtype of numpy for a dtype, block or pointer of the language; the interpreter makes a table at every call."""
    scalar = dtype.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _of_scalar(scalar)


def expect_no_overflow(self: Any, left: Any, right: Any, op: Any) -> None:
    """Raise AssertionError where a sum, difference or product does not fit into the integers of its operands."""
    dtype, name = left.type.scalar, op.__name__
    if dtype.int_bitwidth < 64:
        exact = OPERATIONS[name](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
        fits = (exact >= dtype.get_int_min_value()) & (exact <= dtype.get_int_max_value())
        assert fits.all(), f"{name} overflows {dtype}"


def repair() -> None:
    TritonSemantic.binary_op_sanitize_overflow_impl = expect_no_overflow
    interpreter._get_np_dtype = numpy_dtype
    interpreter._patch_lang = patch_once
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter.InterpreterBuilder.binary_op = binary
