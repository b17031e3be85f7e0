"""Scheduler: order, admission and degradation from given numbers; and the state table of a session."""

import re

import pytest

from inferix.errors import InferixError, UsageError
from inferix.runtime.capacity.memory_need import MemoryNeed
from inferix.runtime.limits import DegradationStep, Limits
from inferix.runtime.sessions.lifecycle import MOVES, Lifecycle, State
from inferix.runtime.sessions.scheduler import Scheduler, SchedulerEntry

MB = 10**6


def entry(need=0, kind="small", period=1.0):
    return SchedulerEntry(MemoryNeed(pages=need), kind, period)


def scheduler(admitted=2, **limits):
    found = Scheduler(Limits(**limits))
    for session in range(1, admitted + 1):
        assert found.join(session, entry())
    return found


def test_round_robin_takes_turns_among_those_that_can_go_on():
    found = scheduler(3)
    assert [found.pick([1, 2, 3], [], 0.0) for _ in range(4)] == [1, 2, 3, 1]
    assert [found.pick([1, 3], [2], 0.0) for _ in range(2)] == [3, 1]
    assert found.pick([1, 2, 3], [], 0.0) == 2
    assert found.pick([], [1, 2, 3], 0.0) is None


def test_the_session_that_runs_out_of_video_first_comes_first():
    found = scheduler(3, schedule="earliest-deadline", realtime=True)
    assert found.shown(1, now=0.0, seconds=1.0) is None
    found.shown(2, now=0.5, seconds=0.25)
    assert found.pick([1, 2], [], 0.6) == 2
    assert found.pick([1, 2, 3], [], 0.6) == 3  # it has shown nothing yet
    assert found.shown(2, now=0.7, seconds=1.0) == pytest.approx(0.05)
    assert found.pick([1, 2], [], 0.8) == 1


def test_a_late_block_is_counted_and_playing_begins_again_from_it():
    found = scheduler(1, realtime=True)
    found.shown(1, now=0.0, seconds=1.0)
    assert found.shown(1, now=1.5, seconds=1.0) == -0.5
    assert found.admitted[1].due == 2.5 and found.admitted[1].late == 1
    assert found.shown(1, now=2.4, seconds=1.0) == pytest.approx(0.1)
    assert found.admitted[1].due == 3.5 and found.admitted[1].late == 0


def test_a_deadline_that_passes_while_the_reader_holds_the_session_back_is_void():
    found = scheduler(2, realtime=True)
    found.shown(1, now=0.0, seconds=1.0)
    found.pick([2], [1], now=0.5)
    assert found.admitted[1].due == 1.0
    found.pick([2], [], now=1.5)  # a block of it is under way, and late
    assert found.admitted[1].due == 1.0
    found.pick([2], [1], now=1.5)
    assert found.admitted[1].due is None
    assert found.shown(1, now=5.0, seconds=1.0) is None


def test_a_session_that_does_not_fit_is_refused_with_the_numbers():
    found = Scheduler(Limits(memory_bytes=10 * MB))
    found.join(1, entry(need=6 * MB))
    with pytest.raises(InferixError, match=r"session 2 .*5 MB.*6 MB.*10 MB"):
        found.join(2, entry(need=5 * MB))
    with pytest.raises(UsageError, match=r"11 MB.*memory_bytes.*10 MB"):
        found.join(3, entry(need=11 * MB))
    assert list(found.admitted) == [1] and not found.waiting


def test_or_waits_in_order_for_room():
    found = Scheduler(Limits(memory_bytes=10 * MB, when_full="queue"))
    assert found.join(1, entry(need=6 * MB))
    assert not found.join(2, entry(need=6 * MB))
    assert not found.join(3, entry(need=MB))  # it would fit, but the second came first
    assert found.admit_waiting() == []
    found.leave(1)
    assert found.admit_waiting() == [2, 3]
    assert found.reserved == 7 * MB


def test_a_session_that_would_make_others_late_is_refused_with_the_numbers():
    found = scheduler(1, realtime=True)
    found.measured(1, 0.6)
    with pytest.raises(InferixError, match=r"0.600 s.*1.000 s.*60%"):
        found.join(2, entry())
    assert found.join(3, entry(kind="never seen"))
    found.leave(1)
    assert found.join(4, entry())
    relaxed = scheduler(1)
    relaxed.measured(1, 5.0)
    assert relaxed.join(2, entry())


def test_measured_times_follow_the_newest_blocks():
    found = scheduler(1)
    found.measured(1, 1.0)
    for _ in range(30):
        found.measured(1, 2.0)
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
            found.shown(1, now, seconds=1.0)
        assert found.next_degradation() == step
    assert found.most_sessions == 2
    with pytest.raises(InferixError, match=r"3 .*2 "):
        found.join(4, entry())
    silent = scheduler(1, realtime=True)
    for now in range(0, 100, 5):
        silent.shown(1, float(now), 1.0)
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
    assert found.join(1, wide) and found.join(2, small)
    assert re.search("6 MB.*10 MB", found.obstacle(3, small))


def test_a_paused_session_frees_the_room_of_its_pages():
    found = Scheduler(Limits(memory_bytes=10 * MB))
    whole = SchedulerEntry(MemoryNeed(pages=6 * MB, decoder=2 * MB), "small", 1.0)
    assert found.join(1, whole)
    found.rest(1)
    assert found.reserved == 2 * MB
    assert found.join(2, entry(7 * MB))
    found.wake(1)
    assert found.admit_waiting() == []
    assert re.search("8 MB.*7 MB.*10 MB", found.obstacle(1, whole))
    found.rest(1)
    assert not found.waiting
    found.wake(1)
    found.leave(2)
    assert found.admit_waiting() == [1] and found.reserved == 8 * MB
    found.rest(1)
    found.leave(1)
    assert found.reserved == 0
