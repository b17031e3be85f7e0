"""CPU time of awaiting readers: `astream` of many sessions on one event loop, beside the thread that makes blocks.

python -m inferix.bench.reader_cost 256 4    # readers, blocks of each; wan-tiny, executor eager, on a CPU

The time is that of the loop's thread (`time.thread_time`), so what the engine computes is not in it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Annotated, Any

import torch
import typer

from ..errors import one_line_errors
from ..runtime.limits import Limits
from ..runtime.load import load
from ..runtime.sessions.session import Session

SETTINGS: dict[str, Any] = {"local_attn_size": 6, "denoising_step_list": [1000]}
SIZE = (32, 32)


def measure(readers: int, blocks: int) -> float:
    """Seconds of CPU time of the loop's thread for each block that `readers` sessions deliver."""
    engine = load("wan-tiny", "self-forcing", device="cpu", executor="eager", limits=Limits(queue_blocks=1), **SETTINGS)
    sessions = [engine.open(prompt="a canal", seed=seed, size=SIZE) for seed in range(readers)]
    engine.hand_over()
    thread = threading.Thread(target=engine.run, kwargs={"keep": True}, name="inferix-engine")
    thread.start()
    try:
        engine.soon(lambda: None).result()  # that thread drives the engine now
        begun = time.thread_time()
        asyncio.run(read_all(sessions, blocks))
        return (time.thread_time() - begun) / (readers * blocks)
    finally:
        engine.halt()
        thread.join()


async def read_all(sessions: list[Session], blocks: int) -> None:
    await asyncio.gather(*(read(session, blocks) for session in sessions))


async def read(session: Session, blocks: int) -> None:
    async for _ in session.astream(blocks, decode=False):
        pass


def main(
    readers: Annotated[int, typer.Argument(min=1, help="Sessions, each with a reader.")] = 256,
    blocks: Annotated[int, typer.Argument(min=1, help="Blocks that each reader takes.")] = 4,
) -> None:
    """Print the CPU time of one reader, and that of many on one loop, for each block delivered."""
    torch.set_num_threads(1)
    for count in (1, readers):
        cost = 1e3 * measure(count, blocks)
        print(f"{count} awaiting readers, {blocks} blocks of each: {cost:.3f} ms of CPU a block")


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
