"""Guidance as data: how often a pass runs, which text and past each run sees, and how their velocities are joined.

A run is a branch. Classifier-free guidance has two: one that follows the prompt, and one that follows the negative
prompt. A third may see no past at all, so that text and past have weights of their own (MAGI-1, arXiv 2505.13211).
The experts of a model are branches too, each with weights and a past of its own, of which one joins a velocity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import UsageError, quoted

TEXTS = ("prompt", "negative")


@dataclass(frozen=True)
class GuidanceBranch:
    """One run of the network over the frames of a pass.

    text: the prompt, or the negative prompt. sees_past: it has a cache of its past; otherwise each group of frames
    sees itself alone, at positions from 0, and leaves no keys and values; it runs only groups whose velocity it joins.
    reads: number of the branch whose cache it reads and does not write; None for a cache of its own. weights: number of
    the set of weights that runs it.
    """

    text: str = "prompt"
    sees_past: bool = True
    reads: int | None = None
    weights: int = 0

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise UsageError(f"text of a guidance branch is {quoted(self.text)}; expected one of {', '.join(TEXTS)}")
        if self.reads is not None and not self.sees_past:
            raise UsageError(f"a guidance branch reads the cache of branch {self.reads}, but sees no past; drop one")

    @property
    def writes_past(self) -> bool:
        """True if the branch has a cache of its own."""
        return self.sees_past and self.reads is None


@dataclass(frozen=True)
class Guidance:
    """Branches, from the one with most conditions to the one with fewest, and the scales that join their velocities.

    scales: (least timestep, scales), ascending from timestep 0. Those of the last entry at or below a frame's timestep
    join its velocities: v = v[-1] + sum over i of scales[i] * (v[i] - v[i + 1]). A scale of 1 for all but the last
    branch is the first branch alone.
    """

    branches: tuple[GuidanceBranch, ...]
    scales: tuple[tuple[float, tuple[float, ...]], ...] = ((0.0, ()),)

    def __post_init__(self) -> None:
        first = self.branches[0] if self.branches else None
        if first is None or first.text != "prompt" or not first.sees_past:
            raise UsageError("the first branch of guidance must follow the prompt and see the past")
        for number in (branch.reads for branch in self.branches if branch.reads is not None):
            if not (0 <= number < len(self.branches) and self.branches[number].writes_past):
                raise UsageError(f"a guidance branch reads the cache of branch {number}, which has none of its own")
        starts = [start for start, _ in self.scales]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise UsageError(f"scales of guidance start at timesteps {starts}; expected them to ascend from 0")
        for _, scales in self.scales:
            if len(scales) != len(self.branches) - 1 or not all(map(math.isfinite, scales)):
                raise UsageError(
                    f"scales of guidance are {list(scales)} for {len(self.branches)} branches; expected a number for "
                    "each but the last"
                )

    @property
    def caches(self) -> tuple[int, ...]:
        """Number of the cache of each branch, counted from 0; a branch that reads another's has the same."""
        owners = [number if branch.reads is None else branch.reads for number, branch in enumerate(self.branches)]
        return tuple(sorted(set(owners)).index(owner) for owner in owners)

    @property
    def is_even(self) -> bool:
        """True if every branch runs the same groups over a cache of its own, in every pass."""
        return len(self.scales) == 1 and all(branch.writes_past for branch in self.branches)

    def scales_at(self, timestep: float) -> tuple[float, ...]:
        """Scales of a frame at a timestep."""
        return next(scales for start, scales in reversed(self.scales) if start <= timestep)

    def weights_at(self, timestep: float) -> tuple[float, ...]:
        """Weight of each branch's velocity at a timestep; they sum to 1."""
        scales = (0.0, *self.scales_at(timestep), 1.0)
        return tuple(scale - before for before, scale in pairwise(scales))

    def branches_at(self, timesteps: Sequence[float]) -> tuple[int, ...]:
        """Numbers of the branches that have a weight for any of these timesteps."""
        weights = [self.weights_at(timestep) for timestep in timesteps]
        return tuple(number for number in range(len(self.branches)) if any(row[number] for row in weights))


FOLLOWING = GuidanceBranch()  # the branch of a stream without guidance
ALONE = Guidance((FOLLOWING,))


def classifier_free(scale: float) -> Guidance:
    """Guidance away from the negative prompt: v = u + scale * (c - u); the prompt alone at scale 1."""
    if scale == 1:
        return ALONE
    return Guidance((FOLLOWING, GuidanceBranch("negative")), ((0.0, (scale,)),))


def experts(boundary: float) -> Guidance:
    """The expert for high noise, set 0 of the weights, from timestep `boundary` on; below it the one for low noise.

    Source: Wan 2.2's A14B. Both follow the prompt, and each commits clean blocks to a cache of its own.
    """
    return Guidance((FOLLOWING, GuidanceBranch(weights=1)), ((0.0, (0.0,)), (boundary, (1.0,))))
