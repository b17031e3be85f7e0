"""VDE and its relatives on score sequences: values worked out by hand, and the published code's edge cases."""

import math

import numpy as np
import pytest

from inferix.errors import UsageError
from inferix.evaluate.bootstrap import bootstrap_difference, bootstrap_mean, bootstrap_ratio
from inferix.evaluate.measures import (
    VBENCH_LONG,
    Drift,
    border_jump,
    cosine,
    lag_similarity,
    segment_consistency,
    segments_of,
    spans_of,
    start_end_difference,
    start_similarity,
    vbench_long,
    vde,
    vde2,
)

FALLING = [0.8, 0.8, 0.6, 0.4]  # changes 0, -0.25, -0.5 of the first


def test_vde_by_hand():
    assert vde(FALLING) == pytest.approx(3 * 0 + 2 * 0.25 + 1 * 0.5)
    assert vde(FALLING, "log") == pytest.approx(math.log(3) * 0 + math.log(2) * 0.25)


def test_vde_of_ten_segments_has_weights_9_to_1():
    for late in range(1, 10):
        scores = [2.0] * 10
        scores[late] = 3.0
        assert vde(scores) == pytest.approx((10 - late) / 2)
        assert vde(scores, "log") == pytest.approx(math.log(10 - late) / 2)
    assert vde([1.0, *[0.0] * 9]) == 45


def test_vde_at_the_edges_is_as_published():
    assert vde([]) == vde([0.3]) == vde([0.0]) == 0
    assert vde([0.0, 0.0]) == math.inf and vde([0.0, 1.0], "log") == math.inf
    assert vde([-1.0, 1.0]) == -2
    assert vde([1.0, 1.5]) == vde([1.0, 0.5])  # a better segment counts as an error


@pytest.mark.parametrize("bad", [[1.0, math.nan], [1.0, math.inf], [[1.0]]])
def test_scores_are_finite_and_in_one_row(bad):
    for measure in (vde, vde2, start_end_difference):
        with pytest.raises(UsageError, match="scores"):
            measure(bad)


@pytest.mark.parametrize(
    ("weights", "absolute"),
    [("uniform", 0.25), ("late", (2 * 0.25 + 3 * 0.5) / 6), ("early", (2 * 0.25 + 1 * 0.5) / 6)],
)
def test_vde2_is_a_weighted_mean_change(weights, absolute):
    assert vde2(FALLING, weights, "higher") == Drift(*map(pytest.approx, (absolute, -absolute, absolute)))
    assert vde2(FALLING, weights, "lower") == Drift(*map(pytest.approx, (absolute, absolute, 0)))
    assert vde2(FALLING, weights) == Drift(*map(pytest.approx, (absolute, -absolute, absolute)))


def test_vde2_does_not_depend_on_the_count_of_segments():
    assert vde2([1.0, *[0.5] * 3]).absolute == pytest.approx(vde2([1.0, *[0.5] * 30]).absolute) == 0.5
    assert vde([1.0, *[0.5] * 3]) != vde([1.0, *[0.5] * 30])


def test_late_weights_see_late_drift_and_early_weights_early_drift():
    late, early = [1.0, 1.0, 1.0, 0.5], [1.0, 0.5, 1.0, 1.0]
    assert vde2(late, "late").absolute == vde2(early, "early").absolute == pytest.approx(0.25)
    assert vde2(late, "early").absolute == vde2(early, "late").absolute == pytest.approx(0.5 / 6)
    assert vde(late) < vde(early)


def test_a_first_segment_of_zero():
    assert vde2([0.0, 0.0, 0.0]) == Drift(0, 0, 0)
    assert vde2([0.0, 0.1, 0.0]).absolute == math.inf
    assert math.isnan(vde2([0.0, 0.1, -0.1]).signed)
    assert vde2([0.0, 0.1, 0.1], floor=0.2).absolute == pytest.approx(0.5)
    assert vde2([0.5, 0.6, 0.6], floor=0.2).absolute == pytest.approx(0.2)  # above the floor it has no effect


def test_each_prompt_is_compared_with_its_own_first_segment():
    scores = [1.0, 0.5, 4.0, 4.0, 2.0, 9.0]
    changes = (1 * 0.5 + 2 * 0.25) / 3
    assert vde2(scores, spans=[2, 3, 1]).absolute == pytest.approx(changes)
    assert vde2(scores).absolute > 2


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"weights": "lat"}, "'late'"),
        ({"better": "more"}, "better"),
        ({"floor": -1.0}, "floor"),
        ({"spans": [1, 1]}, "spans"),
        ({"spans": [1, 1, 1, 1]}, "scores"),
        ({"spans": [4, 0]}, "spans"),
    ],
)
def test_vde2_refuses(arguments, name):
    with pytest.raises(UsageError, match=name):
        vde2(FALLING, **arguments)
    with pytest.raises(UsageError, match="linear"):
        vde(FALLING, "late")


def test_segments_are_equal_and_the_remainder_is_dropped():
    assert segments_of(23, 5) == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    assert segments_of(5, 5)[-1] == (4, 5)
    with pytest.raises(UsageError, match=r"4 frames.*segments=5"):
        segments_of(4, 5)


