"""The engine: a loaded model, the sessions opened on it, and the block loop.

`Engine.step` is the loop's body: whose turn it is, then those sessions' blocks: prepare, denoise, commit, finish.
Which frames and positions a pass has is for `timeline` to say, how sessions come, wait and end for `host`, and which
run as one for `scheduler`; tensors are here, in the caches and in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InferixError, UsageError, quoted
from ..graphs.passes import Pass
from ..models.text.umt5 import clean_prompt, load_prompt_embeds
from ..models.wan.spec import MODELS
from ..models.wan.taehv import TinyDecoder
from ..models.wan.vae_checkpoint import Decoder
from ..schemes.actions import ActionTrack, check_action
from ..schemes.block_schedule import (
    commit_pass,
    denoise_pass,
    denoise_passes,
    rebuild_pass,
    recache_pass,
    reencodes_head,
    window_of,
)
from ..schemes.presets import FIELDS, Preset, default_model, default_preset, make_preset, no_setting
from ..schemes.timeline import Span, Timeline
from .byte_sizes import parse_bytes
from .config import (
    DTYPES,
    EVERY_BLOCK,
    EngineConfig,
    default_device,
    default_dtype,
    default_executor,
    patterns,
)
from .execution.decode_pipeline import to_frames
from .execution.executors import Text, make_executor
from .execution.loading import SHIPPED, Components, load_components, random_components, shipped
from .execution.lora_adapter import Adapter
from .kv.kv_manager import KVMemory
from .kv.page_store import KV_DTYPES
from .kv.paged_cache import bind_together
from .limits import Limits
from .media_input import read_image, read_video
from .noise import Noise, PhiloxNoise
from .programs.graph_store import card_of
from .sampler import Sampler, noised
from .sessions.batch_profile import BatchTimes, read_times
from .sessions.branch import Branch, InFlight, PromptChange
from .sessions.control_queue import STEERING
from .sessions.engine_thread import FAILURES, shortages_named
from .sessions.lockstep import Answer, Ask, Making, alike, side_by_side
from .sessions.session import Session
from .sessions.session_manager import Host
from .sessions.session_state import Beginning
from .streams import make_current, to_device
from .telemetry.profile import Profile, measure_ceilings

Pixels = NDArray[np.uint8]
T = TypeVar("T")


class Engine:
    """A model ready to run: weights, schedule and policy. Made by `load`."""

    def __init__(
        self, config: EngineConfig, preset: Preset, parts: Components, limits: Limits = Limits()  # noqa: B008
    ) -> None:
        self.config, self.preset, self.parts = config, preset, parts
        self.spec = parts.transformer.spec
        self.device = torch.device(config.device)
        make_current(self.device)
        self.dtype = DTYPES[config.dtype]
        self.executor = make_executor(config, preset, parts)
        self.adapter = Adapter(parts.transformer)
        self.profile: Profile | None = None
        kept = KV_DTYPES[config.kv_dtype] if config.kv_dtype is not None else self.dtype
        self.memory = KVMemory(self.spec, preset, (self.dtype, kept), self.device, config.kv_memory)
        self.host = Host(self, limits)
        if config.batches is not None:
            for size, times in read_times(Path(config.batches), self.timed_on).items():
                self.follow_times(size, times)

    def __repr__(self) -> str:
        config = self.config
        told = f"device={config.device!r}, dtype={config.dtype!r}, executor={config.executor!r}"
        return f"<Engine {self.parts.source!r}, preset={self.preset.name!r}, {told}>"

    @property
    def fps(self) -> int:
        """Pixel frames per second of the model's video."""
        return self.spec.fps

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.spec.default_size

    @torch.no_grad()
    def step(self) -> tuple[Session, ...]:
        """Make the next block of the sessions whose turn it is; of none where none can be made just now."""
        sessions = self.host.turn()
        side_by_side([self.lone_block(session, len(sessions)) for session in sessions], self.velocities)
        return sessions

    def lone_block(self, session: Session, batch: int) -> Making[None]:
        """One block of `batch` that are made side by side; what fails in it ends its session and no other."""
        with self.host.alone(session):
            self.host.begin(session, batch)
            yield from self.make_block(session)

    def make_block(self, session: Session) -> Making[None]:
        """One block, from what was told until now to its decoding, which goes on beside the next block."""
        with session.record.span("encode"):
            self.follow_controls(session)
        session.beginning = Beginning.of(session)  # where a block that memory runs out for is taken back to
        with session.record.span("prepare"):
            yield from self.follow_prompt(session)
            yield from self.rebuild_context(session)
        with session.record.span("denoise"):
            block = self.whole_block(session) if self.launches_whole(session) else (yield from self.denoise(session))
        with session.record.span("commit"):
            if self.preset.context.commit and not block.committed:
                yield from self.commit_pass(session, block.span, block.latents)
        if self.profile is not None:
            self.profile.end_block(block.span.index, session.record.seconds, partial(self.bytes_by_owner, session))
        self.host.finish(session, block.latents)

    def run(self, keep: bool = False) -> None:
        """Make blocks of all sessions that are asked for some until every session has ended.

        Streams are read in other threads meanwhile. With `keep`, go on until `halt()`, for sessions still to come.
        """
        self.host.drive(keep)

    def halt(self) -> None:
        """Have `run` return after the block that it is at; free to any thread."""
        self.host.driver.halt()

    def soon(self, call: Callable[[], T]) -> Future[T]:
        """Have the thread that drives the engine call something between two blocks; free to any thread."""
        return self.host.driver.soon(call)

    def hand_over(self) -> None:
        """Let another thread drive the engine: the next that calls it."""
        self.host.driver.hand_over()

    def observe(self, observer: Callable[[dict[str, Any]], None]) -> None:
        """Have each control's and each block's record told to `observer`, in the threads where they come about."""
        self.host.observers.append(observer)

    def use_lora(self, lora: str | Path | None, scale: float = 1.0) -> None:
        """Run all sessions with an adapter from their next blocks on, in place of the one put on before; None takes it
        off, and the weights are what they were.

        For the thread that drives the engine, between two blocks; from another, `soon(lambda: use_lora(path))`. Nothing
        is traced or captured again. An adapter of `load` stays below it. UsageError for one of another model.
        """
        if lora is None:
            self.adapter.take_off()
        else:
            self.adapter.put_on(lora, scale)
        self.follow_weights()

    @torch.no_grad()
    def follow_weights(self) -> None:
        """Go on with weights that were changed in place: what was made of them is made anew, nothing captured again."""
        self.executor.follow_weights()
        renewed: dict[int, tuple[Text, Text]] = {}  # by the old one's identity, which holds while that is kept
        for branch, rows in (told for session in self.host.sessions.values() for told in session.conditionings):
            if id(branch.text) not in renewed:
                renewed[id(branch.text)] = branch.text, self.executor.condition(rows)
            branch.text = renewed[id(branch.text)][1]

    def check_integrity(self) -> None:
        """InferixError unless every page in use is held by an open session, as often as it is counted."""
        self.host.check_integrity()

    def start_profile(self) -> Profile:
        """Have every pass timed from now on, and return what collects it. UsageError for executor eager."""
        config, card = self.config, card_of(self.device)
        about = f"{config.model}, preset {config.preset}, executor {config.executor}, {config.dtype}, on {card}"
        profile = Profile(about, self.device, measure_ceilings(self.device, self.dtype, config.lowp))
        self.executor.start_profile(profile)
        self.observe(profile.note_decoding)
        self.profile = profile
        return profile

    def bytes_by_owner(self, session: Session) -> dict[str, int]:
        """Memory of the engine and of one session's decoder, by what holds it."""
        pages = sum(store.nbytes for store in self.memory.stores.values())
        owned = {"weights": self.weight_bytes, "pages": pages, "decoder state": session.track.state.nbytes}
        return owned | self.executor.bytes_by_owner()

    @cached_property
    def weight_bytes(self) -> int:
        """Of the transformer and the decoder."""
        modules = (self.parts.transformer, self.parts.vae)
        return sum(tensor.nbytes for module in modules for tensor in module.parameters())

    def metrics(self) -> dict[str, Any]:
        """Counters, gauges and histograms since the engine was loaded, as plain data."""
        return self.host.metrics.as_dict(self.host.gauges())

    def follow_times(self, size: tuple[int, int], times: BatchTimes) -> None:
        """Have blocks of sessions of `size` (width, height) run as one where these measured times say so."""
        self.host.scheduler.batch_times[size] = times

    @property
    def timed_on(self) -> dict[str, Any]:
        """What block times depend on beside the size of pictures, as plain values."""
        config, preset = self.config, {key: value for key, value in asdict(self.preset).items() if key != "about"}
        chosen = {key: getattr(config, key) for key in ("dtype", "kv_dtype", "executor", "precision")}
        threads = torch.get_num_threads() if self.device.type == "cpu" else None
        return {"model": asdict(self.spec), "preset": preset, "card": card_of(self.device), "threads": threads} | chosen

    def launches_whole(self, session: Session) -> bool:
        """Whether the next block can be one launch: its noise is a function of the seed, and no frame is held."""
        held = session.clamped is not None and session.timeline.next_frame == 0
        plain = isinstance(session.noise, PhiloxNoise) and session.sampler.strength == 1
        return self.executor.whole_blocks and plain and not held

    def whole_block(self, session: Session) -> InFlight:
        """All steps and the commit of a block that is alone in flight, in one launch."""
        block, (branch,) = self.admit(session), session.branches
        assert isinstance(session.noise, PhiloxNoise)
        frames, seed = block.span.frames, session.noise.seed
        run = denoise_pass(session.timeline, [block], session.sampler.timesteps).run
        self.hold(session, run)
        bound, actions = branch.cache.bind(run), self.actions_of(session, run)
        with session.record.one_pass():
            block.latents = self.executor.block(block.latents, branch.text, bound, frames, seed, actions)
        branch.cache.settle()
        self.check_finite(block)
        block.committed = self.preset.context.commit
        return block

    def denoise(self, session: Session) -> Making[InFlight]:
        """Passes over the blocks in flight until the first of them is clean; others join as the schedule says."""
        flight, timesteps = session.flight, session.sampler.timesteps
        clean = frozenset({0} if session.clamped is not None else ())
        for scheduled in denoise_passes(session.timeline, flight, timesteps, partial(self.admit, session), clean):
            self.hold(session, scheduled.run)
            latents = torch.cat([block.latents for block in flight])
            velocity = yield from self.network_pass(session, scheduled.run, latents)
            for block, part in zip(flight, velocity.split([len(block.latents) for block in flight]), strict=True):
                self.advance(session, block, part)
        return flight.pop(0)

    def admit(self, session: Session) -> InFlight:
        """The next block, as noise, or as a given video that noise is added to."""
        span = session.timeline.admit()
        latents = self.draw(session, span, 0)
        if session.source is not None:
            given = session.source[span.frames.start : span.frames.stop]
            if len(given) < len(span.frames):
                raise InferixError(f"the video ends before block {span.index}; ask for {span.index} blocks")
            latents = noised(given, latents, session.sampler.sigmas[0])
        block = InFlight(span, latents, session.sampler.begin())
        self.clamp(session, block)
        return block

    def advance(self, session: Session, block: InFlight, velocity: Tensor) -> None:
        """One solver step of one block."""
        step = block.step
        block.latents = block.solver.advance(
            block.latents, velocity, step, lambda: self.draw(session, block.span, step + 1)
        )
        block.step += 1
        self.clamp(session, block)
        self.check_finite(block)

    def check_finite(self, block: InFlight) -> None:
        if not torch.isfinite(block.latents).all():
            raise InferixError(f"block {block.span.index} is not finite; try dtype float32 or another checkpoint")

    def clamp(self, session: Session, block: InFlight) -> None:
        if session.clamped is not None and block.span.frames.start == 0:
            block.latents = torch.cat((session.clamped, block.latents[len(session.clamped) :]))

    def commit_pass(self, session: Session, span: Span, latents: Tensor) -> Making[None]:
        """One pass over the clean latents, for the keys and values it leaves in the cache."""
        run = commit_pass(session.timeline, span).run
        self.hold(session, run)
        yield from self.network_pass(session, run, latents)

    def hold(self, session: Session, run: Pass) -> None:
        """Roll the caches to what a pass that writes is going to see; others see what is held."""
        window = window_of(run)
        if window is not None:
            for branch in session.branches:
                branch.cache.hold(window)
            session.timeline.forget(window)

    def network_pass(self, session: Session, run: Pass, latents: Tensor) -> Making[Tensor]:
        """One pass of the network over latents [F, C, H, W]; makes the velocity, guided where there are two."""
        actions, velocities = self.actions_of(session, run), []
        with session.record.one_pass():
            for branch in session.branches:
                velocities.append((yield Ask(branch, run, latents, actions)))
        if len(velocities) == 1:
            return velocities[0]
        prompted, plain = velocities
        return plain + self.preset.sampler.guidance_scale * (prompted - plain)

    def velocities(self, asked: Sequence[Ask]) -> list[Answer]:
        """Answers to passes that blocks ask for; those that match are one run."""
        answers = {ask: answer for asks in alike(asked) for ask, answer in zip(asks, self.answers(asks), strict=True)}
        return [answers[ask] for ask in asked]

    def answers(self, asks: Sequence[Ask]) -> Sequence[Answer]:
        """Velocities by one run of passes that match; where that fails, each by itself, so that one fails alone."""
        try:
            with shortages_named():
                return self.forward(asks)
        except FAILURES as error:
            if len(asks) == 1:
                return [error]
            said = str(error)  # and not where it came from, which holds memory
        answers = [answer for ask in asks for answer in self.answers([ask])]
        if not any(isinstance(answer, Exception) for answer in answers):
            self.host.batch_failed(len(asks), said)
        return answers

    def forward(self, asks: Sequence[Ask]) -> list[Tensor]:
        """The network's velocity for each of some passes that match, in one run."""
        caches, told = [ask.branch.cache for ask in asks], [ask.run.timesteps for ask in asks]
        latents = torch.stack([ask.latents for ask in asks])
        timesteps = torch.tensor(told, dtype=torch.float32, device=self.device)
        text = self.executor.join([ask.branch.text for ask in asks])
        actions = [ask.actions for ask in asks if ask.actions is not None]
        try:
            bound = bind_together(caches, [ask.run for ask in asks])
            velocity = self.executor.forward(latents, timesteps, text, bound, torch.cat(actions) if actions else None)
        finally:
            for cache in caches:
                cache.settle()
        return list(velocity)

    def velocity(self, session: Session, run: Pass, latents: Tensor) -> Tensor:
        """One pass outside of a block."""
        return self.at_once(self.network_pass(session, run, latents))

    def commit(self, session: Session, span: Span, latents: Tensor) -> None:
        """Leave keys and values of clean latents in the cache, outside of a block."""
        self.at_once(self.commit_pass(session, span, latents))

    @torch.no_grad()
    def at_once(self, block: Making[T]) -> T:
        """Take what asks for passes to its end by itself; returns what it makes, raises what ends it."""
        (made,) = side_by_side([block], self.velocities)
        return made

    def actions_of(self, session: Session, run: Pass) -> Tensor | None:
        """What each frame of a pass is told to do, [1, F, action_dim]; None for a model that follows text alone."""
        if self.spec.action_dim is None:
            return None
        told = torch.tensor([[session.actions.of(frame) for frame in run.frames]], device=self.device)
        return F.one_hot(told, self.spec.action_dim).to(self.dtype)

    def draw(self, session: Session, span: Span, draw: int) -> Tensor:
        shape = (self.spec.out_channels, *self.spec.latent_size(session.size))
        return to_device(session.noise.draw(span.index, span.frames, draw, shape), self.device, self.dtype)

    def rebuild_context(self, session: Session) -> Making[None]:
        """Make the context anew from the last clean latents, where the policy asks for it."""
        scheduled = rebuild_pass(session.timeline)
        if scheduled is None:
            return
        run = scheduled.run
        latents = session.recent_frames(run.frames)
        if reencodes_head(self.preset, run) and session.pixels is not None:
            head = self.parts.vae.encode(session.pixels[:1], self.parts.vae.new_state())
            latents = torch.cat((head, latents[1:]))
        for branch in session.branches:
            branch.cache.clear()
        self.hold(session, run)
        yield from self.network_pass(session, run, latents)
        if self.preset.context.restart_decoder:
            self.host.settle(session)
            session.track.restart(session.next_block, latents)

    def follow_controls(self, session: Session) -> None:
        """Take in what the session was told since its last block began."""
        for control in session.mailbox.take(STEERING):
            refused = None
            if control.kind == "act":
                session.actions.tell(session.timeline.next_frame, control.value)
            else:
                try:
                    self.change_prompt(session, *control.value)
                except UsageError as error:
                    refused = str(error)
            shown = session.timeline.next_block if control.kind == "act" else session.next_block
            self.host.applied(session, control, shown, refused)

    def change_prompt(self, session: Session, text: str | None, embeds: Tensor | str | Path | None) -> None:
        """Take note of a new prompt; the next block follows it."""
        policy, prefix = self.preset.context, self.preset.scene_cut_prefix
        new = self.prompt_rows(text, embeds)
        if text is not None and prefix and text.startswith(prefix.strip()):
            session.timeline.cut_shot()
        blocks = policy.blend_blocks if policy.prompt_switch == "blend" else 1
        session.change = PromptChange(session.rows, new, blocks, blocks)

    def follow_prompt(self, session: Session) -> Making[None]:
        """Move the conditioning towards a prompt that was asked for."""
        change = session.change
        if change is None:
            return
        change.left -= 1
        session.rows = torch.lerp(change.old, change.new, 1 - change.left / change.blocks)
        session.branches[0].text = self.executor.condition(session.rows)
        if change.left == 0:
            session.change = None
        yield from self.recache(session)

    def recache(self, session: Session) -> Making[None]:
        """Pass the visible past through the network under the prompt in force, where the policy asks for it."""
        scheduled = recache_pass(session.timeline)
        if scheduled is None:
            return
        run = scheduled.run
        latents = session.recent_frames(run.frames)
        if scheduled.clears_cache:
            session.branches[0].cache.clear()
        session.branches[0].cache.hold(run.groups[-1].context)
        yield Ask(session.branches[0], run, latents, self.actions_of(session, run))
        session.beginning = Beginning.of(session)  # once is enough: by another time a moving sink has moved

    @torch.no_grad()
    def open(
        self,
        prompt: str | None = None,
        prompt_embeds: Tensor | str | Path | None = None,
        seed: int = 0,
        image: Pixels | str | Path | None = None,
        video: Pixels | str | Path | None = None,
        strength: float | None = None,
        negative_prompt: str | None = None,
        negative_embeds: Tensor | str | Path | None = None,
        noise: Noise | None = None,
        size: tuple[int, int] | None = None,
        actions: Sequence[str] = (),
        fit: str = "crop",
    ) -> Session:
        """Begin a stream of pictures of `size` (width, height).

        prompt or prompt_embeds ([L, text_dim] or a safetensors file) says what to show. image or video (uint8
        [H, W, 3], [T, H, W, 3], or a file) is what the stream goes on from; with `strength` in (0, 1] the video
        is what it is made from, the more freely the higher. The negative prompt is for presets with guidance.
        `noise` replaces the noise that `seed` gives. `actions` are those of latent frames 1, 2, ...
        `fit` (crop, pad, stretch) is how files of other proportions are brought to `size`; a video file is sampled at
        the model's rate. Raises UsageError for input that cannot be used.
        """
        size = size or self.default_size
        if strength is not None and video is None:
            raise UsageError(f"strength is {strength}, but there is no video to start from; give one (--video)")
        for action in actions:
            check_action(action, self.spec.actions)
        sampler = Sampler(self.preset.sampler, 1.0 if strength is None else strength)
        rows = self.prompt_rows(prompt, prompt_embeds)
        texts = [rows]
        if self.preset.sampler.guidance_scale != 1:
            texts.append(self.negative_rows(negative_prompt, negative_embeds))
        elif negative_prompt is not None or negative_embeds is not None:
            raise UsageError(f"{self.preset.name} uses no guidance, so a negative prompt would do nothing; drop it")
        source = clamped = prefix = None
        if video is not None and strength is not None:
            source = self.encoded(self.pixels_of(video, size, False, fit), keep_end=False)
        elif image is not None and self.preset.context.image == "clamp" and video is None:
            clamped = self.encoded(self.pixels_of(image, size, True, fit), keep_end=False, whole_blocks=False)
        elif image is not None or video is not None:
            prefix = self.prefix_latents(image, video, size, fit)
        session = Session(
            engine=self,
            timeline=Timeline(self.preset),
            sampler=sampler,
            size=size,
            noise=noise if noise is not None else PhiloxNoise(seed, str(self.device)),
            rows=rows,
            branches=[self.new_branch(text, size) for text in texts],
            negative=texts[1] if len(texts) > 1 else None,
            actions=ActionTrack(self.spec.actions, actions),
            source=source,
            clamped=clamped,
        )
        if prefix is not None:
            session.entering = partial(self.cache_prefix, session, prefix)
        self.host.join(session)
        return session

    def new_branch(self, rows: Tensor, size: tuple[int, int]) -> Branch:
        """One conditioning without a past, from the text encoder's rows."""
        return Branch(self.executor.condition(rows), self.memory.new_cache(size))

    def prompt_rows(self, prompt: str | None, embeds: Tensor | str | Path | None, empty: bool = False) -> Tensor:
        """The text encoder's rows [text_len, text_dim] of a prompt, which may be empty if `empty`, or those given."""
        if embeds is not None and prompt is None:
            rows = load_prompt_embeds(embeds, self.spec.text_len, self.spec.text_dim)
            return rows.to(self.device, self.dtype)
        if embeds is not None or prompt is None:
            raise UsageError("give a prompt (--prompt) or prompt_embeds (--prompt-embeds), and not both")
        self.check_prompt(prompt, empty)
        assert self.parts.text is not None
        return self.parts.text().encode(prompt).to(self.device, self.dtype)

    def check_prompt(self, prompt: object, empty: bool = False) -> None:
        """UsageError for a prompt that no text encoder could take, or where there is none; see `clean_prompt`."""
        if not isinstance(prompt, str):
            raise UsageError(f"the prompt is {quoted(prompt)}; expected text")
        clean_prompt(prompt, empty)
        if self.parts.text is None:
            raise UsageError(
                f"{self.parts.source} has no text encoder; give base= (--base), a folder that has one, "
                "or prompt_embeds (--prompt-embeds)"
            )

    def negative_rows(self, prompt: str | None, embeds: Tensor | str | Path | None) -> Tensor:
        if prompt is None and embeds is None:
            raise UsageError(
                f"{self.preset.name} guides away from a negative prompt; give negative_prompt "
                "(--negative-prompt), or set guidance_scale=1"
            )
        return self.prompt_rows(prompt, embeds, empty=True)

    def pixels_of(self, given: Any, size: tuple[int, int], still: bool, fit: str = "crop") -> Pixels:
        """Frames uint8 [T, H, W, 3] of an image or video, from a file or an array; UsageError if they do not fit."""
        if isinstance(given, str | Path):
            pixels = read_image(given, size, fit)[None] if still else read_video(given, size, self.fps, fit)
        else:
            pixels = given[None] if given.ndim == 3 else given
        if pixels.ndim != 4 or pixels.shape[1:] != (size[1], size[0], 3) or pixels.dtype != np.uint8:
            raise UsageError(
                f"image or video is {pixels.dtype} {list(pixels.shape)}; expected uint8 frames of "
                f"{[size[1], size[0], 3]}"
            )
        return pixels

    def prefix_latents(self, image: Any, video: Any, size: tuple[int, int], fit: str = "crop") -> Tensor:
        """What the stream goes on from, as latents of whole blocks, the end of a video kept."""
        if image is not None and video is not None:
            raise UsageError("image and video both begin the stream; give one of them")
        still = image is not None
        return self.encoded(self.pixels_of(image if still else video, size, still, fit), keep_end=True)

    def encoded(self, pixels: Pixels, keep_end: bool, whole_blocks: bool = True) -> Tensor:
        """Latents of uint8 frames, cut to whole blocks at the start or the end; UsageError if too few."""
        stride, step = self.spec.vae_stride[0], self.preset.num_frame_per_block
        frames = (len(pixels) - 1) // stride + 1
        first = self.preset.block_size(0)
        if whole_blocks:
            if frames < first:
                raise UsageError(
                    f"{len(pixels)} frames are too few to begin with: the first block of {self.preset.name} needs "
                    f"{(first - 1) * stride + 1}; set independent_first_frame=true or use a preset with blocks "
                    "of one frame"
                )
            frames = first + (frames - first) // step * step
        kept = (frames - 1) * stride + 1
        pixels = pixels[len(pixels) - kept :] if keep_end else pixels[:kept]
        state = self.parts.vae.new_state()
        latents = []
        for part in np.split(pixels, range(1, kept, stride)):  # a long video is never there in floating point
            scaled = torch.from_numpy(part.copy()).to(self.device, self.dtype).permute(0, 3, 1, 2) / 127.5 - 1
            latents.append(self.parts.vae.encode(scaled, state))
        return torch.cat(latents)

    @torch.no_grad()
    def cache_prefix(self, session: Session, latents: Tensor) -> None:
        """Commit given latents block by block, and let the decoder see them, so that both go on from there."""
        frames = []
        while session.timeline.next_frame < len(latents):
            span = session.timeline.admit(given=True)
            part = latents[span.frames.start : span.frames.stop]
            self.commit(session, span, part)
            pixels = session.track.vae.decode(part, session.track.state)
            session.remember(part, pixels)
            frames.append(to_frames(pixels))
        session.prefix_frames = np.concatenate(frames)

    @property
    def decoder(self) -> Decoder:
        """What new pictures are made with."""
        fast = self.parts.fast_vae
        return fast if fast is not None and self.host.scheduler.took("decoder") else self.parts.vae

    def blocks_for(self, seconds: float) -> int:
        """How many blocks make at least that many seconds of video from the start."""
        if not 0 < seconds < float("inf"):
            raise UsageError(f"seconds is {seconds}; expected a number above 0")
        return self.blocks_for_frames(-(-(round(seconds * self.fps) - 1) // self.spec.vae_stride[0]) + 1)

    def blocks_for_frames(self, latent_frames: int) -> int:
        """How many blocks make at least that many latent frames from the start."""
        blocks = frames = 0
        while frames < latent_frames:
            frames += self.preset.block_size(frames)
            blocks += 1
        return blocks

    def describe(self) -> dict[str, Any]:
        """Every setting, as plain values."""
        return {
            "config": asdict(self.config),
            "preset": asdict(self.preset),
            "network_timesteps": Sampler(self.preset.sampler).timesteps,
            "model": asdict(self.spec),
            "vae": asdict(self.parts.vae.spec),
            "checkpoint": {"source": self.parts.source, "format": self.parts.form, "sha256": self.parts.digest()},
        }


def load(
    model: str | Path | None = None,
    preset: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    base: str | Path | None = None,
    checkpoint_format: str | None = None,
    vae: str | Path | None = None,
    text_encoder: str | Path | None = None,
    use_ema: bool = True,
    precision: str = "reference",
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    kv_memory: int | str | None = None,
    kv_dtype: str | None = None,
    kv_offload: bool = False,
    executor: str | None = None,
    fast_vae: str | Path | None = None,
    graphs: str | Path | None = None,
    lowp: str | None = None,
    lowp_layers: str | Sequence[str] = EVERY_BLOCK,
    lowp_keep: str | Sequence[str] = (),
    batches: str | Path | None = None,
    limits: Limits = Limits(),  # noqa: B008
    **overrides: Any,
) -> Engine:
    """An engine for a checkpoint (file or folder), or for a named model with random weights.

    Without a model, the small world in the package, or `wan-tiny` where the preset is another. Without a preset,
    the named model's own, or self-forcing.

    Any field of the preset can be overridden: `local_attn_size=6, sink_size=0`. Raises UsageError for
    unknown names and bad values, InferixError for broken files.
    """
    for key in overrides:
        if key not in FIELDS:
            raise no_setting(key, {*FIELDS, *(load.__kwdefaults__ or ()), "model", "preset"})
    model = default_model(preset) if model is None else model
    preset = preset or default_preset(str(model))
    config = EngineConfig(
        model=str(model),
        preset=preset,
        device=(device := device or default_device()),
        dtype=dtype or default_dtype(device),
        base=str(base) if base is not None else None,
        checkpoint_format=checkpoint_format,
        vae=str(vae) if vae is not None else None,
        text_encoder=str(text_encoder) if text_encoder is not None else None,
        use_ema=use_ema,
        precision=precision,
        lora=str(lora) if lora is not None else None,
        lora_scale=lora_scale,
        kv_memory=None if kv_memory is None else parse_bytes(kv_memory),
        kv_dtype=kv_dtype,
        kv_offload=kv_offload,
        executor=executor or default_executor(device),
        fast_vae=str(fast_vae) if fast_vae is not None else None,
        graphs=str(graphs) if graphs is not None else None,
        lowp=lowp,
        lowp_layers=patterns(lowp_layers),
        lowp_keep=patterns(lowp_keep),
        batches=str(batches) if batches is not None else None,
    )
    scheme = make_preset(preset, **overrides)
    named = str(model) in MODELS and not Path(model).exists()
    if named and str(model) in SHIPPED:
        found = load_components(replace(config, model=str(shipped(str(model)))))
        parts = replace(found, source=str(model))  # its name, wherever the package lies
    else:
        parts = random_components(MODELS[str(model)], config) if named else load_components(config)
    if scheme.context.reencode_head and isinstance(parts.vae, TinyDecoder):
        raise UsageError(f"{preset} encodes pictures again, which the tiny decoder cannot; leave vae out (--vae)")
    return Engine(config, scheme, parts, limits)
