"""Admission by measured blocks, from given numbers."""

import re

import pytest

from inferix.serve.real_time import BLOCKS, MOST_LATE, RECENT, RealTime, obstacle


def play(real_time, numbers, work, late=False):
    """Blocks of 0.5 s of video, one after the other, each of some seconds of work."""
    for number in numbers:
        begin = number * 0.5
        real_time.note_block(begin, begin + work, 0.5, late)


def test_the_load_is_the_work_of_a_block_in_its_playing_time():
    real_time = RealTime(shared=True)
    assert real_time.load(3) == 0
    play(real_time, range(4), work=0.1)
    assert real_time.load(1) == pytest.approx(0.2) and real_time.load(3) == pytest.approx(0.6)
    play(real_time, range(4, 4 + BLOCKS), work=0.2)
    assert real_time.load(2) == pytest.approx(0.8) and len(real_time.blocks) == BLOCKS


def test_the_first_block_of_a_stream_is_not_counted():
    real_time = RealTime(shared=True)
    real_time.note_block(0.0, 3.0, 0.1, late=None)
    assert not real_time.blocks
    real_time.note_block(3.0, 3.1, 0.5, late=False)
    assert real_time.load(1) == pytest.approx(0.2)


def test_work_at_the_same_time_counts_once():
    """As of two blocks that were made in one batch, and of one that waited for the other's decoding."""
    real_time = RealTime(shared=True)
    for begin, end in ((0.0, 0.2), (0.0, 0.2), (0.5, 0.7), (0.6, 0.9), (1.0, 1.1), (0.8, 1.2)):
        real_time.note_block(begin, end, 0.5, late=False)
    assert [block.work for block in real_time.blocks] == pytest.approx([0.2, 0.0, 0.2, 0.2, 0.1, 0.2])


@pytest.mark.parametrize(("shared", "work"), [(True, 0.15), (False, 0.1)])
def test_encoding_counts_where_it_takes_the_processors_of_the_engine(shared, work):
    real_time = RealTime(shared)
    real_time.note_encoding(0.0, 0.05)
    real_time.note_block(0.1, 0.2, 0.5, late=False)
    assert real_time.load(1) == pytest.approx(2 * work)


def test_one_session_more_is_refused_with_the_numbers():
    assert obstacle(0, 5.0, BLOCKS) is None  # the first one is let in by a slow machine, too
    assert obstacle(2, 0.56, 0) is None
    assert re.search(r"2 .*58%.*87%.*85%", obstacle(2, 0.58, 0))
    assert obstacle(2, 0.4, MOST_LATE) is None
    assert re.search(rf"4 of .*{BLOCKS}.* 2 .*{MOST_LATE}", obstacle(2, 0.4, MOST_LATE + 1))


def test_late_blocks_are_those_of_the_latest():
    real_time = RealTime(shared=True)
    play(real_time, range(5), work=0.1, late=True)
    assert real_time.late == 5
    play(real_time, range(5, 3 + BLOCKS), work=0.1)
    assert real_time.late == 2


def test_blocks_are_forgotten_after_a_while():
    """So that sessions that make none, such as a paused one that was late, keep nobody out."""
    real_time = RealTime(shared=True)
    play(real_time, range(4), work=0.4, late=True)
    real_time.forget_old(1.0 + RECENT)
    assert real_time.late == 2 and real_time.load(1) == pytest.approx(0.8)
    real_time.forget_old(10.0 + RECENT)
    assert real_time.late == 0 and real_time.load(1) == 0


def test_a_slow_engine_is_not_idle_while_it_makes_a_block():
    real_time = RealTime(shared=True)
    real_time.note_block(0.0, 40.0, 0.5, late=True)
    real_time.forget_old(79.0)
    assert real_time.load(1) == pytest.approx(80)
    real_time.forget_old(121.0)
    assert real_time.load(1) == 0
