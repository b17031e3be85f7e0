"""Independent forms that fast or incremental code is compared with, and random weights that make outputs differ."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import torch
import train_tinyworld as train
from torch import Tensor, nn

from inferix.graphs.passes import Pass
from inferix.kernels.attention import attention
from inferix.kernels.rope import Angles, rope_angles, rotate
from inferix.models.registry import MODELS, family_of, make_preset
from inferix.models.spec import ModelSpec
from inferix.models.tinyworld.family import TINYWORLD
from inferix.models.wan.family import WAN
from inferix.models.wan.random import random_vae_state
from inferix.models.wan.transformer import WanTransformer
from inferix.models.wan.vae import CausalVae
from inferix.models.wan.vae_cpu import use_cpu_layers
from inferix.models.wan.vae_spec import TINY_VAE, VaeSpec
from inferix.runtime.config import EngineConfig
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import Executor
from inferix.runtime.execution.loading import Components
from inferix.runtime.kv.contiguous_cache import ContiguousCache
from inferix.runtime.kv.page_store import PagedStore
from inferix.runtime.limits import Limits
from inferix.runtime.plans import PassLayout
from inferix.runtime.sessions.output_queue import Block
from inferix.schemes.camera import look_up, turn_right

WAN_PRESETS = [  # those that it runs, for models without condition channels
    preset.name for family in (WAN, TINYWORLD) for preset in family.presets if preset.context.image != "channels"
]
LIKE_ANOTHER = {  # presets that another one exercises; tests that take long leave them out
    "causal-forcing-framewise", "causal-forcing-1step", "sgf", "sgf-framewise", "sgf-plus-framewise"
}
KINDS = [name for name in WAN_PRESETS if name not in LIKE_ANOTHER]
TINY = dataclasses.replace(
    MODELS["wan-tiny"], name="test", dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=16, text_len=12
)

SMALL_VAE = dataclasses.replace(TINY_VAE, base_channels=4, decoder_channels=4)


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Fill every parameter with seeded normals around 1 for norm weights and 0 for the rest."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module


def tiny_transformer(
    spec: ModelSpec = TINY, dtype: torch.dtype = torch.float64, seed: int = 0, **kwargs: str
) -> WanTransformer:
    model = WanTransformer(spec, **kwargs)
    randomise(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


class DenseAttention:
    """All frames in one call under a mask: no cache, no state."""

    def __init__(self, angles: Angles, mask: Tensor | None = None, rope: torch.dtype = torch.float64) -> None:
        self.angles, self.mask, self.rope = angles, mask, rope

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (rotate(part, self.angles, self.rope) for part in (q, k))
        return attention(q, k, v, self.mask)


class FrameAttention:
    """Each frame of one call attends to its own list of frames at its own list of positions; no cache, no groups."""

    def __init__(self, rows: list[tuple[tuple[int, ...], tuple[int, ...]]], grid: tuple[int, int]) -> None:
        self.rows, self.grid = rows, grid
        self.tokens = grid[0] * grid[1]
        self.seen: list[tuple[Tensor, Tensor]] = []  # keys (not rotated) and values, per layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append((k, v))
        q, k, v = (part.unflatten(1, (-1, self.tokens)) for part in (q, k, v))
        out = []
        for frame, (context, positions) in enumerate(self.rows):
            here = positions[context.index(frame)]
            angles, all_angles = (rope_angles(p, *self.grid, q.shape[-1]) for p in ([here], positions))
            keys, values = k[:, list(context)].flatten(1, 2), v[:, list(context)].flatten(1, 2)
            out.append(attention(rotate(q[:, frame], angles), rotate(keys, all_angles), values))
        return torch.cat(out, dim=1)


def frame_mask(contexts: list[tuple[int, ...]], tokens: int) -> Tensor:
    """Bool [F*tokens, F*tokens]: row frame f sees the frames in contexts[f]."""
    frames = len(contexts)
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for row, seen in enumerate(contexts):
        mask[row, list(seen)] = True
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@cache
def tiny_vae(spec: VaeSpec, dtype: torch.dtype) -> CausalVae:
    """A random VAE as engines have it, one for all tests of a process: nothing changes its weights."""
    vae = CausalVae(spec).eval().requires_grad_(False)
    vae.load_state_dict(random_vae_state(spec, 1, torch.float32))
    return use_cpu_layers(vae.to(dtype))


SIZE = (32, 32)  # pixels; 4 x 4 latents, 2 x 2 tokens a frame
TOKENS = 4
ROWS = torch.randn(3, TINY.text_dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def make_engine(
    preset: str = "self-forcing",
    dtype: str = "float64",
    spec: ModelSpec = TINY,
    vae_spec: VaeSpec = SMALL_VAE,
    limits: Limits = Limits(),  # noqa: B008
    **overrides: object,
) -> Engine:
    """A preset on the small test model, on the CPU; fields of `EngineConfig` may be among the overrides.

    `self-forcing`, which most tests use, has two of its four denoising steps where none are given.
    """
    if preset == "self-forcing":
        overrides.setdefault("denoising_step_list", (1000, 500))
    lowp = ("lowp", "lowp_layers", "lowp_keep", "camera_layers", "kernels")
    ours = ("kv_memory", "kv_dtype", "kv_offload", "executor", "fast_vae", "graphs", "batches", "drift_meter", *lowp)
    settings = {key: overrides.pop(key) for key in ours if key in overrides}
    config = EngineConfig.of("test", preset, device="cpu", dtype=dtype, **settings)
    kind = getattr(torch, dtype)
    fast = family_of(spec).random_decoder(spec, True, kind, "cpu") if config.fast_vae else None
    vae = tiny_vae(vae_spec, kind)
    scheme = make_preset(preset, **overrides)
    first, *more = (tiny_transformer(spec, kind, 7 * number) for number in range(len(scheme.weight_sets)))
    parts = Components(first, vae, None, "test", "random", lambda: None, fast, more=tuple(more))
    return Engine(config, scheme, parts, limits)


def remade(engine: Engine, executor: Executor | None = None, **parts: object) -> Engine:
    """A new engine with the same settings and weights, but another executor or other parts."""
    components = dataclasses.replace(engine.parts, **parts)
    return Engine(engine.config, engine.preset, components, engine.manager.limits, executor)


def contiguous(engine: Engine, moving: bool = False, kind: type[ContiguousCache] = ContiguousCache) -> Engine:
    """The same engine over the plain cache; `moving` rotates keys when they are read, whatever the policy."""
    worker = engine.resources.worker

    class Bound(kind):
        """Gives the worker its attention in place of a layout."""

        def layout(self, run: Pass) -> PassLayout:
            bound = self.bind(run)
            worker.attention = lambda plan: bound
            return PassLayout(self.grid, (), 0, False)

    def new_cache(size: tuple[int, int], number: int = 0) -> ContiguousCache:
        form, precision = engine.kv_manager.form(size), engine.parts.transformer.precision
        moves = moving or engine.preset.context.moving_positions
        rope = engine.parts.transformer.rope
        return Bound(engine.spec, form.grid, moves, precision.rope, engine.dtype, engine.device, rope)

    engine.kv_manager.new_cache = new_cache
    return engine


def page_tensors(engine: Engine) -> PagedStore:
    """The worker's page tensors for pictures of `SIZE`."""
    return engine.resources.worker.stores[engine.kv_manager.form(SIZE).grid]


