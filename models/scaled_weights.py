"""Weights stored in FP8 or INT8 beside their scales: weight = value * scale, computed one tensor at a time.

Published layouts: `scale_weight` of a layer with the mark `scaled_fp8`, or `weight_scale` with the mark `comfy_quant`,
one scale per tensor (ComfyUI); `weight_scale` with one scale per output row (LightX2V, compressed-tensors). Scales of
activations are left out: they belong to the arithmetic of a kernel, not to the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..errors import UsageError, quoted

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHT_SCALES = ("scale_weight", "weight_scale")
LEFT_OUT = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")  # of activations, and marks
COMFY_FORMATS = ("float8_e4m3fn", "float8_e5m2")
LONGEST_MARK = 4096  # bytes


class ScaledTensor(Tensor):
    """A float32 tensor that stores values [out, in, ...] and their scales; an operation on it computes the product."""

    stored: Tensor
    scales: Tensor
    __torch_function__: ClassVar[Any] = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor, scales: Tensor) -> ScaledTensor:
        make: Callable[..., ScaledTensor] = Tensor._make_wrapper_subclass
        made = make(cls, values.shape, dtype=torch.float32, device=values.device)
        made.stored, made.scales = values, scales
        return made

    def product(self) -> Tensor:
        return self.stored.float() * self.scales.float()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<ScaledTensor {list(self.shape)} of {self.stored.dtype}>"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(cls, cls.product, (args, kwargs or {}))
        return func(*args, **kwargs)


def unscaled(tensor: Tensor) -> Tensor:
    """Return a plain tensor: the product of a ScaledTensor, any other as it is."""
    return tensor.product() if isinstance(tensor, ScaledTensor) else tensor


def stored_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.stored.dtype if isinstance(tensor, ScaledTensor) else tensor.dtype


def with_scales(path: object, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join weights with their scales, in a file that has scales of a published layout; other tensors are unchanged.

    Raises UsageError that names a scale without its weight, or of a layout that is not read.
    """
    scales = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] in WEIGHT_SCALES}
    if not scales:
        return dict(tensors)
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] == "comfy_quant":
            check_mark(path, name, tensor)
    left = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in LEFT_OUT}
    for name, scale in scales.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        values = left.get(weight)
        if values is None:
            raise UsageError(f"{quoted(path)} has the scale {quoted(name)}, but not its weight; fetch the file again")
        if isinstance(values, ScaledTensor):
            raise UsageError(f"{quoted(path)} has two scales of {quoted(weight)}; expected one")
        left[weight] = ScaledTensor(values, scale_of(path, name, values, scale))
        del left[name]
    return left


def scale_of(path: object, name: str, values: Tensor, scale: Tensor) -> Tensor:
    """Return a weight's scale in a shape that multiplies it. Raises UsageError for another layout."""
    rows = values.ndim == 2 and tuple(scale.shape) in ((len(values),), (len(values), 1))
    single = scale.numel() == 1 and values.dtype in FP8
    readable = values.dtype in FP8 or (values.dtype == torch.int8 and rows)
    if not readable or scale.dtype not in FLOATS or not (single or rows):
        raise UsageError(
            f"{quoted(path)} has {quoted(name)} {list(scale.shape)} in {plain(scale)} for a weight "
            f"{list(values.shape)} in "
            f"{plain(values)}; expected FP8 with one scale, or FP8 or INT8 with one for each row: use the bfloat16 file"
        )
    if not scale.isfinite().all():
        raise UsageError(f"{quoted(path)}: {quoted(name)} is not finite; the file is damaged")
    return scale.reshape(()) if single else scale.reshape(-1, 1)


def check_mark(path: object, name: str, mark: Tensor) -> None:
    """Raise UsageError unless a layer's `comfy_quant` [n] uint8, which is JSON, says that it is in plain FP8."""
    content: Any = None
    if mark.dtype == torch.uint8 and mark.numel() <= LONGEST_MARK:
        try:
            content = json.loads(bytes(mark.flatten().tolist()))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{quoted(path)}: {quoted(name)} is no JSON; the file is damaged") from error
    form = content.get("format") if isinstance(content, dict) else None
    if form not in COMFY_FORMATS:
        raise UsageError(
            f"{quoted(path)} has {quoted(name)} of format {quoted(form)}; expected one of {', '.join(COMFY_FORMATS)}: "
            "use the "
            "bfloat16 file"
        )


def plain(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
