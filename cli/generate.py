"""`inferix generate`: a prompt in, a video and the record of how it was made out.

Blocks are written as they come, so Ctrl-C keeps the finished ones in a playable file. Progress goes to
stderr; stdout holds the result alone.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..errors import UsageError, nearest
from ..runtime.media import CONTAINERS, VideoWriter, check_output, contact_sheet, write_atomically
from ..version import __version__

if TYPE_CHECKING:
    import torch

DEFAULT_MODEL = "wan-tiny"
DEFAULT_PROMPT = "a paper boat on a canal"  # for untrained models only, which cannot follow it
DEFAULT_BLOCKS = 3
SHEET_FRAMES = 24  # frames on the contact sheet, at most, unless one block has more


@dataclass
class Result:
    """What the finished blocks left behind."""

    blocks: list[dict[str, Any]] = field(default_factory=list)
    frames: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    outputs: list[str] = field(default_factory=list)


def read_config(ctx: typer.Context, value: Path | None) -> Path | None:
    """Make a YAML file's values the defaults of the options, so that flags win; `set` is kept for later."""
    if value is None:
        return None
    try:
        config = yaml.safe_load(value.read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read config {str(value)!r}: {error}; expected a YAML file") from error
    if not isinstance(config, dict):
        raise UsageError(f"config {str(value)!r} is not a mapping; expected lines of 'option: value'")
    config = {str(key).replace("-", "_"): item for key, item in config.items()}
    settings = config.pop("set", {})
    if not isinstance(settings, dict):
        raise UsageError(f"config {str(value)!r}: set is {settings!r}; expected a mapping of 'key: value'")
    options = {name.replace("as_json", "json") for param in ctx.command.params if (name := param.name)}
    options -= {"config", "settings", "help"}
    for key in config:
        if key not in options:
            raise UsageError(
                f"config {str(value)!r}: no option {key!r}{nearest(key, options)}; settings go in 'set'"
            )
    if "json" in config:
        config["as_json"] = config.pop("json")
    ctx.default_map = {**(ctx.default_map or {}), **config}
    ctx.meta["inferix.settings"] = settings
    return value


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """`key=value` strings to a dict; values are read as YAML, so 3, true and [1, 2] have their types."""
    settings = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"--set {pair!r} has no value; expected key=value, such as local_attn_size=21")
        try:
            settings[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {pair!r}: the value is not YAML: {error}; quote it") from error
    return settings


def parse_size(text: str) -> tuple[int, int]:
    """`832x480` to (832, 480)."""
    width, separator, height = text.lower().partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise UsageError(f"--size {text!r} is not a size; expected WIDTHxHEIGHT in pixels, such as 832x480")
    return int(width), int(height)


def check_length(blocks: int | None, seconds: float | None) -> None:
    if blocks is not None and seconds is not None:
        raise UsageError(f"--blocks {blocks} and --seconds {seconds:g} both set the length; give one of them")
    if blocks is not None and blocks < 1:
        raise UsageError(f"--blocks is {blocks}; expected 1 or more")
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"--seconds is {seconds:g}; expected a number above 0")


