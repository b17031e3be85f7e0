"""Memory need of one session in bytes, from its preset and picture size."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.decoder import DecoderSpec
from ...models.spec import ModelSpec
from ...schemes.page_needs import least_pages
from ...schemes.presets import Preset
from ..byte_sizes import format_bytes
from .costs import decoder_state_bytes, latent_bytes, latent_kind


@dataclass(frozen=True)
class MemoryNeed:
    """Most bytes that a session needs over its life."""

    pages: int = 0
    decoder: int = 0
    latents: int = 0

    @property
    def total(self) -> int:
        return self.pages + self.decoder + self.latents

    def __str__(self) -> str:
        pages, decoder, latents = map(format_bytes, (self.pages, self.decoder, self.latents))
        return f"{format_bytes(self.total)} (pages {pages}, decoder state {decoder}, latents {latents})"


def session_need(
    preset: Preset,
    spec: ModelSpec,
    decoder: DecoderSpec,
    size: tuple[int, int],
    dtype: str,
    page_bytes: int,
    queued: int,
) -> MemoryNeed:
    """Compute the need of a session: pages of `page_bytes`, decoder states, and latents.

    queued: blocks in the output queue, whose latents are counted beside those of the block loop and of rewinding.
    """
    policy, block = preset.context, preset.num_frame_per_block
    states = 1 + min(2, policy.rewind_blocks)  # the newest, and checkpoints to rewind from
    recent = policy.rebuild_frames
    if policy.prompt_switch == "recache":
        recent = max(recent, policy.local_attn_size)
    frames = recent + block * (preset.window_blocks + queued + 2 * policy.rewind_blocks)
    return MemoryNeed(
        pages=least_pages(preset) * page_bytes,
        decoder=states * decoder_state_bytes(decoder, spec.latent_size(size), dtype),
        latents=frames * latent_bytes(spec, size, latent_kind(preset, dtype)),
    )
