"""Decoding beside denoising: one thread, on a GPU with a stream of its own, decodes blocks in the order they come.

A `DecoderTrack` is how far one session's decoder has come. It is the pipeline's from `submit` until `settle`
has returned, and the engine's otherwise; since these are two streams, each claims what it reads of the other's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...models.wan.vae import StreamState
from ...models.wan.vae_checkpoint import Decoder
from ..engine_condition import EngineCondition
from ..streams import claim, make_current


class DecoderTrack:
    """A decoder's state after the last block, and what it takes to go back `rewind_blocks` of them.

    kept: (block, state before it), every `rewind_blocks` blocks, no more than are needed; states share tensors.
    decoded: (block, latents) since the first of them. Going back decodes from the nearest kept state on again.
    """

    def __init__(self, vae: Decoder, rewind_blocks: int) -> None:
        self.vae, self.rewind_blocks = vae, rewind_blocks
        self.state = vae.new_state()
        self.kept: list[tuple[int, StreamState]] = []
        self.decoded: list[tuple[int, Tensor]] = []
        self.last: Tensor | None = None  # latents of the last block

    def decode(self, block: int, latents: Tensor) -> Tensor:
        """Latents [F, C, h, w] of a block to pixels [T, 3, H, W]."""
        claim((latents, *self.state.history.values()))
        if self.rewind_blocks:
            if not self.kept or self.kept[-1][0] <= block - self.rewind_blocks:
                self.kept.append((block, self.state.clone()))
            self.decoded.append((block, latents))
            while len(self.kept) > 1 and self.kept[1][0] <= block + 1 - self.rewind_blocks:
                self.kept.pop(0)
            self.decoded = [(index, part) for index, part in self.decoded if index >= self.kept[0][0]]
        self.last = latents
        return self.vae.decode(latents, self.state)

    def restart(self, block: int, latents: Tensor) -> None:
        """Begin anew before `block`, with latents that are decoded for the state's sake alone."""
        self.state = self.vae.new_state()
        self.vae.decode(latents, self.state)
        if self.rewind_blocks:
            self.kept = [(index, state) for index, state in self.kept if index < block]
            self.kept.append((block, self.state.clone()))

    def rewind(self, block: int) -> None:
        """Back to where it stood before `block`, which is one of the last `rewind_blocks`."""
        if not self.decoded or self.decoded[-1][0] < block:
            return
        start, state = next(((at, state) for at, state in reversed(self.kept) if at <= block), self.kept[0])
        claim((*state.history.values(), *(latents for _, latents in self.decoded)))
        self.state = state.clone()
        for index, latents in self.decoded:
            if start <= index < block:
                self.vae.decode(latents, self.state)
        self.kept = [(at, state) for at, state in self.kept if at <= block]
        self.decoded = [(index, latents) for index, latents in self.decoded if index < block]

    def fork(self) -> DecoderTrack:
        """One that goes on by itself; tensors are shared."""
        twin = DecoderTrack(self.vae, self.rewind_blocks)
        twin.state = self.state.clone()
        twin.kept = [(block, state.clone()) for block, state in self.kept]
        twin.decoded, twin.last = list(self.decoded), self.last
        return twin

    def change_decoder(self, vae: Decoder) -> None:
        """Go on with another decoder, which is shown the last block first; going back beyond here is given up."""
        if vae is self.vae:
            return
        self.vae, self.state = vae, vae.new_state()
        if self.last is not None:
            vae.decode(self.last, self.state)
        self.kept, self.decoded = [], []

    def clear(self) -> None:
        """Let every tensor go."""
        self.state, self.kept, self.decoded, self.last = self.vae.new_state(), [], [], None

    @property
    def nbytes(self) -> int:
        """Bytes of all states that are kept, shared tensors counted once."""
        states = [self.state, *(state for _, state in self.kept)]
        tensors = {id(tensor): tensor.nbytes for state in states for tensor in state.history.values()}
        return sum(tensors.values())


class DecodePipeline:
    """Runs jobs one after another beside the engine's thread, on a thread that ends with the pipeline."""

    def __init__(self, device: torch.device, condition: EngineCondition) -> None:
        self.condition = condition
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.pool = ThreadPoolExecutor(1, "inferix-decode", make_current, (device,))
        self.jobs: dict[int, deque[Future[None]]] = {}

    def submit(self, session: int, job: Callable[[], None]) -> None:
        """Run `job` once what was launched so far has run."""
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

    def settle(self, session: int) -> None:
        """Wait until nothing of a session is being decoded."""
        for job in self.jobs.pop(session, ()):
            job.result()

    def collect(self) -> None:
        """Forget jobs that are done; a bug in one of them is raised here."""
        for session, jobs in list(self.jobs.items()):
            while jobs and jobs[0].done():
                jobs.popleft().result()
            if not jobs:
                del self.jobs[session]

    def busy(self, session: int) -> bool:
        return any(not job.done() for job in self.jobs.get(session, ()))


def to_frames(pixels: Tensor) -> NDArray[np.uint8]:
    """Pixels [T, 3, H, W] in [-1, 1] to uint8 frames [T, H, W, 3] on the host."""
    scaled = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
