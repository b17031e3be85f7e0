"""The user's choices about a model and where it runs, checked once."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..errors import UsageError, nearest
from ..graphs.rewrites.lowp import PrecisionMap
from ..models.wan.checkpoint import FORMATS
from ..models.wan.transformer import PRECISIONS
from .kv.page_store import KV_DTYPES

EXECUTORS = ("eager", "fused", "captured")
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

EVERY_BLOCK = ("blocks.*",)  # layers that low precision is for, unless told
FP8_CAPABILITY = (8, 9)  # of GPUs whose kernels read FP8


@dataclass(frozen=True)
class EngineConfig:
    """What `load` was asked for, defaults filled in.

    base: folder with the VAE and text encoder, if they are not beside the model; vae and text_encoder name
    one of them alone. use_ema: the averaged weights of a training file. precision: a name of `PRECISIONS`.
    lora: adapter file or folder, merged into the weights `lora_scale` times; lora_partial: also one of which only a
    part fits. kv_memory: bytes for keys and values, shared by all sessions; None is what one session needs, and more
    when there is need of more. kv_dtype: in which they are kept, a name of `KV_DTYPES`; None is the model's own.
    kv_offload: those of a paused session go to host memory, and others may have their room until it is resumed.
    executor: how passes run, a name of `EXECUTORS`. fast_vae: a decoder beside the model's own, as in `vae`, that
    overload may go over to. graphs: folder of stored graphs, which those that are missing there are added to.
    lowp: `fp8` or `int8` for linear layers in passes, those that a pattern of lowp_layers names and none of lowp_keep;
    fast in graphs, a plain reference in eager. batches: file of measured times of sessions that run as one.
    """

    model: str
    preset: str
    device: str
    dtype: str
    base: str | None
    checkpoint_format: str | None
    vae: str | None
    text_encoder: str | None
    use_ema: bool
    precision: str
    lora: str | None = None
    lora_scale: float = 1.0
    lora_partial: bool = False
    kv_memory: int | None = None
    kv_dtype: str | None = None
    kv_offload: bool = False
    executor: str = "eager"
    fast_vae: str | None = None
    graphs: str | None = None
    lowp: str | None = None
    lowp_layers: tuple[str, ...] = EVERY_BLOCK
    lowp_keep: tuple[str, ...] = ()
    batches: str | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("executor", self.executor, EXECUTORS)
        check_choice("precision", self.precision, PRECISIONS)
        if self.kv_dtype is not None:
            check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        if self.checkpoint_format is not None:
            check_choice("checkpoint_format", self.checkpoint_format, FORMATS)
        for key in ("use_ema", "kv_offload", "lora_partial"):
            if not isinstance(value := getattr(self, key), bool):
                raise UsageError(f"{key} is {value!r}; expected true or false")
        if not math.isfinite(self.lora_scale):
            raise UsageError(f"lora_scale is {self.lora_scale}; expected a number, 1 for the adapter as it is")
        if self.lora_scale != 1.0 and self.lora is None:
            raise UsageError(f"lora_scale is {self.lora_scale}, but there is no lora; give one (--lora)")
        if self.lora_partial and self.lora is None:
            raise UsageError("lora_partial is True, but there is no lora; give one (--lora)")
        check_device(self.device)
        for key in ("kv_dtype", "lowp"):
            if getattr(self, key) == "fp8" and self.device.startswith("cuda"):
                major, minor = torch.cuda.get_device_capability(self.device)
                if (major, minor) < FP8_CAPABILITY:
                    raise UsageError(
                        f"{key} is 'fp8', but {self.device} has compute capability {major}.{minor}, and FP8 needs "
                        f"{FP8_CAPABILITY[0]}.{FP8_CAPABILITY[1]}; use int8"
                    )
        if self.precision_map is None and (self.lowp_keep or self.lowp_layers != EVERY_BLOCK):
            raise UsageError("lowp_layers and lowp_keep say which layers lowp takes; give lowp, fp8 or int8, too")
        if self.graphs is not None and self.executor == "eager":
            raise UsageError(f"graphs is {self.graphs!r}, but executor eager has none; use fused, or captured on a GPU")
        if self.executor == "captured" and not self.device.startswith("cuda"):
            raise UsageError(f"executor captured needs a GPU, and device is {self.device!r}; use fused")

    @property
    def precision_map(self) -> PrecisionMap | None:
        """Which linear layers run in low precision, and in which."""
        return None if self.lowp is None else PrecisionMap(self.lowp, self.lowp_layers, self.lowp_keep)


def patterns(given: str | Collection[str]) -> tuple[str, ...]:
    """Names, or one, with wildcards."""
    return (given,) if isinstance(given, str) else tuple(given)


def check_choice(key: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UsageError(f"{key} is {value!r}{nearest(str(value), known)}; expected {', '.join(known)}")


def check_device(name: str) -> None:
    """UsageError unless torch can use the device here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device is {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device is {name!r}, but torch {torch.__version__} finds no GPU; use cpu, or see doctor")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {name!r}, but there are {torch.cuda.device_count()} GPUs, counted from 0")


def default_executor(device: str) -> str:
    """captured on a GPU, elsewhere eager."""
    return "captured" if device.startswith("cuda") else "eager"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU; float32 elsewhere, since many CPUs have no fast bfloat16."""
    return "bfloat16" if device.startswith("cuda") else "float32"
