"""Scheduling, admission and overload: numbers only, no tensors, no threads.

Times are seconds on one clock that the caller reads. All choices of the user are in `Limits`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from ...errors import AtCapacity, UsageError
from ..byte_sizes import format_bytes
from ..capacity.memory_need import MemoryNeed
from ..limits import DegradationStep, Limits
from .batch_profile import BatchProfile

SMOOTHING = 0.25  # weight of the newest block in a measured block time


@dataclass
class SchedulerEntry:
    """One session as the scheduler sees it.

    kind: sessions of one kind take the same time, and share pages. period: seconds of video in a block.
    page_room: bytes of pages that there are for its kind; None where there can be more. most_batched: sessions of its
    kind that one pass can serve; None for any number.
    turn: when it last ran. due: when its next block has to be there, once its video plays. late: late blocks in a row.
    """

    need: MemoryNeed
    kind: Hashable
    period: float
    page_room: int | None = None
    most_batched: int | None = None
    turn: int = 0
    due: float | None = None
    late: int = 0


@dataclass
class Scheduler:
    """Entries by session id: those that are in, and those that wait for room, in the order they came."""

    limits: Limits
    admitted: dict[str, SchedulerEntry] = field(default_factory=dict)
    waiting: dict[str, SchedulerEntry] = field(default_factory=dict)
    resting: dict[str, SchedulerEntry] = field(default_factory=dict)  # their pages are away; they may be waiting, too
    block_seconds: dict[Hashable, float] = field(default_factory=dict)  # measured, by kind
    batch_profiles: dict[Hashable, BatchProfile] = field(default_factory=dict)  # measured, by kind
    batch_room: float = math.inf  # sessions that have memory to run as one
    turns: int = 0
    degradations: list[DegradationStep] = field(default_factory=list)  # taken so far

    def took(self, kind: str) -> bool:
        """Return True if overload has taken a step of this kind."""
        return any(step.kind == kind for step in self.degradations)

    @property
    def most_sessions(self) -> int | None:
        """How many sessions may be in, after what overload has taken."""
        taken = [step.value for step in self.degradations if step.kind == "sessions"]
        return min((n for n in (self.limits.sessions, *taken) if n is not None), default=None)

    @property
    def reserved(self) -> int:
        """Bytes that admitted sessions may need at most, and that resting ones have besides their pages.

        Without those of a batch: see `batch_bytes`.
        """
        inside = sum(entry.need.total for entry in self.admitted.values())
        return inside + sum(entry.need.total - entry.need.pages for entry in self.resting.values())

    def batch_bytes(self, extra: SchedulerEntry | None = None) -> int:
        """Bytes of activations that the largest batch of the admitted sessions, and `extra`, adds to those of one.

        0 for sessions whose batches have not been measured, since they take turns.
        """
        entries, most = [*self.admitted.values(), *([extra] if extra else [])], 0
        for kind, profile in self.batch_profiles.items():
            same = [entry for entry in entries if entry.kind == kind]
            if same:
                rows = profile.best(self.batch_limit(same[0], len(same))) - 1
                most = max(most, rows * max(entry.need.activations for entry in same))
        return most

    def batch_limit(self, entry: SchedulerEntry, sessions: int) -> int:
        """Sessions that may run as one, of a number of the entry's kind."""
        return int(min(sessions, self.limits.batch or math.inf, entry.most_batched or math.inf, self.batch_room))

    def room(self) -> float:
        """Number of sessions like the last one admitted that fit beside those that are in, by memory and pages.

        Infinite where nothing limits them, and where none has been admitted yet, whose need is not known.
        """
        most, room = self.most_sessions, math.inf
        if most is not None:
            room = most - len(self.admitted)
        if not self.admitted:
            return room
        entry, budget = next(reversed(self.admitted.values())), self.limits.memory_bytes
        if budget is not None:
            room = min(room, (budget - self.reserved - self.batch_bytes(entry)) // entry.need.total)
        if entry.page_room is not None:
            pages = sum(other.need.pages for other in self.admitted.values() if other.kind == entry.kind)
            room = min(room, (entry.page_room - pages) // entry.need.pages)
        return max(0, room)

    def load(self, extra: SchedulerEntry | None = None) -> float:
        """Share of real time that the sessions need by measured block times; 1 is all of it."""
        admitted = [*self.admitted.values(), *([extra] if extra else [])]
        return sum(self.block_seconds.get(entry.kind, 0.0) / entry.period for entry in admitted)

    def join(self, session: str, entry: SchedulerEntry) -> bool:
        """Admit a session, or have it wait; returns False if it waits.

        Raises UsageError for one that can never fit, AtCapacity for one that is refused.
        """
        self.check_alone(session, entry)
        obstacle = self.obstacle(session, entry)
        if obstacle is None and self.waiting:
            obstacle = f"session {session} comes after {len(self.waiting)} that wait for room"
        if obstacle is None:
            self.admitted[session] = entry
            return True
        if self.limits.when_full == "refuse":
            raise AtCapacity(f"{obstacle}; close a session, or set when_full='queue' to wait")
        self.waiting[session] = entry
        return False

    def rest(self, session: str) -> None:
        """Lend the room of a session's pages, which are in host memory, to others."""
        self.waiting.pop(session, None)
        if session in self.admitted:
            self.resting[session] = self.admitted.pop(session)

    def wake(self, session: str) -> None:
        """Have a resting session wait for room again."""
        if session in self.resting:
            self.waiting[session] = self.resting[session]

    def admit_waiting(self) -> list[str]:
        """Admit waiting sessions in order, as far as there is room; returns them."""
        admitted = []
        while self.waiting:
            session, entry = next(iter(self.waiting.items()))
            if self.obstacle(session, entry) is not None:
                break
            self.admitted[session] = self.waiting.pop(session)
            self.resting.pop(session, None)
            admitted.append(session)
        return admitted

    def leave(self, session: str) -> None:
        self.admitted.pop(session, None)
        self.waiting.pop(session, None)
        self.resting.pop(session, None)

    def check_alone(self, session: str, entry: SchedulerEntry) -> None:
        """UsageError for a session that would not fit if it were the only one."""
        budget = self.limits.memory_bytes
        if budget is not None and entry.need.total > budget:
            raise UsageError(
                f"session {session} needs {entry.need}, more than memory_bytes {format_bytes(budget)} even alone; "
                "give more, or choose a smaller size, local_attn_size or rewind_blocks"
            )

    def obstacle(self, session: str, entry: SchedulerEntry) -> str | None:
        """The reason, with numbers, why a session cannot be admitted now; None if it can."""
        most, budget, inside = self.most_sessions, self.limits.memory_bytes, len(self.admitted)
        if most is not None and inside >= most:
            return f"session {session} is one too many: {inside} are in, and {most} may be"
        reserved = self.reserved
        if session in self.resting:
            reserved -= entry.need.total - entry.need.pages
        batch = self.batch_bytes(entry)
        if budget is not None and reserved + entry.need.total + batch > budget:
            beside = f" and {format_bytes(batch)} for a batch of them" if batch else ""
            return (
                f"session {session} needs {entry.need}{beside}, but {format_bytes(reserved)} of {format_bytes(budget)} "
                f"are reserved for the {inside} that are in"
            )
        pages = sum(other.need.pages for other in self.admitted.values() if other.kind == entry.kind)
        if entry.page_room is not None and pages + entry.need.pages > entry.page_room:
            return (
                f"session {session} needs {format_bytes(entry.need.pages)} of pages, but {format_bytes(pages)} of "
                f"{format_bytes(entry.page_room)} are reserved for those that are in"
            )
        seconds = self.block_seconds.get(entry.kind)
        admits = not self.limits.realtime or self.limits.overcommit
        if not admits and seconds is not None and self.admitted and self.load(entry) > 1:
            return (
                f"session {session} would make others late: a block takes {seconds:.3f} s (measured) and plays for "
                f"{entry.period:.3f} s, {seconds / entry.period:.0%} of the time, beside {self.load():.0%} for the "
                f"{inside} that are in"
            )
        return None

    def pick(self, ready: Collection[str], blocked: Collection[str], now: float) -> str | None:
        """Pick the session whose block comes next from `ready`, in the order they were opened; None if that is empty.

        `blocked` sessions wait for their readers or are paused, so they cannot be late: a passed deadline is void.
        """
        for session in blocked:
            entry = self.admitted.get(session)
            if entry is not None and entry.due is not None and entry.due < now:
                entry.due = None
        if not ready:
            return None
        chosen = self.first(ready)
        self.turns += 1
        self.admitted[chosen].turn = self.turns
        return chosen

    def pick_batch(self, chosen: str, compatible: Collection[str], now: float) -> list[str]:
        """The chosen session and those of `compatible` to batch with it: as many as the measured profile favours.

        Without a measurement it is alone, and so it is where a batch would make it late that is in time alone.
        """
        entry = self.admitted[chosen]
        if not compatible or entry.kind not in self.batch_profiles:
            return [chosen]
        left = math.inf if entry.due is None else entry.due - now
        count = self.batch_profiles[entry.kind].best(self.batch_limit(entry, len(compatible) + 1), left)
        others = sorted(compatible, key=self.urgency)[: count - 1]
        for session in others:
            self.turns += 1
            self.admitted[session].turn = self.turns
        return [chosen, *others]

    def first(self, ready: Collection[str]) -> str:
        """The most urgent of sessions that are ready."""
        return min(ready, key=self.urgency)

    def batch_wait(self, ready: Sequence[str], coming: int, since: float, now: float) -> float:
        """Seconds to wait, of the share `batch_wait`, for `coming` sessions to join those ready since `since`.

        There is a wait only where the larger batch gets more done even after the longest one. It ends in time for the
        deadline of each session that is ready.
        """
        share, entry = self.limits.batch_wait, self.admitted[ready[0]]
        if share is None or entry.kind not in self.batch_profiles:
            return 0.0
        profile = self.batch_profiles[entry.kind]
        here, more = (profile.best(self.batch_limit(entry, len(ready) + others)) for others in (0, coming))
        wait = share * profile.seconds[1]
        if more <= here or (profile.seconds[more] + wait) / more >= profile.seconds[here] / here:
            return 0.0
        dues = [due for session in ready if (due := self.admitted[session].due) is not None]
        until = min([since + wait, *(due - profile.seconds[more] for due in dues)])
        return max(0.0, until - now)

    def urgency(self, session: str) -> tuple[float, int]:
        """Sort key: smaller is sooner. A stream that has not begun to play has a deadline in the past."""
        entry = self.admitted[session]
        by_deadline = self.limits.schedule == "earliest-deadline"
        due = (-math.inf if entry.due is None else entry.due) if by_deadline else 0.0
        return due, entry.turn

    def measured(self, session: str, seconds: float) -> None:
        """Update a session's measured block time with `seconds`; a batch counts its share per session."""
        if entry := self.admitted.get(session):
            before = self.block_seconds.get(entry.kind, seconds)
            self.block_seconds[entry.kind] = before + SMOOTHING * (seconds - before)

    def shown(self, session: str, now: float, seconds: float) -> float | None:
        """Move the deadline on by a finished block's `seconds` of video; returns its slack (s), None for the first."""
        entry = self.admitted.get(session)
        if entry is None or not self.limits.realtime:
            return None
        slack = None if entry.due is None else entry.due - now
        in_time = slack is not None and slack >= 0
        entry.due = (entry.due if in_time and entry.due is not None else now) + seconds
        entry.late = entry.late + 1 if slack is not None and slack < 0 else 0
        return slack

    def next_degradation(self) -> DegradationStep | None:
        """Take the next declared step if a session has been late too often and there is one left."""
        left = self.limits.overload[len(self.degradations) :]
        if not left or all(entry.late < self.limits.late_blocks for entry in self.admitted.values()):
            return None
        for entry in self.admitted.values():
            entry.late = 0
        self.block_seconds.clear()  # they no longer hold
        self.degradations.append(left[0])
        return left[0]
