"""The number of parts into which the keys of an attention are split, from its grid and the card's multiprocessors.

Programs of the kernel, one for each tile of queries and head, run in waves of one program a multiprocessor. The last
wave may leave most of them idle. More parts make more and shorter programs, and cost a merge.
"""

from __future__ import annotations

from math import ceil

from ..block_attention.reference import STEP

QUERIES = 128  # of a program
MOST = 16  # parts
MERGE = 3.0  # steps: time to write and read a part of 128 queries in float32, at 3 TB/s and 530 TFLOP/s a card
LAUNCH = 4.0  # steps: the launch of the merge, and the start of its programs
SLACK = 1.05  # fewer parts are taken for so much more time, since the merge needs memory too


def parts_for(rows: int, tokens: int, heads: int, keys: int, multiprocessors: int) -> int:
    """Number of parts for rows x heads of `tokens` queries over `keys` keys; 1 with 0 multiprocessors.

    The fewest parts whose estimated time is within `SLACK` of the least: waves times the steps of 128 keys that a
    program takes, and the merge.
    """
    if multiprocessors == 0:
        return 1
    programs, steps = rows * heads * ceil(tokens / QUERIES), ceil(keys / STEP)

    def estimated(parts: int) -> float:
        waves = ceil(programs * parts / multiprocessors)
        merge = LAUNCH + MERGE * parts * programs / multiprocessors if parts > 1 else 0.0
        return waves * ceil(steps / parts) + merge

    times = {parts: estimated(parts) for parts in range(1, MOST + 1)}
    return next(parts for parts, time in times.items() if time <= SLACK * min(times.values()))
