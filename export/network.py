"""Passes of one stream of an exported engine: texts and pasts of the branches of guidance. Needs numpy only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np

from ..graphs.passes import NULL, Pass
from ..schemes.block_schedule import ScheduledPass
from ..schemes.guidance import Guidance
from ..schemes.page_needs import page_needs
from .backends import Program, Values
from .numerics import Array
from .past import Past
from .plan import Plan
from .word_table import PromptTable

Texts = list[Values]  # cross keys and values of a text, by input name, as each branch takes it


class Network:
    """The programs of an engine over the texts and pasts of one stream.

    rows: of the text encoder for the prompt. negative: of the negative prompt, where the preset has one. actions: gives
    the action of each frame, by number.
    """

    def __init__(
        self, plan: Plan, programs: Mapping[str, Program], prompts: PromptTable, rows: Array, negative: Array | None,
        actions: Callable[[int], int],
    ) -> None:  # fmt: skip
        self.plan, self.programs, self.prompts, self.actions = plan, programs, prompts, actions
        self.guide = plan.preset.sampler.guide
        frames = page_needs(plan.preset).context
        assert frames is not None  # targets refuse a window without an end
        caches = zip(self.guide.branches, self.guide.caches, strict=True)
        self.pasts = {number: Past(plan, frames) for role, number in caches if role.writes_past}
        self.nothing = Past(plan, 0)  # of branches that see no past
        known: dict[tuple[str, bool], Values] = {}

        def text(kind: str, dropped: bool) -> Values:
            own = rows if kind == "prompt" else negative
            assert own is not None
            if (kind, dropped) not in known:
                known[kind, dropped] = self.condition(own, dropped)
            return known[kind, dropped]

        roles = [(role.text, role.text == "negative") for role in self.guide.branches]
        self.texts: Texts = [text(*role) for role in roles]
        null = plan.preset.context.clean_text == "null"
        self.nulls: Texts = [text("negative", dropped) for _, dropped in roles] if null else []

    def condition(self, rows: Array, dropped: bool = False) -> Values:
        """Cross keys and values of a text. dropped: the branch runs without the prompt."""
        return self.programs["prompt"]({"rows": self.prompts.inputs(rows, dropped)[None]})

    def follow(self, rows: Array) -> None:
        """Follow another prompt; a branch without the prompt keeps its own text."""
        text = self.condition(rows)
        self.texts = [
            text if role.text == "prompt" else own for role, own in zip(self.guide.branches, self.texts, strict=True)
        ]

    def recompute(self, scheduled: ScheduledPass, latents: Array) -> None:
        """Run a pass over clean latents [F, C, h, w] of the past in the branches that follow the prompt."""
        for number, role in enumerate(self.guide.branches):
            if role.text == "prompt" and role.writes_past:
                self.roll(scheduled, [self.past_of(number)])
                self.run_branch(number, scheduled.run, latents, {})

    def run(self, scheduled: ScheduledPass, latents: Array, texts: Mapping[int, Texts]) -> Array:
        """Run a pass over latents [F, C, h, w] in the branches that it needs; returns the velocity, guided.

        texts: by frame, where they are not those in force. A branch that does not run a frame has velocity 0 there.
        """
        run, velocities = scheduled.run, dict[int, Array]()
        self.roll(scheduled, self.pasts.values())
        for number, own in scheduled.branch_runs(self.guide).items():
            rows = [run.frames.index(frame) for frame in own.frames]
            velocities[number] = np.zeros_like(latents)
            if (velocity := self.run_branch(number, own, latents[rows], texts)) is not None:
                velocities[number][rows] = velocity
        return guided(self.guide, velocities, run)

    def roll(self, scheduled: ScheduledPass, pasts: Iterable[Past]) -> None:
        """Give the frames that the caches hold for a pass their slots."""
        window = scheduled.window
        for past in pasts:
            past.roll(None if window is None else set(window) - set(scheduled.run.frames))

    def past_of(self, number: int) -> Past:
        return self.pasts.get(self.guide.caches[number], self.nothing)

    def run_branch(self, number: int, run: Pass, latents: Array, texts: Mapping[int, Texts]) -> Array | None:
        """Run a pass as one branch does, and take the keys and values of clean frames that it writes.

        Returns the velocity [F, C, h, w]; None of a program that has none.
        """
        clean = [frame for group in run.groups if group.write and not group.denoised for frame in group.frames]
        values = self.inputs(number, run, texts) | {"latents": latents[None]}
        results = self.programs["commit" if clean else "step"](values)
        velocity = results.pop("velocity", None)
        if clean:
            positions, rows = self.positions(run), [run.frames.index(frame) for frame in clean]
            new = results if len(rows) == len(run.frames) else {key: value[rows] for key, value in results.items()}
            self.past_of(number).keep(clean, [positions[frame] for frame in clean], new)
        return None if velocity is None else velocity[0]

    def positions(self, run: Pass) -> dict[int, int]:
        """Position of each frame of a pass's contexts; its own are absolute where positions move with the window."""
        positions, moving = dict[int, int](), self.plan["rope"]["moving"]
        for group in run.groups:
            moved = group.frames[0] - group.position_of(group.frames[0]) if moving else 0
            at = {frame: position + moved for frame, position in zip(group.context, group.positions, strict=True)}
            assert all(positions.get(frame, position) == position for frame, position in at.items()), run
            positions |= at
        return positions

    def inputs(self, number: int, run: Pass, texts: Mapping[int, Texts]) -> Values:
        """All inputs of a branch's pass but its latents."""
        positions = self.positions(run)
        past = {frame: at for frame, at in positions.items() if frame not in run.frames}
        values, seen = self.past_of(number).bind(past)
        angles = np.multiply.outer([float(positions[frame]) for frame in run.frames], self.plan["rope"]["frequencies"])
        values |= {"rope_cos": np.cos(angles).astype(np.float32), "rope_sin": np.sin(angles).astype(np.float32)}
        values["timesteps"] = np.array([run.timesteps], np.float32)
        if run.condition is not None:
            condition = np.full_like(values["timesteps"], run.condition)
            values["timesteps"] = np.stack((values["timesteps"], condition), -1)
        if actions := self.plan["model"]["actions"]:
            numbers = [self.actions(frame) for frame in run.frames]
            values["actions"] = np.eye(len(actions), dtype=np.float32)[numbers][None]
        if not self.plan.grouped:
            return values | self.texts[number]
        return values | sees(run, seen) | joined([
            self.nulls[number] if group.text == NULL else texts.get(frame, self.texts)[number]
            for group in run.groups for frame in group.frames
        ])  # fmt: skip


