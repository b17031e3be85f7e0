"""What a stream carries on from block to block beside its timeline: conditionings, their pasts, blocks on their way."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...schemes.timeline import Span
from ..execution.executors import Text
from ..kv.paged_cache import PagedCache
from ..sampler import Solver


@dataclass
class Branch:
    """One conditioning with the cache of its own past; guidance has two."""

    text: Text
    cache: PagedCache


@dataclass
class InFlight:
    """A block on its way: latents at the level of `step`; committed once its clean keys and values are kept."""

    span: Span
    latents: Tensor
    solver: Solver
    step: int = 0
    committed: bool = False


@dataclass
class PromptChange:
    """Rows [text_len, d] on their way in: `left` more blocks of `blocks` until they are reached."""

    old: Tensor
    new: Tensor
    blocks: int
    left: int
