"""Decoding schemes of MAGI-1. Sources: MAGI-1 (arXiv 2505.13211); github.com/SandAI-org/MAGI-1, example configs.

Four chunks of six latent frames are in flight, each a quarter of the steps behind the one before it. Timesteps run from
0, noise, to 1000, clean.
"""

from __future__ import annotations

from dataclasses import replace

from ...schemes.context import ContextPolicy
from ...schemes.guidance import Guidance, GuidanceBranch
from ...schemes.presets import About, Preset
from ...schemes.sampler_spec import SamplerSpec
from .solver import DistilledMagiSolver, MagiSolver

NEARLY_CLEAN = 300 - 1e-4  # least timestep of the last quarter of the steps, less the published tolerance
PROMPT, PAST, ALONE = range(3)  # branches of base models
THREE_PASSES = Guidance(
    (
        GuidanceBranch(reads=PAST),
        GuidanceBranch("negative"),
        GuidanceBranch("negative", sees_past=False),
    ),
    scales=((0.0, (7.5, 1.5)), (NEARLY_CLEAN, (0.0, 1.0))),
)
# Distilled models mix in the velocity that a nearly clean chunk has without its past.
MIXED_PAST = Guidance(
    (GuidanceBranch(), GuidanceBranch(sees_past=False)), scales=((0.0, (1.0,)), (NEARLY_CLEAN, (0.7,)))
)
CONTEXT = ContextPolicy(
    local_attn_size=30, sink_size=0, positions="absolute", image="paste", noise2clean_kvrange=(5, 4, 3, 2),
    clean_chunk_kvrange=1, clean_text="null", commit_in_next=True, prompt_switch="join",
)  # fmt: skip


def base(name: str, steps: int) -> Preset:
    """The scheme of a base model: guidance by text and by the past."""
    return Preset(
        name=name,
        about=About(name, "Apache-2.0", "sand-ai/MAGI-1"),
        num_frame_per_block=6,
        independent_first_frame=False,
        sampler=SamplerSpec(
            denoising_step_list=(), warp_denoising_step=False, timestep_shift=3.0, context_noise=999.9,
            solver=MagiSolver.name, num_steps=steps, guidance=THREE_PASSES, wide_latents=True,
        ),
        context=CONTEXT,
        window_blocks=4,
    )  # fmt: skip


def distilled(model: str, steps: int) -> Preset:
    """The scheme of a distilled model: one pass, and steps of 64, 32, 16, 12 or 8."""
    preset = base(model, steps)
    return replace(
        preset,
        name=f"{model}-distill",
        sampler=replace(preset.sampler, solver=DistilledMagiSolver.name, guidance=MIXED_PAST),
    )


PRESETS: tuple[Preset, ...] = (
    base("magi-4.5b", 64),
    distilled("magi-4.5b", 16),
    base("magi-24b", 32),
    distilled("magi-24b", 16),
    base("magi-tiny", 16),
    distilled("magi-tiny", 8),
)
