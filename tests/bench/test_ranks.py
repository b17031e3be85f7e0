"""Benchmarks of a block and of a stream on several ranks: what is timed, what a result says, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from oracles import SIZE
from thread_ranks import pair
from typer.testing import CliRunner

from inferix.bench import block
from inferix.bench.block import Options
from inferix.bench.report import page
from inferix.bench.result import Result, read_result
from inferix.bench.subject import Subject, open_engine
from inferix.cli.main import app
from inferix.errors import UsageError

RANKED = Subject("wan-ranks", device="cpu", gpus=2)
SETTINGS = ["--set", "local_attn_size=3", "--set", "denoising_step_list=[1000]"]


def timed(monkeypatch: pytest.MonkeyPatch, ranks: int) -> Result:
    """A block of the same weights on one rank or on several."""
    settings: dict[str, object] = {"local_attn_size": 3, "denoising_step_list": [1000]}
    with pair("self-forcing", "ulysses", **settings) as (alone, ranked):
        monkeypatch.setattr(block, "open_engine", lambda subject: ranked if ranks > 1 else alone)
        subject = replace(RANKED, model="wan-tiny", size=SIZE, gpus=ranks)
        return block.run(Options(subject, 1, 2, ("eager",), ("none",)), lambda line: None)


def test_a_block_on_ranks_is_timed_and_the_result_has_their_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = timed(monkeypatch, 1), timed(monkeypatch, 2)
    assert "ranks" not in one.subject and (one.gpus, two.gpus) == (1, 2)
    assert two.subject["ranks"] == {"count": 2, "layout": "ulysses", "shard_weights": False, "reason": None}
    assert two.settings["config"]["gpus"] == 2 and two.device_name == f"2 x {one.device_name}, ulysses"
    assert len(two.of("eager")["block"].samples) == len(two.of("eager")["transformer"].samples) == 2
    assert {"plain", "diffusers"} <= two.facts["left_out"].keys()
    cache = [result.facts["candidates"]["eager"]["memory"]["cache"] for result in (one, two)]
    assert cache[0] == 2 * cache[1]  # of rank 0
    assert "2 x " in page({"two.json": two}, "results", "page.md", {})


def test_ranks_of_a_benchmark_are_refused_by_name_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: tuple[tuple[dict[str, object], str], ...] = (
        ({"gpus": 3, "parallel": "ulysses"}, "gpus.*3.*gpus=2"),
        ({"gpus": None, "parallel": "pass-q"}, "parallel.*pass-q.*gpus"),
        ({"model": "tinyworld", "random_weights": True}, "random_weights.*gpus=2"),
        ({"overrides": {"shard_wieghts": True}}, "shard_wieghts.*shard_weights"),
    )
    for change, words in wrong:
        with pytest.raises(UsageError, match=words):
            open_engine(replace(RANKED, **change))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    for command in ("block", "stream"):
        done = CliRunner().invoke(app, ["bench", command, "--model", "wan-ranks", "--device", "cpu", *SETTINGS])
        assert done.exit_code == 2 and "gpus is 2" in done.stderr and "torchrun" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("block", ["--rounds", "1", "--executor", "eager", "--executor", "fused"]),
        ("stream", ["--starts", "1", "--executor", "fused", "--sessions", "2"]),
    ],
)
def test_the_commands_start_ranks_of_their_own(command: str, options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    where = ["--model", "wan-ranks", "--device", "cpu", "--gpus", "2", "--blocks", "2", "--out", str(out), "--json"]
    done = CliRunner().invoke(app, ["bench", command, *where, *SETTINGS, *options])
    assert done.exit_code == 0, done.output
    result = read_result(out)
    assert result.subject["ranks"]["layout"] == "ulysses" and "predicted" in result.subject["ranks"]["reason"]
    assert json.loads(done.stdout) == json.loads(out.read_text())
    if command == "stream":
        assert {"start/first frame, cold", "fused/interval", "fused/control to pixel"} <= result.series.keys()
        assert [point["sessions"] for point in result.facts["sessions"]] == [1, 2]
        return
    for name in ("eager", "fused"):
        facts = result.facts["candidates"][name]
        assert facts["refused"] is None and facts["difference"] <= result.facts["tolerance"]
        assert len(result.of(name)["block"].samples) == 2
    assert "exchange" in result.facts["candidates"]["fused"]["profile"]["families"]
