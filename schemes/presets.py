"""Presets: decoding schemes as data, with block size, sampler and context. Model families list theirs.

`with_settings` changes any field of a preset by its flat name and refuses unknown ones.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import UsageError, nearest, quoted
from .context import ContextPolicy
from .sampler_spec import SamplerSpec

PLAIN = ("plain",)  # sets of weights of a model
WITH_MEMORY = ("plain", "memory")
EXPERTS = ("high-noise", "low-noise")


@dataclass(frozen=True)
class About:
    """Where a scheme's weights are: the model they are for, the licence of their code, and their repository.

    files: their paths in it, the transformer's first, or patterns of those of a folder or of shards; none where no
    published file is known.
    """

    base: str
    licence: str
    weights: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """num_frame_per_block: latent frames; independent_first_frame: the first block is a single frame.

    window_blocks: blocks denoised together, each `steps_between_joins` sampler steps ahead of the one after it.
    scene_cut_prefix: a prompt that begins so starts a new shot; empty for none. precision: dtypes of the parts of a
    pass, where no other are asked for.
    """

    name: str
    about: About
    num_frame_per_block: int
    independent_first_frame: bool
    sampler: SamplerSpec
    context: ContextPolicy
    window_blocks: int = 1
    scene_cut_prefix: str = ""
    precision: str = "reference"

    def __post_init__(self) -> None:
        for key in ("num_frame_per_block", "window_blocks"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} is {getattr(self, key)}; expected 1 or more")
        self.context.check_blocks(self.num_frame_per_block, self.window_blocks)
        steps = self.sampler.steps
        if steps % self.window_blocks:
            fitting = [count for count in range(1, steps + 1) if steps % count == 0]
            raise UsageError(
                f"window_blocks is {self.window_blocks}; expected a divisor of the {steps} steps, one of {fitting}: a "
                "block joins after equally many steps"
            )
        self.context.check_key_ranges(self.num_frame_per_block, self.window_blocks, steps)
        if self.window_blocks > 1 and self.context.recomputes:
            raise UsageError(
                f"window_blocks is {self.window_blocks}, but prompt_switch is {quoted(self.context.prompt_switch)}, "
                f"segment_frames {self.context.segment_frames} and commit {self.context.commit}: clean frames would be "
                "recomputed while blocks are in flight; use window_blocks=1, or cut, 0 and true"
            )
        if self.window_blocks > 1 and self.sampler.denoising_step_list_first_chunk:
            raise UsageError(
                f"denoising_step_list_first_chunk with window_blocks {self.window_blocks}: blocks denoised together "
                "take the same steps; use window_blocks=1 or leave the list out"
            )
        if boundary := self.sampler.boundary_ratio:
            self.check_experts(boundary)

    def check_experts(self, boundary: float) -> None:
        """UsageError for a policy under which one pass would need both experts."""
        policy = self.context
        mixed = self.window_blocks > 1 or policy.image == "clamp" or policy.commit_in_next
        if mixed or policy.clean_weights != "plain":
            raise UsageError(
                f"boundary_ratio is {boundary}, but window_blocks is {self.window_blocks}, image "
                f"{quoted(policy.image)}, commit_in_next {policy.commit_in_next} and clean_weights "
                f"{quoted(policy.clean_weights)}: one pass would need both experts; use 1, prefix, false and plain"
            )

    @property
    def weight_sets(self) -> tuple[str, ...]:
        """Names of the sets of weights that its passes run, by number."""
        if self.sampler.boundary_ratio:
            return EXPERTS
        return PLAIN if self.context.clean_weights == "plain" else WITH_MEMORY

    @property
    def steps_between_joins(self) -> int:
        """Sampler steps that the newest block in flight takes before the next block joins."""
        return self.sampler.steps // self.window_blocks

    def block_size(self, start: int) -> int:
        """Latent frames of the block that starts at absolute frame `start`."""
        return 1 if self.independent_first_frame and start == 0 else self.num_frame_per_block

    def latent_frames(self, blocks: int) -> int:
        """Latent frames of the first `blocks` blocks."""
        return sum(self.block_size(0) if block == 0 else self.num_frame_per_block for block in range(blocks))

    def blocks_for_frames(self, latent_frames: int) -> int:
        """How many blocks make at least that many latent frames from the start."""
        first = self.block_size(0)
        if latent_frames <= first:
            return int(latent_frames > 0)
        return 1 - (first - latent_frames) // self.num_frame_per_block

    def whole_blocks(self, latent_frames: int) -> int:
        """Latent frames of the whole blocks among that many from the start; 0 where they are fewer than a block."""
        first = self.block_size(0)
        return 0 if latent_frames < first else latent_frames - (latent_frames - first) % self.num_frame_per_block


PARTS: tuple[tuple[str | None, type], ...] = ((None, Preset), ("sampler", SamplerSpec), ("context", ContextPolicy))
FIELDS: dict[str, tuple[str | None, str]] = {  # flat name -> (part of the preset, declared type)
    field.name: (part, str(field.type))
    for part, cls in PARTS
    for field in dataclasses.fields(cls)
    if field.name not in ("name", "about", "sampler", "context", "guidance")
}


def with_settings(preset: Preset, /, **overrides: Any) -> Preset:
    """Return a preset with some fields replaced, by flat name; UsageError names the nearest for an unknown one.

    Unless it is replaced itself, `rest_sink` is at most what the other settings allow.
    """
    changes: dict[str | None, dict[str, Any]] = {None: {}, "sampler": {}, "context": {}}
    for key, value in overrides.items():
        if key not in FIELDS:
            raise no_setting(key, FIELDS)
        part, kind = FIELDS[key]
        changes[part][key] = _checked(key, value, kind)
    made = dataclasses.replace(
        preset,
        sampler=dataclasses.replace(preset.sampler, **changes["sampler"]),
        context=dataclasses.replace(preset.context, **{"rest_sink": 0, **changes["context"]}),
        **changes[None],
    )
    if "rest_sink" in overrides:
        return made
    most = made.context.most_rest_frames(made.num_frame_per_block, made.window_blocks)
    held = min(preset.context.rest_sink, most)
    return dataclasses.replace(made, context=dataclasses.replace(made.context, rest_sink=held))


def plain_fields(preset: Preset) -> dict[str, Any]:
    """Values of all fields by flat name, as JSON has them."""
    values = {key: getattr(getattr(preset, part) if part else preset, key) for key, (part, _) in FIELDS.items()}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def no_setting(key: str, known: Collection[str]) -> UsageError:
    return UsageError(f"no setting {quoted(key)}{nearest(key, known)}; there are {', '.join(sorted(known))}")


LARGEST: Any = sys.float_info.max


def is_number(value: object) -> bool:
    """True for a finite number, of Python or numpy, but not for True and False."""
    return isinstance(value, Real) and not isinstance(value, bool) and bool(abs(value) <= LARGEST)


def _checked(key: str, value: Any, kind: str) -> Any:
    """`value` as the field's declared type; a fraction for a count or a word for a number is refused."""
    number = is_number(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and number and value == int(value):
        return int(value)
    if kind == "float" and number:
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    if kind.startswith("tuple") and isinstance(value, list | tuple) and all(map(is_number, value)):
        if not kind.startswith("tuple[int"):
            return tuple(float(item) for item in value)
        if all(item == int(item) for item in value):
            return tuple(int(item) for item in value)
        raise UsageError(f"{key} is {quoted(value)}; expected a list of whole numbers")
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    raise UsageError(f"{key} is {quoted(value)}; expected {expected.get(kind, 'a list of numbers')}")
