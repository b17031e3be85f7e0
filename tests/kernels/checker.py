"""The one check of an op: outputs against float64, everything written, nothing beside it touched; and wrong kernels."""

from __future__ import annotations

import importlib.util
import inspect
import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from inferix.kernels.spec import Case, KernelSpec
from inferix.kernels.verify import fault


def check(
    spec: KernelSpec, run: Callable[..., None], case: Case, dtype: torch.dtype, seed: int = 0, thorough: bool = False
) -> None:
    """AssertionError unless `run` computes a case as the reference does, within the spec's tolerance."""
    reason = fault(spec, run, case, dtype, seed=seed, thorough=thorough)
    assert reason is None, f"{case.name}, {dtype}: {reason}"


def changed(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A module with one piece of its source replaced, from a file, so that Triton can read it."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    path = folder / "wrong.py"
    path.write_text(source.replace(old, new), "utf-8")
    actual = importlib.util.spec_from_file_location(f"{module.__package__}.wrong", path)
    wrong = importlib.util.module_from_spec(actual)
    sys.modules[actual.name] = wrong
    linecache.checkcache(str(path))
    actual.loader.exec_module(wrong)
    return wrong
