"""`inferix-run`: play an exported engine with numpy and its runtime alone.

The block schedule is that of the engine (`schemes`), the programs are those of the folder, and between them is little:
noise, angles, the solver's weights, and which frame is in which slot of the past. PyAV, if there, writes an MP4.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InferixError, UsageError, exit_code, one_line, quoted
from ..runtime.files import check_paths, write_atomically
from ..runtime.media import CONTAINERS, VideoWriter
from ..runtime.media_input import read_image, read_video
from ..runtime.y4m import STDOUT, Y4mWriter
from ..schemes.actions import ActionTrack, check_action, read_actions
from ..schemes.block_schedule import commit_pass, denoise_passes, recache_pass
from ..schemes.page_needs import needs_negative, window
from ..schemes.storyboard import Cue, schedule
from ..schemes.timeline import Span, Timeline
from .backends import LoadProgram, program_loader
from .network import Network, Texts
from .numerics import Array, normals
from .plan import FILE, read_plan
from .word_table import PromptTable

SEEN = 256  # least length in pixels of a video's longer side: smaller pictures are enlarged
EXAMPLE = 'example: inferix-run world/ --prompt "a blue fox in a meadow by day" --actions "8R 4U" --out fox.y4m'


class ExportedEngine:
    """The programs and the plan of a folder; `open` begins a stream.

    threads: of each program, 0 for one per core. load: makes a program from its file, by default the backend of the
    plan's target. Raises CheckpointError for a damaged folder, InferixError for a missing runtime.
    """

    def __init__(self, folder: str | Path, threads: int = 0, load: LoadProgram | None = None) -> None:
        self.plan = read_plan(folder)
        load = load or program_loader(self.plan, threads)
        paths = {name: self.plan.program(name) for name in self.plan["programs"]}
        self.programs = {name: load(path) for name, path in paths.items() if path is not None}
        self.prompts = PromptTable(self.plan["text"], self.plan.folder)

    def open(
        self, prompt: str, seed: int = 0, actions: Sequence[str] = (), negative_prompt: str | None = None,
        prefix: Array | None = None,
    ) -> Stream:  # fmt: skip
        """Begin a stream. prefix: pictures uint8 [T, H, W, 3] that it continues.

        UsageError for a prompt, an action or a prefix that the engine does not know.
        """
        if not 0 <= seed < 1 << 64:
            raise UsageError(f"seed is {seed}; expected a whole number in 0..2**64-1")
        needed, given, null = needs_negative(self.plan.preset), negative_prompt is not None, self.prompts.null
        if given > needed or (needed and not given and null is None):
            texts = [branch.text for branch in self.plan.preset.sampler.guide.branches]
            reason = "guidance" if "negative" in texts else "clean frames under a null caption"
            expected = f"one, for a preset with {reason}" if needed else "none, for a preset without guidance"
            raise UsageError(f"negative_prompt is {quoted(negative_prompt)}; expected {expected}")
        rows = self.prompts.encode(prompt)
        negative = np.zeros_like(rows) if negative_prompt is None else self.prompts.encode(negative_prompt)
        stream = Stream(self, rows, negative, seed, actions)
        if prefix is not None:
            stream.begin_with(prefix)
        return stream


@dataclass
class BlockInFlight:
    """A block being denoised. seen: draws of noise, then velocities, which a row of the solver's matrix weighs.

    texts: those that it follows; None for those in force.
    """

    span: Span
    seen: list[Array]
    latents: Array
    step: int = 0
    texts: Texts | None = None


@dataclass(frozen=True)
class MadeBlock:
    """latents [F, C, h, w] float32; frames uint8 [T, H, W, 3], none if it was not decoded; seconds by part."""

    index: int
    latents: Array
    frames: Array | None
    seconds: dict[str, float]


class Stream:
    """One stream of an exported engine."""

    def __init__(
        self, engine: ExportedEngine, rows: Array, negative: Array, seed: int, actions: Sequence[str]
    ) -> None:
        plan = engine.plan
        self.engine, self.plan, self.seed = engine, plan, seed
        names = tuple(plan["model"]["actions"])
        for action in actions:
            check_action(action, names)
        self.timeline, self.actions = Timeline(plan.preset), ActionTrack(names, actions)
        self.rows = rows
        self.change: tuple[Array, Array, int, int] | None = None  # old rows, new rows, blocks left, blocks
        self.network = Network(plan, engine.programs, engine.prompts, rows, negative, self.actions.of)
        self.flight: list[BlockInFlight] = []
        self.uncommitted: Array | None = None  # latents of the last block, which the next one's first pass commits
        self.latents: dict[int, Array] = {}  # clean latents by frame, as far back as a recache goes
        self.state = [np.zeros(shape, np.float32) for shape in plan["decoder"]["state"]]
        self.decoded = 0
        self.prefix_frames: Array | None = None  # of the pictures that it began with, decoded

    def begin_with(self, pictures: Array) -> None:
        """Encode pictures, the end of a video kept, commit them block by block, and decode them."""
        facts, (width, height) = self.plan.encoder, self.plan["size"]["picture"]
        if facts is None:
            raise UsageError("prefix is given, but the engine has no encoder; export it again with --prefixes")
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (height, width, 3):
            expected = f"uint8 [T, {height}, {width}, 3]"
            raise UsageError(f"prefix is {pictures.dtype} {list(pictures.shape)}; expected {expected}")
        first, later = facts["first_pictures"], facts["pictures"]
        if len(pictures) == 1:
            pictures = pictures.repeat(first, axis=0)
        preset = self.plan.preset
        frames = preset.whole_blocks((len(pictures) - first) // later + 1)
        if frames == 0:
            least = (preset.block_size(0) - 1) * later + first
            raise UsageError(f"prefix has {len(pictures)} pictures; expected {least} or more, as many as a block")
        pictures = pictures[len(pictures) - (frames - 1) * later - first :]
        state, latents = [np.zeros(shape, np.float32) for shape in facts["state"]], list[Array]()
        for part in np.split(pictures, range(first, len(pictures), later)):
            values = {f"state_{slot}": value for slot, value in enumerate(state)}
            values["pixels"] = np.ascontiguousarray(part.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1
            results = self.engine.programs["encode_next" if latents else "encode_first"](values)
            state = [results.get(f"next_{slot}", value) for slot, value in enumerate(state)]
            latents.append(results["latents"])
        made = []
        while self.timeline.next_frame < frames:
            span = self.timeline.admit(given=True)
            self.timeline.follow_rest(self.actions.resting_since(span.frames.start - 1))
            block = np.concatenate(latents[span.frames.start : span.frames.stop])
            self.commit(span, block)
            made.append(self.decode(block))
        self.prefix_frames = np.concatenate(made)

    def prompt(self, text: str) -> None:
        """Follow another prompt from the next block on, as the preset's `prompt_switch` says."""
        policy, prefix = self.plan.preset.context, self.plan.preset.scene_cut_prefix
        rows = self.engine.prompts.encode(text)
        if prefix and text.startswith(prefix.strip()):
            self.timeline.cut_shot()
        blends = policy.prompt_switch == "blend" and self.timeline.next_frame > 0
        blocks = policy.blend_blocks if blends else 1
        self.change = self.rows, rows, blocks, blocks

    def act(self, action: str) -> None:
        """Set the action of the next block's frames and all later ones."""
        self.actions.set_from(self.timeline.next_frame, action)

    def next_block(self, decode: bool = True) -> MadeBlock:
        """Make the next block: follow the prompt, denoise, commit, decode."""
        marks, policy = [time.perf_counter()], self.plan.preset.context
        changes = self.change is not None or self.timeline.pin_next
        if self.timeline.uncommitted is not None and changes and policy.clean_text == "prompt":
            assert self.uncommitted is not None
            self.commit(self.timeline.uncommitted, self.uncommitted)
            self.timeline.uncommitted = None
        self.follow_prompt()
        block = self.denoise()
        span, latents = block.span, block.latents
        marks.append(time.perf_counter())
        if policy.commit_in_next:
            self.timeline.uncommitted, self.uncommitted = span, latents
        else:
            self.commit(span, latents, block.texts)
        marks.append(time.perf_counter())
        pictures = self.decode(latents) if decode else None
        marks.append(time.perf_counter())
        seconds = dict(zip(("denoise", "commit", "decode"), np.diff(marks).tolist(), strict=True))
        return MadeBlock(span.index, latents, pictures, seconds)

    def follow_prompt(self) -> None:
        """Move one block further towards a new prompt, and recompute the past under it where the preset does so."""
        if self.change is None:
            return
        old, new, left, blocks = self.change
        share = 1 - (left - 1) / (blocks - 1) if blocks > 1 else 1.0
        self.rows = new if share == 1 else old + np.float32(share) * (new - old)
        self.change = (old, new, left - 1, blocks) if left > 1 else None
        if self.plan.preset.context.prompt_switch == "join":
            for block in self.flight:
                block.texts = block.texts or self.network.texts
        self.network.follow(self.rows)
        if (recache := recache_pass(self.timeline)) is not None:
            self.network.recompute(recache, np.stack([self.latents[frame] for frame in recache.run.frames]))

    def denoise(self) -> BlockInFlight:
        """Take steps of the blocks in flight until the first is clean, and return it."""
        sampler = self.plan["sampler"]
        first = self.timeline.next_block == 0 and sampler["first"]["matrix"] != sampler["matrix"]
        solver = sampler["first"] if first else sampler
        whole = self.engine.programs.get("steps") if not first and len(self.network.texts) == 1 else None
        admit = partial(self.admit, solver["draws"])
        for scheduled in denoise_passes(self.timeline, self.flight, solver["timesteps"], admit):
            if (cached := scheduled.window) is not None:
                self.timeline.forget(cached)
            if whole is not None:
                (block,) = self.flight
                self.network.roll(scheduled, self.network.pasts.values())
                values = self.network.inputs(0, scheduled.run, {}) | {"noise": np.stack(block.seen)}
                block.latents, block.step = whole(values)["clean"][0], len(solver["timesteps"])
                continue
            latents = [block.latents for block in self.flight]
            if scheduled.committed is not None:
                assert self.uncommitted is not None
                latents.insert(0, self.uncommitted)
            texts = {frame: block.texts for block in self.flight if block.texts for frame in block.span.frames}
            velocity = self.network.run(scheduled, np.concatenate(latents), texts)
            ends = np.cumsum([len(part) for part in latents])
            parts = np.split(velocity, ends[:-1])
            for block, part in zip(self.flight, parts[-len(self.flight) :], strict=True):
                block.seen.append(part)
                terms = zip(solver["matrix"][block.step], block.seen, strict=True)
                total = sum(weight * term.astype(np.float64) for weight, term in terms if weight)
                block.latents = np.asarray(total, np.float32)
                block.step += 1
        block = self.flight.pop(0)
        if not np.isfinite(block.latents).all():
            raise InferixError(f"block {block.span.index} is not finite; export another checkpoint")
        return block

    def admit(self, draws: int) -> BlockInFlight:
        """Admit the next block of the timeline, and draw its noise."""
        span, shape = self.timeline.admit(), tuple(self.plan["size"]["latent"])
        self.timeline.follow_rest(self.actions.resting_since(span.frames.start - 1))
        noise = [normals(self.seed, span.frames, draw, shape) for draw in range(draws)]
        if (scale := self.plan.preset.sampler.noise_scale) != 1:
            for frame, part in zip(span.frames, noise[0], strict=True):
                part *= np.float32(1 if self.actions.rests(frame) else scale)
        return BlockInFlight(span, noise, noise[0])

    def commit(self, span: Span, latents: Array, texts: Texts | None = None) -> None:
        """Run the pass over clean latents that leaves their keys and values. texts: None for those in force."""
        scheduled = commit_pass(self.timeline, span)
        self.network.run(scheduled, latents, dict.fromkeys(span.frames, texts) if texts else {})
        context = scheduled.window
        assert context is not None
        self.timeline.forget(context)
        self.latents |= dict(zip(span.frames, latents, strict=True))
        oldest = span.frames.stop - window(self.plan.preset)
        self.latents = {frame: x for frame, x in self.latents.items() if frame >= oldest or frame in context}

    def decode(self, latents: Array) -> Array:
        """Decode latents [F, C, h, w] to frames uint8 [T, H, W, 3]."""
        decoder, pictures = self.plan["decoder"], []
        for part in np.split(latents, range((unit := decoder.get("frames", 1)), len(latents), unit)):
            name = "decode_next" if self.decoded else decoder["first"]
            values = {f"state_{slot}": value for slot, value in enumerate(self.state)} | {"latents": part}
            results = self.engine.programs[name](values)
            self.state = [results.get(f"next_{slot}", value) for slot, value in enumerate(self.state)]
            pixels = results["pixels"] if self.decoded else results["pixels"][-decoder["first_pictures"] :]
            pictures.append(np.rint((pixels * np.float32(0.5) + np.float32(0.5)) * np.float32(255)).astype(np.uint8))
            self.decoded += 1
        return np.ascontiguousarray(np.concatenate(pictures).transpose(0, 2, 3, 1))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("inferix-run", description=f"{__doc__ or ''}".splitlines()[0], epilog=EXAMPLE)
    parser.add_argument("engine", type=Path, help="folder of the engine")
    parser.add_argument("--prompt", help="content of the video [default: as inferix generate]")
    parser.add_argument("--prompt-at", nargs=2, action="append", default=[], metavar=("SECONDS", "PROMPT"),
                        help="change the prompt at a time; repeatable")  # fmt: skip
    parser.add_argument("--negative-prompt", help="content to avoid, for presets with guidance")
    parser.add_argument("--image", type=Path, help="first picture, for engines of inferix export --prefixes")
    parser.add_argument("--video", type=Path, help="video to continue, likewise")
    parser.add_argument("--actions", help="one per latent frame, such as '8R 4U stay'")
    parser.add_argument("--blocks", type=int, help="length in blocks")
    parser.add_argument("--seconds", type=float, help="length in seconds, rounded up to whole blocks")
    parser.add_argument("--seed", type=int, help="seed of the noise [default: 0]")
    parser.add_argument("--out", type=Path, help=f"video: .y4m, {', '.join(CONTAINERS)} where PyAV is installed, or - "
                        "for y4m on stdout [default: out.mp4, or out.y4m without PyAV]")  # fmt: skip
    parser.add_argument("--latents", type=Path, metavar="FILE.npy", help="write the latents [F, C, h, w] too")
    parser.add_argument("--threads", type=int, default=0, help="threads of a program [default: one per core]")
    parser.add_argument("--json", action="store_true", help="one JSON line on stdout")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Play an engine into files; returns what was made."""
    out = options.out or Path("out.mp4" if find_spec("av") else "out.y4m")
    if out != STDOUT and out.suffix not in (".y4m", *CONTAINERS):
        raise UsageError(f"--out {quoted(out)} must end in one of .y4m, {', '.join(CONTAINERS)}")
    if out == STDOUT and options.json:
        raise UsageError("--json and --out - both write to stdout; give --out a file")
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        raise UsageError(f"--seconds is {options.seconds}; expected a number above 0")
    if options.image and options.video:
        raise UsageError("--image and --video both begin the stream; give one of them")
    inputs = {"engine": options.engine / FILE, "--image": options.image, "--video": options.video}
    check_paths(inputs, {"--out": out, "--latents": options.latents})
    engine = ExportedEngine(options.engine, options.threads)
    plan, defaults, preset = engine.plan, engine.plan["defaults"], engine.plan.preset
    fps, stride, size = plan["model"]["fps"], plan["size"]["pictures_per_latent"], tuple(plan["size"]["picture"])
    count = options.blocks
    if options.seconds is not None:
        others = (plan["decoder"].get("frames", 1) - 1) * stride  # pictures decoded with a stream's first frame
        first = plan["decoder"]["first_pictures"] - others
        count = preset.blocks_for_frames(max(0, -(-(round(options.seconds * fps) - first) // stride)) + 1)
    actions = options.actions or (defaults["actions"] if count is None else None)
    script = read_actions(actions, plan["model"]["actions"]) if actions else []
    if count is None:
        count = preset.blocks_for_frames(len(script) + 1) if script else defaults["blocks"]
    if count < 1 or (script and preset.blocks_for_frames(len(script) + 1) != count):
        raise UsageError(f"the length is {count} blocks, with {len(script)} actions; expected one block or more, and "
                         "one action for each latent frame but the first")  # fmt: skip
    prompt, seed = options.prompt or defaults["prompt"], defaults["seed"] if options.seed is None else options.seed
    stream = engine.open(prompt, seed, script, options.negative_prompt, read_prefix(options, size, fps))
    cues = [Cue(float(at), text) for at, text in options.prompt_at]
    changes = schedule(cues, preset, count, fps, stride, stream.timeline.next_frame)
    latents, begun, frames = [], time.perf_counter(), 0
    scale = max(1, SEEN // max(size))
    with Y4mWriter(out, fps, size) if out.suffix not in CONTAINERS else VideoWriter(out, fps, size, scale) as writer:
        if stream.prefix_frames is not None:
            writer.add(stream.prefix_frames)
            frames += len(stream.prefix_frames)
        for index in range(count):
            if index in changes:
                stream.prompt(changes[index])
            block = stream.next_block()
            assert block.frames is not None
            writer.add(block.frames)
            latents.append(block.latents)
            frames += len(block.frames)
            print(f"\rblock {index + 1}/{count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    outputs = [str(out)]
    if options.latents is not None:
        made = np.concatenate(latents)
        write_atomically(options.latents, lambda part: save_array(part, made))
        outputs.append(str(options.latents))
    return {"blocks": count, "frames": frames, "seconds": time.perf_counter() - begun, "outputs": outputs}


def read_prefix(options: argparse.Namespace, size: tuple[int, int], fps: int) -> Array | None:
    """The pictures of --image or --video, which Pillow or PyAV reads; None without either."""
    if options.image is not None:
        picture: Array = read_image(options.image, size)
        return picture[None]
    return None if options.video is None else read_video(options.video, size, fps)


def save_array(path: Path, values: Array) -> None:
    with path.open("wb") as file:  # by name, numpy would append .npy
        np.save(file, values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command in sys.argv: 0 for success, 1 for a run that failed, 2 for bad input."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    options = parse(arguments)
    try:
        made = run(options)
    except InferixError as error:
        print(one_line(error), file=sys.stderr)
        raise SystemExit(exit_code(error)) from error
    if options.json:
        print(json.dumps(made))
    elif options.out != STDOUT:
        facts = f"{made['blocks']} blocks, {made['frames']} frames, {made['seconds']:.1f} s"
        print(f"{facts}: {', '.join(made['outputs'])}")


if __name__ == "__main__":
    main()
