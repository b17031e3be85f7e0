"""Blocks of one session on their way out, from when they are begun until a reader takes them: a bounded queue."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..engine_condition import Bell
from ..telemetry.records import Ack, BlockRecord


@dataclass(frozen=True)
class Block:
    """A finished block: latents [F, C, H, W], frames uint8 [T, H, W, 3] or None, seconds per stage.

    acks: the controls that it is the first to show. record: all that was measured.
    """

    index: int
    latents: Tensor
    frames: NDArray[np.uint8] | None
    timings: dict[str, float]
    acks: tuple[Ack, ...]
    record: BlockRecord

    def __repr__(self) -> str:
        frames = None if self.frames is None else list(self.frames.shape)
        return f"<Block {self.index}, latents {list(self.latents.shape)}, frames {frames}>"


class Outbox:
    """Blocks of one session from when they are begun until someone takes them, `room` at most."""

    def __init__(self, bell: Bell, room: int) -> None:
        self.bell, self.room = bell, room
        self.ready: deque[Block] = deque()
        self.unfinished = 0  # begun, not ready
        self.touched = time.perf_counter()  # when a reader last took a block, or there was none to take

    def __len__(self) -> int:
        return len(self.ready) + self.unfinished

    @property
    def full(self) -> bool:
        return len(self) >= self.room

    def begin(self) -> None:
        """Room for one block is taken from now on."""
        with self.bell:
            self.unfinished += 1

    def take_back(self) -> None:
        """The newest unfinished block is not going to be."""
        with self.bell:
            self.unfinished -= 1
            self.bell.ring()

    def put(self, block: Block) -> None:
        """The oldest unfinished block is ready."""
        with self.bell:
            if not self.ready:
                self.touched = time.perf_counter()
            self.unfinished -= 1
            self.ready.append(block)
            self.bell.ring()

    def take(self) -> Block | None:
        """The next block, if it is ready."""
        with self.bell:
            if not self.ready:
                return None
            self.touched = time.perf_counter()
            self.bell.ring()
            return self.ready.popleft()

    def drop_from(self, index: int) -> int:
        """Forget ready blocks from `index` on; returns how many they were."""
        with self.bell:
            kept = deque(block for block in self.ready if block.index < index)
            dropped = len(self.ready) - len(kept)
            self.ready = kept
            return dropped
