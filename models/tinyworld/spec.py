"""Sizes of the small world: a Wan transformer and a Wan 2.2 autoencoder, both small."""

from ..spec import ModelSpec
from ..wan.vae_spec import VaeSpec
from .world import ACTIONS

SPEC = ModelSpec(
    name="tinyworld", family="tinyworld", dim=256, ffn_dim=768, num_heads=4, kv_heads=4, num_layers=4, in_channels=20,
    out_channels=20, freq_dim=256, text_dim=64, text_len=8, patch=(1, 1), eps=1e-6, image_dim=None, image_tokens=None,
    vae_stride=(4, 8), fps=8, default_size=(64, 64), grid=(8, 8), actions=ACTIONS,
    camera_channels=None,
)  # fmt: skip
VAE = VaeSpec(
    z_dim=SPEC.out_channels, base_channels=32, decoder_channels=32, multipliers=(1, 2, 2), num_res_blocks=1,
    temporal_down=(True, True), patch=2, shortcuts=True, mean=(0.0,) * SPEC.out_channels,
    std=(1.0,) * SPEC.out_channels,
)  # fmt: skip
