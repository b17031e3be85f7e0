"""Attention over pages equals attention over the same frames in order, through the ops the compiler knows."""

from __future__ import annotations

import pytest
import torch

from inferix.graphs.paged_attention import PagedAttention
from inferix.graphs.tables import PassTables
from inferix.kernels.attention import attention
from inferix.kernels.qk_norm_rope_append import rope_cos_sin
from inferix.kernels.rope import axis_angles, rope_angles, rotate
from inferix.kernels.rope_append import rope_append

HEIGHT, WIDTH, HEADS, DIM = 2, 3, 2, 64
P = HEIGHT * WIDTH


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turns(positions: list[int]) -> list[torch.Tensor]:
    return [rope_cos_sin(angles, torch.float64) for angles in axis_angles(positions, HEIGHT, WIDTH, DIM)]


def ints(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_two_sessions_with_unequal_parts_over_scattered_pages() -> None:
    """A clean frame, then two noisy ones, that see each other and two frames of the past at places of their own."""
    old_k, old_v, new = (
        draw(2, 2 * P, HEADS, DIM, seed=1),
        draw(2, 2 * P, HEADS, DIM, seed=2),
        draw(3, 2, 3 * P, HEADS, DIM, seed=3),
    )
    kv = torch.full((2, 12, P, HEADS, DIM), float("nan"), dtype=torch.float64)
    pages = [[7, 2, 9, 0, 4], [1, 11, 5, 3, 8]]  # of frames 10 to 14
    for session in range(2):
        turned = rotate(old_k[session, None], rope_angles([10, 11], HEIGHT, WIDTH, DIM))[0]
        for frame in range(2):
            rows = slice(frame * P, frame * P + P)
            kv[0, pages[session][frame]], kv[1, pages[session][frame]] = turned[rows], old_v[session, rows]
    time, row, column = turns([12, 13, 14])
    parts = [
        PassTables(ints([9], [5]), ints(*pages), ints([5, 5])[0], time[None, :1].repeat(2, 1, 1, 1)),
        PassTables(ints([0, 4], [3, 8]), ints(*pages), ints([5, 5])[0], time[None, 1:].repeat(2, 1, 1, 1)),
    ]
    actual = PagedAttention(parts, [kv], row, column).attend(0, *new)

    angles = rope_angles([12, 13, 14], HEIGHT, WIDTH, DIM)
    q, k = (rotate(part, angles) for part in new[:2])
    past = torch.stack(
        [rotate(old_k[session, None], rope_angles([10, 11], HEIGHT, WIDTH, DIM))[0] for session in range(2)]
    )
    expected = attention(q, torch.cat((past, k), 1), torch.cat((old_v, new[2]), 1))
    assert (actual - expected).abs().max() < 1e-12


def test_a_sink_nearer_than_it_was_stored() -> None:
    """Keys stay where they were stored; the query turned once more sees the sink at another distance."""
    k, v, q = (draw(1, 3 * P, HEADS, DIM, seed=seed) for seed in (1, 2, 3))
    kv = torch.zeros(2, 3, P, HEADS, DIM, dtype=torch.float64)
    stored = rotate(k, rope_angles([0, 8, 9], HEIGHT, WIDTH, DIM)).unflatten(1, (3, P))[0]
    kv[0, :2], kv[1, :2] = stored[:2], v.unflatten(1, (3, P))[0, :2]
    time, row, column = turns([9])
    nearer = turns([2])[0]  # window positions 0, 1, 2: the sink stands two before the query, at stored place 0
    tables = PassTables(ints([2]), ints([0, 1, 2]), ints([3])[0], time[None], nearer[None], ints([1])[0])
    last = slice(2 * P, 3 * P)
    actual = PagedAttention([tables], [kv], row, column).attend(0, q[:, last], k[:, last], v[:, last])

    at_read = rotate(k, rope_angles([0, 1, 2], HEIGHT, WIDTH, DIM))
    expected = attention(rotate(q[:, last], rope_angles([2], HEIGHT, WIDTH, DIM)), at_read, v)
    assert (actual - expected).abs().max() < 1e-12
    wrong = PassTables(ints([2]), ints([0, 1, 2]), ints([3])[0], time[None])
    assert (
        PagedAttention([wrong], [kv], row, column).attend(0, q[:, last], k[:, last], v[:, last]) - expected
    ).abs().max() > 1e-3


def test_the_op_tells_what_it_writes_and_refuses_what_does_not_fit() -> None:
    q = draw(1, P, HEADS, DIM, seed=1).float()
    time, row, column = (part.float() for part in turns([4]))
    kv = torch.zeros(2, 2, P, HEADS, DIM)
    args = (q, q, q, time[None], row, column, torch.empty_like(q), kv, ints([1]), None, None, None, False)
    torch.library.opcheck(torch.ops.inferix.rope_append, args)
    with pytest.raises(ValueError, match="rope_append: shape of k"):
        rope_append(q, q[:, 1:], q, time[None], row, column, kv, ints([1]))
    with pytest.raises(ValueError, match=r"time_pairs is 13"):
        rope_append(q, q, q, torch.cat((time, time[:, :1]), dim=1)[None], row, column, kv, ints([1]))
