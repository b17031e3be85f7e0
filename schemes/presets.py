"""Decoding schemes as data: block size, sampler and context of each published model family.

`make_preset(name, **overrides)` changes any field by its flat name and refuses unknown ones. Sources are the
papers and repositories named in each entry; `about` is what `inferix generate --list-presets` tells.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..errors import UsageError, nearest, quoted
from .context import ContextPolicy
from .sampler_spec import SamplerSpec


@dataclass(frozen=True)
class About:
    """Where a scheme's weights are: the model they are for, the licence of their code, and their repository.

    files: their paths in it, the transformer's first; none where no published file is known.
    """

    base: str
    licence: str
    weights: str
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """num_frame_per_block: latent frames; independent_first_frame: the first block is a single frame.

    window_blocks: blocks denoised together, each one level cleaner than the one after it.
    scene_cut_prefix: a prompt that begins so starts a new shot; empty for none.
    """

    name: str
    about: About
    num_frame_per_block: int
    independent_first_frame: bool
    sampler: SamplerSpec
    context: ContextPolicy
    window_blocks: int = 1
    scene_cut_prefix: str = ""

    def __post_init__(self) -> None:
        for key in ("num_frame_per_block", "window_blocks"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key} is {getattr(self, key)}; expected 1 or more")
        self.context.check_blocks(self.num_frame_per_block, self.window_blocks)
        if self.window_blocks not in (1, self.sampler.steps):
            raise UsageError(
                f"window_blocks is {self.window_blocks}; expected 1, or {self.sampler.steps}: one block a step"
            )

        if self.window_blocks > 1 and self.sampler.denoising_step_list_first_chunk:
            raise UsageError(
                f"denoising_step_list_first_chunk with window_blocks {self.window_blocks}: blocks denoised together "
                "take the same steps; use window_blocks=1 or leave the list out"
            )

    def block_size(self, start: int) -> int:
        """Latent frames of the block that starts at absolute frame `start`."""
        return 1 if self.independent_first_frame and start == 0 else self.num_frame_per_block


UNTRAINED = "wan-tiny"  # a named model whose random weights are made in no time
APACHE, NON_COMMERCIAL = "Apache-2.0", "CC BY-NC-SA 4.0"
FOUR_STEPS = SamplerSpec(
    denoising_step_list=(1000, 750, 500, 250), warp_denoising_step=True, timestep_shift=5.0, context_noise=0.0
)
SELF_FORCING = Preset(
    name="self-forcing",
    about=About("wan-1.3b", APACHE, "gdhe17/Self-Forcing", ("checkpoints/self_forcing_dmd.pt",)),
    num_frame_per_block=3,
    independent_first_frame=False,
    sampler=FOUR_STEPS,
    # The published model stops at 21 frames; rolling there is the same up to it and goes on after it.
    context=ContextPolicy(local_attn_size=21, sink_size=0, positions="absolute"),
)
LONGLIVE = dataclasses.replace(
    SELF_FORCING,
    name="longlive",
    about=About(
        "wan-1.3b", APACHE, "Efficient-Large-Model/LongLive-1.3B", ("models/longlive_base.pt", "models/lora.pt")
    ),
    context=ContextPolicy(local_attn_size=12, sink_size=3, positions="absolute", prompt_switch="recache"),
)
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        SELF_FORCING,
        dataclasses.replace(
            SELF_FORCING,
            name="self-forcing-framewise",
            about=dataclasses.replace(SELF_FORCING.about, files=()),
            num_frame_per_block=1,
        ),
        dataclasses.replace(
            SELF_FORCING,
            name="causal-forcing",
            about=About("wan-1.3b", APACHE, "zhuhz22/Causal-Forcing", ("chunkwise/causal_forcing.pt",)),
        ),
        dataclasses.replace(
            SELF_FORCING,
            name="causvid",
            about=About("wan-1.3b", NON_COMMERCIAL, "tianweiy/CausVid", ("autoregressive_checkpoint/model.pt",)),
            sampler=SamplerSpec(
                denoising_step_list=(1000, 757, 522), warp_denoising_step=False, timestep_shift=8.0, context_noise=0.0
            ),
            context=ContextPolicy(
                local_attn_size=-1, sink_size=0, positions="absolute",
                segment_frames=21, rebuild_frames=3, reencode_head=True, restart_decoder=True,
            ),
        ),
        LONGLIVE,
        dataclasses.replace(
            LONGLIVE,
            name="longlive-infinity",
            context=dataclasses.replace(LONGLIVE.context, positions="window-relative"),
        ),
        dataclasses.replace(
            SELF_FORCING,
            name="krea",
            about=About(
                "wan-14b", NON_COMMERCIAL, "krea/krea-realtime-video", ("krea-realtime-video-14b.safetensors",)
            ),
            sampler=dataclasses.replace(FOUR_STEPS, denoising_step_list=(1000, 666, 333, 0)),
            context=ContextPolicy(
                local_attn_size=-1, sink_size=0, positions="absolute", commit=False,
                rebuild_frames=3, reencode_head=True, prompt_switch="blend", blend_blocks=4,
                rebuild_before_switch=True,
            ),
        ),
        Preset(
            name="longlive2",
            about=About("wan-5b", APACHE, "Efficient-Large-Model/LongLive-2.0-5B", ("model_bf16.pt",)),
            num_frame_per_block=8,
            independent_first_frame=False,
            sampler=SamplerSpec(
                denoising_step_list=(), warp_denoising_step=False, timestep_shift=5.0, context_noise=0.0,
                solver="unipc", num_steps=4,
            ),
            context=ContextPolicy(
                local_attn_size=32, sink_size=8, positions="absolute", shot_offset=8, image="clamp"
            ),
            scene_cut_prefix="The scene transitions. ",
        ),
        dataclasses.replace(
            SELF_FORCING,
            name="rolling-forcing",
            about=About(
                "wan-1.3b", "Tencent, see its repository", "TencentARC/RollingForcing",
                ("checkpoints/rolling_forcing_dmd.pt",),
            ),
            sampler=dataclasses.replace(FOUR_STEPS, denoising_step_list=(1000, 800, 600, 400, 200)),
            context=ContextPolicy(local_attn_size=21, sink_size=3, positions="contiguous", commit_sees_sink=False),
            window_blocks=5,
        ),
        dataclasses.replace(
            SELF_FORCING,
            name="causal-diffusion",
            about=About("wan-1.3b", APACHE, "gdhe17/Self-Forcing (not distilled)"),
            sampler=SamplerSpec(
                denoising_step_list=(), warp_denoising_step=False, timestep_shift=5.0, context_noise=0.0,
                solver="unipc", num_steps=50, guidance_scale=5.0,
            ),
        ),
        Preset(
            name="tinyworld",
            about=About("tinyworld", APACHE, "in the package; tools/train_tinyworld.py"),
            num_frame_per_block=1,
            independent_first_frame=False,
            sampler=SamplerSpec(
                denoising_step_list=(), warp_denoising_step=False, timestep_shift=3.0, context_noise=0.0,
                solver="unipc", num_steps=4, guidance_scale=1.0,
            ),
            context=ContextPolicy(
                local_attn_size=6, sink_size=1, positions="window-relative", prompt_switch="recache", recache_sink=True
            ),
        ),
    )
}  # fmt: skip

PARTS: tuple[tuple[str | None, type], ...] = ((None, Preset), ("sampler", SamplerSpec), ("context", ContextPolicy))
FIELDS: dict[str, tuple[str | None, str]] = {  # flat name -> (part of the preset, declared type)
    field.name: (part, str(field.type))
    for part, cls in PARTS
    for field in dataclasses.fields(cls)
    if field.name not in ("name", "about", "sampler", "context")
}


def default_model(preset: str | None) -> str:
    """What runs where no model is named: the world in the package, or random weights for a scheme of other models."""
    return "tinyworld" if preset in (None, "tinyworld") else UNTRAINED


def default_preset(model: str) -> str:
    """The scheme of a named model that has one of its own name, else the family's first."""
    return model if model in PRESETS else SELF_FORCING.name


def make_preset(name: str, **overrides: Any) -> Preset:
    """The preset of that name with some fields replaced; UsageError names the nearest for an unknown one."""
    if name not in PRESETS:
        raise UsageError(f"no preset {quoted(name)}{nearest(name, PRESETS)}; there are {', '.join(PRESETS)}")
    changes: dict[str | None, dict[str, Any]] = {None: {}, "sampler": {}, "context": {}}
    for key, value in overrides.items():
        if key not in FIELDS:
            raise no_setting(key, FIELDS)
        part, kind = FIELDS[key]
        changes[part][key] = _checked(key, value, kind)
    base = PRESETS[name]
    return dataclasses.replace(
        base,
        sampler=dataclasses.replace(base.sampler, **changes["sampler"]),
        context=dataclasses.replace(base.context, **changes["context"]),
        **changes[None],
    )


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
        return tuple(float(item) for item in value)
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}
    raise UsageError(f"{key} is {quoted(value)}; expected {expected.get(kind, 'a list of numbers')}")
