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


def scheduler(admitted=2, **limits):
    found = Scheduler(Limits(**limits))
    for session in IDS[:admitted]:
        assert found.join(session, entry())
    return found


def test_round_robin_takes_turns_among_those_that_can_go_on():
    found = scheduler(3)
    assert [found.pick([A, B, C], [], 0.0) for _ in range(4)] == [A, B, C, A]
    assert [found.pick([A, C], [B], 0.0) for _ in range(2)] == [C, A]
    assert found.pick([A, B, C], [], 0.0) == B
    assert found.pick([], [A, B, C], 0.0) is None


def test_the_session_that_runs_out_of_video_first_comes_first():
    found = scheduler(3, schedule="earliest-deadline", realtime=True)
    assert found.shown(A, now=0.0, seconds=1.0) is None
    found.shown(B, now=0.5, seconds=0.25)
    assert found.pick([A, B], [], 0.6) == B
    assert found.pick([A, B, C], [], 0.6) == C  # it has shown nothing yet
    assert found.shown(B, now=0.7, seconds=1.0) == pytest.approx(0.05)
    assert found.pick([A, B], [], 0.8) == A


def test_a_late_block_is_counted_and_playing_begins_again_from_it():
    found = scheduler(1, realtime=True)
    found.shown(A, now=0.0, seconds=1.0)
    assert found.shown(A, now=1.5, seconds=1.0) == -0.5
    assert found.admitted[A].due == 2.5 and found.admitted[A].late == 1
    assert found.shown(A, now=2.4, seconds=1.0) == pytest.approx(0.1)
    assert found.admitted[A].due == 3.5 and found.admitted[A].late == 0


def test_a_deadline_that_passes_while_the_reader_holds_the_session_back_is_void():
    found = scheduler(2, realtime=True)
    found.shown(A, now=0.0, seconds=1.0)
    found.pick([B], [A], now=0.5)
    assert found.admitted[A].due == 1.0
    found.pick([B], [], now=1.5)  # a block of it is under way, and late
    assert found.admitted[A].due == 1.0
    found.pick([B], [A], now=1.5)
    assert found.admitted[A].due is None
    assert found.shown(A, now=5.0, seconds=1.0) is None


def test_a_session_that_does_not_fit_is_refused_with_the_numbers():
    found = Scheduler(Limits(memory_bytes=10 * MB))
    found.join(A, entry(need=6 * MB))
    with pytest.raises(InferixError, match=r"session c .*5 MB.*6 MB.*10 MB"):
        found.join(B, entry(need=5 * MB))
    with pytest.raises(UsageError, match=r"11 MB.*memory_bytes.*10 MB"):
        found.join(C, entry(need=11 * MB))
    assert list(found.admitted) == [A] and not found.waiting


def test_or_waits_in_order_for_room():
    found = Scheduler(Limits(memory_bytes=10 * MB, when_full="queue"))
    assert found.join(A, entry(need=6 * MB))
    assert not found.join(B, entry(need=6 * MB))
    assert not found.join(C, entry(need=MB))  # it would fit, but the second came first
    assert found.admit_waiting() == []
    found.leave(A)
    assert found.admit_waiting() == [B, C]
    assert found.reserved == 7 * MB


def test_a_session_that_would_make_others_late_is_refused_with_the_numbers():
    found = scheduler(1, realtime=True)
    found.measured(A, 0.6)
    with pytest.raises(InferixError, match=r"0.600 s.*1.000 s.*60%"):
        found.join(B, entry())
    assert found.join(C, entry(kind="never seen"))
    found.leave(A)
    assert found.join(D, entry())
    relaxed = scheduler(1)
    relaxed.measured(A, 5.0)
    assert relaxed.join(B, entry())


def test_measured_times_follow_the_newest_blocks():
    found = scheduler(1)
    found.measured(A, 1.0)
    for _ in range(30):
        found.measured(A, 2.0)
    assert found.block_seconds["small"] == pytest.approx(2.0, abs=1e-3)
    assert found.load() == pytest.approx(2.0, abs=1e-3)


def test_overload_takes_declared_steps_in_order_and_no_others():
    steps = (DegradationStep("window", 6), DegradationStep("sessions", 2))
    found = scheduler(3, realtime=True, late_blocks=2, overload=steps)
    assert found.next_degradation() is None
    now = 0.0
    for step in (*steps, None):
        for _ in range(3):
            now += 5.0
            found.shown(A, now, seconds=1.0)
        assert found.next_degradation() == step
    assert found.most_sessions == 2
    with pytest.raises(InferixError, match=r"session a .*3 .*2 "):
        found.join(D, entry())
    silent = scheduler(1, realtime=True)
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
    found = Scheduler(Limits())
    wide, small = (SchedulerEntry(MemoryNeed(pages=6 * MB), kind, 1.0, page_room=10 * MB) for kind in ("wide", "small"))
    assert found.join(A, wide) and found.join(B, small)
    assert re.search("6 MB.*10 MB", found.obstacle(C, small))


def test_a_paused_session_frees_the_room_of_its_pages():
    found = Scheduler(Limits(memory_bytes=10 * MB))
    whole = SchedulerEntry(MemoryNeed(pages=6 * MB, decoder=2 * MB), "small", 1.0)
    assert found.join(A, whole)
    found.rest(A)
    assert found.reserved == 2 * MB
    assert found.join(B, entry(7 * MB))
    found.wake(A)
    assert found.admit_waiting() == []
    assert re.search("8 MB.*7 MB.*10 MB", found.obstacle(A, whole))
    found.rest(A)
    assert not found.waiting
    found.wake(A)
    found.leave(B)
    assert found.admit_waiting() == [A] and found.reserved == 8 * MB
    found.rest(A)
    found.leave(A)
    assert found.reserved == 0
