"""Block graphs that an engine runs: a whole block where one launch can run it, else single passes of any groups.

`block_graph` builds the passes; this module gives them the shapes and table names of a graph key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ...graphs.compose import chained
from ...graphs.lowered import Lowered, lower_block
from ...graphs.rewrites import EVERY_LAYER, rewritten
from ...graphs.rewrites.lowp import PrecisionMap
from ...graphs.shards import ALONE, OnPages, Shard
from ...graphs.staged_attention import StagedAttention
from ...graphs.types import PROMPT_TABLE, BlockGraph, GraphShape, PassGraph, Role, Runs, Value, When
from ...models.family import Family
from ...models.registry import family_of
from ...models.spec import ModelSpec
from ...schemes.presets import Preset
from ..kv.page_store import padded_width
from .block_graph import SEEN, TABLES, WRITTEN, BlockGraphBuilder, Layout

FRAME_CHANNELS = "block.frame_channels"  # input of the graph of a model whose frames are given channels
PROGRAMS = 64  # of a process, kept for engines of the same configuration


@dataclass(frozen=True)
class GraphKey:
    """Shapes of a lowered graph; one graph is stored, and captured, for each key.

    whole: a block with its solver steps and commit, or one pass. parts: (rows, frames of each) of the tables of one
    session. latent: [F, C, H, W]. width: columns of the page table, rounded up so that a growing window seldom needs a
    new graph. pages: size of the store. slots: frames that pass through the staging buffer at most; 0 where pages have
    the model's dtype. texts: (text, frames) where frames follow different texts, else empty. head_groups: lists of
    pages of a row, one for each group of heads; 0 for one list. sessions: in the batch. run: the first page and the
    number of pages of every list, for a program that holds their addresses; empty for one that reads the lists.
    commits_before: the first pass of a whole block commits the block before, whose latents are given.
    """

    whole: bool
    parts: tuple[tuple[int, int], ...]
    latent: tuple[int, ...]
    sinks: bool
    width: int
    pages: int
    slots: int = 0
    texts: tuple[tuple[int, int], ...] = ()
    head_groups: int = 0
    sessions: int = 1
    run: tuple[int, ...] = ()
    commits_before: bool = False

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        attention: OnPages,
        whole: bool,
        slots: int,
        texts: tuple[tuple[int, int], ...] = (),
    ) -> GraphKey:
        """Key of a pass or block of latents of `shape`, [B, F, C, H, W].

        slots: of the staging buffer, that one session needs.
        """
        listed, sessions = max(part.page_table.shape[-1] for part in attention.parts), shape[0]
        return cls(
            whole=whole,
            parts=tuple((part.rows // sessions, part.frames) for part in attention.parts),
            latent=tuple(shape[1:]),
            sinks=attention.parts[0].rope_sink is not None,
            width=padded_width(listed),
            pages=attention.kv[0].shape[1],
            slots=max(attention.slots, sessions * slots) if isinstance(attention, StagedAttention) else 0,
            texts=texts,
            head_groups=attention.parts[0].head_groups,
            sessions=sessions,
        )

    def size(self, spec: ModelSpec) -> tuple[int, int]:
        """Picture size (width, height)."""
        return self.latent[3] * spec.vae_stride[1], self.latent[2] * spec.vae_stride[1]

    @property
    def layout(self) -> Layout:
        """Layout of the pass, which names its tables."""
        return Layout(self.parts, ("latents",), "block", self.sinks, self.slots, self.texts, self.head_groups)


@dataclass(frozen=True)
class GraphBuilder:
    """Builds the block graph of a key, for one model and preset.

    rewrites: names of the rewrites to apply. lowp: precision map of the rewrite `lowp`. kv_dtype: dtype of the pages;
    None for the model's. shard: part of each pass that this rank computes. multiprocessors: of the GPU; 0 for a CPU.
    """

    spec: ModelSpec
    preset: Preset
    precision: str
    dtype: torch.dtype
    device: str
    rewrites: tuple[str, ...]
    lowp: PrecisionMap | None = None
    kv_dtype: torch.dtype | None = None
    shard: Shard = ALONE
    multiprocessors: int = 0

    def __call__(self, key: GraphKey) -> BlockGraph:
        """Build the graph of a whole block (seeds in, clean `latents` out), or of one pass (`velocity` out).

        A batch finds its prompts by table where the prompt is read as pages alone; else texts have a row a session.
        """
        block = self.build(key, 1)
        return block if key.sessions == 1 or reads_prompts_by_table(block) else self.build(key, key.sessions)

    def build(self, key: GraphKey, texts: int) -> BlockGraph:
        """Build the graph of a key with `texts` rows of a text."""
        builder = self.builder(key, texts)
        if key.whole:
            committed = self.preset.context.commit_in_next  # by the next block, or by itself
            own = [each for each in builder.planned if each.runs is Runs.BLOCK and each.tables in ("block", "both")]
            passes = tuple(builder.one(planned) for planned in own if planned.steps or not committed)
            return self.rewritten(key, self.block(key, builder, (builder.noise(), *passes), ("latents",)))
        shape = builder.timesteps_shape(key.latent[0])
        timesteps = Value("timesteps", Role.INPUT, shape, torch.float32, When.PASS)
        graph = chained("pass", builder.model_pass(key.layout), None, {"timesteps": timesteps})
        return self.rewritten(key, self.block(key, builder, (graph,), ("velocity",)))

    def rewritten(self, key: GraphKey, block: BlockGraph) -> BlockGraph:
        run = (key.run[0], key.run[1]) if key.run else None
        return rewritten(block, self.rewrites, self.lowp or EVERY_LAYER, self.multiprocessors, run)

    def builder(self, key: GraphKey, texts: int) -> BlockGraphBuilder:
        preset, size = self.preset, key.size(self.spec)
        if key.whole:
            context = replace(preset.context, commit_in_next=False)
            preset = replace(
                preset, num_frame_per_block=key.latent[0], independent_first_frame=False, context=context
            )
        else:  # guidance joins the velocities of its branches outside of them
            alone = replace(preset.sampler, guidance_scale=1.0, guidance=None, boundary_ratio=0.0)
            preset = replace(preset, sampler=alone)
        builder = BlockGraphBuilder(
            self.spec, preset, size, self.dtype, self.device, self.precision, key.sessions, key.pages,
            fuse_commit=key.commits_before, kv_dtype=self.kv_dtype, slots=key.slots, shard=self.shard, texts=texts,
            timesteps=1 if key.whole else key.sessions,
        )  # fmt: skip
        builder.max_pages = key.width
        return builder

    def block(
        self, key: GraphKey, builder: BlockGraphBuilder, passes: tuple[PassGraph, ...], results: tuple[str, ...]
    ) -> BlockGraph:
        frames, channels, height, width = key.latent
        tokens = builder.grid[0] * builder.grid[1]
        return BlockGraph(
            model=self.spec.name,
            preset=self.preset.name,
            dtype=self.dtype,
            device=self.device,
            shape=GraphShape(key.sessions, frames, (channels, height, width), tokens, key.pages, key.width),
            timesteps=builder.sampler.timesteps if key.whole else (),
            sigmas=builder.sampler.sigmas if key.whole else (),
            passes=passes,
            prompt=None,
            fold=None,
            results=results,
        )


def reads_prompts_by_table(block: BlockGraph) -> bool:
    """True if passes read of prompts nothing but pages that `PROMPT_TABLE` lists."""

    def by_table(graph: PassGraph, user: fx.Node, node: fx.Node) -> bool:
        if user.target is not torch.ops.inferix.block_attention.default:
            return False
        kv, table = user.args[1:3]
        listed = graph.inputs.get(table.name) if isinstance(table, fx.Node) else None
        return kv is node and listed is not None and listed.name == PROMPT_TABLE

    return all(
        by_table(graph, user, node)
        for graph in block.passes
        for node in graph.graph.find_nodes(op="placeholder")
        if (value := graph.inputs[node.name]).role == Role.INPUT and value.when == When.PROMPT
        for user in node.users
    )


def lowered_graph(graphs: GraphBuilder, key: GraphKey) -> Lowered:
    """Build the program of a key once in a process. It holds no tensor, so engines of one configuration share it."""
    return cached_program(family_of(graphs.spec), graphs, key)


@lru_cache(maxsize=PROGRAMS)
def cached_program(family: Family, graphs: GraphBuilder, key: GraphKey) -> Lowered:
    """family: part of the cache's key, since another family may be registered under the same name."""
    return lower_block(graphs(key))


