"""A pass checks what it is made of."""

import pytest

from inferix.graphs.passes import Group, Pass


def group(frames, timestep, context):
    return Group(frames, timestep, context, context)


def test_frames_and_timesteps_follow_the_groups():
    run = Pass((group((3, 4), 0.0, (3, 4)), Group((5,), 750.0, (0, 3, 4, 5), (0, 7, 8, 9))))
    assert run.frames == (3, 4, 5)
    assert run.timesteps == (0.0, 0.0, 750.0)
    assert run.groups[1].position_of(5) == 9


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Pass(()), r"frames [\[(][\])]"),
        (lambda: Pass((group((1,), 0.0, (1,)), group((1,), 0.0, (1,)))), "1, 1"),
        (lambda: group((1,), 0.0, (0,)), r"\[1\].*\(0,\)"),
        (lambda: group((1,), 0.0, (1, 0)), r"\(1, 0\)"),
        (lambda: Group((1,), 0.0, (1,), ()), "0 positions.*1 "),
    ],
)
def test_what_makes_no_sense_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
