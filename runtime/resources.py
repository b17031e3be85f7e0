"""Resources of an engine: what it has loaded. The block loop and the sessions read them and change none."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..models.spec import ModelSpec
from ..schemes.presets import Preset
from .config import DTYPES, EngineConfig
from .execution.executors import Executor, make_executor
from .execution.loading import Components
from .kv.kv_manager import KVManager
from .kv.page_store import KV_DTYPES
from .streams import make_current


@dataclass(frozen=True)
class Resources:
    """Settings, weights, page memory and executor of one engine.

    preset: as loaded; page memory and graphs are sized for it. An overloaded engine can narrow the window of sessions:
    `SessionManager.preset` is that narrower preset.
    """

    config: EngineConfig
    preset: Preset
    parts: Components
    kv_manager: KVManager
    executor: Executor
    device: torch.device
    dtype: torch.dtype

    @property
    def spec(self) -> ModelSpec:
        return self.parts.transformer.spec


def make_resources(
    config: EngineConfig, preset: Preset, parts: Components, executor: Executor | None = None
) -> Resources:
    """Allocate page memory and make the executor that `config` names, unless one is given."""
    device, dtype = torch.device(config.device), DTYPES[config.dtype]
    make_current(device)
    executor = executor or make_executor(config, preset, parts)
    kv_dtype = KV_DTYPES[config.kv_dtype] if config.kv_dtype is not None else dtype
    model = parts.transformer
    kv_manager = KVManager(model.spec, model.rope, preset, (dtype, kv_dtype), device, config.kv_memory)
    return Resources(config, preset, parts, kv_manager, executor, device, dtype)
