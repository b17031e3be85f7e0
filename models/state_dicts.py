"""Choose the state dict of one part of a model from a file or folder: shards, containers, prefixes, averages, dtypes.

A part is published in many wrappings: in shards with an index, under a key of a training file, with a prefix before
every name, beside its moving average. All readers of checkpoints get the plain tensors of a part through this module.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, UsageError, quoted, quoted_all
from .files import alike_in_file, check_file, read_json, read_tensors
from .scaled_weights import FLOATS, with_scales

LONGEST_NAME = 255  # bytes of a file name
PACKED = ".zst"  # after the name of a compressed file
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}  # anywhere in a name
CONTAINERS = {
    "state_dict", "model_state_dict", "model", "generator", "net", "network", "weights", "params", "base_model",
    "diffusion_model", "transformer", "dit", "unet", "pipe", "vae", "first_stage_model", "text_encoder", "lora",
    "generator_lora",
}  # fmt: skip
TRAINING = {"critic", "critic_ema", "fake_score", "real_score", "discriminator", "teacher"}  # networks beside the model
OTHER_PARTS = {
    "vae", "first_stage_model", "text_encoder", "text_encoders", "cond_stage_model", "conditioner", "clip_vision",
}  # fmt: skip
EXPERTS = ("transformer_2", "high_noise_model", "low_noise_model")  # models with one transformer per noise range
AVERAGE = re.compile(r"(^|_)ema(_|$)")
AVERAGE_COUNTERS = ("decay", "num_updates", "initted", "step")  # tensors of the averaging itself, not of the model
SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
SCALES = re.compile(
    r"(^|\.)(scale_weight|weight_scale(_inv|_2)?|scale_input|input_scale|scaled_fp8|comfy_quant|absmax|quant_map|"
    r"nested_absmax|nested_quant_map|SCB|qweight|qzeros|g_idx|quant_state\..+)$"
)
MOST_DICTS = 64  # state dicts per file; a limit against files that refer to themselves


@dataclass(frozen=True)
class Place:
    """Place of a state dict in a file: the keys of the nested dicts, outermost first, and the prefix of its names."""

    keys: tuple[str, ...]
    prefix: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((*self.keys, *self.prefix)) or "the top level"

    @property
    def words(self) -> tuple[str, ...]:
        return (*self.keys, *self.prefix)

    @property
    def averaged(self) -> bool:
        return any(AVERAGE.search(word) for word in self.words)


def state_dicts(path: object, content: Mapping[Any, Any], more: Iterable[str] = ()) -> dict[Place, dict[str, Tensor]]:
    """Collect every state dict of a file's content, under bare names; `more` adds names of containers.

    Dicts under other keys, such as an optimiser's, are skipped. Raises UsageError if a tensor has two names.
    """
    containers = CONTAINERS | TRAINING | set(EXPERTS) | set(more)
    groups: dict[Place, dict[str, Tensor]] = {}
    left: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    dicts = 1
    while left:
        keys, part = left.pop()
        for key, value in part.items():
            if not isinstance(key, str):
                continue
            if isinstance(value, Tensor):
                prefix, name = bare_name(key, containers)
                group = groups.setdefault(Place(keys, prefix), {})
                if name in group:
                    raise UsageError(f"{quoted(path)} has {quoted(name)} under two names; expected each tensor once")
                group[name] = value
            elif isinstance(value, dict) and (key in containers or key in WRAPPERS or AVERAGE.search(key)):
                dicts += 1
                if dicts > MOST_DICTS:
                    raise CheckpointError(
                        f"{quoted(path)} holds more than {MOST_DICTS} state dicts; expected a model's"
                    )
                left.append(((*keys, key) if key not in WRAPPERS else keys, value))
    return groups


def bare_name(name: str, containers: Iterable[str] = CONTAINERS) -> tuple[tuple[str, ...], str]:
    """Split a tensor's name into (prefix, name), without the parts that training wrappers insert."""
    parts = [part for part in name.split(".") if part not in WRAPPERS] or [name]
    count = 0
    while count < len(parts) - 1 and (parts[count] in containers or AVERAGE.search(parts[count])):
        count += 1
    return tuple(parts[:count]), ".".join(parts[count:])


