"""Drift of whole videos: planted drifts and the metrics that they raise, streaming, and unusable videos."""

import math
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
from planted import DRIFTS, FPS, SECONDS, planted  # noqa: E402

from inferix.errors import UsageError  # noqa: E402
from inferix.evaluate.flow_scorers import ms_ssim, ssim_terms  # noqa: E402
from inferix.evaluate.measures import Drift  # noqa: E402
from inferix.evaluate.metrics import INSTALL, OPTIONAL, SCORERS, chosen_scorers  # noqa: E402
from inferix.evaluate.scorers import View  # noqa: E402
from inferix.evaluate.video_drift import drift  # noqa: E402

RAISED = 0.15  # late-weighted loss from which a metric counts as raised
COLOUR_RAISED = 0.02  # of a similarity of shares of light
MEANT = {
    "none": set(),
    "fade": {"exposure", "contrast"},
    "colour cast": {"colour", "saturation"},
    "blur": {"sharpness"},
    "freeze": {"motion", "moving_share"},
    "scene change": {"layout", "ssim_to_start"},
    "flicker": {"flicker", "warp_error"},
}
SIDE_EFFECTS = {"blur": {"motion"}}  # a blurred square moves less against its background


@pytest.fixture(scope="module")
def videos():
    cv2.setNumThreads(1)
    return {name: drift(planted(name), FPS, segments=SECONDS) for name in DRIFTS}


def loss(metric):
    return metric.vde2["late"].loss


@pytest.mark.parametrize("name", DRIFTS)
def test_a_planted_drift_raises_the_metrics_meant_for_it_and_no_other(videos, name):
    metrics = videos[name].metrics
    losses = {key: loss(metric) for key, metric in metrics.items()}
    raised = {key for key, lost in losses.items() if lost > (COLOUR_RAISED if key == "colour" else RAISED)}
    assert MEANT[name] <= raised <= MEANT[name] | SIDE_EFFECTS.get(name, set()), losses


def test_every_metric_has_a_drift_that_raises_it():
    assert set(SCORERS) - set().union(*MEANT.values()) == {"clipping", *OPTIONAL}
    burnt = [np.clip(frame.astype(int) + 3 * index, 0, 255).astype(np.uint8)
             for index, frame in enumerate(planted("none"))]  # fmt: skip
    assert loss(drift(burnt, FPS, ["clipping"]).metrics["clipping"]) > RAISED


def test_the_table_of_the_docs_is_what_is_measured(videos):
    text = (Path(__file__).parents[2] / "docs" / "drift.md").read_text("utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    table = {name.strip(): cells for name, *cells in rows if name.strip() in SCORERS and len(cells) == len(DRIFTS)}
    assert set(table) == set(SCORERS) - set(OPTIONAL)
    for name, cells in table.items():
        measured = [loss(videos[drift_name].metrics[name]) for drift_name in DRIFTS]
        assert [float(cell.strip(" *")) for cell in cells] == pytest.approx(measured, rel=0.05, abs=0.03)


def test_published_consistency_inside_segments_cannot_see_a_scene_change(videos):
    metric = videos["scene change"].metrics["layout"]
    assert vde_change(metric.vde_scores) < 0.15 < 0.9 < vde_change(metric.scores)
    assert len(metric.vde_scores) == len(metric.scores) == SECONDS


def vde_change(scores):
    return max(abs(score - scores[0]) / scores[0] for score in scores[-2:])


def test_figures_of_a_score_that_is_known():
    """Brightness falls by one level each frame, so every figure can be worked out."""
    frames = [np.full((16, 16, 3), 100 - index, np.uint8) for index in range(23)]
    video = drift(frames, 8, ["exposure"], segments=5)
    metric = video.metrics["exposure"]
    assert video.segments == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]
    assert metric.scores == pytest.approx([(98.5 - 4 * index) / 255 for index in range(5)], abs=1e-6)
    assert metric.vde["linear"] == pytest.approx((4 * 4 + 3 * 8 + 2 * 12 + 1 * 16) / 98.5, abs=1e-4)
    assert metric.vde2["uniform"] == Drift(*map(pytest.approx, (10 / 98.5, -10 / 98.5, 10 / 98.5)))
    assert metric.start_end == pytest.approx((99 - 79) / 255)  # means of 3 frames
    assert len(metric.curve) == video.frames == 23


