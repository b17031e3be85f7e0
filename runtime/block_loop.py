"""The block loop: one block of one session, from its state to clean latents and cached keys and values.

The timeline chooses frames, contexts and positions, the executor runs passes, and caches hold pages. Queues, turns and
delivery are the session manager's. A block is a generator that yields the passes it needs (see `lockstep`), so blocks
of several sessions can share passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InferixError
from ..graphs.passes import NULL, PROMPT, Pass
from ..models.solvers import noised
from ..schemes.block_schedule import (
    branch_run,
    commit_pass,
    denoise_pass,
    denoise_passes,
    rebuild_pass,
    recache_pass,
    reencodes_head,
    supports_whole_block,
    window_of,
)
from ..schemes.timeline import Span
from .execution.decode_pipeline import to_frames
from .finite_check import FiniteCheck
from .frame_channels import GivenFrames, camera_key, frame_channels
from .kv.paged_cache import layout_together
from .noise import PhiloxNoise
from .plans import BranchPass, GuidedPass, PassLayout, PassPlan, WholeBlock
from .resources import Resources
from .sampler import guided, latent_dtype
from .sessions.engine_thread import shortages_named
from .sessions.lockstep import BlockSteps, ForwardRequest, ForwardResult, group_compatible, in_sizes, run_lockstep
from .sessions.session_state import BlockInFlight, Branch, PromptChange, SessionState
from .streams import put_rows, rows_of, to_device
from .telemetry.records import BlockRecord
from .worker_client import Handle

T = TypeVar("T")


class BlockLoop:
    """Runs blocks with an engine's resources.

    split_batches: called with the size and the error of a batch that failed although each of its passes runs by itself.
    """

    def __init__(self, resources: Resources, split_batches: Callable[[int, str], None]) -> None:
        self.resources, self.split_batches = resources, split_batches
        self.finite = FiniteCheck(resources.device, latent_dtype(resources.preset.sampler, resources.dtype))

    # One block

    def make_block(
        self,
        state: SessionState,
        record: BlockRecord,
        mark_rollback: Callable[[], None],
        wait_for_decoder: Callable[[], None],
    ) -> BlockSteps[BlockInFlight]:
        """Make the next block: prepare the context, denoise, commit. Stages are timed in `record`.

        Its `check` must have run before its latents or pictures are handed out.

        mark_rollback: makes the current state the one that a rollback restores. wait_for_decoder: waits until the
        decode pipeline is done with the session.
        """
        with record.span("prepare"):
            if self.commits_apart(state):
                yield from self.commit_before(state, record)
                mark_rollback()  # what it evicted does not come back
            rebuild = self.rebuild_context(state, record, wait_for_decoder)
            if state.preset.context.rebuild_before_switch:
                yield from rebuild
                yield from self.follow_prompt(state, mark_rollback)
            else:
                yield from self.follow_prompt(state, mark_rollback)
                yield from rebuild
        with record.span("denoise"):
            if self.runs_whole(state):
                block = yield from self.run_whole(state, record)
            else:
                block = yield from self.denoise(state, record)
            block.check = self.finite.begin(block.span.index, block.latents)
        with record.span("commit"):
            if state.preset.context.commit_in_next:
                state.timeline.uncommitted, state.uncommitted = block.span, block.latents
            elif state.preset.context.commit and not block.committed:
                _, prompts = self.prompts_of(state, [block])
                yield from self.commit(state, block.span, block.latents, record, prompts)
        block.latents = self.without_given(state, block)
        if state.camera is not None and not state.preset.context.recomputes:
            kept = state.timeline.uncommitted
            state.camera.forget(state.timeline.next_frame if kept is None else kept.frames.start)
        return block

    def change_prompt(self, state: SessionState, rows: Tensor, scene_cut: bool, blend_blocks: int | None) -> None:
        """Plan a change to a prompt's rows [text_len, text_dim]; the next block follows it.

        blend_blocks: blocks of the change; None for those of the policy.
        """
        policy = state.preset.context
        if scene_cut:
            state.timeline.cut_shot()
        if blend_blocks is None:
            blend_blocks = policy.blend_blocks if policy.prompt_switch == "blend" else 1
        blocks = blend_blocks if state.timeline.next_frame > 0 else 1
        state.change = PromptChange(state.rows, rows, blocks, blocks)

    def follow_prompt(self, state: SessionState, mark_rollback: Callable[[], None]) -> BlockSteps[None]:
        """Move the conditioning one block further towards a new prompt, and recache.

        Over n blocks the new prompt's share is 0, 1/(n-1), ..., 1.
        """
        change = state.change
        if change is None:
            return
        change.left -= 1
        share = 1 - change.left / (change.blocks - 1) if change.blocks > 1 else 1.0
        self.use_prompt(state, torch.lerp(change.old, change.new, share))
        if change.left == 0:
            state.change = None
        if (yield from self.recache(state)):
            mark_rollback()  # recaching twice would move the sink twice

    def use_prompt(self, state: SessionState, rows: Tensor) -> None:
        """Put a prompt's rows in force; blocks in flight keep theirs where the policy says so."""
        if state.preset.context.prompt_switch == "join":
            for block in state.flight:
                if block.rows is None:
                    block.rows, block.texts = state.rows, tuple(branch.text for branch in state.branches)
        state.rows = rows
        texts = self.conditioned(state, rows)
        for branch, text in zip(state.branches, texts, strict=True):
            branch.text = text

    def conditioned(self, state: SessionState, rows: Tensor) -> tuple[Handle, ...]:
        """A prompt as each branch takes it; a branch without the prompt keeps its own text."""
        text = self.resources.client.condition(self.resources.parts.transformer.text_inputs(rows, dropped=False))
        return tuple(text if branch.role.text == "prompt" else branch.text for branch in state.branches)

    def prompts_of(
        self, state: SessionState, blocks: Sequence[BlockInFlight]
    ) -> tuple[dict[int, int], list[dict[int, Handle]]]:
        """Numbers of texts by frame, and prompts by these numbers for each branch, of blocks of several prompts.

        Both are empty where all blocks follow the prompt in force. The oldest block's prompt has the number `PROMPT`.
        """
        if all(block.rows is None for block in blocks):
            return {}, [{} for _ in state.branches]
        current, numbers, by_frame = tuple(branch.text for branch in state.branches), dict[Any, int](), dict[int, int]()
        for block in blocks:
            if block.rows is not None and block.texts is None:
                block.texts = self.conditioned(state, block.rows)
            texts = current if block.rows is None else block.texts
            number = numbers.setdefault(texts, NULL + len(numbers) if numbers else PROMPT)
            by_frame |= dict.fromkeys(block.span.frames, number)
        prompts = [{number: texts[index] for texts, number in numbers.items()} for index in range(len(current))]
        return by_frame, prompts

    def recache(self, state: SessionState) -> BlockSteps[bool]:
        """Pass the visible past through the network under the prompt in force; False where the policy asks for none."""
        scheduled = recache_pass(state.timeline)
        if scheduled is None:
            return False
        run = scheduled.run
        latents = state.recent_frames(run.frames)
        for branch in state.branches:
            if branch.role.text != "prompt" or not branch.role.writes_past:
                continue
            if scheduled.clears_cache:
                branch.cache.clear()
            if (window := scheduled.window) is not None:
                branch.cache.set_window(window)
            yield self.request(state, branch, run, latents, {})
        return True

    def rebuild_context(
        self, state: SessionState, record: BlockRecord, wait_for_decoder: Callable[[], None]
    ) -> BlockSteps[None]:
        """Rebuild the context from the last clean latents, where the policy asks for it."""
        scheduled = rebuild_pass(state.timeline)
        if scheduled is None:
            return
        run = scheduled.run
        latents = self.rebuild_latents(state, run)
        for branch in state.branches:
            branch.cache.clear()
        self.roll_caches(state, run, scheduled.beside)
        yield from self.network_pass(state, run, latents, record)
        if state.preset.context.restart_decoder:
            wait_for_decoder()
            state.decoder.restart(state.next_block, latents)

    def rebuild_latents(self, state: SessionState, run: Pass) -> Tensor:
        """Clean latents of a rebuild's frames, the first encoded again from pixels where the policy asks for it."""
        latents = state.recent_frames(run.frames)
        if reencodes_head(state.preset, run) and state.pixels is not None:
            vae = self.resources.parts.vae
            head = vae.encode(state.pixels[:1], vae.new_state())
            latents = torch.cat((head, latents[1:]))
        return latents

    def denoise(self, state: SessionState, record: BlockRecord) -> BlockSteps[BlockInFlight]:
        """Run passes over the blocks in flight until the first is clean; others join as the schedule says."""
        flight, timesteps = state.flight, state.sampler.of_block(state.next_block).timesteps
        clean = frozenset({0} if state.clamped is not None and state.preset.context.image == "clamp" else ())
        for scheduled in denoise_passes(state.timeline, flight, timesteps, partial(self.admit, state), clean):
            self.roll_caches(state, scheduled.run, scheduled.beside)
            for block in flight:
                self.hold_given(state, block)
            latents = [block.latents for block in flight]
            if scheduled.committed is not None:
                assert state.uncommitted is not None
                latents.insert(0, self.with_given(state, scheduled.committed, state.uncommitted))
            by_frame, prompts = self.prompts_of(state, flight)
            run = scheduled.run.with_texts(by_frame)
            joined = latents[0] if len(latents) == 1 else torch.cat(latents)
            velocity = yield from self.network_pass(state, run, joined, record, prompts)
            parts = velocity.split([len(part) for part in latents])
            for block, part in zip(flight, parts[-len(flight) :], strict=True):
                self.advance(state, block, part)
            state.uncommitted = None
        return flight.pop(0)

    def commit(
        self,
        state: SessionState,
        span: Span,
        latents: Tensor,
        record: BlockRecord | None = None,
        prompts: Sequence[Mapping[int, Handle]] = (),
    ) -> BlockSteps[None]:
        """Run one pass over the clean latents, for the keys and values it leaves in the cache."""
        scheduled = commit_pass(state.timeline, span)
        self.roll_caches(state, scheduled.run, scheduled.beside)
        yield from self.network_pass(state, scheduled.run, latents, record, prompts)

    def commits_apart(self, state: SessionState) -> bool:
        """True if a finished block is committed before the next begins: that follows another prompt, or begins a shot.

        A commit with the null caption follows no prompt.
        """
        policy, timeline = state.preset.context, state.timeline
        changes = state.change is not None or timeline.next_block in state.prompts or timeline.pin_next
        return timeline.uncommitted is not None and policy.clean_text == "prompt" and changes

    def commit_before(self, state: SessionState, record: BlockRecord) -> BlockSteps[None]:
        """Commit the last block by itself, where its commit waits for the next one's first pass."""
        span = state.timeline.uncommitted
        assert span is not None and state.uncommitted is not None
        yield from self.commit(state, span, self.with_given(state, span, state.uncommitted), record)
        state.timeline.uncommitted = state.uncommitted = None

    def runs_whole(self, state: SessionState) -> bool:
        """True if the next block can be one launch: no frame is clamped, and it starts from noise of the seed alone."""
        clamped = state.clamped is not None and state.next_block == 0
        plain = isinstance(state.noise, PhiloxNoise) and state.source is None and state.live is None
        whole = self.resources.worker.supports_whole_block and supports_whole_block(state.preset, state.next_block)
        given = state.preset.context.commit_in_next and self.resources.spec.frame_channels > 0
        return whole and plain and not (clamped or given)

    def run_whole(self, state: SessionState, record: BlockRecord) -> BlockSteps[BlockInFlight]:
        """Run all steps and the commit of a block in one launch; no other block of the session is in flight.

        Where the commit of the block before waits for it, that is part of the launch, and its own is not.
        """
        span, (branch,), noise = self.begin(state), state.branches, state.noise
        assert isinstance(noise, PhiloxNoise)
        shape = len(span.frames), *self.latent_shape(state)
        block = BlockInFlight(span, torch.empty(shape, device="meta"), state.sampler.begin())  # the graph draws noise
        scheduled, latents, before = denoise_pass(state.timeline, [block], state.sampler.timesteps), block.latents, None
        if scheduled.committed is not None:
            assert state.uncommitted is not None
            before, latents = scheduled.run, self.with_given(state, scheduled.committed, state.uncommitted)
        self.roll_caches(state, scheduled.run)
        request = self.request(state, branch, scheduled.run, latents, {})
        whole = WholeBlock(span.frames.start, len(span.frames), noise.seed)
        with record.one_pass():
            block.latents = yield replace(request, run=scheduled.own, before=before, whole=whole)
        state.timeline.uncommitted = state.uncommitted = None
        block.committed = state.preset.context.commit
        return block

    # Parts of a block

    def admit(self, state: SessionState) -> BlockInFlight:
        """Admit the next block: noise, or a given video with noise added. InferixError where the video has ended."""
        span = self.begin(state)
        sampler = state.sampler.of_block(span.index)
        latents = self.draw(state, span, 0)
        given, remedy = None, f"ask for {span.index} blocks"
        if state.live is not None:
            given, remedy = state.live.of(span.frames), "feed its pictures first"
        elif state.source is not None:
            given = state.source[span.frames.start : span.frames.stop]
        if given is not None:
            if len(given) < len(span.frames):
                raise InferixError(f"the video ends before block {span.index}; {remedy}")
            latents = noised(given, latents, sampler.sigmas[0])
        block = BlockInFlight(span, latents, sampler.begin())
        self.hold_given(state, block)
        return block

    def begin(self, state: SessionState) -> Span:
        """Admit the frames of the next block, and put the prompt that was given for it in force."""
        span = state.timeline.admit()
        state.timeline.follow_rest(state.actions.resting_since(span.frames.start - 1))
        if (rows := state.prompts.pop(span.index, None)) is not None:
            self.use_prompt(state, rows)
        return span

    def advance(self, state: SessionState, block: BlockInFlight, velocity: Tensor) -> None:
        """Take one solver step of one block; velocity [F, C, H, W]."""
        step = block.step
        block.latents = block.solver.advance(
            block.latents, velocity, step, lambda: self.draw(state, block.span, step + 1)
        )
        block.step += 1
        if state.preset.context.image == "clamp":
            self.hold_given(state, block)
        if self.finite.at_once:
            self.finite.now(block.span.index, block.latents)

    def hold_given(self, state: SessionState, block: BlockInFlight) -> None:
        block.latents = self.with_given(state, block.span, block.latents)

    def with_given(self, state: SessionState, span: Span, latents: Tensor) -> Tensor:
        """Latents of a block; the first frames of the first block are those of the given image or video."""
        if state.clamped is None or span.index > 0:
            return latents
        return torch.cat((state.clamped, latents[len(state.clamped) :]))

    def without_given(self, state: SessionState, block: BlockInFlight) -> Tensor:
        """Latents of a finished block without the frames of a video that stood before it, as the prefix has them."""
        if state.clamped is None or block.span.index > 0 or block.span.frames.start == 0:
            return block.latents
        return block.latents[len(state.clamped) :]

    def roll_caches(self, state: SessionState, run: Pass, beside: tuple[int, ...] = ()) -> None:
        """Set the window of each branch's cache to what a pass that writes there sees; others leave it as it is.

        beside: frames that stay in the caches although the pass does not see them.
        """
        for number, branch in enumerate(state.branches):
            own = run.of_branch(number) if branch.role.writes_past else None
            if own is not None and (window := window_of(own, beside)) is not None:
                branch.cache.set_window(window)
                state.timeline.forget(window)

    def actions_of(self, state: SessionState, run: Pass) -> tuple[int, ...]:
        """Number of the action of each frame of a pass; none for a model without actions."""
        if self.resources.spec.action_dim is None:
            return ()
        return tuple(state.actions.of(frame) for frame in run.frames)

    def request(
        self, state: SessionState, branch: Branch, run: Pass, latents: Tensor, prompts: Mapping[int, Handle]
    ) -> ForwardRequest:
        """A request for one pass of one branch over latents [F, C, H, W], with all that its frames are given."""
        actions, given = self.actions_of(state, run), self.given(state, run, latents)
        return ForwardRequest(branch, run, latents, actions, given, prompts)

    def given(self, state: SessionState, run: Pass, latents: Tensor) -> Handle | None:
        """Handle of the frame channels that a pass takes, embedded once for passes over the same frames in turn.

        None for a model without frame channels.
        """
        spec = self.resources.spec
        if not spec.frame_channels:
            return None
        key = run.frames, camera_key(state.camera, run.frames)
        if state.given is None or state.given.key != key:
            like = torch.empty(latents.shape, dtype=self.resources.dtype, device=self.resources.device)
            channels = frame_channels(spec, state.image, state.camera, run.frames, like)
            state.given = None  # what it keeps is freed before the next is made
            state.given = GivenFrames(key, self.resources.client.embed_frames(channels))
        return state.given.handle

    def draw(self, state: SessionState, span: Span, draw: int) -> Tensor:
        """Noise [F, C, H, W] of a block: draw 0 at its start, draw s before step s."""
        noise = state.noise.draw(span.index, span.frames, draw, self.latent_shape(state))
        dtype, scale = latent_dtype(state.preset.sampler, self.resources.dtype), state.preset.sampler.noise_scale
        noise = to_device(noise, self.resources.device, dtype)
        if draw == 0 and scale != 1:
            scales = [1.0 if state.actions.rests(frame) else scale for frame in span.frames]
            noise = noise * to_device(torch.tensor(scales, dtype=dtype), noise.device)[:, None, None, None]
        return noise

    def latent_shape(self, state: SessionState) -> tuple[int, int, int]:
        """(C, H, W) of a latent frame."""
        height, width = self.resources.spec.latent_size(state.size)
        return self.resources.spec.out_channels, height, width

    # Passes

    def network_pass(
        self,
        state: SessionState,
        run: Pass,
        latents: Tensor,
        record: BlockRecord | None = None,
        prompts: Sequence[Mapping[int, Handle]] = (),
    ) -> BlockSteps[Tensor]:
        """Run one pass over latents [F, C, H, W]; returns the velocity [F, C, H, W], guided.

        prompts: of the texts of the pass, by number, for each branch; none for those of the branches. Branches without
        a weight run only where the pass writes to their past. A branch that does not run a frame has velocity 0 there.
        """
        guidance = state.preset.sampler.guide
        timesteps = {frame: group.timestep for group in run.groups for frame in group.frames}
        levels = [timesteps[frame] for frame in run.frames]
        weighted = guidance.branches_at([group.timestep for group in run.groups if group.denoised])
        velocities = yield from self.branch_passes(state, run, latents, record, prompts)
        if not weighted:
            return torch.zeros_like(latents)
        none = torch.zeros_like(latents)
        return guided(guidance, {number: velocities.get(number, none) for number in weighted}, levels)

    def branch_passes(
        self,
        state: SessionState,
        run: Pass,
        latents: Tensor,
        record: BlockRecord | None,
        prompts: Sequence[Mapping[int, Handle]] = (),
    ) -> BlockSteps[dict[int, Tensor]]:
        """Run one pass over latents [F, C, H, W] in the branches that it needs; returns velocities by their number."""
        guidance, velocities = state.preset.sampler.guide, dict[int, Tensor]()
        timed: AbstractContextManager[None] = nullcontext() if record is None else record.one_pass()
        with timed:
            if self.resources.branches_apart:
                return self.branches_together(state, run, latents, prompts)
            for number, branch in enumerate(state.branches):
                own = branch_run(guidance, run, number)
                if own is None:
                    continue
                others = prompts[number] if prompts else {}
                if own.frames == run.frames:
                    velocities[number] = yield self.request(state, branch, own, latents, others)
                    continue
                velocity = torch.zeros_like(latents)
                rows = [run.frames.index(frame) for frame in own.frames]
                put_rows(velocity, rows, (yield self.request(state, branch, own, rows_of(latents, rows), others)))
                velocities[number] = velocity
        return velocities

    def branches_together(
        self, state: SessionState, run: Pass, latents: Tensor, prompts: Sequence[Mapping[int, Handle]] = ()
    ) -> dict[int, Tensor]:
        """`branch_passes` where branches have ranks of their own, which run them at the same time."""
        guidance, plans, velocities = state.preset.sampler.guide, list[BranchPass](), dict[int, Tensor]()
        for number, branch in enumerate(state.branches):
            if (own := branch_run(guidance, run, number)) is None:
                continue
            velocities[number] = torch.zeros_like(latents)
            rows = tuple(run.frames.index(frame) for frame in own.frames)
            others = prompts[number] if prompts else {}
            request = self.request(state, branch, own, latents, others)
            try:
                plan = self.plan([request], branch.cache.layout(own))
            finally:
                branch.cache.end_pass()
            plans.append(BranchPass(branch.number, rows, plan))
        with shortages_named():
            results = self.resources.client.execute(GuidedPass(tuple(plans)), latents[None])
        for velocity, branch_plan, result in zip(velocities.values(), plans, results, strict=True):
            put_rows(velocity, branch_plan.frames, result[0])
        return velocities

    def answer(self, requests: Sequence[ForwardRequest]) -> list[ForwardResult]:
        """Return the results of requests, in order; compatible ones run as one batch, or several of the sizes that the
        executor has programs for.
        """
        sizes = self.resources.config.executor_spec.batch_sizes
        runs = [run for group in group_compatible(requests) for run in in_sizes(group, sizes)]
        groups = [(run, self.answer_group(run)) for run in runs]
        results = {request: result for group, answers in groups for request, result in zip(group, answers, strict=True)}
        return [results[request] for request in requests]

    def answer_group(self, requests: Sequence[ForwardRequest]) -> Sequence[ForwardResult]:
        """Return the results of one batch; if it fails, run each request by itself to isolate the failure."""
        try:
            with shortages_named():
                return self.forward(requests)
        except Exception as error:  # of any kind: it is its session's, whose reader gets it
            if len(requests) == 1:
                return [error]
            message = str(error)  # the error itself would keep tensors alive by its traceback
        results = [result for request in requests for result in self.answer_group([request])]
        if not any(isinstance(result, Exception) for result in results):
            self.split_batches(len(requests), message)
        return results

    def forward(self, requests: Sequence[ForwardRequest]) -> list[Tensor]:
        """Run one pass, or whole blocks, for compatible requests; returns the result [F, C, H, W] of each."""
        caches = [request.branch.cache for request in requests]
        try:
            first = [request.before for request in requests if request.before is not None]
            before = layout_together(caches, first) if first else None  # it writes pages that the block then reads
            return self.execute(requests, layout_together(caches, [request.run for request in requests]), before)
        finally:
            for cache in caches:
                cache.end_pass()

    def execute(
        self, requests: Sequence[ForwardRequest], layout: PassLayout, before: PassLayout | None = None
    ) -> list[Tensor]:
        """Have the worker run one pass, or whole blocks; returns the result [F, C, H, W] of each request.

        before: of the first pass of whole blocks, where it commits the blocks before.
        """
        plan = replace(self.plan(requests, layout), before=before)
        if plan.whole and before is None:
            (result,) = self.resources.client.execute(plan)
            return list(result)
        alone = len(requests) == 1  # then nothing is copied
        latents = requests[0].latents[None] if alone else torch.stack([request.latents for request in requests])
        if self.resources.branches_apart:
            branch = BranchPass(requests[0].branch.number, tuple(range(latents.shape[1])), plan)
            (result,) = self.resources.client.execute(GuidedPass((branch,)), latents)
        else:
            (result,) = self.resources.client.execute(plan, latents)
        return list(result)

    def plan(self, requests: Sequence[ForwardRequest], layout: PassLayout) -> PassPlan:
        """The plan of one pass of some requests, or of whole blocks."""
        return PassPlan(
            layout=layout,
            timesteps=tuple(request.run.timesteps for request in requests),
            texts=tuple(request.texts for request in requests),
            actions=tuple(request.actions for request in requests if request.actions),
            whole=tuple(request.whole for request in requests if request.whole is not None),
            condition=requests[0].run.condition,
            weights=requests[0].run.weights,
            frames=tuple(request.given.number for request in requests if request.given is not None),
        )

    # Outside of a block

    @torch.no_grad()
    def run_alone(self, steps: BlockSteps[T]) -> T:
        """Run steps to their end with no other session; return their result or raise their error."""
        (result,) = run_lockstep([steps], self.answer)
        return result

    def velocity(self, state: SessionState, run: Pass, latents: Tensor) -> Tensor:
        """Run one pass by itself; returns its velocity [F, C, H, W]."""
        return self.run_alone(self.network_pass(state, run, latents))

    @torch.no_grad()
    def cache_prefix(self, state: SessionState, latents: Tensor) -> None:
        """Commit given latents [F, C, H, W] block by block, and decode them for the decoder's state."""
        frames = []
        while state.timeline.next_frame < len(latents):
            span = state.timeline.admit(given=True)
            state.timeline.follow_rest(state.actions.resting_since(span.frames.start - 1))
            part = latents[span.frames.start : span.frames.stop]
            self.run_alone(self.commit(state, span, part))
            pixels = state.decoder.advance(part)
            state.remember(part, pixels, self.resources.spec.vae_stride[0])
            frames.append(to_frames(pixels))
        if state.clamped is not None:
            frames.append(to_frames(state.decoder.advance(state.clamped)))
        state.prefix_frames = np.concatenate(frames)
