"""A family from outside the package, unlike Wan's in all that a family can choose: its definition and its dense form.

Its rotation is half-split, over part of a head, with learned frequencies and centred rows and columns; four heads of
queries share two of keys and values; a layer has one norm before and one after; guidance has three branches, one
without a past, and scales by timestep; clean blocks are written under a null caption; two blocks are in flight, two
steps apart; and its solver is its own. The decoder and the text encoder are Wan's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inferix.kernels.attention import attention
from inferix.kernels.rope import rotate, token_angles
from inferix.models.cross_attention import TextKeyValues
from inferix.models.family import Format
from inferix.models.registry import MODELS
from inferix.models.rope import Rope
from inferix.models.solvers import RenoiseSolver, Schedule, Solver, register_solver
from inferix.models.spec import ModelSpec
from inferix.models.transformer import KeyValues, TextContext, Transformer
from inferix.models.wan.family import WanFamily
from inferix.schemes.context import ContextPolicy
from inferix.schemes.guidance import Guidance, GuidanceBranch
from inferix.schemes.presets import About, Preset
from inferix.schemes.sampler_spec import SamplerSpec, SolverRules

SPEC = dataclasses.replace(
    MODELS["wan-tiny"], name="toy-tiny", family="toy", dim=64, ffn_dim=96, num_heads=4, kv_heads=2, text_dim=16,
    text_len=6, default_size=(32, 32),
)  # fmt: skip


class CentredRope(Rope):
    def places(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        rows, columns = super().places(height, width)
        return rows - (height - 1) / 2, columns - (width - 1) / 2


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.index, self.head_dim = index, spec.head_dim
        self.norm_in, self.norm_out = nn.LayerNorm(spec.dim), nn.LayerNorm(spec.dim)
        self.norm_q, self.norm_k = nn.LayerNorm(spec.head_dim), nn.LayerNorm(spec.head_dim)
        self.q, self.cross_q, self.o = (nn.Linear(spec.dim, spec.dim, bias=False) for _ in range(3))
        self.k, self.v, self.cross_k, self.cross_v = (nn.Linear(spec.dim, spec.kv_dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(spec.dim, spec.ffn_dim), nn.Linear(spec.ffn_dim, spec.dim)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def forward(self, x: Tensor, gate: Tensor, context: TextKeyValues, kv: KeyValues) -> Tensor:
        n = self.norm_in(x)
        q, k, v = self.norm_q(self.heads(self.q(n))), self.norm_k(self.heads(self.k(n))), self.heads(self.v(n))
        seen = kv.attend(self.index, q, k, v) + context.attend(self.index, self.heads(self.cross_q(n)))
        update = self.o(seen.flatten(2)).unflatten(1, (gate.shape[1], -1)) * gate[:, :, None]
        x = x + self.norm_out(update.flatten(1, 2))
        return x + self.down(F.silu(self.up(x)))


class ToyTransformer(Transformer):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.bands = nn.Parameter(torch.ones(3))
        self.patches = nn.Linear(4 * spec.in_channels, spec.dim)
        self.time, self.text = nn.Linear(2, spec.dim), nn.Linear(spec.text_dim, spec.dim)
        self.layers = nn.ModuleList(Layer(spec, index) for index in range(spec.num_layers))
        self.head = nn.Linear(spec.dim, 4 * spec.out_channels)

    @property
    def rope(self) -> Rope:
        bands = self.bands.detach().double().cpu()
        return CentredRope(bands, bands[:2], bands[:1], half_split=True)  # 12 of a head's 16 channels

    def embed_text(self, text: Tensor) -> TextContext:
        rows = F.silu(self.text(text))
        layers = [layer for layer in self.layers if isinstance(layer, Layer)]
        return TextContext(tuple((one.heads(one.cross_k(rows)), one.heads(one.cross_v(rows))) for one in layers), None)

    def forward(
        self, latents: Tensor, timesteps: Tensor, context: TextKeyValues, kv: KeyValues, actions: Tensor | None = None
    ) -> Tensor:
        height, width = latents.shape[-2:]
        x = latents.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).permute(0, 1, 3, 5, 2, 4, 6)  # [B, F, h, w, C, 2, 2]
        x = self.patches(x.flatten(4).flatten(1, 3))
        level = timesteps.to(x.dtype)[..., None] / 1000
        gate = torch.tanh(self.time(torch.cat((level.cos(), level.sin()), dim=-1)))
        for layer in self.layers:
            x = layer(x, gate, context, kv)
        x = self.head(x).unflatten(-1, (-1, 2, 2)).unflatten(1, (-1, height // 2, width // 2))
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


@register_solver
class Euler(Solver):
    name, rules = "toy-euler", SolverRules(step_list=True)

    @classmethod
    def schedule(cls, spec: SamplerSpec, strength: float) -> Schedule:
        return RenoiseSolver.schedule(spec, strength)

    def advance(self, x: Tensor, velocity: Tensor, step: int, draw: Callable[[], Tensor]) -> Tensor:
        after = self.sigmas[step + 1] if step + 1 < len(self.sigmas) else 0.0
        return x + (after - self.sigmas[step]) * velocity


PRESET = Preset(
    name="toy",
    about=About("toy-tiny", "MIT", "nobody/toy"),
    num_frame_per_block=2,
    independent_first_frame=False,
    sampler=SamplerSpec(
        (1000, 750, 500, 250), warp_denoising_step=False, timestep_shift=3.0, context_noise=20.0, solver="toy-euler",
        guidance=Guidance(
            (GuidanceBranch(), GuidanceBranch("negative"), GuidanceBranch("negative", sees_past=False)),
            scales=((0.0, (0.0, 1.0)), (300.0, (2.0, 1.5))),
        ),
    ),
    context=ContextPolicy(
        local_attn_size=6, sink_size=0, positions="absolute", noise2clean_kvrange=(3, 2), clean_chunk_kvrange=1,
        clean_text="null",
    ),
    window_blocks=2,
)  # fmt: skip


class Toy(WanFamily):
    name, presets, demo = "toy", (PRESET,), SPEC.name
    models: Mapping[str, ModelSpec] = {SPEC.name: SPEC}
    formats: Mapping[str, Format] = {}

    def build(self, spec: ModelSpec, precision: str = "reference") -> ToyTransformer:  # type: ignore[override]
        return ToyTransformer(spec)


class DenseFrames:
    """Self-attention of all frames in one call. groups: (frames, frames that they see, their positions)."""

    def __init__(self, rope: Rope, groups: list[tuple[range, range, range]], grid: tuple[int, int]) -> None:
        self.rope, self.groups, self.grid = rope, groups, grid

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = [place for _, _, own in self.groups for place in own]
        angles = token_angles(self.rope.axis_angles(places, *self.grid))
        q, k = (rotate(part, angles, half_split=True) for part in (q, k))
        q, k, v = (part.unflatten(1, (-1, self.grid[0] * self.grid[1])) for part in (q, k, v))
        out = [
            attention(q[:, list(own)].flatten(1, 2), k[:, list(seen)].flatten(1, 2), v[:, list(seen)].flatten(1, 2))
            for own, seen, _ in self.groups
        ]
        return torch.cat(out, dim=1)
