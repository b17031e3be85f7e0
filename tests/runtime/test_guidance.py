"""Guidance as data: the joined velocity, the branches that have a weight, and what is refused."""

import dataclasses

import pytest
import torch

from inferix.errors import UsageError
from inferix.models.registry import PRESETS, make_preset
from inferix.runtime.sampler import guided
from inferix.schemes.guidance import ALONE, FOLLOWING, Guidance, GuidanceBranch, classifier_free
from inferix.schemes.page_needs import least_pages, needs_negative, page_needs

NEGATIVE, BARE = GuidanceBranch("negative"), GuidanceBranch("negative", sees_past=False)
MAGI = Guidance((FOLLOWING, NEGATIVE, BARE), ((0.0, (0.0, 1.0)), (300.0, (7.5, 1.5))))


def velocities(*numbers):
    draws = torch.randn(3, 4, 2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return {number: draws[number] for number in numbers}


def test_two_branches_are_classifier_free_guidance_bit_for_bit():
    v = velocities(0, 1)
    assert torch.equal(guided(classifier_free(5.0), v, [500.0] * 4), v[1] + 5.0 * (v[0] - v[1]))
    assert classifier_free(1.0) is ALONE and torch.equal(guided(ALONE, velocities(0), [0.0] * 4), v[0])


def test_three_branches_weigh_text_and_past_frame_by_frame():
    v, levels = velocities(0, 1, 2), [1000.0, 300.0, 299.0, 0.0]
    found = guided(MAGI, v, levels)
    noisy = (1 - 1.5) * v[2] + (1.5 - 7.5) * v[1] + 7.5 * v[0]
    assert torch.allclose(found[:2], noisy[:2], atol=1e-12) and torch.allclose(found[2:], v[1][2:], atol=1e-12)
    assert MAGI.weights_at(1000) == pytest.approx((7.5, -6.0, -0.5)) and MAGI.weights_at(0) == (0.0, 1.0, 0.0)


def test_branches_without_a_weight_are_left_out():
    assert MAGI.branches_at([1000.0, 0.0]) == (0, 1, 2)
    assert MAGI.branches_at([0.0, 299.0]) == (1,)
    assert classifier_free(1.0).branches_at([0.0]) == (0,)
    v = velocities(0, 1, 2)
    skipping = Guidance((FOLLOWING, NEGATIVE, BARE), ((0.0, (2.0, 2.0)),))
    assert skipping.branches_at([0.0]) == (0, 2)
    left_out = guided(skipping, {0: v[0], 2: v[2]}, [0.0] * 4)
    assert torch.allclose(left_out, guided(skipping, v, [0.0] * 4), atol=1e-12)


def test_pages_are_counted_for_branches_that_see_a_past():
    preset = make_preset("self-forcing", local_attn_size=6)
    with_three = dataclasses.replace(preset, sampler=sampler(guidance=MAGI))
    assert needs_negative(with_three) and not needs_negative(preset)
    assert least_pages(with_three) == 2 * page_needs(preset).total + 3


def sampler(**changes):
    return dataclasses.replace(PRESETS["self-forcing"].sampler, **changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GuidanceBranch("null"), "'null'"),
        (lambda: Guidance((NEGATIVE, FOLLOWING), ((0.0, (2.0,)),)), "first branch"),
        (lambda: Guidance((FOLLOWING, NEGATIVE)), r"scales.*\[\].*2 branches"),
        (lambda: Guidance((FOLLOWING, NEGATIVE), ((100.0, (2.0,)),)), r"\[100.0\]"),
        (lambda: Guidance((FOLLOWING, NEGATIVE), ((0.0, (float("nan"),)),)), "nan"),
        (lambda: sampler(guidance=MAGI, guidance_scale=2.0), "guidance_scale is 2.0"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()
