"""One stream: its place in time, and handles to what it has produced so far.

A session knows which block comes next and what has been applied to it; the engine runs the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InferixError, UsageError
from ..graphs.passes import Group, Pass
from ..models.wan.transformer import TextContext
from ..models.wan.vae import StreamState
from .cache import ContiguousCache
from .noise import Noise
from .presets import Preset

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Block:
    """A finished block: latents [F, C, H, W], frames uint8 [T, H, W, 3] or None, seconds per stage."""

    index: int
    latents: Tensor
    frames: NDArray[np.uint8] | None
    timings: dict[str, float]


@dataclass(frozen=True)
class BlockPlan:
    """The next block in host integers: its index, frames, and the frames it attends to."""

    index: int
    frames: range
    visible: tuple[int, ...]

    def run_at(self, timestep: float) -> Pass:
        """The pass over the block's frames at a timestep; every pass overwrites the block's keys and values."""
        return Pass((Group(tuple(self.frames), timestep, self.visible),))


@dataclass
class Session:
    """A video being made. Made by `Engine.open`; closed by `close()` or by leaving a `with`."""

    engine: Engine
    preset: Preset
    size: tuple[int, int]
    noise: Noise
    text: TextContext
    cache: ContiguousCache
    decoder: StreamState
    prefix_frames: NDArray[np.uint8] | None = None  # what the stream goes on from, as the decoder shows it
    next_block: int = 0
    next_frame: int = 0
    closed: bool = field(default=False, init=False)

    def plan_block(self) -> BlockPlan:
        frames = range(self.next_frame, self.next_frame + self.preset.block_size(self.next_frame))
        return BlockPlan(self.next_block, frames, self.preset.context.visible(frames.stop))

    def stream(self, blocks: int, decode: bool = True) -> Iterator[Block]:
        """Yield the next `blocks` blocks; without `decode`, only latents."""
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
            raise UsageError(f"blocks is {blocks!r}; expected a whole number of 1 or more")
        for _ in range(blocks):
            yield self.engine.step(self, decode)

    def check_open(self) -> None:
        if self.closed:
            raise InferixError("this session is closed; open a new one with engine.open()")

    def close(self) -> None:
        """Free the cache and the decoder's state; a second call does nothing."""
        if not self.closed:
            self.closed = True
            del self.cache, self.decoder, self.text

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prompt(self, text: str) -> NoReturn:
        self._later("prompt")

    def act(self, action: Any) -> NoReturn:
        self._later("act")

    def pause(self) -> NoReturn:
        self._later("pause")

    def resume(self) -> NoReturn:
        self._later("resume")

    def fork(self) -> NoReturn:
        self._later("fork")

    def rewind(self, block: int) -> NoReturn:
        self._later("rewind")

    def save(self, path: str) -> NoReturn:
        self._later("save")

    def _later(self, name: str) -> NoReturn:
        raise InferixError(f"session.{name}() is not in this version; open, stream and close are")
