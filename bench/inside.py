"""What a block at a full window does inside: memory by owner, launches, passes and kinds of work. None of it is timed
against other candidates, since looking slows a block down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..runtime.engine import Engine
from ..runtime.profile import Ceilings, Profile
from .candidates import EXECUTOR_NOTES, Candidate, EngineStream, Stream
from .machine import process_memory, synchronize
from .result import Series
from .subject import ORACLE, with_executor

KERNELS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")


def look_inside(candidate: Candidate, engine: Engine, full: int, ceilings: Mapping[str, Series]) -> dict[str, Any]:
    """Memory and launches of the block after `full` others; for graph executors, its profile too."""
    device = str(engine.device)
    stream = candidate.open()
    try:
        for _ in range(full):
            stream.step()
        memory: dict[str, int | None] = {**weights(engine), **candidate.owners(stream)}
        if engine.device.type == "cpu":
            stream.step()
            found: dict[str, Any] = {"memory": memory | {"process": process_memory()}, "launches": None}
        else:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            stream.step()
            memory |= {
                "scratch": torch.cuda.max_memory_allocated(device) - before,
                "peak": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.memory_reserved(device),
            }  # fmt: skip
            found = {"memory": memory, "launches": launches_of(stream, device)}
    finally:
        stream.close()
        candidate.drop()
    if candidate.name in EXECUTOR_NOTES and candidate.name != ORACLE:
        found["profile"] = profiled(candidate.name, engine, stream, full, ceilings)
    return found


def weights(engine: Engine) -> dict[str, int]:
    return {
        "transformer weights": sum(weight.nbytes for weight in engine.parts.transformer.parameters()),
        "decoder weights": sum(weight.nbytes for weight in engine.parts.vae.parameters()),
    }


def launches_of(stream: Stream, device: str) -> dict[str, int]:
    """Launches of the next block, its decoder left out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        stream.step(decode=False)
        synchronize(device)
    return count_launches(event.name for event in profiled.events())


def count_launches(names: Iterable[str]) -> dict[str, int]:
    """Calls that hand the device work: whole graphs, and single kernels."""
    held = [name.partition("_v")[0] for name in names]  # some profilers tell the driver's version of a call
    return {"graphs": sum(name in GRAPHS for name in held), "kernels": sum(name in KERNELS for name in held)}


def profiled(name: str, engine: Engine, like: Any, full: int, ceilings: Mapping[str, Series]) -> dict[str, Any]:
    """Passes and kinds of work of one block of an executor of its own, which is told before it captures anything."""
    twin = with_executor(engine, name)
    assert isinstance(like, EngineStream)
    packed = ceilings["packed_flops"].best if "packed_flops" in ceilings else None
    roof = Ceilings(ceilings["matmul_flops"].best, ceilings["copy_bytes"].best, packed)
    profile = Profile(name, twin.device, roof)
    twin.executor.start_profile(profile)
    stream = like.again(twin)
    try:
        for _ in range(full + 1):
            profile.drop()
            block = stream.step()
        profile.end_block(full, block.timings, dict)
    finally:
        stream.close()
    (held,) = profile.blocks
    return {
        "passes": profile.passes(held),
        "families": {kind: asdict(cost) for kind, cost in profile.families(held).items()},
        "between_calls": profile.gaps(held),
        "share_of_marks": profile.overhead(),
    }
