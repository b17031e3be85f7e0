"""Pages of KV memory as host integers: which are free, who holds which. One page is one latent frame in all layers.

`PagePool` counts references; `PageTable` is one branch of a session: the page of each frame it holds. No tensors.
A fork is a copy of the table; a frame that is going to be written gets a page of its own first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ...errors import InferixError


class OutOfPages(InferixError):
    """The pool has too few free pages; nothing was taken."""


class PagePool:
    """Owns page ids 0..size-1: a count of references each, 0 for a free one."""

    def __init__(self, size: int) -> None:
        self.references = [0] * size
        self.free = set(range(size))

    @property
    def size(self) -> int:
        return len(self.references)

    @property
    def used(self) -> int:
        """Pages that somebody holds."""
        return self.size - len(self.free)

    def acquire(self, count: int, reuse: Sequence[int] = (), after: int | None = None, room: int = 0) -> list[int]:
        """`count` free pages, each held once from now on; OutOfPages, taking none, if there are fewer.

        Free ones of `reuse` come first, then those that follow page `after`, then the longest free run. Where
        that run is longer than `room`, the pages the caller will hold in the end, its end is taken from, so that
        what is in front of it can still grow.
        """
        self.require(count)
        taken: list[int] = []
        self._take([page for page in reuse if page in self.free], count, taken)
        if taken:
            after = taken[-1]
        if after is not None:
            self._take(self._run_from(after + 1), count, taken)
        while len(taken) < count:
            run = max(self.free_runs(), key=len)
            start = max(0, len(run) - max(room, count - len(taken)))
            self._take(run[start:], count, taken)
        return taken

    def require(self, count: int) -> None:
        """OutOfPages unless so many pages are free."""
        if count > len(self.free):
            raise OutOfPages(
                f"{count} pages of KV memory are needed, {len(self.free)} of {self.size} are free; close a session, "
                "shrink the window (local_attn_size) or give more memory (kv_memory)"
            )

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page; ValueError for a free one."""
        for page in pages:
            if page in self.free:
                raise ValueError(f"page {page} is free and cannot be shared")
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder fewer for each page; without any it is free. ValueError for one that is free already."""
        for page in pages:
            if page in self.free:
                raise ValueError(f"page {page} is free already")
            self.references[page] -= 1
            if not self.references[page]:
                self.free.add(page)

    def grow(self, count: int) -> None:
        """`count` more pages after the last."""
        self.free |= set(range(self.size, self.size + count))
        self.references += [0] * count

    def free_runs(self) -> list[range]:
        """Free pages as runs of neighbours, ascending."""
        starts = [page for page in sorted(self.free) if page - 1 not in self.free]
        return [self._run_from(start) for start in starts]

    def check_integrity(self, holders: Iterable[PageTable] | None = None) -> None:
        """InferixError unless free pages are just those without references, and `holders`, if given, hold the rest."""
        unheld = {page for page, count in enumerate(self.references) if count == 0}
        if unheld != self.free or min(self.references, default=0) < 0:
            wrong = sorted(unheld ^ self.free) or [p for p, n in enumerate(self.references) if n < 0]
            raise InferixError(f"page pool: references and free pages disagree about {wrong}")
        if holders is not None:
            held = Counter(page for table in holders for page in table.all_pages())
            if wrong := [page for page, count in enumerate(self.references) if held[page] != count]:
                counts = {page: (self.references[page], held[page]) for page in wrong}
                raise InferixError(f"page pool: pages counted and held differ: {counts}")

    def _run_from(self, first: int) -> range:
        stop = first
        while stop in self.free:
            stop += 1
        return range(first, stop)

    def _take(self, pages: Sequence[int], count: int, taken: list[int]) -> None:
        """Take as many of these free pages as are still wanted."""
        for page in pages[: count - len(taken)]:
            self.free.remove(page)
            self.references[page] = 1
            taken.append(page)


class PageTable:
    """Holds the pages of one branch: of frames it keeps, and scratch ones that last for a pass.

    positions: temporal position that the keys of a frame were stored at; absent until the frame is written.
    room: pages it will hold in the end, for where in the pool to begin.
    """

    def __init__(self, pool: PagePool, room: int = 0) -> None:
        self.pool, self.room = pool, room
        self.pages: dict[int, int] = {}
        self.positions: dict[int, int] = {}
        self.scratch: dict[int, int] = {}

    @property
    def frames(self) -> tuple[int, ...]:
        """Frames held, in the order they came."""
        return tuple(self.pages)

    def all_pages(self) -> list[int]:
        return [*self.pages.values(), *self.scratch.values()]

    def frames_leaving(self, frames: tuple[int, ...]) -> list[int]:
        """Frames that `set_window(frames)` would let go; ValueError unless `frames` are some of those held, then new ones."""
        kept = [frame for frame in self.pages if frame in frames]
        if tuple(kept) != frames[: len(kept)]:
            raise ValueError(f"frames {frames} to hold must be some of {self.frames}, then new ones")
        return [frame for frame in self.pages if frame not in frames]

    def pages_needed(self, frames: tuple[int, ...]) -> int:
        """Pages that must be free in the pool for `set_window(frames)`."""
        own = sum(self.is_sole_owner(frame) for frame in self.frames_leaving(frames))
        return len(set(frames) - set(self.pages)) - own

    def set_window(self, frames: tuple[int, ...]) -> None:
        """Hold just `frames`: keep those that are here, let others go, take pages for new ones.

        OutOfPages leaves everything as it was.
        """
        dropped = self.frames_leaving(frames)
        self.pool.require(self.pages_needed(frames))
        evicted = [self.pages.pop(frame) for frame in dropped]
        self.pool.release(evicted)
        self.positions = {frame: position for frame, position in self.positions.items() if frame in self.pages}
        new = [frame for frame in frames if frame not in self.pages]
        self.pages |= dict(zip(new, self._acquire(len(new), evicted), strict=True))

    def is_sole_owner(self, frame: int) -> bool:
        """Whether nobody else holds the page of a frame."""
        return self.pool.references[self.pages[frame]] == 1

    def count_shared(self, frames: Sequence[int]) -> int:
        """How many of these held frames somebody else holds as well."""
        return sum(not self.is_sole_owner(frame) for frame in frames)

    def write(self, frames: Sequence[int], positions: Sequence[int]) -> None:
        """These held frames are written anew, whole, with keys at `positions`: shared pages are replaced by fresh ones."""
        shared = [frame for frame in frames if not self.is_sole_owner(frame)]
        fresh = self._acquire(len(shared))
        self.pool.release(self.pages[frame] for frame in shared)
        self.pages |= dict(zip(shared, fresh, strict=True))
        self.positions |= dict(zip(frames, positions, strict=True))

    def alloc_scratch(self, frames: Sequence[int]) -> None:
        """Scratch pages for frames that a pass makes and does not keep."""
        self.scratch |= dict(zip(frames, self._acquire(len(frames)), strict=True))

    def free_scratch(self) -> None:
        """The pass is over: release its scratch pages."""
        self.pool.release(self.scratch.values())
        self.scratch = {}

    def drop_from(self, first: int) -> None:
        """Let go of frames from `first` on, and of scratch pages."""
        self.free_scratch()
        self.pool.release([page for frame, page in self.pages.items() if frame >= first])
        self.pages = {frame: page for frame, page in self.pages.items() if frame < first}
        self.positions = {frame: position for frame, position in self.positions.items() if frame < first}

    def copy(self) -> PageTable:
        """The same frames in the same pages, each with one more holder; scratch pages are not passed on."""
        other = PageTable(self.pool, self.room)
        self.pool.share(self.pages.values())
        other.pages, other.positions = dict(self.pages), dict(self.positions)
        return other

    def release(self) -> None:
        """Let everything go; a second call does nothing."""
        self.free_scratch()
        self.pool.release(self.pages.values())
        self.pages, self.positions = {}, {}

    def _acquire(self, count: int, reuse: Sequence[int] = ()) -> list[int]:
        last = max(self.pages, default=None)
        after = None if last is None else self.pages[last]
        return self.pool.acquire(count, reuse, after, self.room - len(self.pages))
