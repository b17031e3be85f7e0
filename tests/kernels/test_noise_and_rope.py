"""Philox against published vectors, the noise it makes, and the rotation's convention."""

import pytest
import torch

from inferix.kernels.philox import normals, philox4x32, philox_normals
from inferix.kernels.rope import rope_angles, rotate

# kat_vectors of Random123, philox4x32-10
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_words_equal_the_published_vectors(counter, key, words):
    assert tuple(philox4x32(torch.tensor(counter), key).tolist()) == words


def test_noise_depends_on_frame_draw_and_seed_alone():
    whole = philox_normals(7, range(2, 8), 1, (3, 5, 5))
    parts = torch.cat([philox_normals(7, range(2, 3), 1, (3, 5, 5)), philox_normals(7, range(3, 8), 1, (3, 5, 5))])
    assert torch.equal(whole, parts)
    for other in (philox_normals(8, range(2, 8), 1, (3, 5, 5)), philox_normals(7, range(2, 8), 2, (3, 5, 5))):
        assert (whole == other).float().mean() < 0.01
    assert not torch.equal(philox_normals(1 << 40, range(1), 0, (3, 5, 5)), philox_normals(0, range(1), 0, (3, 5, 5)))


def test_normals_are_normal():
    x = philox_normals(3, range(40), 0, (16, 32, 32)).double()
    count = x.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = {1: 1, 2: 2, 3: 15, 4: 96}[power] ** 0.5
        assert abs(x.pow(power).mean() - moment) < 5 * spread / count**0.5
    neighbours = (x[:-1] * x[1:]).mean(), (x.flatten()[:-1] * x.flatten()[1:]).mean()
    assert max(map(abs, neighbours)) < 5 / count**0.5


def test_noise_of_other_blocks_steps_seeds_and_streams_is_independent():
    """Correlations between any two draws, also of neighbouring seeds and frames, are those of chance."""
    shape = (16, 24, 24)
    draws = {
        "seed 5": philox_normals(5, range(9), 0, shape), "seed 6": philox_normals(6, range(9), 0, shape),
        "seed 5 + 2^32": philox_normals(5 + (1 << 32), range(9), 0, shape),
        "step 1": philox_normals(5, range(9), 1, shape), "step 2": philox_normals(5, range(9), 2, shape),
        "stream 1": philox_normals(5, range(9), 0, shape, stream=1),
        "next block": philox_normals(5, range(9, 18), 0, shape),
        "frames shifted": philox_normals(5, range(1, 10), 0, shape),
    }  # fmt: skip
    x = torch.stack([noise.flatten().double() for noise in draws.values()])
    chance = x.shape[1] ** -0.5
    for power, spread in ((1, 1.0), (2, 2.0)):  # of the values, and of their squares
        centred = x**power - (1 if power == 2 else 0)
        correlation = centred @ centred.T / x.shape[1] / spread
        assert (correlation - torch.eye(len(x))).abs().max() < 6 * chance * 2 ** (power - 1), list(draws)
    for lag in (1, 2, 3, 4, 24, 24 * 24):
        assert (x[:, lag:] * x[:, :-lag]).mean(1).abs().max() < 6 * chance


def test_extreme_words_give_finite_normals():
    words = torch.tensor([0, 0, 0xFFFFFFFF, 0xFFFFFFFF])
    assert normals(words).isfinite().all()
    assert normals(words)[0] == pytest.approx((2 * 33 * 0.6931471805599453) ** 0.5)


def test_rotation_is_a_complex_product_over_interleaved_pairs():
    torch.manual_seed(0)
    x = torch.randn(1, 2 * 3 * 4, 2, 128, dtype=torch.float64)
    got = rotate(x, rope_angles([5, 2000], 3, 4, 128))
    freq = torch.cat([10000 ** (-torch.arange(0, dim, 2).double() / dim) for dim in (44, 42, 42)])
    token, (frame, row, column) = 17, (2000, 1, 1)
    angle = torch.tensor([frame] * 22 + [row] * 21 + [column] * 21).double() * freq
    want = torch.view_as_complex(x[0, token].unflatten(-1, (-1, 2))) * torch.polar(torch.ones(64).double(), angle)
    assert torch.allclose(got[0, token], torch.view_as_real(want).flatten(-2), atol=1e-12, rtol=0)
