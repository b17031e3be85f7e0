"""Inferix: a runtime for block-diffusion (semi-autoregressive) video world models.

`load` gives an `Engine`, `Engine.open` a `Session`, `Session.stream` its blocks. The names are loaded when first
used, so that `import inferix` and the command's help stay instant.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import AtCapacity, CheckpointError, InferixError, RankFailed, SessionEnded, UsageError
from .version import __version__

if TYPE_CHECKING:
    from .models.family import Format
    from .models.registry import FORMATS, PRESETS, make_preset
    from .runtime.config import EngineConfig
    from .runtime.engine import Engine
    from .runtime.execution.executors import Executor
    from .runtime.executor_specs import EXECUTORS, ExecutorSpec
    from .runtime.limits import DegradationStep, Limits
    from .runtime.load import load
    from .runtime.noise import InjectedNoise
    from .runtime.sessions.output_queue import Block
    from .runtime.sessions.session import Session
    from .schemes.camera import Camera, CameraMove, CameraSpeeds
    from .schemes.presets import About, Preset

MODULES = {
    "About": "schemes.presets",
    "Block": "runtime.sessions.output_queue",
    "Camera": "schemes.camera",
    "CameraMove": "schemes.camera",
    "CameraSpeeds": "schemes.camera",
    "DegradationStep": "runtime.limits",
    "EXECUTORS": "runtime.executor_specs",
    "Engine": "runtime.engine",
    "EngineConfig": "runtime.config",
    "Executor": "runtime.execution.executors",
    "ExecutorSpec": "runtime.executor_specs",
    "FORMATS": "models.registry",
    "Format": "models.family",
    "InjectedNoise": "runtime.noise",
    "Limits": "runtime.limits",
    "PRESETS": "models.registry",
    "Preset": "schemes.presets",
    "Session": "runtime.sessions.session",
    "load": "runtime.load",
    "make_preset": "models.registry",
}

# Passes on a CPU have hundreds of parallel loops of microseconds. A thread that waits for the next by spinning for long
# holds a core for which other threads wait. GNU's OpenMP reads the number of spins when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = [
    "EXECUTORS",
    "FORMATS",
    "PRESETS",
    "About",
    "AtCapacity",
    "Block",
    "Camera",
    "CameraMove",
    "CameraSpeeds",
    "CheckpointError",
    "DegradationStep",
    "Engine",
    "EngineConfig",
    "Executor",
    "ExecutorSpec",
    "Format",
    "InferixError",
    "InjectedNoise",
    "Limits",
    "Preset",
    "RankFailed",
    "Session",
    "SessionEnded",
    "UsageError",
    "__version__",
    "load",
    "make_preset",
]


def __getattr__(name: str) -> Any:
    if name in ("media", "checkpoint", "evaluate"):
        return import_module(f".{name}", __name__)
    if name not in MODULES:
        raise AttributeError(f"module 'inferix' has no attribute {name!r}")
    return getattr(import_module(f".{MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "checkpoint", "evaluate", "media"])
