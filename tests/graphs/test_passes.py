"""A pass checks what it is made of."""

import pytest

from inferix.graphs.passes import Group, Pass


def test_frames_and_timesteps_follow_the_groups():
    run = Pass((Group((3, 4), 0.0, (3, 4)), Group((5,), 750.0, (0, 3, 4, 5))))
    assert run.frames == (3, 4, 5)
    assert run.timesteps == (0.0, 0.0, 750.0)


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ((), "at least one"),
        ((Group((1,), 0.0, (1,)), Group((1,), 0.0, (1,))), "each once"),
        ((Group((1,), 0.0, (0,)),), "not in their own context"),
        ((Group((1,), 0.0, (1, 0)),), "ascending"),
    ],
)
def test_wrong_passes_are_refused(groups, said):
    with pytest.raises(ValueError, match=said):
        Pass(groups)
