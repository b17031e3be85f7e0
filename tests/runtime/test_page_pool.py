"""Page pool and page tables against a model of sets, over thousands of random operations; a page is one number."""

import random
from types import SimpleNamespace

import pytest
import torch

from inferix.errors import InferixError, UsageError
from inferix.graphs.passes import Group, Pass
from inferix.runtime.kv.offload import Offloaded
from inferix.runtime.kv.page_layout import fresh_pages, layout_pass, parts_of, ring_order, through_slots
from inferix.runtime.kv.pages import OutOfPages, PagePool, PageTable
from inferix.runtime.plans import GroupPages, JoinTransfer, Offload, Onload, Plan
from inferix.runtime.worker_client import WorkerClient

PAGES = 60


Branch = tuple[PageTable, dict[int, int]]


class Numbers(WorkerClient):
    """Pages of a worker in which a page holds what was written last: one number."""

    form = SimpleNamespace(grid=(1, 1))

    def __init__(self, pool: PagePool) -> None:
        super().__init__(self)
        self.pool, self.client = pool, self
        self.content, self.hosts = dict[int, int](), dict[int, list[int]]()

    def make_room(self, count: int) -> None:
        pass

    def execute(self, plan: Plan) -> list[torch.Tensor]:
        if isinstance(plan, Offload):
            self.hosts[plan.host] = [self.content[page] for page in plan.pages]
        elif isinstance(plan, Onload):
            numbers = [self.hosts[plan.host][slot] for slot in plan.slots]
            self.content |= dict(zip(plan.pages, numbers, strict=True))
        else:
            assert isinstance(plan, JoinTransfer)
        return []


class Model:
    """Branches as sets of (frame, what was written last)."""

    def __init__(self, seed: int, pool: PagePool, kind: type[PageTable] = PageTable) -> None:
        self.random, self.pool, self.kind = random.Random(seed), pool, kind
        self.tables: list[Branch] = []
        self.rewind_points: list[Branch] = []  # for rewinding
        self.resting: list[tuple[Offloaded, list[Branch]]] = []
        self.store = Numbers(pool)
        self.content = self.store.content
        self.stamp = self.refused = 0

    def step(self) -> None:
        moves = [self.open, self.roll, self.roll, self.roll, self.rewrite, self.fork, self.keep, self.rewind]
        moves += [self.close, self.scratch, self.offload, self.prefetch, self.onload, self.abandon, self.forget]
        try:
            self.random.choice(moves)()
        except OutOfPages:
            self.refused += 1
        self.check()

    def write(self, branch: Branch, frames: list[int]) -> None:
        table, expected = branch
        self.pool.require(table.count_shared(frames))
        positions = [frame + self.random.randrange(3) for frame in frames]  # a scene cut moves them
        table.write(frames, positions)
        for frame, position in zip(frames, positions, strict=True):
            self.stamp += 1
            self.content[table.pages[frame]] = self.stamp
            expected[frame] = self.stamp, position

    def open(self) -> None:
        if len(self.tables) < 6:
            self.tables.append((self.kind(self.pool, room=12), {}))

    def roll(self) -> None:
        """The next block: sink of 2, window of up to 9, blocks of 3."""
        for branch in self.some(self.tables):
            table, expected = branch
            end = max(table.pages, default=-1) + 4
            visible = {*table.frames[:2], *[frame for frame in table.frames if frame >= end - 9]}
            frames = tuple(sorted(visible | set(range(end - 3, end))))
            table.set_window(frames)
            for frame in set(expected) - set(frames):
                del expected[frame]
            self.write(branch, list(range(end - 3, end)))

    def rewrite(self) -> None:
        for branch in self.some(self.tables):
            self.write(branch, list(branch[0].frames))

    def fork(self) -> None:
        for table, expected in self.some(self.tables):
            self.tables.append((self.copy(table), dict(expected)))

    def keep(self) -> None:
        for table, expected in self.some(self.tables):
            self.rewind_points.append((self.copy(table), dict(expected)))

    def rewind(self) -> None:
        if self.rewind_points and self.tables:
            self.tables.pop(self.random.randrange(len(self.tables)))[0].release()
            self.tables.append(self.rewind_points.pop(self.random.randrange(len(self.rewind_points))))

    def forget(self) -> None:
        for branch in self.some(self.rewind_points):
            branch[0].release()
            self.rewind_points.remove(branch)

    def close(self) -> None:
        for branch in self.some(self.tables):
            branch[0].release()
            branch[0].release()
            self.tables.remove(branch)

    def scratch(self) -> None:
        for table, _ in self.some(self.tables):
            table.free_scratch()
            table.alloc_scratch([-1, -2])
            for page in table.scratch.values():
                self.content[page] = 0
            if self.random.random() < 0.8:
                table.free_scratch()

    def offload(self) -> None:
        chosen = self.random.sample(self.tables, min(len(self.tables), 2))
        for branch in chosen:
            self.tables.remove(branch)
        self.resting.append((Offloaded(self.store, [table for table, _ in chosen]), chosen))

    def prefetch(self) -> None:
        for away, _ in self.some(self.resting):
            away.prefetch()

    def onload(self) -> None:
        for away, branches in self.some(self.resting):
            away.onload()
            self.resting.remove((away, branches))
            self.tables += branches

    def abandon(self) -> None:
        for away, branches in self.some(self.resting):
            for branch in self.some(branches):
                away.discard(branch[0])
                branch[0].release()
                branches.remove(branch)

    def copy(self, table: PageTable) -> PageTable:
        other = table.copy()
        other.__class__ = self.kind
        return other

    def some(self, branches: list) -> list:
        return [self.random.choice(branches)] if branches else []

    def check(self) -> None:
        prefetched = (branch for away, branches in self.resting if away.prefetched for branch in branches)
        here = [*self.tables, *self.rewind_points, *prefetched]
        away = [table for away, branches in self.resting if not away.prefetched for table, _ in branches]
        assert not any(table.pages for table in away)
        self.pool.check_integrity([table for table, _ in here])
        for table, expected in here:
            contents = {frame: (self.content[page], table.positions[frame]) for frame, page in table.pages.items()}
            assert contents == expected
        self.content |= dict.fromkeys(self.pool.free, -1)  # free pages may be overwritten
        pages = {page for table, _ in here for page in table.all_pages()}
        assert self.pool.used == len(pages)  # shared ones once


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_random_operations(seed):
    pool = PagePool(PAGES)
    model = Model(seed, pool)
    for _ in range(1500):
        model.step()
    assert model.refused > 10 and model.stamp > 500
    resting = (branch for _, branches in model.resting for branch in branches)
    for table, _ in [*model.tables, *model.rewind_points, *resting]:
        table.release()
    assert pool.used == 0 and pool.free_runs() == [range(PAGES)]


