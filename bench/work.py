"""What a block has to do, counted and not measured: its passes, their FLOPs, the bytes that must move at least.

FLOPs and bytes come from `runtime.costs`. Bytes are a floor: weights once a pass, pages seen once, pages written, a
decoder's memories read and written; what an implementation moves besides is its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import UsageError
from ..graphs.passes import Pass
from ..graphs.rewrites.lowp import PrecisionMap
from ..models.wan.spec import ModelSpec
from ..runtime.capacity import costs
from ..runtime.sampler import scheduled_blocks
from ..schemes.block_schedule import ScheduledBlock
from ..schemes.presets import Preset

HORIZON = 64  # blocks within which a bounded window must have filled


@dataclass(frozen=True)
class Work:
    flops: int
    nbytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


def blocks_until_full(preset: Preset) -> int:
    """How many blocks come before the first that sees as much as any ever will; UsageError if that grows for ever."""
    context = preset.context
    if context.local_attn_size == -1 and context.commit and not context.segment_frames:
        raise UsageError(
            f"{preset.name} keeps all frames, so its window is never full; give --frames-in-window, such as 21"
        )
    bound = max(context.local_attn_size, context.segment_frames, context.rebuild_frames)
    blocks = scheduled_blocks(preset)
    seen = [next(blocks).context for _ in range(HORIZON + bound // preset.num_frame_per_block)]
    return seen.index(max(seen))


def stays_full(preset: Preset) -> bool:
    """Whether all blocks after the window is full see as much; those of a preset that begins segments anew do not."""
    full = blocks_until_full(preset)
    return len({plan.context for plan in islice(scheduled_blocks(preset), full, full + HORIZON)}) == 1


def until_seen(plans: Iterator[ScheduledBlock], window: int, blocks: int) -> list[ScheduledBlock]:
    """The next plans, until so many of them see the whole window."""
    found: list[ScheduledBlock] = []
    while sum(plan.context == window for plan in found) < blocks:
        found.append(next(plans))
    return found


def pass_work(
    spec: ModelSpec, run: Pass, size: tuple[int, int], dtype: str, kv_dtype: str | None = None,
    precision: PrecisionMap | None = None,
) -> Work:  # fmt: skip
    """One pass, its pages in the model's dtype unless told, its layers too unless a precision map packs them."""
    tokens = spec.tokens_per_frame(size)
    traffic = costs.pass_traffic(spec, tokens, run, dtype, kv_dtype or dtype, precision)
    return Work(costs.pass_flops(spec, tokens, run).total, traffic)


def decoder_work(spec: costs.DecoderSpec, latent: tuple[int, int], frames: int, dtype: str) -> Work:
    """Decoding `frames` latent frames of (height, width) in the middle of a stream."""
    item, area = costs.ITEMSIZE[dtype], latent[0] * latent[1]
    weights = sum(conv.parameters for conv in costs.convs(spec))
    pictures = 3 * area * spec.spatial_stride**2 * spec.temporal_stride
    moved = item * (weights + frames * (spec.z_dim * area + pictures))
    return Work(
        frames * costs.decode_flops(spec, latent), moved + 2 * costs.decoder_state_bytes(spec, latent, dtype)
    )
