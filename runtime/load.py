"""`load`: arguments to an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..models.wan.spec import MODELS
from ..models.wan.taehv import TinyDecoder
from ..schemes.presets import FIELDS, default_model, default_preset, make_preset, no_setting
from .arguments import instance, path_text, text
from .config import SETTINGS, EngineConfig
from .engine import Engine
from .execution.loading import SHIPPED, Components, load_components, random_components, shipped
from .limits import Limits


def load(
    model: str | Path | None = None,
    preset: str | None = None,
    *,
    limits: Limits = Limits(),  # noqa: B008
    **settings: Any,
) -> Engine:
    """Load an engine for a checkpoint (file or folder), or for a named model with random weights.

    model: without one, the small world in the package, or `wan-tiny` where the preset is another.
    preset: without one, the named model's own, or self-forcing. settings: fields of `EngineConfig`, such as
    `device="cpu"`, `dtype="bfloat16"`, `executor="fused"` or `lora="style.safetensors"`, and fields of the preset,
    such as `local_attn_size=6`. limits: sessions, memory and overload.

    Raises UsageError for unknown names and bad values, InferixError for broken files.
    """
    instance(Limits)("limits", limits)
    if preset is not None:
        text("preset", preset)
    if model is not None:
        model = path_text("model", model)
    for key in settings:
        if key not in FIELDS and key not in SETTINGS:
            raise no_setting(key, {*FIELDS, *SETTINGS, "limits"})
    model = default_model(preset) if model is None else model
    preset = preset or default_preset(str(model))
    config = EngineConfig.of(model, preset, **{key: settings.pop(key) for key in SETTINGS if key in settings})
    scheme = make_preset(preset, **settings)
    parts = load_parts(config)
    if scheme.context.reencode_head and isinstance(parts.vae, TinyDecoder):
        raise UsageError(f"{preset} encodes pictures again, which the tiny decoder of vae cannot; leave vae out")
    return Engine(config, scheme, parts, limits)


def load_parts(config: EngineConfig) -> Components:
    """Load the weights that a config names: of a file, in the package, or random ones."""
    model = config.model
    if model not in MODELS or Path(model).exists():
        return load_components(config)
    if model in SHIPPED:
        components = load_components(replace(config, model=str(shipped(model))))
        return replace(components, source=model)  # its name, wherever the package lies
    return random_components(MODELS[model], config)
