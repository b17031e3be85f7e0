"""The schedule against the published tables, and the two formulas."""

import pytest
import torch

from inferix.errors import UsageError
from inferix.runtime.sampler import Sampler, SamplerSpec


def sampler(steps, warp=True, shift=5.0):
    return Sampler(SamplerSpec(tuple(steps), warp, shift, 0.0))


@pytest.mark.parametrize(
    ("steps", "shift", "timesteps"),
    [
        ((1000, 750, 500, 250), 5, (1000, 937.5, 833.3333, 625)),
        ((1000, 750, 500, 250), 8, (1000, 960, 888.8889, 727.2727)),
        ((1000, 800, 600, 400, 200), 5, (1000, 952.381, 882.353, 769.2308, 555.5556)),
        ((1000, 666, 333), 5, (1000, 908.843, 713.979)),
    ],
)
def test_warped_timesteps_and_their_sigmas(steps, shift, timesteps):
    got = sampler(steps, shift=shift)
    assert got.timesteps == pytest.approx(timesteps, abs=6e-4)
    assert got.sigmas == pytest.approx([t / 1000 for t in got.timesteps], abs=1e-7)
    assert all(value == float(torch.tensor(value, dtype=torch.float32)) for value in got.timesteps)


def test_unwarped_timesteps_take_the_nearest_sigma():
    got = sampler((1000, 757, 522), warp=False, shift=8.0)
    assert got.timesteps == (1000, 757, 522)
    assert got.sigmas == pytest.approx((1, 0.7567568, 0.5217391), abs=1e-7)


@pytest.mark.parametrize(("shift", "timestep"), [(5.0, 4.98), (8.0, 7.94)])
def test_smallest_sigma(shift, timestep):
    assert sampler((1000,), shift=shift).sigma_at(0) * 1000 == pytest.approx(timestep, abs=5e-3)


def test_formulas():
    got = sampler((1000, 750, 500, 250))
    x0, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    x = got.renoise(x0, noise, 2)
    assert torch.allclose(x, x0 * (1 - got.sigmas[2]) + noise * got.sigmas[2], atol=1e-12)
    assert torch.allclose(got.clean(x, noise - x0, 2), x0, atol=1e-12)
    assert got.renoise(x0.bfloat16(), noise.bfloat16(), 1).dtype == torch.bfloat16


@pytest.mark.parametrize("steps", [(), (500, 750), (1000, 0), (1001,), (750, 750)])
def test_bad_lists_are_refused(steps):
    with pytest.raises(UsageError, match="denoising_step_list"):
        sampler(steps)
