"""Weights written as safetensors in files of a bounded size, with an index where there are several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .files import finite, write_json, write_tensors
from .scaled_weights import unscaled


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    published: Callable[[str], str],
    max_shard: int,
    dtype: torch.dtype | None,
    change: Callable[[str, Tensor], Tensor],
    progress: Callable[[str], None],
) -> None:
    """Write `stem`.safetensors in files of up to `max_shard` bytes, with one of them in memory at a time.

    published: ours to the file's tensor names. Each tensor goes through `change` and is written in `dtype` (None: its
    own). `progress` gets the name of each file that is written.
    """
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        nbytes = (dtype or tensor.dtype).itemsize * tensor.numel()
        if shards[-1] and size + nbytes > max_shard:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    places: dict[str, str] = {}
    for index, names in enumerate(shards):
        whole = len(shards) == 1
        file = f"{stem}.safetensors" if whole else f"{stem}-{index + 1:05}-of-{len(shards):05}.safetensors"
        part = {}
        for name in names:
            tensor = unscaled(tensors[name])
            written = finite(file, name, change(name, tensor).to(dtype or tensor.dtype))
            part[published(name)] = written.contiguous()
        write_tensors(part, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
        progress(file)
    if len(shards) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