def stores(attention: OnPages) -> dict[str, Tensor]:
    """Page tensors by their names in block graphs."""
    named = {f"kv.{layer}": kv for layer, kv in enumerate(attention.kv)}
    named |= {f"scale.{layer}": scale for layer, scale in enumerate(attention.scales or ())}
    return named | ({"staging": attention.staging} if isinstance(attention, StagedAttention) else {})


def tables(key: GraphKey, attention: OnPages, prefix: str = "block") -> dict[str, Tensor]:
    """Tables of a pass by their names in its graph, which begin with `prefix`."""
    named = {"rope_rows": attention.rope_rows, "rope_columns": attention.rope_columns}
    parts = tuple((part.rows // key.sessions, part.frames) for part in attention.parts)
    layout = replace(key.layout, parts=parts, tables=prefix)
    for index, part in enumerate(attention.parts):
        for what in TABLES:
            if (tensor := getattr(part, what)) is not None:
                named[layout.table(index, what)] = tensor
        assert part.page_table.shape[-1] == key.width, (part.page_table.shape, key.width)
    if isinstance(attention, StagedAttention):
        lists = dict(zip(WRITTEN, attention.written, strict=True))
        if attention.seen is not None:
            pages, slots = attention.seen
            if len(pages) < key.slots:  # unused slots restore page 0, which nothing reads
                pages = F.pad(pages, (0, key.slots - len(pages)))
                slots = torch.arange(key.slots, dtype=slots.dtype, device=slots.device)
            lists |= dict(zip(SEEN, (pages, slots), strict=True))
        named |= {f"{prefix}.{what}": tensor for what, tensor in lists.items()}
    return named
