"""The block-step graph as data: values with roles, the passes of a block, and what runs once per load or per prompt.

A pass is a flat `torch.fx.Graph` of ATen and `inferix::` calls. ATen calls are functional; `inferix::` calls write
into their outputs, which are `aten.empty` nodes (scratch, each written by one node) or state placeholders. The order
of the nodes is the order of execution. Every node carries its fake result in `node.meta["val"]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import fx

from .passes import Group

OF_SET = "@"  # between the name of a weight and the number of its set, where that is not the first
LITERAL = "literal"  # names of constants that are numbers begin so
PROMPT_TABLE = "prompt_table"  # input int32 [rows, 1]: the page of each row's prompt


def name_in_set(name: str, number: int) -> str:
    """Name of a weight of a set, by the number of the set."""
    return f"{name}{OF_SET}{number}" if number else name


class Role(StrEnum):
    """The part of a value in the pass that reads or makes it.

    INPUT: handed over before the pass runs: latents, tables, conditioning. WEIGHT: a tensor of the model.
    CONSTANT: known before any block: a literal, or made by the fold graph. STATE: outlives blocks and is written in
    place (pages). SCRATCH: made and used up within a pass. OUTPUT: what a pass hands on.
    """

    INPUT = "input"
    WEIGHT = "weight"
    CONSTANT = "constant"
    STATE = "state"
    SCRATCH = "scratch"
    OUTPUT = "output"


class When(StrEnum):
    """Rate at which a value changes, rarest first. FRAMES: with the channels that a block's frames are given."""

    LOAD = "load"
    PROMPT = "prompt"
    FRAMES = "frames"
    BLOCK = "block"
    PASS = "pass"

    @property
    def rank(self) -> int:
        return list(When).index(self)


class Runs(StrEnum):
    """Events that make a graph run.

    LOAD: weights have come or changed. PROMPT: a session has a new prompt. FRAMES: a block begins, whose
    frames are given channels beside their latents. SWITCH: the prompt changed in the middle
    of a stream, before its next block. REBUILD: the context is encoded again, between blocks. FLUSH: where the commit
    of a block cannot wait for the next one's first pass. BLOCK: every block.
    """

    LOAD = "load"
    PROMPT = "prompt"
    FRAMES = "frames"
    SWITCH = "switch"
    REBUILD = "rebuild"
    FLUSH = "flush"
    BLOCK = "block"


@dataclass(frozen=True)
class Value:
    """A named tensor at the edge of a pass.

    name: block-wide: two passes that read `pages` read the same tensor, and an output `latents` is what the next
    pass reads under that name. Weights have the model's parameter names. data: numbers, row by row, of a literal
    constant. owned: for an INPUT that lists pages: the pass may write what it lists.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    dtype: torch.dtype
    when: When
    data: tuple[float, ...] | None = None
    owned: bool = False

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @classmethod
    def of_literal(cls, data: Sequence[float], shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        """A constant written down; equal ones have one name."""
        numbers = tuple(float(number) for number in data)
        name = f"{LITERAL} {list(numbers)} {list(shape)} {str(dtype).removeprefix('torch.')}"
        return cls(name, Role.CONSTANT, shape, dtype, When.LOAD, numbers)

    def literal(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor of a literal constant; ValueError for other values."""
        if self.data is None:
            raise ValueError(f"{self.name} is no literal; it is made by the fold graph")
        return torch.tensor(self.data, dtype=torch.float64, device=device).to(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class PassGraph:
    """One pass, or the graph run once per prompt (`prompt`) or once the weights are there (`fold`).

    name: `denoise 0`..., `commit`, `recompute`, `recache`, `prompt`, `fold`. graph: its placeholders are the keys of
    `inputs`, in order; its output node returns a tuple, one tensor for each of `outputs`. groups: the frames of the
    pass with what they see, as in a block after the window is full. writes: names of the STATE values that the
    traced pass wrote; no rewrite may lose one.
    """

    name: str
    graph: fx.Graph
    inputs: dict[str, Value]
    outputs: tuple[Value, ...]
    groups: tuple[Group, ...] = ()
    writes: tuple[str, ...] = ()
    runs: Runs = Runs.BLOCK

    def __iter__(self) -> Iterator[fx.Node]:
        """Nodes that call something, in order."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes that make the outputs, in their order."""
        returned = self.graph.output_node().args[0]
        assert isinstance(returned, list | tuple)
        return tuple(node for node in returned if isinstance(node, fx.Node))

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the values it is given."""
        return tuple(value.name for value in self.inputs.values())

    def named(self, role: Role) -> dict[str, Value]:
        """Placeholders of one role."""
        return {key: value for key, value in self.inputs.items() if value.role == role}


@dataclass(frozen=True)
class GraphShape:
    """Key of a captured graph: rows of sessions or branches, frames of each, latents [C, H, W], tokens."""

    rows: int
    frames: int
    latent: tuple[int, int, int]
    tokens_per_frame: int
    pages: int
    max_pages: int

    @property
    def tokens(self) -> int:
        return self.rows * self.frames * self.tokens_per_frame


@dataclass(frozen=True)
class Change:
    """Effect of one rewrite: number of places, and nodes of all passes before and after it."""

    rewrite: str
    places: int
    nodes_before: int
    nodes_after: int
    launches_before: int
    launches_after: int


@dataclass(frozen=True)
class BlockGraph:
    """All that a block runs.

    passes: in order of execution, each when its `runs` says so. prompt: run once per prompt; its outputs are inputs
    of the passes. fold: run once the weights are there (and again when they change); its outputs are the constants.
    frames: run once per block whose frames are given channels, before its passes. Each is None where nothing was moved
    into it. results: names of the block's results. changes: what each
    rewrite did, in order.
    """

    model: str
    preset: str
    dtype: torch.dtype
    device: str
    shape: GraphShape
    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    passes: tuple[PassGraph, ...]
    prompt: PassGraph | None
    fold: PassGraph | None
    results: tuple[str, ...] = ("latents",)
    changes: tuple[Change, ...] = field(default=())
    frames: PassGraph | None = None

    @property
    def graphs(self) -> tuple[PassGraph, ...]:
        """Fold, prompt and frames graph where there are any, then the passes."""
        return tuple(graph for graph in (self.fold, self.prompt, self.frames, *self.passes) if graph is not None)

    def values(self, role: Role) -> dict[str, Value]:
        """All values of a role that any graph is given, by block-wide name."""
        return {value.name: value for graph in self.graphs for value in graph.inputs.values() if value.role == role}

    def named(self, name: str) -> PassGraph:
        """The graph of that name; KeyError if there is none."""
        return {graph.name: graph for graph in self.graphs}[name]
