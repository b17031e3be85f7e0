"""`load`: arguments to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..models.wan.spec import MODELS
from ..models.wan.taehv import TinyDecoder
from ..schemes.presets import FIELDS, default_model, default_preset, make_preset, no_setting
from .byte_sizes import parse_bytes
from .config import EVERY_BLOCK, EngineConfig, default_device, default_dtype, default_executor, patterns
from .engine import Engine
from .execution.loading import SHIPPED, load_components, random_components, shipped
from .limits import Limits


def load(
    model: str | Path | None = None,
    preset: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
    checkpoint_format: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    use_ema: bool = True,
    precision: str = "reference",
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    kv_memory: int | str | None = None,
    kv_dtype: str | None = None,
    kv_offload: bool = False,
    executor: str | None = None,
    fast_vae: str | Path | None = None,
    graphs: str | Path | None = None,
    lowp: str | None = None,
    lowp_layers: str | Sequence[str] = EVERY_BLOCK,
    lowp_keep: str | Sequence[str] = (),
    batches: str | Path | None = None,
    limits: Limits = Limits(),  # noqa: B008
    **overrides: Any,
) -> Engine:
    """Load an engine for a checkpoint (file or folder), or for a named model with random weights.

    Without a model, the small world in the package, or `wan-tiny` where the preset is another. Without a preset,
    the named model's own, or self-forcing.

    Any field of the preset can be overridden: `local_attn_size=6, sink_size=0`. Raises UsageError for
    unknown names and bad values, InferixError for broken files.
    """
    for key in overrides:
        if key not in FIELDS:
            raise no_setting(key, {*FIELDS, *(load.__kwdefaults__ or ()), "model", "preset"})
    model = default_model(preset) if model is None else model
    preset = preset or default_preset(str(model))
    config = EngineConfig(
        model=str(model),
        preset=preset,
        device=(device := device or default_device()),
        dtype=dtype or default_dtype(device),
        base=str(base) if base is not None else None,
        checkpoint_format=checkpoint_format,
        vae=str(vae) if vae is not None else None,
        text_encoder=str(text_encoder) if text_encoder is not None else None,
        use_ema=use_ema,
        precision=precision,
        lora=str(lora) if lora is not None else None,
        lora_scale=lora_scale,
        kv_memory=None if kv_memory is None else parse_bytes(kv_memory),
        kv_dtype=kv_dtype,
        kv_offload=kv_offload,
        executor=executor or default_executor(device),
        fast_vae=str(fast_vae) if fast_vae is not None else None,
        graphs=str(graphs) if graphs is not None else None,
        lowp=lowp,
        lowp_layers=patterns(lowp_layers),
        lowp_keep=patterns(lowp_keep),
        batches=str(batches) if batches is not None else None,
    )
    scheme = make_preset(preset, **overrides)
    named = str(model) in MODELS and not Path(model).exists()
    if named and str(model) in SHIPPED:
        components = load_components(replace(config, model=str(shipped(str(model)))))
        parts = replace(components, source=str(model))  # its name, wherever the package lies
    else:
        parts = random_components(MODELS[str(model)], config) if named else load_components(config)
    if scheme.context.reencode_head and isinstance(parts.vae, TinyDecoder):
        raise UsageError(f"{preset} encodes pictures again, which the tiny decoder cannot; leave vae out (--vae)")
    return Engine(config, scheme, parts, limits)
