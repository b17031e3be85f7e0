"""The block schedule: which passes a stream makes, over which frames, seeing and writing which, at which sampler steps.

A stream's state is its `Timeline` and its blocks in flight. `recache_pass`, `rebuild_pass`, `denoise_passes` and
`commit_pass` choose the next pass from that state, in this order within a block. The engine runs each pass before it
asks for the next; `stream_blocks` lists the same passes for planners and runs none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

from ..graphs.passes import Group, Pass
from .guidance import Guidance
from .page_needs import branches, window
from .presets import Preset
from .timeline import Span, Timeline

Kind = Literal["recache", "rebuild", "denoise", "commit"]


@dataclass(frozen=True)
class ScheduledPass:
    """One pass of a stream.

    blocks: those it denoises or commits, in token order. steps: for each block it denoises, the sampler step it takes.
    committed: the finished block before them that a denoising pass commits.
    clears_cache: the cache is emptied before the pass, which writes keys and values of all frames seen from then on.
    beside: frames that the cache keeps although the pass does not see them.
    """

    kind: Kind
    run: Pass
    blocks: tuple[Span, ...] = ()
    steps: tuple[int, ...] = ()
    clears_cache: bool = False
    beside: tuple[int, ...] = ()
    committed: Span | None = None

    @property
    def window(self) -> tuple[int, ...] | None:
        """Frames that the cache holds for the pass; see `window_of`."""
        return window_of(self.run, self.beside)

    def branch_runs(self, guidance: Guidance) -> dict[int, Pass]:
        """The pass as each branch of guidance runs it, by the number of the branch."""
        runs = ((number, branch_run(guidance, self.run, number)) for number in range(len(guidance.branches)))
        return {number: run for number, run in runs if run is not None}

    @property
    def own(self) -> Pass:
        """The pass over the blocks that it denoises, without the block that it commits."""
        committed = () if self.committed is None else self.committed.frames
        return replace(self.run, groups=tuple(group for group in self.run.groups if group.frames[0] not in committed))

    @property
    def without_commit(self) -> ScheduledPass:
        """The pass where the block before has been committed by itself."""
        return replace(self, run=self.own, committed=None)

    @property
    def context(self) -> int:
        """Most latent frames that one of its groups sees, itself included."""
        return max(len(group.context) for group in self.run.groups)


@dataclass(frozen=True)
class ScheduledBlock:
    """The passes of one block of a stream, in the order in which they run.

    span: the block that they finish. recache: the pass that a new prompt would add before them, or None.
    commit_before: the pass that a new prompt would take out of the first, where that commits the block before. decoded:
    latent frames the decoder runs over: the block's own, and those that a restarted decoder begins with. encoded:
    pictures encoded again for a rebuild.
    """

    span: Span
    passes: tuple[ScheduledPass, ...]
    recache: ScheduledPass | None
    commit_before: ScheduledPass | None
    decoded: int
    encoded: int

    @property
    def context(self) -> int:
        """Most latent frames that a denoising pass sees."""
        return max(scheduled.context for scheduled in self.passes if scheduled.kind == "denoise")

    @property
    def rebuild(self) -> ScheduledPass | None:
        """The pass that rebuilds the context before the block is denoised."""
        return next((scheduled for scheduled in self.passes if scheduled.kind == "rebuild"), None)

    @property
    def first(self) -> bool:
        """True for the block that begins the stream."""
        return self.span.frames.start == 0

    @property
    def decoder_begins(self) -> bool:
        """True where the decoder has no state yet: in a stream's first block, and after a restart."""
        return self.first or self.decoded > len(self.span.frames)


class InFlight(Protocol):
    """A block being denoised; step: sampler steps it has taken."""

    span: Span
    step: int


@dataclass
class BlockProgress:
    """A block in flight of a stream that is only planned."""

    span: Span
    step: int = 0


B = TypeVar("B", bound=InFlight)


