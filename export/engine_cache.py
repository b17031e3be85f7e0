"""Exported engines in the user's cache folder, found again by the model that they were made of.

`inferix export --cache` makes one. On a CPU `load(executor="auto")` runs it in place of the model if it was measured to
be faster. The environment variable `INFERIX_ENGINE_CACHE` names another folder, or is `off`: none is looked for.

The name of an engine's folder is a hash of what its pictures depend on: the files of the model, the preset, the size,
the modules that were traced, and the versions of inferix, torch and the runtime. An engine of other weights, code or
versions is not found.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ..errors import InferixError, UsageError, quoted
from ..models.registry import MODELS, default_model, default_preset, make_preset, read_checkpoint, shipped
from ..runtime.config import SETTINGS, EngineConfig, default_device
from ..runtime.engine import Engine
from ..runtime.files import write_atomically
from ..runtime.limits import Limits
from ..runtime.load import load
from ..runtime.sessions.output_queue import Block
from ..schemes.defaults import DEFAULT_PROMPT
from ..schemes.presets import FIELDS, with_settings
from ..user_files import read_json
from ..version import __version__
from .engine_folder import rows_of, write_engine, writes_words
from .inside import KEPT, load_exported, needs_other_programs
from .plan import VERSIONS, file_hash, preset_values, read_plan
from .targets import TARGETS, check_target, find_target, needed_features

VARIABLE, OFF = "INFERIX_ENGINE_CACHE", "off"
TARGET = "onnx"
TRACED = ("models", "schemes", "export")  # folders of the package
MEASURED = "measured.json"  # beside the plan, which does not list it: an engine without it is not used
RUN = ("eager", "exported")  # what is timed
ADVISED = "advised"  # an empty file of the cache: the user has been advised to make an engine
WARM_UP, TIMED = 2, 5  # blocks
TOLERANCE = 1e-3  # largest difference of latents, relative to the largest latent
LARGEST = 1 << 30  # bytes of a model: its files are hashed whenever it is loaded
PLAIN: dict[str, Any] = {  # settings with which an engine can run in place of a model: the defaults, on a CPU
    **{field.name: field.default for field in fields(EngineConfig)},
    "device": "cpu", "dtype": "float32", "kernels": {},
}  # fmt: skip


@dataclass(frozen=True)
class CachedEngine:
    """An engine in the cache. seconds: median of a block's, by the model itself (`eager`) and by the engine."""

    folder: Path
    seconds: Mapping[str, float]

    @property
    def speedup(self) -> float:
        return self.seconds["eager"] / self.seconds["exported"]


def cache_folder() -> Path | None:
    """The folder of cached engines; None where the environment turns it off."""
    chosen = os.environ.get(VARIABLE)
    if chosen == OFF:
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(caches) / "inferix" / "engines"


def read_cached(folder: Path) -> CachedEngine | None:
    """The engine in a folder of the cache; None where there is none, or one that was not measured.

    UsageError for a file of its times that was changed.
    """
    path = folder / MEASURED
    if not path.is_file():
        return None
    seconds = read_json(path, "times of a cached engine")
    values = [seconds.get(name) for name in RUN] if isinstance(seconds, dict) else []
    if not values or not all(isinstance(value, int | float) and value > 0 for value in values):
        raise UsageError(
            f"times of a cached engine in {quoted(str(path))} are {quoted(seconds)}; expected seconds of "
            f"{' and '.join(RUN)}: delete its folder"
        )
    return CachedEngine(folder, seconds)


def find_cached(
    model: str | Path | None, preset: str | None, size: tuple[int, int] | None, settings: Mapping[str, Any]
) -> Path | None:
    """The cached engine that runs in place of a model; None where there is none, or none that is faster.

    The arguments are those of `load`. With settings that an engine does not have, such as an adapter or another device,
    there is none.
    """
    folder = cache_folder()
    if folder is None or not folder.is_dir() or find_spec(TARGETS[TARGET].runtime) is None:
        return None
    given = {key: value for key, value in settings.items() if value is not None}
    own = {"device": default_device()} | {key: given[key] for key in given if key in SETTINGS and key not in KEPT}
    if any(value != PLAIN[key] for key, value in own.items()):
        return None
    if (key := engine_key(model, preset, size)) is None:
        return None
    try:
        cached = read_cached(folder / key)
        plan = None if cached is None or cached.speedup <= 1 else read_plan(cached.folder)
    except InferixError as error:
        warnings.warn(f"the model itself runs, since its cached engine cannot be read: {error}", stacklevel=2)
        return None
    if plan is None or plan["text"]["encoder"] != "words":
        return None
    scheme = with_settings(plan.preset, **{key: value for key, value in given.items() if key in FIELDS})
    can = TARGETS[TARGET].can >= set(needed_features(scheme, plan["dtype"], False))
    return plan.folder if can and needs_other_programs(plan, scheme) is None else None


def cache_advice(engine: Engine, size: tuple[int, int] | None = None) -> str | None:
    """Advise the user, once for a cache, to make an engine of a loaded model.

    size: of its pictures, None for the model's. None where the advice has been given, an engine has been made, or none
    could be made here or run in the model's place, as with settings that an engine does not have.
    """
    config, folder = engine.config, cache_folder()
    if folder is None or not writes_words(engine) or not could_run(engine, size):
        return None
    try:
        if (folder / ADVISED).exists():
            return None
        key = engine_key(config.model, config.preset, None)
        if key is None or (folder / key).exists():
            return None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADVISED).touch()
    except OSError:  # an engine could not be written there either
        return None
    command = ["inferix", "export", "--cache"]
    default = default_model(None)
    if (config.model, config.preset) != (default, default_preset(default)):
        command += ["--model", config.model, "--preset", config.preset]
    return (f"{shlex.join(command)} makes an engine of this model in a minute or two; generate and play then run it, "
            "if it is faster here")  # fmt: skip


