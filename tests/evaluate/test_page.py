"""Parts of the page of results."""

import pytest

from inferix.evaluate.page import spread, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.5, 1]),
        (0.0003, 0.00104, [0.0002, 0.0004, 0.0006, 0.0008, 0.001, 0.0012]),
        (-0.118, 1.01, [-0.5, 0, 0.5, 1, 1.5]),
        (7.0, 7.0, [6.0, 6.5, 7.0, 7.5, 8.0]),
    ],
)
def test_ticks_are_round_and_reach_around_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_any_range():
    for exponent in range(-9, 9):
        for low, high in ((0, 1), (-3, 8), (1, 1), (0, 0), (-0.37, -0.36)):
            marks = [mark / 10.0**exponent for mark in ticks(low * 10.0**exponent, high * 10.0**exponent)]
            assert marks[0] <= low + 1e-9 and high - 1e-9 <= marks[-1] and 3 <= len(marks) <= 7


def test_pictures_of_a_segment_are_spread_over_it():
    assert spread(10, 40) == [15, 25, 35]
    assert spread(3, 4) == [3]
