"""Page pool and page tables: host integers, no tensors. One page holds one latent frame in all layers.

`PagePool` counts the references to each page. `PageTable` maps the frames of one branch of a session to pages. A fork
copies the table, and a shared page is replaced by a fresh one before it is written (copy on write).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ...errors import AtCapacity, InferixError


class OutOfPages(AtCapacity):
    """The pool has fewer free pages than requested; no page was acquired."""


class PagePool:
    """Owns page ids 0..size-1 and a reference count for each; free pages have 0."""

    def __init__(self, size: int) -> None:
        self.references = [0] * size
        self.free = set(range(size))

    @property
    def size(self) -> int:
        return len(self.references)

    @property
    def used(self) -> int:
        """Number of pages that have references; a shared page counts once."""
        return self.size - len(self.free)

    def acquire(self, count: int, reuse: Sequence[int] = (), after: int | None = None, room: int = 0) -> list[int]:
        """Take `count` free pages, each with one reference; OutOfPages, taking none, if there are fewer.

        Free pages of `reuse` are taken first, then the run after page `after`, then from the longest free run.
        room: pages that the caller will hold in the end. A run longer than that is taken from its end, so that the
        branch in front of it can grow into the rest.
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
        """Raise OutOfPages unless `count` pages are free."""
        if count > len(self.free):
            raise OutOfPages(
                f"{count} pages of KV memory are needed, {len(self.free)} of {self.size} are free; close a session, "
                "shrink the window (local_attn_size) or give more memory (kv_memory)"
            )

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page; ValueError for a free one."""
        for page in pages:
            if page in self.free:
                raise ValueError(f"page {page} is free and cannot be shared")
            self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove one reference from each page; at 0 the page is free. ValueError for a page that is free already."""
        for page in pages:
            if page in self.free:
                raise ValueError(f"page {page} is free already")
            self.references[page] -= 1
            if not self.references[page]:
                self.free.add(page)

    def grow(self, count: int) -> None:
        """Add `count` free pages after the last."""
        self.free |= set(range(self.size, self.size + count))
        self.references += [0] * count

    def free_runs(self) -> list[range]:
        """Runs of neighbouring free pages, ascending."""
        starts = [page for page in sorted(self.free) if page - 1 not in self.free]
        return [self._run_from(start) for start in starts]

    def check_integrity(self, holders: Iterable[PageTable] | None = None) -> None:
        """Raise InferixError unless the free pages are those without references.

        holders: all open tables; their pages must add up to the references of each page.
        """
        unreferenced = {page for page, count in enumerate(self.references) if count == 0}
        if unreferenced != self.free or min(self.references, default=0) < 0:
            wrong = sorted(unreferenced ^ self.free) or [p for p, n in enumerate(self.references) if n < 0]
            raise InferixError(f"page pool: reference counts and the free list differ for pages {wrong}")
        if holders is not None:
            counts = Counter(page for table in holders for page in table.all_pages())
            if wrong := [page for page, count in enumerate(self.references) if counts[page] != count]:
                differing = {page: (self.references[page], counts[page]) for page in wrong}
                raise InferixError(f"page pool: (references, uses in tables) differ by page: {differing}")

    def _run_from(self, first: int) -> range:
        stop = first
        while stop in self.free:
            stop += 1
        return range(first, stop)

    def _take(self, pages: Sequence[int], count: int, taken: list[int]) -> None:
        """Move free `pages` to `taken` until it has `count`."""
        for page in pages[: count - len(taken)]:
            self.free.remove(page)
            self.references[page] = 1
            taken.append(page)


