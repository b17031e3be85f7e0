"""The graphs that an engine runs: a whole block where one launch can hold it, and single passes of any groups.

`block_graph` builds the passes; here they are cut to the tables that the pages give.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...graphs.compose import chained
from ...graphs.paged_attention import PagedAttention
from ...graphs.rewrites import rewritten
from ...graphs.rewrites.lowp import PrecisionMap
from ...graphs.staged_attention import StagedAttention
from ...graphs.types import BlockGraph, PassGraph, QueryShape, Role, Value, When
from ...models.wan.spec import ModelSpec
from ...schemes.presets import Preset
from .block_graph import SEEN, TABLES, WRITTEN, BlockGraphBuilder, Layout

WIDTH_STEP = 16  # pages
OnPages = PagedAttention | StagedAttention


@dataclass(frozen=True)
class GraphKey:
    """The shape that a lowered graph is made for; one graph is kept, and captured, for each.

    whole: a block with its solver steps and commit, or one pass. parts: (rows, frames of each) of the tables.
    latent: [F, C, H, W]. width: pages that a row can list, in steps, so that a window without end seldom makes a new
    one. pages: of the store. slots: of the buffer before a store of another dtype; 0 for one of the model's.
    """

    whole: bool
    parts: tuple[tuple[int, int], ...]
    latent: tuple[int, ...]
    sinks: bool
    width: int
    pages: int
    slots: int = 0

    @classmethod
    def of(cls, latents: Tensor, attention: OnPages, whole: bool) -> GraphKey:
        listed = max(part.table.shape[1] for part in attention.parts)
        return cls(
            whole=whole,
            parts=tuple((part.rows, part.frames) for part in attention.parts),
            latent=tuple(latents.shape[-4:]),
            sinks=attention.parts[0].rope_sink is not None,
            width=padded_width(listed),
            pages=attention.kv[0].shape[1],
            slots=attention.staging.shape[1] if isinstance(attention, StagedAttention) else 0,
        )

    def size(self, spec: ModelSpec) -> tuple[int, int]:
        """(width, height) of the pictures."""
        return self.latent[3] * spec.vae_stride[1], self.latent[2] * spec.vae_stride[1]

    @property
    def layout(self) -> Layout:
        """How its tables are named."""
        return Layout(self.parts, ("latents",), "block", self.sinks, self.slots)


def padded_width(listed: int) -> int:
    """Pages that a row of a table has room for when it lists `listed`."""
    return -(-listed // WIDTH_STEP) * WIDTH_STEP


@dataclass(frozen=True)
class GraphBuilder:
    """Makes the block graph of a key, for one model and preset.

    rewrites: names of those that are done to it, and lowp after a precision map. kept: dtype of pages, where it is
    another than the model's.
    """

    spec: ModelSpec
    preset: Preset
    precision: str
    dtype: torch.dtype
    device: str
    rewrites: tuple[str, ...]
    lowp: PrecisionMap | None = None
    kept: torch.dtype | None = None

    def __call__(self, key: GraphKey) -> BlockGraph:
        """A whole block: noise in, clean `latents` out. One pass: `latents` and `timesteps` in, `velocity` out."""
        builder = self.builder(key)
        if key.whole:
            passes = tuple(builder.one(planned) for planned in builder.planned if planned.tables == "block")
            return self.rewritten(self.block(key, builder, passes, ("latents",)))
        told = Value("timesteps", Role.INPUT, (1, key.latent[0]), torch.float32, When.PASS)
        graph = chained("pass", builder.model_pass(key.layout), None, {"timesteps": told})
        return self.rewritten(self.block(key, builder, (graph,), ("velocity",)))

    def rewritten(self, block: BlockGraph) -> BlockGraph:
        return rewritten(block, self.rewrites) if self.lowp is None else rewritten(block, self.rewrites, self.lowp)

    def builder(self, key: GraphKey) -> BlockGraphBuilder:
        preset, size = self.preset, key.size(self.spec)
        if key.whole:
            preset = replace(preset, num_frame_per_block=key.latent[0], independent_first_frame=False)
        else:  # guidance joins the velocities of two passes, outside of them
            preset = replace(preset, sampler=replace(preset.sampler, guidance_scale=1.0))
        builder = BlockGraphBuilder(
            self.spec, preset, size, self.dtype, self.device, self.precision, pages=key.pages, kept=self.kept,
            slots=key.slots,
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
            shape=QueryShape(1, frames, (channels, height, width), tokens, key.pages, key.width),
            timesteps=builder.sampler.timesteps if key.whole else (),
            sigmas=builder.sampler.sigmas if key.whole else (),
            passes=passes,
            prompt=None,
            fold=None,
            results=results,
        )


def stores(attention: OnPages) -> dict[str, Tensor]:
    """The tensors behind the pages, by the names that graphs have for them."""
    found = {f"kv.{layer}": kv for layer, kv in enumerate(attention.kv)}
    found |= {f"scale.{layer}": scale for layer, scale in enumerate(attention.scales or ())}
    return found | ({"staging": attention.staging} if isinstance(attention, StagedAttention) else {})


def tables(key: GraphKey, attention: OnPages) -> dict[str, Tensor]:
    """The tables of a pass by the names that its graph has for them."""
    found = {"rope_rows": attention.rope_rows, "rope_columns": attention.rope_columns}
    for index, part in enumerate(attention.parts):
        for what in TABLES:
            if (tensor := getattr(part, what)) is not None:
                found[key.layout.table(index, what)] = tensor
        name = key.layout.table(index, "table")
        found[name] = F.pad(found[name], (0, key.width - found[name].shape[1]))
    if isinstance(attention, StagedAttention):
        told = dict(zip(WRITTEN, attention.written, strict=True))
        if attention.seen is not None:  # slots that nothing is read through take any page
            pages, slots = attention.seen
            every = torch.arange(key.slots, dtype=slots.dtype, device=slots.device)
            told |= dict(zip(SEEN, (F.pad(pages, (0, key.slots - len(pages))), every), strict=True))
        found |= {f"{key.layout.tables}.{what}": tensor for what, tensor in told.items()}
    return found
