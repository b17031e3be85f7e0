"""Lists of prompts and videos in the formats in which benchmarks publish them.

- `.txt`: one prompt a line (MovieGen and VBench lists as Self-Forcing's repositories have them).
- `.json`: a list of texts; of mappings with a prompt and perhaps a video; or one mapping of video names to prompts.
  VBench's `*_full_info.json` is such a list, with `prompt_en`, `dimension` and perhaps `video_list`.
- `.jsonl`: such a mapping on each line.
- `.yaml`, `.yml`: a storyboard, entries `at` and `prompt`, as `inferix generate --storyboard` reads it.

A mapping may have several prompts over time: `prompts`, a list of texts that share the video equally (LongLive's
interactive list), or `segments`, a list of mappings with a caption and a `start` in seconds, as videos cut into
captioned pieces (LV-Bench) are described.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError, cut, quoted
from ..schemes.storyboard import Cue, read_storyboard
from ..user_files import check_reachable, read_json, read_text
from .results import Video

LARGEST_LIST = 1 << 26  # bytes
PROMPT_KEYS = ("prompt", "prompt_en", "caption", "text")
VIDEO_KEYS = ("video", "video_path", "video_name", "id", "name", "file")
TIME_KEYS = ("start", "at", "start_time")
SUFFIXES = (".txt", ".json", ".jsonl", ".yaml", ".yml")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".ts", ".ogg", ".gif")


@dataclass(frozen=True)
class PromptEntry:
    """The prompts of one video, with the seconds from which they hold; the first at 0.

    video: name of its file without suffix, None if the list does not say. share: True if `at` is the index of the
    prompt of a video that all prompts share equally. split: train or eval, where the list says.
    """

    cues: tuple[Cue, ...]
    video: str | None = None
    share: bool = False
    split: str | None = None

    def switches(self, seconds: float) -> list[float]:
        """Seconds at which the prompt changes in a video of that length."""
        part = seconds / len(self.cues) if self.share else 1.0
        return [cue.at * part for cue in self.cues[1:]]


def read_prompts(path: str | Path) -> list[PromptEntry]:
    """Read a list of prompts. Raises UsageError for another format, an empty list, or an entry without a prompt."""
    path = Path(path)
    suffix = path.suffix.lower()
    where = f"prompts {quoted(path)}"
    if suffix == ".txt":
        lines = read_text(path, "prompts", LARGEST_LIST).splitlines()
        entries = [PromptEntry((Cue(0.0, line.strip()),)) for line in lines if line.strip()]
    elif suffix == ".jsonl":
        text = read_text(path, "prompts", LARGEST_LIST)
        entries = [entry_of(*line) for line in json_lines(text, where)]
    elif suffix == ".json":
        data = read_json(path, "prompts")
        if isinstance(data, dict):
            data = [{"video": name, **({"prompt": value} if isinstance(value, str) else as_mapping(value, where))}
                    for name, value in data.items()]  # fmt: skip
        if not isinstance(data, list):
            raise UsageError(f"{where} holds {quoted(data)}; expected a list of prompts")
        entries = [entry_of(item, f"{where}, entry {index + 1}") for index, item in enumerate(data)]
    elif suffix in (".yaml", ".yml"):
        entries = [PromptEntry(tuple(in_order(read_storyboard(path), where)))]
    else:
        raise UsageError(f"{where} ends in {quoted(suffix)}; expected one of {', '.join(SUFFIXES)}")
    if not entries:
        raise UsageError(f"{where} is empty; expected a prompt for each video")
    return entries


def json_lines(text: str, where: str) -> Iterator[tuple[Any, str]]:
    for index, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                yield json.loads(line), f"{where}, line {index}"
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}, line {index} is not JSON: {cut(str(error))}; correct it") from error


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{where} has {quoted(value)} for a video; expected a prompt or a mapping")
    return value


def entry_of(item: Any, where: str) -> PromptEntry:
    """One entry of a JSON list."""
    if isinstance(item, str) and item.strip():
        return PromptEntry((Cue(0.0, item.strip()),))
    if not isinstance(item, dict):
        raise UsageError(f"{where} is {quoted(item)}; expected a prompt or a mapping")
    video = next((str(item[key]) for key in VIDEO_KEYS if isinstance(item.get(key), str | int)), None)
    files = item.get("video_list")
    if video is None and isinstance(files, list) and files:
        video = str(files[0])
    if video is not None and video.lower().endswith(VIDEO_SUFFIXES):
        video = Path(video).stem
    split = item.get("split") if isinstance(item.get("split"), str) else None
    if isinstance(item.get("segments"), list) and item["segments"]:
        cues = [cue_of(part, f"{where}, segment {index + 1}") for index, part in enumerate(item["segments"])]
        return PromptEntry(tuple(in_order(cues, where)), video, split=split)
    prompts = item.get("prompts")
    if isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts):
        cues = [Cue(float(index), prompt.strip()) for index, prompt in enumerate(prompts)]
        return PromptEntry(tuple(cues), video, share=True, split=split)
    return PromptEntry((Cue(0.0, prompt_of(item, where)),), video, split=split)


def cue_of(part: Any, where: str) -> Cue:
    if not isinstance(part, dict):
        raise UsageError(f"{where} is {quoted(part)}; expected a mapping with a caption and a start")
    start = next((part[key] for key in TIME_KEYS if key in part), None)
    if isinstance(start, bool) or not isinstance(start, int | float):
        raise UsageError(f"{where} has start {quoted(start)}; expected seconds as {', '.join(TIME_KEYS)}")
    return Cue(float(start), prompt_of(part, where))


def prompt_of(item: dict[str, Any], where: str) -> str:
    for key in PROMPT_KEYS:
        if isinstance(item.get(key), str) and item[key].strip():
            return str(item[key]).strip()
    raise UsageError(f"{where} is {quoted(item)}; expected a prompt as {', '.join(PROMPT_KEYS)}")


def in_order(cues: Sequence[Cue], where: str) -> list[Cue]:
    """Cues from 0 on in order of time; a list whose first one is later has an empty prompt before it."""
    times = [cue.at for cue in cues]
    if times != sorted(set(times)) or times[0] < 0:
        raise UsageError(f"{where} has prompts at {quoted(times)} s; expected ascending seconds, 0 or later")
    return [*([Cue(0.0, "")] if times[0] > 0 else []), *cues]


def in_split(entries: Sequence[PromptEntry], split: str) -> list[PromptEntry]:
    """Entries of one split of a list, such as eval. Raises UsageError if the list has none of it."""
    chosen = [entry for entry in entries if entry.split == split]
    if not chosen:
        known = sorted({entry.split for entry in entries if entry.split is not None})
        expected = f"one of {', '.join(known)}" if known else "no split, since the list of prompts has none"
        raise UsageError(f"split is {quoted(split)}; expected {expected}")
    return chosen


def videos_of(paths: Sequence[Path], entries: Sequence[PromptEntry]) -> list[Path]:
    """Videos that entries name; all of them if an entry names none. Raises UsageError if there is none."""
    names = {entry.video for entry in entries}
    chosen = [path for path in paths if path.stem in names or None in names]
    if not chosen:
        raise UsageError(f"none of {len(paths)} videos is in the list of prompts, such as {quoted(str(paths[0]))}")
    return chosen


def with_prompts(
    paths: Sequence[Path], entries: Sequence[PromptEntry] | None, seconds: dict[Path, float]
) -> list[Video]:
    """Videos with the prompts of a list.

    A storyboard or a single entry without a video is of all videos. Entries that name a video are found by the name of
    its file; entries that do not, by the prompt as a name, as VBench names videos (`PROMPT-0.mp4`), or else by order if
    they are as many as the videos. seconds: lengths of videos, for prompts that share one. Raises UsageError for a
    video without an entry.
    """
    names = ids_of(paths)
    if entries is None:
        return [Video(path, name) for path, name in zip(paths, names, strict=True)]
    if len(entries) == 1 and entries[0].video is None:
        chosen = [entries[0]] * len(paths)
    else:
        by_video = {entry.video: entry for entry in entries if entry.video is not None}
        by_prompt = {entry.cues[0].prompt: entry for entry in entries}
        found = [by_video.get(path.stem) or by_prompt.get(re.sub(r"-\d+$", "", path.stem)) for path in paths]
        if not any(found) and not by_video and len(entries) == len(paths):
            found = list(entries)
        if missing := [path for path, entry in zip(paths, found, strict=True) if entry is None]:
            raise UsageError(
                f"{len(missing)} of {len(paths)} videos have no entry in prompts, such as {quoted(str(missing[0]))}; "
                "name videos after their entries, or give as many prompts as videos"
            )
        chosen = [entry for entry in found if entry is not None]
    return [
        Video(path, name, entry.cues[0].prompt, entry.switches(seconds.get(path, 0.0)))
        for path, name, entry in zip(paths, names, chosen, strict=True)
    ]


def ids_of(paths: Sequence[Path]) -> list[str]:
    """Names of files without suffix, or whole paths where two files have one name."""
    stems = [path.stem for path in paths]
    return [stem if stems.count(stem) == 1 else str(path) for stem, path in zip(stems, paths, strict=True)]


def videos_in(folder: str | Path) -> list[Path]:
    """Video files of a folder by name. Raises UsageError if it is no folder or has none."""
    folder = check_reachable(folder, "videos")
    if not folder.is_dir():
        raise UsageError(f"videos {quoted(folder)} is no folder; expected one with {', '.join(VIDEO_SUFFIXES)}")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not paths:
        raise UsageError(f"videos {quoted(folder)} has no video; expected files of {', '.join(VIDEO_SUFFIXES)}")
    return paths
