"""From an `EngineConfig` to a model ready to run: a published checkpoint with its parts, or random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...errors import InferixError, UsageError, quoted
from ...models import tinyworld
from ...models.files import fill
from ...models.text.tiny import write_tiny_text_encoder
from ...models.text.umt5_checkpoint import TEXT_FILES, find_text, load_text
from ...models.tinyworld.words import WordEncoder, find_words
from ...models.wan.checkpoint import Checkpoint, build_transformer, read_checkpoint
from ...models.wan.random import (
    random_tiny_decoder_state,
    random_transformer_state,
    random_vae_state,
    vae_for,
)
from ...models.wan.spec import ModelSpec
from ...models.wan.taehv import TinyDecoder, tiny_spec_from_shapes
from ...models.wan.transformer import WanTransformer
from ...models.wan.vae_checkpoint import TINY_DECODERS, Decoder, build_vae, find_tiny_decoder, find_vae, load_decoder
from ...models.wan.vae_cpu import use_cpu_layers
from ..capacity.costs import DecoderSpec
from ..capacity.planner import text_parameters, tiny_for
from ..config import DTYPES, EngineConfig

SHIPPED = {"tinyworld": Path(tinyworld.__file__).parent / "weights"}  # where a model of our own has its weights


class SizeCheck(Protocol):
    """What a caller refuses by sizes alone, with UsageError, before weights are read."""

    def __call__(self, spec: ModelSpec, decoder: DecoderSpec, text: int, fast: DecoderSpec | None, drawn: bool) -> None:
        """text: parameters of the text encoder, 0 for none. fast: a second decoder. drawn: weights are made here."""


class PromptEncoder(Protocol):
    """What turns a prompt into the rows that the transformer is told."""

    def encode(self, prompt: str) -> Tensor:
        """Rows [text_len, text_dim], zero after the prompt's end."""


@dataclass(frozen=True)
class Components:
    """A model ready to run. `text` loads the encoder when it is first called; None where there is none."""

    transformer: WanTransformer
    vae: Decoder
    text: Callable[[], PromptEncoder] | None
    source: str
    form: str
    digest: Callable[[], str | None]
    fast_vae: Decoder | None = None  # a decoder to go over to under overload


def load_components(config: EngineConfig, check: SizeCheck, text_prompts: bool = True) -> Components:
    """The model's checkpoint and, beside it or in `base`, its VAE and text encoder; none if not `text_prompts`.

    All parts are found, decoders are read and `check` is called before the transformer's weights are read.
    """
    checkpoint = read_checkpoint(config.model, config.checkpoint_format, config.use_ema)
    spec, dtype, device = checkpoint.spec, DTYPES[config.dtype], config.device
    if spec.in_channels != spec.out_channels:
        raise UsageError(
            f"{config.model} takes {spec.in_channels} channels with image conditioning; streams of such models "
            "are not in this version"
        )
    places = [Path(config.base)] if config.base else []
    places.append(checkpoint.folder)
    for key, place in (("base", config.base), ("text_encoder", config.text_encoder)):
        if place is not None and not Path(place).exists():
            raise UsageError(f"{key} is {quoted(place)}: no such file or folder")
    if config.base and not Path(config.base).is_dir():
        raise UsageError(f"base is {quoted(config.base)}, a file; expected the folder of a VAE and a text encoder")
    text = text_loader(config.text_encoder, places, spec, dtype, device)
    vae = matching_decoder(config.vae, places, spec, config)
    fast_vae = matching_decoder(config.fast_vae, places, spec, config) if config.fast_vae else None
    text = text if text_prompts else None
    check(spec, vae.spec, text_parameters(spec) if text else 0, fast_vae.spec if fast_vae else None, drawn=False)
    return Components(
        transformer=build_transformer(checkpoint, config.precision, dtype, device, loras(config), config.lora_partial),
        vae=vae,
        text=text,
        source=config.model,
        form=checkpoint.form,
        digest=lambda: checkpoint.digest,
        fast_vae=fast_vae,
    )


def matching_decoder(wanted: str | None, places: list[Path], spec: ModelSpec, config: EngineConfig) -> Decoder:
    """The decoder that `wanted` names, of the model's latents; UsageError for one of others."""
    file = choose_decoder(wanted, places)
    vae = load_decoder(file, DTYPES[config.dtype], config.device)
    strides = (vae.spec.temporal_stride, vae.spec.spatial_stride)
    if vae.spec.z_dim != spec.out_channels or strides != spec.vae_stride:
        raise UsageError(
            f"{file} reads {vae.spec.z_dim} channels at strides {strides}; the model of {config.model} makes "
            f"{spec.out_channels} at {spec.vae_stride}: use the VAE that came with the model"
        )
    return use_cpu_layers(vae)


