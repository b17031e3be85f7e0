"""Prompt inputs of graphs: the conditioned prompts of a pass, and the slots of a program that batches find them in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import ref

import torch
from torch import Tensor


@dataclass(eq=False)
class Conditioning:
    """Prompt input of graphs: rows [1, text_len, text_dim], and cached outputs of prompt graphs.

    cached: by recipe; of graphs that read other texts too, by recipe and those texts.
    """

    rows: Tensor
    cached: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    @property
    def by_input(self) -> dict[str, Conditioning]:
        """Texts by the graph's names of their rows, the one that is replaced most often first."""
        return {"text": self}


@dataclass(frozen=True)
class MixedConditioning:
    """Prompt input of a pass whose frames follow different texts.

    texts: by their numbers in a pass, ascending. groups: (text, frames) in token order.
    """

    texts: Mapping[int, Conditioning]
    groups: tuple[tuple[int, int], ...]

    @property
    def by_input(self) -> dict[str, Conditioning]:
        return {f"text.{number}": text for number, text in self.texts.items()}


@dataclass(frozen=True)
class BatchConditioning:
    """Prompt inputs of a batch, one for each session."""

    sessions: tuple[Conditioning | MixedConditioning, ...]


class PromptSlots:
    """Prompts of a batch's program in slots of its static buffers, which rows find by table.

    A prompt is copied once and stays until another needs its slot, so sessions join, leave and change places without
    a copy of what stays. buffers: [2, slots, text tokens, heads, head_dim] by input.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.buffers = buffers
        count = next(iter(buffers.values())).shape[1]
        self.contents: list[tuple[tuple[ref[Tensor], int], ...]] = [()] * count
        self.last_used, self.turn = [0] * count, 0
        self.table = torch.empty(0, dtype=torch.int32)

    def place(self, prompts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the table int32 [rows, 1] of the slots of prompts, [2, 1, ...] by input, one for each row.

        Copies those that are in none, in place of the least recently used.
        """
        self.turn += 1
        slots = [self.slot_of(prompt) for prompt in prompts]
        for slot in slots:
            self.use(slot)
        for row, prompt in enumerate(prompts):
            if slots[row] is None:
                slots[row] = self.slot_of(prompt)  # of a row before with the same prompt
            if slots[row] is None:
                slots[row] = self.copy(prompt)
            self.use(slots[row])
        table = [[slot] for slot in slots]
        if self.table.tolist() != table:
            self.table = torch.tensor(table, dtype=torch.int32)
        return self.table

    def slot_of(self, prompt: Mapping[str, Tensor]) -> int | None:
        """Slot that has a prompt; None if there is none, or its tensors have changed since."""
        tensors = [prompt[name] for name in self.buffers]
        for slot, content in enumerate(self.contents):
            if content and all(
                known() is tensor and version == tensor._version
                for (known, version), tensor in zip(content, tensors, strict=True)
            ):
                return slot
        return None

    def copy(self, prompt: Mapping[str, Tensor]) -> int:
        """Copy a prompt to the slot that was used least recently."""
        slot = min(range(len(self.contents)), key=self.last_used.__getitem__)
        for name, buffer in self.buffers.items():
            buffer[:, slot].copy_(prompt[name][:, 0])
        self.contents[slot] = tuple((ref(prompt[name]), prompt[name]._version) for name in self.buffers)
        return slot

    def use(self, slot: int | None) -> None:
        if slot is not None:
            self.last_used[slot] = self.turn
