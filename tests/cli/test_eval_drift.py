"""`inferix eval drift`, `lvbench`, `compare` and `run` end to end, on small videos."""

import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("cv2")
from planted import FPS, planted

from inferix import evaluate
from inferix.cli.generate import meter_share
from inferix.cli.main import app
from inferix.evaluate.results import SCHEMA, compare, has_faults, read_results, score_video
from inferix.runtime.media import VideoWriter
from inferix.runtime.media_input import video_facts, video_seconds

METRICS = ["--metrics", "exposure,sharpness,layout,motion"]


def inferix(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def write_video(path, drift, seconds=2, fps=FPS, size=64):
    with VideoWriter(path, fps, (size, size)) as writer:
        for frame in planted(drift, seconds):
            writer.add(frame[None, :size, :size])
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name in ("none", "fade"):
        write_video(folder / f"{name}.mp4", name)
    return folder


def test_drift_writes_results_and_a_page(videos, tmp_path):
    both = [videos / "none.mp4", videos / "fade.mp4"]
    run = inferix("eval", "drift", *both, *METRICS, "--segments", 4, "--out", tmp_path)
    assert run.exit_code == 0, run.output
    assert "exposure" in run.stdout and "drift.html" in run.stdout
    results = read_results(tmp_path / "drift.json")
    schema = json.loads(Path(evaluate.__file__).with_name("drift_results.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator(schema).validate(results)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(results | {"schema": "inferix-drift/2"})
    assert results["schema"] == SCHEMA and results["skipped"] == []
    none, fade = results["videos"]
    assert (none["id"], none["frames"], none["fps"], none["size"]) == ("none", 24, FPS, [64, 64])
    assert fade["segments"] == [[0, 6, 0], [6, 12, 0], [12, 18, 0], [18, 24, 0]]
    losses = [video["metrics"]["exposure"]["vde2"]["late"]["loss"] for video in (none, fade)]
    assert losses[0] < 0.02 < 0.2 < losses[1]
    summary = results["summary"]["exposure"]["vde2.late.loss"]
    assert summary["mean"] == pytest.approx(np.mean(losses)) and summary["videos"] == 2
    assert summary["low"] < summary["mean"] < summary["high"]
    page = (tmp_path / "drift.html").read_text("utf-8")
    assert page.count("<svg") == 4 and "data:image/png;base64," in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_metric_that_a_segment_has_nothing_for_is_a_note_and_no_fault(tmp_path):
    """All of the picture moves, so that there is no still region whose flicker could be seen."""
    import cv2

    texture = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 255, (64, 160, 3), np.uint8), (9, 9), 0)
    with VideoWriter(tmp_path / "pan.mp4", FPS, (64, 64)) as writer:
        for frame in range(24):
            writer.add(np.ascontiguousarray(texture[None, :, 4 * frame : 4 * frame + 64]))
    run = inferix("eval", "drift", tmp_path / "pan.mp4", "--metrics", "flicker,exposure", "--json")
    assert run.exit_code == 0, run.output
    results = json.loads(run.stdout)
    (video,) = results["videos"]
    assert video["metrics"]["flicker"].pop("error") and video["metrics"]["flicker"] == {"undefined": True}
    assert "loss" in video["metrics"]["exposure"]["vde2"]["late"] and len(results["notes"]) == 1
    assert has_faults({"videos": [{"metrics": {"exposure": {"error": "not a number"}}}], "skipped": []})


def test_unusable_videos_are_skipped_and_listed(videos, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_video(tmp_path / "short.mp4", "none", 1)
    paths = [tmp_path / "broken.mp4", videos / "none.mp4", tmp_path / "short.mp4", tmp_path / "gone.mp4"]
    run = inferix("eval", "drift", *paths, *METRICS, "--segments", 20, "--json")
    assert run.exit_code == 1
    results = json.loads(run.stdout)
    assert [video["id"] for video in results["videos"]] == ["none"]
    skipped = {entry["video"]: entry["reason"] for entry in results["skipped"]}
    assert list(skipped) == [str(paths[0]), str(paths[2]), str(paths[3])]
    assert "12 frames" in skipped[str(paths[2])]
    assert all(str(path) in run.stderr for path in skipped)
    assert inferix("eval", "drift", *paths[:1], *METRICS).exit_code == 1


def test_an_interrupted_run_keeps_what_is_scored(videos, tmp_path, monkeypatch):
    def interrupted(video, *arguments):
        if video.id == "none":
            raise KeyboardInterrupt
        return score_video(video, *arguments)

    monkeypatch.setattr("inferix.evaluate.results.score_video", interrupted)
    paths = [videos / "fade.mp4", videos / "none.mp4"]
    run = inferix("eval", "drift", *paths, "--metrics", "exposure", "--out", tmp_path)
    assert run.exit_code == 130
    results = read_results(tmp_path / "drift.json")
    assert [video["id"] for video in results["videos"]] == ["fade"]
    assert [entry["video"] for entry in results["skipped"]] == [str(paths[1])]


def test_mixed_sizes_and_rates_are_noted_and_can_be_made_one(videos, tmp_path):
    other = write_video(tmp_path / "other.mp4", "none", 2, 6, 32)
    paths = [videos / "none.mp4", other]
    results = json.loads(inferix("eval", "drift", *paths, *METRICS, "--json").stdout)
    assert len(results["notes"]) == 2 and "[32, 32]" in results["notes"][0] and "6.0" in results["notes"][1]
    results = inferix("eval", "drift", *paths, *METRICS, "--json", "--fps", 6, "--size", "32x32", "--segments", 4)
    results = json.loads(results.stdout)
    assert results["notes"] == [] and [video["size"] for video in results["videos"]] == [[32, 32]] * 2
    assert [video["frames"] for video in results["videos"]] == [12, 24]


def test_prompts_over_time_end_segments(videos, tmp_path):
    board = tmp_path / "board.yaml"
    board.write_text("- at: 0\n  prompt: a\n- at: 1\n  prompt: b\n")
    arguments = ["eval", "drift", videos / "none.mp4", *METRICS, "--segments", 4, "--json", "--prompts", board]
    (video,) = json.loads(inferix(*arguments).stdout)["videos"]
    assert video["prompt"] == "a" and [segment[2] for segment in video["segments"]] == [0, 0, 1, 1]


def test_lvbench_has_its_rules_whatever_the_prompts(videos, tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"video": "none.mp4", "prompts": ["a", "b"]}\n{"video": "fade.mp4", "prompt": "c"}\n')
    run = inferix("eval", "lvbench", "--videos", videos, "--prompts", listed, *METRICS, "--json")
    assert run.exit_code == 0 and "musiq_spaq" in run.stderr
    entries = json.loads(run.stdout)["videos"]
    assert {video["id"]: video["prompt"] for video in entries} == {"none": "a", "fade": "c"}
    assert all(len(video["segments"]) == 10 and {segment[2] for segment in video["segments"]} == {0}
               for video in entries)  # fmt: skip


def test_a_split_of_the_list_is_scored(videos, tmp_path):
    listed = tmp_path / "list.jsonl"
    entries = [{"video": "none.mp4", "prompt": "a", "split": "train"},
               {"video": "fade.mp4", "prompt": "c", "split": "eval"}]  # fmt: skip
    listed.write_text("\n".join(map(json.dumps, entries)))
    arguments = ["eval", "lvbench", "--videos", videos, "--metrics", "exposure", "--json"]
    results = json.loads(inferix(*arguments, "--prompts", listed, "--split", "eval").stdout)
    assert [video["id"] for video in results["videos"]] == ["fade"] and results["skipped"] == []
    for more in (["--split", "eval"], ["--prompts", listed, "--split", "test"]):
        refused = inferix(*arguments, *more)
        assert refused.exit_code == 2 and repr(more[-1]) in refused.stderr


def test_missing_weights_are_listed_and_refused_by_name(videos, tmp_path):
    run = inferix("eval", "lvbench", "--videos", videos, "--metrics", "exposure", "--weights", tmp_path, "--json")
    assert run.exit_code == 0 and "dino-vitb16/config.json" in run.stderr
    refused = inferix("eval", "drift", videos / "none.mp4", "--metrics", "clip_b32", "--weights", tmp_path)
    assert refused.exit_code == 2 and "clip-vit-base-patch32/config.json" in refused.stderr


def test_compare_of_two_runs(videos, tmp_path):
    for name in ("none", "fade"):
        assert inferix("eval", "drift", videos / f"{name}.mp4", *METRICS, "--out", tmp_path / name).exit_code == 0
    both = [tmp_path / name / "drift.json" for name in ("none", "fade")]
    result = json.loads(inferix("eval", "compare", *both, "--json").stdout)
    assert not result["paired"] and result["metrics"]["exposure"]["mean"] > 0.2
    assert result["metrics"]["exposure"]["low"] is None
    assert "exposure" in inferix("eval", "compare", *both).stdout
    refused = inferix("eval", "compare", *both, "--figure", "vde3")
    assert refused.exit_code == 2 and "'vde3'" in refused.stderr


def made_up(values, version="1", segments=10):
    """Results with one metric whose figures are all `values`, one for each video."""
    described = {"m": {"version": version, "weights": None}}
    return {
        "settings": {"segments": segments, "metrics": described},
        "videos": [{"id": str(index), "metrics": {"m": {"vde2": {"late": {"loss": value}}}}}
                   for index, value in enumerate(values)],
    }  # fmt: skip


def test_pairs_of_the_same_videos_show_a_small_difference():
    values = np.random.default_rng(0).normal(1, 0.3, 12)
    result = compare(made_up(values), made_up(values + 0.05))
    assert result["paired"] and result["metrics"]["m"]["different"]
    apart = compare(made_up(values), made_up([*values + 0.05, 1.0]))
    assert not apart["paired"] and not apart["metrics"]["m"]["different"]
    assert "'2'" in compare(made_up(values), made_up(values, "2"))["metrics"]["m"]["error"]


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (["--metrics", "sharpnes"], "'sharpness'"),
        (["--fps", "0"], "--fps"),
        (["--size", "64"], "'64'"),
        (["--prompts", "none.csv"], "'.csv'"),
    ],
)
def test_bad_options(videos, arguments, bad):
    run = inferix("eval", "drift", videos / "none.mp4", *arguments)
    assert run.exit_code == 2 and bad in run.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": "inferix-drift/9"}', f'{{"schema": "{SCHEMA}"}}'])
