"""Train the shipped weights: the autoencoder, a bank of encoded walks, the transformer.

    python tools/train_tinyworld.py --out runs/tinyworld

Every stage saves checkpoints and resumes from them, and writes its losses and the hash of its weights. The autoencoder
learns to encode land that is seen again as the same latents, moved. The transformer learns to denoise each frame beside
the clean frames before it (teacher forcing), which are blurred by noise, and then by its own predictions.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from safetensors.torch import load_file
from tinyworld_streams import continued
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from inferix.errors import UsageError, one_line_errors, quoted
from inferix.kernels.rope import axis_angles, rope_angles, rotate
from inferix.models.files import read_json, write_json, write_tensors
from inferix.models.tinyworld.data import HELD_OUT, Clips, random_clip
from inferix.models.tinyworld.spec import SPEC, VAE
from inferix.models.tinyworld.words import FILE as WORDS_FILE
from inferix.models.tinyworld.words import WordEncoder, known_words, word_numbers
from inferix.models.tinyworld.world import ACTIONS, FRAMES, Scene
from inferix.models.wan.checkpoint import SHARD
from inferix.models.wan.configs import diffusers_config, diffusers_vae_config
from inferix.models.wan.names import to_format
from inferix.models.wan.transformer import Block, SelfAttention, WanTransformer
from inferix.models.wan.vae import (
    CausalConv3d,
    CausalVae,
    Downsample,
    ShortcutUpBlock,
    Upsample,
    from_patches,
    to_patches,
)
from inferix.runtime.capacity.cpu_features import bfloat16_unit, cpu_flags

Model = TypeVar("Model", bound=nn.Module)
Examples = Iterator[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the training; lengths are in actions."""

    stills_steps: int = 600  # encoder and decoder on single pictures
    stills_batch: int = 24
    stills_rate: float = 2e-3
    vae_steps: int = 1600  # encoder and decoder on batches of short clips: the pictures of one clip are similar
    vae_batch: int = 4
    vae_length: int = 3
    vae_rate: float = 1e-3
    change_share: float = 0.3  # clips in which the scene changes
    land_weight: float = 0.05
    free_channels: int = 4  # of the latents, free of the land loss
    kl_weight: float = 3e-4
    decoder_steps: int = 500  # the decoder with the encoder frozen, on noisy latents
    decoder_batch: int = 3
    decoder_length: int = 4
    decoder_rate: float = 5e-4
    bank_clips: int = 4000
    errand_share: float = 0.3  # of the clips, that lead away and back
    along_share: float = 0.2  # of the clips, that walk against obstacles
    bank_length: int = 24
    bank_firsts: int = 6000  # single first pictures of walks
    window: int = 6  # latent frames a frame attends to, the first of the clip included
    crop: int = 9  # latent frames of a clip in a batch
    batch: int = 3
    copies: int = 2  # noisy copies of each clip, beside a clean one
    firsts: int = 6  # first pictures in a batch
    levels: tuple[float, ...] = (1.0, 0.9, 0.75, 0.5)  # noise levels of the sampler
    steps: int = 3000
    own_steps: int = 3200  # steps of the second stage, with its own predictions as the past in `own_share` of them
    own_share: float = 0.4
    rate: float = 1.5e-3
    own_rate: float = 1.1e-3
    blur: float = 0.3  # largest noise level in the past, which the network takes for clean
    save_every: float = 400.0  # seconds
    sheet_clips: int = 6  # on the sheets of pictures that are drawn whenever training is saved


SHORT = Recipe(
    stills_steps=4, stills_batch=2, vae_steps=8, vae_batch=1, vae_length=1, decoder_steps=4, decoder_batch=1,
    decoder_length=1, bank_clips=4, bank_length=6, bank_firsts=4, window=3, crop=5, batch=2, firsts=2, steps=8,
    own_steps=4, sheet_clips=1,
)  # fmt: skip


def train_vae(folder: Path, recipe: Recipe) -> CausalVae:
    """Train the autoencoder, first on single pictures, then on clips."""
    vae = new_vae()
    stills = partial(training_clips, 0, recipe.stills_batch, 0.0, seed=5)
    vae = train_both(folder, "stills", vae, stills, recipe, recipe.stills_steps, recipe.stills_rate)
    clips = partial(training_clips, recipe.vae_length, recipe.vae_batch, recipe.change_share, seed=1)
    return train_both(folder, "vae", vae, clips, recipe, recipe.vae_steps, recipe.vae_rate)


