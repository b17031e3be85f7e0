"""Overlap of collectives and compute, from traces: counted, and a serial order rejected."""

from __future__ import annotations

from typing import Any

import pytest

from inferix import InferixError
from inferix.bench.rank_overlap import check, overlap, run


def span(name: str, begin: float, end: float, kind: str | None = None) -> dict[str, Any]:
    args = {} if kind is None else {"kind": kind}
    return {"ph": "X", "name": name, "pid": 0, "tid": 2, "ts": begin * 1e3, "dur": (end - begin) * 1e3, "args": args}


SERIAL = [span("all_to_all", 0, 10, "exchange"), span("mm", 10, 30, "matmul"), span("all_to_all", 30, 40, "exchange")]


def test_time_of_collectives_beside_compute_is_counted_once() -> None:
    beside = [span("decode 0", 5, 34), span("decode 1", 33, 38), span("block 1", 0, 40), {"ph": "M", "name": "calls"}]
    found = check({"traceEvents": [*SERIAL, *beside]})
    assert (found.collectives, found.hidden, found.share) == (20.0, 13.0, 0.65)


@pytest.mark.parametrize(
    "events",
    [
        SERIAL, [*SERIAL, span("decode 0", 12, 28)], [*SERIAL, span("block 1", 0, 40)],
        [*SERIAL, span("mm", 9.999, 30.001, "matmul")],
    ],
)  # fmt: skip
def test_a_serial_order_is_rejected(events: list[dict[str, Any]]) -> None:
    assert overlap({"traceEvents": events}).hidden < 0.1
    with pytest.raises(InferixError, match=r"20\.0 ms"):
        check({"traceEvents": events})


def test_a_trace_without_collectives_is_rejected() -> None:
    with pytest.raises(InferixError, match="no collective"):
        check({"traceEvents": [span("mm", 0, 1, "matmul"), span("decode 0", 0, 1)]})


@pytest.mark.slow
def test_rank_0_decodes_while_collectives_of_the_next_block_run() -> None:
    assert check(run(2, 6, shard_decoder=False)).hidden > 0
    with pytest.raises(InferixError, match="serial"):
        check(run(2, 3, shard_decoder=True))
