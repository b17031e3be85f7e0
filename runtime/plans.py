"""Plans: what a worker does next, as host integers. Bookkeeping makes them; a worker turns them into tensors.

A plan names what a worker keeps by numbers: prompts, sink averages and pages in host memory (`WorkerClient.handle`),
and stores of pages by their token grid. Tensors that a plan takes and gives are listed with it, in order.

As bytes: `INFP`, the version (1 byte), the CRC-32 of the rest (4 bytes, little-endian), then JSON in UTF-8,
[class name, field, ...] in the order of the fields, with tuples and nested classes as lists.
"""

from __future__ import annotations

import json
import struct
import typing
import zlib
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union

from ..errors import InferixError, cut

Grid = tuple[int, int]  # (rows, columns) of tokens of a frame


@dataclass(frozen=True)
class GroupPages:
    """Pages and temporal positions of one group of a pass.

    pages, positions: of the group's own frames, where keys are written and at which position they are rotated.
    listed: pages that the group reads. sinks: how many of them, the first, are read by queries rotated at
    `sink_positions`; the rest are read by queries at `positions`. head_lists: (pages, sinks) as each group of heads
    reads them, in place of `listed` and `sinks`; empty where all heads read the same.
    """

    pages: tuple[int, ...]
    positions: tuple[int, ...]
    listed: tuple[int, ...]
    sinks: int
    sink_positions: tuple[int, ...]
    head_lists: tuple[tuple[tuple[int, ...], int], ...] = ()

    @property
    def lists(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """(pages, sinks) of each group of heads, of which there is one where all read the same."""
        return self.head_lists or ((self.listed, self.sinks),)


@dataclass(frozen=True)
class PassLayout:
    """Pages of a pass. rows: groups of all sessions, in the order of the tables.

    width: pages that a session will hold in the end, to which tables are padded at least. rotates_sink: every pass of
    the policy has queries rotated for the sink.
    """

    grid: Grid
    rows: tuple[GroupPages, ...]
    width: int
    rotates_sink: bool


@dataclass(frozen=True)
class WholeBlock:
    """All steps and the commit of a session's block in one launch.

    Noise is that of `seed` for `frames` frames from `first` on.
    """

    first: int
    frames: int
    seed: int


@dataclass(frozen=True)
class PassPlan:
    """One pass of one or several sessions: latents [B, F, C, H, W] in, velocity out; of whole blocks, latents out.

    timesteps: of each frame, by session. texts: (text, number of the prompt, frames) by session, in token order.
    actions: the number of each frame's action, by session; empty for a model without actions. whole: the block of each
    session; empty for one pass. condition: of a step, beside the timesteps; None for a model that takes none. frames:
    number of what the frames of each session are given beside their latents (`EmbedFrames`); empty for a model that
    takes nothing. weights: number of the set of weights that runs it. before: of whole blocks whose first pass commits
    the block before, pages of that pass; that block's latents in, and actions of both.
    """

    layout: PassLayout
    timesteps: tuple[tuple[float, ...], ...]
    texts: tuple[tuple[tuple[int, int, int], ...], ...]
    actions: tuple[tuple[int, ...], ...]
    whole: tuple[WholeBlock, ...] = ()
    condition: float | None = None
    frames: tuple[int, ...] = ()
    weights: int = 0
    before: PassLayout | None = None


@dataclass(frozen=True)
class BranchPass:
    """The pass of one branch of guidance. place: of the ranks that run it. frames: rows of the latents that it runs."""

    place: int
    frames: tuple[int, ...]
    run: PassPlan


@dataclass(frozen=True)
class GuidedPass:
    """A pass of branches that run beside each other on ranks of their own.

    Latents [B, F, C, H, W] in; the velocity of each branch, [B, frames, C, H, W], out on rank 0, in order.
    """

    branches: tuple[BranchPass, ...]


@dataclass(frozen=True)
class OpenStore:
    """Allocate a store of pages, with a staging buffer where pages have another dtype.

    slots: frames of the staging buffer that one session needs. sessions: for how many there is room at first.
    """

    grid: Grid
    pages: int
    slots: int
    sessions: int


@dataclass(frozen=True)
class GrowStore:
    """Grow a store to `pages` pages; its tensors move."""

    grid: Grid
    pages: int


@dataclass(frozen=True)
class CloseStore:
    """Free a store."""

    grid: Grid


@dataclass(frozen=True)
class ReadPages:
    """Give copies of pages [layers, 2, n, page_tokens, heads, head_dim], and their scales if they have any."""

    grid: Grid
    pages: tuple[int, ...]


@dataclass(frozen=True)
class WritePages:
    """Write what `ReadPages` gave; takes it."""

    grid: Grid
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Offload:
    """Copy pages to host memory, as `host`. The pages may be written once the copies are done."""

    grid: Grid
    host: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class ReadHost:
    """Give some `slots` of what was copied to host memory, as `ReadPages` gives them."""

    grid: Grid
    host: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class Onload:
    """Begin to copy `slots` of host memory into pages."""

    grid: Grid
    host: int
    slots: tuple[int, ...]
    pages: tuple[int, ...]


@dataclass(frozen=True)
class JoinTransfer:
    """Order passes after the copies to and from host memory."""

    grid: Grid


@dataclass(frozen=True)
class LoadSink:
    """Begin sink averages, `sink`, with what pages hold."""

    grid: Grid
    sink: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class AverageSink:
    """Average leaving frames into sink averages, which become `result`; `sink` stays as it is.

    leaving: (page, frame of the sink, positions from the one to the other), in order. decay: what is kept of the sink.
    """

    grid: Grid
    sink: int
    result: int
    leaving: tuple[tuple[int, int, int], ...]
    decay: float


@dataclass(frozen=True)
class WriteSink:
    """Write sink averages into pages, in their dtype."""

    grid: Grid
    sink: int
    pages: tuple[int, ...]


@dataclass(frozen=True)
class OffloadSink:
    """Copy sink averages to host memory, as `result`."""

    grid: Grid
    sink: int
    result: int


@dataclass(frozen=True)
class ReadSink:
    """Give sink averages [layers, 2, sink frames, page_tokens, heads, head_dim]."""

    grid: Grid
    sink: int


@dataclass(frozen=True)
class SetSink:
    """Take sink averages."""

    grid: Grid
    sink: int


@dataclass(frozen=True)
class Condition:
    """Take the text encoder's rows [text_len, text_dim] of a prompt, and prepare it for passes."""

    prompt: int


@dataclass(frozen=True)
class EmbedFrames:
    """Take the channels [F, C, H, W] that a block's frames are given, and prepare them for its passes."""

    frames: int


@dataclass(frozen=True)
class Decode:
    """Decode latents [F, C, h, w], each rank some columns; gives pixels [T, 3, H, W] on rank 0.

    before: number of the decoder's state; None at the start of a stream. after: of the state that it becomes; `before`
    stays as it is. frames: of the stream before these.
    """

    before: int | None
    after: int
    frames: int


@dataclass(frozen=True)
class ReadDecoding:
    """Give a decoder's state: the numbers of its tensors [n], then the tensors [..., W], of all ranks."""

    state: int


@dataclass(frozen=True)
class SetDecoding:
    """Take the tensors of a decoder's state, numbered `slots`, of pictures with `columns` columns of latents."""

    state: int
    columns: int
    slots: tuple[int, ...]


@dataclass(frozen=True)
class TimeExchange:
    """Run `calls` all-to-alls between all ranks, of `nbytes` on each; gives the seconds of one [1]."""

    nbytes: int
    calls: int


@dataclass(frozen=True)
class UseAdapter:
    """Merge an adapter into the weights in place of the one before; None removes that. Nothing derived is recomputed.

    path: of a file or folder that every rank can read. sets: numbers of the sets of weights that it changes.
    """

    path: str | None
    scale: float
    partial: bool
    sets: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class RefreshWeights:
    """Recompute all that is derived from the weights, prompts included."""


@dataclass(frozen=True)
class Release:
    """Free what nothing refers to any more."""

    numbers: tuple[int, ...]


Plan = Union[  # noqa: UP007  its members are listed at run time
    PassPlan, GuidedPass, OpenStore, GrowStore, CloseStore, ReadPages, WritePages, Offload, ReadHost, Onload,
    JoinTransfer, LoadSink, AverageSink, WriteSink, OffloadSink, ReadSink, SetSink, Condition, EmbedFrames, Decode,
    ReadDecoding, SetDecoding, TimeExchange, UseAdapter, RefreshWeights, Release,
]  # fmt: skip
KINDS: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Plan)}
HEADER = struct.Struct("<4sBI")
MAGIC, VERSION = b"INFP", 7


