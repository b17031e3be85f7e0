"""Read and write MAGI-1's published transformers: `model.safetensors`, whole or in shards, and a config in JSON.

Sizes come from the tensors. What no tensor shows, the factor of the latents and the epsilon of norms, comes from the
`model_config` of a JSON file beside them, else from the named model of these sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UsageError, nearest, quoted
from ..family import Checkpoint, Format
from ..files import check_file, read_json, read_names, write_json
from ..shards import write_shards
from ..spec import ModelSpec
from ..state_dicts import (
    WeightFiles,
    check_names_one_file,
    choose_state_dict,
    find_weight_files,
    read_weight_files,
    refuse_quantised,
)
from .spec import MAGI_4B, MAGI_24B, MagiSpec

FORM, STEM = "magi", "model"
FORMATS: dict[str, Format] = {FORM: Format("magi", f"{STEM}.safetensors")}
FOLDERS = ("", "inference_weight", "inference_weight.distill", "inference_weight.fp8", "inference_weight.fp8.distill")
CONFIG = "model_config"
OURS, THEIRS = "bands", "rope.bands"  # the only name that differs
LAYER = re.compile(r"videodit_blocks\.layers\.(\d+)\.")
CONFIG_KEYS = {  # key of the config: field of the spec
    "num_layers": "num_layers", "hidden_size": "dim", "ffn_hidden_size": "ffn_dim", "num_attention_heads": "num_heads",
    "num_query_groups": "kv_heads", "kv_channels": "head_width", "caption_channels": "text_dim",
    "caption_max_length": "text_len", "layernorm_epsilon": "eps", "x_rescale_factor": "rescale",
    "gated_linear_unit": "gated",
}  # fmt: skip
WEIGHT_SCALE = ".weight_scale"  # of each quantised layer
STATED = ("rescale", "eps")  # fields that no tensor shows


def published(name: str) -> str:
    """The published name of a parameter."""
    return THEIRS if name == OURS else name


def is_transformer(tensors: Mapping[str, Tensor]) -> bool:
    return "x_embedder.weight" in tensors and any(LAYER.match(name) for name in tensors)


def weight_files(path: Path) -> WeightFiles | None:
    """The files of a transformer at a path; None where there are none of its names."""
    if not path.is_dir():
        return WeightFiles((path,))
    found = {name: files for name in FOLDERS if (files := find_weight_files(path / name, STEM)) is not None}
    if len(found) > 1:
        names = ", ".join(name or "." for name in found)
        raise UsageError(f"{quoted(str(path))} holds several checkpoints ({names}); name one of them")
    return next(iter(found.values()), None)


def recognises(path: Path) -> bool:
    """True for a file or folder with the names of a transformer; False for any other, or one that cannot be read."""
    try:
        indices = [index for name in FOLDERS if (index := path / name / f"{STEM}.safetensors.index.json").is_file()]
        if indices:  # files that it lists may be missing
            names: Iterable[Any] = (read_json(indices[0]) or {}).get("weight_map") or ()
        else:
            files = weight_files(path) if path.exists() else None
            names = read_names(files.files[0]) if files is not None else ()
        return any(LAYER.match(str(name)) for name in names)
    except (UsageError, CheckpointError):
        return False


def read_checkpoint(path: Path, form: str | None, known: Collection[ModelSpec]) -> Checkpoint:
    """Map a transformer's file or folder. UsageError if it is none, CheckpointError for a broken file."""
    if not path.exists():
        names = [spec.name for spec in known]
        raise UsageError(f"no checkpoint {quoted(str(path))}: no such file or folder{nearest(str(path), names)}")
    if not path.is_dir():
        check_file(path, "checkpoint")
        check_names_one_file(path)
    files = weight_files(path)
    if files is None:
        raise UsageError(f"{quoted(str(path))} holds no transformer of MAGI-1; expected {STEM}.safetensors or shards")
    content = read_weight_files(files)
    quantised = any(name.endswith(WEIGHT_SCALE) for name in content)
    _, tensors = choose_state_dict(path, content, "MAGI-1 transformer", is_transformer, own_scales=quantised)
    tensors = {OURS if name == THEIRS else name: tensor for name, tensor in tensors.items()}
    if quantised:
        tensors = {name: unbatched(path, name, tensor, tensors) for name, tensor in tensors.items()}
    config = find_config(files.files[0].parent, path)
    spec = read_spec(path, tensors, config, [spec for spec in known if isinstance(spec, MagiSpec)])
    return Checkpoint(path, form or FORM, files.files, tensors, spec, None)


