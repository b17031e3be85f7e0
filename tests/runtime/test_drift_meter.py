"""The live drift meter: planted drifts, its baseline, and its place in a session's records and metrics."""

import numpy as np
import pytest
from oracles import ROWS, SIZE, make_engine

from inferix.runtime.telemetry.drift_meter import SIGNALS, DriftMeter, block_signals

FPS = 8
WORLD = np.clip(np.random.default_rng(0).normal(120, 40, (48, 64, 3)), 0, 200)


def blocks(change, count=8):
    """Blocks of 4 frames of a picture that moves by a pixel each frame; `change` of part 0..1 of the way."""
    for block in range(count):
        moved = [np.roll(WORLD, 4 * block + frame, axis=1) for frame in range(4)]
        yield np.clip(change(np.stack(moved), block / (count - 1)), 0, 255).astype(np.uint8)


def run(change):
    meter = DriftMeter(FPS)
    return [meter.compare(meter.read(frames), len(frames)) for frames in blocks(change)]


def blurred(frames, part):
    return (1 - part / 2) * frames + part / 2 * np.roll(frames, 1, axis=2)


@pytest.mark.parametrize(
    ("change", "name", "sign"),
    [
        (lambda frames, part: frames * (1 - part / 2), "brightness", -1),
        (lambda frames, part: frames.mean() + (frames - frames.mean()) * (1 - part / 2), "contrast", -1),
        (lambda frames, part: frames * [1, 1 - part / 2, 1 - part / 2], "saturation", 1),
        (blurred, "sharpness", -1),
        (lambda frames, part: frames if part < 0.5 else frames[[0] * 4], "motion", -1),
    ],
)
def test_planted_drifts(change, name, sign):
    changes = run(change)[-1]
    assert set(changes) == {*SIGNALS, "layout"}
    assert sign * changes[name] > 0.1


def test_a_steady_stream_has_no_drift():
    steady = run(lambda frames, part: frames)
    assert steady[:4] == [{}] * 4  # two seconds
    assert all(abs(change) < 0.05 for changes in steady[4:] for name, change in changes.items() if name != "layout")


def test_layout_sees_another_scene_and_no_fade():
    meter, picture = DriftMeter(FPS), np.linspace(0, 200, 64)[None, None, :, None] * np.ones((16, 48, 1, 3))
    assert meter.compare(meter.read(picture.astype(np.uint8)), 16) == {}
    faded, other = (picture / 2).astype(np.uint8), picture[:, :, ::-1].astype(np.uint8)
    assert meter.compare(meter.read(faded), 16)["layout"] == pytest.approx(0, abs=0.01)
    assert meter.compare(meter.read(other), 16)["layout"] == pytest.approx(2, abs=0.01)


def test_a_prompt_change_starts_a_new_baseline():
    meter = DriftMeter(FPS)
    bright, dark = (np.full((16, 48, 64, 3), level, np.uint8) for level in (200, 50))
    assert meter.compare(meter.read(bright), 16) == {}
    assert meter.compare(meter.read(dark), 16)["brightness"] == pytest.approx(-0.75)
    assert meter.compare(meter.read(dark), 16, restart=True) == {}
    assert meter.compare(meter.read(dark), 16)["brightness"] == 0


def test_blocks_of_one_frame_have_motion_from_the_second_on():
    signals, before = block_signals(np.zeros((1, 16, 16, 3), np.uint8), None)
    assert np.isnan(signals[SIGNALS.index("motion")])
    signals, _ = block_signals(np.full((1, 16, 16, 3), 255, np.uint8), before)
    assert signals[SIGNALS.index("motion")] == pytest.approx(1)


@pytest.mark.parametrize("metered", [False, True])
def test_records_and_metrics_of_a_session(metered):
    engine = make_engine(dtype="float32", denoising_step_list=[1000], drift_meter=metered)
    records = []
    engine.observe(records.append)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        made = list(session.stream(5))
    drifts = [block.record.drift for block in made]
    names = {name for name in engine.metrics()["histograms"] if name.startswith("drift_")}
    if metered:
        assert drifts[0] == {} and set(drifts[-1]) == {*SIGNALS, "layout"}
        assert "drift" in made[-1].record.seconds
        assert names == {"drift_seconds", *(f"drift_{name}_share" for name in (*SIGNALS, "layout"))}
    else:
        assert drifts == [None] * 5 and not names
    assert [record["drift"] for record in records if "passes" in record] == drifts
