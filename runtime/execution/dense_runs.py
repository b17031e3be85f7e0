"""Which passes run over one run of pages in a program of its own, and by which form of `dense_attention`."""

from __future__ import annotations

import torch

from ...errors import UsageError
from ...graphs.paged_attention import PagedAttention
from ...graphs.shards import OnPages
from ...kernels.dense_attention.rule import Shape, expect_installed, form_for
from ...kernels.dense_attention.run import Run

MOST = 4  # runs of an executor, each with a program and a captured graph


class DenseRuns:
    """Chooses while a pass is planned: its program holds addresses, so what pages it lists is decided before it runs.

    asked: a form for every run; None for those that are in the table of measured cards and shapes. used: whether
    programs are made for runs at all. grouped: heads of queries share those of keys. UsageError for a form whose
    library is not there, and for one that cannot take such heads.
    """

    def __init__(self, asked: str | None, device: torch.device, used: bool, grouped: bool = False) -> None:
        if asked is not None:
            expect_installed(asked, device)
        if asked == "cudnn" and grouped:
            raise UsageError(
                "dense_attention: form is 'cudnn', which takes as many heads of keys as of queries, and the model has "
                "fewer; choose sdpa or flash_attn, or leave it out"
            )
        self.asked, self.device, self.used = asked, device, used
        self.runs: set[tuple[torch.Size, Run]] = set()  # with the shape of the store

    def form_for(self, attention: OnPages) -> str | None:
        """The form for a pass; None where its pages are not one run, or as many other runs have programs already."""
        if not self.used or not isinstance(attention, PagedAttention) or attention.run is None:
            return None
        _, _, page_tokens, heads, dim = store = attention.kv[0].shape
        shape = Shape(attention.parts[0].frames * page_tokens, heads, dim, attention.run[1] * page_tokens)
        form = self.asked or form_for(self.device, shape)
        if form is None:
            return None
        self.runs |= {(store, attention.run)} if len(self.runs) < MOST else set()
        return form if (store, attention.run) in self.runs else None
