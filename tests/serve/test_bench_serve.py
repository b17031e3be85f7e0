"""The benchmark of a server: a simulated player, quantiles, and one measurement with a refusal."""

import asyncio

from live_client import PROMPT, serving

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