def supports_whole_block(preset: Preset, block: int | None = None) -> bool:
    """True where all steps and the commit of a block can be one program: one block in flight, no guidance.

    All of them then read the same page tables and text; with `commit_in_next`, the first step and the commit of the
    block before read other tables, and its frames are given no channels. block: the number of a block, of which the
    first cannot if it has a step list of its own, nor the second if it commits one of another size.
    """
    policy = preset.context
    own_steps = block == 0 and bool(preset.sampler.denoising_step_list_first_chunk)
    unequal = block == 1 and policy.commit_in_next and preset.block_size(0) != preset.num_frame_per_block
    alone = preset.window_blocks == 1 and branches(preset) == 1
    channels = policy.commit_in_next and policy.image == "channels"
    return alone and policy.has_one_context and not (own_steps or unequal or channels)


def branch_run(guidance: Guidance, run: Pass, number: int) -> Pass | None:
    """A pass as one branch of guidance runs it.

    None where the branch has no weight in it and no clean frames to commit to its past.
    """
    branch, own = guidance.branches[number], run.of_branch(number)
    if own is not None and branch.weights:
        own = replace(own, weights=branch.weights)

    def has_weight(group: Group) -> bool:
        return group.denoised and guidance.weights_at(group.timestep)[number] != 0

    if own is None or (branch.writes_past and any(group.write and not group.denoised for group in own.groups)):
        return own
    if not branch.sees_past:
        alone = own.of_groups(has_weight)
        return None if alone is None else alone.without_past()
    if not any(map(has_weight, own.groups)):
        return None
    return own if branch.reads is None else own.read_only()


def window_of(run: Pass, beside: Sequence[int] = ()) -> tuple[int, ...] | None:
    """Frames that the cache holds for a pass, ascending; None for a pass that writes nothing and changes no page.

    They are all that its groups see, except frames of groups that do not write: those have pages for this pass only.
    beside: frames that it holds as well.
    """
    if not run.written:
        return None
    return tuple(sorted({*beside, *(frame for group in run.groups for frame in group.context)} - {*run.scratch}))


def recache_pass(timeline: Timeline) -> ScheduledPass | None:
    """The pass over the visible past under a new prompt; None where the policy or an empty past asks for none."""
    policy = timeline.preset.context
    if policy.prompt_switch != "recache" or (run := timeline.recache_pass(policy.recache_sink)) is None:
        return None
    run = replace(run, condition=timeline.preset.sampler.condition(0))
    return ScheduledPass("recache", run, clears_cache=policy.recache_sink)


def rebuild_pass(timeline: Timeline) -> ScheduledPass | None:
    """The pass over the last clean frames that begins a segment; None where the next block needs none."""
    if not timeline.rebuild_due():
        return None
    run = replace(timeline.rebuild_pass(), condition=timeline.preset.sampler.condition(0))
    return ScheduledPass("rebuild", run, clears_cache=True)


def reencodes_head(preset: Preset, rebuild: Pass) -> bool:
    """True where a rebuild encodes its first frame again from its picture; it keeps a stream's first frame as it is."""
    return preset.context.reencode_head and rebuild.frames[0] > 0


def joins(preset: Preset, flight: Sequence[InFlight]) -> bool:
    """True where a new block joins before the next denoising pass: once the newest has taken its share of the steps."""
    return not flight or (len(flight) < preset.window_blocks and flight[-1].step >= preset.steps_between_joins)


def denoise_pass(
    timeline: Timeline, flight: Sequence[InFlight], timesteps: Sequence[float], clean: frozenset[int] = frozenset()
) -> ScheduledPass:
    """One sampler step of all blocks in flight, after the commit of the timeline's uncommitted block.

    timesteps: of each step; frames in `clean` get timestep 0.
    """
    policy, steps = timeline.preset.context, tuple(block.step for block in flight)
    ranges = [policy.key_range(step, len(timesteps)) for step in steps]
    run = timeline.joint_pass([(block.span.frames, timesteps[block.step]) for block in flight], clean, ranges)
    if (finished := timeline.uncommitted) is not None:
        run = Pass((*timeline.commit_pass(finished.frames).groups, *run.groups))
    run = replace(run, condition=timeline.preset.sampler.condition(steps[-1]))
    beside = timeline.beside(run) if policy.has_key_ranges else ()
    blocks = tuple(block.span for block in flight)
    return ScheduledPass("denoise", run, blocks, steps, beside=beside, committed=finished)


