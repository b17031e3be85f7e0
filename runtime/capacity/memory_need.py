"""Memory need of one session in bytes, from its preset and picture size."""

from __future__ import annotations

from dataclasses import dataclass

from ...models.decoder import DecoderSpec
from ...models.spec import ModelSpec
from ...schemes.page_needs import branches, least_pages
from ...schemes.presets import Preset
from ..byte_sizes import format_bytes
from .costs import arena_bytes, cross_bytes, decoder_state_bytes, latent_bytes, latent_kind, pass_scratch


@dataclass(frozen=True)
class MemoryNeed:
    """Most bytes that a session needs over its life.

    activations: those that a batch needs for each session beyond the first, whose activations the engine has.
    """

    pages: int = 0
    decoder: int = 0
    latents: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        """Bytes of the session by itself."""
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
    graphs: bool = False,
) -> MemoryNeed:
    """Compute the need of a session: pages of `page_bytes`, decoder states, and latents.

    queued: blocks in the output queue, whose latents are counted beside those of the block loop and of rewinding.
    graphs: passes are lowered programs.
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
        activations=batch_row_bytes(preset, spec, size, dtype, graphs),
    )


def batch_frames(preset: Preset) -> int:
    """Latent frames that one session has in the longest pass that a batch makes."""
    in_flight = preset.num_frame_per_block * (preset.window_blocks + preset.context.commit_in_next)
    return max(in_flight, preset.context.rebuild_frames)


def batch_row_bytes(preset: Preset, spec: ModelSpec, size: tuple[int, int], dtype: str, graphs: bool) -> int:
    """Bytes that a further session adds to a batch: activations, and in graphs the prompts of its branches."""
    tokens, frames = spec.tokens_per_frame(size), batch_frames(preset)
    if graphs:
        return arena_bytes(spec, tokens, frames, dtype) + branches(preset) * cross_bytes(spec, dtype)
    return pass_scratch(spec, tokens, frames, dtype)