def choose_state_dict(
    path: object,
    content: Mapping[Any, Any],
    kind: str,
    is_kind: Callable[[Mapping[str, Tensor]], bool],
    use_ema: bool = True,
    order: tuple[str, ...] = (),
    first: str | None = None,
    own_scales: bool = False,
) -> tuple[Place, dict[str, Tensor]]:
    """Choose the state dict of a `kind` of part; returns its place and tensors.

    With `use_ema` a moving average is preferred. order: keys of a known training file, best first. first: a tensor of
    every part of the kind, for an error that shows the names like it. Tensors beside the state dict that belong to no
    known part are included, so that `fill` reports them as unexpected. Weights with scales of a published layout are
    joined with them, unless the part has scales as tensors of its own (own_scales). Raises UsageError if there is no
    such state dict, if there are several, or if it is quantised in another way.
    """
    groups = state_dicts(path, content, order)
    fit = {place: group for place, group in groups.items() if is_kind(group) and not TRAINING & set(place.words)}
    for place, group in groups.items():
        if expert := next((word for word in place.words if word in EXPERTS), None):
            refuse_two_experts(path, expert)
        if any(".lora_" in name for name in group) and not fit:
            raise UsageError(
                f"{quoted(path)} is a LoRA adapter; give the {kind} it belongs to, and the adapter as lora"
            )
    if not fit:
        present = sorted(listed_names(content, groups))
        if first is not None and groups:
            near = alike_in_file(first, present)
            raise UsageError(f"{quoted(path)} is no {kind}: no {quoted(first)} in it{near}; give names for it")
        raise UsageError(f"{quoted(path)} is no {kind}: it holds {quoted_all(present) or 'nothing'}")
    averaged = [place for place in fit if place.averaged]
    plain = [place for place in fit if not place.averaged]
    if not use_ema and not plain:
        raise UsageError(
            f"use_ema is False, but {quoted(path)} has only averaged weights ({quoted(str(averaged[0]))}); leave "
            "use_ema out"
        )
    chosen = averaged if use_ema and averaged else plain
    ordered = [place for key in order for place in chosen if key in place.words]
    if len(chosen) > 1 and not ordered:
        names = quoted_all(sorted(map(str, chosen)))
        raise UsageError(
            f"{quoted(path)} holds several state dicts of a {kind}: {names}; save one of them to its own file"
        )
    place = (ordered or chosen)[0]
    counters = AVERAGE_COUNTERS if place.averaged else ()
    own = {name: tensor for name, tensor in fit[place].items() if name not in counters}
    tensors = own | strays(path, place, fit, groups)
    if not own_scales:
        tensors = with_scales(path, tensors)
        refuse_quantised(path, tensors)
    return place, tensors


def listed_names(content: Mapping[Any, Any], groups: Mapping[Place, Mapping[str, Tensor]]) -> Iterator[str]:
    for place, group in groups.items():
        yield from (f"{place}.{name}" if place.words else name for name in group)
    yield from (str(key) for key, value in content.items() if not isinstance(value, Tensor))


