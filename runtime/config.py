"""Settings of an engine: the model, where it runs and how, checked once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, nearest, quoted
from ..graphs.rewrites.lowp import PrecisionMap
from ..kernels.catalog import kernel_spec
from ..models.registry import formats
from ..models.transformer import PRECISIONS
from ..schemes.layouts import AUTO, LAYERS, LAYOUTS, MOST_RANKS
from .arguments import above_zero, flag, integer, number, path_text, text
from .byte_sizes import parse_bytes
from .executor_specs import REFERENCE, ExecutorSpec, default_executor, executor_spec, names_with
from .kv.page_store import KV_DTYPES

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

CAMERA_LAYERS = ("block", "pass")
EVERY_BLOCK = ("blocks.*",)  # layers that low precision is for, unless told
FP8_CAPABILITY = (8, 9)  # of GPUs whose kernels read FP8


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine. `EngineConfig.of` fills in what depends on model and device, and coerces values.

    model: checkpoint file or folder, or a named model. preset: decoding scheme. device: cpu, cuda or cuda:N.
    dtype: of weights and latents, a name of `DTYPES`. executor: a name of `EXECUTORS`.
    base: folder with the VAE and text encoder, if they are not beside the model; vae and text_encoder name
    one of them alone. checkpoint_format: one of a family; None detects it. names: YAML file of the
    checkpoint's tensor names. use_ema: averaged weights of a training file. precision: a name of `PRECISIONS`.
    lora: adapter file or folder, merged into the weights `lora_scale` times; lora_partial: also one of which only a
    part fits. kv_memory: bytes for keys and values of all sessions; None starts with one session's need and grows.
    kv_dtype: of cached keys and values, a name of `KV_DTYPES`; None is the model's own. kv_offload: pages of a paused
    session move to host memory. fast_vae: a second decoder, as in `vae`, that overload may switch to.
    graphs: folder of stored graphs; missing ones are added. lowp: `fp8` or `int8` for linear layers, those that a
    pattern of lowp_layers names and none of lowp_keep; fast in graphs, a plain reference in eager. batches: file of
    measured batch times. drift_meter: blocks' records have the drift of their pictures. engine: folder of an exported
    engine, whose programs run in place of the model. kernels: form by op, such as {"block_attention": "sdpa"}; also one
    that was registered, or FILE.py:FUNCTION. gpus: ranks that share each pass. parallel: their layout, a name
    of `LAYOUTS`, or auto, the planner's choice; measured: JSON file of times of layouts, for auto. shard_weights: ranks
    of a pass divide the large matrices, and gather each when its layer runs. shard_decoder: ranks decode some columns
    of each picture; False: rank 0 decodes beside the next block; None: as the decoder allows. rank_timeout: seconds
    after which a rank that does not answer counts as hung. camera_layers: what depends on a camera alone is computed
    once per `block` and kept, or in every `pass`, which needs less memory.
    """

    model: str
    preset: str
    device: str
    dtype: str
    executor: str = REFERENCE
    base: str | None = None
    checkpoint_format: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    names: str | None = None
    use_ema: bool = True
    precision: str = "reference"
    lora: str | None = None
    lora_scale: float = 1.0
    lora_partial: bool = False
    kv_memory: int | None = None
    kv_dtype: str | None = None
    kv_offload: bool = False
    fast_vae: str | None = None
    graphs: str | None = None
    lowp: str | None = None
    lowp_layers: tuple[str, ...] = EVERY_BLOCK
    lowp_keep: tuple[str, ...] = ()
    batches: str | None = None
    drift_meter: bool = False
    engine: str | None = None
    kernels: Mapping[str, str] = field(default_factory=dict)
    gpus: int = 1
    parallel: str = AUTO
    measured: str | None = None
    shard_weights: bool = False
    shard_decoder: bool | None = None
    rank_timeout: float = 60.0
    camera_layers: str = "block"

    @classmethod
    def of(cls, model: str | Path, preset: str, **settings: Any) -> EngineConfig:
        """Make a config from `load`'s arguments; None leaves a setting at its default.

        Raises UsageError for a value of a wrong type or one that cannot be used here.
        """
        settings = {"model": model, "preset": preset} | {
            key: value for key, value in settings.items() if value is not None
        }
        settings = {key: COERCIONS[key](key, value) for key, value in settings.items()}
        device = settings.setdefault("device", default_device())
        settings.setdefault("dtype", default_dtype(device))
        settings.setdefault("executor", default_executor(device))
        return cls(**settings)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("precision", self.precision, PRECISIONS)
        if self.kv_dtype is not None:
            check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        if self.checkpoint_format is not None:
            check_choice("checkpoint_format", self.checkpoint_format, formats())
        if self.lora_scale != 1.0 and self.lora is None:
            raise UsageError(f"lora_scale is {self.lora_scale}, but there is no lora; give lora")
        if self.lora_partial and self.lora is None:
            raise UsageError("lora_partial is True, but there is no lora; give lora")
        check_device(self.device)
        check_choice("parallel", self.parallel, (AUTO, *LAYOUTS))
        check_choice("camera_layers", self.camera_layers, CAMERA_LAYERS)
        self._check_ranks()
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
        self._check_capabilities()
        for op, form in self.kernels.items():
            kernel_spec(op).named(form, torch.device(self.device))

    def _check_ranks(self) -> None:
        """UsageError for settings that several ranks do not have."""
        if self.measured is not None and (self.gpus == 1 or self.parallel != AUTO):
            raise UsageError(
                f"measured is {quoted(self.measured)} with gpus={self.gpus} and parallel={self.parallel}, where there "
                f"is nothing to choose; give gpus, 2 or more, with parallel={AUTO}, or leave measured out"
            )
        if self.gpus == 1:
            for key, nothing in (("parallel", AUTO), ("shard_weights", False), ("shard_decoder", False)):
                if getattr(self, key) not in (nothing, None):
                    raise UsageError(
                        f"{key} is {quoted(getattr(self, key))} with gpus=1, where nothing is divided; give gpus, 2 or "
                        "more"
                    )
            return
        if self.parallel == LAYERS:
            for key, refused in (
                ("shard_weights", self.shard_weights), ("lowp_keep", bool(self.lowp_keep)),
                ("lowp_layers", self.lowp_layers != EVERY_BLOCK),
            ):
                if refused:
                    raise UsageError(
                        f"{key} is {quoted(getattr(self, key))} with parallel={LAYERS}, whose ranks have layers of "
                        f"their own; leave {key} out, or use another layout"
                    )
        if self.shard_weights and self.lowp is not None:
            raise UsageError(
                f"shard_weights is True with lowp={self.lowp}, whose packed layers are not divided; leave one out"
            )

    def _check_capabilities(self) -> None:
        """UsageError for a setting that the executor does not take."""
        spec, name = self.executor_spec, self.executor
        for key, value, taken, capable in (
            ("graphs", self.graphs, spec.graphs, lambda other: other.graphs),
            ("lowp", self.lowp, self.lowp in spec.lowp, lambda other: self.lowp in other.lowp),
            ("kv_dtype", self.kv_dtype, reads(spec, self.kv_dtype), lambda other: reads(other, self.kv_dtype)),
        ):
            if value is not None and not taken:
                use = names_with(capable)
                raise UsageError(f"{key} is {quoted(value)}, which executor {quoted(name)} does not take; use {use}")
        kind = torch.device(self.device).type
        if kind not in spec.devices:
            raise UsageError(
                f"executor {quoted(name)} runs on {' or '.join(spec.devices)}, and device is {quoted(self.device)}; "
                f"use {names_with(lambda other: kind in other.devices)}"
            )

    @property
    def executor_spec(self) -> ExecutorSpec:
        """Capabilities of the executor."""
        return executor_spec(self.executor)

    @property
    def keeps_frames(self) -> bool:
        """True where what depends on the channels of a block's frames is computed once and kept for the block."""
        return self.camera_layers == "block"

    @property
    def precision_map(self) -> PrecisionMap | None:
        """Which linear layers run in low precision, and in which."""
        return None if self.lowp is None else PrecisionMap(self.lowp, self.lowp_layers, self.lowp_keep)


