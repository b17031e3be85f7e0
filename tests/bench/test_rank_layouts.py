"""Times of layouts: any prompt length and guidance that a model has."""

import pytest

import inferix
from inferix.bench.rank_layouts import timed

SETTINGS = {
    "self-forcing": {"denoising_step_list": [1000]},
    "causal-diffusion": {"num_steps": 2},  # guidance, which asks for a negative prompt
}


@pytest.mark.parametrize("preset", SETTINGS)
def test_a_steady_block_is_timed(preset):
    engine = inferix.load(
        "wan-tiny", preset=preset, device="cpu", text_prompts=False, local_attn_size=3, num_frame_per_block=1,
        **SETTINGS[preset],
    )  # fmt: skip
    assert timed(engine, (32, 32), 1) > 0
