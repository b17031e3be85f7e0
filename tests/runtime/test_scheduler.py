"""Scheduler: order, admission and degradation from given numbers; and the state table of a session."""

import re

import pytest

from inferix.errors import InferixError, UsageError
from inferix.runtime.capacity.memory_need import MemoryNeed
from inferix.runtime.limits import DegradationStep, Limits
from inferix.runtime.sessions.lifecycle import MOVES, Lifecycle, State
from inferix.runtime.sessions.scheduler import Scheduler, SchedulerEntry

MB = 10**6
IDS = A, B, C, D = "dcba"  # in the order they join, which is not that of their values


def entry(need=0, kind="small", period=1.0):
    return SchedulerEntry(MemoryNeed(pages=need), kind, period)


def new_scheduler(admitted=2, **limits):
    scheduler = Scheduler(Limits(**limits))
    for session in IDS[:admitted]:
        assert scheduler.join(session, entry())
    return scheduler


def test_round_robin_takes_turns_among_those_that_can_go_on():
    scheduler = new_scheduler(3)
    assert [scheduler.pick([A, B, C], [], 0.0) for _ in range(4)] == [A, B, C, A]
    assert [scheduler.pick([A, C], [B], 0.0) for _ in range(2)] == [C, A]
    assert scheduler.pick([A, B, C], [], 0.0) == B
    assert scheduler.pick([], [A, B, C], 0.0) is None


def test_the_session_that_runs_out_of_video_first_comes_first():
    scheduler = new_scheduler(3, schedule="earliest-deadline", realtime=True)
    assert scheduler.shown(A, now=0.0, seconds=1.0) is None
    scheduler.shown(B, now=0.5, seconds=0.25)
    assert scheduler.pick([A, B], [], 0.6) == B
    assert scheduler.pick([A, B, C], [], 0.6) == C  # it has shown nothing yet
    assert scheduler.shown(B, now=0.7, seconds=1.0) == pytest.approx(0.05)
    assert scheduler.pick([A, B], [], 0.8) == A


def test_a_late_block_is_counted_and_playing_begins_again_from_it():
    scheduler = new_scheduler(1, realtime=True)
    scheduler.shown(A, now=0.0, seconds=1.0)
    assert scheduler.shown(A, now=1.5, seconds=1.0) == -0.5
    assert scheduler.admitted[A].due == 2.5 and scheduler.admitted[A].late == 1
    assert scheduler.shown(A, now=2.4, seconds=1.0) == pytest.approx(0.1)
    assert scheduler.admitted[A].due == 3.5 and scheduler.admitted[A].late == 0


def test_a_deadline_that_passes_while_the_reader_holds_the_session_back_is_void():
    scheduler = new_scheduler(2, realtime=True)
    scheduler.shown(A, now=0.0, seconds=1.0)
    scheduler.pick([B], [A], now=0.5)
    assert scheduler.admitted[A].due == 1.0
    scheduler.pick([B], [], now=1.5)  # a block of it is under way, and late
    assert scheduler.admitted[A].due == 1.0
    scheduler.pick([B], [A], now=1.5)
    assert scheduler.admitted[A].due is None
    assert scheduler.shown(A, now=5.0, seconds=1.0) is None


def test_a_session_that_does_not_fit_is_refused_with_the_numbers():
    scheduler = Scheduler(Limits(memory_bytes=10 * MB))
    scheduler.join(A, entry(need=6 * MB))
    with pytest.raises(InferixError, match=r"session c .*5 MB.*6 MB.*10 MB"):
        scheduler.join(B, entry(need=5 * MB))
    with pytest.raises(UsageError, match=r"11 MB.*memory_bytes.*10 MB"):
        scheduler.join(C, entry(need=11 * MB))
    assert list(scheduler.admitted) == [A] and not scheduler.waiting


def test_or_waits_in_order_for_room():
    scheduler = Scheduler(Limits(memory_bytes=10 * MB, when_full="queue"))
    assert scheduler.join(A, entry(need=6 * MB))
    assert not scheduler.join(B, entry(need=6 * MB))
    assert not scheduler.join(C, entry(need=MB))  # it would fit, but the second came first
    assert scheduler.admit_waiting() == []
    scheduler.leave(A)
    assert scheduler.admit_waiting() == [B, C]
    assert scheduler.reserved == 7 * MB


