"""Example results for tests of their readers; the figures are invented."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inferix.bench.result import Result, Series, as_in_a_file
from inferix.models.registry import PRESETS

CPU = {"type": "cpu", "name": "Some Processor"}
FULL = {
    "executor": "captured", "dtype": "bfloat16", "lowp": None, "kv_dtype": None, "lowp_layers": ["blocks.*"],
    "lowp_keep": [],
}  # fmt: skip
H200 = {"type": "cuda", "name": "NVIDIA H200", "capability": "9.0", "memory": 1, "multiprocessors": 1}


def block_result(
    series: dict[str, list[float]], device: dict[str, Any] = CPU, model: str = "wan-1.3b", **settings: Any
) -> Result:
    """Block result of 1.3B Self-Forcing at a full window, with these samples."""
    names = dict.fromkeys(name.partition("/")[0] for name in series)
    step = {"kind": "denoise", "frames": 3, "context": 21}
    work = {"flops": 10**12, "nbytes": 10**9}
    return Result(
        kind="block",
        clock="none",
        environment={
            "date": "2026-01-02T03:04:05+00:00", "command": "inferix bench block", "commit": "abc", "device": device,
            "host": {"processor": "p", "cores": 2, "threads": 1, "load": 0.0, "system": "s"}, "driver": None,
            "clocks": None, "versions": {"torch": "2.13", "python": "3.12", "cuda": None},
        },
        subject={
            "model": model, "checkpoint": {"source": model, "format": "random", "sha256": None}, "random_weights": True,
            "parameters": 10, "decoder": "CausalVae",
        },
        settings={
            "size": [832, 480], "config": FULL, "preset": as_in_a_file(asdict(PRESETS["self-forcing"])), **settings,
        },
        ceilings={
            "copy_bytes": Series("B/s", (2e12, 1e12), "more"), "matmul_flops": Series("FLOP/s", (5e14,), "more"),
        },
        series={name: Series("s", tuple(samples)) for name, samples in series.items()},
        facts={
            "oracle": "eager", "tolerance": 0.04, "bits_off": None, "left_out": {},
            "candidates": {
                name: {
                    "about": "a", "difference": 0.0, "allowed": 0.04, "refused": None, "memory": {"cache": 1},
                    "launches": {"graphs": 1, "kernels": 9},
                }
                for name in names
            },
            "block": {
                "latent_frames": 3, "pixel_frames": 12, "window_frames": 21, "blocks_before_full": 6, "fps": 16,
                "passes": [step],
            },
            "work": {"passes": [work], "transformer": work, "decoder": work, "counted": "by hand"},
            "growth": {name: {"3": [0.1, 0.12], "6": [0.2]} for name in names},
        },
    )  # fmt: skip
