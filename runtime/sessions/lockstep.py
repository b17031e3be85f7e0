"""Blocks of several sessions, made side by side.

A block in the making is a generator: it asks for passes of the network and is told their velocities. So one block
reads as if it were alone, each fails by itself, and passes that match are answered by one run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from ...graphs.passes import Pass
from .branch import Branch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ask:
    """One pass of one conditioning that a block asks for: latents [F, C, H, W], actions [1, F, action_dim] or None."""

    branch: Branch
    run: Pass
    latents: Tensor
    actions: Tensor | None

    @property
    def form(self) -> Hashable:
        """What passes have in common that one run can answer: pages, latents and how frames are grouped.

        Timesteps, positions and frames seen may differ.
        """
        groups = tuple(len(group.frames) for group in self.run.groups)
        return id(self.branch.cache.store), tuple(self.latents.shape), groups


Answer = Tensor | Exception  # a velocity [F, C, H, W], or why there is none
Making = Generator[Ask, Tensor, T]


def side_by_side(blocks: Sequence[Making[T]], answer: Callable[[list[Ask]], Sequence[Answer]]) -> list[T]:
    """Take blocks to their ends in step, and return what they make; what one raises is raised, and closes the others.

    At each step `answer` is given what is asked for; an answer that is an exception is raised where it was asked.
    """
    made: dict[int, T] = {}
    told: list[tuple[int, Answer | None]] = [(index, None) for index in range(len(blocks))]
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(closing(block))
        while told:
            asked: dict[int, Ask] = {}
            for index, said in told:
                try:
                    asked[index] = go_on(blocks[index], said)
                except StopIteration as end:
                    made[index] = end.value
            told = list(zip(asked, answer(list(asked.values())), strict=True))
    return [made[index] for index in range(len(blocks))]


def go_on(block: Making[T], told: Answer | None) -> Ask:
    """What a block asks for next, once it is told what it asked for last; StopIteration at its end."""
    if told is None:
        return next(block)
    return block.throw(told) if isinstance(told, Exception) else block.send(told)


def alike(asked: Sequence[Ask]) -> list[list[Ask]]:
    """Passes of one form together, in order."""
    if len(asked) == 1:
        return [list(asked)]
    found: dict[Hashable, list[Ask]] = {}
    for ask in asked:
        found.setdefault(ask.form, []).append(ask)
    return list(found.values())
