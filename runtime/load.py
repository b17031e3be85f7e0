"""`load`: arguments to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..models.hub import locate
from ..models.wan.spec import MODELS
from ..models.wan.taehv import TinyDecoder
from ..schemes.presets import FIELDS, Preset, default_model, default_preset, make_preset, no_setting
from .byte_sizes import parse_bytes
from .capacity.memory_check import MemoryCheck
from .config import EVERY_BLOCK, EngineConfig, default_device, default_dtype, default_executor, patterns
from .engine import Engine
from .execution.loading import SHIPPED, load_components, random_components, shipped
from .limits import Limits
from .sessions.batch_profile import entries


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
    offline: bool = False,
    text_prompts: bool = True,
    size: tuple[int, int] | None = None,
    force: bool = False,
    **overrides: Any,
) -> Engine:
    """Load an engine for a checkpoint (file or folder), or for a named model with random weights.

    Without a model, the small world in the package, or `wan-tiny` where the preset is another. Without a preset,
    the named model's own, or self-forcing.

    A model may also be the name of a preset with published weights (`self-forcing`), or `org/name` or `org/name:file`
    of the Hugging Face hub, and base `org/name`: files are taken from the local cache, or downloaded unless `offline`.

    What one stream of pictures of `size` (width, height; the model's own) needs is compared with the memory there is
    before weights are read, and refused with UsageError unless `force`. The text encoder is counted, and loaded when a
    prompt is first text; with `text_prompts=False` there is none, and prompts come as embeddings.

    Any field of the preset can be overridden: `local_attn_size=6, sink_size=0`. Raises UsageError for
    unknown names and bad values, InferixError for broken files, and for files that cannot be downloaded.
    """
    for key in overrides:
        if key not in FIELDS:
            raise no_setting(key, {*FIELDS, *(load.__kwdefaults__ or ()), "model", "preset"})
    model, given_preset = default_model(preset) if model is None else model, preset
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
    if config.batches is not None:
        entries(Path(config.batches))
    check_tiny_decoder(scheme, config.vae == "taehv")
    check = MemoryCheck(config, scheme, size, force=force)
    named = config.model in MODELS and not Path(config.model).exists()
    if named and config.model not in SHIPPED:
        return Engine(config, scheme, random_components(MODELS[config.model], config, check), limits)
    if named:
        files = replace(config, model=str(shipped(config.model)))
    else:
        own_parts = config.vae not in (None, "taehv") and config.text_encoder is not None
        located = locate(config.model, given_preset, config.base, offline, own_parts)
        files = replace(config, model=located.model, base=located.base)
    parts = load_components(files, check, text_prompts)
    check_tiny_decoder(scheme, isinstance(parts.vae, TinyDecoder))
    return Engine(config, scheme, replace(parts, source=config.model), limits)  # its name, wherever its files are


def check_tiny_decoder(preset: Preset, tiny: bool) -> None:
    """UsageError for a preset that encodes pictures, with the decoder that has no encoder."""
    if tiny and preset.context.reencode_head:
        raise UsageError(f"{preset.name} encodes pictures again, which the tiny decoder cannot; leave vae out (--vae)")
