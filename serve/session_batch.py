"""An engine behind the contract of runtimes that batch sessions: manifest, attach, step, finalize, detach.

The contract is met by structure: nothing of such a runtime is imported, and its classes are recognised by their fields.
One chunk is one block. `docs/serving.md` has an example.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import AtCapacity, InferixError, SessionEnded, UsageError, one_line, quoted
from ..runtime.arguments import integer
from ..runtime.engine import Engine
from ..runtime.sessions.lifecycle import State
from ..runtime.sessions.session import Demand, Session
from ..schemes.camera import CameraMove

LOG = logging.getLogger("inferix.serve")
CONTEXT = ("prompt", "seed", "size", "image", "world")
CONDITIONING = ("action", "prompt", "camera")


class SessionInit(Protocol):
    """The part of a runtime's description of a new session that is read."""

    session_id: str
    context: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """Capacity and pace. chunk_shape: uint8 [frames, H, W, 3]; the first chunk of a stream may have fewer frames.

    rate_hz: chunks per second. input_latency_chunks: a control shows in the chunk of the step that brings it.
    """

    max_sessions: int
    chunk_shape: tuple[int, ...]
    rate_hz: float
    frames_per_chunk: int
    input_latency_chunks: int = 1
    pipeline_depth_chunks: int = 1


@dataclass(frozen=True)
class StepResult:
    """One chunk of a session: frames uint8 [T, H, W, 3]. stats: milliseconds of each stage, and the block."""

    session_id: str
    output: Any
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Attached:
    """A session, and the conditioning that it has."""

    session: Session
    conditioning: dict[str, Any] = field(default_factory=dict)


class SessionBatch:
    """Sessions of one engine, for a runtime that calls all methods but `manifest` in one thread, which then drives it.

    admission_error: the exception by which the runtime knows that there is no room.
    """

    def __init__(self, engine: Engine, max_sessions: int, admission_error: type[Exception] = AtCapacity) -> None:
        self.engine, self.admission_error = engine, admission_error
        self.max_sessions = integer(1)("max_sessions", max_sessions)
        self.attached: dict[str, Attached] = {}
        engine.hand_over()

    def manifest(self) -> Manifest:
        engine = self.engine
        frames = engine.preset.num_frame_per_block * engine.spec.vae_stride[0]
        width, height = engine.default_size
        return Manifest(self.max_sessions, (frames, height, width, 3), engine.fps / frames, frames)

    def attach(self, init: SessionInit) -> None:
        """Open a session, or restore one from the file `world`; nothing for one that is attached.

        `admission_error` where there is no room, UsageError for a context that the engine cannot take.
        """
        if init.session_id in self.attached:
            return
        context = known(init.context, CONTEXT, "context")
        if len(self.attached) >= self.max_sessions:
            raise self.admission_error(f"{len(self.attached)} of {self.max_sessions} sessions are attached")
        try:
            if (world := context.pop("world", None)) is not None:
                session = Session.restore(self.engine, world)
            else:
                session = self.engine.open(context.pop("prompt", None), **context)
        except AtCapacity as error:
            raise self.admission_error(one_line(error)) from error
        self.attached[init.session_id] = Attached(session)

    def step(self, due: Mapping[str, Mapping[str, Any]]) -> list[StepResult]:
        """Make one block of each session that is due; `due` has the conditioning of each.

        A session that fails, or whose conditioning is refused, has no result; the others go on. UsageError for one that
        is not attached.
        """
        for name in due:
            if name not in self.attached:
                raise UsageError(f"due has session {quoted(name)}, which is not attached; attach it first")
        demands: dict[str, Demand] = {}
        delivery = self.engine.manager.delivery
        for name, conditioning in due.items():
            try:
                self._condition(self.attached[name], known(conditioning, CONDITIONING, "conditioning"))
                session = self.attached[name].session
                session.check_open()
                demands[name] = delivery.submit_demand(session, Demand(1, decode=True))
            except InferixError as error:
                LOG.warning("session %s is left out: %s", name, one_line(error))
        results = []
        for name, demand in demands.items():
            try:
                block = delivery.next_block(self.attached[name].session, demand, threading.Event())
            except Exception as error:
                if self.attached[name].session.state is not State.FAILED:
                    raise
                LOG.warning("session %s has failed: %s", name, one_line(error))
                continue
            if block is not None:
                stats = {f"{stage}_ms": 1000 * seconds for stage, seconds in block.timings.items()}
                results.append(StepResult(name, block.frames, stats | {"block": block.index}))
        return results

    def finalize(self, session_ids: Sequence[str]) -> None:
        """Nothing is left to do after a step: the blocks are committed."""

    def detach(self, session_id: str) -> None:
        """Free a session; nothing for one that is not attached."""
        attached = self.attached.pop(session_id, None)
        if attached is not None:
            with suppress(SessionEnded):
                attached.session.close()

    def _condition(self, attached: Attached, conditioning: dict[str, Any]) -> None:
        """Send what differs from the conditioning that the session has."""
        before = attached.conditioning
        changed = {name: value for name, value in conditioning.items() if before.get(name) != value}
        for name, value in changed.items():
            if name == "action":
                attached.session.act(value)
            elif name == "prompt":
                attached.session.prompt(value)
            else:
                attached.session.move(CameraMove(**known(value, tuple(CameraMove.__dataclass_fields__), "camera")))
            before[name] = value


def known(values: Mapping[str, Any], names: Sequence[str], what: str) -> dict[str, Any]:
    """The values; UsageError for what is no mapping, and for a name that means nothing."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{what} is {quoted(values)}; expected values by name, of {', '.join(names)}")
    for name in values:
        if name not in names:
            raise UsageError(f"{what} has {quoted(name)}, which is unknown; expected {', '.join(names)}")
    return dict(values)
