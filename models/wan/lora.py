"""Read LoRA adapters and merge them into the weights as these are loaded: W + scale * up @ down, summed in float32.

Names are those of PEFT and diffusers (`lora_A`, `lora_B`), of trainers that write `lora_down`, `lora_up` and `alpha`
(kohya's with underscores for dots), and of full differences (`diff`, `diff_b`, `diff_m`). scale is alpha / rank, or
alpha / sqrt(rank) for rank-stabilised adapters. alpha is a tensor of the layer, in the file's metadata, or in
adapter_config.json; without alpha the scale is 1. Sources: LoRA (arXiv 2106.09685); rsLoRA (arXiv 2312.03732).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, UsageError, quoted, quoted_all
from ...user_files import check_reachable
from ..files import check_file, parse_json, read_json, read_metadata, read_tensors, reason
from ..scaled_weights import FLOATS
from ..state_dicts import SCALES, WEIGHTS, bare_name, refuse_two_experts, state_dicts
from .names import is_parameter, our_module

PART = re.compile(
    r"^(?P<module>.+?)\.(?:(?:lora[_.](?P<side>A|B|down|up)(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?"
    r"(?:\.(?P<leaf>weight|bias))?)|(?P<other>alpha|diff|diff_b|diff_m))$"
)
SIDES = {"A": "down", "B": "up", "down": "down", "up": "up"}
KOHYA = re.compile(r"^(?:lora|lycoris)_(?:unet|transformer)_+|^lycoris_+")
KOHYA_WRAPPERS = re.compile(r"_(?:fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)_")
OTHER_METHODS = {  # in names: kinds of adapters that are not sums of one low-rank product
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT",
    "boft_": "BOFT", "lora_mid": "LoCon with a Tucker core", "glora": "GLoRA", "ia3_": "IA3",
    "lora_embedding_": "embedding LoRA",
}  # fmt: skip
CHANGED_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations that change the base model's weights, too
CONFIG, PEFT_FILE, METADATA = "adapter_config.json", "adapter_model", "lora_adapter_metadata"


@dataclass(frozen=True)
class LowRank:
    """scale * up @ down: down [rank, in, ...], up [out, rank, 1...]."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    def to(self, device: torch.device) -> LowRank:
        return replace(self, down=self.down.to(device), up=self.up.to(device))

    def change(self, factor: float) -> Tensor:
        """Return `factor` times the update of a weight, in float32."""
        return self.up.float().flatten(1) @ self.down.float().flatten(1) * (self.scale * factor)


@dataclass(frozen=True)
class Difference:
    """scale * value, of the parameter's own shape."""

    value: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def to(self, device: torch.device) -> Difference:
        return replace(self, value=self.value.to(device))

    def change(self, factor: float) -> Tensor:
        """Return `factor` times the update of a parameter, in float32."""
        return self.value.float() * (self.scale * factor)


Update = LowRank | Difference


@dataclass(frozen=True)
class Lora:
    """An adapter file: updates by our parameter names, and names in it that no published format has."""

    path: Path
    updates: Mapping[str, Update]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Strength:
    """Scale of an adapter by its config: one alpha for all layers, others for layers whose name ends in a pattern."""

    where: str
    rank: int | None
    alpha: float
    stabilised: bool
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None

    def mismatch(self, modules: Mapping[str, int], strict: bool) -> str | None:
        """Return the first contradiction between this config and the ranks of an adapter's modules; None if they agree.

        Unless `strict`, layers without a pattern may have another rank than r if some layer has r.
        """
        plain = {module: rank for module, rank in modules.items() if matching(self.ranks, module, None) is None}
        for module, rank in modules.items():
            expected = matching(self.ranks, module, self.rank)
            agrees = expected in (None, rank) or (not strict and module in plain and self.rank in plain.values())
            if not agrees:
                return f"r is {expected}, and {module[:200]} has rank {rank}"
            if self.targets is not None and not any(ends_in(target, module) for target in self.targets):
                return f"target_modules has no {module[:200]}"
        return None

    def scale(self, module: str, rank: int) -> float:
        alpha = matching(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)