class PageTable:
    """The page of each cached frame of one branch, and scratch pages that last for one pass.

    positions: temporal position at which the keys of a frame are stored; absent until the frame is written.
    room: pages that the branch will hold in the end; the pool looks for a run of that length.
    """

    def __init__(self, pool: PagePool, room: int = 0) -> None:
        self.pool, self.room = pool, room
        self.pages: dict[int, int] = {}
        self.positions: dict[int, int] = {}
        self.scratch: dict[int, int] = {}

    @property
    def frames(self) -> tuple[int, ...]:
        """Cached frames, in the order in which they were added."""
        return tuple(self.pages)

    def all_pages(self) -> list[int]:
        return [*self.pages.values(), *self.scratch.values()]

    def frames_leaving(self, frames: tuple[int, ...]) -> list[int]:
        """Frames that `set_window(frames)` evicts; ValueError unless `frames` are cached frames, then new ones."""
        staying = [frame for frame in self.pages if frame in frames]
        if tuple(staying) != frames[: len(staying)]:
            raise ValueError(f"frames is {frames}; expected some of the cached {self.frames} in order, then new ones")
        return [frame for frame in self.pages if frame not in frames]

    def pages_needed(self, frames: tuple[int, ...]) -> int:
        """Free pages that `set_window(frames)` takes beyond those it frees itself."""
        freed = sum(self.is_sole_owner(frame) for frame in self.frames_leaving(frames))
        return len(set(frames) - set(self.pages)) - freed

    def set_window(self, frames: tuple[int, ...]) -> None:
        """Make `frames` the cached frames: evict all others and allocate pages for new ones.

        OutOfPages changes nothing.
        """
        leaving = self.frames_leaving(frames)
        self.pool.require(self.pages_needed(frames))
        evicted = [self.pages.pop(frame) for frame in leaving]
        self.pool.release(evicted)
        self.positions = {frame: position for frame, position in self.positions.items() if frame in self.pages}
        new = [frame for frame in frames if frame not in self.pages]
        self.pages |= dict(zip(new, self._acquire(len(new), evicted), strict=True))

    def is_sole_owner(self, frame: int) -> bool:
        """True if no other table references the page of a frame."""
        return self.pool.references[self.pages[frame]] == 1

    def count_shared(self, frames: Sequence[int]) -> int:
        """Number of these cached frames whose pages other tables reference too."""
        return sum(not self.is_sole_owner(frame) for frame in frames)

    def write(self, frames: Sequence[int], positions: Sequence[int]) -> None:
        """Prepare to overwrite cached frames, with keys at `positions`: replace shared pages by fresh ones."""
        shared = [frame for frame in frames if not self.is_sole_owner(frame)]
        fresh = self._acquire(len(shared))
        self.pool.release(self.pages[frame] for frame in shared)
        self.pages |= dict(zip(shared, fresh, strict=True))
        self.positions |= dict(zip(frames, positions, strict=True))

    def alloc_scratch(self, frames: Sequence[int]) -> None:
        """Allocate scratch pages for frames whose keys and values last for one pass."""
        self.scratch |= dict(zip(frames, self._acquire(len(frames)), strict=True))

    def free_scratch(self) -> None:
        """Release the scratch pages of a pass."""
        self.pool.release(self.scratch.values())
        self.scratch = {}

    def drop_from(self, first: int) -> None:
        """Release the pages of frames from `first` on, and scratch pages."""
        self.free_scratch()
        self.pool.release([page for frame, page in self.pages.items() if frame >= first])
        self.pages = {frame: page for frame, page in self.pages.items() if frame < first}
        self.positions = {frame: position for frame, position in self.positions.items() if frame < first}

    def copy(self) -> PageTable:
        """A table of the same frames in the same pages, each with one reference more; without scratch pages."""
        other = PageTable(self.pool, self.room)
        self.pool.share(self.pages.values())
        other.pages, other.positions = dict(self.pages), dict(self.positions)
        return other

    def release(self) -> None:
        """Release all pages; a second call does nothing."""
        self.free_scratch()
        self.pool.release(self.pages.values())
        self.pages, self.positions = {}, {}

    def _acquire(self, count: int, reuse: Sequence[int] = ()) -> list[int]:
        last = max(self.pages, default=None)
        after = None if last is None else self.pages[last]
        return self.pool.acquire(count, reuse, after, self.room - len(self.pages))
