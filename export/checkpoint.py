"""Write checkpoints in published formats: random ones for tests, and conversions.

A checkpoint is a folder of all parts (transformer, VAE, text encoder, tokenizer). It gets its name only when it is
complete.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InferixError, UsageError, nearest, quoted
from ..models.files import finite, reason, save_pickle, write_json, write_tensors
from ..models.scaled_weights import unscaled
from ..models.text.tiny import write_tiny_text_encoder
from ..models.text.umt5_checkpoint import ORIGINAL_TOKENIZER, find_text
from ..models.wan.checkpoint import FORMATS, SHARD, merging, read_checkpoint
from ..models.wan.configs import diffusers_config, diffusers_vae_config, original_config
from ..models.wan.names import to_format
from ..models.wan.random import random_transformer_state, random_vae_state, vae_for
from ..models.wan.spec import MODELS, ModelSpec
from ..models.wan.vae import VaeSpec
from ..models.wan.vae_checkpoint import find_vae, load_vae, vae_file
from ..models.wan.vae_names import to_original
from ..runtime.files import settle_on_disk

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONVERTED = ("original", "diffusers")
MAX_SHARD = 5_000_000_000  # bytes
LORA_RANK = 4  # of random adapters


def write_random(spec_name: str, form: str, destination: str | Path, seed: int = 0, dtype: str = "float32") -> Path:
    """Write random weights of a named model as a folder in a format. Raises UsageError for unknown names."""
    for what, name, known in (("model", spec_name, MODELS), ("format", form, FORMATS), ("dtype", dtype, DTYPES)):
        if name not in known:
            raise UsageError(f"no {what} {quoted(name)}{nearest(name, known)}; there are {', '.join(known)}")
    spec, kind = MODELS[spec_name], DTYPES[dtype]
    vae = vae_for(spec)
    with new_folder(destination) as folder:
        write_random_transformer(folder, spec, form, seed, kind)
        write_vae(folder, form, vae, random_vae_state(vae, seed + 1, kind))
        write_tiny_text_encoder(folder, FORMATS[form].names, spec.text_dim, seed + 3, kind)
    return Path(destination)


def write_random_transformer(folder: Path, spec: ModelSpec, form: str, seed: int, dtype: torch.dtype) -> None:
    """Write the same weights of a seed in every format, and other weights where a reader must not look."""
    layout, state = FORMATS[form], random_transformer_state(spec, seed, dtype)
    if layout.lora:
        adapter = random_lora(spec, seed + 4)
        # The weights without the adapter: merging it gives the weights of every other format.
        state = {name: state[name] - adapter_change(name, state[name], adapter) for name in state}
        save_pickle({"generator_lora": adapter}, folder / layout.lora)
    if layout.file == SHARD:
        write_transformer(folder, spec, form, state, MAX_SHARD)
        return
    named = {f"model.{to_format(layout.names, name)}": tensor for name, tensor in state.items()}
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


def convert(
    source: str | Path,
    destination: str | Path,
    form: str = "diffusers",
    dtype: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    max_shard: int = MAX_SHARD,
    progress: Callable[[str], None] = lambda line: None,
    lora_partial: bool = False,
) -> Path:
    """Write any readable checkpoint as safetensors with a config, adapters merged.

    A VAE and a text encoder beside the transformer are written too, the text encoder unchanged.
    form: one of `CONVERTED`. dtype: of transformer and VAE, None for the dtype of the file. max_shard: bytes per file.
    progress: called with the name of each written file. lora_partial: merge an adapter that fits only in part.
    Raises UsageError for bad arguments, InferixError for broken files or a full disk.
    """
    if form not in CONVERTED:
        raise UsageError(f"format is {quoted(form)}{nearest(form, CONVERTED)}; expected one of {', '.join(CONVERTED)}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype is {quoted(dtype)}{nearest(dtype, DTYPES)}; expected one of {', '.join(DTYPES)}")
    if isinstance(max_shard, bool) or not isinstance(max_shard, int) or max_shard < 1:
        raise UsageError(f"max_shard is {max_shard}; expected bytes, 1 or more")
    checkpoint = read_checkpoint(source)
    change = merging(checkpoint, [(lora, lora_scale)] if lora else [], lora_partial)
    kind = DTYPES[dtype] if dtype else None
    place = checkpoint.folder
    refuse_inside(destination, checkpoint.path, *([lora] if lora else []))
    with new_folder(destination) as folder:
        write_transformer(folder, checkpoint.spec, form, checkpoint.tensors, max_shard, kind, change, progress)
        if vae_path := find_vae([place]):
            vae = load_vae(vae_path, kind, "cpu")
            progress("VAE")
            write_vae(folder, form, vae.spec, vae.state_dict())
        if text := find_text([place]):
            progress("text encoder")
            copy_text(text, folder)
    return Path(destination)


def copy_text(text: tuple[Path, Path], folder: Path) -> None:
    """Copy the text encoder and its tokenizer to the names that readers look for."""
    encoder, tokenizer = text
    if encoder.is_dir():
        shutil.copytree(encoder, folder / "text_encoder")
    else:
        shutil.copyfile(encoder, folder / encoder.name)
    if tokenizer.is_dir():
        shutil.copytree(tokenizer, folder / ("tokenizer" if encoder.is_dir() else ORIGINAL_TOKENIZER))


def write_transformer(
    folder: Path,
    spec: ModelSpec,
    form: str,
    tensors: Mapping[str, Tensor],
    max_shard: int,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write config and safetensors in the names of `original` or `diffusers`, with one shard in memory at a time.

    Each tensor goes through `change` and is written in `dtype` (None: its own), in files of up to `max_shard` bytes.
    """
    if form == "diffusers":
        write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
        folder = folder / "transformer"
    write_json(folder / "config.json", diffusers_config(spec) if form == "diffusers" else original_config(spec))
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        bytes_ = (dtype or tensor.dtype).itemsize * tensor.numel()
        if shards[-1] and size + bytes_ > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + bytes_, total + bytes_
    stem = SHARD.removesuffix(".safetensors")
    places: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = SHARD if len(shards) == 1 else f"{stem}-{index + 1:05}-of-{len(shards):05}.safetensors"
        part = {}
        for name in names:
            tensor = unscaled(tensors[name])
            written = finite(file, name, change(name, tensor).to(dtype or tensor.dtype))
            part[to_format(form, name)] = written.contiguous()
        write_tensors(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
        progress(file)
    if len(shards) > 1:
        index_file = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / f"{SHARD}.index.json", index_file)


