"""Load the components of an `EngineConfig`: a checkpoint with its VAE and text encoder, or random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ...errors import UsageError, quoted
from ...graphs.shards import ALONE, Shard
from ...models.decoder import Decoder, DecoderSpec
from ...models.family import Checkpoint, PromptEncoder
from ...models.fingerprints import fingerprint
from ...models.hub import locate
from ...models.registry import MODELS, PRESETS, family_of, read_checkpoint, shipped
from ...models.spec import ModelSpec
from ...models.transformer import Transformer
from ...schemes.presets import PLAIN, WITH_MEMORY, Preset
from ..config import DTYPES, EngineConfig

RANDOM_SEEDS = (0, 2)  # of each set of weights; 1 is the decoder's


class SizeCheck(Protocol):
    """Check of sizes before weights are read; raises UsageError."""

    def __call__(
        self,
        spec: ModelSpec,
        decoder: DecoderSpec,
        text: int,
        fast: DecoderSpec | None,
        made_on_host: bool,
        files: Sequence[Path] = (),
    ) -> Shard:
        """Return the rank's part of every pass, whose weights are read; `ALONE` for one rank.

        text: parameters of the text encoder, 0 for none. fast: a second decoder. made_on_host: weights are.

        files: of the transformer's weights.
        """


@dataclass(frozen=True)
class Components:
    """A model ready to run.

    text: loads the text encoder at its first call; None without an encoder. digest: hash of the checkpoint, or None for
    random weights. fast_vae: decoder to switch to under overload. size: the one size (width, height) of pictures that
    it makes; None where any does. fingerprints: of the weights of transformer and decoder, where they are not in these.
    shard: part of every pass that this rank computes. more: further sets of the transformer's weights, in the order of
    the preset's `weight_sets`, of which `transformer` is the first.
    """

    transformer: Transformer
    vae: Decoder
    text: Callable[[], PromptEncoder] | None
    source: str
    form: str
    digest: Callable[[], str | None]
    fast_vae: Decoder | None = None
    size: tuple[int, int] | None = None
    fingerprints: Mapping[str, str] | None = None
    shard: Shard = ALONE
    more: tuple[Transformer, ...] = ()

    @property
    def transformers(self) -> tuple[Transformer, ...]:
        """All sets of weights, by number."""
        return (self.transformer, *self.more)


def load_parts(
    config: EngineConfig,
    scheme: Preset,
    preset: str | None,
    check: SizeCheck,
    offline: bool,
    text_prompts: bool,
    prompts: Sequence[str] = (),
) -> Components:
    """Load the weights that a config names: of files, of the hub, in the package, or random ones.

    preset: name of the one asked for, None where it is a default. prompts: that are to come. UsageError for weights
    that `scheme` does not run, and for a prompt that the text encoder refuses.
    """
    model = config.model
    if model in MODELS and not Path(model).exists():
        folder = shipped(model)
        if folder is None:
            return random_components(MODELS[model], config, scheme, check, prompts)
        files = replace(config, model=str(folder))
    else:
        own_parts = config.vae not in (None, "taehv") and config.text_encoder is not None
        located = locate(model, preset, config.base, offline, own_parts)
        files = replace(config, model=located.model, base=located.base)
    loaded = load_components(files, scheme, check, text_prompts, prompts)
    return replace(loaded, source=model)  # its name, wherever its files are


def load_components(
    config: EngineConfig, scheme: Preset, check: SizeCheck, text_prompts: bool = True, prompts: Sequence[str] = ()
) -> Components:
    """Load the model's checkpoint, and its VAE and text encoder from beside it or from `base`.

    Find all parts, check the prompts, read the decoders and call `check` before the transformer's weights are read. No
    text encoder is loaded if `text_prompts` is False.
    """
    checkpoint = read_checkpoint(config.model, config.checkpoint_format, config.use_ema, config.names)
    spec, dtype, device = checkpoint.spec, DTYPES[config.dtype], config.device
    family = family_of(spec)
    family.check_preset(scheme, config.model, spec)
    sets = weight_sets(checkpoint, scheme)
    folders = [Path(config.base)] if config.base else []
    folders.append(checkpoint.folder)
    for key, path in (("base", config.base), ("text_encoder", config.text_encoder)):
        if path is not None and not Path(path).exists():
            raise UsageError(f"{key} is {quoted(path)}: no such file or folder")
    if config.base and not Path(config.base).is_dir():
        raise UsageError(f"base is {quoted(config.base)}, a file; expected the folder of a VAE and a text encoder")
    text = family.load_text(config.text_encoder, folders, spec, dtype, device)
    family.check_prompts(text, prompts)
    vae = matching_decoder(config.vae, folders, spec, config)
    fast_vae = matching_decoder(config.fast_vae, folders, spec, config) if config.fast_vae else None
    text = text if text_prompts else None
    encoder = family.text_parameters(spec) if text else 0
    shard = check(
        spec, vae.spec, encoder, fast_vae.spec if fast_vae else None, made_on_host=False, files=checkpoint.files
    )
    transformers, fingerprints = load_transformers(checkpoint, sets, config, shard, vae)
    return Components(
        transformer=transformers[0],
        vae=vae,
        text=text,
        source=config.model,
        form=checkpoint.form,
        digest=lambda: checkpoint.digest,
        fast_vae=fast_vae,
        more=transformers[1:],
        fingerprints=fingerprints,
        shard=shard,
    )


def weight_sets(checkpoint: Checkpoint, scheme: Preset) -> tuple[Mapping[str, Tensor], ...]:
    """Tensors of each set of weights that a preset runs; plain ones take the place of memory weights.

    UsageError for a checkpoint with other sets, or with experts that change at another noise level.
    """
    own, needed, where = checkpoint.sets, scheme.weight_sets, quoted(checkpoint.path)
    fitting = [preset.name for preset in PRESETS.values() if preset.weight_sets == own]
    fitting = [name for name in fitting if family_of(checkpoint.spec).has_preset(name)]
    if own == PLAIN and needed == WITH_MEMORY:
        return (checkpoint.tensors, checkpoint.tensors)
    if own != needed:
        folders = family_of(checkpoint.spec).formats[checkpoint.form].experts
        held = [f"{one} in {folder}" for one, folder in zip(own, folders, strict=True)] if folders else own
        raise UsageError(
            f"{where} has {len(own)} set{'s' if len(own) > 1 else ''} of weights ({', '.join(held)}), but preset "
            f"{scheme.name} runs {', '.join(needed)}; use one of {', '.join(fitting)}"
        )
    boundary = scheme.sampler.boundary_ratio
    if checkpoint.boundary_ratio not in (None, boundary):
        raise UsageError(
            f"boundary_ratio is {boundary}, but {where} states {checkpoint.boundary_ratio}; give "
            f"boundary_ratio={checkpoint.boundary_ratio}"
        )
    return (checkpoint.tensors, *checkpoint.more)


def load_transformers(
    checkpoint: Checkpoint, sets: Sequence[Mapping[str, Tensor]], config: EngineConfig, shard: Shard, vae: Decoder
) -> tuple[tuple[Transformer, ...], Mapping[str, str] | None]:
    """The transformer of each set of weights, or a rank's part of them with the fingerprints of the whole weights.

    Sets of the same tensors share a transformer. An adapter of the config is merged into every set.
    """
    family, made, prints = family_of(checkpoint.spec), list[Transformer](), dict[str, str]()
    shards = None
    for number, tensors in enumerate(sets):
        if number and tensors is sets[0]:
            made.append(made[0])
            continue
        shards = family.weight_shards(checkpoint.spec, shard.weights, shard.stage)
        one = replace(checkpoint, tensors=tensors)
        kind = DTYPES[config.dtype]
        made.append(
            family.load(one, config.precision, kind, config.device, loras(config), config.lora_partial, shards)
        )
        if shards is not None:
            prints[f"transformer.{number}" if number else "transformer"] = shards.fingerprint
    return tuple(made), None if shards is None else {**prints, "decoder": fingerprint(vae)}


def matching_decoder(name: str | None, folders: list[Path], spec: ModelSpec, config: EngineConfig) -> Decoder:
    """Load the decoder `name`; UsageError if its latents differ from the model's in channels or strides."""
    family = family_of(spec)
    file = family.find_decoder(name, folders)
    vae = family.load_decoder(file, DTYPES[config.dtype], config.device)
    strides = (vae.spec.temporal_stride, vae.spec.spatial_stride)
    if vae.spec.z_dim != spec.out_channels or strides != spec.vae_stride:
        raise UsageError(
            f"{quoted(file)} reads {vae.spec.z_dim} channels at strides {strides}; the model of {config.model} makes "
            f"{spec.out_channels} at {spec.vae_stride}: use the VAE that came with the model"
        )
    return vae


