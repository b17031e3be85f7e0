"""Passes of a block graph: those of the block schedule once the window is full, with names for latents and tables.

The passes of a new prompt (recache) and of a rebuild are included.
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

BLOCKS = 24  # enough blocks to fill the window of a preset, or to end its segment


@dataclass(frozen=True)
class PlannedPass:
    """A pass of a block graph.

    latents: names of the input latents, in order. tables: prefix of the names of its tables; passes with the same
    prefix read the same tables. steps: sampler step of each block in flight; empty where no solver step follows.
    lead: number of frames in front that are run only to write their keys and values.
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
    """List the passes of a block with a full window, in order, with those of a new prompt or a rebuild.

    fuse_commit: add a pass that runs the commit of the previous block together with the first pass. Both are listed
    separately too, for the ends of a stream. UsageError for a preset that does not allow it.
    """
    count = max(BLOCKS, -(-preset.context.local_attn_size // preset.num_frame_per_block) + 1)
    blocks = list(islice(scheduled_blocks(preset), count))
    full = max(range(count), key=lambda index: (seen_by(blocks[index]), index))
    rebuilds = [block.rebuild for block in blocks if block.rebuild is not None]
    passes = [planned_pass(preset, scheduled) for scheduled in blocks[full].passes if scheduled.kind != "rebuild"]
    passes = with_shared_tables(passes)
    if fuse_commit and not preset.context.commit_in_next:
        passes = fused(preset, passes, blocks[full - 1])
    extra = [blocks[full].recache, *rebuilds[-1:]]
    return [*(planned_pass(preset, scheduled) for scheduled in extra if scheduled is not None), *passes]


def with_shared_tables(passes: list[PlannedPass]) -> list[PlannedPass]:
    """The passes, of which those whose groups see and write the same frames read the same tables."""
    first: dict[object, str] = {}
    shared = []
    for planned in passes:
        groups = tuple(replace(group, timestep=0.0) for group in planned.run.groups)
        key = groups, planned.latents, planned.tables.partition(".")[0]
        shared.append(replace(planned, tables=first.setdefault(key, planned.tables)))
    return shared


def seen_by(block: ScheduledBlock) -> int:
    """Number of context frames of a block's last denoising pass, summed over its groups."""
    *_, last = (scheduled.run for scheduled in block.passes if scheduled.kind == "denoise")
    return sum(len(group.context) for group in last.groups)


def planned_pass(preset: Preset, scheduled: ScheduledPass) -> PlannedPass:
    """Name the latents and tables of a scheduled pass as block graphs do."""
    run, single = scheduled.run, preset.window_blocks == 1
    if scheduled.kind == "recache":
        return PlannedPass("recache", run, ("recache.latents",), "recache", Runs.SWITCH)
    if scheduled.kind == "rebuild":
        runs = Runs.REBUILD if preset.context.commit else Runs.BLOCK
        return PlannedPass("recompute", run, ("recompute.latents",), "recompute", runs)
    if scheduled.kind == "commit":
        tables = "block" if not single or preset.context.has_one_context else "commit"
        return PlannedPass("commit", run, ("latents" if single else "clean",), tables)
    step = scheduled.steps[-1]  # of the newest block: passes between two joins differ by it
    name = f"denoise {step}" if preset.steps_between_joins > 1 else "denoise"
    name = name if scheduled.committed is None or not single else f"commit + {name}"
    finished = () if scheduled.committed is None else ("before" if single else "clean",)
    lead = 0 if scheduled.committed is None else len(scheduled.committed.frames)
    tables = ("block" if scheduled.committed is None else "both") if single else "joint"
    if preset.context.noise2clean_kvrange and preset.steps_between_joins > 1:
        tables = f"{tables}.{step}"
    latents = (*finished, *latent_names(len(scheduled.blocks)))
    return PlannedPass(name, run, latents, tables, steps=scheduled.steps, lead=lead)


def fused(preset: Preset, passes: list[PlannedPass], before: ScheduledBlock) -> list[PlannedPass]:
    """Passes of a block with the commit of the previous block fused into its first denoising pass."""
    alone = preset.window_blocks == 1 and len(preset.weight_sets) == 1
    if not preset.context.commit or not alone or preset.context.needs_pixels:
        raise UsageError(
            f"{preset.name} has no commit that can run in the first pass of the next block; leave fuse_commit out"
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
    """Names of the latents of each block in flight, the least noisy first."""
    return ("latents",) if flight == 1 else tuple(f"latents.{slot}" for slot in range(flight))
