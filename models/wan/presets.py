"""Decoding schemes of the models of the Wan family. Sources are the papers and repositories named in each entry."""

from __future__ import annotations

import dataclasses

from ...schemes.context import ContextPolicy
from ...schemes.presets import About, Preset
from ...schemes.sampler_spec import SamplerSpec

APACHE, NON_COMMERCIAL = "Apache-2.0", "CC BY-NC-SA 4.0"
FOUR = (1000, 750, 500, 250)
FOUR_STEPS = SamplerSpec(
    denoising_step_list=FOUR, warp_denoising_step=True, timestep_shift=5.0, context_noise=0.0
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
LINGBOT = Preset(
    name="lingbot-v2",
    about=About(
        "lingbot-14b", NON_COMMERCIAL, "robbyant/lingbot-world-v2-14b-causal-fast",
        ("transformers/*", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"),
    ),
    num_frame_per_block=4,
    independent_first_frame=False,
    # rows 0, 250, 500 and 750 of the table
    sampler=dataclasses.replace(
        FOUR_STEPS, timestep_shift=10.0, sigma_max=0.999, table="truncated", wide_latents=True
    ),
    context=ContextPolicy(local_attn_size=18, sink_size=6, positions="absolute", image="channels"),
    precision="wide",
)
FRAMEWISE = dataclasses.replace(
    SELF_FORCING,
    name="self-forcing-framewise",
    about=dataclasses.replace(SELF_FORCING.about, files=()),
    num_frame_per_block=1,
)


def causal_forcing(name: str, file: str, base: Preset, steps: tuple[float, ...], first: tuple[float, ...]) -> Preset:
    """Causal-Forcing (github.com/thu-ml/Causal-Forcing) and Causal-Forcing++, whose first block has more steps."""
    sampler = dataclasses.replace(FOUR_STEPS, denoising_step_list=steps, denoising_step_list_first_chunk=first)
    return dataclasses.replace(
        base, name=name, about=About("wan-1.3b", APACHE, "zhuhz22/Causal-Forcing", (file,)), sampler=sampler
    )


def self_gradient_forcing(name: str, frames: int, window: int, sink: int, weights: str, file: str) -> Preset:
    """SGF (arXiv 2607.20368), and SGF+ (arXiv 2610.10429), whose commits have weights of their own."""
    published = "JunhaoZhuang/Self_Gradient_Forcing" if weights == "plain" else "ZihanSu/Self_Gradient_Forcing_Plus"
    return dataclasses.replace(
        SELF_FORCING,
        name=name,
        about=About("wan-1.3b", APACHE, published, (file,)),
        num_frame_per_block=frames,
        context=ContextPolicy(
            local_attn_size=window, sink_size=sink, positions="window-relative", clean_weights=weights
        ),
    )


PRESETS: tuple[Preset, ...] = (
    SELF_FORCING,
    FRAMEWISE,
    causal_forcing("causal-forcing", "chunkwise/causal_forcing.pt", SELF_FORCING, FOUR, ()),
    causal_forcing("causal-forcing-framewise", "framewise/causal_forcing.pt", FRAMEWISE, FOUR, ()),
    causal_forcing("causal-forcing-2step", "causal-forcing++/framewise-2step.pt", FRAMEWISE, (1000, 500), FOUR),
    causal_forcing("causal-forcing-1step", "causal-forcing++/framewise-1step.pt", FRAMEWISE, (1000,), FOUR),
    self_gradient_forcing("sgf", 3, 12, 3, "plain", "chunkwise/ar/model.pt"),
    self_gradient_forcing("sgf-framewise", 1, 21, 4, "plain", "framewise/ar/model.pt"),
    self_gradient_forcing("sgf-plus", 3, 12, 3, "memory", "chunkwise/model.pt"),
    self_gradient_forcing("sgf-plus-framewise", 1, 21, 4, "memory", "framewise/model.pt"),
    dataclasses.replace(  # FastVideo's settings of its causal Wan 2.2, of two experts
        SELF_FORCING,
        name="self-forcing-a14b",
        about=About("wan-14b", APACHE, "rand0nmr/SFWan2.2-T2V-A14B-Diffusers"),
        num_frame_per_block=4,
        sampler=dataclasses.replace(
            FOUR_STEPS, denoising_step_list=(1000, 850, 700, 550, 350, 275, 200, 125), timestep_shift=12.0,
            boundary_ratio=0.875,
        ),
        context=dataclasses.replace(SELF_FORCING.context, local_attn_size=20),
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
    LINGBOT,
    dataclasses.replace(
        LINGBOT,
        name="lingbot-v2-1.3b",
        about=About(
            "lingbot-1.3b", NON_COMMERCIAL, "robbyant/lingbot-world-v2-1.3b-causal-fast", ("model*.safetensors*",)
        ),
        sampler=dataclasses.replace(LINGBOT.sampler, timestep_shift=5.0),
    ),
    dataclasses.replace(
        LINGBOT,
        name="lingbot-v1",
        about=About(
            "lingbot-14b", APACHE, "robbyant/lingbot-world-fast", ("diffusion_pytorch_model*", "config.json")
        ),
        num_frame_per_block=3,
        # rows 0, 179, 358 and 679 of the table
        sampler=dataclasses.replace(LINGBOT.sampler, denoising_step_list=(1000, 821, 642, 321)),
        context=dataclasses.replace(LINGBOT.context, local_attn_size=21, sink_size=3),
    ),
)  # fmt: skip