def test_a_prompt_switch_is_no_drift():
    frames = list(planted("scene change"))
    aware = drift(frames, FPS, ["layout", "ssim_to_start"], segments=SECONDS, switches=[len(frames) // 2])
    unaware = drift(frames, FPS, ["layout", "ssim_to_start"], segments=SECONDS)
    assert [len(span) for span in aware.spans] == [3, 3]
    for name in ("layout", "ssim_to_start"):
        assert loss(aware.metrics[name]) < 0.05 < 0.3 < loss(unaware.metrics[name])


def test_an_iterator_gives_the_same_as_a_list_and_only_a_few_frames_are_alive():
    frames = list(planted("fade"))
    alive: list[View] = []

    class Watching:
        name, version, weights, kind, better = "watching", "1", None, "pair", "lower"
        floor, partial, smallest, about = 0.1, False, 1, ""

        def score(self, views):
            alive.append(chain(views[-1]))
            return np.ones(len(views))

    streamed = drift(iter(frames), FPS, ["motion", "exposure", Watching()], segments=6)
    whole = drift(frames, FPS, ["motion", "exposure"], segments=6)
    assert all(np.array_equal(streamed.metrics[name].curve, whole.metrics[name].curve, equal_nan=True)
               for name in whole.metrics)  # fmt: skip
    assert max(alive) <= 11


def chain(view):
    return 1 if view.previous is None else 1 + chain(view.previous)


def test_memory_does_not_grow_with_the_length_of_a_video():
    """240 further frames would take 55 MB; features and scores of each take a few KB."""

    def peak(count):
        pictures = (np.full((240, 320, 3), index % 200, np.uint8) for index in range(count))
        tracemalloc.start()
        drift(pictures, FPS, ["exposure", "layout", "ssim_to_start"])
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(260) - peak(20) < 12_000_000


def test_jump_of_flow_at_block_borders():
    """A picture that moves by a pixel each frame, and by three at the first frame of a block."""
    borders = list(range(8, 40, 8))
    background = next(planted("none"))
    moved = np.cumsum([3 if index in borders else 1 for index in range(40)])
    even, jerky = ([np.roll(background, shift, axis=1) for shift in shifts] for shifts in (range(40), moved))
    assert drift(jerky, FPS, ["motion"], block_borders=borders).border_jump["ratio"] > 2
    assert drift(even, FPS, ["motion"], block_borders=borders).border_jump["border"] < 0.001
    with pytest.raises(UsageError, match=r"block_borders.*motion"):
        drift(even, FPS, ["exposure"], block_borders=borders)


def test_ssim_is_that_of_other_libraries():
    """Of scikit-image 0.26.0 (gaussian_weights, sigma 1.5, population moments); MS-SSIM of torchmetrics 1.9.0, whose
    window reaches over the border."""
    y, x = np.mgrid[0:192, 0:180].astype(np.float32)
    one = (0.5 + 0.25 * np.sin(x / 5) + 0.2 * np.cos(y / 7 + x / 11)).astype(np.float32)
    other = (0.9 * one + 0.05 * np.sin(x * y / 40)).astype(np.float32)
    assert ssim_terms(one, other)[0] == pytest.approx(0.8178978103, abs=1e-6)
    assert ms_ssim(one, other) == pytest.approx(0.9832, abs=1e-3)
    assert ssim_terms(one, one)[0] == ms_ssim(one, one) == pytest.approx(1)


def test_a_metric_with_a_score_that_is_not_a_number_has_no_figures_and_the_others_have():
    broken = replace(SCORERS["contrast"], name="broken", function=lambda view: math.nan if view.index == 7 else 1.0)
    video = drift(planted("none"), FPS, [broken, "exposure"])
    assert "frame 7" in video.metrics["broken"].error and not video.metrics["broken"].vde2
    assert video.metrics["exposure"].error is None


def test_flicker_is_undefined_where_everything_moves():
    background = next(planted("none"))
    frames = [np.roll(background, 3 * index, axis=1) for index in range(40)]
    video = drift(frames, FPS, ["flicker", "motion"])
    assert "0-3" in video.metrics["flicker"].error
    assert video.metrics["motion"].error is None


GREY = np.full((32, 32, 3), 99, np.uint8)


@pytest.mark.parametrize(
    ("frames", "arguments", "bad"),
    [
        ([GREY] * 9, {}, r"9 frames.*segments=10"),
        ([], {}, "0 frames"),
        ([GREY, GREY[:16]], {}, r"frames\[1\].*\[16, 32, 3\]"),
        ([GREY.astype(float)], {}, r"frames\[0\].*float64"),
        ([GREY, None], {}, r"frames\[1\].*None"),
        ([GREY[..., 0]], {}, r"frames\[0\]"),
        ([GREY] * 9, {"fps": 0}, "fps is 0"),
        ([GREY] * 9, {"fps": math.nan}, "fps is nan"),
        ([GREY] * 9, {"segments": 1}, "segments is 1"),
        ([GREY] * 20, {"switches": [5, 3]}, "switches"),
        ([GREY] * 20, {"switches": [20]}, "switches"),
        ([GREY] * 20, {"metrics": ["sharpnes"]}, "'sharpness'"),
        ([GREY] * 20, {"metrics": []}, "metrics"),
        ([GREY] * 20, {"metrics": ["motion", "motion"]}, "metrics"),
        ([GREY] * 20, {"metrics": ["ms_ssim_to_start"]}, "176 pixels.*32x32"),
    ],
)
def test_bad_input(frames, arguments, bad):
    with pytest.raises(UsageError, match=bad):
        drift(frames, **{"fps": 8, **arguments})


def test_a_uniform_video_has_no_drift():
    for level in (0, 99, 255):
        video = drift([np.full((32, 32, 3), level, np.uint8)] * 30, 8)
        losses = {name: metric.error or loss(metric) for name, metric in video.metrics.items()}
        assert all(value == pytest.approx(0, abs=1e-6) for value in losses.values()), losses


def test_a_metric_whose_package_is_missing_is_refused_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr("inferix.evaluate.metrics.find_spec", lambda name: None)
    assert {scorer.name for scorer in chosen_scorers()} == {
        "exposure", "contrast", "saturation", "clipping", "sharpness", "colour", "layout",
    }  # fmt: skip
    with pytest.raises(UsageError, match=r"'motion'.*cv2.*\[eval\]"):
        chosen_scorers(["motion"])
    assert {scorer.package for scorer in SCORERS.values()} - {None} == set(INSTALL)
