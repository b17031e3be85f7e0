"""`inferix generate`: from a prompt to a video and a record of its settings and timings.

Blocks are written as they come, so Ctrl-C, SIGTERM and an error keep the finished ones in a playable file. Progress
goes to stderr; stdout has only the result.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import InferixError, UsageError, nearest, one_line, quoted
from ..runtime.executor_specs import AUTO, default_executor
from ..runtime.files import check_output, check_paths, write_atomically
from ..runtime.media import CONTAINERS, VideoWriter, contact_sheet
from ..runtime.media_input import check_fit, read_video
from ..runtime.sinks import Pump
from ..schemes.actions import read_actions
from ..schemes.camera_file import read_camera
from ..schemes.defaults import DEFAULT_ACTIONS, DEFAULT_BLOCKS, DEFAULT_PROMPT
from ..schemes.preset_file import is_preset_file
from ..schemes.storyboard import Cue, read_storyboard, schedule
from ..user_yaml import read_yaml
from ..version import __version__
from .help import Command
from .options import (
    EXECUTOR,
    FORCE,
    FORMS,
    GPUS,
    NAMES,
    OFFLINE,
    PARALLEL,
    PRESET,
    UNTRAINED,
    advise_cached,
    check_beside_engine,
    check_nvtx,
    check_settings,
    check_start,
    counted,
    note_choices,
    parse_forms,
    parse_settings,
    parse_size,
    ranks_of_launcher,
)
from .presets import print_presets

if TYPE_CHECKING:
    import torch

    from ..runtime.engine import Engine
    from ..runtime.telemetry.profile import Profile

SEEN = 256  # least length in pixels of a video's longer side: smaller pictures are enlarged
LONGEST = 1_000_000  # blocks, or seconds
SHEET_FRAMES = 24  # frames on the contact sheet, at most, unless one block has more


@dataclass
class Result:
    """Counts, timings and output files of the finished blocks."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    failed: str | None = None
    warnings: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def read_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of the options, so that flags win; `set` is stored for `generate`."""
    if value is None:
        return None
    where = f"config {quoted(str(value))}"
    config = read_yaml(value, "config") or {}
    if not isinstance(config, dict):
        raise UsageError(f"{where} is not a mapping; expected lines of 'option: value'")
    config = {str(key).replace("-", "_"): item for key, item in config.items()}
    settings = config.pop("set", {})
    if not isinstance(settings, dict):
        raise UsageError(f"{where}: set is {quoted(settings)}; expected a mapping of 'key: value'")
    options = {name.replace("as_json", "json") for param in ctx.command.params if (name := param.name)}
    options -= {"config", "settings", "help"}
    for key in config:
        if key not in options:
            raise UsageError(f"{where}: no option {quoted(key)}{nearest(key, options)}; settings go in 'set'")
    if "json" in config:
        config["as_json"] = config.pop("json")
    ctx.default_map = {**(ctx.default_map or {}), **config}
    ctx.meta["inferix.settings"] = settings
    return value


def parse_cue(text: str) -> Cue:
    """Parse the value of `--prompt-at`, seconds and prompt joined by `PromptAt`."""
    seconds, _, prompt = text.partition(" ")
    try:
        return Cue(float(seconds), prompt)
    except ValueError as error:
        raise UsageError(f'--prompt-at {quoted(seconds)} is no time; expected SECONDS "PROMPT"') from error


class PromptAt(Command):
    """A command whose `--prompt-at` takes two values; they are joined to one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined, rest = [], iter(args)
        for word in rest:
            joined.append(word)
            if word == "--prompt-at":
                two = list(islice(rest, 2))
                if len(two) < 2 or two[1].startswith("--"):
                    raise UsageError('--prompt-at has too few values; expected --prompt-at SECONDS "PROMPT"')
                joined.append(" ".join(two))
        return super().parse_args(ctx, joined)


def warn_of_slow_cpu(engine: Engine, size: tuple[int, int], console: Console) -> None:
    """Print an estimate of the time per block if the engine runs on a CPU and the model is large."""
    from ..runtime.capacity.planner import long_on_cpu

    message = long_on_cpu(engine.spec, engine.preset, engine.parts.vae.spec, size)
    if engine.device.type == "cpu" and message:
        console.print(message, highlight=False, soft_wrap=True)


