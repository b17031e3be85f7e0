"""Blocks of several sessions, made in lockstep.

The steps of a block are a generator: it yields the forward passes that it needs and is sent their velocities. So one
block reads as if it ran alone, each fails by itself, and compatible passes share one run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from ...graphs.passes import Pass
from ..plans import WholeBlock
from ..worker_client import Handle
from .session_state import Branch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class ForwardRequest:
    """One pass of one conditioning: latents [F, C, H, W], the action of each frame, none for a model without any.

    given: what the frames are given beside their latents; None for a model that takes nothing.
    prompts: by the number of a text, where blocks in flight follow others than the branch's. whole: not the pass
    alone but all steps and the commit of its block, which have its pages and positions. before: the first pass of a
    whole block, where it commits the block before; then latents are of that block, and actions of both.
    """

    branch: Branch
    run: Pass
    latents: Tensor
    actions: tuple[int, ...]
    given: Handle | None = None
    prompts: Mapping[int, Handle] = field(default_factory=dict)
    whole: WholeBlock | None = None
    before: Pass | None = None

    @property
    def batch_key(self) -> Hashable:
        """Equal for requests that one run can answer.

        They have the same page store, latent shape, group sizes, texts, condition and weights. Timesteps, positions and
        contexts may differ.
        """
        groups = tuple((len(group.frames), len(group.head_contexts)) for group in self.run.groups)
        shape, run = tuple(self.latents.shape), self.run
        kind = run.mixed_texts, run.condition, run.weights, self.whole is not None, self.before is not None
        return id(self.branch.cache.store), shape, groups, kind

    @property
    def texts(self) -> tuple[tuple[int, int, int], ...]:
        """(text, number of the prompt, frames) in token order: what the frames attend to in cross-attention."""
        texts = {**self.branch.texts, **self.prompts}
        return tuple((text, texts[text].number, frames) for text, frames in self.run.texts)


ForwardResult = Tensor | Exception  # a velocity, or latents of a whole block, [F, C, H, W], or why there is none
BlockSteps = Generator[ForwardRequest, Tensor, T]
Forward = Callable[[list[ForwardRequest]], Sequence[ForwardResult]]


def run_lockstep(blocks: Sequence[BlockSteps[T]], forward: Forward) -> list[T]:
    """Run blocks to their ends in lockstep and return their results. What one raises is raised, and closes the others.

    Each round, `forward` gets the requests of all blocks; a result that is an exception is raised in its block.
    """
    finished: dict[int, T] = {}
    results: list[tuple[int, ForwardResult | None]] = [(index, None) for index in range(len(blocks))]
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(closing(block))
        while results:
            requests: dict[int, ForwardRequest] = {}
            for index, result in results:
                try:
                    requests[index] = resume(blocks[index], result)
                except StopIteration as end:
                    finished[index] = end.value
            results = list(zip(requests, forward(list(requests.values())), strict=True))
    return [finished[index] for index in range(len(blocks))]


def resume(block: BlockSteps[T], result: ForwardResult | None) -> ForwardRequest:
    """Send a block the result of its last request, None at its start; returns its next. StopIteration at its end."""
    if result is None:
        return next(block)
    return block.throw(result) if isinstance(result, Exception) else block.send(result)


def group_compatible(requests: Sequence[ForwardRequest]) -> list[list[ForwardRequest]]:
    """Requests grouped by batch key, in order."""
    if len(requests) == 1:
        return [list(requests)]
    groups: dict[Hashable, list[ForwardRequest]] = {}
    for request in requests:
        groups.setdefault(request.batch_key, []).append(request)
    return list(groups.values())

def in_sizes(requests: Sequence[ForwardRequest], sizes: Sequence[int]) -> list[Sequence[ForwardRequest]]:
    """Cut requests into runs of `sizes`, the largest that fit first; one run of all where no sizes are given."""
    runs, first = list[Sequence[ForwardRequest]](), 0
    while first < len(requests):
        left = len(requests) - first
        count = max(size for size in sizes if size <= left) if sizes else left
        runs.append(requests[first : first + count])
        first += count
    return runs

