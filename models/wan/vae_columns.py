"""Layers of Wan's VAE of which every column of a picture needs all others, for ranks that decode some columns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..column_decoder import Columns
from .vae import FrameAttention


class ColumnAttention(FrameAttention):
    """Attention of a rank's pixels of each frame to those of all ranks."""

    columns: Columns

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, *self.columns.joined(torch.cat((k, v), dim=-1)).chunk(2, dim=-1))


JOINING: Mapping[type[nn.Module], type[nn.Module]] = {FrameAttention: ColumnAttention}