def test_no_segment_lies_across_a_prompt_switch():
    assert spans_of(23, 5) == [segments_of(23, 5)]
    assert spans_of(19, 10) == [segments_of(19, 10)]
    spans = spans_of(100, 10, [35, 38])
    assert spans[0] == [(0, 10), (10, 20), (20, 30)]
    assert spans[1] == [(35, 38)]
    assert spans[2][0] == (38, 48) and len(spans[2]) == 6
    for switches in ([0], [100], [5, 5], [9, 4]):
        with pytest.raises(UsageError, match="switches"):
            spans_of(100, 10, switches)


def test_start_end_difference_by_hand():
    scores = [1.0, 2.0, 3.0, *[50.0] * 14, 7.0, 8.0, 9.0]
    assert start_end_difference(scores) == pytest.approx(6)
    assert start_end_difference([1.0, 4.0]) == 3


def test_segment_consistency_by_hand():
    turned = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]  # similarity to the first 0, -1; to the previous 0, 0
    assert segment_consistency(turned) == 0
    root = math.sqrt(0.5)
    assert segment_consistency([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]) == pytest.approx((root + (0 + root) / 2) / 2)
    with pytest.raises(UsageError, match="features"):
        segment_consistency([[1.0, 0.0]])


def test_consistency_inside_segments_misses_drift_between_them():
    features = np.repeat([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], 4, axis=0)
    spans = spans_of(12, 3)
    inside = [segment_consistency(features[slice(*segment)]) for segment in spans[0]]
    assert vde(inside) == pytest.approx(0)
    assert start_similarity(features, spans) == pytest.approx([1, math.sqrt(0.5), 0])


def test_lag_similarity_has_a_curve_for_each_lag():
    features = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    curves = lag_similarity(features, (1, 2, 4))
    assert {lag: curve.tolist() for lag, curve in curves.items()} == {1: [1, 0, 1], 2: [0, 0]}
    assert cosine(np.zeros(2), np.ones(2)) == 0
    with pytest.raises(UsageError, match="lags"):
        lag_similarity(features, (0,))


def test_border_jump_finds_motion_that_breaks_at_blocks():
    motion = np.ones(11)
    motion[[3, 7]] = 3.0  # pairs that end at frames 4 and 8
    jump = border_jump(motion, [4, 8])
    assert jump["border"] == pytest.approx(2) and jump["inside"] == pytest.approx(4 / 7)
    assert border_jump(motion, [6])["ratio"] < 1
    assert border_jump(np.ones(11), [4])["ratio"] == 1
    with pytest.raises(UsageError, match="borders"):
        border_jump(motion, [20])


def test_vbench_long_by_hand():
    assert vbench_long(0.9, 0.782773956831079, "subject") == pytest.approx((0.9 + 0.9206531487463249) / 2)
    mapped = (0.8 - 0.782773956831079) / 0.024658268466961904 * 0.004580085658914342 + 0.9206531487463249
    assert vbench_long(0.9, 0.8, "subject", (0.7, 0.3)) == pytest.approx(0.63 + 0.3 * mapped)
    roots = (0.8 - 0.782774) / 0.1570295 * 0.0676763 + 0.920653
    assert vbench_long(0.0, 0.8, "subject", (0, 1), corrected=True) == pytest.approx(roots, abs=1e-6)
    assert all(sum(stored.weights) == pytest.approx(1) for stored in VBENCH_LONG.values())
    with pytest.raises(UsageError, match="'subjct'"):
        vbench_long(0.9, 0.8, "subjct")


def test_bootstrap_is_seeded_and_covers_the_mean():
    values = np.random.default_rng(3).normal(5, 1, 40)
    interval = bootstrap_mean(values)
    assert interval == bootstrap_mean(values) != bootstrap_mean(values, seed=1)
    assert interval.low < interval.mean < interval.high
    error = values.std() / math.sqrt(40)
    assert interval.low == pytest.approx(interval.mean - 1.96 * error, abs=0.3 * error)
    assert bootstrap_mean(values, level=0.5).low > interval.low
    assert bootstrap_mean(np.ones(3)).low == 1


def test_bootstrap_of_one_video_has_no_interval():
    assert bootstrap_mean([2.0]).low is None and not bootstrap_mean([2.0]).excludes_zero
    for bad in ([], [math.nan]):
        with pytest.raises(UsageError, match="values"):
            bootstrap_mean(bad)


def test_pairs_narrow_the_interval_of_a_difference():
    before = np.random.default_rng(1).normal(0, 1, 20)
    after = before + 0.1
    paired, apart = (bootstrap_difference(before, after, paired) for paired in (True, False))
    assert paired.mean == pytest.approx(apart.mean) == pytest.approx(0.1)
    assert paired.excludes_zero and not apart.excludes_zero
    with pytest.raises(UsageError, match="before"):
        bootstrap_difference(before, after[1:], paired=True)


def test_the_interval_of_a_ratio_is_over_pairs():
    """Parts and totals of one video stay together, so equal ratios have an interval of no width."""
    totals = [1.0, 4.0, 2.0, 9.0]
    equal = bootstrap_ratio([total / 2 for total in totals], totals)
    assert (equal.mean, equal.low, equal.high) == pytest.approx((0.5, 0.5, 0.5))
    mixed = bootstrap_ratio([1.0, 0.0, 2.0, 9.0], totals)
    assert mixed.low < mixed.mean == 0.75 < mixed.high
    for parts, other in (([1.0], [1.0, 2.0]), ([0.0], [0.0])):
        with pytest.raises(UsageError, match="totals"):
            bootstrap_ratio(parts, other)