def denoise_passes(
    timeline: Timeline,
    flight: list[B],
    timesteps: Sequence[float],
    admit: Callable[[], B],
    clean: frozenset[int] = frozenset(),
) -> Iterator[ScheduledPass]:
    """Yield denoising passes until the first block in flight has taken all steps; it then is `flight[0]`.

    admit makes the next block of the timeline, which is appended to `flight` when it joins. The caller runs each pass
    and advances `step` of every block in flight before it resumes the iterator. What a commit in the first pass saw
    stays cached until the last, since a block that is taken back commits again.
    """
    seen: tuple[int, ...] = ()
    while not flight or flight[0].step < len(timesteps):
        if joins(timeline.preset, flight):
            flight.append(admit())
        scheduled = denoise_pass(timeline, flight, timesteps, clean)
        if scheduled.committed is not None:
            seen = scheduled.window or ()
        elif scheduled.run.written:
            scheduled = replace(scheduled, beside=tuple(sorted({*seen, *scheduled.beside})))
        yield scheduled
        timeline.uncommitted = None


def commit_pass(timeline: Timeline, span: Span) -> ScheduledPass:
    """The pass over a clean block that leaves its keys and values in the cache."""
    run = replace(timeline.commit_pass(span.frames), condition=timeline.preset.sampler.condition(0))
    return ScheduledPass("commit", run, (span,), beside=timeline.beside(run))


def next_block(
    timeline: Timeline,
    flight: list[BlockProgress],
    timesteps: Sequence[float],
    clean: frozenset[int] = frozenset(),
) -> ScheduledBlock:
    """Plan the next block, and move the timeline and the blocks in flight past it."""
    policy = timeline.preset.context
    before = timeline.uncommitted if policy.clean_text == "prompt" else None
    commit_before = None if before is None else commit_pass(timeline, before)
    recache, rebuild = recache_pass(timeline.fork()), rebuild_pass(timeline)
    passes = [rebuild] if rebuild is not None else []
    for scheduled in denoise_passes(timeline, flight, timesteps, lambda: BlockProgress(timeline.admit()), clean):
        passes.append(scheduled)
        for block in flight:
            block.step += 1
    span = flight.pop(0).span
    if policy.commit_in_next:
        timeline.uncommitted = span
    elif policy.commit:
        passes.append(commit_pass(timeline, span))
    if (cached := passes[-1].window) is not None:
        timeline.forget(cached)
    restarted = len(rebuild.run.frames) if rebuild is not None and policy.restart_decoder else 0
    encoded = int(rebuild is not None and reencodes_head(timeline.preset, rebuild.run))
    return ScheduledBlock(span, tuple(passes), recache, commit_before, restarted + len(span.frames), encoded)


def stream_blocks(
    preset: Preset,
    timesteps: Sequence[float],
    clean: frozenset[int] = frozenset(),
    first: Sequence[float] | None = None,
) -> Iterator[ScheduledBlock]:
    """Blocks 0, 1, ... of an endless stream under one prompt.

    timesteps: of each sampler step (`Sampler.timesteps`). clean: frames that are given, as in a clamped image.
    first: timesteps of block 0 where it has others.
    """
    timeline, flight = Timeline(preset), list[BlockProgress]()
    yield next_block(timeline, flight, timesteps if first is None else first, clean)
    while True:
        yield next_block(timeline, flight, timesteps, clean)


def blocks_before_repeat(preset: Preset) -> int:
    """Blocks after which a stream surely repeats itself, its window full; a preset without a window has none."""
    return -(-2 * window(preset) // preset.num_frame_per_block) + preset.window_blocks


def repeat_period(preset: Preset) -> int:
    """Blocks of a stream that repeat for ever once its window is full: those of a segment, else one."""
    policy = preset.context
    return (policy.segment_frames - policy.rebuild_frames) // preset.num_frame_per_block if policy.segment_frames else 1