def write_vae(folder: Path, form: str, spec: VaeSpec, state: Mapping[str, Tensor]) -> None:
    """Write a VAE to the file that readers of a format look for."""
    if form == "diffusers":
        write_json(folder / "vae" / "config.json", diffusers_vae_config(spec))
        write_tensors(state, folder / "vae" / SHARD, {"format": "pt"})
    else:
        save_pickle({to_original(name, spec): tensor for name, tensor in state.items()}, folder / vae_file(spec))


def refuse_inside(destination: str | Path, *sources: str | Path) -> None:
    """Raise UsageError for an output at, in or above an input: writing it would change the input's folder."""
    target = Path(destination).resolve()
    for source in sources:
        origin = Path(source).resolve()
        folder = origin if origin.is_dir() else origin.parent
        if target == origin or target in origin.parents or (origin.is_dir() and folder in target.parents):
            raise UsageError(
                f"destination {quoted(str(destination))} lies in or above the input {quoted(str(source))}; "
                "name a folder elsewhere"
            )


@contextmanager
def new_folder(destination: str | Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `destination` on success and removed on failure.

    Warns of temporary folders that killed runs have left.
    Raises UsageError if `destination` exists and is not an empty folder, InferixError if writing fails.
    """
    destination = Path(destination)
    try:
        taken = os.path.lexists(destination) and (not destination.is_dir() or any(destination.iterdir()))
        if taken:
            raise FileExistsError(errno.EEXIST, "it exists already")
        destination.parent.mkdir(parents=True, exist_ok=True)
        for left in destination.parent.glob(f"{glob.escape(destination.name)}.*.part"):
            warnings.warn(f"{left} is the output of an unfinished run; remove it if no run is writing it", stacklevel=4)
        part = destination.with_name(f"{destination.name}.{secrets.token_hex(4)}.part")
        part.mkdir()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write to {quoted(str(destination))}: {reason(error)}; name a new folder") from error
    try:
        yield part
        for file in part.rglob("*"):
            settle_on_disk(file)
        if destination.is_dir():
            destination.rmdir()
        part.rename(destination)
        settle_on_disk(destination.parent)
    except OSError as error:
        raise InferixError(
            f"writing {quoted(str(destination))} failed: {reason(error)}; free some space or choose another place"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
