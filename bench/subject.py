"""The model of a benchmark: a checkpoint as `load` reads it, or random weights of a real size.

Random weights are drawn on the device, tensor by tensor in the model's dtype, without a file or a copy on the host.
Queries and keys are larger than in `models.random`, so that attention concentrates on few keys and a wrong key
shows in the outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError, nearest, quoted
from ..models.hub import is_hub_name
from ..models.registry import MODELS, PRESETS, default_preset, family_of, make_preset, shipped
from ..models.spec import ModelSpec
from ..runtime.capacity.memory_check import MemoryCheck
from ..runtime.config import (
    DTYPES,
    EVERY_BLOCK,
    EngineConfig,
    patterns,
)
from ..runtime.engine import Engine
from ..runtime.execution.loading import Components
from ..runtime.executor_specs import REFERENCE
from ..runtime.load import load
from ..runtime.parallel.ranked_worker import RankedWorker
from ..runtime.parallel.rendezvous import Place
from ..schemes.presets import FIELDS, Preset, no_setting
from .work import blocks_until_full

Model = TypeVar("Model", bound=nn.Module)
ATTENTION_GAIN = 3**0.5  # of queries and of keys: logits with a standard deviation of 3, so few keys have most weight
PROMPT = "a red robot in a snowy forest by day"
PROMPT_ROWS = 1 / 4  # of the text encoder's rows; the rest is zero, as after a prompt's end
ORACLE = REFERENCE  # the executor that computes the reference
FULL = {"lowp": None, "lowp_layers": EVERY_BLOCK, "lowp_keep": (), "kv_dtype": None}  # full precision
OF_RANKS = ("shard_weights", "shard_decoder", "rank_timeout")


class Settings(NamedTuple):
    """Fields of the preset, and of the engine's config: the precision of layers and pages, and those of ranks."""

    preset: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """Model, preset and settings to measure; None is the default of the model or the machine.

    random_weights: untrained weights of a named model's sizes. frames_in_window: the policy's window in latent
    frames. graphs: folder of stored graphs, for graph executors. overrides: fields of the preset, and the engine's
    lowp, lowp_layers, lowp_keep, kv_dtype, and those of `OF_RANKS`. offline: no weights are downloaded. force: load
    what the planner refuses. gpus: ranks that share each pass, in the layout `parallel`.
    """

    model: str
    preset: str | None = None
    random_weights: bool = False
    frames_in_window: int | None = None
    size: tuple[int, int] | None = None
    device: str | None = None
    dtype: str | None = None
    vae: str | None = None
    base: str | None = None
    names: str | None = None
    executor: str | None = None
    graphs: str | None = None
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    offline: bool = False
    force: bool = False
    gpus: int | None = None
    parallel: str | None = None

    @property
    def is_named(self) -> bool:
        """True for a model that exists only by name, so that its weights are always random."""
        return self.model in MODELS and shipped(self.model) is None and not Path(self.model).exists()

    @property
    def is_random(self) -> bool:
        """True if its weights are random."""
        return self.is_named or self.random_weights

    def check(self) -> None:
        """Raise UsageError for an unknown model, random weights of a model without a name, and a launcher's ranks."""
        if self.random_weights and self.model not in MODELS:
            known = f"{nearest(self.model, MODELS)}; there are {', '.join(MODELS)}"
            raise UsageError(f"random_weights needs the name of a model, not {quoted(self.model)}{known}")
        exists = self.model in MODELS or self.model in PRESETS or Path(self.model).exists()
        if not (exists or is_hub_name(self.model)):
            known = f"{nearest(self.model, MODELS)}; expected a path, org/name, or one of {', '.join(MODELS)}"
            raise UsageError(f"no model {quoted(self.model)}{known}")
        if self.gpus in (None, 1):
            return
        if Place.of() is not None:
            raise UsageError(
                f"gpus is {self.gpus}, ranks that a launcher started and that serve one engine, but a benchmark loads "
                "several; run this without torchrun"
            )
        if self.random_weights and not self.is_named:
            raise UsageError(
                f"random_weights is True with gpus={self.gpus}, whose ranks load {quoted(self.model)} by themselves; "
                "leave random_weights out"
            )

    def settings(self) -> Settings:
        """Split the overrides into those of the preset, the window included, and those of the config.

        Raises UsageError for an unknown setting and for contradictory windows.
        """
        preset = self.preset or default_preset(self.model)
        for key in self.overrides:
            if key not in (known := {*FIELDS, *FULL, *OF_RANKS}):
                raise no_setting(key, known)
        ours = {key: value for key, value in self.overrides.items() if key in FIELDS}
        config = {key: value for key, value in self.overrides.items() if key not in FIELDS}
        config |= {key: patterns(key, config[key]) for key in ("lowp_layers", "lowp_keep") if key in config}
        if self.frames_in_window is None:
            return Settings(ours, config)
        scheme = make_preset(preset, **ours)
        window = scheme.context.local_attn_size
        bounded = scheme.context.segment_frames or not scheme.context.commit
        if bounded:
            full = blocks_until_full(scheme)
            raise UsageError(
                f"frames_in_window is {self.frames_in_window}, but the window of {preset} follows from its rebuilds "
                f"(full after {full} blocks); set rebuild_frames or segment_frames"
            )
        if ours.get("local_attn_size", self.frames_in_window) != self.frames_in_window:
            raise UsageError(f"frames_in_window is {self.frames_in_window} and local_attn_size is {window}; give one")
        return Settings({**ours, "local_attn_size": self.frames_in_window}, config)