def encode_plan(plan: Plan) -> bytes:
    """A plan as bytes."""
    values = [type(plan).__name__, *plain(plan)]
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
    return HEADER.pack(MAGIC, VERSION, zlib.crc32(text)) + text


def decode_plan(data: bytes) -> Plan:
    """The plan of `encode_plan`; InferixError for bytes that are damaged or of another version."""
    text = data[HEADER.size :]
    try:
        magic, version, checksum = HEADER.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION):
            raise ValueError(f"it begins with {magic!r} and version {version}; expected {MAGIC!r} and {VERSION}")
        if checksum != zlib.crc32(text):
            raise ValueError(f"its checksum is {checksum:#010x}; expected {zlib.crc32(text):#010x}")
        values = json.loads(text, parse_constant=refused)
        if not isinstance(values, list) or not values or values[0] not in KINDS:
            raise ValueError(f"{cut(repr(values))} is no plan; expected one of {', '.join(KINDS)}")
        plan: Plan = built(KINDS[values[0]], values[1:], values[0])
    except (struct.error, ValueError, TypeError, RecursionError) as error:
        raise InferixError(f"a plan of {len(data)} bytes is damaged: {error}; send it again") from error
    return plan


def plain(value: Any) -> Any:
    """Lists, numbers and None for dataclasses and tuples."""
    if is_dataclass(value):
        return [plain(getattr(value, item.name)) for item in fields(value)]
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def refused(word: str) -> float:
    raise ValueError(f"{word} is no number of a plan")


@cache
def types_of(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def built(kind: Any, value: Any, where: str) -> Any:
    """A value of a declared type from its plain form; ValueError, with its place, for anything else."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, UnionType):
        (inner,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else built(inner, value, where)
    if kind in (int, float, bool, str):
        if type(value) is not kind:
            raise ValueError(f"{where} is {cut(repr(value))}; expected {kind.__name__}")
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where} is {cut(repr(value))}; expected a list")
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[1:] == (...,) else list(args)
        names = [f"{where}[{index}]" for index in range(len(kinds))]
    else:
        kinds, names = list(types_of(kind).values()), [f"{where}.{name}" for name in types_of(kind)]
    if len(value) != len(kinds):
        raise ValueError(f"{where} has {len(value)} entries; expected {len(kinds)}")
    items = [built(*item) for item in zip(kinds, value, names, strict=True)]
    return tuple(items) if origin is tuple else kind(*items)
