"""Decoding schemes as data: block size, sampler and context of each published model family.

`make_preset(name, **overrides)` changes any field by its flat name and refuses unknown ones.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, nearest
from .context import ContextPolicy
from .sampler import SamplerSpec


@dataclass(frozen=True)
class Preset:
    """num_frame_per_block: latent frames; independent_first_frame: the first block is a single frame."""

    name: str
    num_frame_per_block: int
    independent_first_frame: bool
    sampler: SamplerSpec
    context: ContextPolicy

    def __post_init__(self) -> None:
        if self.num_frame_per_block < 1:
            raise UsageError(f"num_frame_per_block is {self.num_frame_per_block}; expected 1 or more")
        self.context.check_block(self.num_frame_per_block)

    def block_size(self, start: int) -> int:
        """Latent frames of the block that starts at absolute frame `start`."""
        return 1 if self.independent_first_frame and start == 0 else self.num_frame_per_block


SELF_FORCING = Preset(
    name="self-forcing",
    num_frame_per_block=3,
    independent_first_frame=False,
    sampler=SamplerSpec(
        denoising_step_list=(1000, 750, 500, 250),
        warp_denoising_step=True,
        timestep_shift=5.0,
        context_noise=0.0,
    ),
    # The published model stops at 21 frames; rolling there is the same up to it and goes on after it.
    context=ContextPolicy(local_attn_size=21, sink_size=0, positions="absolute"),
)
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        SELF_FORCING,
        dataclasses.replace(SELF_FORCING, name="self-forcing-framewise", num_frame_per_block=1),
        dataclasses.replace(SELF_FORCING, name="causal-forcing"),
    )
}

FIELDS: dict[str, tuple[str | None, Any]] = {  # flat name -> (part of the preset, type)
    field.name: (part, kind)
    for part, cls in ((None, Preset), ("sampler", SamplerSpec), ("context", ContextPolicy))
    for field in dataclasses.fields(cls)
    if field.name not in ("name", "sampler", "context")
    for kind in (field.type,)
}


def make_preset(name: str, **overrides: Any) -> Preset:
    """The preset of that name with some fields replaced; UsageError names the nearest for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    changes: dict[str | None, dict[str, Any]] = {None: {}, "sampler": {}, "context": {}}
    for key, value in overrides.items():
        if key not in FIELDS:
            raise UsageError(f"no setting {key!r}{nearest(key, FIELDS)}; there are {', '.join(sorted(FIELDS))}")
        part, kind = FIELDS[key]
        changes[part][key] = _checked(key, value, str(kind))
    base = PRESETS[name]
    return dataclasses.replace(
        base,
        sampler=dataclasses.replace(base.sampler, **changes["sampler"]),
        context=dataclasses.replace(base.context, **changes["context"]),
        **changes[None],
    )


def _checked(key: str, value: Any, kind: str) -> Any:
    """`value` as the field's declared type; a fraction for a count or a word for a number is refused."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and number and value == int(value):
        return int(value)
    if kind == "float" and number:
        return float(value)
    if kind == "str" and isinstance(value, str):
        return value
    numbers = (int, float)
    if kind.startswith("tuple") and isinstance(value, list | tuple) and all(type(item) in numbers for item in value):
        return tuple(float(item) for item in value)
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    raise UsageError(f"{key} is {value!r}; expected {expected.get(kind, 'a list of numbers')}")
