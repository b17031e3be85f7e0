"""`Session`: the handle of one stream. It has a state, two queues and a lifecycle; the session manager runs it.

`prompt`, `act`, `move`, `camera`, `pause`, `resume` and `stop` may be called from any thread, and a stream may be read
in any thread. All else belongs to the thread that drives the engine.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import AtCapacity, SessionEnded, UsageError, quoted
from ...models.text.umt5 import load_prompt_embeds
from ...schemes.actions import check_action
from ...schemes.camera import RATES, CameraMove, Poses, checked_poses
from .. import arguments
from ..arguments import embeddings, flag, integer, optional
from ..engine_condition import EngineCondition
from ..kv.paged_cache import PagedCache
from ..limits import Limits
from ..live_video import pictures_of_block
from ..resources import Resources
from ..telemetry.drift_meter import DriftMeter
from ..telemetry.ranges import Ranges
from ..telemetry.records import BlockRecord, Stopwatch
from .control_queue import Control, ControlQueue
from .lifecycle import ENDED, Lifecycle, State
from .output_queue import Block, OutputQueue
from .session_state import RollbackPoint, SessionState


@dataclass
class Demand:
    """One reader's request: `left` more blocks to begin, decoded or not.

    error: why there are no more, where the session itself can go on.
    """

    left: float
    decode: bool
    error: Exception | None = None


class Reading(Protocol):
    """The part of delivery that sessions call."""

    def submit_demand(self, session: Session, demand: Demand) -> Demand: ...
    def withdraw_demand(self, demand: Demand) -> None: ...
    def next_block(self, session: Session, demand: Demand, ready: threading.Event) -> Block | None: ...
    async def await_block(self, session: Session, demand: Demand, ready: asyncio.Event) -> Block | None: ...


class SessionServices(Protocol):
    """The part of the session manager that sessions call."""

    condition: EngineCondition
    limits: Limits
    resources: Resources

    @property
    def delivery(self) -> Reading: ...

    def is_owner(self) -> bool: ...
    def check_owner(self, call: str) -> None: ...
    def check_prompt(self, prompt: object) -> None: ...
    def is_waiting(self, session: Session) -> bool: ...
    def fork(self, session: Session) -> Session: ...
    def rewind(self, session: Session, block: int) -> None: ...
    def feed(self, session: Session, pictures: NDArray[np.uint8]) -> None: ...
    def save(self, session: Session, path: Path, note: str | None = None) -> None: ...
    def restore(self, path: Path) -> Session: ...
    def close(self, session: Session) -> None: ...


class HasManager(Protocol):
    """An engine, as far as `Session.restore` needs one."""

    @property
    def manager(self) -> SessionServices: ...


class Session:
    """A video being made. Opened by `Engine.open`; ended by `close()` or by leaving a `with`.

    id: 32 random hex digits. current: all that the next block depends on. rewind_points: the states at the start of the
    last blocks. rollback_point: where the block in progress rolls back to until it is denoised and committed.
    """

    def __init__(self, id: str, state: SessionState, manager: SessionServices) -> None:
        self.id, self.current, self.manager = id, state, manager
        self.life = Lifecycle()
        self.controls = ControlQueue(manager.condition)
        self.output = OutputQueue(manager.condition, manager.limits.queue_blocks)
        self.rewind_points: list[SessionState] = []
        self.rollback_point: RollbackPoint | None = None
        self.entering: Callable[[], None] | None = None  # run on admission
        self.demand: Demand | None = None
        self.unshown: list[tuple[Control, int, str | None]] = []  # applied, the block that shows it, refusal
        self.begun = False  # a block is being made, in the thread that drives the engine
        self.away = False  # the pages are in host memory
        self.paused_by: int | None = None  # the thread that asked for the last pause
        self.decode_error: Exception | None = None  # raised in the decoder's thread
        self.ready_since: float | None = None
        self.range: tuple[Ranges, Any] | None = None  # of it on a profiler's timeline, and its handle
        self.record = BlockRecord(self.id, -1, Stopwatch(manager.resources.device))
        metered = manager.resources.config.drift_meter
        self.drift_meter = DriftMeter(manager.resources.spec.fps) if metered else None

    def __repr__(self) -> str:
        width, height = self.size
        return f"<Session {self.id}, {self.state.value}, {width}x{height}, next block {self.next_block}>"

    @property
    def state(self) -> State:
        return self.life.state

    @property
    def closed(self) -> bool:
        return self.life.state is State.CLOSED

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.current.size

    @property
    def next_block(self) -> int:
        """Index of the block that is finished next."""
        return self.current.next_block

    @property
    def pictures_wanted(self) -> int:
        """Pictures of a live video that `feed` takes for the next block; 0 where it has them, or is made from none."""
        state = self.current
        if state.live is None or state.live.end > state.timeline.next_frame:
            return 0
        return pictures_of_block(state.preset, self.manager.resources.spec, state.timeline.next_frame)

    @property
    def prefix_frames(self) -> NDArray[np.uint8] | None:
        """The image or video that the stream continues, uint8 [T, H, W, 3], as the decoder shows it."""
        return self.current.prefix_frames

    @property
    def states(self) -> list[SessionState]:
        """The current state and those that can be rewound to."""
        return [self.current, *self.rewind_points]

    @property
    def caches(self) -> list[PagedCache]:
        """Everything that holds pages for this session."""
        return list(dict.fromkeys(branch.cache for state in self.states for branch in state.branches))

    @property
    def requests_block(self) -> bool:
        """True while a block is requested, even if the output queue has no room for it."""
        return self.demand is not None and self.demand.left > 0 and self.state in (State.NEW, State.RUNNING)

    @property
    def wants_block(self) -> bool:
        """True while a block is requested and the output queue has room for it."""
        return self.requests_block and not self.output.full

    def stream(self, blocks: int | None = None, decode: bool = True) -> Iterator[Block]:
        """Yield the next `blocks` blocks, or all there will be; without `decode`, only latents.

        Drives the engine if this thread does; otherwise waits for the one that does. While a block is decoded the
        next one, if it is requested, is begun, and follows the controls that arrived by then. The stream ends early if
        the session is stopped, and raises the error that made the session fail. If memory runs out, or Ctrl-C
        interrupts it, that is raised, too, but the block is rolled back, and the next `stream` makes it.
        """
        blocks, decode = optional(integer(1))("blocks", blocks), flag("decode", decode)
        self.check_open()
        return self._blocks(math.inf if blocks is None else blocks, decode)

    def _blocks(self, blocks: float, decode: bool) -> Iterator[Block]:
        ready, left = threading.Event(), blocks
        with self.output.waking(ready.set), self._requesting(blocks, decode) as demand:
            while left > 0 and (block := self.manager.delivery.next_block(self, demand, ready)) is not None:
                left -= 1
                yield block

    def astream(self, blocks: int | None = None, decode: bool = True) -> AsyncIterator[Block]:
        """The same blocks, awaited on an asyncio loop while another thread runs the engine: no thread for each reader.

        Errors are those of `stream`. UsageError, when a block is awaited, in the thread that drives the engine.
        """
        blocks, decode = optional(integer(1))("blocks", blocks), flag("decode", decode)
        self.check_open()
        return self._awaited(math.inf if blocks is None else blocks, decode)

    async def _awaited(self, blocks: float, decode: bool) -> AsyncIterator[Block]:
        loop, ready, left = asyncio.get_running_loop(), asyncio.Event(), blocks

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody reads any more
                loop.call_soon_threadsafe(ready.set)

        with self.output.waking(wake), self._requesting(blocks, decode) as demand:
            while left > 0 and (block := await self.manager.delivery.await_block(self, demand, ready)) is not None:
                left -= 1
                yield block

    @contextmanager
    def _requesting(self, blocks: float, decode: bool) -> Iterator[Demand]:
        """Request blocks, those that are under way included, for as long as they are read."""
        demand = self.manager.delivery.submit_demand(self, Demand(blocks - len(self.output), decode))
        try:
            yield demand
        finally:
            self.manager.delivery.withdraw_demand(demand)

    def prompt(
        self, text: str | None = None, embeds: Tensor | str | Path | None = None, blend_blocks: int | None = None
    ) -> int:
        """Change the prompt from the next block that begins, in the way of the preset's `prompt_switch`.

        blend_blocks: blocks over which the change goes, from the old prompt alone to the new one alone; None for as
        many as the preset's way takes. Returns the control's id. UsageError for an empty prompt or one that is no text;
        a refusal by the text encoder comes later, in the block's `acks`.
        """
        text, embeds = optional(arguments.text)("text", text), optional(embeddings)("embeds", embeds)
        blend_blocks = optional(integer(1))("blend_blocks", blend_blocks)
        self.check_open()
        spec = self.manager.resources.spec
        if (text is None) == (embeds is None):
            raise UsageError("give a prompt or prompt_embeds, and not both")
        if embeds is not None:
            embeds = load_prompt_embeds(embeds, spec.text_len, spec.text_dim)
        else:
            self.manager.check_prompt(text)
        return self.controls.put("prompt", (text, embeds, blend_blocks))

    def act(self, action: str) -> int:
        """Use `action` from the next block that begins, until another one; returns the control's id.

        UsageError for an action that the model does not have.
        """
        arguments.text("action", action)
        self.check_open()
        return self.controls.put("act", check_action(action, self.current.actions.names))

    def move(self, move: CameraMove) -> int:
        """Hold keys of the camera from the next block that begins, until others; returns the control's id.

        UsageError for a model that follows no camera.
        """
        arguments.instance(CameraMove)("move", move)
        self.check_camera()
        return self.controls.put("camera", move)

    def camera(self, poses: Poses, rate: str = "latent") -> int:
        """Have the camera follow poses [T, 4, 4] from the next block that begins, in place of any given before.

        rate: `latent` for the poses of latent frames, `picture` for those of pictures, of which the last of each latent
        frame counts. After them the camera stands still. Returns the control's id. UsageError for poses that are no
        rigid motions, for pictures of no whole latent frames, and for a model that follows no camera.
        """
        followed, stride = checked_poses(poses), self.manager.resources.spec.vae_stride[0]
        arguments.choice(RATES)("rate", rate)
        self.check_camera()
        if rate == "picture":
            if len(followed) % stride:
                raise UsageError(f"poses are {len(followed)}; expected a multiple of {stride}, whole latent frames")
            followed = followed[stride - 1 :: stride]
        return self.controls.put("camera", followed)

    def check_camera(self) -> None:
        """UsageError for a model that follows no camera; SessionEnded where the session has ended."""
        self.check_open()
        if self.current.camera is None:
            name = self.manager.resources.spec.name
            raise UsageError(f"{name} follows no camera, only its prompt; use a model that does")

    def feed(self, pictures: NDArray[np.uint8]) -> None:
        """Give the pictures [T, H, W, 3] of the next block of a live video, as many as `pictures_wanted`.

        They are encoded at once. UsageError for other pictures, and for a session that wants none.
        """
        self.manager.check_owner("feed()")
        self.check_entered()
        frames, (width, height), wanted = arguments.pixels("pictures", pictures), self.size, self.pictures_wanted
        if not wanted:
            raise UsageError("pictures are given, but the next block wants none; open with live=True, and stream it")
        if not isinstance(frames, np.ndarray) or frames.shape != (wanted, height, width, 3):
            given = list(getattr(frames, "shape", ())) or quoted(frames)
            raise UsageError(f"pictures are {given}; expected uint8 {[wanted, height, width, 3]}")
        self.manager.feed(self, frames)

    def pause(self) -> int:
        """Begin no more blocks until `resume`; returns the control's id."""
        self.check_open()
        return self.controls.put("pause")

    def resume(self) -> int:
        """Go on after `pause`; returns the control's id."""
        self.check_open()
        return self.controls.put("resume")

    def stop(self) -> int:
        """Begin no more blocks; those begun are finished, then the session is closed. Returns the control's id."""
        self.check_open()
        return self.controls.put("stop")

    def fork(self) -> Session:
        """Open a session that continues from here on its own, sharing pages and decoder state until either writes.

        It continues after the last block that was begun, and makes none until it is streamed.
        """
        self.manager.check_owner("fork()")
        self.check_entered()
        return self.manager.fork(self)

    def rewind(self, block: int) -> None:
        """Return to the start of `block`, one of the last `rewind_blocks`, and drop what was made since.

        Prompt and actions return, too. UsageError for a block that is not kept.
        """
        block = integer()("block", block)
        self.manager.check_owner("rewind()")
        self.check_open()
        self.manager.rewind(self, block)

    def save(self, path: str | Path, note: str | None = None) -> None:
        """Write all that `restore` needs to go on bit for bit; the file is there whole or not at all.

        note: a text of the caller's own, which stays in the file's metadata.
        """
        target, note = arguments.path("path", path), optional(arguments.text)("note", note)
        self.manager.check_owner("save()")
        self.check_entered()
        if self.current.live is not None:
            raise UsageError(f"session {self.id} is made from a live video, which no file can hold; it cannot be saved")
        self.manager.save(self, target, note)

    @classmethod
    def restore(cls, engine: HasManager, path: str | Path) -> Session:
        """A session that goes on where one was saved, by an engine with the same model and preset.

        Raises UsageError for a file of another model, preset or version, InferixError for a broken one.
        """
        source, manager = arguments.path("path", path), getattr(engine, "manager", None)
        if manager is None:
            raise arguments.expected("engine", engine, "an Engine")
        engine.manager.check_owner("restore()")
        return engine.manager.restore(source)

    def offload(self) -> None:
        """Move all pages to host memory, those of rewind points included."""
        stores = dict.fromkeys(cache.store for cache in self.caches)
        for store in stores:  # shared pages are copied once
            first, *others = (cache for cache in self.caches if cache.store is store)
            first.offload(*others)
        self.away = True

    def prefetch(self) -> None:
        """Begin to bring offloaded pages back while other sessions run."""
        if self.away:
            for cache in self.caches:
                cache.prefetch()

    def onload(self) -> None:
        """Bring offloaded pages back to where passes can read them."""
        if self.away:
            for cache in self.caches:
                cache.onload()
            self.away = False

    def keep_rewind_point(self) -> None:
        """Keep the state before a block; release those older than `rewind_blocks` blocks."""
        if rewind_blocks := self.current.decoder.rewind_blocks:
            self.rewind_points.append(self.current.fork(self.current.decoder))
            while len(self.rewind_points) > rewind_blocks:
                self.rewind_points.pop(0).release()

    def mark_rollback(self) -> None:
        """Have a rollback return to the state as it is now."""
        self.rollback_point = self.current.rollback_point()

    def rollback(self) -> None:
        """Undo the block in progress."""
        assert self.rollback_point is not None
        self.rollback_point.restore(self.current)
        self.rollback_point = None
        if self.rewind_points and self.rewind_points[-1].next_block == self.next_block:
            self.rewind_points.pop().release()

    def check_open(self) -> None:
        """SessionEnded unless the session takes controls."""
        if failure := self.life.failure or self.decode_error:
            raise SessionEnded(f"session {self.id} has failed: {failure}") from failure
        if self.state is State.CLOSED:
            raise SessionEnded(f"session {self.id} is closed; open a new one with engine.open()")
        if self.state is State.DRAINING:
            raise SessionEnded(f"session {self.id} was stopped and ends with its last block; open a new one")

    def check_entered(self) -> None:
        """SessionEnded unless the session is open, AtCapacity unless it was admitted."""
        self.check_open()
        if self.manager.is_waiting(self):
            raise AtCapacity(f"session {self.id} still waits for room; close another one first")

    def close(self) -> None:
        """Free pages, latents and decoder state; SessionEnded for a session that was closed before."""
        self.manager.check_owner("close()")
        if self.closed:
            raise SessionEnded(f"session {self.id} is closed already")
        self.manager.close(self)

    def free(self) -> None:
        """Release everything that takes memory, except finished blocks that no one has taken."""
        for state in self.states:
            state.release()
        self.current.decoder.clear()
        self.rewind_points, self.rollback_point, self.entering = [], None, None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the session, or, in a thread that does not drive the engine, stop it."""
        if self.state in ENDED:
            return
        if self.manager.is_owner():
            self.close()
        elif self.state is not State.DRAINING:
            self.stop()
