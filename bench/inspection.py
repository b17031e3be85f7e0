"""Inspection of a block at a full window: memory by owner, launches, time by pass and by kind of work.

These blocks are never compared with other candidates, since profiling slows a block down.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from ..runtime.engine import Engine
from ..runtime.executor_specs import EXECUTORS
from ..runtime.telemetry.profile import Ceilings, Profile
from .candidates import Candidate, EngineStream, Stream, candidate_errors, failure_reason
from .machine import synchronize
from .result import Series

KERNELS = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
GRAPHS = ("cudaGraphLaunch", "cuGraphLaunch")


def inspect_block(candidate: Candidate, engine: Engine, full: int, ceilings: Mapping[str, Series]) -> dict[str, Any]:
    """Memory and launches of the block after `full` others; for graph executors, also its profile.

    If a part fails, it is left out and `not_seen` has the reason. No candidate may have an engine at this time.
    """
    facts: dict[str, Any] = {"memory": {}, "launches": None}
    try:
        facts |= memory_and_launches(candidate, engine, full)
        candidate.drop()
        if candidate.name in EXECUTORS and EXECUTORS[candidate.name].graphs:
            facts["profile"] = profiled(candidate, full, ceilings)
    except candidate_errors() as error:
        facts["not_seen"] = failure_reason(error)
    finally:
        candidate.drop()
    return facts


def memory_and_launches(candidate: Candidate, engine: Engine, full: int) -> dict[str, Any]:
    """Bytes by owner; on a GPU also the peak, and the launches of graphs and kernels."""
    device = str(engine.device)
    unshare_weights(engine)
    elsewhere = -sum(weights(engine).values())  # memory of others, such as the oracle's pages
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
        peak = torch.cuda.max_memory_allocated(device)
        return {
            "memory": memory | {"passing": peak - before, "peak": peak - elsewhere},
            "launches": launches_of(stream, device),
        }
    finally:
        stream.close()


def unshare_weights(engine: Engine) -> None:
    """Give each weight its own memory again after an engine that joined weights into one storage is gone.

    The next engine would otherwise keep a second copy of them.
    """
    gc.collect()  # engines and their sessions point at each other
    for weight in (weight for module in engine.parts.transformers for weight in module.parameters()):
        if weight.untyped_storage().nbytes() > weight.nbytes:
            weight.data = weight.data.clone()


def weights(engine: Engine) -> dict[str, int]:
    return {
        "transformer weights": sum(
            weight.nbytes for module in dict.fromkeys(engine.parts.transformers) for weight in module.parameters()
        ),
        "decoder weights": sum(weight.nbytes for weight in engine.parts.vae.parameters()),
    }


def launches_of(stream: Stream, device: str) -> dict[str, int]:
    """Count the launches of the next block, without its decoder."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        stream.step(decode=False)
        synchronize(device)
    return count_launches(event.name for event in profiled.events())


def count_launches(names: Iterable[str]) -> dict[str, int]:
    """Count launches of whole graphs and of single kernels in the names of API calls."""
    calls = [name.partition("_v")[0] for name in names]  # some profilers append the driver API's version
    return {"graphs": sum(name in GRAPHS for name in calls), "kernels": sum(name in KERNELS for name in calls)}


def profiled(candidate: Candidate, full: int, ceilings: Mapping[str, Series]) -> dict[str, Any]:
    """Profile one block by pass and by kind of work. Profiling starts before the executor captures anything."""
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
    (block_profile,) = profile.blocks
    return {
        "passes": profile.passes(block_profile),
        "families": {kind: asdict(cost) for kind, cost in profile.families(block_profile).items()},
        "between_calls": profile.gaps(block_profile),
        "share_of_marks": profile.overhead(),
    }
