"""The passes of a block, planned: which frames each runs over and sees, and which step of the sampler it takes.

The timeline says it, of a block whose window is full; what only a new prompt or a rebuild sets off comes with it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import groupby

from ...errors import UsageError
from ...graphs.passes import Pass
from ...graphs.types import Runs
from ...schemes.presets import Preset
from ...schemes.timeline import Timeline
from ..sampler import Sampler

BLOCKS = 24  # enough for the window of a preset to fill, or its segment to end


@dataclass(frozen=True)
class Planned:
    """A pass that a block makes.

    latents: names of what it runs over, in order. tables: name before those of its tables; passes of one name read
    the same. steps: for each block in flight, which step of the sampler it is; none where latents stay as they are.
    lead: frames in front that are only run for the keys and values they leave.
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


def plan_block(preset: Preset, fuse_commit: bool = False) -> list[Planned]:
    """The passes of a block whose window is full, in order, with those that a new prompt or a rebuild adds.

    fuse_commit: the first pass takes the commit of the block before along. Both are also there alone, for a stream's
    ends and for all that needs the commit at once. Raises UsageError for a preset in which they cannot be one.
    """
    timeline, levels = Timeline(preset), Sampler(preset.sampler).timesteps
    size, policy = preset.context.local_attn_size, preset.context
    flight: list[tuple[range, int]] = []
    rebuild: Planned | None = None
    best, before = list[Planned](), list[Planned]()
    last = list[Planned]()
    for _ in range(max(BLOCKS, -(-size // preset.num_frame_per_block) + 1)):
        block = []
        if policy.prompt_switch == "recache":
            seen = copy.deepcopy(timeline).recache_pass(policy.recache_sink)
            block += [Planned("recache", seen, ("recache.latents",), "recache", Runs.SWITCH)] if seen else []
        if timeline.rebuild_due():
            runs = Runs.REBUILD if policy.commit else Runs.BLOCK
            rebuild = Planned("recompute", timeline.rebuild_pass(), ("recompute.latents",), "recompute", runs)
        while not flight or flight[0][1] < len(levels):
            if len(flight) < preset.window_blocks:
                flight.append((timeline.admit().frames, 0))
            run = timeline.joint_pass([(frames, levels[step]) for frames, step in flight], frozenset())
            alone = preset.window_blocks == 1
            name, tables = (f"denoise {flight[0][1]}", "block") if alone else ("denoise", "joint")
            steps = tuple(step for _, step in flight)
            block.append(Planned(name, run, latent_names(len(flight)), tables, steps=steps))
            flight = [(frames, step + 1) for frames, step in flight]
        frames, _ = flight.pop(0)
        if policy.commit:
            clean = "latents" if preset.window_blocks == 1 else "clean"
            block.append(Planned("commit", timeline.commit_pass(frames), (clean,), "block"))
        timeline.forget(block[-1].run.groups[-1].context)
        if seen_by(block) >= seen_by(best):
            best, before = block, last
        last = block
    if fuse_commit:
        best = fused(preset, best, before)
    switch = [planned for planned in best if planned.runs == Runs.SWITCH]
    return [*switch, *([rebuild] if rebuild else []), *(planned for planned in best if planned not in switch)]


def fused(preset: Preset, block: list[Planned], before: list[Planned]) -> list[Planned]:
    """The block with the commit of the one before in its first denoising pass."""
    if not preset.context.commit or preset.window_blocks > 1 or preset.context.needs_pixels:
        raise UsageError(
            f"{preset.name} has no commit that could wait for the next block's first pass; leave fuse-commit out"
        )
    commit = next(planned for planned in before if planned.name == "commit")
    first = next(planned for planned in block if planned.steps)
    both = Planned(
        name=f"commit + {first.name}",
        run=Pass((*commit.run.groups, *first.run.groups)),
        latents=("before", *first.latents),
        tables="both",
        steps=first.steps,
        lead=len(commit.run.frames),
    )
    alone = {first: [replace(first, runs=Runs.FLUSH), both]}
    flushed = [part for planned in block for part in alone.get(planned, [planned])]
    return [replace(part, runs=Runs.FLUSH) if part.name == "commit" else part for part in flushed]


def latent_names(flight: int) -> tuple[str, ...]:
    """Names of the latents of each block in flight, the cleanest first."""
    return ("latents",) if flight == 1 else tuple(f"latents.{slot}" for slot in range(flight))


def seen_by(block: list[Planned]) -> int:
    """Frames that the groups of a block's last denoising pass see; 0 for no block."""
    denoising = [planned for planned in block if planned.steps]
    return sum(len(group.context) for group in denoising[-1].run.groups) if denoising else 0
