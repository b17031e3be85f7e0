"""Load the components of an `EngineConfig`: a checkpoint with its VAE and text encoder, or random weights."""

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

SHIPPED = {"tinyworld": Path(tinyworld.__file__).parent / "weights"}  # models whose weights are in the package


class SizeCheck(Protocol):
    """Check of sizes before weights are read; raises UsageError."""

    def __call__(
        self, spec: ModelSpec, decoder: DecoderSpec, text: int, fast: DecoderSpec | None, made_on_host: bool
    ) -> None:
        """text: parameters of the text encoder, 0 for none. fast: a second decoder. made_on_host: weights are."""


class PromptEncoder(Protocol):
    """Text encoder: a prompt to the rows that the transformer attends to."""

    def encode(self, prompt: str) -> Tensor:
        """Encode a prompt to rows [text_len, text_dim], zero after its end."""


@dataclass(frozen=True)
class Components:
    """A model ready to run.

    text: loads the text encoder at its first call; None without an encoder. digest: hash of the checkpoint, or None for
    random weights. fast_vae: decoder to switch to under overload.
    """

    transformer: WanTransformer
    vae: Decoder
    text: Callable[[], PromptEncoder] | None
    source: str
    form: str
    digest: Callable[[], str | None]
    fast_vae: Decoder | None = None


def load_components(config: EngineConfig, check: SizeCheck, text_prompts: bool = True) -> Components:
    """Load the model's checkpoint, and its VAE and text encoder from beside it or from `base`.

    Find all parts, read the decoders and call `check` before the transformer's weights are read. No text encoder is
    loaded if `text_prompts` is False.
    """
    checkpoint = read_checkpoint(config.model, config.checkpoint_format, config.use_ema)
    spec, dtype, device = checkpoint.spec, DTYPES[config.dtype], config.device
    if spec.in_channels != spec.out_channels:
        raise UsageError(
            f"{config.model} takes {spec.in_channels} channels with image conditioning; streams of such models "
            "are not supported"
        )
    folders = [Path(config.base)] if config.base else []
    folders.append(checkpoint.folder)
    for key, path in (("base", config.base), ("text_encoder", config.text_encoder)):
        if path is not None and not Path(path).exists():
            raise UsageError(f"{key} is {quoted(path)}: no such file or folder")
    if config.base and not Path(config.base).is_dir():
        raise UsageError(f"base is {quoted(config.base)}, a file; expected the folder of a VAE and a text encoder")
    text = text_loader(config.text_encoder, folders, spec, dtype, device)
    vae = matching_decoder(config.vae, folders, spec, config)
    fast_vae = matching_decoder(config.fast_vae, folders, spec, config) if config.fast_vae else None
    text = text if text_prompts else None
    check(spec, vae.spec, text_parameters(spec) if text else 0, fast_vae.spec if fast_vae else None, made_on_host=False)
    return Components(
        transformer=build_transformer(checkpoint, config.precision, dtype, device, loras(config), config.lora_partial),
        vae=vae,
        text=text,
        source=config.model,
        form=checkpoint.form,
        digest=lambda: checkpoint.digest,
        fast_vae=fast_vae,
    )


def matching_decoder(name: str | None, folders: list[Path], spec: ModelSpec, config: EngineConfig) -> Decoder:
    """Load the decoder `name`; UsageError if its latents differ from the model's in channels or strides."""
    file = choose_decoder(name, folders)
    vae = load_decoder(file, DTYPES[config.dtype], config.device)
    strides = (vae.spec.temporal_stride, vae.spec.spatial_stride)
    if vae.spec.z_dim != spec.out_channels or strides != spec.vae_stride:
        raise UsageError(
            f"{file} reads {vae.spec.z_dim} channels at strides {strides}; the model of {config.model} makes "
            f"{spec.out_channels} at {spec.vae_stride}: use the VAE that came with the model"
        )
    return use_cpu_layers(vae)


def choose_decoder(name: str | None, folders: list[Path]) -> Path:
    """Find the file of a decoder. name: None for the VAE in `folders`, `taehv` for its tiny decoder, or a path."""
    where = " or ".join(map(str, folders))
    if name == "taehv":
        if file := find_tiny_decoder(folders):
            return file
        raise UsageError(f"no tiny decoder in {where}; put {TINY_DECODERS[0]} there, or give its path as vae")
    if name is not None and not Path(name).exists():
        raise UsageError(f"vae is {quoted(name)}: no such file or folder; expected a path, or taehv")
    if name is not None and not Path(name).is_dir():
        return Path(name)
    if file := find_vae([Path(name)] if name else folders):
        return file
    raise UsageError(f"no VAE in {name or where}; give base, a folder that has one")


def text_loader(
    path: str | None, folders: list[Path], spec: ModelSpec, dtype: torch.dtype, device: str
) -> Callable[[], PromptEncoder] | None:
    """Find the text encoder at `path`, or without one in `folders`; returns a function that loads it once.

    None if `folders` have no encoder; UsageError if `path` has none. The tokenizer can be in `folders`.
    """
    searched = [Path(path)] if path else folders
    if words := find_words(searched):
        return cache(lambda: WordEncoder.from_file(words, spec.text_len, dtype, device))
    if text := find_text(searched, folders):
        return cache(lambda: load_text(text, spec.text_len, dtype, device))
    if path:
        raise UsageError(
            f"text_encoder is {quoted(path)}, which has no text encoder; expected a file such as "
            f"{TEXT_FILES[0]}, or a folder with one or with a folder text_encoder"
        )
    return None


def shipped(name: str) -> Path:
    """Folder of a model whose weights are in the package; InferixError if they are missing."""
    if not SHIPPED[name].is_dir():
        raise InferixError(
            f"the weights of {name} are missing: no folder {str(SHIPPED[name])!r}; reinstall the package from its "
            f"clone or wheel, or git checkout models/{name}/weights"
        )
    return SHIPPED[name]


def loras(config: EngineConfig) -> list[tuple[str, float]]:
    return [(config.lora, config.lora_scale)] if config.lora else []


def random_components(spec: ModelSpec, config: EngineConfig, check: SizeCheck) -> Components:
    """Make a named model with random weights and a small random text encoder, after a call of `check`."""
    if spec.in_channels != spec.out_channels:
        raise UsageError(f"streams of {spec.name} are not supported; its transformer and checkpoints are")
    for key in ("vae", "fast_vae"):
        if (name := getattr(config, key)) not in (None, "taehv"):
            raise UsageError(f"{key} is {quoted(name)}, but {spec.name} has random weights; leave it out, or use taehv")
    fast = tiny_for(spec) if config.fast_vae else None
    check(spec, tiny_for(spec) if config.vae else vae_for(spec), 0, fast, made_on_host=True)
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
            files = find_text([Path(name)])
            assert files is not None
            return load_text(files, spec.text_len, dtype, device)

    return load