def reads(spec: ExecutorSpec, kv_dtype: str | None) -> bool:
    return spec.kv_dtypes is None or kv_dtype in spec.kv_dtypes


def byte_count(key: str, value: Any) -> int:
    return parse_bytes(value)


def patterns(key: str, value: Any) -> tuple[str, ...]:
    """Names with wildcards, from one name or a collection of names."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{key} is {quoted(value)}; expected names of layers, with wildcards")
    return tuple(names)


def forms_by_op(key: str, value: Any) -> dict[str, str]:
    """Names of forms by op."""
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise UsageError(f"{key} is {quoted(value)}; expected a form by op, such as {{'rms_norm': 'reference'}}")
    return dict(value)


COERCIONS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("preset", "device", "dtype", "executor", "checkpoint_format"), text),
    **dict.fromkeys(("precision", "kv_dtype", "lowp", "camera_layers"), text),
    **dict.fromkeys(("model", "base", "vae", "text_encoder", "lora", "fast_vae"), path_text),
    **dict.fromkeys(("graphs", "batches", "engine", "names", "measured"), path_text),
    **dict.fromkeys(("use_ema", "lora_partial", "kv_offload", "drift_meter", "shard_weights", "shard_decoder"), flag),
    **dict.fromkeys(("lowp_layers", "lowp_keep"), patterns),
    "lora_scale": number,
    "kv_memory": byte_count,
    "kernels": forms_by_op,
    "gpus": integer(1, MOST_RANKS),
    "parallel": text,
    "rank_timeout": above_zero("a number of seconds"),
}
SETTINGS = tuple(COERCIONS)  # what `load` takes, besides limits and the fields of a preset
assert set(SETTINGS) == {setting.name for setting in fields(EngineConfig)}


def check_choice(key: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UsageError(f"{key} is {quoted(value)}{nearest(str(value), known)}; expected {', '.join(known)}")


def check_device(name: str) -> None:
    """UsageError unless torch can use the device here."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device is {quoted(name)}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device is {quoted(name)}, but torch {torch.__version__} finds no GPU; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device is {quoted(name)}, but there are {torch.cuda.device_count()} GPUs, counted from 0")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU; float32 elsewhere, since many CPUs have no fast bfloat16."""
    return "bfloat16" if device.startswith("cuda") else "float32"
