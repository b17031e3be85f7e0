"""What a block at a full window does inside: memory by owner, launches, passes and kinds of work. None of it is timed
against other candidates, since looking slows a block down.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..runtime.engine import Engine
from ..runtime.telemetry.profile import Ceilings, Profile
from .candidates import EXECUTOR_NOTES, Candidate, EngineStream, Stream, failures, trouble
from .machine import synchronize
from .result import Series
from .subject import ORACLE

KERNELS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")


def look_inside(candidate: Candidate, engine: Engine, full: int, ceilings: Mapping[str, Series]) -> dict[str, Any]:
    """Memory and launches of the block after `full` others; for graph executors, its profile too. What cannot be seen
    is left out, and `not_seen` says why. No engine of a candidate may be there.
    """
    found: dict[str, Any] = {"memory": {}, "launches": None}
    try:
        found |= held_and_launched(candidate, engine, full)
        candidate.drop()
        if candidate.name in EXECUTOR_NOTES and candidate.name != ORACLE:
            found["profile"] = profiled(candidate, full, ceilings)
    except failures() as error:
        found["not_seen"] = trouble(error)
    finally:
        candidate.drop()
    return found


def held_and_launched(candidate: Candidate, engine: Engine, full: int) -> dict[str, Any]:
    """Bytes by owner, and on a GPU the most that were held at once, and what was launched."""
    device = str(engine.device)
    part_weights(engine)
    elsewhere = -sum(weights(engine).values())  # what is there and not the candidate's, such as the oracle's pages
    if engine.device.type != "cpu":
        elsewhere += torch.cuda.memory_allocated(device)
    stream = candidate.open()
    try:
        for _ in range(full):
            stream.step()
        memory = {**weights(engine), **candidate.owners(stream)}
        if engine.device.type == "cpu":
            return {"memory": memory}
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        stream.step()
        most = torch.cuda.max_memory_allocated(device)
        return {
            "memory": memory | {"passing": most - before, "peak": most - elsewhere},
            "launches": launches_of(stream, device),
        }
    finally:
        stream.close()


def part_weights(engine: Engine) -> None:
    """Give weights that an engine has put one after another, and that is gone, memory of their own again: the next one
    would hold a copy of its own beside them.
    """
    gc.collect()  # engines and their sessions point at each other
    for weight in engine.parts.transformer.parameters():
        if weight.untyped_storage().nbytes() > weight.nbytes:
            weight.data = weight.data.clone()


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


def profiled(candidate: Candidate, full: int, ceilings: Mapping[str, Series]) -> dict[str, Any]:
    """Passes and kinds of work of one block of an executor that is told before it captures anything."""
    packed = ceilings["packed_flops"].best if "packed_flops" in ceilings else None
    roof = Ceilings(ceilings["matmul_flops"].best, ceilings["copy_bytes"].best, packed)
    stream = candidate.open()
    try:
        assert isinstance(stream, EngineStream)
        profile = Profile(candidate.name, stream.session.manager.resources.device, roof)
        stream.session.manager.resources.executor.start_profile(profile)
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
