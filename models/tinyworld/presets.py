"""Decoding scheme of the small world."""

from ...schemes.context import ContextPolicy
from ...schemes.presets import About, Preset
from ...schemes.sampler_spec import SamplerSpec

PRESET = Preset(
    name="tinyworld",
    about=About("tinyworld", "Apache-2.0", "in the package; tools/train_tinyworld.py"),
    num_frame_per_block=1,
    independent_first_frame=False,
    sampler=SamplerSpec(
        denoising_step_list=(), warp_denoising_step=False, timestep_shift=3.0, context_noise=0.0,
        solver="unipc", num_steps=4, guidance_scale=1.0,
        noise_scale=1.15,
    ),
    context=ContextPolicy(
        local_attn_size=6, sink_size=1, positions="window-relative", prompt_switch="recache", recache_sink=True,
        rest_sink=4,
    ),
)  # fmt: skip