def read_lora(path: str | Path) -> Lora:
    """Read the adapter in a file or folder. Raises UsageError if it is no LoRA, CheckpointError for a broken file."""
    source = Path(path)
    path = lora_file(source)
    tensors = adapter_tensors(path, read_tensors(path))
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    adapters = set()
    for name, tensor in tensors.items():
        for mark, method in OTHER_METHODS.items():
            if mark in name:
                raise UsageError(
                    f"{quoted(path)} is a {method} adapter ({quoted(name)}), not in this version; use a LoRA"
                )
        part = PART.match(name)
        module, kind = module_and_kind(part) if part else ("", "")
        if part is None or not kind or our_lora_module(module) is None:
            unknown.append(name)
            continue
        check_values(path, name, tensor, kind)
        if part["adapter"]:
            adapters.add(part["adapter"])
        halves = parts.setdefault(module, {})
        if kind in halves:
            raise UsageError(f"{quoted(path)} gives {kind} of {quoted(module)} twice; expected one adapter")
        halves[kind] = tensor
    if len(adapters) > 1:
        names = quoted_all(sorted(adapters))
        raise UsageError(f"{quoted(path)} holds several adapters ({names}); save one of them to its own file")
    if not any(halves.keys() - {"alpha"} for halves in parts.values()):
        some = ", ".join(quoted(name, 80) for name in (*unknown, *parts)[:4]) or "no tensors"
        raise UsageError(f"{quoted(path)} is no LoRA: it holds {some}; expected names that end in .lora_A.weight")
    scales = strengths(source, path, parts)
    updates: dict[str, Update] = {}
    for name, halves in parts.items():
        ours = our_lora_module(name)
        assert ours is not None
        for parameter, update in module_updates(path, name, ours, halves, scales.get(name, 1.0)):
            if parameter in updates:
                raise UsageError(
                    f"{quoted(path)} changes {quoted(parameter)} twice; expected one update of each weight"
                )
            updates[parameter] = update
    if all(not any(value.any() for value in tensors_of(update)[-1:]) for update in updates.values()):
        warnings.warn(f"{quoted(path)} changes nothing: all of its updates are 0", stacklevel=2)
    return Lora(path, updates, tuple(unknown))


def tensors_of(update: Update) -> tuple[Tensor, ...]:
    return (update.down, update.up) if isinstance(update, LowRank) else (update.value,)


def lora_file(path: Path) -> Path:
    """Find the file of tensors of an adapter's file or folder."""
    if not check_reachable(path, "LoRA").exists():
        raise UsageError(f"no LoRA {quoted(path)}: no such file or folder")
    if not path.is_dir():
        check_file(path, "LoRA")
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    exact = [file for file in files if file.stem == PEFT_FILE]
    if len(files) != 1 and len(exact) != 1:
        raise UsageError(f"LoRA folder {quoted(path)} holds {len(files)} weight files; name the one to use")
    return (exact or files)[0]


