"""Routing: the server of several that gets a session, the number of servers to run, and what a moved session is owed.

Numbers and messages only: no sockets, no threads, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from . import real_time
from .protocol import Act, Camera, Control, ControlId, Pause, Prompt, Resume, Stop
from .refusals import RETRY_AFTER, Refusal

REPEATABLE = (Act, Camera, Pause, Prompt, Resume, Stop)  # controls that have the same effect when applied twice
MOVED = ("draining", "lost")  # codes of `ended` after which a session goes on elsewhere


class ReplicaFacts(BaseModel):
    """One server in numbers.

    replica: a name that it has until it ends. sessions and places: taken and in all. room: further sessions that fit by
    pages and memory, None where that is not limited. load: share of real time that its sessions take by measured
    blocks. late: of the latest blocks. realtime: it refuses a session that would make others late. slack: seconds that
    the latest block was early, of the session that is worst off. holds: it has the session that was asked for. jobs:
    video jobs that wait or run.
    """

    replica: str
    status: str
    sessions: int
    places: int
    room: int | None = None
    load: float = 0.0
    late: int = 0
    realtime: bool = True
    pages_in_use: int = 0
    slack: float | None = None
    holds: bool = False
    jobs: int = 0

    @property
    def load_with_another(self) -> float:
        """Load with one more session like those that are there."""
        return self.load * (self.sessions + 1) / self.sessions if self.sessions else self.load

    def with_another(self) -> ReplicaFacts:
        """The numbers after one more session was sent there."""
        room = None if self.room is None else max(0, self.room - 1)
        return self.model_copy(update={"sessions": self.sessions + 1, "room": room, "load": self.load_with_another})

    def obstacle(self, moved: bool) -> str | None:
        """The reason, with numbers, why it cannot have one more session; None if it can.

        moved: the session was made elsewhere before; then late blocks are better than none.
        """
        if self.status != "ok":
            return f"is {self.status}"
        if self.sessions >= self.places:
            return f"has {self.sessions} of {self.places} sessions"
        if self.room == 0:
            return "has no pages or memory for one more"
        if not moved and self.realtime and (late := real_time.obstacle(self.sessions, self.load, self.late)):
            return f"has no time: {late}"
        return None


def choose(replicas: Mapping[str, ReplicaFacts], moved: bool = False) -> str:
    """The server with the lowest load after one more session, then the one with fewest; Refusal where none has room."""
    obstacles = {name: facts.obstacle(moved) for name, facts in replicas.items()}
    free = [name for name, obstacle in obstacles.items() if obstacle is None]
    if free:
        return min(free, key=lambda name: (replicas[name].load_with_another, replicas[name].sessions, name))
    reasons = "; ".join(f"{replicas[name].replica[:8]} {obstacle}" for name, obstacle in obstacles.items())
    raise Refusal(
        "at_capacity", f"none of {len(replicas)} servers has room: {reasons or 'none answers'}", 503,
        ("replicas", len(replicas)), RETRY_AFTER, close=1013,
    )  # fmt: skip


def choose_for_job(replicas: Mapping[str, ReplicaFacts]) -> str:
    """The server with the fewest unfinished jobs, then the lowest load; Refusal where none takes any."""
    taking = [name for name, facts in replicas.items() if facts.status == "ok"]
    if not taking:
        raise Refusal("at_capacity", "no server answers", 503, None, RETRY_AFTER)
    return min(taking, key=lambda name: (replicas[name].jobs, replicas[name].load, name))


@dataclass(frozen=True)
class Scaling:
    """The number of servers to run, of `least` to `most`.

    load: share of real time that each should be at, at most. slack: seconds by which blocks should be early.
    """

    least: int = 1
    most: int = 4
    load: float = 0.7
    slack: float = 0.0

    def wanted(self, replicas: Collection[ReplicaFacts]) -> int:
        """The number of servers for the sessions there are.

        One more than now where a block was too late or no place or time is left; else as many as their load and places
        need, with one session more, which would else start a server again that was just ended.
        """
        alive = [facts for facts in replicas if facts.status == "ok"]
        if not alive:
            return self.least
        slacks = [facts.slack for facts in alive if facts.slack is not None]
        full = all(facts.obstacle(moved=False) is not None for facts in alive)
        if full or (slacks and min(slacks) < self.slack):
            return min(self.most, len(alive) + 1)
        sessions, places = sum(facts.sessions for facts in alive), max(facts.places for facts in alive)
        load = sum(facts.load for facts in alive)
        needed = math.ceil(max(load / self.load, (sessions + 1) / places))
        if sessions and any(facts.realtime for facts in alive):
            needed = max(needed, math.ceil(load * (sessions + 1) / sessions / real_time.MOST_LOAD))
        return min(self.most, max(self.least, needed, 1))


@dataclass
class Sent:
    """A control on its way. received: its receipt was passed on."""

    control: Control
    received: bool = False


@dataclass
class ControlMemory:
    """The controls of one client that a server has not answered, and those in force.

    pressed: actions whose keys are down, in the order they were pressed. prompt: the last one that was applied.
    block: the last one that the client has the state of.
    """

    pending: dict[ControlId, Sent] = field(default_factory=dict)
    pressed: list[str] = field(default_factory=list)
    camera: Camera | None = None
    prompt: str | None = None
    block: int | None = None

    def sent(self, control: Control) -> None:
        """Note a control that was passed on to the server."""
        self.pending[control.id] = Sent(control)
        if isinstance(control, Act):
            if control.action in self.pressed:
                self.pressed.remove(control.action)
            if control.pressed:
                self.pressed.append(control.action)
        elif isinstance(control, Camera):
            self.camera = control.model_copy(update={"turn": (0.0, 0.0)})

    def pass_on(self, event: Mapping[str, Any]) -> bool:
        """Note an event of the server; False for a receipt that the client has had before."""
        kind, sent = event["type"], self.pending.get(event.get("id"))  # type: ignore[arg-type]
        if kind == "state":
            self.block = event["block"]
        elif kind == "received" and sent is not None:
            first, sent.received = not sent.received, True
            return first
        elif kind in ("applied", "refused", "pong") and sent is not None:
            del self.pending[event["id"]]
            if kind == "applied" and isinstance(sent.control, Prompt):
                self.prompt = sent.control.text
            elif kind == "refused" and isinstance(sent.control, Act) and sent.control.action in self.pressed:
                self.pressed.remove(sent.control.action)
        return True

    def owed(self, prompt: str | None, prefix: str) -> tuple[list[Control], list[ControlId]]:
        """The controls to send to the server that goes on, and the ids of those that are lost.

        prompt: the one that it goes on with. prefix: begins the ids of controls that the client did not send itself.
        """
        repeated = [sent.control for sent in self.pending.values() if isinstance(sent.control, REPEATABLE)]
        lost = [id for id, sent in self.pending.items() if not isinstance(sent.control, REPEATABLE)]
        for id in lost:
            del self.pending[id]
        restored: list[Control] = []
        if self.prompt is not None and self.prompt != prompt:
            restored.append(Prompt(id=f"{prefix}prompt", type="prompt", text=self.prompt))
        if self.camera is not None:
            restored.append(self.camera.model_copy(update={"id": f"{prefix}camera"}))
        for action in self.pressed:
            restored.append(Act(id=f"{prefix}act.{action}"[:64], type="act", action=action))
        return [*restored, *repeated], lost

    def lost_blocks(self, next_block: int) -> int:
        """Number of blocks that the client has seen and the next server makes again, or others in their place."""
        return 0 if self.block is None else max(0, self.block + 1 - next_block)
