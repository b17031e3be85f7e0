"""A forward pass as data: groups of latent frames, each with its timestep, context, text, branch and what it writes.

One group is a denoising pass of Self-Forcing; several make a pass in which frames stand at different noise
levels. Host integers only: nothing here knows a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

PROMPT, NULL = 0, 1  # texts of a group; higher numbers are prompts of blocks in flight beside the first


@dataclass(frozen=True)
class Group:
    """Frames of a pass that share a timestep and a context.

    frames: absolute latent frames, in token order.
    timestep: the network's input, 0 (clean) to 1000 (noise).
    context: absolute latent frames attended to, ascending; those of the pass are seen as the pass has them.
    positions: temporal rotary position of each frame of `context`, as this group sees it.
    write: whether the group's keys and values replace what the cache holds for its frames.
    text: what its tokens attend to in cross-attention: PROMPT, the prompt of the branch, NULL, the null caption, or a
    higher number, another prompt.
    branch: number of the guidance branch that runs the group; None for every branch.
    denoised: whether its velocity is used; a group over clean latents runs for the keys and values that it writes.
    head_contexts: frames of `context` that each of several equal groups of heads attends to, as sparse attention needs;
    empty where all heads attend to all of `context`.
    """

    frames: tuple[int, ...]
    timestep: float
    context: tuple[int, ...]
    positions: tuple[int, ...]
    write: bool = True
    text: int = PROMPT
    branch: int | None = None
    head_contexts: tuple[tuple[int, ...], ...] = ()
    denoised: bool = True

    def __post_init__(self) -> None:
        if list(self.context) != sorted(set(self.context)):
            raise ValueError(f"context {self.context} must be ascending, each frame once")
        if len(self.positions) != len(self.context):
            raise ValueError(f"{len(self.positions)} positions for {len(self.context)} frames of context")
        if missing := set(self.frames) - set(self.context):
            raise ValueError(f"frames {sorted(missing)} are not in their own context {self.context}")
        if self.text < 0:
            raise ValueError(f"text {self.text}; expected {PROMPT}, the prompt, {NULL}, the null caption, or above")
        for frames in self.head_contexts:
            if not frames or list(frames) != sorted(set(frames)) or not set(frames) <= set(self.context):
                raise ValueError(f"head_contexts hold {frames}; expected some of the context {self.context}, ascending")

    def position_of(self, frame: int) -> int:
        return self.positions[self.context.index(frame)]


@dataclass(frozen=True)
class Pass:
    """One run of the network over the frames of its groups, in order; each branch runs each frame at most once.

    condition: what a distilled network is given of the step besides timesteps; None for networks that take none.
    weights: number of the set of weights that runs the pass, of a model that has several.
    """

    groups: tuple[Group, ...]
    condition: float | None = None
    weights: int = 0

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a pass has no groups; expected at least one")
        for branch in {group.branch for group in self.groups}:
            frames = [frame for group in self.groups_of(branch) for frame in group.frames]
            if not frames or len(set(frames)) != len(frames):
                raise ValueError(f"frames {tuple(frames)} of a pass must be at least one, each once")
        if len({len(group.head_contexts) for group in self.groups}) > 1:
            raise ValueError("groups of a pass must have equally many head_contexts")

    @property
    def frames(self) -> tuple[int, ...]:
        """All frames of the pass, in token order."""
        return tuple(dict.fromkeys(frame for group in self.groups for frame in group.frames))

    @property
    def timesteps(self) -> tuple[float, ...]:
        """One timestep per frame of a pass of one branch."""
        return tuple(group.timestep for group in self.groups for _ in group.frames)

    @property
    def texts(self) -> tuple[tuple[int, int], ...]:
        """(text, frames) of neighbouring groups with the same text, in token order."""
        runs = groupby(self.groups, key=lambda group: group.text)
        return tuple((text, sum(len(group.frames) for group in groups)) for text, groups in runs)

    @property
    def mixed_texts(self) -> tuple[tuple[int, int], ...]:
        """`texts` of a pass whose frames follow different texts; empty where all follow one."""
        return self.texts if len(self.texts) > 1 else ()

    def groups_of(self, branch: int | None) -> tuple[Group, ...]:
        """Groups that a branch runs; for None, those that every branch runs."""
        return tuple(group for group in self.groups if group.branch in (None, branch))

    def of_branch(self, branch: int) -> Pass | None:
        """The pass as one branch runs it; None where it runs none of the groups."""
        groups = self.groups_of(branch)
        if groups == self.groups:
            return self
        return replace(self, groups=groups) if groups else None

    def of_groups(self, chosen: Callable[[Group], bool]) -> Pass | None:
        """The pass over some of its groups; None where it has none of them."""
        groups = tuple(filter(chosen, self.groups))
        return replace(self, groups=groups) if groups else None

    def with_texts(self, by_frame: Mapping[int, int]) -> Pass:
        """The pass with other prompts: the number of the text of frames whose group follows one."""
        texts = (
            replace(group, text=by_frame.get(group.frames[0], PROMPT)) if group.text == PROMPT else group
            for group in self.groups
        )
        return replace(self, groups=tuple(texts)) if by_frame else self

    def read_only(self) -> Pass:
        """The pass without keys and values left in the cache."""
        return replace(self, groups=tuple(replace(group, write=False) for group in self.groups))

    def without_past(self) -> Pass:
        """The pass with each group seeing itself alone, at positions from 0, and leaving no keys and values."""
        alone = (
            replace(
                group, context=tuple(sorted(group.frames)), positions=tuple(range(len(group.frames))), write=False,
                head_contexts=(),
            )
            for group in self.groups
        )  # fmt: skip
        return replace(self, groups=tuple(alone))

    @property
    def written(self) -> tuple[int, ...]:
        """Frames of the groups that write, in token order."""
        return tuple(frame for group in self.groups if group.write for frame in group.frames)

    @property
    def scratch(self) -> tuple[int, ...]:
        """Frames of the groups that do not write, in token order: their keys and values last for the pass."""
        return tuple(frame for group in self.groups if not group.write for frame in group.frames)