def test_a_session_that_would_make_others_late_is_refused_with_the_numbers():
    scheduler = new_scheduler(1, realtime=True)
    scheduler.measured(A, 0.6)
    with pytest.raises(InferixError, match=r"0.600 s.*1.000 s.*60%"):
        scheduler.join(B, entry())
    assert scheduler.join(C, entry(kind="never seen"))
    scheduler.leave(A)
    assert scheduler.join(D, entry())
    relaxed = new_scheduler(1)
    relaxed.measured(A, 5.0)
    assert relaxed.join(B, entry())


def test_measured_times_follow_the_newest_blocks():
    scheduler = new_scheduler(1)
    scheduler.measured(A, 1.0)
    for _ in range(30):
        scheduler.measured(A, 2.0)
    assert scheduler.block_seconds["small"] == pytest.approx(2.0, abs=1e-3)
    assert scheduler.load() == pytest.approx(2.0, abs=1e-3)


def test_overload_takes_declared_steps_in_order_and_no_others():
    steps = (DegradationStep("window", 6), DegradationStep("sessions", 2))
    scheduler = new_scheduler(3, realtime=True, late_blocks=2, overload=steps)
    assert scheduler.next_degradation() is None
    now = 0.0
    for step in (*steps, None):
        for _ in range(3):
            now += 5.0
            scheduler.shown(A, now, seconds=1.0)
        assert scheduler.next_degradation() == step
    assert scheduler.most_sessions == 2
    with pytest.raises(InferixError, match=r"session a .*3 .*2 "):
        scheduler.join(D, entry())
    silent = new_scheduler(1, realtime=True)
    for now in range(0, 100, 5):
        silent.shown(A, float(now), 1.0)
    assert silent.next_degradation() is None


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"schedule": "fifo"}, "schedule is 'fifo'"),
        ({"when_full": "wait"}, "expected refuse, queue"),
        ({"sessions": 0}, "sessions is 0; expected 1"),
        ({"memory_bytes": -1}, "memory_bytes is -1"),
        ({"queue_blocks": 0}, "queue_blocks is 0"),
        ({"consumer_timeout": 0.0}, "consumer_timeout is 0.0"),
    ],
)
def test_bad_limits(setting, named):
    with pytest.raises(UsageError, match=named):
        Limits(**setting)
    with pytest.raises(UsageError, match=r"'windows'.*'window'"):
        DegradationStep("windows", 3)
    with pytest.raises(UsageError, match="value is 0"):
        DegradationStep("window")


def test_states_move_as_the_table_says_and_no_other_way():
    for start in State:
        for to in State:
            life = Lifecycle()
            life.state = start
            if to in MOVES[start]:
                life.move(to)
                assert life.state is to
            else:
                with pytest.raises(InferixError, match=f"{start}.*{to}"):
                    life.move(to)
    assert not MOVES[State.CLOSED] and not MOVES[State.FAILED]


def test_pages_of_other_sizes_take_no_room():
    """Each size of picture has a store of its own."""
    scheduler = Scheduler(Limits())
    wide, small = (SchedulerEntry(MemoryNeed(pages=6 * MB), kind, 1.0, page_room=10 * MB) for kind in ("wide", "small"))
    assert scheduler.join(A, wide) and scheduler.join(B, small)
    assert re.search("6 MB.*10 MB", scheduler.obstacle(C, small))


def test_a_paused_session_frees_the_room_of_its_pages():
    scheduler = Scheduler(Limits(memory_bytes=10 * MB))
    whole = SchedulerEntry(MemoryNeed(pages=6 * MB, decoder=2 * MB), "small", 1.0)
    assert scheduler.join(A, whole)
    scheduler.rest(A)
    assert scheduler.reserved == 2 * MB
    assert scheduler.join(B, entry(7 * MB))
    scheduler.wake(A)
    assert scheduler.admit_waiting() == []
    assert re.search("8 MB.*7 MB.*10 MB", scheduler.obstacle(A, whole))
    scheduler.rest(A)
    assert not scheduler.waiting
    scheduler.wake(A)
    scheduler.leave(B)
    assert scheduler.admit_waiting() == [A] and scheduler.reserved == 8 * MB
    scheduler.rest(A)
    scheduler.leave(A)
    assert scheduler.reserved == 0
