"""The engine: what a user calls. It joins a loaded model, the sessions opened on it, and the block loop.

A step picks sessions and makes one block of each: see `step` and `_one_block`. `sessions` decides who runs and
delivers, `block_loop` makes a block, `inputs` encodes what the user gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import AtCapacity, UsageError, quoted
from ..models.spec import ModelSpec
from ..schemes.actions import ActionTrack, check_action
from ..schemes.camera import Camera, CameraMove, CameraTrack, Poses
from ..schemes.presets import Preset
from ..schemes.timeline import Timeline
from .arguments import (
    Check,
    above_zero,
    callback,
    checked,
    choice,
    embeddings,
    flag,
    instance,
    integer,
    names,
    noise_source,
    number,
    optional,
    path,
    pixels,
    text,
)
from .arguments import size as picture_size
from .block_loop import BlockLoop
from .capacity.device_name import card_of
from .capacity.rank_planner import check_pictures
from .config import EngineConfig
from .execution.decode_pipeline import DecoderTrack
from .execution.executors import Executor
from .execution.loading import Components
from .inputs import Inputs, Pixels
from .kv.kv_manager import KVManager
from .limits import Limits
from .media_input import FITS
from .noise import SEED, Noise, PhiloxNoise
from .plans import RefreshWeights, UseAdapter
from .resources import make_resources
from .sampler import Sampler
from .sessions.batch_profile import BatchProfile, read_profiles
from .sessions.control_queue import BLOCK_CONTROLS
from .sessions.engine_thread import shortages_named
from .sessions.lockstep import BlockSteps, run_lockstep
from .sessions.session import Session
from .sessions.session_manager import SessionManager
from .sessions.session_state import Branch, SessionState
from .telemetry.profile import Profile, measure_ceilings
from .telemetry.ranges import NvtxRanges, Ranges, ranged
from .worker_client import Worker

T = TypeVar("T")

def by_block(name: str, value: Any) -> dict[int, str | Tensor | Path]:
    """Check prompts by the number of a block: texts, or embeddings."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} is {quoted(value)}; expected prompts by the number of their block")
    prompts: dict[int, str | Tensor | Path] = {}
    for block, given in value.items():
        number = integer(1)(f"a key of {name}", block)
        prompts[number] = given if isinstance(given, str) else embeddings(f"{name}[{block}]", given)
    return prompts


OPENING: dict[str, Check] = {  # the arguments of `Engine.open`
    "seed": SEED,
    "size": picture_size,
    "actions": names,
    "fit": choice(FITS),
    "strength": optional(above_zero(most=1)),
    "noise": optional(noise_source),
    "live": flag,
    "camera": optional(instance(Camera)),
    "prompt_mask": optional(instance(Tensor)),
    "prompts": optional(by_block),
    **dict.fromkeys(("prompt", "negative_prompt"), optional(text)),
    **dict.fromkeys(("prompt_embeds", "negative_embeds"), optional(embeddings)),
    **dict.fromkeys(("image", "video"), optional(pixels)),
}


