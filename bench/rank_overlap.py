"""Time of collectives during which a rank computes, from the trace of a run; a serial order is an error.

`python -m inferix.bench.rank_overlap --out trace.json` runs the untrained `wan-ranks` on processes of the CPU, rank 0
of which decodes beside the next block, writes its trace for Perfetto, and prints what overlaps. With `--shard-decoder`
all ranks decode between passes: nothing overlaps, and the check fails.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InferixError, one_line_errors
from ..runtime.files import write_atomically
from ..runtime.load import load
from ..runtime.parallel.ranked_worker import RankedWorker

EXCHANGE = "exchange"  # the kind of work of collectives
DECODE = "decode "  # spans of the decoder's thread begin so
LEAST = 0.01  # share of collectives; calls one after another share an instant by rounding
Span = tuple[float, float]  # begin and end, in microseconds


@dataclass(frozen=True)
class Overlap:
    """Milliseconds of collectives, and of those the ones in which the rank computed as well."""

    collectives: float
    hidden: float

    @property
    def share(self) -> float:
        return self.hidden / self.collectives if self.collectives else 0.0


def spans(events: Iterable[Mapping[str, Any]]) -> tuple[list[Span], list[Span]]:
    """Spans of collectives, and of calls and decodes that compute."""
    waiting, computing = list[Span](), list[Span]()
    for event in events:
        if event["ph"] != "X":
            continue
        span, kind = (event["ts"], event["ts"] + event["dur"]), event["args"].get("kind")
        if kind == EXCHANGE:
            waiting.append(span)
        elif kind is not None or event["name"].startswith(DECODE):
            computing.append(span)
    return waiting, computing


def joined(spans: Iterable[Span]) -> list[Span]:
    """Spans without overlaps, in order, that cover the same time."""
    merged = list[Span]()
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def overlap(trace: Mapping[str, Any]) -> Overlap:
    """Overlap of one rank, from a trace of `Profile`."""
    waiting, computing = map(joined, spans(trace["traceEvents"]))
    hidden = sum(max(0.0, min(end, last) - max(begin, first)) for begin, end in waiting for first, last in computing)
    return Overlap(sum(end - begin for begin, end in waiting) / 1e3, hidden / 1e3)


def check(trace: Mapping[str, Any]) -> Overlap:
    """The overlap; InferixError where collectives and compute are in a serial order, or there are no collectives."""
    result = overlap(trace)
    if not result.collectives:
        raise InferixError("the trace has no collective; profile a run of several ranks with executor=fused")
    if result.share < LEAST:
        raise InferixError(
            f"{result.hidden:.1f} of {result.collectives:.1f} ms of collectives overlap with compute: a serial order"
        )
    return result


def run(ranks: int, blocks: int, shard_decoder: bool) -> dict[str, Any]:
    """Trace of rank 0 of a stream on `ranks` processes of the CPU."""
    torch.set_num_threads(1)  # a CPU decodes beside passes where torch has one thread
    engine = load(
        "wan-ranks", "self-forcing", device="cpu", gpus=ranks, parallel="ulysses", executor="fused",
        shard_decoder=shard_decoder, local_attn_size=6, denoising_step_list=[1000, 500], text_prompts=False,
    )  # fmt: skip
    worker = engine.resources.worker
    assert isinstance(worker, RankedWorker)
    try:
        profile = engine.start_profile()
        with engine.open(prompt_embeds=torch.ones(3, engine.spec.text_dim)) as session:
            list(session.stream(blocks))
        return profile.trace()
    finally:
        worker.end()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--shard-decoder", action="store_true", help="decode on all ranks, between passes")
    parser.add_argument("--out", type=Path, help="file for the trace, which Perfetto opens")
    chosen = parser.parse_args(arguments)
    trace = run(chosen.ranks, chosen.blocks, chosen.shard_decoder)
    if chosen.out is not None:
        write_atomically(chosen.out, lambda part: part.write_text(json.dumps(trace), "utf-8"))
    result = check(trace)
    print(
        f"{result.hidden:.1f} of {result.collectives:.1f} ms of collectives overlap with compute ({result.share:.0%})"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