def train_both(
    folder: Path, name: str, vae: CausalVae, clips: Callable[[], Examples], recipe: Recipe, steps: int, rate: float
) -> CausalVae:
    """Train encoder and decoder with a picture loss, a land loss and a small KL loss."""
    shorten_memory(vae)
    run = Run(folder / name, vae, optimisers(vae, rate), steps, recipe.save_every)
    if run.step < run.steps:
        examples = clips()

        def loss() -> tuple[Tensor, dict[str, float]]:
            pixels, moves, same = next(examples)
            mean, log_var = encode_clips(vae, pixels).chunk(2, dim=1)
            kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
            land = land_error(mean[:, : -recipe.free_channels], moves, same)
            total, psnr = picture_loss(vae, mean + torch.randn_like(mean) * torch.exp(0.5 * log_var), pixels)
            figures = {"psnr": psnr, "kl": float(kl.detach()), "land": float(land.detach())}
            return total + recipe.kl_weight * kl + recipe.land_weight * land, figures

        run.go(loss, lambda: vae_sheet(run.average, recipe.sheet_clips, folder / f"{name}.png"))
    return run.average


def train_decoder(folder: Path, vae: CausalVae, recipe: Recipe) -> CausalVae:
    """Train the decoder on noisy latents, which imitate a transformer's, with the encoder frozen."""
    shorten_memory(vae)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    run = Run(folder / "decoder", vae, optimisers(vae, recipe.decoder_rate), recipe.decoder_steps, recipe.save_every)
    if run.step < run.steps:
        clips = training_clips(recipe.decoder_length, recipe.decoder_batch, recipe.change_share, seed=4)

        def loss() -> tuple[Tensor, dict[str, float]]:
            pixels, _, _ = next(clips)
            with torch.no_grad():
                mean = encode_clips(vae, pixels).chunk(2, dim=1)[0]
            off = 0.1 * torch.rand(len(mean), 1, 1, 1, 1) * mean.std()
            total, psnr = picture_loss(vae, mean + torch.randn_like(mean) * off, pixels)
            return total, {"psnr": psnr}

        run.go(loss, lambda: vae_sheet(run.average, recipe.sheet_clips, folder / "decoder.png"))
    return run.average


