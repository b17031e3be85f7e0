"""Published figures of known GPUs. None of them was measured here; sources are given for each GPU.

capability: CUDA compute capability. tflops: dense bfloat16 with float32 accumulation; figures published only with
sparsity are halved. bandwidth: GB/s. memory_gb: nominal size in 10^9 bytes; the driver and libraries use what a GPU has
beyond that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    name: str
    capability: tuple[int, int]
    memory_gb: int
    tflops: float
    bandwidth: float


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        # Ampere GA102 architecture whitepaper v2, appendix A
        Card("rtx-3090", (8, 6), 24, 71, 936),
        # Ada GPU architecture whitepaper v2, appendix A: BF16 tensor with FP32 accumulate
        Card("rtx-4080", (8, 9), 16, 97.5, 717),
        Card("rtx-4090", (8, 9), 24, 165.2, 1008),
        # RTX Blackwell GPU architecture whitepaper, appendix: BF16 tensor with FP32 accumulate
        Card("rtx-5080", (12, 0), 16, 112.6, 960),
        Card("rtx-5090", (12, 0), 32, 209.5, 1792),
        # L4 datasheet: 242 with sparsity; L40S datasheet: 362.05, 864 GB/s
        Card("l4", (8, 9), 24, 121, 300),
        Card("l40s", (8, 9), 48, 362, 864),
        # A100 datasheet, SXM forms
        Card("a100-40gb", (8, 0), 40, 312, 1555),
        Card("a100-80gb", (8, 0), 80, 312, 2039),
        # H100 datasheet, SXM and PCIe: 1,979 and 1,513 with sparsity; H200 datasheet: 1,979 with sparsity
        Card("h100", (9, 0), 80, 989, 3350),
        Card("h100-pcie", (9, 0), 80, 756, 2000),
        Card("h200", (9, 0), 141, 989, 4800),
        # HGX B200 datasheet, one of its eight: 4.5 PFLOPS with sparsity, 180 GB at 7.7 TB/s
        Card("b200", (10, 0), 180, 2250, 7700),
    )
}


def card_named(device: str) -> Card | None:
    """The known card of a device's name, such as `NVIDIA H100 PCIe`; None for any other device."""
    words = set(re.split(r"[\s_-]+", device.lower()))
    known = [card for card in CARDS.values() if words.issuperset(card.name.split("-"))]
    return max(known, key=lambda card: card.name.count("-"), default=None)
