"""One stream: its timeline, its conditioning, and what it keeps of the blocks it has made.

A session says what comes next; the engine runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InferixError, UsageError
from ..models.wan.transformer import TextContext
from ..models.wan.vae import StreamState
from .actions import ActionTrack
from .cache import Cache
from .noise import Noise
from .sampler import Sampler, Solver
from .timeline import Span, Timeline

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True)
class Block:
    """A finished block: latents [F, C, H, W], frames uint8 [T, H, W, 3] or None, seconds per stage."""

    index: int
    latents: Tensor
    frames: NDArray[np.uint8] | None
    timings: dict[str, float]


@dataclass
class Branch:
    """One conditioning with the cache of its own past; guidance has two."""

    text: TextContext
    cache: Cache


@dataclass
class InFlight:
    """A block on its way: latents at the level of `step`."""

    span: Span
    latents: Tensor
    solver: Solver
    step: int = 0


@dataclass
class PromptChange:
    """Rows [text_len, d] on their way in: `left` more blocks of `blocks` until they are reached."""

    old: Tensor
    new: Tensor
    blocks: int
    left: int


@dataclass
class Session:
    """A video being made. Made by `Engine.open`; closed by `close()` or by leaving a `with`."""

    engine: Engine
    timeline: Timeline
    sampler: Sampler
    size: tuple[int, int]
    noise: Noise
    rows: Tensor  # the prompt in force, [text_len, d]
    branches: list[Branch]
    decoder: StreamState
    actions: ActionTrack
    source: Tensor | None = None  # latents of the video that blocks start from
    clamped: Tensor | None = None  # latents of an image held as the first frame
    flight: list[InFlight] = field(default_factory=list)
    change: PromptChange | None = None
    recent: Tensor | None = None  # last clean latents, as many as a rebuild or recache may ask for
    pixels: Tensor | None = None  # last decoded pictures, where a rebuild encodes one again
    prefix_frames: NDArray[np.uint8] | None = None  # what the stream goes on from, as the decoder shows it
    closed: bool = field(default=False, init=False)

    def stream(self, blocks: int, decode: bool = True) -> Iterator[Block]:
        """Yield the next `blocks` blocks; without `decode`, only latents."""
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
            raise UsageError(f"blocks is {blocks!r}; expected a whole number of 1 or more")
        for _ in range(blocks):
            yield self.engine.step(self, decode)

    def prompt(self, text: str | None = None, embeds: Tensor | str | Path | None = None) -> None:
        """Change the prompt from the next block on, in the way of the preset's `prompt_switch`."""
        self.check_open()
        self.engine.change_prompt(self, text, embeds)

    def act(self, action: str) -> None:
        """Do `action` from the next block on, until told otherwise; UsageError for one the model does not have."""
        self.check_open()
        self.actions.tell(self.timeline.next_frame, action)

    def remember(self, latents: Tensor, pixels: Tensor | None) -> None:
        """Keep the end of what was made, as far as the context may ask for it."""
        policy = self.timeline.preset.context
        wanted = policy.rebuild_frames
        if policy.prompt_switch == "recache":
            wanted = self.timeline.next_frame if policy.local_attn_size == -1 else policy.local_attn_size
        self.recent = latents if self.recent is None else torch.cat((self.recent, latents))
        self.recent = self.recent[max(0, len(self.recent) - wanted) :].clone()
        if policy.needs_pixels and pixels is not None:
            kept = (policy.rebuild_frames - 1) * self.engine.spec.vae_stride[0] + 1
            self.pixels = pixels if self.pixels is None else torch.cat((self.pixels, pixels))
            self.pixels = self.pixels[max(0, len(self.pixels) - kept) :].clone()

    def recent_frames(self, frames: tuple[int, ...]) -> Tensor:
        """Clean latents of absolute frames that are still kept."""
        assert self.recent is not None
        first = self.timeline.next_frame - len(self.recent)
        return self.recent[[frame - first for frame in frames]]

    def check_open(self) -> None:
        if self.closed:
            raise InferixError("this session is closed; open a new one with engine.open()")

    def close(self) -> None:
        """Free the cache and the decoder's state; a second call does nothing."""
        if not self.closed:
            self.closed = True
            for branch in self.branches:
                branch.cache.release()
            self.branches, self.flight = [], []
            self.recent = self.pixels = self.source = None
            del self.decoder

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        raise InferixError(f"session.{name}() is not in this version; open, stream, prompt, act and close are")
