"""The Wan family: causal transformers of Wan 2.1 and 2.2, their VAEs, the tiny decoder TAEHV and UMT5."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UsageError, quoted
from ...graphs.shards import Axis
from ...schemes.presets import EXPERTS, Preset
from ..column_decoder import ColumnDecoder
from ..decoder import Decoder, DecoderSpec
from ..family import AdapterUpdate, Checkpoint, Family, Format, Merge, Part, PromptEncoder
from ..spec import ModelSpec
from ..text.spec import UMT5_XXL, tiny_text
from ..text.tiny import write_tiny_text_encoder
from ..text.umt5_checkpoint import TEXT_FILES, find_text, load_text
from ..transformer import Transformer
from .checkpoint import FORMATS, merging, read_checkpoint
from .costs import WanCosts
from .diffusers_network import diffusers_network
from .lora import fitting, read_lora
from .names import changed_table
from .presets import PRESETS
from .random import random_vae_state, vae_for
from .spec import MODELS
from .taehv import TinyDecoder
from .transformer import WanTransformer
from .transformer_cpu import with_cpu_layers
from .vae import CausalVae
from .vae_checkpoint import TINY_DECODERS, find_tiny_decoder, find_vae, load_decoder, load_vae
from .vae_columns import JOINING
from .vae_cpu import use_cpu_layers
from .vae_gpu import use_gpu_layers, with_plain_layers
from .vae_spec import TAEW21, TAEW22, TinySpec, VaeSpec
from .write_checkpoint import copy_text, write_experts, write_random_transformer, write_transformer, write_vae


class WanFamily(Family):
    name = "wan"
    models: Mapping[str, ModelSpec] = MODELS
    presets: Sequence[Preset] = PRESETS
    formats: Mapping[str, Format] = FORMATS
    demo: str = "wan-tiny"
    decodes_columns: bool = True

    def demo_of(self, preset: Preset) -> str:
        return "lingbot-tiny" if preset.context.image == "channels" else self.demo

    def build(self, spec: ModelSpec, precision: str = "reference") -> WanTransformer:
        return WanTransformer(spec, precision)

    def costs(self, spec: ModelSpec) -> WanCosts:
        return WanCosts(spec)

    # Checkpoints

    def read(self, path: Path, form: str | None, use_ema: bool, known: Collection[ModelSpec]) -> Checkpoint:
        return read_checkpoint(path, form, use_ema, known)

    def read_named(self, path: Path, layout: Format, use_ema: bool, known: Collection[ModelSpec]) -> Checkpoint:
        return read_checkpoint(path, layout, use_ema, known)

    def changed_names(self, base: str, changes: Mapping[str, str]) -> Mapping[str, str]:
        return changed_table(FORMATS[base].names, changes)

    def parts_beside(self, checkpoint: Checkpoint) -> dict[str, Path | None]:
        text = find_text([checkpoint.folder])
        return {"vae": find_vae([checkpoint.folder]), "text_encoder": text[0] if text else None}

    def write_random(self, folder: Path, spec: ModelSpec, form: str, seed: int, dtype: torch.dtype) -> None:
        """Write random weights of all parts; those of the transformer are the same in every format."""
        vae = self.decoder_spec(spec)
        write_random_transformer(folder, spec, form, seed, dtype)
        layout = "diffusers" if FORMATS[form].names == "diffusers" else "original"
        write_vae(folder, layout, vae, random_vae_state(vae, seed + 1, dtype))
        write_tiny_text_encoder(folder, layout, spec.text_dim, seed + 3, dtype)

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
        if checkpoint.sets == EXPERTS:
            layout = next(one for one in FORMATS.values() if one.experts is not None and one.names == form)
            pair, boundary = (checkpoint.tensors, checkpoint.more[0]), checkpoint.boundary_ratio
            write_experts(folder, checkpoint.spec, layout, pair, boundary, max_shard, dtype, change, progress)
        elif checkpoint.more and form == "diffusers":
            raise self.lacks("layout of diffusers for two sets of weights", quoted(checkpoint.path))
        else:
            spec, tensors = checkpoint.spec, checkpoint.tensors
            memory: Mapping[str, Tensor] = checkpoint.more[0] if checkpoint.more else {}
            write_transformer(folder, spec, form, tensors, max_shard, dtype, change, progress, memory)
        if vae_path := find_vae([checkpoint.folder]):
            vae = load_vae(vae_path, dtype, "cpu")
            progress("VAE")
            write_vae(folder, form, vae.spec, vae.state_dict())
        if text := find_text([checkpoint.folder]):
            progress("text encoder")
            copy_text(text, folder)

    # Adapters

    def merging(
        self, checkpoint: Checkpoint, loras: Iterable[tuple[str | Path, float]], partial: bool = False
    ) -> Merge:
        return merging(checkpoint, loras, partial)

    def read_adapter(self, path: str | Path, weights: Mapping[str, Tensor], partial: bool) -> dict[str, AdapterUpdate]:
        return {**fitting(read_lora(path), weights, partial)}

    # Decoders

    def decoder_spec(self, spec: ModelSpec) -> VaeSpec:
        """Return the sizes of a model's decoder: small for the small models, Wan's for all others."""
        return vae_for(spec)

    def tiny_decoder_spec(self, spec: ModelSpec) -> TinySpec:
        return TAEW22 if spec.vae_stride[1] == TAEW22.spatial_stride else TAEW21

    def build_decoder(self, spec: DecoderSpec) -> Decoder:
        if isinstance(spec, TinySpec):
            return TinyDecoder(spec)
        assert isinstance(spec, VaeSpec)
        return CausalVae(spec)

    def random_decoder(self, spec: ModelSpec, tiny: bool, dtype: torch.dtype, device: Any) -> Decoder:
        return self.with_fast_layers(super().random_decoder(spec, tiny, dtype, device))

    def find_decoder(self, name: str | None, folders: Sequence[Path]) -> Path:
        return choose_decoder(name, folders)

    def load_decoder(self, path: Path, dtype: torch.dtype, device: Any) -> Decoder:
        return self.with_fast_layers(load_decoder(path, dtype, device))

    def column_decoder(self, decoder: Decoder, axis: Axis) -> ColumnDecoder:
        return ColumnDecoder(with_plain_layers(decoder), axis, JOINING)  # whose edges come in before each layer

    # Comparison

    def is_in_diffusers(self, spec: ModelSpec) -> bool:
        return spec.grid is None and spec.action_dim is None and spec.image_dim is None and spec.frame_channels == 0

    def diffusers_network(self, model: Transformer) -> nn.Module:
        return diffusers_network(model)

    # Layers by device

    def with_fast_layers(self, module: Part) -> Part:
        if isinstance(module, WanTransformer):
            return with_cpu_layers(module)
        return use_gpu_layers(use_cpu_layers(module))

    # Text

    def text_parameters(self, spec: ModelSpec) -> int:
        return (UMT5_XXL if spec.text_dim == UMT5_XXL.dim else tiny_text(spec.text_dim)).parameters

    def load_text(
        self, path: str | None, folders: Sequence[Path], spec: ModelSpec, dtype: torch.dtype, device: Any
    ) -> Callable[[], PromptEncoder] | None:
        """Find UMT5; the tokenizer can be in `folders`."""
        if text := find_text([Path(path)] if path else folders, folders):
            return cache(lambda: load_text(text, spec.text_len, dtype, device))
        if path:
            raise UsageError(
                f"text_encoder is {quoted(path)}, which has no text encoder; expected a file such as "
                f"{TEXT_FILES[0]}, or a folder with one or with a folder text_encoder"
            )
        return None

    def random_text(self, spec: ModelSpec, dtype: torch.dtype, device: Any) -> Callable[[], PromptEncoder]:
        @cache
        def load() -> PromptEncoder:
            with tempfile.TemporaryDirectory() as name:
                write_tiny_text_encoder(Path(name), "original", spec.text_dim, 3, torch.float32)
                files = find_text([Path(name)])
                assert files is not None
                return load_text(files, spec.text_len, dtype, device)

        return load


def choose_decoder(name: str | None, folders: Sequence[Path]) -> Path:
    """Find the file of a decoder. name: None for the VAE in `folders`, `taehv` for its tiny decoder, or a path."""
    where = " or ".join(map(quoted, folders))
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
    raise UsageError(f"no VAE in {quoted(name) if name else where}; give base, a folder that has one")


WAN: WanFamily = WanFamily()
