"""The transformer of diffusers over the weights of one of ours, for comparison."""

from __future__ import annotations

import torch
from torch import nn

from ..transformer import Transformer
from .configs import diffusers_config
from .names import to_format

ROPE_POSITIONS = 1024  # of the tables of rotations


def diffusers_network(model: Transformer) -> nn.Module:
    """Make a `WanTransformer3DModel` that shares the weights of a model."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        made = WanTransformer3DModel.from_config(diffusers_config(model.spec))
    state = {to_format("diffusers", name): weight for name, weight in model.state_dict().items()}
    made.load_state_dict(state, strict=True, assign=True)
    made.rope = type(made.rope)(model.spec.head_dim, (1, *model.spec.patch), ROPE_POSITIONS)  # they are no weights
    network: nn.Module = made.eval().requires_grad_(False)
    return network
