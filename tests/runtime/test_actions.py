"""Actions: the action of each frame, their text form, and their effect on the model."""

import pytest
import torch
from oracles import make_engine

from inferix.errors import UsageError
from inferix.schemes.actions import ActionTrack, read_actions

NAMES = ("stay", "up", "down", "left", "right")


def test_a_script_begins_at_frame_one_and_is_followed_by_rest():
    track = ActionTrack(NAMES, ["right", "right", "up"])
    assert [track.of(frame) for frame in range(7)] == [0, 4, 4, 1, 0, 0, 0]
    assert len(track.starts) == 4  # changes, not frames


def test_what_is_told_holds_until_told_otherwise_and_drops_what_was_planned():
    track = ActionTrack(NAMES, ["right"] * 10)
    track.set_from(3, "down")
    assert [track.of(frame) for frame in range(6)] == [0, 4, 4, 2, 2, 2]
    assert track.of(10**9) == 2
    track.set_from(4, "left")
    track.set_from(4, "stay")
    assert [track.of(frame) for frame in range(2, 7)] == [4, 2, 0, 0, 0]


def test_actions_are_read_from_words_and_from_a_file(tmp_path):
    assert read_actions("2R u stay 1down", NAMES) == ["right", "right", "up", "stay", "down"]
    file = tmp_path / "walk.json"
    file.write_text('["up", "stay"]')
    assert read_actions(str(file), NAMES) == ["up", "stay"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3X", "'3X'"),
        ("3-R", "'3-R'"),
        ("  ", "actions"),
        ("missing.json", "missing.json"),
        ("jump", "'jump'"),
    ],
)
def test_bad_actions_are_named(text, value):
    with pytest.raises(UsageError, match=value):
        read_actions(text, NAMES)


def test_a_file_of_something_else_and_a_model_without_actions(tmp_path):
    file = tmp_path / "walk.json"
    file.write_text('{"up": 3}')
    with pytest.raises(UsageError, match=r"walk\.json"):
        read_actions(str(file), NAMES)
    with pytest.raises(UsageError, match="actions"):
        read_actions("3R", ())
    engine = make_engine()
    rows = torch.zeros(1, 16, dtype=torch.float64)
    with pytest.raises(UsageError, match="actions"):
        engine.open(prompt_embeds=rows, size=(32, 32), actions=["up"])
    with engine.open(prompt_embeds=rows, size=(32, 32)) as session, pytest.raises(UsageError, match="actions"):
        session.act("up")


def test_a_long_text_is_refused_by_its_actions():
    with pytest.raises(UsageError, match="100000"):
        read_actions("stay " * 200_000, NAMES)