def engine_settings(subject: Subject) -> tuple[EngineConfig, Preset]:
    """Config and preset of the subject's engine. Raises UsageError for settings that contradict; loads nothing."""
    subject.check()
    name, settings = subject.preset or default_preset(subject.model), subject.settings()
    config = EngineConfig.of(
        subject.model, name, device=subject.device, dtype=subject.dtype, base=subject.base, vae=subject.vae,
        names=subject.names, executor=subject.executor, graphs=subject.graphs, gpus=subject.gpus,
        parallel=subject.parallel, **settings.config,
    )  # fmt: skip
    return config, make_preset(name, **settings.preset)


def open_engine(subject: Subject) -> Engine:
    """Open the subject's engine. Raises UsageError for settings that contradict, and for too little memory.

    Ranks draw random weights as `load` does, whatever the seed.
    """
    config, preset = engine_settings(subject)
    if subject.is_random and config.gpus == 1:
        check_memory(subject)
        return Engine(config, preset, random_parts(MODELS[subject.model], config, subject.seed))
    settings = subject.settings()
    return load(
        subject.model, preset=config.preset, device=config.device, dtype=subject.dtype, vae=subject.vae,
        base=subject.base, names=subject.names, executor=config.executor, graphs=subject.graphs, size=subject.size,
        offline=subject.offline, force=subject.force, gpus=config.gpus, parallel=config.parallel,
        text_prompts=not subject.is_random, **settings.config, **settings.preset,
    )  # fmt: skip


def check_memory(subject: Subject) -> None:
    """UsageError where random weights and one stream of them need more memory than there is."""
    config, preset = engine_settings(subject)
    if subject.is_random:
        spec = MODELS[subject.model]
        decoder = family_of(spec).chosen_decoder_spec(spec, tiny=config.vae is not None)
        check = MemoryCheck(config, preset, subject.size, force=subject.force)
        check(spec, decoder, text=0, fast=None, made_on_host=False)


def with_executor(engine: Engine, name: str, subject: Subject | None = None, **settings: Any) -> Engine:
    """Open an engine over the same weights with another executor, without stored graphs, and other settings.

    subject: of an engine of several ranks, beside which the other engine starts ranks of its own, in the same layout.
    """
    config = replace(engine.config, executor=name, graphs=None, **settings)
    if replace(engine.config, graphs=None) == config:
        return engine
    if config.gpus == 1:
        return Engine(config, engine.preset, engine.parts)
    assert subject is not None
    overrides = {key: value for key, value in subject.overrides.items() if key not in settings}
    overrides |= {"shard_weights": config.shard_weights}
    return open_engine(replace(subject, executor=name, graphs=None, parallel=config.parallel, overrides=overrides))


def full_precision_engine(engine: Engine, subject: Subject | None = None) -> Engine:
    """Open the oracle over the same weights: the eager executor, layers and pages in the model's dtype."""
    return with_executor(engine, ORACLE, subject, **FULL)


