"""A forward pass as data: groups of latent frames, each with its timestep, its context and what it writes.

One group is a denoising pass of Self-Forcing; several make a pass in which frames stand at different noise
levels. Host integers only: nothing here knows a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Frames of a pass that share a timestep and a context.

    frames: absolute latent frames, in token order.
    timestep: the network's input, 0 (clean) to 1000 (noise).
    context: absolute latent frames attended to, ascending; those of the pass are seen as the pass has them.
    positions: temporal rotary position of each frame of `context`, as this group sees it.
    write: whether the group's keys and values replace what the cache holds for its frames.
    """

    frames: tuple[int, ...]
    timestep: float
    context: tuple[int, ...]
    positions: tuple[int, ...]
    write: bool = True

    def __post_init__(self) -> None:
        if list(self.context) != sorted(set(self.context)):
            raise ValueError(f"context {self.context} must be ascending, each frame once")
        if len(self.positions) != len(self.context):
            raise ValueError(f"{len(self.positions)} positions for {len(self.context)} frames of context")
        if missing := set(self.frames) - set(self.context):
            raise ValueError(f"frames {sorted(missing)} are not in their own context {self.context}")

    def position_of(self, frame: int) -> int:
        return self.positions[self.context.index(frame)]


@dataclass(frozen=True)
class Pass:
    """One run of the network over the frames of its groups, in order."""

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        frames = self.frames
        if not frames or len(set(frames)) != len(frames):
            raise ValueError(f"frames {frames} of a pass must be at least one, each once")

    @property
    def frames(self) -> tuple[int, ...]:
        """All frames of the pass, in token order."""
        return tuple(frame for group in self.groups for frame in group.frames)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """One timestep per frame."""
        return tuple(group.timestep for group in self.groups for _ in group.frames)
