"""Times of layouts: any prompt length and guidance that a model has, and only those that fit."""

import json

import pytest

import inferix
from inferix import UsageError
from inferix.bench import rank_layouts
from inferix.bench.rank_layouts import measure, timed
from inferix.errors import RankFailed
from inferix.runtime.capacity.measured_layouts import read_measured

SETTINGS = {
    "self-forcing": {"denoising_step_list": [1000]},
    "causal-diffusion": {"num_steps": 2},  # guidance, which asks for a negative prompt
}


@pytest.mark.parametrize("preset", SETTINGS)
def test_a_steady_block_is_timed(preset):
    engine = inferix.load(
        "wan-tiny", preset=preset, device="cpu", text_prompts=False, local_attn_size=3, num_frame_per_block=1,
        **SETTINGS[preset],
    )  # fmt: skip
    assert timed(engine, (32, 32), 1) > 0


def test_a_window_that_is_never_full_is_refused():
    engine = inferix.load("wan-tiny", device="cpu", text_prompts=False, local_attn_size=-1)
    with pytest.raises(UsageError, match="local_attn_size is -1"):
        timed(engine, (32, 32), 1)


def measured(monkeypatch, gpus, fits, fails=()):
    """A table of a small model, of the layouts that fit; all are timed without ranks, and some fail meanwhile."""
    small = {"device": "cpu", "text_prompts": False, "local_attn_size": 3}
    engine = inferix.load("wan-tiny", **small)

    def load(model, preset, gpus=1, parallel="one", shard_weights=False, **arguments):
        if (parallel, gpus, shard_weights) not in fits:
            raise UsageError(f"{parallel} on {gpus} needs more memory")
        loaded.append((parallel, gpus, shard_weights))
        return engine

    def timed(*_):
        if loaded[-1] in fails:
            raise RankFailed("rank 1 ended")
        return 5.0

    loaded, lines, kept = [], [], []
    monkeypatch.setattr(rank_layouts, "load", load)
    monkeypatch.setattr(rank_layouts, "timed", timed)
    table = measure(
        "wan-tiny", None, gpus, "cpu", None, 1, {}, lines.append, lambda table: kept.append(len(table["layouts"]))
    )
    assert kept == list(range(1, len(table["layouts"]) + 1))
    return table, lines


def test_a_layout_whose_ranks_fail_is_left_out_and_the_others_stay(monkeypatch):
    fits = {("one", 1, False), ("ulysses", 2, False), ("pass-q", 2, False), ("pass-q", 2, True)}
    table, lines = measured(monkeypatch, 2, fits, fails={("ulysses", 2, False), ("pass-q", 2, False)})
    rows = [(row["layout"], row["ranks"], row["shard_weights"]) for row in table["layouts"]]
    assert rows == [("one", 1, False), ("pass-q", 2, True)]
    assert any("ulysses on 2 is left out: rank 1 ended" in line for line in lines)


def test_a_model_that_one_gpu_cannot_hold_is_timed_on_several(monkeypatch, tmp_path):
    fits = {("ulysses", 2, True), ("pass-q", 2, False), ("ulysses", 4, False)}
    table, lines = measured(monkeypatch, 4, fits)
    assert {(row["layout"], row["ranks"], row["shard_weights"]) for row in table["layouts"]} == fits
    assert any("one on 1 is left out: one on 1 needs more memory" in line for line in lines)
    (tmp_path / "table.json").write_text(json.dumps(table))
    read = read_measured(str(tmp_path / "table.json"))
    assert read.block("ulysses", 2, True) == 5.0 and read.block("one", 1, False) is None
    assert read.about["settings"]["local_attn_size"] == 3 and read.about["settings"]["num_frame_per_block"] == 3
    with pytest.raises(UsageError, match="one on 1 needs more memory"):
        measured(monkeypatch, 2, set())
