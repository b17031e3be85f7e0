"""One stream's place in time: which frames come next, what they may see, and at which positions.

Frames are numbered from 0 over the whole stream. `Timeline` turns them and a `ContextPolicy` into passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace

from ..graphs.passes import NULL, PROMPT, Group, Pass
from .presets import Preset


@dataclass(frozen=True)
class Span:
    """A block's number and its frames."""

    index: int
    frames: range


@dataclass
class Timeline:
    """Host integers only.

    origin: the frame at position 0, moved by a rebuild. sink: frames that stay visible. pinned: first block of
    the newest shot after a cut. places: absolute position of each frame that may still be seen. uncommitted: the last
    finished block, where its commit runs in the first pass of the next one.
    """

    preset: Preset
    next_block: int = 0
    next_frame: int = 0
    origin: int = 0
    shot: int = 0
    sink: tuple[int, ...] = field(init=False)
    pinned: tuple[int, ...] = ()
    pin_next: bool = False
    places: dict[int, int] = field(default_factory=dict)
    uncommitted: Span | None = None

    def __post_init__(self) -> None:
        self.sink = tuple(range(self.preset.context.sink_size))

    def fork(self) -> Timeline:
        """A copy that goes on by itself."""
        twin = copy(self)
        twin.places = dict(self.places)
        return twin

    def admit(self, given: bool = False) -> Span:
        """The next block of the stream; a `given` one (a prefix) is not counted."""
        frames = range(self.next_frame, self.next_frame + self.preset.block_size(self.next_frame))
        offset = self.shot * self.preset.context.shot_offset - self.origin
        self.places |= {frame: frame + offset for frame in frames}
        if self.pin_next:
            self.pinned, self.pin_next = tuple(frames), False
        span = Span(self.next_block, frames)
        self.next_block += 0 if given else 1
        self.next_frame = frames.stop
        return span

    def cut_shot(self) -> None:
        """A new shot begins with the next block."""
        if self.preset.context.shot_offset:
            self.shot += 1
            self.pin_next = True

    def follow_rest(self, arrival: int | None) -> None:
        """Hold frames of a rest as the sink, as the policy's `rest_sink` says, or give them back to the window.

        arrival: the frame whose place the block before the newest still shows; None if that block moved. Pages of the
        frames that become the sink are still in the cache.
        """
        policy = self.preset.context
        self.sink = self.sink[: max(policy.sink_size, policy.rest_sink)]  # fewer once the window has become narrower
        first = self.next_frame - policy.local_attn_size  # that the newest block would see without a sink
        if policy.rest_sink and arrival is not None:
            if len(self.sink) == policy.rest_sink and arrival <= self.sink[0]:
                return
            if arrival <= first:
                self.sink = tuple(range(first, first + policy.rest_sink))
                return
        self.sink = self.sink[: max(policy.sink_size, len(self.sink) - self.preset.num_frame_per_block)]

    def visible(self, end: int) -> tuple[int, ...]:
        """Frames seen by those that end before frame `end`, ascending."""
        size = self.preset.context.local_attn_size
        if size == -1 or end - self.origin <= size:
            return tuple(range(self.origin, end))
        start = end - (size - len(self.sink))
        pinned = set(self.sink)
        if any(frame < start for frame in self.pinned):
            pinned |= set(self.pinned)
            start = end - (size - len(pinned))
        return tuple(sorted(pinned | set(range(start, end))))

    def group(self, frames: Sequence[int], timestep: float, context: tuple[int, ...], write: bool = True) -> Group:
        """A group whose positions follow the policy."""
        return Group(tuple(frames), timestep, context, self.positions(context, write), write)

    def clean_group(self, frames: Sequence[int], context: tuple[int, ...]) -> Group:
        """A group over clean latents, which writes."""
        text = NULL if self.preset.context.clean_text == "null" else PROMPT
        return replace(self.group(frames, self.preset.sampler.context_noise, context), text=text, denoised=False)

    def key_range(self, blocks: int | None, end: int, context: tuple[int, ...]) -> tuple[int, ...]:
        """Frames of a context that the last of `blocks` blocks sees, which ends before `end`; None for all of them.

        Sink and pinned frames stay visible.
        """
        if blocks is None:
            return context
        start, pinned = end - blocks * self.preset.num_frame_per_block, {*self.sink, *self.pinned}
        return tuple(frame for frame in context if frame < end and (frame >= start or frame in pinned))

    def positions(self, context: tuple[int, ...], write: bool = True) -> tuple[int, ...]:
        """Temporal rotary position of each frame of a context."""
        kind = self.preset.context.positions
        if kind == "window-relative":
            return tuple(range(len(context)))
        if kind == "contiguous" and not write:
            last = self.places[context[-1]]
            return tuple(range(last - len(context) + 1, last + 1))
        return tuple(self.places[frame] for frame in context)

    def joint_pass(
        self, blocks: Sequence[tuple[range, float]], clean: frozenset[int], ranges: Sequence[int | None] = ()
    ) -> Pass:
        """One denoising pass over blocks in flight, (frames, timestep) each; `clean` frames have timestep 0.

        A block alone writes its keys and values where its clean ones will stand; several leave none. ranges: how many
        blocks each sees, itself the last; None, or no ranges, for all that the newest sees.
        """
        visible = self.visible(blocks[-1][0].stop)
        write = self.preset.window_blocks == 1
        groups = []
        for (frames, timestep), seen in zip(blocks, ranges or [None] * len(blocks), strict=True):
            context = self.key_range(seen, frames.stop, visible)
            for is_clean, level in ((True, 0.0), (False, timestep)):
                part = [frame for frame in frames if (frame in clean) == is_clean]
                if part:
                    groups.append(self.group(part, level, context, write))
        return Pass(tuple(groups))

    def commit_pass(self, frames: range) -> Pass:
        """The pass over a clean block that leaves its keys and values."""
        policy, end = self.preset.context, frames.stop
        if policy.clean_chunk_kvrange:
            context = self.key_range(policy.clean_chunk_kvrange, end, self.visible(self.next_frame))
        elif policy.commit_sees_sink:
            context = self.visible(end)
        else:
            first = self.origin if policy.local_attn_size == -1 else max(self.origin, end - policy.local_attn_size)
            context = tuple(range(first, end))
        return self.clean_pass(self.clean_group(frames, context))

    def clean_pass(self, *groups: Group) -> Pass:
        """A pass over clean latents."""
        return Pass(groups, weights=int(self.preset.context.clean_weights == "memory"))

    def beside(self, run: Pass) -> tuple[int, ...]:
        """Frames that the cache keeps although a pass that writes does not see them.

        They are those of the sink that stand before all that it sees; where blocks have key ranges, all clean frames in
        the window of the newest block.
        """
        if self.preset.context.has_key_ranges:
            end = max(run.written, default=-1) + 1
            return tuple(frame for frame in self.visible(self.next_frame) if frame < end)
        first = min(group.context[0] for group in run.groups)
        return tuple(frame for frame in self.sink if self.origin <= frame < first)

    def recache_pass(self, recache_sink: bool) -> Pass | None:
        """The visible past under a new prompt, in one pass; None where there is none.

        The frames see each other and the sink. While the window still begins at the stream's first frame, the pass
        recomputes the sink with the rest. After that the sink keeps its keys and values; with `recache_sink` it moves
        to the first frames of the window instead, and is recomputed there. Source: LongLive (arXiv 2509.22622).
        """
        end = self.next_frame
        if end == self.origin:
            return None
        size = self.preset.context.local_attn_size
        first = self.origin if size == -1 else max(self.origin, end - size)
        if recache_sink and self.sink:
            self.sink = tuple(range(first, first + len(self.sink)))
            context = tuple(range(first, end))
        else:
            context = self.visible(end)
        recomputed = recache_sink or first == self.origin
        frames = [frame for frame in context if recomputed or frame not in self.sink]
        return self.clean_pass(self.clean_group(frames, context)) if frames else None

    def rebuild_due(self) -> bool:
        """True where the context must be rebuilt before the next block."""
        policy, have = self.preset.context, self.next_frame - self.origin
        size = self.preset.block_size(self.next_frame)
        too_long = policy.segment_frames > 0 and have + size > policy.segment_frames
        return have > 0 and (too_long or not policy.commit)

    def rebuild_pass(self) -> Pass:
        """Begin a segment with the last clean frames, block-causal from the first of them, at positions from 0."""
        end = self.next_frame
        self.origin = max(self.origin, end - self.preset.context.rebuild_frames)
        self.sink = tuple(range(self.origin, self.origin + self.preset.context.sink_size))
        frames = range(self.origin, end)
        self.places = {frame: frame - self.origin for frame in frames}
        step = self.preset.num_frame_per_block
        blocks = [frames[start : start + step] for start in range(0, len(frames), step)]
        return self.clean_pass(*(self.clean_group(block, tuple(range(self.origin, block[-1] + 1))) for block in blocks))

    def forget(self, cached: tuple[int, ...]) -> None:
        """Drop the places of frames that are gone for good, once the cache holds the frames `cached`."""
        size = self.preset.context.local_attn_size
        oldest = self.origin if size == -1 else cached[-1] + 1 - size
        needed = {*cached, *self.sink, *self.pinned}
        self.places = {frame: place for frame, place in self.places.items() if frame >= oldest or frame in needed}
