"""Pages and positions of one pass as the kernels read them: small tensors, filled on the host before the pass.

A pass is cut into parts: neighbouring groups with equally many frames become rows of one launch. Nothing here
decides anything; policies do, and these tensors carry what they decided.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PassTables:
    """Pages and positions of one part of a pass: R rows (groups, of one session or of several), F frames each.

    pages: int32 [R, F], the page each frame's keys and values are written to.
    page_table: int32 [R, max_pages], pages to read, those of sink and pinned frames first.
    page_count: int32 [R], how many pages of its row in page_table each row reads.
    rope_time: [R, F, a, 2], cosines and sines of the temporal rotation at which keys are stored.
    rope_sink and sink_count (int32 [R]): cosines and sines of the queries for the first `sink_count` listed pages,
    where positions count within the window; both or neither.
    head_groups: 0 where all heads of a row read the same pages; with G lists a row, one for each of G equal groups of
    heads, page_table is [R, G, max_pages], and page_count and sink_count are [R, G].
    """

    pages: Tensor
    page_table: Tensor
    page_count: Tensor
    rope_time: Tensor
    rope_sink: Tensor | None = None
    sink_count: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.rope_sink is None) != (self.sink_count is None):
            raise ValueError("rope_sink and sink_count come together")

    @property
    def head_groups(self) -> int:
        return self.page_table.shape[1] if self.page_table.ndim == 3 else 0

    @property
    def rows(self) -> int:
        return self.pages.shape[0]

    @property
    def frames(self) -> int:
        """Frames of each row."""
        return self.pages.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are given, in the order of the fields."""
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def moved(self, tensors: Iterator[Tensor]) -> PassTables:
        """The same with the next of other tensors, in the order of `tensors`."""
        moved = {name: None if tensor is None else next(tensors) for name, tensor in vars(self).items()}
        return PassTables(**moved)  # type: ignore[arg-type]