def sheet_indices(count: int, block: int, blocks: int) -> list[int]:
    """Which of a block's `count` frames go on the contact sheet, so that it stays small for a long video."""
    if block % math.ceil(blocks / SHEET_FRAMES):
        return []
    wanted = min(count, max(1, SHEET_FRAMES // blocks))
    return [index * count // wanted for index in range(wanted)]


@contextmanager
def progress_bar(console: Console, blocks: int) -> Iterator[Any]:
    """Yields `advance(fps)`, to be called after each block."""
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
        yield lambda fps: progress.update(task, advance=1, speed=f"{fps:.2f} FPS" if fps else "")


def record_blocks(session: Any, blocks: int, writer: VideoWriter | None, advance: Any) -> tuple[Result, Any]:
    """Run the stream to its end or to Ctrl-C; returns the result and kept latents or (label, frame)s."""
    result = Result()
    kept: list[Any] = []
    start = time.perf_counter()
    try:
        for block in session.stream(blocks=blocks, decode=writer is not None):
            count = 0
            if writer is None:
                kept.append(block.latents.detach().cpu())
            else:
                count = len(block.frames)
                writer.add(block.frames)
                chosen = sheet_indices(count, len(result.blocks), blocks)
                kept += [(str(result.frames + index), block.frames[index].copy()) for index in chosen]
            result.blocks.append({"index": block.index, "frames": count, "timings": dict(block.timings)})
            result.frames += count
            result.seconds = time.perf_counter() - start
            advance(result.frames / result.seconds)
    except KeyboardInterrupt:
        result.interrupted = True
    return result, kept


def save_latents(latents: list[torch.Tensor], path: Path) -> Path:
    """All blocks' latents as one tensor `latents` [F, C, H, W] in a safetensors file."""
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
    model: str = typer.Option(DEFAULT_MODEL, help="Checkpoint file or folder, or a name for random weights."),
    base: str | None = typer.Option(None, help="Folder with VAE and text encoder, if not with the model."),
    preset: str = typer.Option("self-forcing", help="Named sampler and context settings."),
    prompt: str | None = typer.Option(None, help="What the video shows."),
    prompt_embeds: Path | None = typer.Option(None, help="File of text-encoder output, instead of a prompt."),
    seconds: float | None = typer.Option(None, help="Length in seconds, rounded up to whole blocks."),
    blocks: int | None = typer.Option(None, help=f"Length in blocks.  [default: {DEFAULT_BLOCKS}]"),
    seed: int = typer.Option(0, help="Seed of the noise."),
    out: Path = typer.Option(Path("out.mp4"), help="Video to write; .json and .png go beside it."),
    image: Path | None = typer.Option(None, help="Picture to begin with."),
    video: Path | None = typer.Option(None, help="Video to continue."),
    size: str | None = typer.Option(None, metavar="WxH", help="Picture size, such as 832x480."),
    latents_only: bool = typer.Option(False, "--latents-only", help="Write out.safetensors, no video."),
    device: str | None = typer.Option(None, help="cpu, cuda or cuda:N.  [default: cuda if there is one]"),
    dtype: str | None = typer.Option(None, help="float32, bfloat16, float16.  [default: bfloat16 on a GPU]"),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Engine setting; repeatable."),
    config: Path | None = typer.Option(
        None, callback=read_config, is_eager=True, help="YAML file of options, settings in 'set'; flags win."
    ),
    as_json: bool = typer.Option(False, "--json", help="One JSON line on stdout."),
) -> None:
    """Make a video block by block; Ctrl-C keeps the finished blocks.

    Writes OUT, a contact sheet (.png) and a record of settings and timings (.json) beside it.

    Example: inferix generate --prompt "a paper boat on a canal" --blocks 3 --out boat.mp4

    Example: inferix generate --model model.pt --base Wan2.1-T2V-1.3B --seconds 5 --set local_attn_size=21
    """
    check_length(blocks, seconds)
    if prompt is not None and prompt_embeds is not None:
        raise UsageError("--prompt and --prompt-embeds both say what to show; give one of them")
    suffixes = [*CONTAINERS, ".safetensors"] if latents_only else list(CONTAINERS)
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"--out {str(out)!r} must end in one of {', '.join(suffixes)}")
    overrides = {**ctx.meta.get("inferix.settings", {}), **parse_settings(settings)}
    wanted_size = parse_size(size) if size else None
    check_output(out)
    console = Console(stderr=True)

    from ..runtime.engine import load

    engine = load(model, preset=preset, device=device, dtype=dtype, base=base, **overrides)
    if not Path(model).exists():  # a name, so the weights were drawn at random
        said = f"{model} has random, untrained weights: the picture is noise; --model takes a checkpoint"
        console.print(said, highlight=False, soft_wrap=True)
        if prompt is None and prompt_embeds is None:
            prompt = DEFAULT_PROMPT
    count = blocks or (engine.blocks_for(seconds) if seconds else DEFAULT_BLOCKS)
    opening = {"prompt": prompt, "prompt_embeds": prompt_embeds, "image": image, "video": video}
    given: dict[str, Any] = {name: value for name, value in opening.items() if value is not None}
    frame_size = wanted_size or engine.default_size
    with ExitStack() as stack:
        session = stack.enter_context(closing(engine.open(seed=seed, size=frame_size, **given)))
        writer = None if latents_only else VideoWriter(out, engine.fps, frame_size)
        if writer:
            stack.enter_context(writer)
            if session.prefix_frames is not None:
                writer.add(session.prefix_frames)
        advance = stack.enter_context(progress_bar(console, count))
        result, kept = record_blocks(session, count, writer, advance)

    if result.blocks:
        if latents_only:
            result.outputs.append(str(save_latents(kept, out.with_suffix(".safetensors"))))
        else:
            names, frames = zip(*kept, strict=True)
            sheet = contact_sheet(frames, out.with_suffix(".png"), labels=names)
            result.outputs += [str(out), str(sheet)]
        result.outputs.append(str(out.with_suffix(".json")))
        record = asdict(result) | {
            "seed": seed,
            "size": frame_size,
            "requested_blocks": count,
            "opened_with": {name: str(value) for name, value in given.items()},
            "engine": engine.describe(),
            "versions": versions(),
            "command": shlex.join(sys.argv),
        }
        text = json.dumps(record, indent=2, default=str) + "\n"
        write_atomically(out.with_suffix(".json"), lambda part: part.write_text(text, "utf-8"))
    tell(result, count, as_json)
    if result.interrupted:
        raise typer.Exit(130)


def tell(result: Result, count: int, as_json: bool) -> None:
    """The result on stdout, as one JSON line or in words."""
    if result.interrupted:
        kept = "they are kept" if result.blocks else "nothing was written"
        typer.echo(f"interrupted: {len(result.blocks)} of {count} blocks were finished; {kept}", err=True)
    if as_json:
        typer.echo(json.dumps(asdict(result)))
    elif result.blocks:
        speed = f", {result.frames} frames, {result.frames / result.seconds:.2f} FPS" if result.frames else ""
        typer.echo(f"{len(result.blocks)} blocks{speed}, {result.seconds:.1f} s: {', '.join(result.outputs)}")