def training_clips(length: int, batch: int, change_share: float, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of `Clips`: pixels [batch, 3, 1 + 4 * length, H, W], moves [batch, length, 2], same scene."""
    return iter(DataLoader(Clips(length, seed, change_share), batch_size=batch, num_workers=1))


def land_error(latents: Tensor, moves: Tensor, same: Tensor) -> Tensor:
    """Difference of latents [B, C, F, h, w] to the frame before, moved as the camera; 1 for unrelated latents.

    It makes land that is seen again the same latents, which a transformer can copy. The hero's surroundings and changes
    of scene are left out. moves [B, F - 1, 2] in latent pixels, same [B, F - 1].
    """
    height, width = latents.shape[-2:]
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    away = ((rows - height // 2).abs() > 2) | ((columns - width // 2).abs() > 2)
    wrong, count = latents.new_zeros(latents.shape[1]), 0
    for clip, frame in same.nonzero().tolist():
        dx, dy = moves[clip, frame].tolist()
        now = latents[clip, :, frame + 1, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        before = latents[clip, :, frame, max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
        here = away[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        there = away[max(0, dy) : height - max(0, -dy), max(0, dx) : width - max(0, -dx)]
        part = (now - before)[:, here & there]
        wrong = wrong + part.square().sum(1)
        count += part.shape[1]
    return (wrong / max(1, count) / latents.var((0, 2, 3, 4)) / 2).mean()


def picture_loss(vae: CausalVae, latents: Tensor, pixels: Tensor) -> tuple[Tensor, float]:
    """Charbonnier loss of decoded pictures and of their gradients, and the pictures' PSNR, dB.

    The gradients raise the weight of edges, so that edges are learnt as early as smooth ground.
    """
    wrong = decode_clips(vae, latents) - pixels
    psnr = -10 * math.log10(float(wrong.detach().square().mean()) / 4)
    parts = (wrong, wrong.diff(dim=-1), wrong.diff(dim=-2))
    return sum((torch.sqrt(part.square() + 0.1**2).mean() for part in parts), torch.zeros(())), psnr


def new_vae() -> CausalVae:
    """Initialise an autoencoder so that signals keep their variance and latents have almost no noise.

    Training on single pictures must carry over to clips, and training on short clips to long ones. So convolutions
    over time start with nearly all weight on the newest frame. Those that change the rate, which single pictures skip,
    start as a copy of that frame.
    """
    vae = CausalVae(VAE)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.mul_(1.7)
            if isinstance(module, nn.Conv3d):
                past = module.weight.shape[2] - 1
                module.weight[:, :, :past] *= 0.2
                module.weight[:, :, past:] *= math.sqrt(past + 1)
            if isinstance(module, Downsample | Upsample) and module.time_conv is not None:
                initialise_as_newest(module.time_conv)
        vae.quant_conv.weight[VAE.z_dim :].zero_()
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias[VAE.z_dim :].fill_(-6.0)
    return vae


def initialise_as_newest(conv: nn.Conv3d) -> None:
    """Make each output, or each half of them, a copy of the newest frame."""
    assert conv.bias is not None
    conv.weight.zero_()
    conv.bias.zero_()
    channels = conv.weight.shape[1]
    conv.weight[:, :, -1, 0, 0] = torch.eye(channels).repeat(len(conv.weight) // channels, 1)


@torch.no_grad()
def shorten_memory(vae: CausalVae) -> None:
    """Restrict convolutions at the latents' rate to the newest frame, also during training.

    Their past reaches beyond short clips, which cannot train it.
    """
    encoder, decoder = vae.encoder, vae.decoder
    slow: list[nn.Module] = [encoder.down_blocks[-1], encoder.mid_block, encoder.conv_out]
    slow += [decoder.conv_in, decoder.mid_block, cast(ShortcutUpBlock, decoder.up_blocks[0]).resnets]
    for part in slow:
        for module in part.modules():
            if isinstance(module, CausalConv3d):
                newest = torch.zeros(module.weight.shape[2], 1, 1)
                newest[-1] = 1
                module.weight.mul_(newest)
                module.weight.register_hook(partial(torch.mul, newest))


def encode_clips(vae: CausalVae, pixels: Tensor) -> Tensor:
    """Encode clips [B, 3, T, H, W] in [-1, 1] to means and log variances [B, 2z, F, h, w], not normalised."""
    state = vae.new_state()
    frames = to_patches(pixels.transpose(1, 2).flatten(0, 1), vae.spec.patch)
    x = frames.unflatten(0, (len(pixels), -1)).transpose(1, 2)
    first = vae.encoder(x[:, :, :1], state)
    state.frames = 1
    rest = [vae.encoder(x[:, :, 1:], state)] if x.shape[2] > 1 else []
    moments: Tensor = vae.quant_conv(torch.cat([first, *rest], dim=2)).float()
    mean, log_var = moments.chunk(2, dim=1)
    return torch.cat((mean, log_var.clamp(-20, 10)), dim=1)


def decode_clips(vae: CausalVae, latents: Tensor) -> Tensor:
    """Decode latents [B, z, F, h, w], not normalised, to clips [B, 3, T, H, W]."""
    state = vae.new_state()
    x = vae.post_quant_conv(latents)
    parts = [vae.decoder(x[:, :, :1], state)]
    state.frames = 1
    parts += [vae.decoder(x[:, :, 1:], state)] if x.shape[2] > 1 else []
    pixels = torch.cat(parts, dim=2)
    frames = from_patches(pixels.transpose(1, 2).flatten(0, 1), vae.spec.patch)
    return frames.unflatten(0, (len(latents), -1)).transpose(1, 2).float()


@torch.no_grad()
def vae_sheet(vae: CausalVae, count: int, path: Path) -> str:
    """Save `count` held-out clips above decoded ones; return their PSNR as text."""
    rng = random.Random(7)
    clips = np.stack([random_clip(rng, 15, HELD_OUT).pictures for _ in range(count)])
    pixels = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    decoded = decode_clips(vae, encode_clips(vae, pixels).chunk(2, dim=1)[0]).clamp(-1, 1)
    rows = torch.stack((pixels, decoded), dim=1)[:, :, :, [0, 4, 14, 29, 44, 60]]  # clip, kind, rgb, time
    save_sheet(rows.permute(0, 1, 4, 3, 5, 2).flatten(3, 4).flatten(0, 2), path)
    return f"held out {-10 * math.log10(float((decoded - pixels).square().mean()) / 4):.2f} dB"


@dataclass(frozen=True)
class Bank:
    """Encoded walks: latents [N, F, z, h, w] normalised, actions [N, F], words of both scenes [N, 2, text_len].

    `firsts` [M, 1, z, h, w] and `first_words` [M, text_len] are the beginnings of more walks, which cost little.
    """

    latents: Tensor
    actions: Tensor
    words: Tensor
    change: Tensor  # [N], the first latent frame of the second scene
    firsts: Tensor
    first_words: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_bank(folder: Path, vae: CausalVae, recipe: Recipe) -> Bank:
    """Encode random walks once, or read them from `folder`; the transformer trains on latents only.

    They are normalised as the autoencoder's spec says, or by their own statistics for a new one.
    """
    walks, firsts = folder / "bank.safetensors", folder / "firsts.safetensors"
    if not walks.exists():
        shares = recipe.change_share, recipe.errand_share, recipe.along_share
        encode_walks(walks, vae, recipe.bank_clips, recipe.bank_length, shares, seed=2)
    if not firsts.exists():
        encode_walks(firsts, vae, recipe.bank_firsts, 0, (0.0, 0.0, 0.0), seed=3)
    walk_tensors, first_tensors = load_file(walks), load_file(firsts)
    raw = walk_tensors["latents"].float()
    mean, std = raw.mean((0, 1, 3, 4)), raw.std((0, 1, 3, 4))
    if vae.spec != VAE:
        mean, std = torch.tensor(vae.spec.mean), torch.tensor(vae.spec.std)
    latents, first_latents = (
        (part - mean[:, None, None]) / std[:, None, None] for part in (raw, first_tensors["latents"].float())
    )
    return Bank(
        latents, walk_tensors["actions"], walk_tensors["words"], walk_tensors["change"], first_latents,
        first_tensors["words"][:, 0], tuple(mean.tolist()), tuple(std.tolist()),
    )  # fmt: skip


@torch.no_grad()
def encode_walks(
    file: Path, vae: CausalVae, count: int, length: int, shares: tuple[float, float, float], seed: int
) -> None:
    """Encode `count` walks of `length` actions into one file; shares as in `random_clip`."""
    latents, actions, words, change = [], [], [], []
    for index in range(count):
        clip = random_clip(random.Random(seed * 1_000_000 + index), length, 0, *shares)
        latents.append(encode_pictures(vae, torch.from_numpy(clip.pictures)).half())
        actions.append(torch.tensor([ACTIONS.index(action) for action in ("stay", *clip.actions)]))
        words.append(torch.tensor([scene_words(clip.before), scene_words(clip.after)]))
        change.append(clip.change + 1)
        if index % 100 == 99:
            print(f"{file.stem} {index + 1}/{count}", flush=True)
    write_tensors(
        {"latents": torch.stack(latents), "actions": torch.stack(actions), "words": torch.stack(words),
         "change": torch.tensor(change)}, file,
    )  # fmt: skip


@torch.no_grad()
def encode_pictures(vae: CausalVae, pictures: Tensor) -> Tensor:
    """Encode pictures, uint8 [T, H, W, 3], to latents [F, z, h, w], not normalised."""
    pixels = pictures.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with fast():
        moments = encode_clips(vae, pixels)
    return moments.chunk(2, dim=1)[0][0].transpose(0, 1)


def fast() -> torch.autocast:
    """Compute in bfloat16 where the CPU has instructions for it."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16_unit(cpu_flags()) is not None)


def scene_words(scene: Scene) -> list[int]:
    return word_numbers(known_words(scene.prompt), SPEC.text_len)


@dataclass(frozen=True)
class Batch:
    """Training batch: latents [B, F, C, h, w], actions [B, F, d], words [B, text_len], loss mask [B, F]."""

    latents: Tensor
    actions: Tensor
    words: Tensor
    counts: Tensor


def random_batch(bank: Bank, recipe: Recipe) -> Batch:
    """Random crops of walks. A crop with a change of scene has the new prompt, and only that scene's frames count.

    There are three kinds: from a walk's beginning, from its middle, and from its middle after its first frame as the
    sink. A first frame counts only at a walk's beginning, where it is a single picture. After a distant sink, frames
    count from the first with a full window, as in a stream.
    """
    size, last = recipe.batch, bank.latents.shape[1] - recipe.crop
    clips, kinds = torch.randint(len(bank.latents), (size,)), torch.rand(size)
    middle, jump = kinds > 0.4, kinds > 0.7
    starts = torch.randint(1, last + 1, (size,)) * middle
    frames = starts[:, None] + torch.arange(recipe.crop)
    shown = torch.where(jump[:, None] & (torch.arange(recipe.crop) == 0), 0, frames)
    latents, actions = bank.latents[clips[:, None], shown], bank.actions[clips[:, None], frames]
    actions[:, 0] = ACTIONS.index("stay")
    changed = starts + recipe.crop > bank.change[clips]
    words = vague(bank.words[clips, changed.long()])
    counts = ~changed[:, None] | (frames >= bank.change[clips][:, None])
    counts[:, 0] &= ~middle
    counts[:, : recipe.window] &= ~jump[:, None]
    return Batch(latents, F.one_hot(actions, len(ACTIONS)).float(), words, counts)


def random_firsts(bank: Bank, count: int) -> Batch:
    """Random first frames of walks, [count, 1, ...]."""
    chosen = torch.randint(len(bank.firsts), (count,))
    actions = F.one_hot(torch.full((count, 1), ACTIONS.index("stay")), len(ACTIONS)).float()
    counts = torch.ones(count, 1, dtype=torch.bool)
    return Batch(bank.firsts[chosen], actions, vague(bank.first_words[chosen]), counts)


def vague(words: Tensor) -> Tensor:
    """Drop 3 % of the words, as a prompt may omit some."""
    return torch.where(torch.rand(words.shape) < 0.03, -1, words)


class ClipAttention:
    """Self-attention of training: clean frames, then noisy copies, each over the clean frames before it.

    A frame attends to itself, the clean frames of its window and the clip's first frame, placed just before the window.
    This equals a cache of `window` frames with one sink frame, for all frames at once.
    """

    def __init__(self, frames: int, copies: int, window: int, grid: tuple[int, int], head_dim: int) -> None:
        self.frames, self.window, self.tokens = frames, window, grid[0] * grid[1]
        self.angles = rope_angles(list(range(frames)) * (1 + copies), *grid, head_dim)
        self.sinks = rope_angles([max(0, frame - window + 1) for frame in range(frames)], *grid, head_dim)
        past = torch.tensor([[frame + slot >= 1 for slot in (0, *range(2 - window, 0))] for frame in range(frames)])
        itself = torch.eye(1 + copies, dtype=torch.bool)
        seen = torch.cat(
            (past[:, None].expand(-1, 1 + copies, -1), itself.expand(frames, -1, -1)), dim=2
        )  # frame, copy, slot
        self.mask = seen.repeat_interleave(self.tokens, 1).repeat_interleave(self.tokens, 2)[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.promote_types(v.dtype, torch.float32)
        q, rotated = (rotate(part, self.angles, wide) for part in (q, k))
        first = rotate(k[:, : self.tokens].repeat(1, self.frames, 1, 1), self.sinks, wide)
        keys = self._slots(rotated, first.unflatten(1, (-1, self.tokens)))
        values = self._slots(v, v[:, None, : self.tokens].expand(-1, self.frames, -1, -1, -1))
        queries = self._copies(q).transpose(1, 2)  # a frame's copies together
        queries, keys, values = (part.flatten(2, 3).flatten(0, 1).transpose(1, 2) for part in (queries, keys, values))
        # Two matrix products in bfloat16 autocast are twice as fast here as one fused attention.
        scores = queries @ keys.transpose(2, 3) * q.shape[-1] ** -0.5
        unseen = scores.new_zeros(self.mask.shape).masked_fill(~self.mask, -math.inf)
        out = (scores + unseen.repeat(len(q), 1, 1, 1)).softmax(-1).to(values.dtype) @ values
        out = out.transpose(1, 2).unflatten(0, (len(q), -1)).unflatten(2, (-1, self.tokens))
        return out.transpose(1, 2).flatten(1, 3)

    def _slots(self, tensor: Tensor, sinks: Tensor) -> Tensor:
        """Keys or values of each frame, [B, F, window - 1 + copies, P, n, c]: first frame, past, own."""
        own = self._copies(tensor)
        clean = own[:, 0]
        padded = torch.cat((torch.zeros_like(clean[:, :1]).expand(-1, self.window - 2, -1, -1, -1), clean), dim=1)
        past = [padded[:, slot : slot + self.frames] for slot in range(self.window - 2)]
        return torch.cat((torch.stack((sinks, *past), dim=2), own.transpose(1, 2)), dim=2)

    def _copies(self, tensor: Tensor) -> Tensor:
        """Reshape [B, copies*F*P, n, c] to [B, copies, F, P, n, c], the clean copy first."""
        return tensor.unflatten(1, (-1, self.frames, self.tokens))


# Initial attention offsets of a layer's four heads: frames, rows and columns from each token.
NEAR = (((-1, -1, 0), (-1, 1, 0), (-1, 0, -1), (-1, 0, 1)), ((-1, 0, 0), (-2, 0, 0), (0, 0, 0), (0, 0, 0)))


@torch.no_grad()
def set_attention_offsets(attention: SelfAttention, offsets: Sequence[tuple[int, int, int]]) -> None:
    """Set biases with which each head initially attends near one offset from a token.

    Land moves by one latent pixel from frame to frame. Attention learns that without biases too, but in thousands of
    steps.
    """
    size = attention.head_dim
    for projection in (attention.q, attention.k):
        projection.weight.mul_(0.5)
    for head, (frame, row, column) in enumerate(offsets):
        rows = slice(head * size, (head + 1) * size)
        axes = (
            axis_angles([frame], 1, 1, size)[0][0],
            *(offset * axis_angles([0], 2, 2, size)[axis][1] for axis, offset in ((1, row), (2, column))),
        )
        key = torch.cat([torch.tensor([1.0, 1.0] + [0.0] * (len(part) - 2)) for part in axes])
        angles = torch.cat(axes)
        strength = 2.3  # three quarters of a query's square
        attention.k.bias[rows] = strength * torch.stack((key, 0 * key), dim=-1).flatten()
        attention.q.bias[rows] = strength * torch.stack((key * angles.cos(), key * angles.sin()), dim=-1).flatten()


class TinyWorld(nn.Module):
    """The transformer and its word encoder, trained together."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.transformer, self.words = WanTransformer(SPEC), WordEncoder(SPEC.text_dim, SPEC.text_len)
        for name, weight in self.named_parameters():
            if name.endswith("modulation"):
                nn.init.normal_(weight, std=0.02)
            if "self_attn.norm" in name:  # sharp enough to copy from one token, as land does at every step
                nn.init.constant_(weight, 2.0)
        for index, block in enumerate(self.transformer.blocks):
            set_attention_offsets(cast(Block, block).self_attn, NEAR[index % len(NEAR)])
        nn.init.zeros_(self.transformer.head.linear.weight)
        nn.init.zeros_(self.transformer.time_embedding.projection.weight)
        nn.init.normal_(self.words.rows.weight)

    def forward(self, clean: Tensor, noisy: Tensor, sigmas: Tensor, actions: Tensor, words: Tensor) -> Tensor:
        """Velocities [B, N*F, C, h, w] of noisy frames, each beside the clean frames before it.

        clean [B, F, C, h, w]; noisy, N copies one after the other, and their noise levels [B, N*F].
        """
        frames = clean.shape[1]
        copies = noisy.shape[1] // frames
        grid = clean.shape[3] // SPEC.patch[0], clean.shape[4] // SPEC.patch[1]
        attention = ClipAttention(frames, copies, self.window, grid, SPEC.head_dim)
        timesteps = torch.cat((torch.zeros_like(sigmas[:, :frames]), sigmas * 1000), dim=1)
        context = self.transformer.embed_text(self.words(words))
        actions = actions.repeat(1, 1 + copies, 1)
        out = self.transformer(torch.cat((clean, noisy), dim=1), timesteps, context, attention, actions)
        return out[:, frames:].to(clean.dtype)


def train_transformer(folder: Path, bank: Bank, vae: CausalVae, recipe: Recipe) -> TinyWorld:
    """Train with true pasts, blurred by noise, then also with pasts that the network predicted."""
    world = TinyWorld(recipe.window)
    world = train_stage(folder, "world", world, bank, vae, recipe, recipe.steps, recipe.rate)
    return train_stage(folder, "own", world, bank, vae, recipe, recipe.own_steps, recipe.own_rate)


def train_stage(
    folder: Path, name: str, world: TinyWorld, bank: Bank, vae: CausalVae, recipe: Recipe, steps: int, rate: float
) -> TinyWorld:
    run = Run(folder / name, world, optimisers(world, rate), steps, recipe.save_every)
    if run.step < run.steps:
        run.go(
            lambda: world_loss(
                world, random_batch(bank, recipe), random_firsts(bank, recipe.firsts), recipe,
                own=name == "own" and random.random() < recipe.own_share,
            ),
            lambda: world_sheet(run.average, vae, bank, recipe, folder / f"{name}.png"),
        )
    return run.average


def world_loss(
    world: TinyWorld, batch: Batch, firsts: Batch, recipe: Recipe, own: bool
) -> tuple[Tensor, dict[str, float]]:
    """Velocity loss of noisy frames beside a blurred past, and figures to print."""
    past = own_past(world, batch, recipe.levels[1:]) if own else batch.latents
    errors, sigmas = velocity_error(world, batch, past, recipe.levels, recipe.copies, recipe.blur)
    first_errors, first_sigmas = velocity_error(world, firsts, firsts.latents, recipe.levels, 1, recipe.blur)
    error, first = errors.mean((2, 3)), first_errors.mean((2, 3))
    counts = batch.counts.repeat(1, recipe.copies)
    counted = torch.cat((error[counts], first.flatten()))
    far, first_far = (sigmas == 1) & counts, first_sigmas == 1
    far[:, :: recipe.crop] = False
    figures = {"next": error[far], "first": first[first_far]}
    return counted.mean(), {name: float(part.detach().mean()) for name, part in figures.items() if len(part)}


def velocity_error(
    world: TinyWorld, batch: Batch, past: Tensor, levels: tuple[float, ...], copies: int, blur: float
) -> tuple[Tensor, Tensor]:
    """Squared velocity error by place [B, copies*F, h, w], and the random noise levels of the frames.

    blur: largest noise level in the past, in half of its frames.
    """
    blurred = torch.rand(batch.counts.shape) * blur * (torch.rand(batch.counts.shape) < 0.5)
    true = batch.latents.repeat(1, copies, 1, 1, 1)
    sigmas = torch.tensor(levels)[torch.randint(len(levels), true.shape[:2])]
    noise = torch.randn_like(true)
    noisy = torch.lerp(true, noise, per_frame(sigmas))
    velocity = world(mixed(past, blurred), noisy, sigmas, batch.actions, batch.words)
    return (velocity - (noise - true)).square().mean(2), sigmas


@torch.no_grad()
def own_past(world: TinyWorld, batch: Batch, levels: tuple[float, ...]) -> Tensor:
    """Frames that the network predicts from noisy ones, a few times in a row, as the past to train with.

    The noisy input determines what the past does not, so that the true frames remain the target.
    """
    past = batch.latents
    for _ in range(random.randint(1, 3)):
        sigmas = torch.tensor(levels)[torch.randint(len(levels), batch.counts.shape)]
        noisy = mixed(batch.latents, sigmas)
        drawn = noisy - per_frame(sigmas) * world(past, noisy, sigmas, batch.actions, batch.words)
        past = torch.where(per_frame(torch.rand(sigmas.shape) < 0.2), batch.latents, drawn)
    return past


def mixed(latents: Tensor, sigmas: Tensor) -> Tensor:
    """Add noise of level sigmas [B, F] to latents [B, F, C, h, w]."""
    return torch.lerp(latents, torch.randn_like(latents), per_frame(sigmas))


def per_frame(values: Tensor) -> Tensor:
    return values[:, :, None, None, None]


@torch.no_grad()
def world_sheet(world: TinyWorld, vae: CausalVae, bank: Bank, recipe: Recipe, path: Path) -> str:
    """Save true walks above the network's continuations of their first frames; return the PSNR by frame as text."""
    frames, clips = recipe.crop, slice(0, min(4, recipe.sheet_clips))
    words, actions = bank.words[clips, 0], F.one_hot(bank.actions[clips, :frames], len(ACTIONS)).float()
    true = bank.latents[clips, :frames]
    drawn = torch.cat((true[:, :1], continued(world, true[:, :1], actions[:, :1], actions[:, 1:], words)), dim=1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (bank.mean, bank.std))
    decoded = [decode_clips(vae, (part * std + mean).transpose(1, 2)).clamp(-1, 1) for part in (true, drawn)]
    rows = torch.stack(decoded, dim=1)[:, :, :, ::FRAMES]
    save_sheet(rows.permute(0, 1, 4, 3, 5, 2).flatten(3, 4).flatten(0, 2), path)
    error = (decoded[0] - decoded[1]).square().mean((0, 1, 3, 4))[1:].unflatten(0, (-1, FRAMES)).mean(1) / 4
    return "rollout dB " + " ".join(f"{-10 * math.log10(float(value)):.1f}" for value in error)


def export(folder: Path, vae: CausalVae, world: TinyWorld, bank: Bank) -> None:
    """Write the shipped files in half precision, in the layout of a diffusers checkpoint."""
    spec = replace(vae.spec, mean=bank.mean, std=bank.std)
    named = {to_format("diffusers", name): tensor for name, tensor in world.transformer.state_dict().items()}
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
    write_json(folder / "transformer" / "config.json", diffusers_config(SPEC))
    write_json(folder / "vae" / "config.json", diffusers_vae_config(spec))
    for file, state in (
        (folder / "transformer" / SHARD, named),
        (folder / "vae" / SHARD, vae.state_dict()),
        (folder / WORDS_FILE, world.words.state_dict()),
    ):
        write_tensors({name: tensor.half().contiguous() for name, tensor in state.items()}, file, {"format": "pt"})
    print(f"wrote {folder}, {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB")


def save_sheet(rows: Tensor, path: Path) -> None:
    """Save pixels in [-1, 1], [H, W, 3], as a picture of twice the size."""
    picture = ((rows.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(picture).resize((picture.shape[1] * 2, picture.shape[0] * 2), Image.Resampling.NEAREST).save(path)


class MatrixMuon(torch.optim.Muon):
    """Muon that treats a convolution's weight as the matrix [out, everything else]."""

    def __init__(self, weights: list[nn.Parameter], rate: float) -> None:
        self.weights = weights
        self.views = [nn.Parameter(weight.data.view(len(weight), -1)) for weight in weights]
        super().__init__(self.views, rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for view, weight in zip(self.views, self.weights, strict=True):
            assert view.data_ptr() == weight.data_ptr()
            view.grad = None if weight.grad is None else weight.grad.reshape_as(view)
            weight.grad = None
        return super().step(closure)


def optimisers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels inside the network, AdamW for all other weights."""
    inner = (".blocks.", "encoder.", "decoder.")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    matrices = [
        weight
        for name, weight in weights.items()
        if any(part in name for part in inner) and weight.ndim > 1 and "modulation" not in name and "norm" not in name
    ]
    matrix_ids = {id(weight) for weight in matrices}
    others = [weight for weight in weights.values() if id(weight) not in matrix_ids]
    return [MatrixMuon(matrices, rate), torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.0)]


def moving_average(average: Tensor, weight: Tensor, count: Tensor | int) -> Tensor:
    """Exponential moving average over a few hundred steps, fewer at the start."""
    return average.lerp(weight, 1 - min(0.997, (1 + int(count)) / (10 + int(count))))


REPORT = 20  # steps from one report of the losses to the next
WARM_UP = 60  # most steps in which the learning rates rise


class Run(Generic[Model]):
    """Resumable training loop: model, its moving average, optimisers, step and losses in one file.

    Each step has random numbers of its own, so a run that was stopped goes on as if it had not been.
    """

    def __init__(
        self, folder: Path, model: Model, optimisers: list[torch.optim.Optimizer], steps: int, save_every: float
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.model, self.optimisers = folder / "run.pt", model, optimisers
        self.steps, self.save_every = steps, save_every
        self.averaged = AveragedModel(model, avg_fn=moving_average)
        self.step = 0
        self.losses: list[dict[str, float]] = []
        self.sums: dict[str, list[float]] = {}  # figures since the last report
        self.rates = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
        if self.file.exists():
            saved = torch.load(self.file, weights_only=True)
            model.load_state_dict(saved["model"])
            self.averaged.load_state_dict(saved["average"])
            for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(state)
            self.step, self.losses, self.sums = saved["step"], saved["losses"], saved["sums"]

    @property
    def average(self) -> Model:
        return cast(Model, self.averaged.module)

    def go(self, loss: Callable[[], tuple[Tensor, dict[str, float]]], sheet: Callable[[], str]) -> None:
        """Train to the last step. loss: returns the loss of a batch and figures to print. sheet: saves samples."""
        saved = printed = time.monotonic()
        while self.step < self.steps:
            self.set_rates()
            seed = zlib.crc32(f"{self.file.parent.name} {self.step}".encode())
            torch.manual_seed(seed)
            random.seed(seed)
            with fast():
                total, figures = loss()
            total.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            self.averaged.update_parameters(self.model)
            self.step += 1
            for name, value in (figures | {"loss": float(total.detach())}).items():
                self.sums.setdefault(name, []).append(value)
            now = time.monotonic()
            if self.step % REPORT == 0 or self.step == self.steps:
                self.report((now - printed) / len(self.sums["loss"]))
                printed = now
            if now - saved > self.save_every or self.step == self.steps:
                self.save()
                print(f"saved; {sheet()}", flush=True)
                saved = time.monotonic()

    def report(self, pace: float) -> None:
        """Print and store the means of the figures since the last report. pace: seconds a step."""
        means = {name: sum(values) / len(values) for name, values in self.sums.items()}
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"{self.file.parent.name} {self.step}/{self.steps}  {pace:.2f} s/step  {text}", flush=True)
        self.losses.append({"step": self.step, **{name: round(value, 5) for name, value in means.items()}})
        self.sums = {}

    def set_rates(self) -> None:
        """Set the learning rates: linear warm-up, then cosine decay."""
        up = min(1.0, (self.step + 1) / min(WARM_UP, 1 + self.steps // 10))
        factor = up * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))
        for optimiser, rates in zip(self.optimisers, self.rates, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * factor

    def save(self) -> None:
        part = self.file.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(),
                "average": self.averaged.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "step": self.step,
                "losses": self.losses,
                "sums": self.sums,
            },
            part,
        )
        part.replace(self.file)
        write_json(
            self.file.with_name("losses.json"),
            {"steps": self.step, "of": self.steps, "sha256": weights_hash(self.average), "losses": self.losses},
        )


def weights_hash(model: nn.Module) -> str:
    """Hash of all weights of a model, in the order of its state."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def keep_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe of a run; UsageError for a folder with a run of another one."""
    values, file = json.loads(json.dumps(asdict(recipe))), folder / "recipe.json"
    saved = read_json(file)
    if saved is not None and saved != values:
        other = next(key for key in {**values, **saved} if values.get(key) != saved.get(key))
        raise UsageError(
            f"--out {quoted(str(folder))} has a run with {other} {quoted(saved.get(other))}; expected "
            f"{quoted(values.get(other))}: choose another folder"
        )
    write_json(file, values)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run; a stopped run is resumed.")],
    short: Annotated[bool, typer.Option(help="A few steps of each stage, to test all of it.")] = False,
) -> None:
    """Train the small world from scratch, and write the shipped files."""
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    recipe = SHORT if short else Recipe()
    keep_recipe(out, recipe)
    vae = train_vae(out, recipe)
    bank = load_bank(out, vae, recipe)
    world = train_transformer(out, bank, vae, recipe)
    vae = train_decoder(out, vae, recipe)
    export(out / "weights", vae, world, bank)


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
