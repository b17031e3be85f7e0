"""Faults of each rank of one world in turn: the error, seconds to it, and processes left, as a table in Markdown.

`python -m inferix.bench.rank_faults --ranks 4` starts a world of the untrained `wan-ranks` on processes of the CPU for
each fault: a rank is killed, stopped (it hangs), or made to fail at a plan. Rank 0 has a process of its own, of which
nobody is left to see an error once it has ended; where it is stopped, the other ranks report it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RankFailed
from ..runtime.engine import Engine
from ..runtime.load import load
from ..runtime.parallel.messages import Message
from ..runtime.parallel.peers import Peer
from ..runtime.parallel.ranked_worker import RankedWorker
from ..runtime.plans import Offload, PassPlan, encode_plan

ENDS = 20.0  # seconds in which all processes must have ended
SEVERED = {"killed": signal.SIGKILL, "hung": signal.SIGSTOP}


ENDINGS = {"killed": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}  # of rank 0
WORLD = """
from inferix.bench.rank_faults import world
engine = world({ranks}, {timeout}, {parallel!r})
print(*(peer.pid for peer in engine.resources.worker.peers.peers), flush=True)
with engine.open(prompt="fog") as session:
    for _ in session.stream(1000000, decode=False):
        print(flush=True)
"""


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


def world(ranks: int, timeout: float, parallel: str) -> Engine:
    return load(
        "wan-ranks", "self-forcing", device="cpu", gpus=ranks, parallel=parallel, rank_timeout=timeout,
        local_attn_size=6, denoising_step_list=[1000],
    )  # fmt: skip


def left_after(pids: Sequence[int], begun: float) -> tuple[float, int]:
    """Seconds until processes have ended, and how many have not after `ENDS`."""
    while (left := sum(map(is_alive, pids))) and time.monotonic() < begun + ENDS:
        time.sleep(0.02)
    return time.monotonic() - begun, left


def ended(ranks: int, timeout: float, parallel: str, number: signal.Signals) -> tuple[float, int]:
    """Seconds from a signal to rank 0, in the middle of a stream, to the end of all ranks, and processes left."""
    script = WORLD.format(ranks=ranks, timeout=timeout, parallel=parallel)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == ranks - 1 and process.stdout.readline() == "\n"
        process.send_signal(number)
        return left_after([process.pid, *pids], time.monotonic())


def stopped(ranks: int, timeout: float, parallel: str) -> tuple[str, float, int]:
    """Error, seconds to the end of the other ranks, and processes left where rank 0 is stopped in a stream.

    Rank 0 goes on after that, and has to end as well.
    """
    command = [sys.executable, "-c", WORLD.format(ranks=ranks, timeout=timeout, parallel=parallel)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == ranks - 1 and process.stdout.readline() == "\n"
        guard = threading.Timer(timeout + ENDS, process.kill)
        guard.start()
        process.send_signal(signal.SIGSTOP)
        begun = time.monotonic()
        try:
            message = next((line.strip() for line in process.stderr if "rank 0" in line), "none")
            seconds, left = left_after(pids, begun)
        finally:
            process.send_signal(signal.SIGCONT)
            guard.cancel()
        _, errors = process.communicate(timeout=ENDS)
        assert RankFailed.__name__ in errors, errors
        return message, seconds, left + is_alive(process.pid)


def failed_alone(engine: Engine) -> tuple[str, float, int]:
    """Error, seconds and processes left where rank 0 fails in the middle of a pass that the other ranks run."""

    def fails(plan: PassPlan, latents: Tensor) -> list[Tensor]:
        raise ValueError("out of luck")

    return provoked(engine, 1, lambda worker, peer: worker.local.runs.update({PassPlan: fails}))


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
    return message, seconds, left_after([peer.pid for peer in peers], time.monotonic())[1]


def table(ranks: int, timeout: float, parallel: str) -> Iterator[str]:
    yield "| fault | rank | error | seconds | processes left |"
    yield "|---|---|---|---|---|"
    for name, number in ENDINGS.items():
        seconds, left = ended(ranks, timeout, parallel, number)
        yield f"| {name} | 0 | | {seconds:.1f} | {left} |"
    message, seconds, left = stopped(ranks, timeout, parallel)
    yield f"| stopped | 0 | {message} | {seconds:.1f} | {left} |"
    message, seconds, left = failed_alone(world(ranks, timeout, parallel))
    yield f"| fails | 0 | {message} | {seconds:.1f} | {left} |"
    for name, fault in FAULTS.items():
        for rank in range(1, ranks):
            message, seconds, left = provoked(world(ranks, timeout, parallel), rank, fault)
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
