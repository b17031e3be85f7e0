"""Decoding divided over ranks by columns: each decodes some columns of the picture, and neighbours exchange edges.

Before each convolution that is wider than one pixel, a rank receives the columns beside its own, so that no column is
computed twice and the picture is that of one rank. The state of a stream is divided in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..graphs.shards import Axis
from ..graphs.tiles import shares
from ..kernels.collectives import all_gather, group_of
from .decoder import Decoder, StreamState


@dataclass(eq=False)
class Columns:
    """Columns of the frames being decoded. axis: ranks that have some; widths: of the latents, by rank."""

    axis: Axis
    widths: list[int] = field(default_factory=list)

    def with_edges(self, layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Columns [..., w] with one more at each side: the neighbour's, or zeros at the edge of the picture.

        A hook before a layer.
        """
        (x,), axis = inputs, self.axis
        edges = {}
        if axis.place > 0:
            edges[axis.place - 1] = x[..., :1]
        if axis.place < axis.size - 1:
            edges[axis.place + 1] = x[..., -1:]
        received = group_of(axis.group).swap(edges)
        blank = x.new_zeros(*x.shape[:-1], 1)
        return (torch.cat([received.get(axis.place - 1, blank), x, received.get(axis.place + 1, blank)], dim=-1),)

    def joined(self, tokens: Tensor) -> Tensor:
        """Tokens [..., n, C] of the latent pixels of all ranks, rank by rank."""
        rows, most = tokens.shape[-2] // self.widths[self.axis.place], max(self.widths)
        padded = F.pad(tokens, (0, 0, 0, rows * most - tokens.shape[-2]))
        gathered = all_gather(padded, ranks=self.axis.size, group=self.axis.group)
        parts = [part[..., : rows * width, :] for part, width in zip(gathered, self.widths, strict=True)]
        return torch.cat(parts, dim=-2)


class ColumnDecoder:
    """A rank's columns of what a decoder makes.

    decoder: shares its weights with this one, and tensors that its layers derived, and is not changed. axis: ranks that
    have the other columns. joining: class of a layer by the class that it replaces, for layers of which every column
    needs all others: its layers get `columns`.
    """

    def __init__(
        self, decoder: Decoder, axis: Axis, joining: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType({})
    ) -> None:
        derived = (value for layer in decoder.modules() for value in vars(layer).values() if isinstance(value, Tensor))
        shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers(), *derived)}
        self.columns, self.inner = Columns(axis), copy.deepcopy(decoder, shared)
        for layer in self.inner.modules():
            if isinstance(layer, nn.Conv2d | nn.Conv3d) and layer.padding[-1]:
                assert layer.padding[-1] == 1, layer
                layer.padding = (*layer.padding[:-1], 0)
                layer.register_forward_pre_hook(self.columns.with_edges)
            elif type(layer) in joining:
                layer.__class__ = joining[type(layer)]
                vars(layer)["columns"] = self.columns

    def decode(self, latents: Tensor, state: StreamState) -> Tensor | None:
        """Decode the rank's columns of latents [F, z, h, w]; advances `state`, which is of these columns.

        Returns pixels [T, 3, s*h, s*w] of all ranks on rank 0, and None on others.
        """
        axis, stride = self.columns.axis, self.inner.spec.spatial_stride
        widths = self.columns.widths = shares(latents.shape[-1], axis.size)
        pixels, group = self.inner.decode(latents.split(widths, dim=-1)[axis.place], state), group_of(axis.group)
        if axis.place > 0:
            group.send(pixels.contiguous(), 0)
            return None
        parts = [pixels, *(pixels.new_empty(*pixels.shape[:-1], stride * width) for width in widths[1:])]
        for rank, part in enumerate(parts[1:], 1):
            group.receive(part, rank)
        return torch.cat(parts, dim=-1)


def divided_columns(x: Tensor, columns: int, ranks: int) -> tuple[Tensor, ...]:
    """Parts by rank of a tensor [..., W], where W is a multiple of the `columns` of latents."""
    scale, rest = divmod(x.shape[-1], columns)
    assert rest == 0, (x.shape, columns)
    return x.split([scale * width for width in shares(columns, ranks)], dim=-1)
