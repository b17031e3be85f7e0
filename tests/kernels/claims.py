"""Claims about paged attention, as checks of any implementation of the op: see test_kernels.py and interpreted.py."""

from __future__ import annotations

import torch
from torch import Tensor

from inferix.kernels.block_attention import block_attention
from inferix.kernels.rope import rope_angles, rotate

HEADS, KV_HEADS, DIM = 4, 2, 64
HISTORIES = (9, 3, 6)  # latent frames of three sessions


def sessions(page_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Queries of each session's last frame, a store of pages in no order, and the page of each session's frames."""
    generator = torch.Generator().manual_seed(page_tokens)
    pages = torch.randperm(sum(HISTORIES) + 4, generator=generator).tolist()
    kv = torch.full((2, len(pages), page_tokens, KV_HEADS, DIM), float("nan"), dtype=dtype)  # unlisted pages are NaN
    session_pages = [[pages.pop() for _ in range(frames)] for frames in HISTORIES]
    for page in [page for row in session_pages for page in row]:
        kv[:, page] = torch.randn(2, page_tokens, KV_HEADS, DIM, generator=generator).to(dtype)
    q = torch.randn(len(session_pages), page_tokens, HEADS, DIM, generator=generator).to(dtype)
    return q, kv, session_pages


def tables(lists: list[list[int]], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Lists of pages as a table and counts; shuffled where there is a generator."""
    table = torch.full((len(lists), max(map(len, lists)) + 2), -1, dtype=torch.int32)
    for row, listed in enumerate(lists):
        order = range(len(listed)) if generator is None else torch.randperm(len(listed), generator=generator).tolist()
        table[row, : len(listed)] = torch.tensor([listed[index] for index in order], dtype=torch.int32)
    return table, torch.tensor([len(listed) for listed in lists], dtype=torch.int32)


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention in float64 of q [T, H, D] over k, v [K, Hkv, D] in order of time, with a mask [K]."""
    q, k, v = (part.double().transpose(0, 1)[None] for part in (q, k, v))
    mask = seen[None].expand(q.shape[2], -1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)


def shuffled_pages_equal_tokens_in_order(window: int, sinks: int, page_tokens: int, dtype: torch.dtype) -> float:
    """Largest difference between pages listed in any order and a masked pass over whole histories in order."""
    q, kv, session_pages = sessions(page_tokens, dtype)
    seen = [[frame < sinks or frame >= len(row) - window for frame in range(len(row))] for row in session_pages]
    rows = zip(session_pages, seen, strict=True)
    lists = [[page for page, sees in zip(row, saw, strict=True) if sees] for row, saw in rows]
    got = block_attention(q, kv, *tables(lists, torch.Generator().manual_seed(window)))
    off = 0.0
    for row, (pages, saw) in enumerate(zip(session_pages, seen, strict=True)):
        k, v = kv[:, pages].flatten(1, 2)
        want = dense(q[row], k, v, torch.tensor(saw).repeat_interleave(page_tokens))
        off = max(off, float((got[row] - want).abs().max()))
    return off


def turned_queries_equal_keys_rotated_at_read(window: int, sinks: int, dtype: torch.dtype) -> float:
    """Largest difference between one more rotation of the query for the sink and keys rotated at read."""
    height, width = 3, 5
    raw_q, raw_kv, session_pages = sessions(height * width, torch.float64)
    table, counts, q, q_sink, want = [], [], [], [], []
    kv = raw_kv.clone()
    for row, pages in enumerate(session_pages):
        frames = range(len(pages))
        kv[0, pages] = rotated(raw_kv[0, pages], list(frames), height, width)  # stored at absolute positions
        visible = [frame for frame in frames if frame < sinks or frame >= len(pages) - window]
        moved = rotated(raw_kv[0, [pages[frame] for frame in visible]], list(range(len(visible))), height, width)
        last, early = len(pages) - 1, min(sinks, len(visible))
        query = raw_q[row].view(1, height * width, HEADS, DIM)
        q.append(rotated(query, [last], height, width)[0])
        q_sink.append(rotated(query, [len(visible) - 1], height, width)[0])
        k, v = moved.flatten(0, 1), raw_kv[1, [pages[frame] for frame in visible]].flatten(0, 1)
        want.append(dense(q_sink[-1], k, v, torch.ones(len(k), dtype=torch.bool)))
        rest = torch.randperm(len(visible) - early, generator=torch.Generator().manual_seed(row)).tolist()
        table.append([pages[visible[index]] for index in [*range(early), *(early + place for place in rest)]])
        counts.append(early)
    got = block_attention(
        torch.stack(q).to(dtype), kv.to(dtype), *tables(table), q_sink=torch.stack(q_sink).to(dtype),
        sink_count=torch.tensor(counts, dtype=torch.int32),
    )  # fmt: skip
    return float((got - torch.stack(want)).abs().max())


def rotated(x: Tensor, frames: list[int], height: int, width: int) -> Tensor:
    """x [F, tokens, heads, D] of frames at these positions."""
    return rotate(x.flatten(0, 1)[None], rope_angles(frames, height, width, DIM))[0].view(x.shape)


CLAIMS = [(2, 0, 20), (9, 0, 7), (2, 1, 20), (3, 2, 33), (1, 1, 64)]  # window, sinks, tokens of a page
