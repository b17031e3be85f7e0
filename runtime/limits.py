"""What an engine takes on, as data: the user's limits, and the steps that overload may take."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError, nearest

SCHEDULES = ("round-robin", "earliest-deadline")
WHEN_FULL = ("refuse", "queue")
DEGRADATION_KINDS = ("sessions", "window", "decoder")


@dataclass(frozen=True)
class DegradationStep:
    """One declared step that overload may take.

    kind: `sessions` pauses the newest down to `value` sessions, `window` narrows local_attn_size to `value`
    frames, `decoder` decodes with the fast decoder (`value` is not used).
    """

    kind: str
    value: int = 0

    def __post_init__(self) -> None:
        if self.kind not in DEGRADATION_KINDS:
            hint = nearest(str(self.kind), DEGRADATION_KINDS)
            raise UsageError(f"kind is {self.kind!r}{hint}; expected {', '.join(DEGRADATION_KINDS)}")
        if self.kind != "decoder" and self.value < 1:
            raise UsageError(f"value is {self.value}; expected 1 or more for a step of kind {self.kind!r}")


@dataclass(frozen=True)
class Limits:
    """What an engine takes on, and how it shares itself out.

    schedule: `round-robin`, or `earliest-deadline`, the session that runs out of video first.
    when_full: a session that does not fit is refused, or queued until others have ended.
    sessions: how many may be in at a time. memory_bytes: what all of them may need together, pages, decoder
    state and latents; None for as much as there is.
    realtime: blocks are to be ready when the one before has been played, and a session is let in only if by
    measured block times that holds for all. late_blocks: so many late ones in a row take the next step of
    `overload`; without steps nothing gives way.
    queue_blocks: finished and unfinished blocks a session may have that no one has taken yet.
    consumer_timeout: seconds after which a session whose blocks no one takes is ended; None for never.
    batch: sessions whose blocks may run as one, where measured times say that it is faster; 1 for turns only, None
    for as many as were measured.
    """

    schedule: str = "round-robin"
    when_full: str = "refuse"
    sessions: int | None = None
    memory_bytes: int | None = None
    realtime: bool = False
    late_blocks: int = 3
    overload: tuple[DegradationStep, ...] = ()
    queue_blocks: int = 2
    consumer_timeout: float | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for key, known in (("schedule", SCHEDULES), ("when_full", WHEN_FULL)):
            value = getattr(self, key)
            if value not in known:
                raise UsageError(f"{key} is {value!r}{nearest(str(value), known)}; expected {', '.join(known)}")
        for key in ("sessions", "memory_bytes", "late_blocks", "queue_blocks", "batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UsageError(f"{key} is {value}; expected 1 or more")
        if self.consumer_timeout is not None and not self.consumer_timeout > 0:
            raise UsageError(f"consumer_timeout is {self.consumer_timeout}; expected seconds above 0")
