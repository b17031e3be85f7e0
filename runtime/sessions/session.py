"""One stream: its timeline, its conditioning, and what it keeps of the blocks it has made.

A session says what comes next; the engine runs it. `prompt`, `act`, `pause`, `resume` and `stop` may be called
from any thread, and so may a stream be read; all else belongs to the thread that drives the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InferixError, UsageError
from ...models.text.umt5 import load_prompt_embeds
from ...schemes.actions import ActionTrack, check_action
from ...schemes.timeline import Timeline
from ..execution.decode_pipeline import DecoderTrack
from ..kv.paged_cache import PagedCache
from ..noise import Noise
from ..sampler import Sampler
from ..telemetry.records import BlockRecord, Stopwatch
from .branch import Branch, InFlight, PromptChange
from .control_queue import Control, Mailbox
from .lifecycle import ENDED, Lifecycle, State
from .output_queue import Block, Outbox
from .session_file import read_session, write_session
from .session_state import Beginning, Snapshot

if TYPE_CHECKING:
    from ..engine import Engine


@dataclass
class Demand:
    """What one reader wants: so many blocks more to be begun, with pictures or without.

    trouble: why there are no more, where the session could go on.
    """

    left: float
    decode: bool
    trouble: Exception | None = None


@dataclass(eq=False)
class Session:
    """A video being made. Made by `Engine.open`; closed by `close()` or by leaving a `with`."""

    engine: Engine
    timeline: Timeline
    sampler: Sampler
    size: tuple[int, int]
    noise: Noise
    rows: Tensor  # the prompt in force, [text_len, d]
    branches: list[Branch]
    actions: ActionTrack
    source: Tensor | None = None  # latents of the video that blocks start from
    clamped: Tensor | None = None  # latents of an image held as the first frame
    negative: Tensor | None = None  # the prompt that guidance keeps away from, [text_len, d]
    entering: Callable[[], None] | None = None  # what is left to do once there is room for it
    flight: list[InFlight] = field(default_factory=list)
    change: PromptChange | None = None
    recent: Tensor | None = None  # last clean latents, as many as a rebuild or recache may ask for
    pixels: Tensor | None = None  # last decoded pictures, where a rebuild encodes one again
    prefix_frames: NDArray[np.uint8] | None = None  # what the stream goes on from, as the decoder shows it

    def __post_init__(self) -> None:
        host = self.engine.host
        self.id = host.new_id()
        self.life = Lifecycle()
        self.mailbox = Mailbox(host.bell)
        self.outbox = Outbox(host.bell, host.limits.queue_blocks)
        self.track = DecoderTrack(self.engine.decoder, self.timeline.preset.context.rewind_blocks)
        self.kept: list[Snapshot] = []  # of the last blocks' beginnings, as many as can be rewound
        self.beginning: Beginning | None = None  # of the block being made, until it is denoised and committed
        self.demand: Demand | None = None
        self.unshown: list[tuple[Control, int, str | None]] = []  # applied, the block that shows it, refusal
        self.away = False  # whether the pages are in host memory
        self.pausing: int | None = None  # the thread that asked for the last pause
        self.trouble: Exception | None = None  # what went wrong beside the engine's thread
        self.ready_since: float | None = None
        self.record = BlockRecord(self.id, -1, Stopwatch(self.engine.device))

    def __repr__(self) -> str:
        return f"<Session {self.id}, {self.state.value}, {self.size[0]}x{self.size[1]}, next block {self.next_block}>"

    @property
    def state(self) -> State:
        return self.life.state

    @property
    def closed(self) -> bool:
        return self.life.state is State.CLOSED

    @property
    def caches(self) -> list[PagedCache]:
        """Everything that holds pages for this session, what is kept for rewinding included."""
        stages = [self.branches, *(kept.branches for kept in self.kept)]
        return [branch.cache for branches in stages for branch in branches]

    @property
    def conditionings(self) -> list[tuple[Branch, Tensor]]:
        """Branches with the text encoder's rows that they follow, those kept for rewinding included."""
        stages = [(self.branches, self.rows), *((kept.branches, kept.rows) for kept in self.kept)]
        return [
            (branch, rows if place == 0 or self.negative is None else self.negative)
            for branches, rows in stages
            for place, branch in enumerate(branches)
        ]

    @property
    def next_block(self) -> int:
        """Index of the block that is finished next."""
        return self.flight[0].span.index if self.flight else self.timeline.next_block

    @property
    def likeness(self) -> Hashable:
        """What sessions have in common whose next blocks take the same passes over equally many frames."""
        timeline = self.timeline
        first = self.flight[0].span.frames.start if self.flight else timeline.next_frame
        held = self.clamped is not None and first == 0
        steps = tuple(block.step for block in self.flight)
        return self.size, timeline.preset.block_size(timeline.next_frame), steps, timeline.rebuild_due(), held

    @property
    def wants_block(self) -> bool:
        """Whether a block is asked for that there is room for."""
        wanted = self.demand is not None and self.demand.left > 0
        return wanted and self.state in (State.NEW, State.RUNNING) and not self.outbox.full

    def stream(self, blocks: int | None = None, decode: bool = True) -> Iterator[Block]:
        """Yield the next `blocks` blocks, or all there will be; without `decode`, only latents.

        Drives the engine if this thread does; otherwise waits for the one that does. While a block is decoded the
        next one, if it is asked for, is begun, and follows what was told by then. The stream ends early where the
        session is stopped; raises what made the session fail. Where memory runs out, that is raised, too, but the
        block is as if it had not been begun, and the next `stream` makes it.
        """
        if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
            raise UsageError(f"blocks is {blocks!r}; expected a whole number of 1 or more")
        self.check_open()
        return self._blocks(math.inf if blocks is None else blocks, decode)

    def _blocks(self, blocks: float, decode: bool) -> Iterator[Block]:
        host, left = self.engine.host, blocks
        demand = host.ask(self, Demand(blocks - len(self.outbox), decode))
        try:
            while left > 0 and (block := host.next_block(self, demand)) is not None:
                left -= 1
                yield block
        finally:
            host.withdraw(self, demand)

    def prompt(self, text: str | None = None, embeds: Tensor | str | Path | None = None) -> int:
        """Change the prompt from the next block that begins, in the way of the preset's `prompt_switch`.

        Returns the control's id. UsageError for what is no text, or empty; what the text encoder refuses later is told
        in the block's `acks`.
        """
        self.check_open()
        spec = self.engine.spec
        if (text is None) == (embeds is None):
            raise UsageError("give a prompt (--prompt) or prompt_embeds (--prompt-embeds), and not both")
        if embeds is not None:
            embeds = load_prompt_embeds(embeds, spec.text_len, spec.text_dim)
        else:
            self.engine.check_prompt(text)
        return self.mailbox.put("prompt", (text, embeds))

    def act(self, action: str) -> int:
        """Do `action` from the next block that begins, until told otherwise; UsageError for one the model does not
        have. Returns the control's id."""
        self.check_open()
        return self.mailbox.put("act", check_action(action, self.actions.names))

    def pause(self) -> int:
        """Begin no more blocks until `resume`; returns the control's id."""
        self.check_open()
        return self.mailbox.put("pause")

    def resume(self) -> int:
        """Go on after `pause`; returns the control's id."""
        self.check_open()
        return self.mailbox.put("resume")

    def stop(self) -> int:
        """Begin no more blocks; those begun are finished, then the session is closed. Returns the control's id."""
        self.check_open()
        return self.mailbox.put("stop")

    def fork(self) -> Session:
        """A session that goes on from here by itself: it shares pages and decoder state until either writes.

        It stands after the last block that was begun, and has no demand on it until it is streamed.
        """
        self.engine.host.driver.check_owner("fork()")
        self.check_entered()
        return self.engine.host.fork(self)

    def rewind(self, block: int) -> None:
        """Go back to where `block`, one of the last `rewind_blocks`, began; what was made since is forgotten.

        Prompt and actions are again as they were then. UsageError for a block that cannot be gone back to.
        """
        self.engine.host.driver.check_owner("rewind()")
        self.check_open()
        self.engine.host.rewind(self, block)

    def save(self, path: str | Path) -> None:
        """Write all that `restore` needs to go on bit for bit; the file is there whole or not at all."""
        self.engine.host.driver.check_owner("save()")
        self.check_entered()
        self.engine.host.settle(self)
        write_session(self, Path(path))

    @classmethod
    def restore(cls, engine: Engine, path: str | Path) -> Session:
        """A session that goes on where one was saved, by an engine with the same model and preset.

        Raises UsageError for a file of another model, preset or version, InferixError for a broken one.
        """
        engine.host.driver.check_owner("restore()")
        saved = read_session(engine, Path(path))
        session = cls(**saved.fields())
        session.entering = partial(saved.fill, session)
        engine.host.join(session)
        return session

    def remember(self, latents: Tensor, pixels: Tensor | None) -> None:
        """Keep the end of what was made, as far as the context may ask for it."""
        policy = self.timeline.preset.context
        wanted = policy.rebuild_frames
        if policy.prompt_switch == "recache":
            wanted = self.timeline.next_frame if policy.local_attn_size == -1 else policy.local_attn_size
        self.recent = latents if self.recent is None else torch.cat((self.recent, latents))
        self.recent = self.recent[max(0, len(self.recent) - wanted) :].clone()
        if policy.needs_pixels and pixels is not None:
            kept = (policy.rebuild_frames - 1) * self.engine.spec.vae_stride[0] + 1
            self.pixels = pixels if self.pixels is None else torch.cat((self.pixels, pixels))
            self.pixels = self.pixels[max(0, len(self.pixels) - kept) :].clone()

    def recent_frames(self, frames: tuple[int, ...]) -> Tensor:
        """Clean latents of absolute frames that are still kept."""
        assert self.recent is not None
        first = self.timeline.next_frame - len(self.recent)
        return self.recent[[frame - first for frame in frames]]

    def put_away(self) -> None:
        """Move all pages to host memory, what is kept for rewinding included."""
        first, *others = self.caches
        first.offload(*others)
        self.away = True

    def fetch(self) -> None:
        """Have pages that are away on their way back, while others run."""
        if self.away:
            for cache in self.caches:
                cache.prefetch()

    def bring_back(self) -> None:
        """Have the pages where they can be read."""
        if self.away:
            for cache in self.caches:
                cache.onload()
            self.away = False

    def keep_beginning(self) -> None:
        """Remember how things stand before a block, and let go of what can be rewound no more."""
        if self.track.rewind_blocks:
            self.kept.append(Snapshot.of(self))
            while len(self.kept) > self.track.rewind_blocks:
                self.kept.pop(0).release()

    def take_back(self) -> None:
        """Stand where the block that was being made began, as if it had not."""
        assert self.beginning is not None
        self.beginning.give_to(self)
        self.beginning = None
        if self.kept and self.kept[-1].block == self.next_block:
            self.kept.pop().release()

    def check_open(self) -> None:
        """InferixError unless the session can be told to do something."""
        if self.life.failure is not None:
            raise InferixError(f"session {self.id} has failed: {self.life.failure}") from self.life.failure
        if self.state is State.CLOSED:
            raise InferixError(f"session {self.id} is closed; open a new one with engine.open()")
        if self.state is State.DRAINING:
            raise InferixError(f"session {self.id} was stopped and ends with its last block; open a new one")

    def check_entered(self) -> None:
        """InferixError unless the session is open and has what it begins with."""
        self.check_open()
        if self.id in self.engine.host.scheduler.waiting:
            raise InferixError(f"session {self.id} still waits for room; close another one first")

    def close(self) -> None:
        """Free pages, latents and decoder state; InferixError for a session that was closed before."""
        self.engine.host.driver.check_owner("close()")
        if self.closed:
            raise InferixError(f"session {self.id} is closed already")
        self.engine.host.close(self)

    def free(self) -> None:
        """Let go of everything that takes memory, but for finished blocks that no one has taken."""
        for cache in self.caches:
            cache.release()
        self.branches, self.kept, self.flight, self.beginning = [], [], [], None
        self.recent = self.pixels = self.source = self.clamped = self.change = self.entering = None
        self.track.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session, or, in a thread that does not drive the engine, stop it."""
        if self.state in ENDED:
            return
        if self.engine.host.driver.owns():
            self.close()
        elif self.state is not State.DRAINING:
            self.stop()
