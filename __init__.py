"""Inferix: a runtime for block-diffusion (semi-autoregressive) video world models.

`load` gives an `Engine`, `Engine.open` a `Session`, `Session.stream` its blocks. The names are loaded when first
used, so that `import inferix` and the command's help stay instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import InferixError, UsageError
from .version import __version__

if TYPE_CHECKING:
    from .runtime.config import EngineConfig
    from .runtime.engine import Engine
    from .runtime.limits import DegradationStep, Limits
    from .runtime.load import load
    from .runtime.noise import InjectedNoise
    from .runtime.sessions.output_queue import Block
    from .runtime.sessions.session import Session

LAZY = {
    "Block": "sessions.output_queue",
    "DegradationStep": "limits",
    "Engine": "engine",
    "EngineConfig": "config",
    "InjectedNoise": "noise",
    "Limits": "limits",
    "Session": "sessions.session",
    "load": "load",
}

__all__ = [
    "Block",
    "DegradationStep",
    "Engine",
    "EngineConfig",
    "InferixError",
    "InjectedNoise",
    "Limits",
    "Session",
    "UsageError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'inferix' has no attribute {name!r}")
    return getattr(import_module(f".runtime.{LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
