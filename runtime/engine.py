"""The engine: a loaded model, the sessions opened on it, and the block loop.

`Engine.step` is the loop's body: plan, denoise, commit, decode. Policy is in `presets`, `context` and
`session`; tensors are in the cache and the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InferixError, UsageError
from ..graphs.passes import Pass
from ..models.text.umt5 import load_prompt_embeds
from ..models.wan.spec import MODELS
from .cache import ContiguousCache
from .config import DTYPES, EngineConfig, default_device, default_dtype
from .loading import Components, load_components, random_components
from .media import read_image, read_video
from .noise import Noise, PhiloxNoise
from .presets import Preset, make_preset
from .sampler import Sampler
from .session import Block, BlockPlan, Session

Pixels = NDArray[np.uint8]


class Engine:
    """A model ready to run: weights, schedule and policy. Made by `load`."""

    def __init__(self, config: EngineConfig, scheme: Preset, parts: Components) -> None:
        self.config, self.preset, self.parts = config, scheme, parts
        self.spec = parts.transformer.spec
        self.sampler = Sampler(scheme.sampler)
        self.device = torch.device(config.device)
        self.dtype = DTYPES[config.dtype]

    @property
    def fps(self) -> int:
        """Pixel frames per second of the model's video."""
        return self.spec.fps

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.spec.default_size

    @torch.no_grad()
    def step(self, session: Session, decode: bool = True) -> Block:
        """Run a session's next block to the end."""
        session.check_open()
        timings: dict[str, float] = {}
        plan = session.plan_block()
        with self._timed("denoise", timings):
            session.cache.begin_block(plan.visible)
            latents = self.denoise(session, plan)
        with self._timed("commit", timings):
            self.commit(session, plan, latents)
        frames = None
        if decode:
            with self._timed("decode", timings):
                frames = self.decode(session, latents)
        session.next_block, session.next_frame = plan.index + 1, plan.frames.stop
        return Block(plan.index, latents, frames, timings)

    def denoise(self, session: Session, plan: BlockPlan) -> Tensor:
        """The few steps from noise to clean latents [F, C, H, W]."""
        x = self.draw(session, plan, 0)
        for step, timestep in enumerate(self.sampler.timesteps):
            if step > 0:
                x = self.sampler.renoise(x, self.draw(session, plan, step), step)
            x = self.sampler.clean(x, self.run(session, plan.run_at(timestep), x), step)
        if not torch.isfinite(x).all():
            raise InferixError(f"block {plan.index} is not finite; try dtype float32 or another checkpoint")
        return x

    def commit(self, session: Session, plan: BlockPlan, latents: Tensor) -> None:
        """One pass over the clean latents, for the keys and values it leaves in the cache."""
        self.run(session, plan.run_at(self.sampler.spec.context_noise), latents)

    def run(self, session: Session, run: Pass, latents: Tensor) -> Tensor:
        """One pass of the network over latents [F, C, H, W]; returns the velocity."""
        timesteps = torch.tensor([run.timesteps], dtype=torch.float32, device=self.device)
        return self.parts.transformer(latents[None], timesteps, session.text, session.cache.bind(run))[0]

    def draw(self, session: Session, plan: BlockPlan, draw: int) -> Tensor:
        shape = (self.spec.out_channels, *self.spec.latent_size(session.size))
        return session.noise.draw(plan.index, plan.frames, draw, shape).to(self.device, self.dtype)

    def decode(self, session: Session, latents: Tensor) -> Pixels:
        """Latents to uint8 frames on the host, going on from the block before."""
        pixels = self.parts.vae.decode(latents, session.decoder)
        scaled = ((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8)
        return scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    @torch.no_grad()
    def open(
        self,
        prompt: str | None = None,
        prompt_embeds: Tensor | str | Path | None = None,
        seed: int = 0,
        image: Pixels | str | Path | None = None,
        video: Pixels | str | Path | None = None,
        noise: Noise | None = None,
        size: tuple[int, int] | None = None,
    ) -> Session:
        """Begin a stream of pictures of `size` (width, height).

        prompt or prompt_embeds ([L, text_dim] or a safetensors file) says what to show; image or video
        (uint8 [H, W, 3], [T, H, W, 3], or a file) is what the stream goes on from. `noise` replaces the
        noise that `seed` gives. Raises UsageError for input that cannot be used.
        """
        size = size or self.default_size
        height, width = self.spec.latent_size(size)
        grid = (height // self.spec.patch[0], width // self.spec.patch[1])
        precision = self.parts.transformer.precision
        session = Session(
            engine=self,
            preset=self.preset,
            size=size,
            noise=noise if noise is not None else PhiloxNoise(seed),
            text=self.parts.transformer.embed_text(self.prompt_rows(prompt, prompt_embeds)[None]),
            cache=ContiguousCache(
                self.spec, self.preset.context, grid, precision.rope, self.dtype, self.device
            ),
            decoder=self.parts.vae.new_state(),
        )
        if image is not None or video is not None:
            self.cache_prefix(session, self.prefix_latents(image, video, size))
        return session

    def prompt_rows(self, prompt: str | None, embeds: Tensor | str | Path | None) -> Tensor:
        """The text encoder's rows [text_len, text_dim] of a prompt, or those given."""
        if embeds is not None and prompt is None:
            rows = load_prompt_embeds(embeds, self.spec.text_len, self.spec.text_dim)
            return rows.to(self.device, self.dtype)
        if embeds is not None or prompt is None:
            raise UsageError("give a prompt (--prompt) or prompt_embeds (--prompt-embeds), and not both")
        if self.parts.text is None:
            raise UsageError(
                f"{self.parts.source} has no text encoder; give base= (--base), a folder that has one, "
                "or prompt_embeds (--prompt-embeds)"
            )
        return self.parts.text().encode(prompt).to(self.device, self.dtype)

    def prefix_latents(self, image: Any, video: Any, size: tuple[int, int]) -> Tensor:
        """What the stream goes on from, as latents of whole blocks, the end of a video kept."""
        if image is not None and video is not None:
            raise UsageError("image and video both begin the stream; give one of them")
        if image is not None:
            pixels = (read_image(image, size) if isinstance(image, str | Path) else image)[None]
        else:
            pixels = read_video(video, size) if isinstance(video, str | Path) else video
        if pixels.ndim != 4 or pixels.shape[1:] != (size[1], size[0], 3) or pixels.dtype != np.uint8:
            raise UsageError(
                f"image or video is {pixels.dtype} {list(pixels.shape)}; expected uint8 frames of "
                f"{[size[1], size[0], 3]}"
            )
        frames = (len(pixels) - 1) // self.spec.vae_stride[0] + 1
        first, step = self.preset.block_size(0), self.preset.num_frame_per_block
        if frames < first:
            need = (first - 1) * self.spec.vae_stride[0] + 1
            raise UsageError(
                f"{len(pixels)} frames are too few to begin with: the first block of {self.preset.name} needs "
                f"{need}; set independent_first_frame=true or use a preset with blocks of one frame"
            )
        kept = first + (frames - first) // step * step
        pixels = pixels[len(pixels) - (kept - 1) * self.spec.vae_stride[0] - 1 :]
        scaled = torch.from_numpy(pixels.copy()).to(self.device, self.dtype).permute(0, 3, 1, 2) / 127.5 - 1
        return self.parts.vae.encode(scaled, self.parts.vae.new_state())

    def cache_prefix(self, session: Session, latents: Tensor) -> None:
        """Commit given latents block by block, and let the decoder see them, so that both go on from there."""
        frames = []
        while session.next_frame < len(latents):
            plan = session.plan_block()
            session.cache.begin_block(plan.visible)
            part = latents[plan.frames.start : plan.frames.stop]
            self.commit(session, plan, part)
            frames.append(self.decode(session, part))
            session.next_frame = plan.frames.stop
        session.prefix_frames = np.concatenate(frames)

    def blocks_for(self, seconds: float) -> int:
        """How many blocks make at least that many seconds of video from the start."""
        if not 0 < seconds < float("inf"):
            raise UsageError(f"seconds is {seconds}; expected a number above 0")
        blocks = frames = 0
        while (frames - 1) * self.spec.vae_stride[0] + 1 < round(seconds * self.fps):
            frames += self.preset.block_size(frames)
            blocks += 1
        return blocks

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain values."""
        return {
            "config": asdict(self.config),
            "preset": asdict(self.preset),
            "network_timesteps": self.sampler.timesteps,
            "model": asdict(self.spec),
            "vae": asdict(self.parts.vae.spec),
            "checkpoint": {"source": self.parts.source, "format": self.parts.form, "sha256": self.parts.digest()},
        }

    @contextmanager
    def _timed(self, name: str, timings: dict[str, float]) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        timings[name] = time.perf_counter() - start


def load(
    model: str | Path,
    preset: str = "self-forcing",
    *,
    device: str | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
    checkpoint_format: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    use_ema: bool = True,
    precision: str = "reference",
    **overrides: Any,
) -> Engine:
    """An engine for a checkpoint (file or folder), or for a named model with random weights.

    Any field of the preset can be overridden: `local_attn_size=6, sink_size=0`. Raises UsageError for
    unknown names and bad values, InferixError for broken files.
    """
    config = EngineConfig(
        model=str(model),
        preset=preset,
        device=(device := device or default_device()),
        dtype=dtype or default_dtype(device),
        base=str(base) if base is not None else None,
        checkpoint_format=checkpoint_format,
        vae=str(vae) if vae is not None else None,
        text_encoder=str(text_encoder) if text_encoder is not None else None,
        use_ema=use_ema,
        precision=precision,
    )
    scheme = make_preset(preset, **overrides)
    if str(model) in MODELS and not Path(model).exists():
        return Engine(config, scheme, random_components(MODELS[str(model)], config))
    return Engine(config, scheme, load_components(config))
