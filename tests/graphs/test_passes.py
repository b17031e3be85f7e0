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


def branched(frame, branch):
    return Group((frame,), 0.0, (frame,), (frame,), branch=branch)


def lists(frame, head_contexts):
    return Group((frame,), 0.0, (frame,), (frame,), head_contexts=head_contexts)


def test_a_branch_runs_its_groups_and_those_of_every_branch():
    run = Pass((branched(1, None), branched(2, 0), branched(3, 1), branched(2, 1)))
    assert run.frames == (1, 2, 3)
    assert [run.of_branch(branch).frames for branch in range(3)] == [(1, 2), (1, 3, 2), (1,)]
    assert Pass((branched(1, 0),)).of_branch(1) is None
    whole = Pass((branched(1, None),))
    assert whole.of_branch(1) is whole


def test_texts_are_those_of_neighbouring_groups():
    groups = [Group((frame,), 0.0, (frame,), (frame,), frame % 2 == 0, text) for frame, text in enumerate((0, 1, 1, 0))]
    run = Pass(tuple(groups))
    assert run.texts == run.mixed_texts == ((0, 1), (1, 2), (0, 1))
    assert (run.written, run.scratch) == ((0, 2), (1, 3))
    assert Pass(tuple(groups[1:3])).texts == ((1, 2),) and not Pass(tuple(groups[1:3])).mixed_texts


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Pass(()), "groups"),
        (lambda: Pass((group((1,), 0.0, (1,)), group((1,), 0.0, (1,)))), "1, 1"),
        (lambda: group((1,), 0.0, (0,)), r"\[1\].*\(0,\)"),
        (lambda: group((1,), 0.0, (1, 0)), r"\(1, 0\)"),
        (lambda: Group((1,), 0.0, (1,), ()), "0 positions.*1 "),
        (lambda: Group((1,), 0.0, (1,), (1,), text=-1), "text -1"),
        (lambda: Group((1,), 0.0, (1,), (1,), head_contexts=((1,), (0,))), r"head_contexts.*\(0,\)"),
        (lambda: Group((1,), 0.0, (1,), (1,), head_contexts=((),)), r"head_contexts.*\(\)"),
        (lambda: Pass((lists(1, ((1,),)), lists(2, ()))), "head_contexts"),
        (lambda: Pass((branched(1, None), branched(1, 1))), "1, 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()