def advise_dtype(engine: Engine, console: Console) -> None:
    """Print advice on the dtype if the engine runs on a CPU and another one is faster there."""
    from ..runtime.capacity.cpu_features import cpu_flags, dtype_advice

    advice = dtype_advice(engine.config.dtype, cpu_flags()) if engine.device.type == "cpu" else None
    if advice:
        console.print(f"{advice} (--dtype)", highlight=False, soft_wrap=True)


def check_length(blocks: int | None, seconds: float | None) -> None:
    if blocks is not None and seconds is not None:
        raise UsageError(f"--blocks {blocks} and --seconds {seconds:g} both set the length; give one of them")
    if blocks is not None and not 1 <= blocks <= LONGEST:
        raise UsageError(f"--blocks is {quoted(blocks)}; expected 1 to {LONGEST}")
    if seconds is not None and not 0 < seconds <= LONGEST:
        raise UsageError(f"--seconds is {seconds:g}; expected a number above 0, at most {LONGEST}")


def sheet_indices(count: int, block: int, blocks: int) -> list[int]:
    """Choose the frames of a block for the contact sheet, its last among them; a long video's sheet stays small."""
    if block % math.ceil(blocks / SHEET_FRAMES):
        return []
    chosen = min(count, max(1, SHEET_FRAMES // blocks))
    return [(index + 1) * count // chosen - 1 for index in range(chosen)]


def fitted(script: list[str], frames: int, repeat: bool, console: Console) -> list[str]:
    """Return the actions for a video of `frames` latent frames after the first: cut, or repeated if asked."""
    if repeat:
        return list(islice(cycle(script), frames))
    if len(script) > frames:
        console.print(f"--actions has {counted(len(script), 'action')}; the video ends after {frames}", highlight=False)
    return script[:frames]


def label_of(engine: Engine, script: list[str]) -> Callable[[int], str]:
    """Return a function that labels a frame by its number: its time and, with a script, its action."""
    stride, rest = engine.spec.vae_stride[0], next(iter(engine.spec.actions), "")

    def label(frame: int) -> str:
        latent = -(-frame // stride)
        action = (script[latent - 1] if latent <= len(script) else rest) if script and latent else ""
        return f"{frame / engine.fps:.1f} s" + (f", {action}" if action else "")

    return label


@contextmanager
def progress_bar(console: Console, blocks: int) -> Iterator[Any]:
    """Yield `advance(fps, drift)`, to be called after each block; drift: of its record, or None."""
    columns = (
        TextColumn("block"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("blocks", total=blocks, speed="")

        def advance(fps: float, drift: dict[str, float] | None = None) -> None:
            facts = [f"{fps:.2f} FPS"] if fps else []
            if drift:
                name = max(drift, key=lambda name: abs(drift[name]))
                facts.append(f"{name} {drift[name]:+.0%}")
            progress.update(task, advance=1, speed=", ".join(facts))

        yield advance


def record_blocks(
    stream: Iterable[Any],
    blocks: int,
    advance: Any,
    result: Result,
    samples: list[Any],
    label: Callable[[int], str],
) -> None:
    """Run the stream; adds finished blocks to `result`, and latents or (label, frame)s for the sheet to `samples`.

    label: of a frame's number.
    """
    start = time.perf_counter()
    for block in stream:
        made, count = len(result.blocks), 0
        if block.frames is None:
            samples.append(block.latents.detach().cpu())
        else:
            count = len(block.frames)
            chosen = sheet_indices(count, made, blocks)
            samples += [(label(result.frames + index), block.frames[index].copy()) for index in chosen]
        made_block = {"index": block.index, "frames": count, "timings": dict(block.timings)}
        drift = block.record.drift
        result.blocks.append(made_block if drift is None else made_block | {"drift": drift})
        result.frames += count
        result.seconds = time.perf_counter() - start
        advance(result.frames / result.seconds, drift)


def steered(session: Any, blocks: int, cues: dict[int, str], decode: bool) -> Iterator[Any]:
    """Yield the stream's blocks and send each cue before its block. Raises UsageError if a prompt is refused."""
    starts = [0, *(start for start in sorted(cues) if start > 0), blocks]
    for start, stop in pairwise(starts):
        if start in cues:
            session.prompt(cues[start])
        for block in session.stream(stop - start, decode):
            if refused := [ack.refused for ack in block.acks if ack.refused]:
                raise UsageError(refused[0])
            yield block


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Raise KeyboardInterrupt at the first SIGINT, SIGTERM or SIGHUP; yields a list that receives its number.

    Further signals are ignored until the finished blocks are in their files.
    """
    came: list[int] = []
    handled = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGHUP} if hasattr(signal, "SIGHUP") else set())
    before = {number: signal.getsignal(number) for number in handled}
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}  # nohup ignores SIGHUP

    def stop(number: int, frame: object) -> None:
        if not came:
            came.append(number)
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    for number in before:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def noted_warnings(notes: list[str]) -> Iterator[None]:
    """Append each warning to `notes` as well as showing it."""
    shown = warnings.showwarning

    def note(message: Warning | str, *rest: Any, **named: Any) -> None:
        notes.append(str(message))
        shown(message, *rest, **named)

    warnings.showwarning = note
    try:
        yield
    finally:
        warnings.showwarning = shown


def frames_of(engine: Engine, blocks: int) -> int:
    """Return the pixel frames of the first `blocks` blocks."""
    return engine.spec.pictures(engine.preset.latent_frames(blocks))


def read_source(
    video: Path, engine: Engine, size: tuple[int, int], fit: str, blocks: int, asked: bool
) -> tuple[Any, int]:
    """Read the frames of a source video; returns them and the count of blocks they fill.

    Raises UsageError if the count was `asked` for and the video is shorter.
    """
    pixels = read_video(video, size, engine.fps, fit, first=frames_of(engine, blocks))
    there = 0
    while there < blocks and frames_of(engine, there + 1) <= len(pixels):
        there += 1
    if asked and there < blocks:
        raise UsageError(
            f"--video {quoted(str(video))} has {len(pixels)} frames at {engine.fps} FPS, which are "
            f"{counted(there, 'block')}; expected {blocks} blocks: give --blocks {max(there, 1)} or a longer video"
        )
    return pixels, max(there, 1)


def save_latents(latents: list[torch.Tensor], path: Path) -> Path:
    """Write all blocks' latents as one tensor `latents` [F, C, H, W] to a safetensors file."""
    import torch
    from safetensors.torch import save

    data = save({"latents": torch.cat(latents).contiguous()})
    return write_atomically(path, lambda part: part.write_bytes(data))


def versions() -> dict[str, str]:
    names = ("torch", "numpy", "safetensors", "av")
    return {"inferix": __version__, "python": platform.python_version()} | {
        name: metadata.version(name) for name in names
    }


def generate(
    ctx: typer.Context,
    model: str | None = typer.Option(
        None,
        help="Checkpoint file or folder, the name of a preset with published weights, org/name[:file] of the Hugging "
        f"Face hub, or a named model.  [default: tinyworld, or {UNTRAINED} with --preset]",
    ),
    exported: Path | None = typer.Option(
        None, "--engine", metavar="DIR", help="Folder that inferix export wrote, in place of a model."
    ),
    base: str | None = typer.Option(None, help="Folder with VAE and text encoder, or org/name, if not with the model."),
    vae: str | None = typer.Option(None, help="Decoder: a file or folder, or taehv for the tiny one."),
    text_encoder: str | None = typer.Option(None, help="Text encoder file or folder, if not with model or base."),
    lora: str | None = typer.Option(None, help="LoRA adapter, file or folder, merged into the weights."),
    lora_scale: float = typer.Option(1.0, help="Factor of the adapter's weights."),
    lora_partial: bool = typer.Option(False, "--lora-partial", help="Merge an adapter that fits only in part."),
    preset: str | None = PRESET,
    names: Path | None = NAMES,
    prompt: str | None = typer.Option(None, help="Content of the video, as text."),
    prompt_embeds: Path | None = typer.Option(None, help="File of text-encoder output, instead of a prompt."),
    seconds: float | None = typer.Option(None, help="Length in seconds, rounded up to whole blocks."),
    blocks: int | None = typer.Option(None, help=f"Length in blocks.  [default: {DEFAULT_BLOCKS}, or as --actions]"),
    seed: int = typer.Option(0, help="Seed of the noise."),
    out: Path = typer.Option(
        Path("out.mp4"), "--out", "-o", help="Video to write: .mp4, .mov, .mkv, .webm, .gif; .json and .png beside it."
    ),
    image: Path | None = typer.Option(None, help="First picture of the video."),
    video: Path | None = typer.Option(None, help="Video to continue."),
    fit: str = typer.Option(
        "crop", help="Fit of --image and --video to the picture: crop, pad with black, or stretch."
    ),
    strength: float | None = typer.Option(
        None, help="Video to video with --video: 0.1 stays close, 1 ignores it; a few solvers take only 1."
    ),
    negative_prompt: str | None = typer.Option(None, help="Content to avoid, for presets with guidance."),
    prompt_at: list[str] = typer.Option(
        [], metavar='SECONDS "PROMPT"', help="Change the prompt at a time; repeatable."
    ),
    storyboard: Path | None = typer.Option(None, help="YAML list of 'at' and 'prompt', instead of --prompt-at."),
    list_presets: bool = typer.Option(
        False, "--list-presets", callback=print_presets, is_eager=True, help="Show each preset and its weights."
    ),
    actions: str | None = typer.Option(
        None,
        metavar='"8R 8U ..."',
        help="Actions of the hero, one per latent frame: 8R, 4U, stay; or a .json file with a list of names. A longer "
        "video rests after them.  "
        f"[default for the small world: {DEFAULT_ACTIONS}, unless a length is given]",
    ),
    repeat_actions: bool = typer.Option(
        False, "--repeat-actions", help="Repeat --actions to the end of the video, instead of a rest after them."
    ),
    camera: Path | None = typer.Option(
        None,
        help="Path of the camera, for models that follow one: JSON with poses and intrinsics, or a folder with "
        "poses.npy and intrinsics.npy.",
    ),
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size, such as 832x480."),
    latents_only: bool = typer.Option(False, "--latents-only", help="Write out.safetensors, no video."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    dtype: str | None = typer.Option(None, help="float32, bfloat16, float16.  [default: bfloat16 on a GPU]"),
    executor: str | None = EXECUTOR,
    kernels: list[str] = FORMS,
    gpus: int | None = GPUS,
    parallel: str | None = PARALLEL,
    graphs: Path | None = typer.Option(None, help="Folder of stored graphs to read, and to add new ones to."),
    profile: Path | None = typer.Option(
        None, metavar="DIR", help="Folder for a trace and a table of each block's time by call."
    ),
    nvtx: bool = typer.Option(
        False, "--nvtx", help="On a GPU: mark sessions, blocks, passes and decoding for nsys profile."
    ),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Engine setting; repeatable."),
    records: Path | None = typer.Option(None, help="File for measurements, a JSON line per block and control."),
    drift_meter: bool = typer.Option(
        False, "--drift-meter", help="Show and record how far the pictures have moved from the first two seconds."
    ),
    config: Path | None = typer.Option(
        None, callback=read_config, is_eager=True, help="YAML file of options, settings in 'set'; flags win."
    ),
    offline: bool = OFFLINE,
    force: bool = FORCE,
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Make a video block by block; after Ctrl-C, SIGTERM or an error the finished blocks are in the file.

    Writes OUT, and beside it a contact sheet (.png) and a record of settings and timings (.json); never overwrites an
    input. A video of --video is sampled at the model's frame rate.

    Example: inferix generate --prompt "a purple wizard in a sandy desert by day" --actions "8R 4U 4S" --out wizard.mp4

    Example: inferix generate --model tiny/ --prompt "a boat" --size 64x64 --blocks 2 -o boat.gif

    Example: inferix generate --preset longlive --size 64x64 --prompt "a street" --prompt-at 1 "snow" --seconds 2

    Over two ranks: inferix generate --preset longlive --size 64x64 --gpus 2 --device cpu

    With published weights, which are downloaded (some 20 GB): inferix generate --model self-forcing --prompt "a paper
    boat on a canal" --seconds 5
    """
    check_length(blocks, seconds)
    given_parts: dict[str, object] = {"--model": model, "--preset": preset, "--names": names, "--base": base}
    given_parts["--vae"] = vae
    given_parts |= {"--text-encoder": text_encoder, "--lora": lora, "--size": size, "--device": device}
    given_parts |= {"--dtype": dtype, "--executor": executor, "--graphs": graphs, "--profile": profile}
    given_parts |= {"--gpus": gpus, "--parallel": parallel, "--form": kernels or None}
    check_beside_engine(exported, given_parts)
    check_nvtx(nvtx, device)
    if prompt is not None and prompt_embeds is not None:
        raise UsageError("--prompt and --prompt-embeds both say what to show; give one of them")
    suffixes = [*CONTAINERS, ".safetensors"] if latents_only else list(CONTAINERS)
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"--out {quoted(out)} must end in one of {', '.join(suffixes)}")
    overrides = {**ctx.meta.get("inferix.settings", {}), **parse_settings(settings)}
    check_settings(ctx, overrides)
    chosen_size = parse_size(size) if size else None
    if repeat_actions and actions is None:
        raise UsageError("--repeat-actions is given without --actions; give the actions to repeat")
    if prompt_at and storyboard:
        raise UsageError("--prompt-at and --storyboard both change the prompt; give one of them")
    cues = read_storyboard(storyboard) if storyboard else [parse_cue(text) for text in prompt_at]
    check_fit(fit)
    path = read_camera(camera) if camera is not None else None
    forms = parse_forms(kernels)
    outputs = output_paths(out, latents_only, records, profile)
    inputs: dict[str, str | Path | None] = {"--model" if exported is None else "--engine": exported or model}
    inputs |= {"--base": base, "--names": names, "--preset": preset if preset and is_preset_file(preset) else None}
    inputs |= {"--vae": vae, "--lora": lora, "--prompt-embeds": prompt_embeds}
    inputs |= {"--image": image, "--video": video, "--storyboard": storyboard, "--config": config}
    inputs |= {"--camera": camera if camera is None or camera.is_file() else None}
    inputs |= {"--actions": actions if actions and actions.endswith(".json") else None}
    inputs |= {f"--form {op}": form.rpartition(":")[0] for op, form in forms.items() if ":" in form}
    inputs |= {"--text-encoder": text_encoder, "--set fast_vae": overrides.get("fast_vae")}
    check_paths(inputs, outputs)
    for output in outputs.values():
        check_output(output)
    result = Result()
    ctx.with_resource(noted_warnings(result.warnings))
    console = Console(stderr=True)

    from ..models.registry import default_model
    from ..runtime.config import default_device
    from ..runtime.load import load
    from ..runtime.telemetry.records import RecordFile

    model = str(exported) if exported is not None else model or default_model(preset)
    parts: dict[str, Any] = {"base": base, "vae": vae, "text_encoder": text_encoder, "names": names}
    parts |= {"lora": lora, "lora_scale": lora_scale, "lora_partial": lora_partial}
    if profile is not None and executor is None:  # the calls of a graph are fewer and known by their pass
        executor = default_executor(device or default_device(), lambda spec: spec.graphs)
    parts |= {"executor": executor or AUTO, "graphs": graphs, "drift_meter": drift_meter}
    parts |= {"gpus": gpus or ranks_of_launcher(), "parallel": parallel, "kernels": forms}
    texts = prompt_embeds is None or negative_prompt is not None or bool(cues)
    parts |= {"size": chosen_size, "offline": offline, "force": force, "text_prompts": texts}
    if exported is None:
        reading = {"form": overrides.get("checkpoint_format"), "names": names}
        check_start(model, preset, {"--image": image, "--video": video, "--camera": camera}, **reading)
    parts["prompts"] = [text for text in (prompt, negative_prompt, *(cue.prompt for cue in cues)) if text is not None]
    if exported is not None:
        engine = load(engine=exported, **overrides)
        prompt = default_prompt(exported) if prompt is None and prompt_embeds is None else prompt
    else:
        engine = load(model, preset=preset, device=device, dtype=dtype, **parts, **overrides)
        note_choices(engine)
        advise_cached(engine, executor, chosen_size)
    if engine.parts.form == "random":
        message = f"{model} has random, untrained weights: the picture is noise; --model takes a checkpoint"
        console.print(message, highlight=False, soft_wrap=True)
    if not Path(model).exists() and prompt is None and prompt_embeds is None:
        prompt = DEFAULT_PROMPT
    count = blocks or (engine.blocks_for(seconds) if seconds else None)
    if actions is None and count is None and engine.spec.actions:
        actions = DEFAULT_ACTIONS
    script = read_actions(actions, engine.spec.actions) if actions is not None else []
    if script and count is None:
        count = engine.blocks_for_frames(len(script) + 1)
    if path is not None and count is None:
        count = path.blocks(engine.spec.vae_stride[0], engine.preset.num_frame_per_block)
    count = count or DEFAULT_BLOCKS
    if path is not None:
        path = path.cut(engine.spec.pictures(engine.preset.latent_frames(count)))
    script = fitted(script, engine.preset.latent_frames(count) - 1, repeat_actions, console)
    frame_size = chosen_size or engine.default_size
    warn_of_slow_cpu(engine, frame_size, console)
    advise_dtype(engine, console)
    source: Any = video
    if video is not None and strength is not None:
        source, count = read_source(video, engine, frame_size, fit, count, bool(blocks or seconds or script))
    opening: dict[str, Any] = {"prompt": prompt, "prompt_embeds": prompt_embeds, "image": image, "video": source}
    opening |= {"actions": script or None, "strength": strength, "negative_prompt": negative_prompt}
    opening |= {"camera": path}
    given: dict[str, Any] = {name: value for name, value in opening.items() if value is not None}
    profiled = engine.start_profile() if profile is not None else None
    if nvtx:
        engine.start_ranges()
    samples: list[Any] = []
    writer: VideoWriter | None = None
    changes: dict[int, str] = {}
    ahead = bool(cues) and engine.preset.context.prompt_switch == "join" and video is None
    if ahead:  # several blocks begin together, so that their prompts are needed at once
        changes = schedule(cues, engine.preset, count, engine.fps, engine.spec.vae_stride[0])
        given["prompts"] = changes
    with stop_signals() as came:
        try:
            with ExitStack() as stack:
                if records is not None:
                    engine.observe(stack.enter_context(RecordFile(records)))
                session = stack.enter_context(closing(engine.open(seed=seed, size=frame_size, fit=fit, **given)))
                begun = session.current.timeline.next_frame
                if not ahead:
                    changes = schedule(cues, engine.preset, count, engine.fps, engine.spec.vae_stride[0], begun)
                if not latents_only:
                    writer = VideoWriter(out, engine.fps, frame_size, max(1, SEEN // max(frame_size)))
                stream = steered(session, count, {} if ahead else changes, decode=writer is not None)
                sinks = [writer] if writer is not None else []
                note = profiled.note_feed if profiled is not None else None
                blocks_made = stack.enter_context(Pump(stream, *sinks, first=session.prefix_frames, note=note))
                advance = stack.enter_context(progress_bar(console, count))
                label = label_of(engine, script if begun == 0 else [])
                record_blocks(blocks_made, count, advance, result, samples, label)
        except KeyboardInterrupt:
            result.interrupted = True
        except (InferixError, RuntimeError, MemoryError) as error:
            result.failed = one_line(error)
            raise
        finally:  # the finished blocks are written in every case
            if records is not None and records.exists():
                result.outputs.append(str(records))
            shown = {name: str(value) for name, value in given.items()} | ({"video": str(video)} if video else {})
            shown |= {"camera": str(camera)} if camera else {}
            about = {"seed": seed, "size": frame_size, "requested_blocks": count, "opened_with": shown, "fit": fit}
            about |= {"prompts_at_blocks": changes, "engine": engine.describe()}
            lost = []
            if writer is not None:
                result.frames = min(result.frames, writer.frames)  # fewer where the disk was full
            if result.blocks:
                lost = failures(
                    lambda: write_profile(result, profiled, profile),
                    lambda: write_samples(result, samples, outputs, writer),
                    lambda: write_record(result, about, outputs),
                )
            for failure in lost:
                result.failed = result.failed or one_line(failure)
                typer.echo(one_line(failure), err=True)
            print_result(result, count, as_json)
    if result.interrupted:
        raise typer.Exit(128 + (came[0] if came else signal.SIGINT))
    if lost:
        raise typer.Exit(1)


def default_prompt(engine: Path) -> str:
    """The prompt of an exported engine where none is given."""
    from ..export.plan import FILE

    prompt: str = json.loads((engine / FILE).read_text("utf-8"))["defaults"]["prompt"]
    return prompt


def failures(*writes: Callable[[], object]) -> list[InferixError]:
    """Make each call, also after one has failed; returns the errors."""
    errors = []
    for write in writes:
        try:
            write()
        except InferixError as error:
            errors.append(error)
    return errors


def write_profile(result: Result, profiled: Profile | None, folder: Path | None) -> None:
    if profiled is not None and folder is not None:
        result.outputs += map(str, profiled.write(folder))


def write_samples(result: Result, samples: list[Any], outputs: dict[str, Path], writer: VideoWriter | None) -> None:
    """Write the latents, or the contact sheet of the video unless the video has no frame."""
    if writer is None:
        result.outputs.append(str(save_latents(samples, outputs["latents"])))
    elif writer.frames:
        names, frames = zip(*samples, strict=True)
        result.outputs.append(str(outputs["--out"]))
        result.outputs.append(str(contact_sheet(frames, outputs["contact sheet"], labels=names)))


def write_record(result: Result, about: dict[str, Any], outputs: dict[str, Path]) -> None:
    """Write the record of settings, versions and timings."""
    record = asdict(result) | about | {"versions": versions(), "command": shlex.join(sys.argv)}
    record["outputs"] = [*result.outputs, str(outputs["record"])]
    text = json.dumps(record, indent=2, default=str) + "\n"
    result.outputs.append(str(write_atomically(outputs["record"], lambda part: part.write_text(text, "utf-8"))))


def output_paths(out: Path, latents_only: bool, records: Path | None, profile: Path | None) -> dict[str, Path]:
    """Return the path of each output of a run, by its name in messages."""
    if latents_only:
        paths = {"latents": out.with_suffix(".safetensors")}
    else:
        paths = {"--out": out, "contact sheet": out.with_suffix(".png")}
    paths["record"] = out.with_suffix(".json")
    if records is not None:
        paths["--records"] = records
    if profile is not None:
        from ..runtime.telemetry.profile import TABLE, TRACE

        paths |= {"trace": profile / TRACE, "profile": profile / TABLE}
    return paths


def print_result(result: Result, count: int, as_json: bool) -> None:
    """Print the result to stdout, as one JSON line or as text."""
    if result.interrupted or result.failed:
        how = "interrupted" if result.interrupted else "stopped by an error"
        outcome = f"they are in {', '.join(result.outputs)}" if result.blocks else "nothing was written"
        typer.echo(f"{how}: {len(result.blocks)} of {count} blocks were finished; {outcome}", err=True)
    if result.failed:
        return
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    elif result.blocks:
        facts = [counted(len(result.blocks), "block")]
        if result.frames:
            facts += [counted(result.frames, "frame"), f"{result.frames / result.seconds:.2f} FPS"]
        if (share := meter_share(result.blocks)) is not None:
            facts.append(f"drift meter {share:.2%} of a block")
        typer.echo(f"{', '.join(facts)}, {result.seconds:.1f} s: {', '.join(result.outputs)}")


def meter_share(blocks: list[dict[str, Any]]) -> float | None:
    """Share of the drift meter in the time of all stages of blocks; None without a meter."""
    timings = [block["timings"] for block in blocks if "drift" in block["timings"]]
    total = sum(sum(stages.values()) for stages in timings)
    return sum(stages["drift"] for stages in timings) / total if total else None
