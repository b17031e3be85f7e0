"""`TransformerCosts`: parameters, bytes and FLOPs of a transformer, computed from its sizes by its family.

Integers in, integers out. A multiply and an add are 2 FLOPs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from ..graphs.passes import Pass

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}
ROTATION = 24  # peak bytes for each entry while queries and keys are rotated in float64


class Flops(NamedTuple):
    """FLOPs of a pass: linear layers, self-attention and cross-attention."""

    linear: int
    attention: int
    cross: int

    @property
    def total(self) -> int:
        return sum(self)


def frames_seen(run: Pass) -> int:
    """Frames that each frame of a pass attends to, summed over the frames and averaged over groups of heads."""
    return sum(
        len(group.frames) * sum(map(len, lists)) // len(lists)
        for group in run.groups
        for lists in [group.head_contexts or (group.context,)]
    )


class TransformerCosts(ABC):
    """Costs of one transformer. tokens: of one latent frame. dtype: a name in `ITEMSIZE`."""

    @property
    @abstractmethod
    def prompt_parameters(self) -> int:
        """Parameters that are applied once for each prompt, and not read by passes."""

    @property
    @abstractmethod
    def pass_parameters(self) -> int:
        """Parameters that every pass reads."""

    @property
    def narrow_parameters(self) -> int:
        """Parameters of passes that are stored in one byte each, whatever the model's dtype is."""
        return 0

    @property
    def frame_parameters(self) -> int:
        """Parameters of the layers that read only what a frame is given beside its latents, such as a camera."""
        return 0

    def frame_flops(self, tokens: int, frames: int) -> int:
        """FLOPs of those layers over some frames: of a block where their results are kept, else of each pass."""
        return 0

    def frame_bytes(self, tokens: int, frames: int, dtype: str) -> int:
        """Bytes of their results, which a block can keep."""
        return 0

    @property
    @abstractmethod
    def prompt_flops(self) -> int:
        """FLOPs of a prompt's cross-attention keys and values, from the text encoder's rows."""

    @abstractmethod
    def pass_flops(self, tokens: int, run: Pass) -> Flops:
        """FLOPs of one pass."""

    @abstractmethod
    def cross_bytes(self, dtype: str) -> int:
        """Bytes of one prompt: its cross-attention keys and values, and the rows of the text encoder."""

    @abstractmethod
    def token_layers(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, input width and output width of each linear layer that a pass runs on every token."""

    def layer_item(self, layer: str, dtype: str) -> int:
        """Bytes of an entry of the weights of one of `token_layers`, by its name."""
        return ITEMSIZE[dtype]

    @abstractmethod
    def merged_bytes(self, dtype: str) -> int:
        """Bytes of the merged query, key and value projections; the separate weights become views of them."""

    @abstractmethod
    def table_bytes(self, frames: int, steps: int, commit: bool, dtype: str) -> int:
        """Bytes of the tables of a whole-block graph that depend on the timesteps only."""

    def wide_bytes(self, dtype: str) -> int:
        """Upper bound of the float32 copies of weights that graphs keep, for layers that compute in float32."""
        return 0

    @abstractmethod
    def arena_bytes(self, tokens: int, frames: int, dtype: str) -> int:
        """Upper bound of the arena of a pass's program in bytes."""

    @abstractmethod
    def pass_scratch(self, tokens: int, frames: int, dtype: str) -> int:
        """Upper bound of the bytes of a pass of `frames`, besides weights, pages and its input."""
