"""Overhead of `--profile`: blocks of two engines, one with profiling, alternating, so that both see the same machine.

python -m inferix.bench.profile_cost 100      # pairs of blocks of wan-tiny, executor fused, on a CPU
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median, quantiles
from typing import Annotated

import torch
import typer

from ..errors import UsageError, one_line_errors
from ..runtime.load import load

WARM = 8  # blocks; the window is full by then
GROUP = 10  # pairs whose medians are one sample of the overhead
NAMES = ("without", "with")


def main(pairs: Annotated[int, typer.Argument(help="Pairs of blocks to time.")] = 100) -> None:
    """Print block times in processor seconds of the thread, and the overhead with its spread over groups of pairs."""
    if pairs < 2 * GROUP:
        raise UsageError(f"pairs is {pairs}; expected {2 * GROUP} or more, for two groups that can differ")
    torch.set_num_threads(1)
    engines = [load("wan-tiny", device="cpu", executor="fused") for _ in NAMES]
    engines[1].start_profile()
    seconds: list[list[float]] = [[], []]
    with ExitStack() as stack:
        sessions = [stack.enter_context(engine.open(prompt="a paper boat on a canal")) for engine in engines]
        streams = [session.stream(WARM + pairs, decode=False) for session in sessions]
        for pair in range(-WARM, pairs):
            for which in (0, 1) if pair % 2 else (1, 0):  # neither is always first
                begin = time.thread_time()
                next(streams[which])
                if pair >= 0:
                    seconds[which].append(time.thread_time() - begin)
    for name, times in zip(NAMES, seconds, strict=True):
        low, middle, high = (1e3 * value for value in quantiles(times, n=4))
        print(f"{name:<8}{len(times)} blocks, median {middle:.2f} ms, quartiles {low:.2f} to {high:.2f}")
    groups = [[median(times[at : at + GROUP]) for times in seconds] for at in range(0, pairs - GROUP + 1, GROUP)]
    low, middle, high = quantiles([profiled / plain - 1 for plain, profiled in groups], n=4)
    print(f"overhead {middle:+.2%}, quartiles {low:+.2%} to {high:+.2%} over {len(groups)} groups of {GROUP} pairs")


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
