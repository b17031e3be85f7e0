"""Whose block runs next, who is let in, and what gives way under overload: numbers only, no tensors, no threads.

Times are seconds on one clock that the caller reads. Every choice that a user makes is in `Limits`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field

from ...errors import InferixError, UsageError
from ..byte_sizes import format_bytes
from ..capacity.memory_need import Need
from ..limits import Limits, Relief
from .batch_profile import BatchTimes

SMOOTHING = 0.25  # weight of the newest block in a measured block time


@dataclass
class Client:
    """What is known of one session.

    kind: sessions of one kind take the same time, and share pages. period: seconds of video in a block.
    page_room: bytes of pages that there are for its kind; None where there can be more.
    turn: when it last ran. due: when its next block has to be there, once its video plays. late: late blocks in a row.
    """

    need: Need
    kind: Hashable
    period: float
    page_room: int | None = None
    turn: int = 0
    due: float | None = None
    late: int = 0


@dataclass
class Scheduler:
    """Clients by session id: those that are in, and those that wait for room, in the order they came."""

    limits: Limits
    clients: dict[int, Client] = field(default_factory=dict)
    waiting: dict[int, Client] = field(default_factory=dict)
    resting: dict[int, Client] = field(default_factory=dict)  # their pages are away; they may be waiting, too
    block_seconds: dict[Hashable, float] = field(default_factory=dict)  # measured, by kind
    batch_times: dict[Hashable, BatchTimes] = field(default_factory=dict)  # measured, by kind
    batch_room: float = math.inf  # sessions that have memory to run as one
    turns: int = 0
    reliefs: list[Relief] = field(default_factory=list)  # taken so far

    def took(self, kind: str) -> bool:
        """Whether overload has taken a step of some kind."""
        return any(relief.kind == kind for relief in self.reliefs)

    @property
    def most_sessions(self) -> int | None:
        """How many sessions may be in, after what overload has taken."""
        taken = [relief.value for relief in self.reliefs if relief.kind == "sessions"]
        return min((n for n in (self.limits.sessions, *taken) if n is not None), default=None)

    @property
    def reserved(self) -> int:
        """Bytes that the sessions that are in may come to need, and that those without their pages have."""
        inside = sum(client.need.total for client in self.clients.values())
        return inside + sum(client.need.total - client.need.pages for client in self.resting.values())

    def load(self, extra: Client | None = None) -> float:
        """Share of real time that the sessions need by measured block times; 1 is all of it."""
        clients = [*self.clients.values(), *([extra] if extra else [])]
        return sum(self.block_seconds.get(client.kind, 0.0) / client.period for client in clients)

    def join(self, session: int, client: Client) -> bool:
        """Let a session in, or have it wait; False where it waits.

        Raises UsageError for one that can never fit, InferixError for one that is refused.
        """
        self.check_alone(session, client)
        obstacle = self.obstacle(session, client)
        if obstacle is None and self.waiting:
            obstacle = f"session {session} comes after {len(self.waiting)} that wait for room"
        if obstacle is None:
            self.clients[session] = client
            return True
        if self.limits.when_full == "refuse":
            raise InferixError(f"{obstacle}; close a session, or set when_full='queue' to wait")
        self.waiting[session] = client
        return False

    def rest(self, session: int) -> None:
        """The pages of a session are away: others may have their room."""
        self.waiting.pop(session, None)
        if session in self.clients:
            self.resting[session] = self.clients.pop(session)

    def wake(self, session: int) -> None:
        """Have a session that rests wait for its room again."""
        if session in self.resting:
            self.waiting[session] = self.resting[session]

    def admit_waiting(self) -> list[int]:
        """Let in those who wait, in order, as far as there is room."""
        let_in = []
        while self.waiting:
            session, client = next(iter(self.waiting.items()))
            if self.obstacle(session, client) is not None:
                break
            self.clients[session] = self.waiting.pop(session)
            self.resting.pop(session, None)
            let_in.append(session)
        return let_in

    def leave(self, session: int) -> None:
        self.clients.pop(session, None)
        self.waiting.pop(session, None)
        self.resting.pop(session, None)

    def check_alone(self, session: int, client: Client) -> None:
        """UsageError for a session that would not fit if it were the only one."""
        budget = self.limits.memory_bytes
        if budget is not None and client.need.total > budget:
            raise UsageError(
                f"session {session} needs {client.need}, more than memory_bytes {format_bytes(budget)} even alone; "
                "give more, or choose a smaller size, local_attn_size or rewind_blocks"
            )

    def obstacle(self, session: int, client: Client) -> str | None:
        """Why a session cannot be let in now, with the numbers; None where it can."""
        most, budget, inside = self.most_sessions, self.limits.memory_bytes, len(self.clients)
        if most is not None and inside >= most:
            return f"session {session} is one too many: {inside} are in, and {most} may be"
        reserved = self.reserved
        if session in self.resting:
            reserved -= client.need.total - client.need.pages
        if budget is not None and reserved + client.need.total > budget:
            return (
                f"session {session} needs {client.need}, but {format_bytes(reserved)} of {format_bytes(budget)} are "
                f"reserved for the {inside} that are in"
            )
        pages = sum(other.need.pages for other in self.clients.values() if other.kind == client.kind)
        if client.page_room is not None and pages + client.need.pages > client.page_room:
            return (
                f"session {session} needs {format_bytes(client.need.pages)} of pages, but {format_bytes(pages)} of "
                f"{format_bytes(client.page_room)} are reserved for those that are in"
            )
        seconds = self.block_seconds.get(client.kind)
        if self.limits.realtime and seconds is not None and self.clients and self.load(client) > 1:
            return (
                f"session {session} would make others late: a block takes {seconds:.3f} s (measured) and plays for "
                f"{client.period:.3f} s, {seconds / client.period:.0%} of the time, beside {self.load():.0%} for the "
                f"{inside} that are in"
            )
        return None

    def choose(self, ready: Collection[int], held: Collection[int], now: float) -> int | None:
        """Whose block comes next, of the sessions that could make one; None for none.

        Those held back by their own readers, or paused, cannot be late: a deadline that passes meanwhile is void.
        """
        for session in held:
            client = self.clients.get(session)
            if client is not None and client.due is not None and client.due < now:
                client.due = None
        if not ready:
            return None
        chosen = min(ready, key=self.urgency)
        self.turns += 1
        self.clients[chosen].turn = self.turns
        return chosen

    def together(self, chosen: int, alike: Collection[int], now: float) -> list[int]:
        """The chosen session, and those of `alike` whose blocks run as one with its: as many as measured times say.

        Without a measurement it is alone, and so it is where a batch would make it late that is in time alone.
        """
        client = self.clients[chosen]
        if not alike or client.kind not in self.batch_times:
            return [chosen]
        most = min(len(alike) + 1, self.limits.batch or math.inf, self.batch_room)
        left = math.inf if client.due is None else client.due - now
        count = self.batch_times[client.kind].best(int(most), left)
        others = sorted(alike, key=self.urgency)[: count - 1]
        for session in others:
            self.turns += 1
            self.clients[session].turn = self.turns
        return [chosen, *others]

    def urgency(self, session: int) -> tuple[float, int]:
        """Smaller is sooner; in a stream that has not begun to play, a block is wanted now."""
        client = self.clients[session]
        by_deadline = self.limits.schedule == "earliest-deadline"
        due = (-math.inf if client.due is None else client.due) if by_deadline else 0.0
        return due, client.turn

    def measured(self, session: int, seconds: float) -> None:
        """A block of a session took so long; one of a batch, its share of that."""
        if client := self.clients.get(session):
            before = self.block_seconds.get(client.kind, seconds)
            self.block_seconds[client.kind] = before + SMOOTHING * (seconds - before)

    def shown(self, session: int, now: float, seconds: float) -> float | None:
        """A block with so many seconds of video is ready; returns how much too early, None for the first."""
        client = self.clients.get(session)
        if client is None or not self.limits.realtime:
            return None
        slack = None if client.due is None else client.due - now
        in_time = slack is not None and slack >= 0
        client.due = (client.due if in_time and client.due is not None else now) + seconds
        client.late = client.late + 1 if slack is not None and slack < 0 else 0
        return slack

    def relief(self) -> Relief | None:
        """The next declared step, where a session has been late for too long and there is one left."""
        left = self.limits.overload[len(self.reliefs) :]
        if not left or all(client.late < self.limits.late_blocks for client in self.clients.values()):
            return None
        for client in self.clients.values():
            client.late = 0
        self.block_seconds.clear()  # what follows is measured anew
        self.reliefs.append(left[0])
        return left[0]