def strays(
    path: object, place: Place, fit: Mapping[Place, object], groups: Mapping[Place, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors in the same dict of the file as a state dict that belong to no known part."""
    unclaimed = {}
    for other, group in groups.items():
        known = other in fit or other.averaged or TRAINING & set(other.words)
        if other == place or other.keys != place.keys or known or OTHER_PARTS & set(other.prefix):
            continue
        for name, tensor in group.items():
            if name in groups[place]:
                raise UsageError(f"{quoted(path)} has {quoted(name)} under two names; expected each tensor once")
            if not place.prefix or name.split(".")[0] not in OTHER_PARTS:
                unclaimed[".".join((*other.prefix, name))] = tensor
    return unclaimed


def refuse_two_experts(path: object, name: str) -> None:
    raise UsageError(
        f"{quoted(path)} is of a two-expert model ({quoted(name)}): a second transformer runs the steps of the other "
        "noise levels; name the folder that holds both, as transformer and transformer_2, or as high_noise_model and "
        "low_noise_model"
    )


def refuse_quantised(path: object, tensors: Mapping[str, Tensor]) -> None:
    """Raise UsageError that names the first tensor of integers or FP8, or the first scale of such a tensor."""
    for name, tensor in tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype not in FLOATS or SCALES.search(name):
            raise UsageError(
                f"{quoted(path)} has {quoted(name)} in {kind}; quantised weights need their scales beside them, "
                "use the bfloat16 file"
            )


def check_names_one_file(path: Path) -> None:
    """Raise UsageError for one shard of several."""
    shard = SHARD.search(path.name)
    if shard and int(shard[2]) > 1:
        raise UsageError(f"{quoted(path)} is shard {int(shard[1])} of {int(shard[2])}; name the folder it is in")


@dataclass(frozen=True)
class WeightFiles:
    """Files of one state dict; `index` maps tensor to file, for a sharded checkpoint that has an index."""

    files: tuple[Path, ...]
    index: Mapping[str, str] | None = None


def find_weight_files(folder: Path, stem: str) -> WeightFiles | None:
    """Find the files called `stem` in a folder: those of its index, else the exact name, else a complete set of shards.

    A copy under another name (`_old`, `.fp16`) is used only if it is the only file. None if there is no such file.
    Raises UsageError if the choice is ambiguous.
    """
    for suffix in (".safetensors", ".bin"):
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            return indexed_files(index)
    exact = [path for suffix in (".safetensors", ".bin") if (path := packed_or(folder / f"{stem}{suffix}")).exists()]
    if exact:
        return WeightFiles((exact[0],))
    named = (path for path in folder.glob(f"{stem}[-_.]*") if without_packing(path).suffix in WEIGHTS)
    files = sorted(path for path in named if packed_or(without_packing(path)) == path)
    shards = [path for path in files if SHARD.search(path.name)]
    if shards and len(shards) == len(files):
        return WeightFiles(complete_shards(folder, shards))
    if len(files) > 1:
        names = quoted_all(path.name for path in files)
        raise UsageError(f"{quoted(folder)} holds several checkpoints ({names}); name one of them")
    return WeightFiles((files[0],)) if files else None


def longer_than_a_name(file: str) -> bool:
    """True for a file name that, packed, has more bytes than file systems take."""
    return len(f"{file}{PACKED}".encode("utf-8", "surrogatepass")) > LONGEST_NAME


def packed_or(path: Path) -> Path:
    """The path, or that of its zstd file where only that is there."""
    packed = path.with_name(f"{path.name}{PACKED}")
    return packed if packed.exists() and not path.exists() else path


def without_packing(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == PACKED else path


def complete_shards(folder: Path, shards: list[Path]) -> tuple[Path, ...]:
    """Sort shards. Raises UsageError for shards of several checkpoints, CheckpointError if one is missing."""
    numbers = {path: SHARD.search(path.name) for path in shards}
    counts = {shard[2] for shard in numbers.values() if shard}
    starts = {path.name[: shard.start()] for path, shard in numbers.items() if shard}
    if len(counts) > 1 or len(starts) > 1:
        raise UsageError(f"{quoted(folder)} holds shards of several checkpoints; keep those of one")
    total = int(counts.pop())
    missing = sorted(set(range(1, total + 1)) - {int(shard[1]) for shard in numbers.values() if shard})
    if missing or len(shards) != total:
        some = ", ".join(f"{number:05}-of-{total:05}" for number in missing[:8])
        raise CheckpointError(
            f"{quoted(folder)} lacks shards {some or 'of ' + str(total)}; the download is not complete"
        )
    return tuple(shards)


def indexed_files(index: Path) -> WeightFiles:
    """Read an index. Raises CheckpointError if it names no files, files outside its folder, or missing files."""
    names = (read_json(index) or {}).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise CheckpointError(
            f"{quoted(index)} maps no tensors to files (weight_map is {quoted(names)}); download it again"
        )
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file or "\0" in file or longer_than_a_name(file):
            raise CheckpointError(f"{quoted(index)} names the file {quoted(file)}; expected one in its own folder")
    paths = [packed_or(index.parent / file) for file in files]
    if missing := [path.name for path in paths if not path.exists()]:
        raise CheckpointError(f"{quoted(index.parent)} lacks {quoted_all(missing)}; the download is not complete")
    return WeightFiles(tuple(paths), names)


def read_weight_files(source: WeightFiles) -> dict[str, Any]:
    """Join the content of all files in one dict. Raises CheckpointError where files and index disagree."""
    content: dict[str, Any] = {}
    for file in source.files:
        check_file(file, "checkpoint")
        part = read_tensors(file)
        for name, value in part.items():
            if name in content:
                raise CheckpointError(
                    f"{quoted(name)} stands in {quoted(file.name)} and in another shard; download them again"
                )
            if source.index is not None and source.index.get(name) != without_packing(file).name:
                raise CheckpointError(
                    f"{quoted(file)} holds {quoted(name)}, which its index does not list; fetch both again"
                )
            content[name] = value
    if source.index is not None and (missing := [name for name in source.index if name not in content]):
        raise CheckpointError(f"the index names {quoted(missing[0])}, which no shard holds; download the shards again")
    return content
