"""A forward pass as data: groups of latent frames, each with its timestep, its context and what it writes.

One group is a denoising pass of Self-Forcing; several make a pass in which frames stand at different noise
levels. Host integers only: nothing here knows a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """Consecutive frames of a pass that share a timestep and a context.

    frames: absolute latent frames, in token order.
    timestep: what the network is told, 0 (clean) to 1000 (noise).
    context: absolute latent frames attended to, ascending, the group's own among them.
    write: whether the group's keys and values replace what the cache holds for its frames.
    """

    frames: tuple[int, ...]
    timestep: float
    context: tuple[int, ...]
    write: bool = True


@dataclass(frozen=True)
class Pass:
    """One run of the network over the frames of its groups, in order."""

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        frames = self.frames
        if not frames or len(set(frames)) != len(frames):
            raise ValueError(f"frames {frames} of a pass must be at least one, each once")
        for group in self.groups:
            if list(group.context) != sorted(set(group.context)):
                raise ValueError(f"context {group.context} must be ascending, each frame once")
            if missing := set(group.frames) - set(group.context):
                raise ValueError(f"frames {sorted(missing)} are not in their own context {group.context}")

    @property
    def frames(self) -> tuple[int, ...]:
        """All frames of the pass, in token order."""
        return tuple(frame for group in self.groups for frame in group.frames)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """One timestep per frame."""
        return tuple(group.timestep for group in self.groups for _ in group.frames)
