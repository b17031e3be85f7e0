"""The contract of session-batching runtimes, as such a runtime would use it: by structure, in one thread."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from live_client import PROMPT, small_engine

from inferix.errors import UsageError
from inferix.runtime.sessions.lifecycle import State
from inferix.serve.session_batch import SessionBatch
from inferix.serve.settings import ServeSettings


class NoRoom(RuntimeError):
    """A runtime's own error."""


@dataclass
class Init:
    session_id: str
    context: dict[str, Any] = field(default_factory=dict)


def test_sessions_by_the_contract_are_those_of_the_engine():
    engine = small_engine(ServeSettings(sessions=2), rewind_blocks=0)
    alone = {}
    for seed, prompt in ((3, PROMPT), (4, "a blue fox in a green meadow at sunset")):
        session = engine.open(prompt, seed=seed)
        alone[seed] = [block.frames for block in session.stream(2)]
        if seed == 3:
            session.act("left")
        alone[seed] += [block.frames for block in session.stream(2)]
        session.close()
    batch = SessionBatch(engine, 2, NoRoom)
    facts = batch.manifest()
    assert facts.chunk_shape == (4, 64, 64, 3) and facts.rate_hz * facts.frames_per_chunk == engine.fps
    assert replace(facts, max_sessions=5).max_sessions == 5
    made: dict[str, list[Any]] = {"a": [], "b": []}

    def drive():
        batch.attach(Init("a", {"prompt": PROMPT, "seed": 3}))
        batch.attach(Init("b", {"prompt": "a blue fox in a green meadow at sunset", "seed": 4}))
        with pytest.raises(NoRoom, match="2"):
            batch.attach(Init("c", {"prompt": PROMPT}))
        for conditioning in ({}, {}, {"action": "left"}, {"action": "left"}):
            for result in batch.step({"a": conditioning, "b": {}}):
                made[result.session_id].append(result.output)
                assert result.stats["denoise_ms"] > 0
        batch.finalize(["a", "b"])
        assert [result.session_id for result in batch.step({"b": {}, "a": {"jump": 1}})] == ["b"]
        assert [result.session_id for result in batch.step({"b": {}, "a": {"camera": [1]}})] == ["b"]
        with pytest.raises(UsageError, match="'c'"):
            batch.step({"c": {}})
        with pytest.raises(UsageError, match="colour"):
            batch.attach(Init("d", {"colour": 1}))
        for name in ("a", "a", "b"):
            batch.detach(name)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(drive).result()
    for name, seed in (("a", 3), ("b", 4)):
        assert len(made[name]) == 4
        assert all(np.array_equal(one, other) for one, other in zip(made[name], alone[seed], strict=True))
    assert engine.metrics()["gauges"]["pages_in_use"] == 0
    engine.hand_over()
    engine.check_integrity()


@pytest.mark.parametrize("most", [0, 1.5, "2"])
def test_a_number_of_sessions_that_is_none_is_refused(most):
    with pytest.raises(UsageError, match="max_sessions"):
        SessionBatch(None, most)


def test_a_session_that_fails_has_no_result_and_another_error_is_raised(monkeypatch):
    engine = small_engine(ServeSettings(sessions=2))
    batch, look = SessionBatch(engine, 2), engine.loop.finite.now
    failing = iter([ValueError("planted")])

    def now(block, latents):
        for error in failing:
            raise error
        look(block, latents)

    def drive():
        for name in "ab":
            batch.attach(Init(name, {"prompt": PROMPT}))
        monkeypatch.setattr(engine.loop.finite, "now", now)
        (result,) = batch.step({"a": {}, "b": {}})
        failed = batch.attached["b" if result.session_id == "a" else "a"].session
        assert failed.state is State.FAILED
        monkeypatch.setattr(engine.manager.delivery, "next_block", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.step({result.session_id: {}})

    with ThreadPoolExecutor(1) as pool:
        pool.submit(drive).result()
