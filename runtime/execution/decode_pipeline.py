"""Decode pipeline: one thread, on a GPU with a CUDA stream of its own, decodes blocks while the next ones are denoised.

`DecoderTrack` is the decoder state of one session. The pipeline owns it from `submit` until `wait` returns, the engine
at other times. Both use different CUDA streams, so each calls `claim` for tensors of the other that it reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UsageError
from ...models.decoder import Decoder, StreamState
from ..engine_condition import EngineCondition
from ..streams import claim, make_current


class DecoderTrack:
    """Decoder state after the last block, with checkpoints to rewind up to `rewind_blocks` blocks.

    checkpoints: (block, state before it), one every `rewind_blocks` blocks; states share tensors. decoded: (block,
    latents) since the first checkpoint. A rewind decodes again from the nearest checkpoint. zero_start: the stream
    starts from zero caches; UsageError for a decoder that cannot.
    """

    def __init__(self, vae: Decoder, rewind_blocks: int, zero_start: bool = False) -> None:
        if zero_start and not vae.zero_start:
            raise UsageError(
                f"decoder_zero_start is true, but the decoder is a {vae.name}; use the full VAE, or leave "
                "decoder_zero_start out"
            )
        self.vae, self.rewind_blocks, self.zero_start = vae, rewind_blocks, zero_start
        self.state = self.new_state()
        self.checkpoints: list[tuple[int, StreamState]] = []
        self.decoded: list[tuple[int, Tensor]] = []
        self.last: Tensor | None = None  # latents of the last block

    def decode(self, block: int, latents: Tensor) -> Tensor:
        """Decode latents [F, C, h, w] of a block to pixels [T, 3, H, W]."""
        claim((latents, *self.state.history.values()))
        if self.rewind_blocks:
            if not self.checkpoints or self.checkpoints[-1][0] <= block - self.rewind_blocks:
                self.checkpoints.append((block, self.state.clone()))
            self.decoded.append((block, latents))
            while len(self.checkpoints) > 1 and self.checkpoints[1][0] <= block + 1 - self.rewind_blocks:
                self.checkpoints.pop(0)
            self.decoded = [(index, part) for index, part in self.decoded if index >= self.checkpoints[0][0]]
        self.last = latents
        return self.advance(latents)

    def advance(self, latents: Tensor) -> Tensor:
        """Decode latents [F, C, h, w] to pixels [T, 3, H, W], without a checkpoint."""
        begins, pixels = not self.state.begun, self.vae.decode(latents, self.state)
        if begins and self.zero_start and self.vae.zero_start:
            return pixels[self.vae.spec.temporal_stride - 1 :]
        return pixels

    def new_state(self) -> StreamState:
        """The state of a stream that has not begun."""
        state = self.vae.new_state()
        if self.zero_start and self.vae.zero_start:
            state.frames = 1  # no frame is the first: each is upsampled in time, over zeros at the start
        return state

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Put the track back to where it was if anything is raised, Ctrl-C included."""
        before = self.state.clone(), list(self.checkpoints), list(self.decoded), self.last
        try:
            yield
        except BaseException:  # raised again; Ctrl-C must not leave half a block either
            self.state, self.checkpoints, self.decoded, self.last = before
            raise

    def restart(self, block: int, latents: Tensor) -> None:
        """Reset the state before `block` and decode `latents` to fill it; their pixels are dropped."""
        self.state = self.new_state()
        self.vae.decode(latents, self.state)
        if self.rewind_blocks:
            self.checkpoints = [(index, state) for index, state in self.checkpoints if index < block]
            self.checkpoints.append((block, self.state.clone()))

    def rewind(self, block: int) -> None:
        """Return to the state before `block`, one of the last `rewind_blocks` blocks."""
        if not self.decoded or self.decoded[-1][0] < block:
            return
        earlier = ((at, state) for at, state in reversed(self.checkpoints) if at <= block)
        start, state = next(earlier, self.checkpoints[0])
        claim((*state.history.values(), *(latents for _, latents in self.decoded)))
        self.state = state.clone()
        for index, latents in self.decoded:
            if start <= index < block:
                self.vae.decode(latents, self.state)
        self.checkpoints = [(at, state) for at, state in self.checkpoints if at <= block]
        self.decoded = [(index, latents) for index, latents in self.decoded if index < block]

    def fork(self) -> DecoderTrack:
        """Return an independent track; tensors are shared."""
        fork = copy(self)
        fork.state = self.state.clone()
        fork.checkpoints = [(block, state.clone()) for block, state in self.checkpoints]
        fork.decoded, fork.last = list(self.decoded), self.last
        return fork

    def change_decoder(self, vae: Decoder) -> None:
        """Switch to another decoder, which decodes the last block first; rewinds before this point are lost."""
        if vae is self.vae:
            return
        self.vae = vae
        self.state = self.new_state() if self.last is None else vae.new_state()
        if self.last is not None:
            vae.decode(self.last, self.state)
        self.checkpoints, self.decoded = [], []

    def clear(self) -> None:
        """Release all tensors."""
        self.state, self.checkpoints, self.decoded, self.last = self.vae.new_state(), [], [], None

    @property
    def nbytes(self) -> int:
        """Bytes of the state and all checkpoints; what they share counts once."""
        owned: dict[int, int] = {}
        for state in (self.state, *(state for _, state in self.checkpoints)):
            owned |= state.owned
        return sum(owned.values())