def choose_decoder(wanted: str | None, places: list[Path]) -> Path:
    """The file of a decoder: the VAE in `places`, the tiny decoder there (`taehv`), or the one at a path."""
    where = " or ".join(map(str, places))
    if wanted == "taehv":
        if found := find_tiny_decoder(places):
            return found
        raise UsageError(f"no tiny decoder in {where}; put {TINY_DECODERS[0]} there, or give its path")
    if wanted is not None and not Path(wanted).exists():
        raise UsageError(f"vae is {quoted(wanted)}: no such file or folder; expected a path, or taehv")
    if wanted is not None and not Path(wanted).is_dir():
        return Path(wanted)
    if found := find_vae([Path(wanted)] if wanted else places):
        return found
    raise UsageError(f"no VAE in {wanted or where}; give base= (--base), a folder that has one")


def text_loader(
    wanted: str | None, places: list[Path], spec: ModelSpec, dtype: torch.dtype, device: str
) -> Callable[[], PromptEncoder] | None:
    """What loads the text encoder when it is first called: the one at `wanted`, else the one in `places`.

    None where there is none; UsageError if `wanted` has none. The tokenizer may lie in `places`.
    """
    given = [Path(wanted)] if wanted else places
    if words := find_words(given):
        return cache(lambda: WordEncoder.from_file(words, spec.text_len, dtype, device))
    if text := find_text(given, places):
        return cache(lambda: load_text(text, spec.text_len, dtype, device))
    if wanted:
        raise UsageError(
            f"text_encoder is {quoted(wanted)}, which has no text encoder; expected a file such as "
            f"{TEXT_FILES[0]}, or a folder with one or with a folder text_encoder"
        )
    return None


def shipped(name: str) -> Path:
    """The folder of a model of our own; InferixError where its weights are not there."""
    if not SHIPPED[name].is_dir():
        raise InferixError(
            f"the weights of {name} are missing: {str(SHIPPED[name])!r} is no folder; "
            f"reinstall the package from its clone or wheel, or git checkout models/{name}/weights"
        )
    return SHIPPED[name]


def loras(config: EngineConfig) -> list[tuple[str, float]]:
    return [(config.lora, config.lora_scale)] if config.lora else []


def random_components(spec: ModelSpec, config: EngineConfig, check: SizeCheck) -> Components:
    """A named model with random weights and a small random text encoder, made after `check` was called."""
    if spec.in_channels != spec.out_channels:
        raise UsageError(f"streams of {spec.name} are not in this version; its transformer and checkpoints are")
    for key in ("vae", "fast_vae"):
        if (wanted := getattr(config, key)) not in (None, "taehv"):
            raise UsageError(f"{key} is {wanted!r}, but {spec.name} has random weights; leave it out, or use taehv")
    fast = tiny_for(spec) if config.fast_vae else None
    check(spec, tiny_for(spec) if config.vae else vae_for(spec), 0, fast, drawn=True)
    dtype, device = DTYPES[config.dtype], config.device
    weights = random_transformer_state(spec, 0, dtype)
    checkpoint = Checkpoint(Path(spec.name), "random", (), weights, spec, None)
    return Components(
        transformer=build_transformer(checkpoint, config.precision, dtype, device, loras(config), config.lora_partial),
        vae=random_decoder(spec, config.vae == "taehv", dtype, device),
        text=random_text(spec, dtype, device),
        source=spec.name,
        form="random",
        digest=lambda: None,
        fast_vae=random_decoder(spec, True, dtype, device) if config.fast_vae else None,
    )


def random_decoder(spec: ModelSpec, tiny: bool, dtype: torch.dtype, device: str) -> Decoder:
    if not tiny:
        state = random_vae_state(vae_for(spec), 1, dtype)
        return use_cpu_layers(build_vae(vae_for(spec), state, dtype, device, spec.name))
    weights = random_tiny_decoder_state(spec, 1, dtype)
    with torch.device("meta"):
        module = TinyDecoder(tiny_spec_from_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}))
    return use_cpu_layers(fill(module, weights, dtype, device, spec.name))


def random_text(spec: ModelSpec, dtype: torch.dtype, device: str) -> Callable[[], PromptEncoder]:
    @cache
    def load() -> PromptEncoder:
        with tempfile.TemporaryDirectory() as name:
            write_tiny_text_encoder(Path(name), "original", spec.text_dim, 3, torch.float32)
            found = find_text([Path(name)])
            assert found is not None
            return load_text(found, spec.text_len, dtype, device)

    return load
