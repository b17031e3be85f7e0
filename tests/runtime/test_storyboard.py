"""Prompts over time: the block each takes effect at, and what is refused."""

import pytest

from inferix.errors import UsageError
from inferix.models.registry import PRESETS
from inferix.schemes.storyboard import Cue, read_storyboard, schedule

PRESET = PRESETS["self-forcing"]  # blocks begin at frames 0, 9, 21, 33, ...


def plan(*cues, blocks=4):
    return schedule([Cue(at, prompt) for at, prompt in cues], PRESET, blocks, fps=16, stride=4)


def test_a_prompt_waits_for_the_next_block():
    assert plan((0.1, "a"), (9 / 16 + 0.01, "b")) == {1: "a", 2: "b"}
    assert plan((9 / 16, "a")) == {1: "a"}
    assert schedule([Cue(0.7, "a")], PRESET, 3, fps=16, stride=4, start=3) == {1: "a"}


@pytest.mark.parametrize(
    ("cues", "named"),
    [
        ([(1.0, "a"), (0.9, "b")], "0.9"),
        ([(0.0, "a")], "0 s"),
        ([(float("nan"), "a")], "nan"),
        ([(2.1, "a")], "2.1"),
        ([(0.1, "a"), (0.2, "b")], "two"),
    ],
)
def test_cues_that_cannot_be(cues, named):
    with pytest.raises(UsageError, match=named):
        plan(*cues)


def test_a_file_of_cues(tmp_path):
    path = tmp_path / "story.yaml"
    path.write_text("- {at: 1, prompt: a cat}\n- {at: 2.5, prompt: a dog}\n")
    assert read_storyboard(path) == [Cue(1.0, "a cat"), Cue(2.5, "a dog")]
    for text, named in (
        ("", "no list"),
        ("a: b", "no list"),
        ("- {at: 1}", "entry 1"),
        ("- {at: soon, prompt: x}", "entry 1"),
        ("- [", "YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=named):
            read_storyboard(path)
    with pytest.raises(UsageError, match="cannot read"):
        read_storyboard(tmp_path / "none.yaml")
