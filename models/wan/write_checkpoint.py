"""Write Wan checkpoints in published layouts: transformer, VAE, text encoder and tokenizer in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..family import Format
from ..files import save_pickle, write_json, write_tensors
from ..shards import write_shards
from ..spec import ModelSpec
from ..text.umt5_checkpoint import ORIGINAL_TOKENIZER
from .checkpoint import FORMATS, INDEX, SHARD
from .configs import diffusers_config, diffusers_vae_config, original_config, pipeline_class
from .names import TWIN, to_format, twin_name
from .random import random_transformer_state
from .vae_checkpoint import vae_file
from .vae_names import to_original
from .vae_spec import VaeSpec

RANDOM_SHARD = 5_000_000_000  # bytes of the largest file of random weights
LORA_RANK = 4  # of random adapters
BOUNDARY = 0.875  # of random experts, as Wan 2.2's for text to video have it


def write_random_transformer(folder: Path, spec: ModelSpec, form: str, seed: int, dtype: torch.dtype) -> None:
    """Write the same weights of a seed in every format, and other weights where a reader must not look."""
    layout, state = FORMATS[form], random_transformer_state(spec, seed, dtype)
    if layout.experts is not None:
        low = random_transformer_state(spec, seed + 2, dtype)
        write_experts(folder, spec, layout, (state, low), BOUNDARY, RANDOM_SHARD)
        return
    if layout.lora:
        adapter = random_lora(spec, seed + 4)
        # The weights without the adapter: merging it gives the weights of every other format.
        state = {name: state[name] - adapter_change(name, state[name], adapter) for name in state}
        save_pickle({"generator_lora": adapter}, folder / layout.lora)
    if layout.file == SHARD:
        write_transformer(folder, spec, form, state, RANDOM_SHARD)
        return
    named = {f"model.{to_format(layout.names, name)}": tensor for name, tensor in state.items()}
    if layout.twins:
        twins = random_transformer_state(spec, seed + 5, dtype)
        named |= {f"model.{twin_name(to_format(layout.names, name))}": tensor for name, tensor in twins.items()}
    if layout.file.endswith(".safetensors"):
        write_tensors(fused(named), folder / layout.file)
    elif "generator_ema" in layout.weights and not layout.lora:
        other = random_transformer_state(spec, seed + 2, dtype)
        training = {f"model.{to_format(layout.names, name)}": tensor for name, tensor in other.items()}
        save_pickle({"generator": training, "generator_ema": named}, folder / layout.file)
    else:
        save_pickle({"generator": named}, folder / layout.file)


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join query, key and value of self-attention into one tensor [3 * d, d], as Krea's files have them."""
    result = {}
    for name, tensor in tensors.items():
        if ".self_attn.q." in name:
            parts = [tensors[name.replace(".q.", f".{part}.")] for part in "qkv"]
            result[name.replace(".q.", ".to_qkv.")] = torch.cat(parts)
        elif ".self_attn.k." not in name and ".self_attn.v." not in name:
            result[name] = tensor
    return result


def random_lora(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Make a PEFT adapter on the linear layers of every block, as LongLive publishes; float32."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name, weight in random_transformer_state(spec, 0, torch.float32).items():
        if name.startswith("blocks.") and weight.ndim == 2 and name.endswith(".weight"):
            module = to_format("original", name).removesuffix(".weight")
            for side, shape in (("A", (LORA_RANK, weight.shape[1])), ("B", (weight.shape[0], LORA_RANK))):
                matrix = torch.randn(shape, generator=generator) * 0.02
                adapter[f"base_model.model.{module}.lora_{side}.weight"] = matrix
    return adapter


def adapter_change(name: str, weight: Tensor, adapter: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor that merging the adapter adds to a weight; zeros for other weights."""
    module = f"base_model.model.{to_format('original', name).removesuffix('.weight')}"
    if not name.endswith(".weight") or f"{module}.lora_A.weight" not in adapter:
        return torch.zeros_like(weight)
    return (adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]).to(weight.dtype)


def copy_text(text: tuple[Path, Path], folder: Path) -> None:
    """Copy the text encoder and its tokenizer to the names that readers look for."""
    encoder, tokenizer = text
    if encoder.is_dir():
        shutil.copytree(encoder, folder / "text_encoder")
    else:
        shutil.copyfile(encoder, folder / encoder.name)
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder / ("tokenizer" if encoder.is_dir() else ORIGINAL_TOKENIZER))


def write_experts(
    folder: Path,
    spec: ModelSpec,
    layout: Format,
    experts: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    boundary: float | None,
    max_shard: int,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the experts for high and for low noise, each to a folder of its own, and the pipeline's index."""
    assert layout.experts is not None and isinstance(layout.names, str)
    for name, tensors in zip(layout.experts, experts, strict=True):
        config = diffusers_config(spec) if layout.names == "diffusers" else original_config(spec)
        write_network(folder / name, config, layout.names, tensors, max_shard, dtype, change, progress)
    index = {"_class_name": "WanPipeline", "boundary_ratio": boundary}
    write_json(folder / INDEX, {key: value for key, value in index.items() if value is not None})


def write_transformer(
    folder: Path,
    spec: ModelSpec,
    form: str,
    tensors: Mapping[str, Tensor],
    max_shard: int,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    progress: Callable[[str], None] = lambda line: None,
    memory: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write config and safetensors in the names of `original` or `diffusers`, with one shard in memory at a time.

    Each tensor goes through `change` and is written in `dtype` (None: its own), in files of up to `max_shard` bytes.
    memory: tensors of a second set of weights, written under twin names where they are not those of the first.
    """
    layout = FORMATS[form]
    names = layout.names
    if form == "diffusers":
        write_json(folder / INDEX, {"_class_name": pipeline_class(spec)})
        folder = folder / "transformer"
        names = "diffusers" if spec.camera_channels is None else "original"  # as such pipelines are published
    twins = {f"{TWIN}{name}": tensor for name, tensor in memory.items() if tensor is not tensors.get(name)}
    config = diffusers_config(spec) if form == "diffusers" else original_config(spec)
    write_network(folder / layout.folder, config, names, {**tensors, **twins}, max_shard, dtype, change, progress)


def write_network(
    folder: Path,
    config: Mapping[str, Any],
    names: str | Mapping[str, str],
    tensors: Mapping[str, Tensor],
    max_shard: int,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write one transformer's config and files into a folder; names of twins begin with `TWIN`.

    A twin goes through `change` under the name of the tensor that it is the twin of.
    """

    def published(name: str) -> str:
        theirs = to_format(names, name.removeprefix(TWIN))
        return twin_name(theirs) if name.startswith(TWIN) else theirs

    write_json(folder / "config.json", dict(config))
    stem = SHARD.removesuffix(".safetensors")

    def changed(name: str, tensor: Tensor) -> Tensor:
        return change(name.removeprefix(TWIN), tensor)

    write_shards(folder, stem, tensors, published, max_shard, dtype, changed, progress)


def write_vae(folder: Path, form: str, spec: VaeSpec, state: Mapping[str, Tensor]) -> None:
    """Write a VAE to the file that readers of a format look for."""
    if form == "diffusers":
        write_json(folder / "vae" / "config.json", diffusers_vae_config(spec))
        write_tensors(state, folder / "vae" / SHARD, {"format": "pt"})
    else:
        save_pickle({to_original(name, spec): tensor for name, tensor in state.items()}, folder / vae_file(spec))
