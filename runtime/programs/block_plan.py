"""The passes of a block graph: those of the block schedule once the window is full, with names for what each reads.

Passes that only a new prompt or a rebuild sets off are among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, islice

from ...errors import UsageError
from ...graphs.passes import Pass
from ...graphs.types import Runs
from ...schemes.block_schedule import ScheduledBlock, ScheduledPass
from ...schemes.presets import Preset
from ..sampler import scheduled_blocks

BLOCKS = 24  # enough for the window of a preset to fill, or its segment to end


@dataclass(frozen=True)
class PlannedPass:
    """A pass of a block graph.

    latents: names of what it runs over, in order. tables: prefix of the names of its tables; passes with the same
    prefix read the same. steps: for each block in flight, the sampler step it takes; none where latents stay as they
    are. lead: frames in front that are only run for the keys and values they leave.
    """

    name: str
    run: Pass
    latents: tuple[str, ...]
    tables: str
    runs: Runs = Runs.BLOCK
    steps: tuple[int, ...] = ()
    lead: int = 0

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(groups, frames of each) of neighbouring groups with equally many frames."""
        sizes = [len(group.frames) for group in self.run.groups]
        return tuple((len(list(same)), frames) for frames, same in groupby(sizes))


def plan_block(preset: Preset, fuse_commit: bool = False) -> list[PlannedPass]:
    """The passes of a block whose window is full, in order, with those that a new prompt or a rebuild adds.

    fuse_commit: the first pass takes the commit of the block before along. Both are also there alone, for a stream's
    ends and for all that needs the commit at once. Raises UsageError for a preset in which they cannot be one.
    """
    count = max(BLOCKS, -(-preset.context.local_attn_size // preset.num_frame_per_block) + 1)
    blocks = list(islice(scheduled_blocks(preset), count))
    full = max(range(count), key=lambda index: (seen_by(blocks[index]), index))
    rebuilds = [block.rebuild for block in blocks if block.rebuild is not None]
    passes = [planned_pass(preset, scheduled) for scheduled in blocks[full].passes if scheduled.kind != "rebuild"]
    if fuse_commit:
        passes = fused(preset, passes, blocks[full - 1])
    extra = [blocks[full].recache, *rebuilds[-1:]]
    return [*(planned_pass(preset, scheduled) for scheduled in extra if scheduled is not None), *passes]


def seen_by(block: ScheduledBlock) -> int:
    """Frames that the groups of a block's last denoising pass see."""
    *_, last = (scheduled.run for scheduled in block.passes if scheduled.kind == "denoise")
    return sum(len(group.context) for group in last.groups)


def planned_pass(preset: Preset, scheduled: ScheduledPass) -> PlannedPass:
    """A scheduled pass under the names that graphs have for its latents and tables."""
    run, alone = scheduled.run, preset.window_blocks == 1
    if scheduled.kind == "recache":
        return PlannedPass("recache", run, ("recache.latents",), "recache", Runs.SWITCH)
    if scheduled.kind == "rebuild":
        runs = Runs.REBUILD if preset.context.commit else Runs.BLOCK
        return PlannedPass("recompute", run, ("recompute.latents",), "recompute", runs)
    if scheduled.kind == "commit":
        return PlannedPass("commit", run, ("latents" if alone else "clean",), "block")
    name, tables = (f"denoise {scheduled.steps[0]}", "block") if alone else ("denoise", "joint")
    return PlannedPass(name, run, latent_names(len(scheduled.blocks)), tables, steps=scheduled.steps)


def fused(preset: Preset, passes: list[PlannedPass], before: ScheduledBlock) -> list[PlannedPass]:
    """A block's passes with the commit of the block before in its first denoising pass."""
    if not preset.context.commit or preset.window_blocks > 1 or preset.context.needs_pixels:
        raise UsageError(
            f"{preset.name} has no commit that could wait for the next block's first pass; leave fuse-commit out"
        )
    (commit,) = (scheduled.run for scheduled in before.passes if scheduled.kind == "commit")
    first, *rest = passes
    both = PlannedPass(
        name=f"commit + {first.name}",
        run=Pass((*commit.groups, *first.run.groups)),
        latents=("before", *first.latents),
        tables="both",
        steps=first.steps,
        lead=len(commit.frames),
    )
    rest = [replace(planned, runs=Runs.FLUSH) if planned.name == "commit" else planned for planned in rest]
    return [replace(first, runs=Runs.FLUSH), both, *rest]


def latent_names(flight: int) -> tuple[str, ...]:
    """Names of the latents of each block in flight, the cleanest first."""
    return ("latents",) if flight == 1 else tuple(f"latents.{slot}" for slot in range(flight))
