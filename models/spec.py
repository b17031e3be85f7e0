"""Sizes of a transformer, complete and without defaults: no other file has a number of a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class ModelSpec:
    """Every size of a transformer that denoises latents of a video.

    family: name of the `Family` that builds it. kv_heads: heads of cached keys and values, a divisor of num_heads.
    """

    name: str
    family: str
    dim: int
    ffn_dim: int
    num_heads: int
    kv_heads: int
    num_layers: int
    in_channels: int
    out_channels: int
    freq_dim: int
    text_dim: int
    text_len: int
    patch: tuple[int, int]  # height, width; the temporal patch is 1
    eps: float
    image_dim: int | None  # width of the image encoder's features, None without image cross-attention
    image_tokens: int | None  # rows of the learned position embedding of image features, None without one
    vae_stride: tuple[int, int]  # time, space
    fps: int
    default_size: tuple[int, int]  # width, height in pixels
    grid: tuple[int, int] | None  # rows and columns of a learned position embedding, None without one
    camera_channels: int | None  # entries of a pixel's ray, None for a model that follows no camera
    actions: tuple[str, ...]  # names of the actions of a latent frame; none for models that follow only text

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2:
            raise UsageError(f"dim {self.dim} must be an even multiple of num_heads {self.num_heads}")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise UsageError(f"kv_heads is {self.kv_heads}; expected a divisor of num_heads {self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of keys and of values: that of all their heads together."""
        return self.kv_heads * self.head_dim

    @property
    def condition_channels(self) -> int:
        """Channels of a frame's condition, which stand after its noisy latents: mask and image. 0 without one."""
        return self.in_channels - self.out_channels

    @property
    def frame_channels(self) -> int:
        """Channels that a pass takes of a latent frame beside its latents: its condition, then its folded rays."""
        return self.condition_channels + (self.camera_channels or 0) * self.vae_stride[1] ** 2

    @property
    def text_rows(self) -> int:
        """Rows of a text as passes take it: those of the text encoder, unless the model adds some."""
        return self.text_len

    @property
    def first_pictures(self) -> int:
        """Pictures of the first latent frame of a stream; each later one has `vae_stride[0]`."""
        return 1

    def pictures(self, latent_frames: int) -> int:
        """Pictures that the first latent frames of a stream become."""
        return (latent_frames - 1) * self.vae_stride[0] + self.first_pictures

    def latent_frames(self, pictures: int) -> int:
        """Latent frames at the start of a stream that become at least that many pictures."""
        return max(0, -(-(pictures - self.first_pictures) // self.vae_stride[0])) + 1

    @property
    def action_dim(self) -> int | None:
        """Entries of a frame's action vector, one per action; None for a model without actions."""
        return len(self.actions) or None

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the latent (height, width) of a picture (width, height) in pixels.

        Raises UsageError that names the nearest valid sizes.
        """
        steps = (self.vae_stride[1] * self.patch[1], self.vae_stride[1] * self.patch[0])
        if any(value < step or value % step for value, step in zip(size, steps, strict=True)):
            below = [max(value // step, 1) * step for value, step in zip(size, steps, strict=True)]
            above = [max(-(-value // step), 1) * step for value, step in zip(size, steps, strict=True)]
            if self.grid is not None and (above[0] > self.grid[1] * steps[0] or above[1] > self.grid[0] * steps[1]):
                above = below
            near = " or ".join(dict.fromkeys(f"{width}x{height}" for width, height in (below, above)))
            raise UsageError(
                f"size {size[0]}x{size[1]} is not possible: width must be a multiple of {steps[0]} and height "
                f"of {steps[1]}; nearest: {near}"
            )
        height, width = size[1] // self.vae_stride[1], size[0] // self.vae_stride[1]
        if self.grid is not None and (height > self.grid[0] * self.patch[0] or width > self.grid[1] * self.patch[1]):
            most = f"{self.grid[1] * steps[0]}x{self.grid[0] * steps[1]}"
            raise UsageError(f"size {size[0]}x{size[1]} is too large for {self.name}; expected at most {most}")
        return height, width

    def tokens_per_frame(self, size: tuple[int, int]) -> int:
        height, width = self.latent_size(size)
        return (height // self.patch[0]) * (width // self.patch[1])
