"""Block attention that loads whole tiles of keys and values through a tensor descriptor (TMA, from sm_90 on).

The same kernel: one thread asks for a tile, so that addresses take no registers and no instructions. A descriptor
spans all pages, and no tile reaches beyond a run; pages shorter than a tile come through masked loads. Not the
default: whether it is faster is for `inferix bench kernels` to say on a card, and for `--tune` to write down.
"""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec import architecture
from .gpu import ANYWHERE, Config, candidates, variants
from .gpu import block_attention as attend
from .reference import expect_one_list

# By architecture and head dim; on sm_120 the kernel spills, so it is not declared there.
CONFIGS = {
    (90, 64): Config(128, 128, 0, 8, 3), (90, 128): Config(128, 128, 0, 8, 2),
    (100, 64): Config(128, 128, 0, 8, 3), (100, 128): Config(128, 64, 0, 8, 3),
}  # fmt: skip


def block_attention(
    q: Tensor,
    kv: Tensor,
    page_table: Tensor,
    page_count: Tensor,
    out: Tensor,
    q_sink: Tensor | None,
    sink_count: Tensor | None,
    kv_scale: Tensor | None,
    lse: Tensor | None,
    scale: float,
    config: Config | None = None,
    parts: int = 1,
) -> None:
    """For tensors that were checked; kv must begin at a multiple of 16 bytes, as every allocation does.

    parts: as of the Triton form.
    """
    expect_one_list("descriptors", page_table)
    if kv.data_ptr() % 16:
        raise ValueError(f"block_attention: kv begins at address {kv.data_ptr()}; descriptors need a multiple of 16")
    config = config or (CONFIGS[architecture(q.device), q.shape[3]] if q.device.type == "cuda" else ANYWHERE)
    width = kv.shape[3] * kv.shape[4]
    tiles = TensorDescriptor.from_tensor(kv.view(-1, width), [config.keys, kv.shape[4]])
    attend(q, kv, page_table, page_count, out, q_sink, sink_count, kv_scale, lse, scale, config, tiles, parts)


def compile_cases(capability: int) -> dict[str, dict[str, object]]:
    """Calls that cover the variants, for the gate that compiles without a GPU: name -> arguments."""
    return variants(capability, CONFIGS)


__all__ = ["CONFIGS", "Config", "block_attention", "candidates", "compile_cases"]
