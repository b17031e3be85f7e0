"""Names of the original Wan2.1_VAE.pth, and a VAE's sizes read off its tensors' shapes.

Ours are diffusers' names. The original counts the decoder's layers in one flat list, `num_res_blocks + 1`
residual blocks and an upsampler per level, so those indices need the VAE's sizes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .vae import WAN21_VAE, VaeSpec

PREFIXES = {  # ours: original
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    **{
        f"{side}.{ours}": f"{side}.{original}"
        for side in ("encoder", "decoder")
        for ours, original in {
            "conv_in": "conv1",
            "mid_block.resnets.0": "middle.0",
            "mid_block.attentions.0": "middle.1",
            "mid_block.resnets.1": "middle.2",
            "norm_out": "head.0",
            "conv_out": "head.2",
        }.items()
    },
}
RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def original_names(names: list[str], spec: VaeSpec) -> dict[str, str]:
    """Our names, each with its name in the original file."""
    return {name: to_original(name, spec) for name in names}


def to_original(name: str, spec: VaeSpec) -> str:
    """One of our tensor names as the original file has it."""
    for ours, original in PREFIXES.items():
        if name.startswith(f"{ours}."):
            return _layer(f"{original}{name[len(ours) :]}")
    if found := re.match(r"encoder\.down_blocks\.(\d+)\.(.*)", name):
        return _layer(f"encoder.downsamples.{found[1]}.{found[2]}")
    if found := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name):
        level, kind, index, rest = found.groups()
        within = int(index) if kind == "resnets" else spec.num_res_blocks + 1
        return _layer(f"decoder.upsamples.{int(level) * (spec.num_res_blocks + 2) + within}.{rest}")
    return name


def _layer(name: str) -> str:
    """Rename the parts of a residual block; attention and resampling layers have the same names in both."""
    if not re.search(r"\.(downsamples|upsamples|middle)\.\d+\.", name):
        return name
    head, part, leaf = name.rsplit(".", 2)
    return f"{head}.{RESIDUAL.get(part, part)}.{leaf}"


def vae_spec_from_shapes(shapes: Mapping[str, tuple[int, ...]], names: str = "original") -> VaeSpec:
    """The sizes of a Wan 2.1-type VAE from its tensor shapes, in `original` or `diffusers` names.

    KeyError if a tensor that tells them is not there.
    """
    if names == "original":
        encoder, z_dim, first = "encoder.downsamples", shapes["conv2.weight"][0], shapes["encoder.conv1.weight"][0]
        conv = "residual.2"
    else:
        encoder, z_dim, first = (
            "encoder.down_blocks", shapes["post_quant_conv.weight"][0], shapes["encoder.conv_in.weight"][0],
        )  # fmt: skip
        conv = "conv1"
    widths: list[int] = []
    temporal: list[bool] = []
    blocks, index = 0, 0
    while f"{encoder}.{index}.{conv}.weight" in shapes or f"{encoder}.{index}.resample.1.weight" in shapes:
        if f"{encoder}.{index}.resample.1.weight" in shapes:
            temporal.append(f"{encoder}.{index}.time_conv.weight" in shapes)
        else:
            blocks += 1
            if len(widths) == len(temporal):
                widths.append(shapes[f"{encoder}.{index}.{conv}.weight"][0])
        index += 1
    return VaeSpec(
        z_dim=z_dim,
        base_channels=first,
        multipliers=tuple(width // first for width in widths),
        num_res_blocks=blocks // len(widths),
        temporal_down=tuple(temporal),
        mean=WAN21_VAE.mean[:z_dim],
        std=WAN21_VAE.std[:z_dim],
    )
