"""User input to tensors: prompts to the text encoder's rows, images and videos to latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UsageError, quoted
from ..models.text.umt5 import clean_prompt, load_prompt_embeds
from ..schemes.page_needs import branches, needs_negative
from .frame_channels import ImageCondition
from .live_video import LiveVideo
from .media_input import read_image, read_video
from .resources import Resources

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Inputs:
    """Checks input against one engine's model and encodes it."""

    resources: Resources

    def prompt_rows(
        self,
        prompt: str | None,
        embeds: Tensor | str | Path | None,
        empty: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Encode a prompt, or load `embeds`, to rows [text_len, text_dim]. UsageError for both or neither.

        empty: the prompt may be empty. mask: rows of `embeds` that belong to the prompt; None for all.
        """
        resources = self.resources
        if embeds is not None and prompt is None:
            rows = load_prompt_embeds(embeds, resources.spec.text_len, resources.spec.text_dim, mask)
            return rows.to(resources.device, resources.dtype)
        if mask is not None:
            raise UsageError("a mask says which rows of embeddings count, and there are none; give prompt_embeds")
        if embeds is not None or prompt is None:
            raise UsageError("give a prompt or prompt_embeds, and not both")
        self.check_prompt(prompt, empty)
        assert resources.parts.text is not None
        return resources.parts.text().encode(prompt).to(resources.device, resources.dtype)

    def check_prompt(self, prompt: object, empty: bool = False) -> None:
        """UsageError for a prompt that no text encoder takes, or where there is no encoder. See `clean_prompt`."""
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt is {quoted(prompt)}; expected text")
        clean_prompt(prompt, empty)
        if self.resources.parts.text is None:
            raise UsageError(
                f"{quoted(self.resources.parts.source)} has no text encoder; give base, a folder that has one, "
                "or prompt_embeds"
            )

    def negative_rows(self, prompt: str | None, embeds: Tensor | str | Path | None) -> Tensor | None:
        """Rows [text_len, text_dim] of the negative prompt; None for a preset that uses none.

        It is what guidance keeps away from, and the null caption.
        """
        preset = self.resources.preset
        if not needs_negative(preset):
            if prompt is not None or embeds is not None:
                raise UsageError(f"{preset.name} uses no guidance, so a negative prompt would do nothing; drop it")
            return None
        learned = self.resources.parts.transformer.null_text()
        if prompt is None and embeds is None and learned is not None:
            return learned.to(self.resources.device, self.resources.dtype)
        if prompt is None and embeds is None:
            raise UsageError(
                f"{preset.name} guides away from a negative prompt; give negative_prompt, "
                "or set guidance_scale=1"
                if branches(preset) > 1
                else f"{preset.name} runs clean frames under a null caption; give negative_prompt, or set "
                "clean_text=prompt"
            )
        return self.prompt_rows(prompt, embeds, empty=True)

    def source_latents(self, video: Any, size: tuple[int, int], fit: str = "crop") -> Tensor:
        """Latents [F, C, H, W] of a video that blocks are made from: its whole blocks, from the start."""
        return self.encoded(self.pixels_of(video, size, False, fit), keep_end=False)

    def begin_live(self, size: tuple[int, int]) -> LiveVideo:
        """A live video of which nothing has arrived. UsageError for a model that cannot be made from one."""
        resources, preset = self.resources, self.resources.preset
        if not resources.parts.vae.spec.encodes:
            raise UsageError(
                f"live is True, but {quoted(resources.parts.source)} has no encoder; give a VAE that has one"
            )
        if preset.window_blocks > 1:
            count = preset.window_blocks
            raise UsageError(f"live is True, but {preset.name} has {count} blocks in flight; expected one")
        shape = 0, resources.spec.out_channels, *resources.spec.latent_size(size)
        empty = torch.empty(shape, device=resources.device, dtype=resources.dtype)
        return LiveVideo(0, empty, resources.parts.vae.new_state())

    def continue_live(self, live: LiveVideo, pixels: Pixels, needed: int) -> LiveVideo:
        """A live video with the pictures [T, H, W, 3] of one block more, without frames before `needed`."""
        resources, encoder = self.resources, live.encoder.clone()
        scaled = torch.from_numpy(pixels.copy()).to(resources.device, resources.dtype).permute(0, 3, 1, 2)
        return live.followed_by(resources.parts.vae.encode(scaled / 127.5 - 1, encoder), encoder, needed)

    def clamped_latents(self, image: Any, size: tuple[int, int], fit: str = "crop") -> Tensor:
        """Latents [1, C, H, W] of an image that is held as the first frame."""
        return self.encoded(self.pixels_of(image, size, True, fit), keep_end=False, whole_blocks=False)

    def image_condition(self, image: Any, size: tuple[int, int], fit: str = "crop") -> ImageCondition:
        """Condition channels of a stream that begins with an image."""
        resources = self.resources
        pixels = torch.from_numpy(self.pixels_of(image, size, True, fit).copy()).to(resources.device, resources.dtype)
        return ImageCondition(resources.spec, resources.parts.vae, pixels.permute(0, 3, 1, 2) / 127.5 - 1)

    def prefix_latents(
        self, image: Any, video: Any, size: tuple[int, int], fit: str = "crop"
    ) -> tuple[Tensor | None, Tensor | None]:
        """Latents [F, C, H, W] that the stream continues, the end of a video kept.

        They are those of whole blocks, and where the policy pastes them, those left over for the start of the next.
        """
        if image is not None and video is not None:
            raise UsageError("image and video both begin the stream; give one of them")
        still = image is not None
        pixels = self.pixels_of(image if still else video, size, still, fit)
        if self.resources.preset.context.image != "paste":
            return self.encoded(pixels, keep_end=True), None
        latents = self.encoded(pixels, keep_end=True, whole_blocks=False)
        left_over = len(latents) % self.resources.preset.num_frame_per_block
        whole, left = latents.split([len(latents) - left_over, left_over])
        return whole if len(whole) else None, left if len(left) else None

    def pixels_of(self, given: Any, size: tuple[int, int], still: bool, fit: str = "crop") -> Pixels:
        """Frames uint8 [T, H, W, 3] of an image or video, from a file or an array; UsageError if they do not fit."""
        if isinstance(given, str | Path):
            fps = self.resources.spec.fps
            pixels = read_image(given, size, fit)[None] if still else read_video(given, size, fps, fit)
        else:
            pixels = given[None] if given.ndim == 3 else given
        if pixels.ndim != 4 or pixels.shape[1:] != (size[1], size[0], 3) or pixels.dtype != np.uint8:
            raise UsageError(
                f"image or video is {pixels.dtype} {list(pixels.shape)}; expected uint8 frames of "
                f"{[size[1], size[0], 3]}"
            )
        return pixels

    def encoded(self, pixels: Pixels, keep_end: bool, whole_blocks: bool = True) -> Tensor:
        """Latents [F, C, H, W] of frames [T, H, W, 3], cut to whole blocks at the start or the end.

        A single frame is repeated to those of a latent frame. UsageError for fewer frames than the first block has.
        """
        resources, preset, spec = self.resources, self.resources.preset, self.resources.spec
        if len(pixels) == 1:
            pixels = pixels.repeat(spec.first_pictures, axis=0)
        frames = (len(pixels) - spec.first_pictures) // spec.vae_stride[0] + 1
        if frames < 1:
            raise UsageError(
                f"{len(pixels)} frames are too few to begin with: one latent frame has {spec.first_pictures}"
            )
        if whole_blocks:
            frames = preset.whole_blocks(frames)
            if frames == 0:
                raise UsageError(
                    f"{len(pixels)} frames are too few to begin with: the first block of {preset.name} needs "
                    f"{spec.pictures(preset.block_size(0))}; set independent_first_frame=true or use a preset with "
                    "blocks of one frame"
                )
        count = spec.pictures(frames)
        pixels = pixels[len(pixels) - count :] if keep_end else pixels[:count]
        vae, latents = resources.parts.vae, []
        state = vae.new_state()
        for part in np.split(pixels, vae.spec.encoding_parts(count)):  # a long video is never all in floating point
            scaled = torch.from_numpy(part.copy()).to(resources.device, resources.dtype).permute(0, 3, 1, 2)
            latents.append(vae.encode(scaled / 127.5 - 1, state))
        return torch.cat(latents)
