"""Limits of an engine, as data: admission, scheduling, and the degradation steps allowed under overload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .arguments import above_zero, checked, choice, expected, flag, instance, integer, optional

SCHEDULES = ("round-robin", "earliest-deadline")
WHEN_FULL = ("refuse", "queue")
DEGRADATION_KINDS = ("sessions", "window", "decoder")


@dataclass(frozen=True)
class DegradationStep:
    """One degradation step that an overloaded engine may take.

    kind: `sessions` pauses the newest sessions until `value` are left; `window` narrows local_attn_size to `value`
    frames; `decoder` switches to the fast decoder and ignores `value`. UsageError for another kind or value.
    """

    kind: str
    value: int = 0

    def __post_init__(self) -> None:
        choice(DEGRADATION_KINDS)("kind", self.kind)
        object.__setattr__(self, "value", integer(0)("value", self.value))
        if self.kind != "decoder" and self.value < 1:
            raise expected("value", self.value, f"1 or more for a step of kind {self.kind!r}")


@dataclass(frozen=True)
class Limits:
    """Limits of an engine; UsageError for a value out of range.

    schedule: `round-robin`, or `earliest-deadline`: the session that runs out of video first.
    when_full: `refuse` a session that does not fit, or `queue` it until others end.
    sessions: admitted sessions at a time. memory_bytes: bytes that all of them may need together (pages, decoder
    state, latents, activations of a batch). None: no limit.
    realtime: each block has a deadline, the end of the previous one's playback. A session is admitted only if, by
    measured block times, all sessions meet theirs; with `overcommit` also another one.
    late_blocks: consecutive late blocks that trigger the next degradation step of `overload`.
    queue_blocks: blocks of a session, in progress or finished, that its consumer has not taken.
    consumer_timeout: seconds after which a session whose blocks are not taken is ended; None for never.
    batch: most sessions in a batch, used where measured times say it is faster; 1 for none, None for as many as were
    measured. batch_wait: share of the time of a block alone for which sessions that are ready may wait for others to
    make a larger batch, where measured times say that more is done so and no deadline is missed; None for no wait.
    """

    schedule: str = "round-robin"
    when_full: str = "refuse"
    sessions: int | None = None
    memory_bytes: int | None = None
    realtime: bool = False
    overcommit: bool = False
    late_blocks: int = 3
    overload: tuple[DegradationStep, ...] = ()
    queue_blocks: int = 2
    consumer_timeout: float | None = None
    batch: int | None = None
    batch_wait: float | None = None

    def __post_init__(self) -> None:
        """UsageError for a value of a wrong type or one that cannot be."""
        for name, value in checked(CHECKS, vars(self)).items():
            object.__setattr__(self, name, value)


def steps(name: str, value: Any) -> tuple[DegradationStep, ...]:
    if not isinstance(value, list | tuple):
        raise expected(name, value, "DegradationStep objects in a list")
    return tuple(instance(DegradationStep)(f"{name}[{index}]", step) for index, step in enumerate(value))


CHECKS = {
    "schedule": choice(SCHEDULES),
    "when_full": choice(WHEN_FULL),
    **dict.fromkeys(("realtime", "overcommit"), flag),
    "overload": steps,
    "consumer_timeout": optional(above_zero("seconds")),
    "batch_wait": optional(above_zero("a share", most=1)),
    **dict.fromkeys(("late_blocks", "queue_blocks"), integer(1)),
    **dict.fromkeys(("sessions", "memory_bytes", "batch"), optional(integer(1))),
}
