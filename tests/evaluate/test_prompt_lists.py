"""Lists of prompts in their published formats, and which video has which entry."""

import json
from pathlib import Path

import pytest

from inferix.errors import UsageError
from inferix.evaluate.prompt_lists import PromptEntry, in_split, read_prompts, videos_in, videos_of, with_prompts
from inferix.schemes.storyboard import Cue


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


ONE = (Cue(0.0, "a boat"),)


@pytest.mark.parametrize(
    ("name", "content", "entries"),
    [
        ("a.txt", "a boat\n\n  a fox \n", [PromptEntry(ONE), PromptEntry((Cue(0.0, "a fox"),))]),
        ("a.json", ["a boat"], [PromptEntry(ONE)]),
        ("a.json", {"x.mp4": "a boat"}, [PromptEntry(ONE, "x")]),
        ("a.json", [{"prompt_en": "a boat", "dimension": ["color"]}], [PromptEntry(ONE)]),
        ("a.json", [{"prompt_en": "a boat", "video_list": ["d/x.mp4"]}], [PromptEntry(ONE, "x")]),
        ("a.jsonl", '{"caption": "a boat", "id": 7, "split": "eval"}\n', [PromptEntry(ONE, "7", split="eval")]),
        ("a.jsonl", '{"prompts": ["a boat", "a fox"]}',
         [PromptEntry((*ONE, Cue(1.0, "a fox")), share=True)]),
        ("a.json", [{"video": "x", "segments": [{"start": 0, "caption": "a boat"}, {"start": 2.5, "caption": "b"}]}],
         [PromptEntry((*ONE, Cue(2.5, "b")), "x")]),
        ("a.yaml", "- at: 4\n  prompt: a fox\n", [PromptEntry((Cue(0.0, ""), Cue(4.0, "a fox")))]),
    ],
)  # fmt: skip
def test_formats(tmp_path, name, content, entries):
    assert read_prompts(write(tmp_path, name, content)) == entries


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("a.csv", "a boat", "'.csv'"),
        ("a.txt", "\n", "a.txt"),
        ("a.json", "3", "3"),
        ("a.json", [{"video": "x"}], "entry 1.*'x'"),
        ("a.json", {"x": 3}, "3"),
        ("a.json", ["a", 3], "entry 2"),
        ("a.jsonl", '"a"\n{', "line 2"),
        ("a.json", [{"segments": [{"caption": "a boat"}]}], "segment 1.*None"),
        ("a.json", [{"segments": [{"start": 3, "caption": "a"}, {"start": 3, "caption": "b"}]}], r"\[3.0, 3.0\]"),
    ],
)
def test_bad_lists(tmp_path, name, content, bad):
    with pytest.raises(UsageError, match=bad):
        read_prompts(write(tmp_path, name, content))


def test_times_of_prompts_that_share_a_video():
    entry = PromptEntry((*ONE, Cue(1.0, "b"), Cue(2.0, "c")), share=True)
    assert entry.switches(60) == [20, 40]
    assert PromptEntry((*ONE, Cue(2.5, "b"))).switches(60) == [2.5]


def names(*stems):
    return [Path(f"{stem}.mp4") for stem in stems]


def test_which_video_has_which_entry():
    fox, boat = PromptEntry((Cue(0.0, "a fox"),)), PromptEntry(ONE)
    named = [PromptEntry(ONE, "y"), PromptEntry((Cue(0.0, "a fox"),), "x")]
    assert [video.prompt for video in with_prompts(names("x", "y"), named, {})] == ["a fox", "a boat"]
    assert [video.prompt for video in with_prompts(names("a boat-0", "a fox-3"), [fox, boat], {})] == [
        "a boat", "a fox",
    ]  # fmt: skip
    assert [video.prompt for video in with_prompts(names("1", "2"), [fox, boat], {})] == ["a fox", "a boat"]
    assert [video.prompt for video in with_prompts(names("1", "2", "3"), [boat], {})] == ["a boat"] * 3
    assert [video.prompt for video in with_prompts(names("1"), None, {})] == [None]
    for paths, entries in ((names("x", "z"), named), (names("1", "2", "3"), [fox, boat])):
        with pytest.raises(UsageError, match="have no entry"):
            with_prompts(paths, entries, {})


def test_two_files_of_one_name_have_different_ids():
    assert [video.id for video in with_prompts([Path("a/x.mp4"), Path("b/x.mp4"), Path("y.mp4")], None, {})] == [
        "a/x.mp4", "b/x.mp4", "y",
    ]  # fmt: skip


def test_videos_of_a_folder(tmp_path):
    for name in ("b.mp4", "a.webm", "a.json"):
        write(tmp_path, name, "x")
    assert [path.name for path in videos_in(tmp_path)] == ["a.webm", "b.mp4"]
    with pytest.raises(UsageError, match=r"a\.json"):
        videos_in(tmp_path / "a.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        videos_in(tmp_path / "empty")


def test_one_split_of_a_list():
    entries = [PromptEntry(ONE, "x", split="train"), PromptEntry(ONE, "y", split="eval"), PromptEntry(ONE, "z")]
    assert in_split(entries, "eval") == entries[1:2]
    assert videos_of(names("x", "y"), entries[1:2]) == names("y")
    assert videos_of(names("x", "y"), [PromptEntry(ONE)]) == names("x", "y")
    with pytest.raises(UsageError, match=r"'test'.*eval, train"):
        in_split(entries, "test")
    with pytest.raises(UsageError, match="'eval'"):
        in_split([PromptEntry(ONE)], "eval")
    with pytest.raises(UsageError, match=r"'x\.mp4'"):
        videos_of(names("x"), entries[1:2])
