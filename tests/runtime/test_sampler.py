"""The schedule against the published tables, and the two formulas."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from inferix.errors import UsageError
from inferix.models.solvers import noised
from inferix.runtime.sampler import Sampler
from inferix.schemes.sampler_spec import SamplerSpec


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
    assert sampler((0,), shift=shift).sigmas[0] * 1000 == pytest.approx(timestep, abs=5e-3)


def test_formulas():
    got = sampler((1000, 750, 500, 250))
    x0, noise, fresh = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    x = noised(x0, noise, got.sigmas[2])
    assert torch.allclose(x, x0 * (1 - got.sigmas[2]) + noise * got.sigmas[2], atol=1e-12)
    solver = got.begin()
    assert torch.allclose(solver.advance(x, noise - x0, 2, lambda: fresh), noised(x0, fresh, got.sigmas[3]))
    last = noised(x0, noise, got.sigmas[3])
    assert torch.allclose(solver.advance(last, noise - x0, 3, lambda: fresh), x0, atol=1e-12)
    assert noised(x0.bfloat16(), noise.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("steps", "timesteps", "sigmas"),
    [(4, (999, 937, 833, 624), (0.99980, 0.93727, 0.83306, 0.62469)), (2, (999, 833), None)],
)
def test_unipc_schedule(steps, timesteps, sigmas):
    got = Sampler(SamplerSpec((), False, 5.0, 0.0, "unipc", steps))
    assert got.timesteps == timesteps
    if sigmas:
        assert got.sigmas == pytest.approx(sigmas, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 9, 50])
def test_unipc_equals_diffusers(steps):
    """The same made-up network, which depends on latents and timestep, through both, on Wan's schedule.

    diffusers spaces its own schedule a little differently (625 for 624 at the last of four steps).
    """
    theirs = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, solver_order=2, solver_type="bh2"
    )
    got = Sampler(SamplerSpec((), False, 5.0, 0.0, "unipc", steps))
    theirs.set_timesteps(steps)
    theirs.sigmas = torch.tensor([*got.sigmas, 0.0], dtype=torch.float64)
    solver = got.begin()
    x = want = torch.randn(1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(got.timesteps):

        def network(latents, t=timestep):
            return torch.sin(3 * latents + t / 300) + 0.2 * latents

        want = theirs.step(network(want), theirs.timesteps[step], want, return_dict=False)[0]
        x = solver.advance(x, network(x), step, lambda: pytest.fail("unipc draws no noise"))
        assert (x - want).abs().max() <= 1e-6


def test_strength_scales_the_schedule():
    whole, part = (Sampler(SamplerSpec((1000, 750, 500), True, 5.0, 0.0), strength) for strength in (1.0, 0.5))
    assert part.timesteps == Sampler(SamplerSpec((500, 375, 250), True, 5.0, 0.0)).timesteps
    assert part.sigmas[0] < whole.sigmas[0] == 1.0
    spec = SamplerSpec((), False, 1.0, 0.0, solver="unipc", num_steps=3)
    assert Sampler(spec, 0.5).sigmas == pytest.approx([sigma / 2 for sigma in Sampler(spec).sigmas])
    for strength in (0, -0.1, 1.01):
        with pytest.raises(UsageError, match="strength"):
            Sampler(whole.spec, strength)


@pytest.mark.parametrize("steps", [(), (500, 750), (1000, -1), (1001,), (750, 750)])
def test_bad_lists_are_refused(steps):
    with pytest.raises(UsageError, match="denoising_step_list"):
        sampler(steps)
