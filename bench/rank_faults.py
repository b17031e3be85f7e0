"""Faults of each rank of one world in turn: the error, seconds to it, and processes left, as a table in Markdown.

`python -m inferix.bench.rank_faults --ranks 4` starts a world of the untrained `wan-ranks` on processes of the CPU for
each fault: a rank is killed, stopped (it hangs), or made to fail at a plan.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..errors import RankFailed
from ..runtime.engine import Engine
from ..runtime.load import load
from ..runtime.parallel.messages import Message
from ..runtime.parallel.peers import Peer
from ..runtime.parallel.ranked_worker import RankedWorker
from ..runtime.plans import Offload, encode_plan

ENDS = 20.0  # seconds in which all processes must have ended
SEVERED = {"killed": signal.SIGKILL, "hung": signal.SIGSTOP}


def fail(worker: RankedWorker, peer: Peer) -> None:
    """Have one rank fail: at a plan for pages that it does not have."""
    values = {"number": worker.peers.ran + 1, "shapes": [], "place": None}
    peer.connection.send(Message("plan", values, encode_plan(Offload((1, 1), 0, (0,)))))


FAULTS: dict[str, Callable[[RankedWorker, Peer], None]] = {
    **{name: lambda worker, peer, number=number: os.kill(peer.pid, number) for name, number in SEVERED.items()},  # type: ignore[misc]
    "fails": fail,
}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def provoked(engine: Engine, rank: int, fault: Callable[[RankedWorker, Peer], None]) -> tuple[str, float, int]:
    """Error, seconds and processes left of a fault in the middle of a stream."""
    worker = engine.resources.worker
    assert isinstance(worker, RankedWorker)
    peers = worker.peers.peers
    rows = torch.ones(3, engine.spec.text_dim, dtype=engine.dtype)
    message = "none"
    with engine.open(prompt_embeds=rows) as session:
        list(session.stream(1, decode=False))
        fault(worker, peers[rank - 1])
        begun = time.monotonic()
        try:
            list(session.stream(1000, decode=False))
        except RankFailed as error:
            message = str(error)
        seconds = time.monotonic() - begun
    end = time.monotonic() + ENDS
    while (left := sum(is_alive(peer.pid) for peer in peers)) and time.monotonic() < end:
        time.sleep(0.05)
    return message, seconds, left


def table(ranks: int, timeout: float, parallel: str) -> Iterator[str]:
    yield "| fault | rank | error | seconds | processes left |"
    yield "|---|---|---|---|---|"
    for name, fault in FAULTS.items():
        for rank in range(1, ranks):
            engine = load(
                "wan-ranks", "self-forcing", device="cpu", gpus=ranks, parallel=parallel, rank_timeout=timeout,
                local_attn_size=6, denoising_step_list=[1000],
            )  # fmt: skip
            message, seconds, left = provoked(engine, rank, fault)
            yield f"| {name} | {rank} | {message} | {seconds:.1f} | {left} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds after which a rank hangs")
    parser.add_argument("--parallel", default="ulysses", help="layout of the ranks")
    chosen = parser.parse_args(arguments)
    for line in table(chosen.ranks, chosen.timeout, chosen.parallel):
        print(line, flush=True)


if __name__ == "__main__":
    main()
