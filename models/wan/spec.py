"""Sizes of the Wan transformers.

Source: Wan 2.1 (arXiv 2503.20314) and the published configurations of Wan 2.1 and 2.2; tensors of LingBot-World.
"""

from __future__ import annotations

from typing import Any

from ..spec import ModelSpec

FAMILY: dict[str, Any] = {
    "family": "wan", "freq_dim": 256, "text_len": 512, "patch": (2, 2), "eps": 1e-6, "actions": (), "grid": None,
    "camera_channels": None,
}  # fmt: skip
WAN21: dict[str, Any] = FAMILY | {
    "text_dim": 4096, "vae_stride": (4, 8), "fps": 16, "default_size": (832, 480), "out_channels": 16,
}  # fmt: skip
LINGBOT: dict[str, Any] = WAN21 | {
    "in_channels": 36, "image_dim": None, "image_tokens": None, "camera_channels": 6,
}  # fmt: skip
T2V: dict[str, Any] = {"in_channels": 16, "image_dim": None, "image_tokens": None}

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(name="wan-1.3b", dim=1536, ffn_dim=8960, num_heads=12, kv_heads=12, num_layers=30, **T2V, **WAN21),
        ModelSpec(name="wan-14b", dim=5120, ffn_dim=13824, num_heads=40, kv_heads=40, num_layers=40, **T2V, **WAN21),
        ModelSpec(
            name="wan-14b-i2v", dim=5120, ffn_dim=13824, num_heads=40, kv_heads=40, num_layers=40, in_channels=36,
            image_dim=1280, image_tokens=None, **WAN21,
        ),
        ModelSpec(
            name="wan-5b", dim=3072, ffn_dim=14336, num_heads=24, kv_heads=24, num_layers=30, in_channels=48,
            out_channels=48, text_dim=4096, image_dim=None, image_tokens=None, vae_stride=(4, 16), fps=24,
            default_size=(1280, 704), **FAMILY,
        ),
        ModelSpec(name="lingbot-1.3b", dim=1536, ffn_dim=8960, num_heads=12, kv_heads=12, num_layers=30, **LINGBOT),
        ModelSpec(name="lingbot-14b", dim=5120, ffn_dim=13824, num_heads=40, kv_heads=40, num_layers=40, **LINGBOT),
        ModelSpec(
            name="lingbot-tiny", dim=256, ffn_dim=512, num_heads=2, kv_heads=2, num_layers=2,
            **LINGBOT | {"text_dim": 64, "text_len": 16, "default_size": (96, 64)},
        ),
        ModelSpec(
            name="wan-tiny", dim=256, ffn_dim=512, num_heads=2, kv_heads=2, num_layers=2, **T2V,
            **WAN21 | {"text_dim": 64, "default_size": (128, 128)},
        ),
        ModelSpec(
            name="wan-tiny-5b", dim=256, ffn_dim=512, num_heads=2, kv_heads=2, num_layers=2, in_channels=48,
            out_channels=48, text_dim=64, image_dim=None, image_tokens=None, vae_stride=(4, 16), fps=24,
            default_size=(256, 256), **FAMILY,
        ),
        *(  # for several ranks: more heads than wan-tiny, heads that 3 or 6 ranks divide, and grouped ones
            ModelSpec(
                name=name, dim=32 * heads, ffn_dim=192, num_heads=heads, kv_heads=kv_heads, num_layers=4, **T2V,
                **WAN21 | {"text_dim": 64, "text_len": 16, "default_size": (96, 64)},
            )
            for name, heads, kv_heads in (("wan-ranks", 4, 4), ("wan-ranks-6", 6, 6), ("wan-ranks-gqa", 4, 2))
        ),
    )
}  # fmt: skip