def end_ranks(engine: Engine) -> None:
    """End the ranks of an engine, where it has some."""
    if isinstance(worker := engine.resources.worker, RankedWorker):
        worker.end()


def uses_fewer_bits(config: EngineConfig) -> bool:
    """Return True if layers or pages have another precision than the model."""
    return config.lowp is not None or config.kv_dtype not in (None, config.dtype)


def random_parts(spec: ModelSpec, config: EngineConfig, seed: int) -> Components:
    """All parts of a model with random weights. Raises UsageError for a model or VAE that has none."""
    if spec.image_dim is not None:
        raise UsageError(f"streams of {spec.name} are not in this version; measure another model")
    if config.vae not in (None, "taehv"):
        raise UsageError(
            f"vae is {quoted(config.vae)}, but {spec.name} has random weights; leave it out or use 'taehv'"
        )
    dtype, family = DTYPES[config.dtype], family_of(spec)
    with torch.device("meta"):
        transformer = family.build(spec, config.precision)
        decoder = family.build_decoder(family.chosen_decoder_spec(spec, tiny=config.vae == "taehv"))
    return Components(
        transformer=draw_weights(transformer, seed, dtype, config.device),
        vae=family.with_fast_layers(draw_weights(decoder, seed + 1, dtype, config.device)),
        text=family.random_text(spec, dtype, config.device),
        source=spec.name,
        form="random",
        digest=lambda: None,
    )


@torch.no_grad()
def draw_weights(module: Model, seed: int, dtype: torch.dtype, device: str) -> Model:
    """Move a module from the meta device to `device` and draw seeded random weights there."""
    module = module.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, weight in sorted(module.state_dict().items()):
        weight.normal_(generator=generator)
        if name.endswith(("norm_q.weight", "norm_k.weight")):
            weight.mul_(0.1).add_(1).mul_(ATTENTION_GAIN)
        elif name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            weight.mul_(0.1).add_(1)
        elif weight.ndim > 1:
            weight.div_(math.sqrt(weight[0].numel()))
        else:
            weight.mul_(0.02)
    return module.eval().requires_grad_(False)


def random_prompt(engine: Engine, seed: int) -> Tensor:
    """Random text-encoder rows [text_len, text_dim], zero after the first quarter."""
    spec = engine.spec
    generator = torch.Generator().manual_seed(seed)
    used = max(1, int(spec.text_len * PROMPT_ROWS))
    rows = torch.zeros(spec.text_len, spec.text_dim)
    rows[:used] = torch.randn(used, spec.text_dim, generator=generator)
    return rows.to(engine.device, engine.dtype)


def describe(engine: Engine, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """Subject and settings of a result."""
    description = engine.describe()
    size = subject.size or engine.default_size
    about = {
        "model": engine.spec.name, "checkpoint": description["checkpoint"],
        "random_weights": engine.parts.form == "random",
        "parameters": sum(weight.numel() for weight in engine.parts.transformer.parameters()),
        "decoder": engine.parts.vae.name,
    }  # fmt: skip
    if (config := engine.config).gpus > 1:
        layout = {"layout": config.parallel, "shard_weights": config.shard_weights, "reason": engine.layout_reason}
        about["ranks"] = {"count": config.gpus, **layout}
    settings = {
        "size": list(size), "seed": subject.seed, "frames_in_window": subject.frames_in_window,
        **{key: description[key] for key in ("config", "preset", "network_timesteps", "model", "vae")},
    }  # fmt: skip
    return about, settings


def prompt_arguments(engine: Engine, seed: int) -> dict[str, Any]:
    """Arguments of `Engine.open`: a prompt if the model has a trained text encoder, otherwise random rows.

    The text encoder of random weights has another size, so its time would mean nothing.
    """
    if engine.parts.text is None or engine.parts.form == "random":
        return {"prompt_embeds": random_prompt(engine, seed)}
    return {"prompt": PROMPT}


def prompt_rows(engine: Engine, seed: int) -> Tensor:
    """Text-encoder rows of the prompt in `prompt_arguments`."""
    arguments = prompt_arguments(engine, seed)
    return engine.inputs.prompt_rows(arguments.get("prompt"), arguments.get("prompt_embeds"))
