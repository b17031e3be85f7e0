"""Bandwidth and latency between ranks, measured by their collectives, for `inferix plan --link FILE`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import UsageError
from ..runtime.capacity.device_name import card_of
from ..runtime.files import check_output, write_atomically
from ..runtime.load import load
from ..runtime.parallel.ranked_worker import RankedWorker
from ..runtime.plans import TimeExchange

MODEL = "wan-ranks"  # small, and divided by many numbers of ranks
SMALL, LARGE = 1 << 10, 1 << 24  # bytes that each rank has in a collective
CALLS, ROUNDS = 20, 5


def measure(gpus: int, device: str | None, log: Callable[[str], object]) -> dict[str, Any]:
    """Time all-to-alls of few and of many bytes between `gpus` ranks.

    Returns bandwidth (GB/s that a rank sends) and latency (us of a collective), the medians of some rounds, with what
    was measured. UsageError for one rank, and for a number that no layout of the small model has.
    """
    if gpus < 2:
        raise UsageError(f"gpus is {gpus}; expected 2 or more, between which there is a link")
    engine = load(MODEL, device=device, gpus=gpus, text_prompts=False)
    worker = engine.resources.worker
    assert isinstance(worker, RankedWorker)

    def seconds(nbytes: int) -> list[float]:
        return [float(worker.execute(TimeExchange(nbytes, CALLS))[0]) for _ in range(ROUNDS)]

    try:
        few = seconds(SMALL)
        log(f"{SMALL} bytes: {median(few) * 1e6:.1f} us")
        many = seconds(LARGE)
        log(f"{LARGE} bytes: {median(many) * 1e3:.2f} ms")
    finally:
        worker.end()
    sent = LARGE - LARGE // gpus
    moving = max(median(many) - median(few), 1e-9)
    return {
        "bandwidth": sent / moving / 1e9, "latency": median(few) * 1e6, "gpus": gpus, "device": card_of(engine.device),
        "bytes": [SMALL, LARGE], "seconds": [few, many],
    }  # fmt: skip


def write(result: Mapping[str, Any], out: Path) -> None:
    """Write a link as `inferix plan --link` reads it, or layouts as `--measured` does."""
    write_atomically(check_output(out), lambda part: part.write_text(json.dumps(result, indent=1) + "\n", "utf-8"))