def unbatched(path: Path, name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor of an FP8 file without the batch of one that quantised layers are published with.

    Raises UsageError for weights in another dtype, and for inputs of several scales without factors of channels.
    """
    module, _, leaf = name.rpartition(".")
    if f"{module}{WEIGHT_SCALE}" not in tensors:
        refuse_quantised(path, {name: tensor})
        return tensor
    if leaf == "weight" and tensor.dtype != torch.float8_e4m3fn:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(f"{quoted(path)} has {quoted(name)} in {kind}, with a scale; expected float8_e4m3fn")
    if leaf == "input_scale" and (tensor != tensor.flatten()[0]).any():
        raise UsageError(f"{quoted(path)}: {quoted(name)} has several values; expected one for all channels")
    has_batch = tensor.ndim == {"weight": 3, "smooth_scale": 2}.get(leaf)
    return tensor[0] if has_batch else tensor


def batched(name: str, tensor: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """A tensor as FP8 files have it: the reverse of `unbatched`."""
    module, _, leaf = name.rpartition(".")
    if f"{module}{WEIGHT_SCALE}" not in tensors or leaf not in ("weight", "smooth_scale"):
        return tensor
    return (tensor.to(torch.float8_e4m3fn) if leaf == "weight" else tensor)[None]


def find_config(*folders: Path) -> Mapping[str, Any]:
    """The `model_config` of the first JSON file with one; empty without any."""
    for folder in folders:
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            if file.name.endswith(".index.json"):
                continue
            config = (read_json(file) or {}).get(CONFIG)
            if config is not None and not isinstance(config, dict):
                raise CheckpointError(f"{quoted(file)}: {CONFIG} is {quoted(config)}; expected a JSON object")
            if config is not None:
                return config
    return {}


def read_spec(
    path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], known: Collection[MagiSpec]
) -> MagiSpec:
    """Read sizes from shapes, and the rest from the config; a known model's spec if all are its.

    CheckpointError if tensors that show a size are missing, UsageError if the config contradicts the shapes.
    """
    layers = count_layers(path, tensors)
    attention = "videodit_blocks.layers.0.self_attention"
    try:
        dim, channels, _, rows, columns = tensors["x_embedder.weight"].shape
        width = len(tensors[f"{attention}.q_layernorm.weight"])
        queries = tensors[f"{attention}.linear_qkv.q.weight"].shape[-2]
        keys = tensors[f"{attention}.linear_qkv.k.weight"].shape[-2]
        up = tensors["videodit_blocks.layers.0.mlp.linear_fc1.weight"].shape[-2]
        ffn = tensors["videodit_blocks.layers.0.mlp.linear_fc2.weight"].shape[-1]
        text_len, text_dim = tensors["y_embedder.null_caption_embedding"].shape
        cond, freq = tensors["t_embedder.mlp.0.weight"].shape
        made = tensors["final_linear.linear.weight"].shape[0] // (rows * columns)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{quoted(path)} is no complete MAGI-1 transformer: no {error} in it") from error
    sizes = (dim, channels, width, queries, keys, ffn, text_len, text_dim, cond, freq, made, layers)
    if 0 in sizes or queries % width or keys % width or up not in (ffn, 2 * ffn) or channels != made:
        raise CheckpointError(f"{quoted(path)} is no MAGI-1 transformer: its sizes {sizes} do not belong together")
    copies = 2 if channels == 2 * MAGI_24B.in_channels else 1
    like = MAGI_24B if copies > 1 else MAGI_4B
    shown = replace(
        like, name="custom", dim=dim, ffn_dim=ffn, num_heads=queries // width, kv_heads=keys // width,
        num_layers=layers, in_channels=channels // copies, out_channels=channels // copies, freq_dim=freq,
        text_dim=text_dim, text_len=text_len, patch=(rows, columns), head_width=width, cond_dim=cond, gated=up > ffn,
        copies=copies, fp8=any(name.endswith(WEIGHT_SCALE) for name in tensors),
    )  # fmt: skip
    stated = stated_fields(path, config, shown)
    for spec in known:
        same = replace(shown, **{key: getattr(spec, key) for key in ("name", "default_size", *STATED)})
        if same == spec and all(getattr(spec, key) == value for key, value in stated.items()):
            return spec
    return replace(shown, **stated)


def stated_fields(path: Path, config: Mapping[str, Any], shown: MagiSpec) -> dict[str, Any]:
    """The fields that only the config states. UsageError that names each value which contradicts the tensors."""
    values, wrong, stated = asdict(shown), list[str](), dict[str, Any]()
    for key, name in CONFIG_KEYS.items():
        if key not in config:
            continue
        value = config[key]
        if name in STATED and isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            stated[name] = float(value)
        elif name in STATED:
            wrong.append(f"{key} is {quoted(value)}, expected a number above 0, up to 1")
        elif value != values[name]:
            wrong.append(f"{key} is {quoted(value)}, the tensors have {values[name]}")
    if wrong:
        raise UsageError(
            f"{CONFIG} beside {quoted(path)} is not of this model: {'; '.join(wrong)}; remove or replace it"
        )
    return stated


def count_layers(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Count the layers. CheckpointError for a gap in their numbers, before any layer is allocated."""
    numbers = {layer[1] for name in tensors if (layer := LAYER.match(name))}
    for number in range(len(numbers)):
        if str(number) not in numbers:
            raise CheckpointError(
                f"{quoted(path)} has {len(numbers)} layers, but none of number {number}; it is not complete"
            )
    return len(numbers)


def config_of(spec: MagiSpec) -> dict[str, Any]:
    """The config that is written beside a transformer."""
    values = {key: getattr(spec, name) for key, name in CONFIG_KEYS.items()}
    channels = spec.copies * spec.in_channels
    return {CONFIG: values | {"in_channels": channels, "out_channels": channels, "half_channel_vae": spec.copies > 1}}


def write_transformer(
    folder: Path,
    spec: MagiSpec,
    tensors: Mapping[str, Tensor],
    max_shard: int,
    dtype: torch.dtype | None = None,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
    progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Write config and safetensors with published names, in files of up to `max_shard` bytes, one in memory at a time.

    Each tensor goes through `change` and is written in `dtype` (None: its own).
    """
    if spec.fp8 and dtype is not None:
        raise UsageError(f"dtype is {str(dtype).removeprefix('torch.')}, but the weights are in FP8; leave it out")
    write_json(folder / "config.json", config_of(spec))
    tensors = {name: batched(name, tensor, tensors) for name, tensor in tensors.items()}
    write_shards(folder, STEM, tensors, published, max_shard, dtype, change, progress)