def loras(config: EngineConfig) -> list[tuple[str, float]]:
    return [(config.lora, config.lora_scale)] if config.lora else []


def random_components(
    spec: ModelSpec, config: EngineConfig, scheme: Preset, check: SizeCheck, prompts: Sequence[str] = ()
) -> Components:
    """Make a named model with random weights and a small random text encoder, after a call of `check`."""
    family = family_of(spec)
    family.check_preset(scheme, spec.name, spec)
    for key in ("vae", "fast_vae"):
        if (name := getattr(config, key)) not in (None, "taehv"):
            raise UsageError(f"{key} is {quoted(name)}, but {spec.name} has random weights; leave it out, or use taehv")
    if config.names is not None:
        raise UsageError(f"names is {quoted(config.names)}, but {spec.name} has random weights; leave it out")
    fast = family.chosen_decoder_spec(spec, tiny=True) if config.fast_vae else None
    shard = check(spec, family.chosen_decoder_spec(spec, config.vae is not None), 0, fast, made_on_host=True)
    dtype, device = DTYPES[config.dtype], config.device

    text = family.random_text(spec, dtype, device)
    family.check_prompts(text, prompts)
    sets = [family.random_state(spec, seed, dtype) for seed in RANDOM_SEEDS[: len(scheme.weight_sets)]]
    checkpoint = Checkpoint(Path(spec.name), "random", (), sets[0], spec, None)
    vae = family.random_decoder(spec, config.vae == "taehv", dtype, device)
    transformers, fingerprints = load_transformers(checkpoint, sets, config, shard, vae)
    return Components(
        transformer=transformers[0],
        vae=vae,
        text=text,
        source=spec.name,
        form="random",
        digest=lambda: None,
        fast_vae=family.random_decoder(spec, True, dtype, device) if config.fast_vae else None,
        more=transformers[1:],
        fingerprints=fingerprints,
        shard=shard,
    )