def run(engine: Engine, blocks: int, **kwargs: object) -> list[Block]:
    with engine.open(prompt_embeds=ROWS.to(engine.dtype), size=SIZE, **kwargs) as session:
        return list(session.stream(blocks, decode=False))


def pose(rotation: np.ndarray | None = None, translation: tuple[float, ...] | np.ndarray = (0, 0, 0)) -> np.ndarray:
    """A pose [4, 4]."""
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3) if rotation is None else rotation
    matrix[:3, 3] = translation
    return matrix


def walk(count: int, step: float = 0.1) -> np.ndarray:
    """A path of `count` poses that turns and moves."""
    generator, poses = np.random.default_rng(0), [np.eye(4)]
    for yaw, pitch, *translation in generator.normal(size=(count - 1, 5)):
        poses.append(poses[-1] @ pose(turn_right(5 * yaw) @ look_up(3 * pitch), step * np.array(translation)))
    return np.array(poses)


def write_untrained_world(folder: Path) -> Path:
    """The small world as it is before training, written as the trained one is."""
    torch.manual_seed(0)
    empty = torch.zeros(0)
    bank = train.Bank(empty, empty, empty, empty, empty, empty, (0.0,) * train.VAE.z_dim, (1.0,) * train.VAE.z_dim)
    train.export(folder, train.new_vae(), train.TinyWorld(train.Recipe().window), bank)
    return folder
