"""Rows that MAGI-1 puts before a caption: marks of quality and style, and of the chunks that are still to come.

They are given as tensors: `rows` of a published file, or any others. `Engine.open` takes what `with_special_tokens`
returns as `prompt_embeds`, and that of later chunks as `prompts`.
Source: github.com/SandAI-org/MAGI-1, special_tokens.npz.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, UsageError, nearest, quoted
from ..files import check_file, reason

ROWS = {  # name: row of `other_tokens`, in the order in which each is put before those above it
    "static": 2, "dynamic": 3, "borderness": 4, "hq": 1, "3d-model": 15, "2d-anime": 16,
}  # fmt: skip
DURATION, DURATIONS = "duration", (7, 8)  # the row of the last chunk, and the number of such rows
TABLE = "other_tokens"


def read_special_tokens(path: str | Path) -> Tensor:
    """Read the table [100, text_dim] of a published file, in float16. Raises CheckpointError for any other file."""
    path = Path(path)
    check_file(path, "file of special tokens")
    try:
        with np.load(path, allow_pickle=False) as file:
            table = torch.from_numpy(np.asarray(file[TABLE], dtype=np.float64)).half()
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"cannot read {quoted(path)}: {reason(error)}; expected {TABLE} in it") from error
    if table.ndim != 2 or len(table) <= max(ROWS.values()):
        raise CheckpointError(f"{quoted(path)}: {TABLE} is {list(table.shape)}; expected 100 rows")
    return table


def special_rows(table: Tensor, names: Sequence[str] = ("hq", DURATION), chunk: int = 0, chunks: int = 1) -> Tensor:
    """Rows [n, text_dim] of a chunk of `chunks` generated ones, in the order in which they stand before its caption.

    names: of `ROWS`, and `duration`, which counts the chunks from this one to the last, up to 8. UsageError for others.
    """
    for name in names:
        if name not in ROWS and name != DURATION:
            known = ", ".join((*ROWS, DURATION))
            raise UsageError(f"names has {quoted(name)}{nearest(name, (*ROWS, DURATION))}; expected {known}")
    if not 0 <= chunk < chunks:
        raise UsageError(f"chunk is {chunk} of {chunks}; expected 0 or more, and less")
    rows = [row for name, row in ROWS.items() if name in names]
    if DURATION in names:
        first, count = DURATIONS
        rows.append(first + min(chunks - 1 - chunk, count - 1))
    return table[rows[::-1]]


def with_special_tokens(caption: Tensor, rows: Tensor) -> Tensor:
    """Put rows [n, text_dim] before a caption's [text_len, text_dim], of which the last n are cut."""
    return torch.cat((rows.to(caption), caption))[: len(caption)]