def sees(run: Pass, past: Sequence[int]) -> Values:
    """Which frames of the past, in this order, and of the pass each frame of the pass sees."""
    rows = [group.context for group in run.groups for _ in group.frames]

    def seen(frames: Sequence[int]) -> Array:
        return np.array([[frame in row for frame in frames] for row in rows], bool).reshape(len(rows), len(frames))

    return {"sees_past": seen(past), "sees_own": seen(run.frames)}


def joined(texts: Sequence[Values]) -> Values:
    """The different ones among the texts of frames, one after the other, and the number of each frame's."""
    different = list({id(text): text for text in texts}.values())
    numbers = [next(number for number, own in enumerate(different) if own is text) for text in texts]
    one, *others = different
    if not others:
        return one | {"text_of": np.array(numbers)}
    return {name: np.concatenate([text[name] for text in different]) for name in one} | {"text_of": np.array(numbers)}


def guided(guidance: Guidance, velocities: Mapping[int, Array], run: Pass) -> Array:
    """Join the velocities [F, C, h, w] of branches, by number, over the frames of a pass.

    Branches without a weight at any of its timesteps are left out; all 0 where none has one.
    """
    numbers = guidance.branches_at([group.timestep for group in run.groups if group.denoised])
    none = np.zeros_like(next(iter(velocities.values())))
    parts = [velocities.get(number, none) for number in numbers] or [none]
    total = parts[-1]
    for (number, _), (own, weaker) in reversed(list(zip(pairwise(numbers), pairwise(parts), strict=True))):
        scales = np.array([guidance.scales_at(timestep)[number] for timestep in run.timesteps], np.float32)
        total = total + scales[:, None, None, None] * (own - weaker)
    return total
