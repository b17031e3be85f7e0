"""Times of an exported engine beside the executors of the model it was made of, in one run.

`python -m inferix.bench.exported DIR [--blocks N]` makes the same stream on each, a block of each in turn, so that load
from elsewhere meets all alike. It prints medians and paired ratios as JSON. The plan names the model.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..export.run import ExportedEngine
from ..runtime.load import load
from .machine import command, environment

TOLERANCE = 1e-3  # largest difference of latents between two runners of one stream


def makers(folder: Path, executors: list[str], seed: int, threads: int) -> dict[str, Callable[[], Any]]:
    """A function for each runner that makes its next block, decoded."""
    exported = ExportedEngine(folder, threads)
    plan, stream = exported.plan, exported.open(exported.plan["defaults"]["prompt"], seed)
    made: dict[str, Callable[[], Any]] = {"onnxruntime": stream.next_block}
    size = (plan["size"]["picture"][0], plan["size"]["picture"][1])
    inside = load(engine=folder).open(plan["defaults"]["prompt"], seed=seed).stream()
    made["engine"] = lambda: next(inside)
    for name in executors:
        engine = load(plan["model"]["source"], plan["preset"]["name"], device="cpu", executor=name)
        blocks = engine.open(plan["defaults"]["prompt"], seed=seed, size=size).stream()
        made[name] = lambda blocks=blocks: next(blocks)  # type: ignore[misc]
    return made


def measure(folder: Path, executors: list[str], blocks: int, warm: int, seed: int, threads: int) -> dict[str, Any]:
    """Seconds of each block by runner, after `warm` blocks; AssertionError if latents differ."""
    runners = makers(folder, executors, seed, threads)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for index in range(warm + blocks):
        latents = {}
        for name, make in runners.items():
            begun = time.perf_counter()
            block = make()
            if index >= warm:
                seconds[name].append(time.perf_counter() - begun)
            latents[name] = np.asarray(block.latents)
        reference = latents["onnxruntime"]
        assert all(np.abs(other - reference).max() < TOLERANCE for other in latents.values()), index
    paired = {
        name: median(other / own for other, own in zip(seconds[name], seconds["onnxruntime"], strict=True))
        for name in runners
    }
    medians = {name: median(times) for name, times in seconds.items()}
    return {
        "engine": str(folder), "blocks": blocks, "median_seconds": medians,
        "times_onnxruntime": paired, "command": command(), "environment": environment("cpu"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--executors", nargs="*", default=["eager", "fused"])
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(measure(options.folder, options.executors, options.blocks, options.warm, options.seed,
                             options.threads), indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
