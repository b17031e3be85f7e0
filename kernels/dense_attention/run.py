"""A list of pages that is one run: numbers of the host, and the keys and values that they name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..spec import indexable

Run = tuple[int, int]  # the first page, and how many follow each other from there


def run_of(pages: Sequence[int]) -> Run | None:
    """The run that pages are, in any order; None for pages with a hole, or listed twice, or none."""
    if not pages:
        return None
    first, count = min(pages), len(pages)
    return (first, count) if sorted(pages) == list(range(first, first + count)) else None


def keys_and_values(kv: Tensor, first: int, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a run, views [rows, tokens, Hkv, D] of the store; all rows read the same."""
    run = indexable(kv)[:, first : first + count].flatten(1, 2)
    k, v = (part[None].expand(rows, -1, -1, -1) for part in (run[0], run[1]))
    return k, v