class DecodePipeline:
    """Runs jobs one after another on a thread beside the engine's."""

    def __init__(self, device: torch.device, condition: EngineCondition) -> None:
        self.condition = condition
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = device
        self.pool = self._new_pool()
        self.jobs: dict[str, deque[Future[None]]] = {}

    @property
    def beside(self) -> bool:
        """True where decoding in this thread is faster than between blocks: on a GPU, or if torch has one thread.

        Each thread that computes has its own pool of `torch.get_num_threads()` threads. Two such pools share the cores
        of a CPU badly.
        """
        return self.device.type != "cpu" or torch.get_num_threads() == 1

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "inferix-decode", begin_thread, (self.device,))

    def submit(self, session: str, job: Callable[[], None]) -> None:
        """Queue `job`; on a GPU it starts after the work that the current stream has now."""
        launched = None
        if self.stream is not None:
            launched = torch.cuda.Event()
            launched.record()
        self.jobs.setdefault(session, deque()).append(self.pool.submit(self._run, launched, job))

    def _run(self, launched: torch.cuda.Event | None, job: Callable[[], None]) -> None:
        on_stream: AbstractContextManager[object] = nullcontext()
        if self.stream is not None and launched is not None:
            self.stream.wait_event(launched)
            on_stream = torch.cuda.stream(self.stream)
        try:
            with on_stream, torch.no_grad():
                job()
        finally:
            self.condition.signal()

    def wait(self, session: str) -> None:
        """Wait for all jobs of a session; raises the error of a job."""
        jobs = self.jobs.get(session, deque())
        while jobs:
            jobs[0].result()
            jobs.popleft()
        self.jobs.pop(session, None)

    def collect(self) -> None:
        """Remove finished jobs; raises the error of a job."""
        for session, jobs in list(self.jobs.items()):
            while jobs and jobs[0].done():
                jobs.popleft().result()
            if not jobs:
                del self.jobs[session]

    def after_fork(self) -> list[str]:
        """Begin with a new thread in a child process; returns the sessions whose jobs the old one had."""
        lost = [session for session, jobs in self.jobs.items() if any(not job.done() for job in jobs)]
        self.pool, self.jobs = self._new_pool(), {}
        return lost

    def busy(self, session: str) -> bool:
        return any(not job.done() for job in self.jobs.get(session, ()))


def begin_thread(device: torch.device) -> None:
    """Prepare the decoder's thread. On a CPU it decodes only where torch has one thread, and takes no more itself.

    Convolutions would otherwise start a pool of their own there, which slows all later pools of the process.
    """
    make_current(device)
    if device.type == "cpu":
        torch.set_num_threads(1)


def to_frames(pixels: Tensor) -> NDArray[np.uint8]:
    """Convert pixels [T, 3, H, W] in [-1, 1] to uint8 frames [T, H, W, 3] in host memory."""
    scaled = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
