"""Sizes of the small world's autoencoder; those of its transformer are `MODELS["tinyworld"]`."""

from ..wan.spec import MODELS
from ..wan.vae import VaeSpec

SPEC = MODELS["tinyworld"]
VAE = VaeSpec(
    z_dim=SPEC.out_channels, base_channels=32, decoder_channels=32, multipliers=(1, 2, 2), num_res_blocks=1,
    temporal_down=(True, True), patch=2, shortcuts=True, mean=(0.0,) * SPEC.out_channels,
    std=(1.0,) * SPEC.out_channels,
)  # fmt: skip
