"""`load`: arguments to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from ..errors import UsageError, quoted
from ..models.registry import default_model, default_preset, make_preset
from ..schemes.presets import FIELDS, Preset, no_setting
from .arguments import flag, instance, listed, optional, path_text, text
from .arguments import size as picture_size
from .capacity.memory_check import MemoryCheck
from .config import SETTINGS, EngineConfig
from .engine import Engine
from .execution.loading import load_parts
from .executor_specs import AUTO
from .limits import Limits
from .parallel.launch import Start
from .parallel.rank_process import serve_if_ranked
from .sessions.batch_profile import entries

EXPORTED = "inferix.export.inside:load_exported"  # imported for an exported engine only
CACHED = "inferix.export.engine_cache:load_cached"  # imported for executor auto only
ABOUT_LOADING = ("limits", "offline", "text_prompts", "prompts", "size", "force")  # of `load`; no engine keeps them


def load(
    model: str | Path | None = None,
    preset: str | None = None,
    *,
    limits: Limits = Limits(),  # noqa: B008
    offline: bool = False,
    text_prompts: bool = True,
    prompts: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    force: bool = False,
    engine: str | Path | None = None,
    **settings: Any,
) -> Engine:
    """Load an engine for a checkpoint (file or folder), or for a named model with random weights.

    model: without one, the small world in the package, or `wan-tiny` where the preset is another. It may also be the
    name of a preset with published weights (`self-forcing`), or `org/name` or `org/name:file` of the Hugging Face hub,
    and base `org/name`: files are taken from the local cache, or downloaded unless `offline`.
    preset: without one, the named model's own, or self-forcing. settings: fields of `EngineConfig`, such as
    `device="cpu"`, `dtype="bfloat16"`, `executor="fused"` or `lora="style.safetensors"`, and fields of the preset,
    such as `local_attn_size=6`. limits: sessions, memory and overload.

    The memory that one stream of pictures of `size` (width, height; the model's own) needs is compared with what there
    is before weights are read; too little is refused unless `force`. The text encoder is counted, and loaded when a
    prompt is first text; with `text_prompts=False` there is none, and prompts come as embeddings. prompts: texts that
    are to come; one that the text encoder takes only in part is refused before weights are read.

    gpus: ranks that share each pass; those beside this process are started, or joined under torchrun. parallel: their
    layout, such as `ulysses` or `pass-q`; `auto` takes the choice of `inferix plan --gpus` for one world of all ranks,
    by the times of the file `measured` where there is one (`Engine.layout_reason`). shard_weights: they divide the
    weights. shard_decoder: they decode some columns of each picture, as they do without it where the decoder allows. On
    the CPU a rank is a process. What one of them fails at is a RankFailed that names it, `rank_timeout` seconds after
    it hangs at the latest. Under torchrun the call returns on rank 0 alone; the others serve it until it ends.

    engine: a folder that `inferix export` wrote. Its programs run in place of a model, with its preset, size and dtype;
    settings may be `kv_memory`, `kv_offload`, and fields of the preset that do not need other programs. With
    `executor="auto"` that is done if the cache of `inferix export --cache` has an engine of these weights, preset and
    size that is faster, and no setting needs the model itself; else the device's default executor runs.

    Raises UsageError for unknown names, bad values and too little memory, InferixError for broken files and for files
    that cannot be downloaded.
    """
    instance(Limits)("limits", limits)
    model, preset = optional(path_text)("model", model), optional(text)("preset", preset)
    size, force = optional(picture_size)("size", size), flag("force", force)
    offline, text_prompts = flag("offline", offline), flag("text_prompts", text_prompts)
    prompts = [text("prompts", prompt) for prompt in listed("prompts", prompts)]
    if (folder := optional(path_text)("engine", engine)) is not None:
        if model is not None or preset is not None or size is not None:
            raise UsageError(f"engine {quoted(folder)} has a model, preset and size of its own; leave these out")
        loaded: Engine = resolve_name(EXPORTED)(folder, limits, settings)
        return loaded
    for key in settings:
        if key not in FIELDS and key not in SETTINGS:
            raise no_setting(key, {*FIELDS, *SETTINGS, *ABOUT_LOADING})
    if settings.get("executor") == AUTO:
        del settings["executor"]
        cached: Engine | None = resolve_name(CACHED)(model, preset, size, limits, settings)
        if cached is not None:
            return cached
    model = default_model(preset) if model is None else model
    own = {key: settings.pop(key) for key in SETTINGS if key in settings}
    name = preset or default_preset(str(model))
    scheme = make_preset(name, **settings)
    config = EngineConfig.of(model, name, **{"precision": scheme.precision} | own)
    plain = dict(settings)
    if config.batches is not None:
        entries(Path(config.batches))  # so that a bad file is refused before weights are read
    check_tiny_decoder(scheme, config.vae == "taehv")
    check = MemoryCheck(config, scheme, size, force=force)
    if config.gpus == 1:
        parts = load_parts(config, scheme, preset, check, offline, text_prompts, prompts)
        check_tiny_decoder(scheme, not parts.vae.spec.encodes)
        return Engine(config, scheme, parts, limits)
    serve_if_ranked()
    start = Start(config, scheme, check, size, preset, plain, offline)
    try:
        parts = load_parts(config, scheme, preset, start, offline, text_prompts, prompts)
        check_tiny_decoder(scheme, not parts.vae.spec.encodes)
        assert start.world is not None
        config = start.config  # with the chosen layout
        worker = start.world.worker(config, scheme, parts)
    except BaseException:
        start.close()
        raise
    ranked = Engine(config, scheme, parts, limits, worker=worker)
    ranked.layout_reason = start.reason
    return ranked


def check_tiny_decoder(preset: Preset, tiny: bool) -> None:
    """UsageError for a preset that encodes pictures, with the decoder that has no encoder."""
    if tiny and preset.context.encodes_pictures:
        raise UsageError(f"{preset.name} encodes pictures, which the tiny decoder of vae cannot; leave vae out")
