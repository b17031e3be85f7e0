"""The MAGI-1 family: transformer, autoencoder and T5 encoder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError, quoted
from ...schemes.presets import Preset
from ..decoder import Decoder, DecoderSpec
from ..family import Checkpoint, Family, Format, Merge, PromptEncoder
from ..files import write_json, write_tensors
from ..random import random_state
from ..spec import ModelSpec
from ..text.spec import TextSpec, tiny_text
from .checkpoint import FORMATS, WEIGHT_SCALE, read_checkpoint, recognises, write_transformer
from .costs import MagiCosts
from .presets import PRESETS
from .spec import MAGI_4B, MODELS, MagiSpec
from .text import NAME, T5Encoder, check_folder, find_text, load_text, write_tiny_text
from .transformer import MagiTransformer
from .vae import VitVae
from .vae_checkpoint import VAE_FILE, find_vae, load_vae, vae_config
from .vae_spec import TINY_VIT_VAE, VIT_VAE, VitVaeSpec

T5_XXL = TextSpec(vocabulary=32128, dim=4096, head_dim=64, ffn_dim=10240, num_layers=24, num_heads=64, buckets=32)
RANDOM_SCALES = {"weight_scale": 2**-9, "input_scale": 2**-5, "smooth_scale": 2**-4}  # of random FP8 layers
RANDOM_SHARD = 5_000_000_000  # bytes of the largest file of random weights


class MagiFamily(Family):
    name = "magi"
    layers = "videodit_blocks.layers"
    models: Mapping[str, ModelSpec] = MODELS
    presets: Sequence[Preset] = PRESETS
    formats: Mapping[str, Format] = FORMATS
    demo: str = "magi-tiny"
    to_clean = True

    def build(self, spec: ModelSpec, precision: str = "reference") -> MagiTransformer:
        assert isinstance(spec, MagiSpec)
        return MagiTransformer(spec)

    def costs(self, spec: ModelSpec) -> MagiCosts:
        assert isinstance(spec, MagiSpec)
        return MagiCosts(spec)

    def random_state(self, spec: ModelSpec, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Draw random weights; rotary frequencies, and norms that store their factor minus 1, are as initialised."""
        assert isinstance(spec, MagiSpec)
        state = super().random_state(spec, seed, dtype)
        bands = 10000 ** (-torch.arange(spec.bands, dtype=torch.float64) / spec.bands)
        shifted = ("layernorm.weight", "layernorm_xattn.weight", "post_norm.weight")
        for name in [name for name in state if name.endswith(WEIGHT_SCALE)]:
            module = name.removesuffix(WEIGHT_SCALE)
            for leaf, value in RANDOM_SCALES.items():
                if f"{module}.{leaf}" in state:
                    state[f"{module}.{leaf}"] = torch.full_like(state[f"{module}.{leaf}"], value, dtype=torch.float32)
            weight = f"{module}.weight"
            scaled = (state[weight].float() / RANDOM_SCALES["weight_scale"]).clamp(-448, 448)
            state[weight] = scaled.to(torch.float8_e4m3fn)
        return {
            name: bands.to(dtype) if name == "bands" else tensor - 1 if name.endswith(shifted) else tensor
            for name, tensor in state.items()
        }

    # Checkpoints

    def recognises(self, path: Path) -> bool:
        return recognises(path)

    def read(self, path: Path, form: str | None, use_ema: bool, known: Collection[ModelSpec]) -> Checkpoint:
        return read_checkpoint(path, form, known)

    def parts_beside(self, checkpoint: Checkpoint) -> dict[str, Path | None]:
        return {"vae": find_vae([checkpoint.folder]), "text_encoder": find_text([checkpoint.folder])}

    def write_random(self, folder: Path, spec: ModelSpec, form: str, seed: int, dtype: torch.dtype) -> None:
        assert isinstance(spec, MagiSpec)
        write_transformer(folder, spec, self.random_state(spec, seed, dtype), RANDOM_SHARD)
        vae = self.decoder_spec(spec)
        with torch.device("meta"):
            module = VitVae(vae)
        write_vae(folder, vae, random_state(module, seed + 1, dtype))
        write_tiny_text(folder / "t5" / NAME, spec.text_dim, seed + 3, dtype)

    def write(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        form: str,
        dtype: torch.dtype | None,
        max_shard: int,
        change: Merge,
        progress: Callable[[str], None],
    ) -> None:
        """Write a checkpoint as published. UsageError for the layout of diffusers, which has none for this model."""
        assert isinstance(checkpoint.spec, MagiSpec)
        if form == "diffusers":
            raise self.lacks("layout of diffusers", f"format {form}, of {quoted(str(checkpoint.path))}")
        write_transformer(folder, checkpoint.spec, checkpoint.tensors, max_shard, dtype, change, progress)
        if path := find_vae([checkpoint.folder]):
            progress("VAE")
            vae = load_vae(path, dtype, "cpu")
            write_vae(folder, vae.spec, vae.state_dict())
        if text := find_text([checkpoint.folder]):
            progress("text encoder")
            shutil.copytree(text, folder / "t5" / NAME)

    # Decoders

    def decoder_spec(self, spec: ModelSpec) -> VitVaeSpec:
        return TINY_VIT_VAE if "tiny" in spec.name else VIT_VAE

    def build_decoder(self, spec: DecoderSpec) -> Decoder:
        assert isinstance(spec, VitVaeSpec)
        return VitVae(spec)

    def find_decoder(self, name: str | None, folders: Sequence[Path]) -> Path:
        if name == "taehv":
            raise self.lacks("tiny decoder", "vae taehv")
        if name is not None and not Path(name).exists():
            raise UsageError(f"vae is {quoted(name)}: no such file or folder; expected a path")
        if name is not None and not Path(name).is_dir():
            return Path(name)
        if file := find_vae([Path(name)] if name else folders):
            return file
        where = name or " or ".join(map(str, folders))
        raise UsageError(f"no VAE in {where}; give base, a folder with vae/{VAE_FILE}")

    def load_decoder(self, path: Path, dtype: torch.dtype, device: Any) -> Decoder:
        return load_vae(path, dtype, device)

    # Text

    def text_parameters(self, spec: ModelSpec) -> int:
        return (T5_XXL if spec.text_dim == MAGI_4B.text_dim else tiny_text(spec.text_dim)).parameters

    def load_text(
        self, path: str | None, folders: Sequence[Path], spec: ModelSpec, dtype: torch.dtype, device: Any
    ) -> Callable[[], PromptEncoder] | None:
        folder = check_folder(path) if path else find_text(folders)
        return None if folder is None else cache(lambda: load_text(folder, spec.text_len, dtype, device))

    def check_prompts(self, text: Callable[[], PromptEncoder] | None, prompts: Sequence[str]) -> None:
        """UsageError for a caption of more tokens than the model takes; reads the tokenizer only."""
        if text is not None and prompts:
            encoder = text()
            assert isinstance(encoder, T5Encoder)
            for prompt in prompts:
                encoder.check(prompt)

    def random_text(self, spec: ModelSpec, dtype: torch.dtype, device: Any) -> Callable[[], PromptEncoder]:
        @cache
        def load() -> PromptEncoder:
            with tempfile.TemporaryDirectory() as name:
                write_tiny_text(Path(name), spec.text_dim, 3, torch.float32)
                encoder = load_text(Path(name), spec.text_len, dtype, device)
                _ = encoder.model  # read while the folder is there
                return encoder

        return load


def write_vae(folder: Path, spec: VitVaeSpec, state: Mapping[str, Tensor]) -> None:
    """Write an autoencoder with its config as published."""
    write_json(folder / "vae" / "config.json", vae_config(spec))
    write_tensors({**state}, folder / "vae" / VAE_FILE, {"format": "pt"})


MAGI: MagiFamily = MagiFamily()

