"""Load the components of an `EngineConfig`: a checkpoint with its VAE and text encoder, or random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ...errors import UsageError, quoted
from ...graphs.shards import ALONE, Shard
from ...models.decoder import Decoder, DecoderSpec
from ...models.family import Checkpoint, PromptEncoder
from ...models.fingerprints import fingerprint
from ...models.hub import locate
from ...models.registry import MODELS, family_of, find_preset, read_checkpoint, shipped
from ...models.spec import ModelSpec
from ...models.transformer import Transformer
from ..config import DTYPES, EngineConfig


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
    shard: part of every pass that this rank computes.
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


def load_parts(
    config: EngineConfig, preset: str | None, check: SizeCheck, offline: bool, text_prompts: bool
) -> Components:
    """Load the weights that a config names: of files, of the hub, in the package, or random ones.

    preset: the one asked for, None where it is a default.
    """
    model = config.model
    if model in MODELS and not Path(model).exists():
        folder = shipped(model)
        if folder is None:
            return random_components(MODELS[model], config, check)
        files = replace(config, model=str(folder))
    else:
        own_parts = config.vae not in (None, "taehv") and config.text_encoder is not None
        located = locate(model, preset, config.base, offline, own_parts)
        files = replace(config, model=located.model, base=located.base)
    return replace(load_components(files, check, text_prompts), source=model)  # its name, wherever its files are


def load_components(config: EngineConfig, check: SizeCheck, text_prompts: bool = True) -> Components:
    """Load the model's checkpoint, and its VAE and text encoder from beside it or from `base`.

    Find all parts, read the decoders and call `check` before the transformer's weights are read. No text encoder is
    loaded if `text_prompts` is False.
    """
    checkpoint = read_checkpoint(config.model, config.checkpoint_format, config.use_ema, config.names)
    spec, dtype, device = checkpoint.spec, DTYPES[config.dtype], config.device
    family = family_of(spec)
    family.check_preset(find_preset(config.preset), config.model, spec)
    folders = [Path(config.base)] if config.base else []
    folders.append(checkpoint.folder)
    for key, path in (("base", config.base), ("text_encoder", config.text_encoder)):
        if path is not None and not Path(path).exists():
            raise UsageError(f"{key} is {quoted(path)}: no such file or folder")
    if config.base and not Path(config.base).is_dir():
        raise UsageError(f"base is {quoted(config.base)}, a file; expected the folder of a VAE and a text encoder")
    text = family.load_text(config.text_encoder, folders, spec, dtype, device)
    vae = matching_decoder(config.vae, folders, spec, config)
    fast_vae = matching_decoder(config.fast_vae, folders, spec, config) if config.fast_vae else None
    text = text if text_prompts else None
    encoder = family.text_parameters(spec) if text else 0
    shard = check(
        spec, vae.spec, encoder, fast_vae.spec if fast_vae else None, made_on_host=False, files=checkpoint.files
    )
    transformer, fingerprints = load_transformer(checkpoint, config, shard, vae)
    return Components(
        transformer=transformer,
        vae=vae,
        text=text,
        source=config.model,
        form=checkpoint.form,
        digest=lambda: checkpoint.digest,
        fast_vae=fast_vae,
        fingerprints=fingerprints,
        shard=shard,
    )


def load_transformer(
    checkpoint: Checkpoint, config: EngineConfig, shard: Shard, vae: Decoder
) -> tuple[Transformer, Mapping[str, str] | None]:
    """The transformer of a checkpoint, or a rank's part of it with the fingerprints of the whole weights."""
    family = family_of(checkpoint.spec)
    shards = family.weight_shards(checkpoint.spec, shard.weights)
    transformer = family.load(
        checkpoint, config.precision, DTYPES[config.dtype], config.device, loras(config), config.lora_partial, shards
    )
    if shards is None:
        return transformer, None
    return transformer, {"transformer": shards.fingerprint, "decoder": fingerprint(vae)}


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


def random_components(spec: ModelSpec, config: EngineConfig, check: SizeCheck) -> Components:
    """Make a named model with random weights and a small random text encoder, after a call of `check`."""
    family = family_of(spec)
    family.check_preset(find_preset(config.preset), spec.name, spec)
    for key in ("vae", "fast_vae"):
        if (name := getattr(config, key)) not in (None, "taehv"):
            raise UsageError(f"{key} is {quoted(name)}, but {spec.name} has random weights; leave it out, or use taehv")
    if config.names is not None:
        raise UsageError(f"names is {quoted(config.names)}, but {spec.name} has random weights; leave it out")
    fast = family.chosen_decoder_spec(spec, tiny=True) if config.fast_vae else None
    shard = check(spec, family.chosen_decoder_spec(spec, config.vae is not None), 0, fast, made_on_host=True)
    dtype, device = DTYPES[config.dtype], config.device
    weights = family.random_state(spec, 0, dtype)
    checkpoint = Checkpoint(Path(spec.name), "random", (), weights, spec, None)
    vae = family.random_decoder(spec, config.vae == "taehv", dtype, device)
    transformer, fingerprints = load_transformer(checkpoint, config, shard, vae)
    return Components(
        transformer=transformer,
        vae=vae,
        text=family.random_text(spec, dtype, device),
        source=spec.name,
        form="random",
        digest=lambda: None,
        fast_vae=family.random_decoder(spec, True, dtype, device) if config.fast_vae else None,
        fingerprints=fingerprints,
        shard=shard,
    )