def test_results_of_another_kind_are_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    run = inferix("eval", "compare", path, path)
    assert run.exit_code == 2 and "a.json" in run.stderr


def test_results_are_not_written_over_a_video(tmp_path):
    video = write_video(tmp_path / "drift.mp4", "none", 1)
    (tmp_path / "drift.json").symlink_to(video)
    before = video.read_bytes()
    assert inferix("eval", "drift", video, "--out", tmp_path).exit_code == 2
    assert video.read_bytes() == before


def test_the_share_of_the_live_meter_in_a_block():
    timings = [{"denoise": 0.6, "decode": 0.3, "drift": 0.1}, {"denoise": 0.7, "decode": 0.2, "drift": 0.1}]
    assert meter_share([{"timings": stages} for stages in timings]) == pytest.approx(0.1)
    assert meter_share([{"timings": {"denoise": 0.6}}]) is None


def test_facts_of_a_video(videos):
    assert video_facts(videos / "none.mp4") == ((64, 64), FPS)
    assert video_seconds(videos / "none.mp4") == pytest.approx(2, abs=0.1)


def test_run_makes_scores_and_resumes(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a boat\n")
    arguments = ["eval", "run", "--model", "wan-tiny", "--size", "32x32", "--prompts", prompts, "--seconds", 1.5,
                 "--segments", 3, "--metrics", "exposure,motion", "--out", tmp_path / "out"]  # fmt: skip
    run = inferix(*arguments, "--seeds", 1)
    assert run.exit_code == 0, run.output
    first = tmp_path / "out" / "videos" / "prompt0-seed0.mp4"
    stamp = first.stat().st_mtime_ns
    run = inferix(*arguments, "--seeds", 2, "--json")
    assert run.exit_code == 0 and first.stat().st_mtime_ns == stamp
    results = json.loads(run.stdout)
    assert [video["id"] for video in results["videos"]] == ["prompt0-seed0", "prompt0-seed1"]
    assert results["videos"][0]["border_jump"] is not None and results["videos"][0]["prompt"] == "a boat"
    assert (tmp_path / "out" / "drift.html").exists()
    refused = inferix(*arguments, "--seeds", 1, "--set", "local_attn_size=6")
    assert refused.exit_code == 2 and "prompt0-seed0.json" in refused.stderr
