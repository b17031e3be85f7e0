"""Norm, rotation and the write into pages on a CPU: a rotation is one product of complex numbers, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rms_norm.cpu import rms_scale
from ..rope_append.reference import rope_append as plain_rope_append
from .reference import token_cos_sin, write_pages


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    rope_sink: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    eps: float,
) -> None:
    """In float32 or better; see the public function for shapes."""
    heads, kv_heads, dim = q.shape[2], kv.shape[3], q.shape[3]
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    queries, keys, values = wide.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    rotations = as_complex(token_cos_sin(rope_time, rope_rows, rope_columns), wide.dtype)
    query_scale, key_scale = rms_scale(queries, eps)[..., None], rms_scale(keys, eps)[..., None]
    queries = (queries * q_weight.to(wide.dtype)).unflatten(-1, (-1, dim))
    keys = (keys * k_weight.to(wide.dtype)).unflatten(-1, (-1, dim))
    # The norm's factor of a token goes into its rotation, which is smaller than its heads.
    rotate_into(q, queries, rotations * query_scale)
    if q_sink is not None and rope_sink is not None:
        sink = as_complex(token_cos_sin(rope_sink, rope_rows, rope_columns), wide.dtype)
        rotate_into(q_sink, queries, sink * query_scale)
    append(keys, rotations * key_scale, values.unflatten(-1, (-1, dim)), kv, pages, kv_scale)


def rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope_time: Tensor,
    rope_rows: Tensor,
    rope_columns: Tensor,
    out: Tensor,
    kv: Tensor,
    pages: Tensor,
    rope_sink: Tensor | None,
    q_sink: Tensor | None,
    kv_scale: Tensor | None,
    half_split: bool,
) -> None:
    """`rope_append` in float32 or better.

    Pairs that lie apart, and heads that are rotated only in part, run as the reference.
    """
    pairs = rope_time.shape[2] + rope_rows.shape[1] + rope_columns.shape[1]
    if half_split or 2 * pairs < q.shape[-1]:
        plain_rope_append(
            q, k, v, rope_time, rope_rows, rope_columns, out, kv, pages, rope_sink, q_sink, kv_scale, half_split
        )
        return
    wide = torch.promote_types(torch.promote_types(q.dtype, torch.float32), rope_time.dtype)
    rotations = as_complex(token_cos_sin(rope_time, rope_rows, rope_columns), wide)
    queries = q.to(wide)
    rotate_into(out, queries, rotations)
    if rope_sink is not None and q_sink is not None:
        rotate_into(q_sink, queries, as_complex(token_cos_sin(rope_sink, rope_rows, rope_columns), wide))
    append(k.to(wide), rotations, v, kv, pages, kv_scale)


def append(
    keys: Tensor, rotations: Tensor, values: Tensor, kv: Tensor, pages: Tensor, kv_scale: Tensor | None
) -> None:
    """Write rotated keys [R, F*P, n, D] and values into the pages [R, F] of their frames."""
    listed = pages.flatten().tolist()
    first, count = listed[0], len(listed)
    if kv_scale is None and listed == list(range(first, first + count)):
        by_row = (2, *keys.shape)
        rows = kv[:, first : first + count].view(by_row)
        rotate_into(rows[0], keys, rotations)
        rows[1].copy_(values)
    else:
        write_pages(rotated(keys, rotations), values.to(keys.dtype), kv, pages, kv_scale)


def as_complex(cos_sin: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotations [R, T, 1, D/2] as complex numbers of a dtype, from cosines and sines [R, T, D/2, 2]."""
    return torch.view_as_complex(cos_sin.to(dtype))[:, :, None]


def complex_pairs(x: Tensor) -> Tensor:
    """View x [R, T, n, D] as complex numbers [R, T, n, D/2], a pair (2j, 2j + 1) each; a copy at an odd offset."""
    return torch.view_as_complex((x.clone() if x.storage_offset() % 2 else x).unflatten(-1, (-1, 2)))


def rotated(x: Tensor, rotations: Tensor) -> Tensor:
    return torch.view_as_real(complex_pairs(x) * rotations).flatten(-2)


def rotate_into(out: Tensor, x: Tensor, rotations: Tensor) -> None:
    """Write the rotated x [R, T, n, D] into `out`, which may have fewer bits."""
    if out.dtype == x.dtype and out.storage_offset() % 2 == 0:
        torch.mul(complex_pairs(x), rotations, out=complex_pairs(out))
    else:
        out.copy_(rotated(x, rotations))