class Careless(PageTable):
    """Writes into pages that other tables reference."""

    def write(self, frames, positions):
        self.positions |= dict(zip(frames, positions, strict=True))


class Leaky(PageTable):
    """Drops evicted pages without releasing them."""

    def set_window(self, frames):
        for frame in self.frames_leaving(frames):
            del self.pages[frame]
        super().set_window(frames)


class OnePlace(PageTable):
    """Forks share the positions of their frames."""

    def copy(self):
        other = super().copy()
        other.positions = self.positions
        return other


@pytest.mark.parametrize("wrong", [Careless, Leaky, OnePlace])
def test_the_model_finds_planted_errors(wrong):
    model = Model(0, PagePool(PAGES), wrong)
    with pytest.raises((AssertionError, InferixError)):
        for _ in range(1500):
            model.step()


def test_a_steady_window_stays_in_its_own_run():
    """Two sessions alternate; each stays in its half of the pool, and evicted pages are reused."""
    pool = PagePool(18)
    one, other = PageTable(pool, room=9), PageTable(pool, room=9)
    for block in range(7):
        end = 3 * block + 3
        for table in (one, other):
            table.set_window(tuple(range(max(0, end - 9), end)))
    assert sorted(one.pages.values()) == list(range(9, 18))
    assert sorted(other.pages.values()) == list(range(9))
    assert [one.pages[frame] for frame in range(18, 21)] == [9, 10, 11]


def test_pages_come_from_evicted_slots_then_neighbours_then_the_longest_run():
    pool = PagePool(10)
    first = pool.acquire(10)
    pool.release([1, 4, 5, 7, 8, 9])
    assert first == list(range(10))
    assert pool.acquire(2, after=6) == [7, 8]
    assert pool.acquire(3, reuse=[5, 0, 1]) == [5, 1, 4]
    assert pool.acquire(1) == [9]
    with pytest.raises(OutOfPages, match=r"1 pages.*0 of 10.*kv_memory"):
        pool.acquire(1)


def test_misuse_is_refused_and_integrity_is_checked():
    pool = PagePool(4)
    table = PageTable(pool)
    table.set_window((0, 1, 2))
    with pytest.raises(ValueError, match=r"frames is \(2, 1\)"):
        table.set_window((2, 1))
    with pytest.raises(OutOfPages):
        table.set_window((1, 2, 3, 4, 5))
    assert table.frames == (0, 1, 2) and pool.used == 3  # as it was
    free = min(pool.free)
    for misuse in (pool.release, pool.share):
        with pytest.raises(ValueError, match=f"page {free} "):
            misuse([free])
    pool.check_integrity([table])
    with pytest.raises(InferixError, match=r"\{1: \(1, 0\)"):
        pool.check_integrity([])
    pool.free.add(table.pages[0])
    with pytest.raises(InferixError, match=rf"\[{table.pages[0]}\]"):
        pool.check_integrity()


