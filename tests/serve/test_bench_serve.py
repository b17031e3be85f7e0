"""The benchmark of a server: a simulated player, quantiles, and one measurement with a refusal."""

import asyncio

from live_client import PROMPT, serving

from inferix.bench import churn
from inferix.bench.machine import environment
from inferix.bench.report import write_report
from inferix.bench.result import read_result, write_result
from inferix.bench.serve import BUFFER, Player, quantiles, result_of, row, step
from inferix.serve.settings import ServeSettings


def test_a_player_counts_the_times_that_it_has_nothing_to_show():
    player = Player(4.0)
    for now in (0.0, 0.9, 1.0 + 2 * BUFFER, 2.0, 9.0):
        player.add(now, 4)
    assert player.underruns == 1 and player.end == 10.0


def test_quantiles_are_values_that_were_measured():
    assert quantiles([]) is None
    assert quantiles(range(100)) == {"p50": 50, "p95": 95, "p99": 99}
    assert quantiles([3.0]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}


def test_sessions_are_measured_until_one_is_refused(tmp_path):
    with serving(ServeSettings(sessions=1, queue=0), tmp_path) as served:
        one = asyncio.run(step(served.url, None, 2, 4.0, PROMPT, "raw"))
    measured = row(one)
    assert measured["sessions"] == 1 and "1 sessions are open" in measured["refused"]
    assert measured["first_picture"]["p50"] > 0 and measured["blocks"] > 0
    settings = {"arguments": [], "seconds": 4.0, "media": "raw", "url": None}
    result = result_of([one], environment("cpu"), settings)
    (tmp_path / "results").mkdir()
    assert read_result(write_result(result, tmp_path / "results" / "serve.json")) == result
    write_report(tmp_path / "results", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text("utf-8")
    first = measured["first_picture"]["p50"] * 1e3
    assert "1 sessions are open" in page and f"| 1 | {first:.0f} /" in page


def test_clients_that_come_and_go_leave_nothing_behind(tmp_path, monkeypatch):
    """Each way of ending a few times; a session that is left open is seen."""
    monkeypatch.setattr(churn, "WATCHED", (0.1, 0.3))
    monkeypatch.setattr(churn, "CATCH_UP", 0.2)
    limits = {"resume_seconds": 0.3, "stall_seconds": 2.0, "start_seconds": 0.3}
    settings = ServeSettings(sessions=3, queue=1, realtime=False, recordings_kept=1, **limits)
    (tmp_path / "results").mkdir()
    with serving(settings, tmp_path) as served:
        result = churn.run(served.url, [], 2 / 60, 3, PROMPT, None, print, stalled=0.5)
        assert result.facts["faults"] == [] and result.facts["counts"]["blocks"] > 2, result.facts
        monkeypatch.setattr(churn, "PATIENCE", 0.5)
        served.server.metrics.live.set(1)
        one = churn.Churn(served.url, None, PROMPT, 0, 0.0, 0.0)
        asyncio.run(churn.check_empty(one, one.figures))
        assert "inferix_live_sessions 1" in one.figures.faults[0]
    assert read_result(write_result(result, tmp_path / "results" / "churn.json")) == result
    write_report(tmp_path / "results", tmp_path / "page.md")
    assert f"sessions {result.facts['counts']['sessions']}" in (tmp_path / "page.md").read_text("utf-8")


def test_growth_is_that_after_the_first_tenth():
    figures = churn.Figures(seconds=100.0)
    figures.samples = [churn.Sample(float(at), 1000 if at < 10 else 5000 + at, 3, 4) for at in range(100)]
    rows = figures.rows()
    assert (rows[0]["memory"], rows[1]["memory"], rows[9]["memory"], rows[9]["files"]) == (1000, 5014, 5094, 3)
    assert figures.growth() == 80
