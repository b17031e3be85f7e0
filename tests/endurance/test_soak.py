"""A short soak of one engine, and a longer one marked slow."""

from __future__ import annotations

import os
from functools import partial

import pytest
from endurance.soak import GROWTH, PROMPTS, SIZE, Soak, soak


def test_threads_and_failing_decoders_leave_nothing_behind() -> None:
    figures = soak(3.0, 0, 3)
    assert not figures.faults, figures.faults[0]
    assert figures.counts["blocks"] and figures.counts["sessions"] > 3


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    figures = soak(60 * float(os.environ.get("MINUTES", "2")), 1, 4)
    assert not figures.faults, figures.faults[0]
    assert figures.rss[-1][1] - figures.memory(0.1) < GROWTH


def test_a_session_that_is_left_open_is_seen(tmp_path, monkeypatch) -> None:
    soaked = Soak(0, 1, tmp_path)
    client = soaked.clients[0]
    leave = partial(soaked.engine.open, prompt_embeds=PROMPTS[0], size=SIZE)
    monkeypatch.setattr(client, "run", lambda: client.soon(leave))
    assert any("sessions" in fault for fault in soaked.run(0.5, lambda figures: None).faults)