def adapter_tensors(path: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return an adapter's tensors under names without containers and prefixes.

    Of a file with several networks the generator's are taken.
    """
    groups = {place: group for place, group in state_dicts(path, content, ("generator_lora", "lora")).items() if group}
    for place in groups:
        if expert := next((word for word in place.words if word == "transformer_2"), None):
            refuse_two_experts(path, expert)
    keys = {place.keys for place in groups}
    for word in ("generator_lora", "lora"):
        if len(keys) > 1:
            keys = {key for key in keys if word in key} or keys
    if len(keys) > 1:
        some = quoted_all(sorted(".".join(key) or "the top level" for key in keys))
        raise UsageError(f"{quoted(path)} holds several adapters ({some}); save one of them to its own file")
    tensors: dict[str, Tensor] = {}
    for place, group in groups.items():
        for name, tensor in group.items() if place.keys in keys else ():
            if name in tensors:
                raise UsageError(f"{quoted(path)} has {quoted(name)} under two names; expected each tensor once")
            tensors[name] = tensor
    return tensors


def our_lora_module(name: str) -> str | None:
    """Return our name for the module or parameter of an adapter's name; None if no format has it."""
    if KOHYA.match(name):
        return our_module(KOHYA_WRAPPERS.sub("", KOHYA.sub("", name)))
    return our_module(bare_name(name)[1])


def module_and_kind(part: re.Match[str]) -> tuple[str, str]:
    """Return (module in the file's names, kind). kind: down, up, bias, alpha, diff or diff_b; empty for other names.

    `diff_m` of a layer is a difference of its modulation.
    """
    module, other = str(part["module"]), part["other"]
    if other == "diff_m":
        return f"{module}.modulation", "diff"
    if other:
        return module, str(other)
    side = SIDES[part["side"]]
    if part["leaf"] == "bias":
        return module, "bias" if side == "up" else ""
    return module, side


def check_values(path: Path, name: str, tensor: Tensor, kind: str) -> None:
    """Raise UsageError for a quantised tensor, CheckpointError for values that are not finite."""
    if kind == "alpha":
        if tensor.numel() != 1 or tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in FLOATS):
            raise CheckpointError(
                f"{quoted(path)}: {quoted(name)} has {tensor.numel()} values in {tensor.dtype}; expected one number"
            )
    elif tensor.dtype not in FLOATS or SCALES.search(name):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise UsageError(f"{quoted(path)} has {quoted(name)} in {dtype}; this version reads no quantised adapters")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{quoted(path)}: {quoted(name)} is not finite; the adapter is damaged")


def module_updates(
    path: Path, name: str, module: str, halves: Mapping[str, Tensor], scale: float
) -> Iterable[tuple[str, Update]]:
    """Yield (our parameter, update) for each part of a module in a file."""
    weight = module if is_parameter(module) else f"{module}.weight"
    if "down" in halves or "up" in halves:
        down, up = halves.get("down"), halves.get("up")
        if down is None or up is None or not fits_together(down, up):
            shapes = [list(half.shape) for half in (down, up) if half is not None]
            raise CheckpointError(
                f"{quoted(path)}: {quoted(name)} has no matching pair of LoRA matrices ({shapes}); the file is not "
                "complete"
            )
        yield weight, LowRank(down, up, scale)
    elif "alpha" in halves or "bias" in halves:
        raise CheckpointError(f"{quoted(path)}: {quoted(name)} has no LoRA matrices; the file is not complete")
    if "bias" in halves:
        yield f"{module}.bias", Difference(halves["bias"], scale)
    if "diff" in halves:
        yield weight, Difference(halves["diff"])
    if "diff_b" in halves:
        yield f"{module}.bias", Difference(halves["diff_b"])


def fits_together(down: Tensor, up: Tensor) -> bool:
    """Return True if two tensors are a pair [rank, in, kernel...] and [out, rank, 1...]."""
    return (
        down.ndim >= 2 and up.ndim >= 2 and down.shape[0] == up.shape[1] > 0
        and all(side == 1 for side in up.shape[2:])
    )  # fmt: skip


