"""Names of the original Wan2.1_VAE.pth and Wan2.2_VAE.pth, and the sizes of a VAE by its tensors' shapes.

Our names are diffusers'. Wan 2.1's original numbers the layers of all levels in one flat list, 2.2's has a list per
level. In both an upsampler comes after the `num_res_blocks + 1` residual blocks of its level.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from .vae_spec import WAN21_VAE, WAN22_VAE, VaeSpec

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
LEVEL = re.compile(
    r"(?P<side>encoder\.down|decoder\.up)_blocks\.(?P<level>\d+)\."
    r"(?:resnets\.(?P<index>\d+)|(?P<resampler>downsampler|upsampler|upsamplers\.0))\.(?P<rest>.*)"
)


def to_original(name: str, spec: VaeSpec) -> str:
    """Convert one of our tensor names to the original's."""
    for ours, original in PREFIXES.items():
        if name.startswith(f"{ours}."):
            return _layer(f"{original}{name[len(ours) :]}")
    if part := LEVEL.match(name):
        side = f"{part['side']}samples"
        blocks = spec.num_res_blocks + (part["side"] == "decoder.up")
        index = blocks if part["resampler"] else int(part["index"])
        if spec.shortcuts:
            return _layer(f"{side}.{part['level']}.{side.split('.')[1]}.{index}.{part['rest']}")
        return _layer(f"{side}.{int(part['level']) * (blocks + 1) + index}.{part['rest']}")
    return _layer(name.replace("encoder.down_blocks.", "encoder.downsamples."))  # a flat list in both


def _layer(name: str) -> str:
    """Rename the parts of a residual block; attention and resampling layers have the same names in both."""
    if not re.search(r"\.(downsamples|upsamples|middle)\.\d+\.", name):
        return name
    head, part, leaf = name.rsplit(".", 2)
    return f"{head}.{RESIDUAL.get(part, part)}.{leaf}"


def vae_spec_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> VaeSpec:
    """Read the sizes of a Wan VAE from its tensors' shapes, with the original's names or diffusers'.

    Raises KeyError if a tensor that shows a size is missing.
    """
    original = "conv2.weight" in shapes
    levels, conv, latent, first, last = (
        ("encoder.downsamples", "residual.2", "conv2.weight", "encoder.conv1.weight", "decoder.head.2.weight")
        if original
        else (
            "encoder.down_blocks", "conv1", "post_quant_conv.weight", "encoder.conv_in.weight",
            "decoder.conv_out.weight",
        )
    )  # fmt: skip
    inner, resampler = ("downsamples", None) if original else ("resnets", "downsampler")
    shortcuts = f"{levels}.0.{inner}.0.{conv}.weight" in shapes
    widths: list[int] = []
    temporal: list[bool] = []
    blocks = level = index = 0
    while True:
        if shortcuts:
            block = f"{levels}.{level}.{inner}.{index}"
            sampler = f"{levels}.{level}.{resampler}" if resampler else block
        else:
            block = sampler = f"{levels}.{level + index}"
        if f"{block}.{conv}.weight" in shapes:
            blocks += 1
            index += 1
            if len(widths) == len(temporal):
                widths.append(shapes[f"{block}.{conv}.weight"][0])
        elif f"{sampler}.resample.1.weight" in shapes and len(temporal) < len(widths):
            temporal.append(f"{sampler}.time_conv.weight" in shapes)
            level, index = (level + 1, 0) if shortcuts else (level + index + 1, 0)
        else:
            break
    base, pictures = shapes[first][0], shapes[first][1]
    like = WAN22_VAE if shortcuts else WAN21_VAE
    z_dim = shapes[latent][0]
    return VaeSpec(
        z_dim=z_dim,
        base_channels=base,
        decoder_channels=shapes[last][1] if shortcuts else base,
        multipliers=tuple(width // base for width in widths),
        num_res_blocks=blocks // len(widths),
        temporal_down=tuple(temporal),
        patch=round((pictures / 3) ** 0.5),
        shortcuts=shortcuts,
        mean=like.mean[:z_dim],
        std=like.std[:z_dim],
    )
