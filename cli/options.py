"""Parsers of options that several commands share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ..errors import UsageError, cut, quoted
from ..runtime.executor_specs import AUTO, EXECUTORS, default_executor
from ..schemes.layouts import LAYOUTS
from ..user_yaml import parse_yaml

if TYPE_CHECKING:
    from ..models.spec import ModelSpec
    from ..runtime.engine import Engine

OFFLINE = typer.Option(
    False, "--offline", help="Download no weights; a model's name is looked up in the local Hugging Face cache."
)
EXECUTOR_NAMES = ", ".join(EXECUTORS)
EXECUTOR = typer.Option(
    None,
    help=f"Executor of passes: {EXECUTOR_NAMES}, or {AUTO}: on a CPU an engine of inferix export --cache, if there is "
    f"one.  [default: {default_executor('cuda')} on a GPU, {default_executor('cpu')} on a CPU; generate, play: {AUTO}]",
)
GPUS = typer.Option(
    None, metavar="N", help="GPUs for a pass, or processes with --device cpu.  [default: 1, or torchrun's ranks]"
)
PARALLEL = typer.Option(None, help=f"Layout over --gpus: {', '.join(LAYOUTS)}.  [default: auto, as inferix plan]")
PRESET = typer.Option(
    None, help="Decoding scheme: a name, or a .yaml file.  [default: the model's own, or self-forcing]"
)
NAMES = typer.Option(None, metavar="FILE", help="YAML file of the checkpoint's tensor names (docs/models.md).")
FORMS = typer.Option(
    [], "--form", metavar="OP=FORM", help="Form of an op: a name, or FILE.py:FUNCTION of your own; repeatable."
)
FORCE = typer.Option(False, "--force", help="Load even what by plan does not fit into memory.")
DEFAULT_MODEL = "wan-1.3b"  # of plan and graph, which load nothing
UNTRAINED = "wan-tiny"  # `models.registry.UNTRAINED`, whose import takes torch


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Parse `key=value` strings to a dict; values are YAML, so 3, true and [1, 2] have their types."""
    settings = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.strip():
            raise UsageError(f"--set {quoted(pair)} has no value; expected key=value, such as local_attn_size=21")
        settings[key.strip()] = parse_yaml(text, f"--set {quoted(pair)}")
    return settings


def parse_forms(pairs: list[str]) -> dict[str, str]:
    """Parse `op=form` strings to a dict."""
    forms: dict[str, str] = {}
    for pair in pairs:
        op, separator, form = (part.strip() for part in pair.partition("="))
        if not separator or not op or not form:
            raise UsageError(f"--form {quoted(pair)} has no op and form; expected OP=FORM, such as rms_norm=reference")
        if op in forms:
            raise UsageError(f"--form {quoted(pair)} is the second for {op}; give one")
        forms[op] = form
    return forms


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: `1 block`, `2 blocks`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def parse_size(text: str) -> tuple[int, int]:
    """Parse `832x480` to (832, 480)."""
    width, separator, height = text.lower().partition("x")
    if not (separator and width.isdecimal() and height.isdecimal() and max(len(width), len(height)) < 6):
        raise UsageError(f"--size {quoted(text)} is not a size; expected WIDTHxHEIGHT in pixels, such as 832x480")
    return int(width), int(height)


def check_settings(ctx: typer.Context, settings: Iterable[str]) -> None:
    """Raise UsageError for a setting that the command has its own option for."""
    options = {param.name: param.opts[0] for param in ctx.command.params if param.name}
    for key in settings:
        if option := options.get(key.replace("-", "_")):
            raise UsageError(f"--set {cut(key)}: this setting has its own option; use {option}")


def ranks_of_launcher() -> int | None:
    """Number of ranks that torchrun or srun has started; None where this process is alone."""
    from ..runtime.parallel.rendezvous import Place

    place = Place.of()
    return None if place is None else place.ranks


def note_choices(engine: Engine) -> None:
    """Print which engine of the cache runs in place of the model, and why ranks have the layout that was chosen."""
    if engine.layout_reason is not None:
        typer.echo(f"--parallel auto: {engine.layout_reason}", err=True)
    if engine.config.engine is not None:
        note = f"running the cached engine {engine.config.engine} (--executor eager runs the model itself)"
        typer.echo(note, err=True)


def advise_cached(engine: Engine, executor: str | None, size: tuple[int, int] | None = None) -> None:
    """Print once how to make an engine for the cache, where one could run in place of the model.

    executor: that the user chose; with another than `auto` the model itself is to run. size: of pictures, None for the
    model's.
    """
    if executor not in (None, AUTO) or engine.config.device != "cpu" or engine.config.engine is not None:
        return
    from ..export.engine_cache import cache_advice

    if (advice := cache_advice(engine, size)) is not None:
        typer.echo(advice, err=True)


def check_beside_engine(engine: object, given: Mapping[str, object]) -> None:
    """Raise UsageError for flags, by name, that an exported engine has its own answer to."""
    if engine is not None and (flags := [flag for flag, value in given.items() if value is not None]):
        raise UsageError(f"--engine {quoted(str(engine))} has {flags[0]} of its own; leave it out")


def check_start(model: str, preset: str | None, given: Mapping[str, object], **reading: Any) -> None:
    """Raise UsageError for an image or a camera that a stream of a model needs, or does not take, before it is loaded.

    given: values of --image, --video and --camera, by option; those that a command has. reading: arguments of
    `read_checkpoint`. A name of the hub is checked when its files are there, by `Engine.open`.
    """
    from ..models.registry import default_preset, find_preset

    image, video, camera = (given.get(option) for option in ("--image", "--video", "--camera"))
    if find_preset(preset or default_preset(model)).context.image != "channels" and camera is None:
        return
    spec, name = known_spec(model, **reading), quoted(model)
    if spec is None:
        return
    if spec.condition_channels and video is not None:
        raise UsageError(f"{name} continues an image, not a video; give --image in place of --video")
    if spec.condition_channels and image is None:
        raise UsageError(f"{name} begins with an image, and there is none; give --image")
    if spec.camera_channels is None and camera is not None:
        raise UsageError(f"--camera {quoted(str(camera))} is given, but {name} follows none; leave it out")
    if spec.camera_channels is not None and "--camera" in given and camera is None:
        raise UsageError(f"{name} follows a camera, and there is none; give --camera")


def known_spec(model: str, **reading: Any) -> ModelSpec | None:
    """Return the sizes of a model without its weights; None for a name of the hub whose sizes are not known."""
    from ..models.registry import MODELS, PRESETS, read_checkpoint

    if model in MODELS:
        return MODELS[model]
    if Path(model).exists():
        return read_checkpoint(model, **reading).spec
    return MODELS.get(PRESETS[model].about.base) if model in PRESETS else None


def check_nvtx(nvtx: bool, device: str | None) -> None:
    """UsageError for NVTX ranges on another device than a GPU."""
    if not nvtx:
        return

    from ..runtime.config import default_device

    device = device or default_device()
    if not device.startswith("cuda"):
        raise UsageError(f"--nvtx marks work on a GPU, and device is {quoted(device)}; leave --nvtx out, or use cuda")