def could_run(engine: Engine, size: tuple[int, int] | None) -> bool:
    """True if an engine could be made here of a loaded model, and run in its place with its settings."""
    config, target = engine.config, TARGETS[TARGET]
    if size not in (None, engine.default_size) or engine.preset != make_preset(config.preset):
        return False
    if any(getattr(config, key) != PLAIN[key] for key in SETTINGS if key not in (*KEPT, "model", "preset")):
        return False
    if target.missing or find_spec(target.runtime) is None:
        return False
    return target.can >= set(needed_features(engine.preset, config.dtype, False))


def load_cached(
    model: str | Path | None,
    preset: str | None,
    size: tuple[int, int] | None,
    limits: Limits,
    settings: Mapping[str, Any],
) -> Engine | None:
    """Load the engine that `find_cached` finds; None without one."""
    if (folder := find_cached(model, preset, size, settings)) is None:
        return None
    given = {key: value for key, value in settings.items() if value is not None and key in (*KEPT, *FIELDS)}
    return load_exported(folder, limits, given)


def engine_key(model: str | Path | None, preset: str | None, size: tuple[int, int] | None) -> str | None:
    """The name of an engine's folder. None for a model that is no folder of at most 1 GiB, such as one of the hub."""
    name = default_model(preset) if model is None else str(model)
    place = shipped(name) if name in MODELS and not Path(name).exists() else Path(name)
    if place is None or not place.is_dir():
        return None
    files = sorted(path for path in place.rglob("*") if path.is_file())
    if sum(path.stat().st_size for path in files) > LARGEST:
        return None
    facts = {
        "files": {path.relative_to(place).as_posix(): file_hash(path) for path in files},
        "preset": preset_values(make_preset(preset or default_preset(name))),
        "size": size or read_checkpoint(place).spec.default_size,
        "versions": [max(VERSIONS), __version__, torch.__version__, import_module(TARGETS[TARGET].runtime).__version__],
        "code": code_hash(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code_hash() -> str:
    """A hash of the modules in `TRACED`, which programs are traced from."""
    root = Path(__file__).parents[1]
    files = sorted(path for folder in TRACED for path in (root / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def make_cached(
    model: str | Path | None = None,
    preset: str | None = None,
    size: tuple[int, int] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> CachedEngine:
    """Export a model into the cache, unless it is there, and measure it beside the model.

    Raises UsageError where the cache is off, for a model that is no folder or has no table of words, and for what the
    target cannot do.
    """
    folder, target = cache_folder(), find_target(TARGET)
    if folder is None:
        raise UsageError(f"{VARIABLE} is {OFF}, so there is no cache of engines; unset it, or give out")
    key = engine_key(model, preset, size)
    name = default_model(preset) if model is None else str(model)
    if key is None:
        raise UsageError(f"model is {quoted(name)}; the cache takes a folder of all parts, of at most 1 GiB: give out")
    if (cached := read_cached(folder / key)) is not None:
        progress(f"{cached.folder} is there already")
        return cached
    check_target(target, make_preset(preset or default_preset(name)), "float32", False)
    progress(f"loading {name}")
    engine = load(name, preset, device="cpu", executor="eager", dtype="float32", size=size)
    if not writes_words(engine):
        raise UsageError(f"model is {quoted(name)}, whose prompts need its text encoder; an engine in the cache has to "
                         "follow any prompt: give out, and prompts to take along")  # fmt: skip
    if not (folder / key).is_dir():
        prefixes = engine.parts.vae.spec.encodes and engine.preset.context.image == "prefix"
        chosen = engine.default_size if size is None else size
        write_engine(engine, folder / key, chosen, target, rows_of(engine, ()), False, prefixes, progress)
    progress("measuring")
    seconds = measured_seconds(engine, load_exported(folder / key, Limits(), {}))
    write_atomically(folder / key / MEASURED, lambda part: part.write_text(json.dumps(seconds), "utf-8"))
    return CachedEngine(folder / key, seconds)


def measured_seconds(model: Engine, exported: Engine) -> dict[str, float]:
    """Median seconds of a block by a model and by its exported engine, in turn; InferixError if latents differ."""
    seconds: dict[str, list[float]] = {name: [] for name in RUN}
    size = exported.default_size
    with model.open(DEFAULT_PROMPT, size=size) as first, exported.open(DEFAULT_PROMPT, size=size) as second:
        for index in range(WARM_UP + TIMED):
            made: list[Block] = []
            for samples, session in zip(seconds.values(), (first, second), strict=True):
                begun = perf_counter()
                made += session.stream(1)
                if index >= WARM_UP:
                    samples.append(perf_counter() - begun)
            expected, latents = (block.latents for block in made)
            difference = float((latents - expected).abs().max())
            if not difference <= TOLERANCE * float(expected.abs().max()):
                raise InferixError(f"latents of the exported engine differ by {difference:.1e} in block {index}")
    return {name: median(samples) for name, samples in seconds.items()}
