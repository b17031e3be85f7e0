"""Sizes of MAGI-1's transformers: the two published ones, and a tiny one for tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import UsageError
from ..spec import ModelSpec

NULL_TOKENS = 50  # rows of the learned null caption that cross-attention sees


@dataclass(frozen=True)
class MagiSpec(ModelSpec):
    """Sizes that only MAGI-1 has.

    head_width: channels of a head; the published models have dim // num_heads. cond_dim: width of the timestep and
    caption vector. gated: SwiGLU in place of GELU. copies: times that the latent channels are repeated before the
    patches. rescale: factor of the latents. fp8: layers but the first and the last are quantised.
    """

    head_width: int
    cond_dim: int
    gated: bool
    copies: int
    rescale: float
    fp8: bool = False

    def __post_init__(self) -> None:
        if self.head_width < 8 or self.head_width % 8:
            raise UsageError(f"head_width is {self.head_width}; expected a multiple of 8, as learned frequencies need")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise UsageError(f"kv_heads is {self.kv_heads}; expected a divisor of num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.head_width

    @property
    def text_rows(self) -> int:
        """Rows of a text as passes take it: those of the caption, and the row of its AdaLN vector."""
        return self.text_len + 1

    @property
    def first_pictures(self) -> int:
        return self.vae_stride[0]

    @property
    def bands(self) -> int:
        """Learned rotary frequencies, which the three axes share."""
        return self.head_dim // 8


MAGI_4B = MagiSpec(
    name="magi-4.5b", family="magi", dim=3072, ffn_dim=12288, num_heads=24, kv_heads=8, num_layers=34, in_channels=16,
    out_channels=16, freq_dim=256, text_dim=4096, text_len=800, patch=(2, 2), eps=1e-6, image_dim=None,
    image_tokens=None, vae_stride=(4, 8), fps=24, default_size=(720, 720), grid=None, actions=(),
    camera_channels=None, head_width=128, cond_dim=768, gated=False, copies=1, rescale=1.0,
)  # fmt: skip
MAGI_24B = replace(
    MAGI_4B, name="magi-24b", dim=6144, ffn_dim=16384, num_heads=48, num_layers=48, default_size=(1280, 720),
    cond_dim=1536, gated=True, copies=2, rescale=0.1,
)  # fmt: skip
MAGI_TINY = replace(
    MAGI_4B, name="magi-tiny", dim=64, ffn_dim=96, num_heads=4, kv_heads=2, num_layers=2, text_dim=32, text_len=64,
    default_size=(64, 64), head_width=16, cond_dim=16, gated=True, copies=2, rescale=0.1,
)  # fmt: skip
MAGI_TINY_FP8 = replace(MAGI_TINY, name="magi-tiny-fp8", num_layers=3, fp8=True)
MODELS: dict[str, MagiSpec] = {
    spec.name: spec
    for spec in (
        MAGI_4B, MAGI_24B, MAGI_TINY, replace(MAGI_4B, name="magi-4.5b-fp8", fp8=True),
        replace(MAGI_24B, name="magi-24b-fp8", fp8=True), MAGI_TINY_FP8,
    )
}  # fmt: skip