def window_relative(frames, end, size, sink):
    context = tuple(sorted({*range(sink), *range(end - size + sink, end)}))
    return Group(tuple(frames), 0.0, context, tuple(range(len(context))))


def test_a_sink_takes_one_more_rotation_and_a_third_is_refused():
    table = PageTable(PagePool(20))
    table.set_window(tuple(range(9)))
    table.write(range(9), range(9))
    table.set_window((0, 1, 6, 7, 8, 9))
    (row,) = layout_pass(Pass((window_relative([9], 10, 6, 2),)), table, moving=True)
    pages = [table.pages[frame] for frame in (0, 1, 6, 7, 8, 9)]
    assert row == GroupPages((pages[5],), (9,), tuple(pages), 2, (5,))  # at position 5 of its window, stored at 9
    three = Group((9,), 0.0, (0, 1, 6, 7, 8, 9), (0, 1, 4, 9, 10, 11))
    with pytest.raises(UsageError, match=r"\[-2, 0, 2\].*shot_offset"):
        layout_pass(Pass((three,)), table, moving=True)
    unwritten = PageTable(table.pool)
    unwritten.set_window((0, 1))
    with pytest.raises(InferixError, match=r"\[0\]"):
        layout_pass(Pass((Group((1,), 0.0, (0, 1), (0, 1)),)), unwritten, moving=False)


def rolled(pool, blocks, sinks):
    """Pages and frames that the blocks of a stream list: 3 frames each, of 12 seen the first `sinks` stay."""
    table, listed = PageTable(pool, 12), []
    for block in range(blocks):
        end = 3 * block + 3
        frames = tuple(sorted({*range(min(sinks, end)), *range(max(0, end - 12 + sinks), end)}))
        table.set_window(frames)
        own = frames[-3:]
        (row,) = layout_pass(Pass((Group(own, 0.0, frames, frames),)), table, False, sinks)
        numbers = {page: frame for frame, page in table.pages.items()}
        listed.append((row.listed, tuple(numbers[page] for page in row.listed)))
    return listed


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_full_window_is_listed_as_one_run_in_an_order_that_other_sessions_do_not_change(sinks):
    alone = rolled(PagePool(12), 12, sinks)
    assert [pages for pages, _ in alone[4:]] == 8 * [tuple(range(12))]
    crowded = PagePool(40)
    crowded.acquire(40)
    crowded.release(range(0, 40, 2))  # no run is free
    beside = rolled(crowded, 12, sinks)
    assert [frames for _, frames in beside] == [frames for _, frames in alone]
    assert all(pages != one for (pages, _), (one, _) in zip(beside, alone, strict=True))


def test_the_order_of_a_ring():
    assert ring_order((0, 1, 2, 12, 13, 14, 15, 16), 3, 5) == [0, 1, 2, 13, 14, 15, 16, 12]
    assert ring_order((5, 6, 3), 1, 0) == [5, 6, 3]


def test_shared_pages_are_replaced_before_they_are_written_and_scratch_ones_freed():
    pool = PagePool(12)
    table = PageTable(pool)
    table.set_window((0, 1, 2))
    table.write((0, 1, 2), (0, 1, 2))
    fork = table.copy()
    old = dict(table.pages)
    fork.positions[0] = 7
    assert table.positions == {0: 0, 1: 1, 2: 2}
    again = Group((1, 2), 0.0, (0, 1, 2), (0, 1, 2))
    aside = Group((3,), 500.0, (0, 1, 2, 3), (0, 1, 2, 3), write=False)
    run = Pass((again, aside))
    assert fresh_pages(run, table) == 3
    rows = layout_pass(run, table, moving=False)
    assert fork.pages == old and table.pages[0] == old[0]
    assert not {table.pages[1], table.pages[2]} & set(old.values())
    assert rows[1].listed == (old[0], table.pages[1], table.pages[2], table.scratch[3])
    assert [len(part) for part in parts_of(rows)] == [1, 1]
    through = through_slots(rows, read_in_place=False)
    assert [row.pages for row in through.rows] == [(0, 1), (2,)]
    assert through.seen == [*rows[0].pages, *rows[1].pages, old[0]]
    assert through.rows[1].listed == (3, 0, 1, 2)
    assert through_slots(rows, read_in_place=True).rows[1].listed == rows[1].listed
    pool.check_integrity([table, fork])
    assert pool.used == 6
    table.free_scratch()
    assert pool.used == 5