class Engine:
    """A model ready to run: weights, preset and limits. Made by `load`.

    executor: in place of the one that `config` names, with the capabilities of that name. worker: in place of one in
    this process.
    """

    def __init__(
        self,
        config: EngineConfig,
        preset: Preset,
        parts: Components,
        limits: Limits = Limits(),  # noqa: B008
        executor: Executor | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.resources = make_resources(config, preset, parts, executor, worker)
        self.inputs = Inputs(self.resources)
        self.manager = SessionManager(
            self.resources, limits, self.step, self.inputs.check_prompt, self.inputs.continue_live
        )
        self.loop = BlockLoop(self.resources, self.manager.split_batches)
        self.profile: Profile | None = None
        self.layout_reason: str | None = None  # of the planner, where it chose the layout of the ranks
        if config.batches is not None:
            for size, times in read_profiles(Path(config.batches), self.timed_on).items():
                self.follow_times(size, times)

    def __repr__(self) -> str:
        config = self.config
        where = f"device={config.device!r}, dtype={config.dtype!r}, executor={config.executor!r}"
        return f"<Engine {self.parts.source!r}, preset={self.preset.name!r}, {where}>"

    # Sessions

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
        prompt_mask: Tensor | None = None,
        prompts: Mapping[int, str | Tensor | Path] | None = None,
        camera: Camera | None = None,
        live: bool = False,
    ) -> Session:
        """Open a stream of pictures of `size` (width, height).

        prompt or prompt_embeds ([L, text_dim] or a safetensors file) says what to show; prompt_mask ([L]) is 0 for rows
        that are not of the prompt. prompts: of later blocks by number, texts or embeddings; each is that of its block
        and of those after it, also where several blocks are in flight. image or video (uint8
        [H, W, 3], [T, H, W, 3], or a file) is what the stream continues; with `strength` in (0, 1] the video is what
        it is made from, the more freely the higher; `live`, with `strength`, says that such a video arrives meanwhile,
        by `Session.feed`. The negative prompt is for presets with guidance. `noise` replaces
        the noise that `seed` gives. `actions` are those of latent frames 1, 2, ...;
        `camera` is where a model that follows one looks from.
        `fit` (crop, pad, stretch) brings files of other proportions to `size`; a video file is sampled at the model's
        rate. Raises UsageError for input that cannot be used.
        """
        given = checked(OPENING, {
            "prompt": prompt, "prompt_embeds": prompt_embeds, "seed": seed, "image": image, "video": video,
            "strength": strength, "negative_prompt": negative_prompt, "negative_embeds": negative_embeds,
            "noise": noise, "size": self.default_size if size is None else size, "actions": actions, "fit": fit,
            "prompt_mask": prompt_mask, "prompts": prompts, "camera": camera,
            "live": live,
        })  # fmt: skip
        self.manager.check_owner("open()")
        try:
            with shortages_named():
                return self._open(**given)
        except (MemoryError, torch.OutOfMemoryError) as error:
            width, height = given["size"]
            reason = quoted(" ".join(str(error).split()))
            raise AtCapacity(f"no memory for a session of {width}x{height}: {reason}; give a smaller size") from error

    def _open(
        self,
        prompt: str | None,
        prompt_embeds: Tensor | Path | None,
        seed: int,
        image: Pixels | Path | None,
        video: Pixels | Path | None,
        strength: float | None,
        negative_prompt: str | None,
        negative_embeds: Tensor | Path | None,
        noise: Noise | None,
        size: tuple[int, int],
        actions: Sequence[str],
        fit: str,
        prompt_mask: Tensor | None,
        prompts: Mapping[int, str | Tensor | Path] | None,
        camera: Camera | None,
        live: bool,
    ) -> Session:
        preset, inputs = self.preset, self.inputs
        if prompts and preset.context.prompt_switch not in ("cut", "join"):
            raise UsageError(
                f"prompts are given by block, but prompt_switch is {quoted(preset.context.prompt_switch)}, which works "
                "between two blocks; call prompt() there, or use cut or join"
            )
        self.spec.latent_size(size)
        track = self._camera_track(camera, size)
        self._check_image(image, video)
        if self.parts.size not in (None, size):
            width, height = self.default_size
            raise UsageError(f"size is {size[0]}x{size[1]}, but this engine makes pictures of {width}x{height} only")
        check_pictures(self.spec, size, preset.sampler.guide, self.parts.shard)
        if live and (image is not None or video is not None or strength is None):
            raise UsageError("live is True; expected strength, and neither image nor video")
        if strength is not None and video is None and not live:
            raise UsageError(f"strength is {strength}, but there is no video to start from; give video, or live=True")
        for action in actions:
            check_action(action, self.spec.actions)
        sampler = Sampler(preset.sampler, 1.0 if strength is None else strength)
        rows = inputs.prompt_rows(prompt, prompt_embeds, mask=prompt_mask)
        negative = inputs.negative_rows(negative_prompt, negative_embeds)
        source = clamped = prefix = condition = None
        if video is not None and strength is not None:
            source = inputs.source_latents(video, size, fit)
        elif image is not None and preset.context.image == "channels":
            condition = inputs.image_condition(image, size, fit)
        elif image is not None and preset.context.image == "clamp" and video is None:
            clamped = inputs.clamped_latents(image, size, fit)
        elif image is not None or video is not None:
            prefix, clamped = inputs.prefix_latents(image, video, size, fit)
        live_video = inputs.begin_live(size) if live else None
        state = SessionState(
            size=size,
            timeline=Timeline(preset),
            sampler=sampler,
            noise=noise if noise is not None else PhiloxNoise(seed, str(self.device)),
            rows=rows,
            branches=Branch.for_prompts(self.resources, preset, rows, negative, size),
            actions=ActionTrack(self.spec.actions, actions),
            decoder=DecoderTrack(
                self.manager.decoder, preset.context.rewind_blocks, preset.context.decoder_zero_start
            ),
            negative=negative,
            source=source,
            live=live_video,
            clamped=clamped,
            prompts={
                block: inputs.prompt_rows(given, None) if isinstance(given, str) else inputs.prompt_rows(None, given)
                for block, given in (prompts or {}).items()
            },
            camera=track,
            image=condition,
        )
        return self.manager.open(state, None if prefix is None else partial(self.loop.cache_prefix, state, prefix))

    def _camera_track(self, camera: Camera | None, size: tuple[int, int]) -> CameraTrack | None:
        """Track of a stream's camera; UsageError for one too few or too many, and for too few poses."""
        spec = self.spec
        if spec.camera_channels is None:
            if camera is not None:
                raise UsageError(f"camera is given, but {spec.name} follows none, only its prompt; leave it out")
            return None
        if camera is None:
            raise UsageError(f"{spec.name} follows a camera, and there is none; give camera, a path or Camera()")
        stride, block = spec.vae_stride[0], self.preset.num_frame_per_block
        return CameraTrack.begin(camera, size, spec.default_size, stride, spec.fps, block)

    def _check_image(self, image: object, video: object) -> None:
        """UsageError for a model with condition channels without an image, or with a video."""
        if not self.spec.condition_channels:
            return
        if video is not None:
            raise UsageError(f"{self.spec.name} continues an image, not a video; give image")
        if image is None:
            raise UsageError(f"{self.spec.name} begins with an image, and there is none; give image")

    def check_integrity(self) -> None:
        """InferixError unless every page in use is held by an open session, as often as it is counted."""
        self.manager.check_integrity()

    @property
    def fault(self) -> str | None:
        """Reason why the engine makes no more blocks: its ranks have ended. None while it can; free to any thread."""
        return self.resources.fault

    # The loop

    @torch.no_grad()
    def step(self) -> tuple[Session, ...]:
        """Make the next block of the sessions whose turn it is; of none where none can be made now.

        RankFailed, in every session too, once the ranks of the engine have ended.
        """
        sessions = self.manager.prepare_step()
        if sessions:
            self.loop.finite.begin_step()
        with self.manager.thread.in_callback():  # noise and observers are the user's
            run_lockstep([self._one_block(session, len(sessions)) for session in sessions], self.loop.answer)
        return sessions

    def _one_block(self, session: Session, batch: int) -> BlockSteps[None]:
        """One block of a session, in step with `batch - 1` others: controls, passes, delivery."""
        manager = self.manager
        name = f"block {session.next_block} of {session.id[:8]}"
        with manager.isolate_failures(session), ranged(manager.ranges, name):
            manager.begin_block(session, batch)
            state, record = session.current, session.record
            with record.span("encode"):
                self._apply_controls(session)
            wait_for_decoder = partial(manager.settle, session)
            block = yield from self.loop.make_block(state, record, session.mark_rollback, wait_for_decoder)
            if self.profile is not None:
                self.profile.end_block(block.span.index, record.seconds, partial(self._bytes_by_owner, state))
            manager.finish_block(session, block.latents, block.check)

    def _apply_controls(self, session: Session) -> None:
        """Apply the actions and prompts that arrived since the session's last block began."""
        state = session.current
        for control in session.controls.pending(BLOCK_CONTROLS):
            refused = None
            if control.kind == "act":
                state.actions.set_from(state.timeline.next_frame, control.value)
            elif control.kind == "camera":
                self._move_camera(state, control.value)
            else:
                try:
                    self._change_prompt(state, *control.value)
                except UsageError as error:
                    refused = str(error)
            shown = state.next_block if control.kind == "prompt" else state.timeline.next_block
            session.mark_rollback()
            self.manager.acknowledge(session, control, shown, refused)

    def _move_camera(self, state: SessionState, value: CameraMove | Poses) -> None:
        """Have the camera follow keys or poses from the next block that begins."""
        assert state.camera is not None
        frame = state.timeline.next_frame
        if isinstance(value, CameraMove):
            state.camera.hold(frame, value, state.preset.block_size(frame))
        else:
            state.camera.follow(frame, value)

    def _change_prompt(
        self, state: SessionState, text: str | None, embeds: Tensor | str | Path | None, blend_blocks: int | None
    ) -> None:
        prefix = state.preset.scene_cut_prefix
        scene_cut = text is not None and bool(prefix) and text.startswith(prefix.strip())
        self.loop.change_prompt(state, self.inputs.prompt_rows(text, embeds), scene_cut, blend_blocks)

    def run(self, keep: bool = False) -> None:
        """Make blocks of all sessions that request some, until every session has ended.

        Streams are read in other threads meanwhile. With `keep`, run until `halt()`, for sessions still to be opened.
        """
        self.manager.run(flag("keep", keep))

    def halt(self) -> None:
        """Have `run` return after the current block, or at once if it has not begun yet; free to any thread."""
        self.manager.thread.halt()

    def soon(self, call: Callable[[], T]) -> Future[T]:
        """Call something between two blocks in the thread that drives the engine; free to any thread.

        What it raises is the future's, which is always answered: calls that a `run` leaves are made at its end, later
        ones end in SessionEnded until a thread is given the engine.
        """
        return self.manager.thread.call_soon(callback("call", call))

    def hand_over(self) -> None:
        """Release the engine to the next thread that calls it."""
        self.manager.thread.release_ownership()

    # Weights

    def use_lora(
        self, lora: str | Path | None, scale: float = 1.0, partial: bool = False, weights: str | None = None
    ) -> None:
        """Run all sessions with an adapter from their next blocks on, in place of the one applied before. None removes
        it and restores the weights exactly.

        For the thread that drives the engine, between two blocks; from another, `soon(lambda: use_lora(path))`. Nothing
        is traced or captured again. An adapter of `load` stays below it. weights: the set of weights that it changes
        in a model of several, such as `high-noise`; None for every set. UsageError for an adapter of another model, or
        of which only a part fits, unless `partial`, and for a set that the preset does not run.
        """
        lora, scale, partial = optional(path)("lora", lora), number("scale", scale), flag("partial", partial)
        self.manager.check_owner("use_lora()")
        if self.config.shard_weights:
            raise UsageError("use_lora changes whole weights, and shard_weights divides them; give lora to load")
        if self.parts.shard.stage.size > 1:
            raise UsageError("use_lora changes all layers, and parallel=layers divides them; give lora to load")
        names = self.preset.weight_sets
        if weights is not None and weights not in names:
            raise UsageError(
                f"weights is {quoted(weights)}; expected {' or '.join(names)}, or None for all, of {self.preset.name}"
            )
        sets = tuple(number for number, name in enumerate(names) if weights in (None, name))
        with torch.no_grad():
            self.resources.client.execute(UseAdapter(None if lora is None else str(lora), scale, partial, sets))
        self.refresh_derived_weights()

    @torch.no_grad()
    def refresh_derived_weights(self) -> None:
        """Recompute all tensors derived from the weights after an in-place change. Captured graphs stay valid."""
        self.resources.client.execute(RefreshWeights())

    # Measurements

    def metrics(self) -> dict[str, Any]:
        """Counters, gauges and histograms since the engine was loaded, as plain data."""
        return self.manager.metrics.as_dict(self.manager.gauges())

    def observe(self, observer: Callable[[dict[str, Any]], None]) -> None:
        """Call `observer` with the record of each control and each block, in the thread where it arises.

        An error that it raises becomes a warning. It may use `soon`, and no call that belongs between two blocks.
        """
        self.manager.delivery.observers.append(callback("observer", observer))

    def start_ranges(self, ranges: Ranges | None = None) -> None:
        """Mark sessions, blocks, stages, passes and decoding from now on, for a profiler that shows such ranges.

        ranges: where they go; by default NVTX, which `nsys profile` reads. UsageError for that without a GPU.
        """
        if ranges is None and self.device.type != "cuda":
            raise UsageError(f"NVTX ranges are for work on a GPU, and device is {quoted(str(self.device))}; use cuda")
        self.manager.ranges = ranges or NvtxRanges()

    def start_profile(self) -> Profile:
        """Time every pass from now on; returns the profile that collects them.

        UsageError for an executor that cannot be profiled.
        """
        config, card = self.config, card_of(self.device)
        about = f"{config.model}, preset {config.preset}, executor {config.executor}, {config.dtype}, on {card}"
        profile = Profile(about, self.device, measure_ceilings(self.device, self.dtype, config.lowp))
        for executor in dict.fromkeys(self.resources.executors):
            executor.start_profile(profile)
        self.manager.scheduler.batch_room = 1  # each block has passes of its own
        self.observe(profile.note_decoding)
        self.profile = profile
        return profile

    def _bytes_by_owner(self, state: SessionState) -> dict[str, int]:
        """Bytes of the engine and of one session's decoder, by owner."""
        pages = sum(store.nbytes for store in self.kv_manager.stores.values())
        owned = {"weights": self._weight_bytes, "pages": pages, "decoder state": state.decoder.state.nbytes}
        for executor in dict.fromkeys(self.resources.executors):
            for owner, count in executor.bytes_by_owner().items():
                owned[owner] = owned.get(owner, 0) + count
        return owned

    @cached_property
    def _weight_bytes(self) -> int:
        """Bytes of the transformer and the decoder."""
        modules = dict.fromkeys((*self.parts.transformers, self.parts.vae))
        return sum(tensor.nbytes for module in modules for tensor in module.parameters())

    def follow_times(self, size: tuple[int, int], times: BatchProfile) -> None:
        """Batch blocks of sessions of `size` (width, height) where these measured times favour it."""
        self.manager.scheduler.batch_profiles[picture_size("size", size)] = instance(BatchProfile)("times", times)

    @property
    def timed_on(self) -> dict[str, Any]:
        """Settings that block times depend on besides the size of pictures, as plain values."""
        config, preset = self.config, {key: value for key, value in asdict(self.preset).items() if key != "about"}
        chosen = {key: getattr(config, key) for key in ("dtype", "kv_dtype", "executor", "precision")}
        threads = torch.get_num_threads() if self.device.type == "cpu" else None
        return {"model": asdict(self.spec), "preset": preset, "card": card_of(self.device), "threads": threads} | chosen

    # Facts

    @property
    def config(self) -> EngineConfig:
        return self.resources.config

    @property
    def preset(self) -> Preset:
        """The preset in force: as loaded, its window narrowed where overload did so."""
        return self.manager.preset

    @property
    def parts(self) -> Components:
        return self.resources.parts

    @property
    def spec(self) -> ModelSpec:
        return self.resources.spec

    @property
    def device(self) -> torch.device:
        return self.resources.device

    @property
    def dtype(self) -> torch.dtype:
        return self.resources.dtype

    @property
    def executor(self) -> Executor:
        return self.resources.executor

    @property
    def kv_manager(self) -> KVManager:
        return self.resources.kv_manager

    @property
    def fps(self) -> int:
        """Pixel frames per second of the model's video."""
        return self.spec.fps

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.spec.default_size

    def blocks_for(self, seconds: float) -> int:
        """How many blocks make at least that many seconds of video from the start."""
        seconds = above_zero()("seconds", seconds)
        return self.blocks_for_frames(self.spec.latent_frames(round(seconds * self.fps)))

    def blocks_for_frames(self, latent_frames: int) -> int:
        """How many blocks make at least that many latent frames from the start."""
        return self.preset.blocks_for_frames(integer()("latent_frames", latent_frames))

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
