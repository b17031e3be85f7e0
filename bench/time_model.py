"""Predicted time of a launch from its operations, bytes and tiles: a stated model, not a measurement.

A launch takes the longer of its arithmetic and its traffic, and a fixed time to start. Arithmetic of matrix products
and attention runs at the rate of a full card times the share of the last wave of tiles that has work. Nothing stays in
a cache. `RATES` has the constants of the cards that a model is stated for; each can be replaced by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ..errors import UsageError, nearest, quoted
from ..runtime.capacity.links import LINKS

TILE = (128, 256)  # rows and columns of a matrix product that a multiprocessor computes at once


@dataclass(frozen=True)
class Rates:
    """Rates of a card, those of arithmetic before the loss to incomplete waves.

    multiprocessors: tiles that run at once. matmul, fp32_matmul, fp8_matmul, int8_matmul: TFLOP/s of cuBLAS or Triton;
    fp32_matmul without TF32. attention: of `block_attention` in half precision; fp8_attention: over FP8 pages; fp8_qk:
    with queries in FP8, too. sdpa: of torch's attention; cudnn: of cuDNN's. convolution: of cuDNN. memory: GB/s that a
    kernel reaches. start: us between two kernels of a graph. host: us of a call that the host launches, which bounds
    what is not captured. link: GB/s that a GPU sends to others; collective: us of each.
    """

    multiprocessors: float
    matmul: float
    fp32_matmul: float
    fp8_matmul: float
    int8_matmul: float
    attention: float
    fp8_attention: float
    fp8_qk: float
    sdpa: float
    cudnn: float
    convolution: float
    memory: float
    start: float = 1.0
    host: float = 5.0
    link: float = LINKS["nvlink"].bandwidth
    collective: float = LINKS["nvlink"].latency

    def seconds(self, rate: str, flops: int, nbytes: int, tiles: int) -> float:
        """Seconds of one launch. rate: name of its arithmetic's rate, empty where only traffic counts. tiles: 0 if
        unknown. Of a collective, at the rate `link`, nbytes are those that it sends.
        """
        if rate == "link":
            return nbytes / (self.link * 1e9) + self.collective * 1e-6
        arithmetic = flops / (getattr(self, rate) * 1e12 * self.full(tiles)) if rate else 0.0
        return max(arithmetic, nbytes / (self.memory * 1e9)) + self.start * 1e-6

    def full(self, tiles: int) -> float:
        """Share of the multiprocessors that have work, averaged over all waves of `tiles`; 1 for an unknown number."""
        return tiles / (math.ceil(tiles / self.multiprocessors) * self.multiprocessors) if tiles else 1.0

    def changed(self, values: Mapping[str, str]) -> Rates:
        """Return these with constants replaced; UsageError for one that does not exist or is not above 0."""
        numbers = {}
        known = [field.name for field in fields(self)]
        for name, text in values.items():
            if name not in known:
                raise UsageError(f"assume has no {quoted(name)}{nearest(name, known)}; expected {', '.join(known)}")
            try:
                numbers[name] = float(text)
            except ValueError:
                numbers[name] = math.nan
            if not 0 < numbers[name] < math.inf:
                raise UsageError(f"assume {name} is {quoted(text)}; expected a number above 0")
        return replace(self, **numbers)


# H200 at the clocks of a long run, from published figures of the libraries on Hopper: cuBLAS 560 to 680 TFLOP/s with
# its waves, FlashAttention-2 300 (code for sm_80), cuDNN's attention as FlashAttention-3 (648 over long rows of head
# dim 128, arXiv 2407.08608), its convolutions 400 to 500. `fp32_matmul` is a part of the maker's 67 on the CUDA cores.
# `attention` is an estimate: the loop of the kernel does not overlap softmax with the tensor cores. `fp8_attention`
# pays for turning keys and values into float16, `fp8_qk` for values alone, and its first product takes half the time.
RATES = {
    90: Rates(
        multiprocessors=132, matmul=700, fp32_matmul=55, fp8_matmul=1240, int8_matmul=1240, attention=530,
        fp8_attention=430, fp8_qk=550, sdpa=300, cudnn=650, convolution=450, memory=3000,
    ),
}  # fmt: skip


def rates_of(architecture: int, values: Mapping[str, str]) -> Rates | None:
    """Rates of an architecture with constants replaced; None where none are stated, UsageError to replace those."""
    rates = RATES.get(architecture)
    if rates is None and values:
        known = ", ".join(f"sm_{one}" for one in RATES)
        raise UsageError(f"assume is {quoted(str(dict(values)))}, but rates are stated for {known} only; leave it out")
    return rates and rates.changed(values)


def attention_tiles(size: tuple[int, ...]) -> int:
    """Tiles of 128 queries of an attention with queries [rows, heads, tokens, dim]."""
    rows, heads, tokens, _ = size
    return rows * heads * math.ceil(tokens / 128)


def tiles_of(size: tuple[int, ...]) -> int:
    """Tiles of a matrix product with results [..., M, N]."""
    *batch, rows, columns = size
    return math.prod(batch) * math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
