"""Work of a block, counted and not measured: its passes, their FLOPs, and a lower bound of the bytes they move.

FLOPs and bytes come from `runtime.capacity.costs`. The lower bound has the weights once per pass, each visible page
once, the pages written, and a decoder's cached frames read and written. Implementations may move more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ..errors import UsageError
from ..graphs.passes import Pass
from ..graphs.rewrites.lowp import PrecisionMap
from ..models.decoder import DecoderSpec
from ..models.spec import ModelSpec
from ..runtime.capacity import costs
from ..runtime.sampler import scheduled_blocks
from ..schemes.block_schedule import ScheduledBlock
from ..schemes.presets import Preset

HORIZON = 64  # blocks within which a bounded window fills


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes moved."""

    flops: int
    nbytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


def blocks_until_full(preset: Preset) -> int:
    """Number of blocks before the first with the largest window. Raises UsageError for a window without a bound."""
    context = preset.context
    if context.local_attn_size == -1 and context.commit and not context.segment_frames:
        raise UsageError(
            f"{preset.name} has local_attn_size=-1, so its window is never full; set frames_in_window, such as 21"
        )
    bound = max(context.local_attn_size, context.segment_frames, context.rebuild_frames)
    blocks = scheduled_blocks(preset)
    seen = [next(blocks).context for _ in range(HORIZON + bound // preset.num_frame_per_block)]
    return seen.index(max(seen))


def stays_full(preset: Preset) -> bool:
    """Return True if all blocks after the first full window have one too; False for presets with segments."""
    full = blocks_until_full(preset)
    return len({plan.context for plan in islice(scheduled_blocks(preset), full, full + HORIZON)}) == 1


def until_seen(plans: Iterator[ScheduledBlock], window: int, blocks: int) -> list[ScheduledBlock]:
    """Take plans until `blocks` of them have a full window of `window` frames."""
    taken: list[ScheduledBlock] = []
    while sum(plan.context == window for plan in taken) < blocks:
        taken.append(next(plans))
    return taken


def pass_work(
    spec: ModelSpec, run: Pass, size: tuple[int, int], dtype: str, kv_dtype: str | None = None,
    precision: PrecisionMap | None = None,
) -> Work:  # fmt: skip
    """Work of one pass. kv_dtype: of pages, the model's if None. precision: low-precision layers, none if None."""
    tokens = spec.tokens_per_frame(size)
    traffic = costs.pass_traffic(spec, tokens, run, dtype, kv_dtype or dtype, precision)
    return Work(costs.pass_flops(spec, tokens, run).total, traffic)


def decoder_work(spec: DecoderSpec, latent: tuple[int, int], frames: int, dtype: str) -> Work:
    """Work of decoding `frames` latent frames of (height, width) in the middle of a stream."""
    item, area = costs.ITEMSIZE[dtype], latent[0] * latent[1]
    weights = spec.decoding_parameters
    pictures = 3 * area * spec.spatial_stride**2 * spec.temporal_stride
    moved = item * (weights + frames * (spec.z_dim * area + pictures))
    return Work(
        frames * spec.decode_flops(latent), moved + 2 * costs.decoder_state_bytes(spec, latent, dtype)
    )
