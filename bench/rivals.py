"""Other attention implementations over the same tokens as our kernel, as far as they are installed.

Each is a function from a case's inputs to a call without arguments, so that its inputs (tokens in order, in its own
layout) are prepared before the clock runs. Its result becomes `out` without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.block_attention.sdpa import pages_are_one_run
from ..kernels.spec import indexable

Prepare = Callable[[dict[str, Any]], Callable[[], Any]]
# Packages with attention over [R, tokens, heads, D]: name, module and function. Those of flash-attn are alternatives to
# each other, and 4 installs a module `flash_attn` without 2's function.
FLASH_PACKAGES = (
    ("flash-attn 2", "flash_attn", "flash_attn_func"),
    ("flash-attn 3", "flash_attn_interface", "flash_attn_func"),
    ("flash-attn 4", "flash_attn.cute", "flash_attn_func"),
)


def bound(run: Callable[..., Any]) -> Prepare:
    """Prepare a function that takes a case's inputs unchanged."""
    return lambda inputs: partial(run, **inputs)


def attention_baselines(
    inputs: dict[str, Any],
    ours: dict[str, Prepare],
    backends: Sequence[str] = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"),
    with_flex: bool = True,
) -> dict[str, Prepare]:
    """Baselines of a case: our kernel with the pages in order, and other attentions that support the case.

    backends: of torch's attention, by the names of SDPBackend.
    """
    baselines: dict[str, Prepare] = {}
    if not pages_are_one_run(inputs["page_table"], inputs["page_count"]):
        baselines |= {f"{name}, in order": in_order(prepare) for name, prepare in ours.items()}
    if any(inputs[name] is not None for name in ("q_sink", "kv_scale", "lse")):
        return baselines
    if with_flex:
        baselines["flex"] = flex()
    if len(set(inputs["page_count"].tolist())) > 1:  # the others need a mask in memory for rows of different lengths
        return baselines
    from torch.nn.attention import SDPBackend

    for name in backends:
        baselines[f"sdpa {name.partition('_')[0].lower()}"] = sdpa(getattr(SDPBackend, name))
    baselines |= {name: flash_attn(attend) for name, attend in flash_packages()}
    if (attend := function_of("sageattention", "sageattn")) is not None:
        baselines["sageattention"] = sageattention(attend)
    return baselines


def flash_packages() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Name and function of each flash-attn that is installed."""
    for name, module, function in FLASH_PACKAGES:
        if (attend := function_of(module, function)) is not None:
            yield name, attend


def function_of(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a package; None if the package, or the function in it, is not installed."""
    try:
        found: Callable[..., Any] | None = getattr(import_module(module), name, None)
    except ImportError:
        return None
    return found


def in_order(prepare: Prepare) -> Prepare:
    """Prepare one of our kernels over the listed pages, copied one after the other."""

    def prepared(inputs: dict[str, Any]) -> Callable[[], Any]:
        counts = inputs["page_count"].tolist()
        pages = torch.cat([inputs["page_table"][row, :count] for row, count in enumerate(counts)]).long()
        starts = torch.tensor([0, *accumulate(counts)][:-1], dtype=torch.int32, device=pages.device)[:, None]
        width = torch.arange(inputs["page_table"].shape[1], dtype=torch.int32, device=pages.device)
        scale = inputs["kv_scale"]
        return prepare(inputs | {
            "kv": indexable(inputs["kv"])[:, pages].view(inputs["kv"].dtype), "page_table": starts + width,
            "kv_scale": None if scale is None else scale[:, pages].contiguous(),
        })  # fmt: skip

    return prepared


def in_rows(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [R, heads, tokens, D] without pages; rows are padded with zeros to the longest."""
    counts = inputs["page_count"].tolist()
    listed = [inputs["page_table"][row, :count].long() for row, count in enumerate(counts)]
    rows = [inputs["kv"][:, pages].flatten(1, 2) for pages in listed]
    longest = max(row.shape[1] for row in rows)
    kv = torch.stack([F.pad(row, (0, 0, 0, 0, 0, longest - row.shape[1])) for row in rows], dim=1)
    k, v = kv.transpose(2, 3).contiguous()
    return inputs["q"].transpose(1, 2).contiguous(), k, v


def sdpa(backend: Any) -> Prepare:
    """torch's attention with one backend."""

    def prepared(inputs: dict[str, Any]) -> Callable[[], Any]:
        from torch.nn.attention import sdpa_kernel

        q, k, v = in_rows(inputs)

        def call() -> None:
            with sdpa_kernel(backend):
                attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
            inputs["out"] = attended.transpose(1, 2)

        return call

    return prepared


def flex() -> Prepare:
    """FlexAttention, compiled, with a block mask that ends each row's keys at the row's length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()  # other cases count towards the recompile limit, beyond which this one would run eagerly
    compiled = torch.compile(flex_attention, dynamic=False)

    def prepared(inputs: dict[str, Any]) -> Callable[[], Any]:
        q, k, v = in_rows(inputs)
        lengths = inputs["page_count"] * inputs["kv"].shape[2]
        mask = create_block_mask(
            lambda row, head, query, key: key < lengths[row], len(q), None, q.shape[2], k.shape[2], device=q.device.type
        )
        grouped = q.shape[1] != k.shape[1]

        def call() -> None:
            inputs["out"] = compiled(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

        return call

    return prepared


def flash_attn(attend: Callable[..., Any]) -> Prepare:
    """A function of a flash-attn package; 3 and 4 may return the log-sum-exp beside the result."""

    def prepared(inputs: dict[str, Any]) -> Callable[[], Any]:
        rows = [part.transpose(1, 2).contiguous() for part in in_rows(inputs)]

        def call() -> None:
            attended = attend(*rows)
            inputs["out"] = attended[0] if isinstance(attended, tuple) else attended

        return call

    return prepared


def sageattention(attend: Callable[..., Any]) -> Prepare:
    """The sageattention package, which computes in INT8."""

    def prepared(inputs: dict[str, Any]) -> Callable[[], Any]:
        rows = in_rows(inputs)
        return lambda: inputs.update(out=attend(*rows, tensor_layout="HND").transpose(1, 2))

    return prepared