def strengths(source: Path, path: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Return the scale of each low-rank module by its name in the file.

    A layer's own alpha and the configs must agree. A config beside a file of another name counts if its ranks and
    targets are the file's. Raises UsageError if they are not and the file itself states no alpha.
    """
    pairs = {name: halves for name, halves in parts.items() if "down" in halves}
    ranks = {name: halves["down"].shape[0] if halves["down"].ndim else 0 for name, halves in pairs.items()}
    alphas = {name: float(halves["alpha"]) for name, halves in pairs.items() if "alpha" in halves}
    scales = {name: alpha / max(ranks[name], 1) for name, alpha in alphas.items()}
    metadata = read_metadata(path)
    configs = [config for config in (metadata_strength(path, metadata),) if config]
    beside = config_strength(path)
    own = source.is_dir() or path.stem == PEFT_FILE
    stated = bool(configs) or len(scales) == len(pairs)
    if beside and (own or not stated):
        if not own and (beside.rank is None or beside.targets is None):
            raise UsageError(
                f"{beside.where} has no r and target_modules that say whether it is of {quoted(path.name)}; give "
                "their "
                "folder, or move the config away"
            )
        configs.append(beside)
    for config in configs:
        modules = {bare_name(name)[1]: rank for name, rank in ranks.items()}
        if wrong := config.mismatch(modules, strict=config is beside and not own):
            raise UsageError(
                f"{config.where} is not of {quoted(path)}: {wrong}; remove it, or take the one it came with"
            )
        for name, rank in ranks.items():
            scale = config.scale(bare_name(name)[1], rank)
            if not math.isclose(scales.setdefault(name, scale), scale, rel_tol=1e-5):
                raise UsageError(
                    f"{quoted(path)}: {quoted(name)} is merged {scales[name]:.5g} times by the file and {scale:.5g} "
                    "times by "
                    f"{config.where}; remove one"
                )
    network, kohya = metadata.get("ss_network_alpha"), any(KOHYA.match(name) for name in pairs)
    if kohya and len(scales) < len(pairs) and network not in (None, metadata.get("ss_network_dim")):
        raise UsageError(
            f"{quoted(path)} has ss_network_alpha {quoted(network)}, but no alpha of its layers; save it again"
        )
    return scales


def metadata_strength(path: Path, metadata: Mapping[str, str]) -> Strength | None:
    """Read the strength in a safetensors header: diffusers' lora_adapter_metadata, or plain r and lora_alpha."""
    if METADATA not in metadata:
        plain = {key: metadata[key] for key in ("r", "rank", "lora_alpha") if key in metadata}
        place = f"the header of {quoted(path.name)}"
        numbers = {("r" if key == "rank" else key): number(f"{place}: {key}", value) for key, value in plain.items()}
        return read_strength(numbers, place) if "lora_alpha" in numbers else None
    try:
        content = parse_json(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{quoted(path)}: {METADATA} is no JSON: {reason(error)}; save the adapter again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{quoted(path)}: {METADATA} is {quoted(content)}; expected an object")
    if any(key.startswith("transformer_2.") for key in content):
        refuse_two_experts(path, "transformer_2")
    prefix = "transformer."
    named = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    return read_strength(named or content, f"{METADATA} of {quoted(path.name)}")


def number(where: str, text: str) -> Any:
    """Parse a number in a header. Raises CheckpointError for other text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is {quoted(text)}; expected a number") from error


def config_strength(path: Path) -> Strength | None:
    config = read_json(path.parent / CONFIG)
    return read_strength(config, quoted(path.parent / CONFIG)) if config else None


def read_strength(config: Mapping[str, Any], where: str) -> Strength | None:
    """Read and check the strength in an adapter's config; None if it has neither rank nor alpha."""

    def bad(key: str, expected: str) -> UsageError:
        return UsageError(f"{where}: {key} is {quoted(config.get(key))}; expected {expected}")

    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise bad("peft_type", "LORA, the one kind in this version")
    for key in ("use_dora", "fan_in_fan_out", "use_qalora"):
        if config.get(key):
            raise bad(key, "false: such adapters are not in this version")
    if str(config.get("init_lora_weights", "")).lower().startswith(CHANGED_BASE):
        raise bad("init_lora_weights", "one that leaves the base model as it is; convert the adapter to a plain LoRA")
    stabilised = config.get("use_rslora", False)
    if not isinstance(stabilised, bool):
        raise bad("use_rslora", "true or false")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank is None and alpha is None:
        return None
    if rank is not None and not is_rank(rank):
        raise bad("r", "a whole number, 1 or more")
    if alpha is None or not is_number(alpha):
        raise bad("lora_alpha", "a number")
    targets = config.get("target_modules")
    if isinstance(targets, str):
        targets = None if targets == "all-linear" else [targets]
    if targets is not None and (not isinstance(targets, list) or not all(isinstance(name, str) for name in targets)):
        raise bad("target_modules", "a list of names")
    patterns: dict[str, dict[str, Any]] = {}
    for key in ("rank_pattern", "alpha_pattern"):
        patterns[key] = config.get(key) or {}
        values = patterns[key].values() if isinstance(patterns[key], dict) else [None]
        if not all(is_number(value) and (key == "alpha_pattern" or is_rank(value)) for value in values):
            raise bad(key, "names of layers with a number each")
    for name in (*(targets or ()), *patterns["rank_pattern"], *patterns["alpha_pattern"]):
        check_pattern(where, name)
    return Strength(
        where, rank, float(alpha), stabilised, patterns["rank_pattern"], patterns["alpha_pattern"],
        None if targets is None else tuple(targets),
    )  # fmt: skip


def is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def check_pattern(where: str, pattern: str) -> None:
    """Raise UsageError for an invalid expression, or one that could take unbounded time to match."""
    repeats = len(re.findall(r"[*+{]", pattern))
    try:
        if len(pattern) > 2000 or repeats > 2 or re.search(r"\)[*+?{]|\\[1-9]|\(\?", pattern):
            raise UsageError(f"{where}: {quoted(pattern)} is too complex an expression; expected names of layers")
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{where}: {quoted(pattern)} is no expression ({error}); expected names of layers") from error


def ends_in(pattern: str, module: str) -> bool:
    """Return True if a module's name ends in a pattern, at a dot, as PEFT matches names."""
    parts = module.split(".")
    return any(re.fullmatch(pattern, ".".join(parts[start:])) for start in range(len(parts)))


def matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Return the value of the first pattern that a module's name ends in."""
    return next((value for pattern, value in patterns.items() if ends_in(pattern, module)), default)


def fitting(lora: Lora, tensors: Mapping[str, Tensor], partial: bool = False) -> dict[str, Update]:
    """Return the updates of an adapter that fit a model's tensors.

    Raises UsageError that lists the updates which do not fit and the names that no format has. With `partial` the list
    is a warning, and the error is raised only if nothing fits.
    """
    wrong = [f"{quoted(name)}: not a published name" for name in lora.unknown]
    fit = {}
    for name, update in lora.updates.items():
        tensor = tensors.get(name)
        if tensor is None:
            wrong.append(f"{quoted(name)}: not in the model")
        elif not same_shape(update, tensor):
            wrong.append(f"{quoted(name)}: {list(update.shape)}, the model has {list(tensor.shape)}")
        else:
            fit[name] = update
    listed = f"{'; '.join(wrong[:8])}{f'; and {len(wrong) - 8} more' if len(wrong) > 8 else ''}"
    if not fit:
        raise UsageError(f"LoRA {quoted(lora.path)} is for another base model: {listed}")
    if wrong and not partial:
        raise UsageError(
            f"LoRA {quoted(lora.path)} fits in part: {listed}; take one for this model, or merge the rest with "
            "lora_partial"
        )
    if wrong:
        warnings.warn(
            f"{quoted(lora.path)}: {len(fit)} updates are merged and {len(wrong)} left out: {listed}",
            stacklevel=3,
        )
    return fit


def same_shape(update: Update, tensor: Tensor) -> bool:
    """Return True if an update has a tensor's shape; a convolution's pair may be flattened to two dimensions."""
    if isinstance(update, Difference):
        return update.shape == tuple(tensor.shape)
    rows, columns = update.shape[0], math.prod(update.shape[1:])
    full = update.shape == tuple(tensor.shape)
    return full or (len(update.shape) == 2 and tensor.ndim >= 2 and [rows, columns] == [len(tensor), tensor[0].numel()])
