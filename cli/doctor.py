"""`inferix doctor`: installed packages, hardware, and the features that work on this machine.

One dict of facts is both the JSON output and the source of the tables. Packages are looked up by their metadata, so a
broken optional package does not break the report.
"""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..export.targets import TARGETS, Target
from ..version import __version__
from .options import counted

GIVES = {
    "torch": "runs the models; required",
    "transformers": "UMT5 text encoder: prompts as text",
    "av": "writes and reads video files",
    "ftfy": "cleans prompts as Wan's training did",
    "triton": "the GPU kernels of inferix.kernels",
    "cuda-bindings": "reads captured CUDA graphs: inferix graph --captured",
    "flash-attn": "one more form of block attention, for comparison and where it is asked for",
    "onnx": "export to the targets onnx and openvino, with onnxscript",
    "onnxscript": "export to the targets onnx and openvino, with onnx",
    "onnxruntime": "runs engines of target onnx",
    "openvino": "exports and runs engines of target openvino",
    "tensorrt": "builds and runs engines of target tensorrt; never run",
    "uvicorn": "inferix serve, with the other packages of the extra serve",
    "diffusers": "the other implementation that the tests compare with",
}


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_facts() -> dict[str, Any]:
    """Return the cores of this process, the memory in GiB (None if unknown), and the instructions for bfloat16."""
    from ..models.random import host_memory
    from ..runtime.capacity.cpu_features import bfloat16_unit, cpu_flags

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = host_memory()
    return {
        "machine": platform.machine(),
        "cores": cores,
        "memory_gib": memory and round(memory / 2**30, 1),
        "bfloat16": bfloat16_unit(cpu_flags()),
    }


def gpu_facts() -> list[dict[str, Any]]:
    """Return name, memory in GiB and compute capability of each GPU that torch can use."""
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": device.name,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "capability": f"{device.major}.{device.minor}",
        }
        for device in devices
    ]


def engines(target: Target) -> str:
    """Return whether engines of a target can be exported and run here, and where such engines have run."""
    runs, missing = find_spec(target.runtime) is not None, target.missing
    install = f"pip install 'inferix-runtime[{target.extra}]'"
    if missing:
        state = f"can be run; to export: {install}" if runs else f"missing: {install}"
    elif not runs:
        state = f"can be exported; to run: pip install {target.runtime}"
    else:
        state = "can be exported and run"
    return f"{state}; {target.history}"


def cached_verdict() -> str:
    """Return the executor that generate and play take for the small world on a CPU, and the way to another."""
    from ..export.engine_cache import OFF, VARIABLE, cache_folder, find_cached, read_cached

    if cache_folder() is None:
        return f"eager; {VARIABLE} is {OFF}"
    folder = find_cached(None, None, None, {"device": "cpu"})
    cached = None if folder is None else read_cached(folder)
    if cached is not None:
        return f"engine {cached.folder}, {cached.speedup:.1f} times as fast as eager (--executor eager leaves it out)"
    if TARGETS["onnx"].missing or find_spec(TARGETS["onnx"].runtime) is None:
        return "eager; pip install 'inferix-runtime[onnx]' and inferix export --cache, if an engine is faster here"
    return "eager; inferix export --cache makes an engine, which runs if it is faster"


def verdicts(packages: dict[str, str | None], gpus: list[dict[str, Any]], cpu: dict[str, Any]) -> dict[str, str]:
    """Return the state of each feature in one line."""
    unit = cpu["bfloat16"]

    def needs(name: str) -> str:
        return "works" if packages[name] else f"missing: pip install {name}"

    without = "compile here" if packages["triton"] else "compile where triton is (pip install triton)"
    return {
        "generate on the CPU": "works",
        "bfloat16 on the CPU": (
            f"faster than float32, by {unit} (--dtype bfloat16)" if unit
            else "works, but slower than float32: no AVX-512 BF16 or AMX"
        ),
        "small world on the CPU": cached_verdict(),
        "generate on a GPU": "works (--device cuda)" if gpus else "no GPU that torch can use",
        "video files": needs("av"),
        "serving": "works" if packages["uvicorn"] else "missing: pip install 'inferix-runtime[serve]'",
        "prompts as text": needs("transformers"),
        "prompt cleaning": needs("ftfy"),
        "GPU kernels": needs("triton") if gpus else f"{without}, run where there is a GPU",
    } | {f"engines of target {target.name}": engines(target) for target in TARGETS.values()}


def chosen_kernels(gpus: list[dict[str, Any]]) -> dict[str, str]:
    """Return the implementation of each op that would run on the first GPU, else on the CPU, and if it was tuned."""
    import torch

    from ..kernels.catalog import SPECS
    from ..kernels.tuning import table_path

    device = torch.device("cuda" if gpus else "cpu")
    chosen = {name: spec.chosen(device, spec.implementations[0].dtypes[0]) for name, spec in SPECS.items()}
    for name in chosen if gpus else ():
        if table_path(name, gpus[0]["name"]).exists():
            chosen[name] += ", or the one in the GPU's tuning table"
    return chosen


def report() -> dict[str, Any]:
    packages = {name: installed(name) for name in GIVES}
    gpus, cpu = gpu_facts(), cpu_facts()
    return {
        "inferix": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "cpu": cpu,
        "gpus": gpus,
        "kernels": chosen_kernels(gpus),
        "features": verdicts(packages, gpus, cpu),
    }


def doctor(as_json: bool = typer.Option(False, "--json", help="One JSON line instead of tables.")) -> None:
    """Show what is installed and what works on this machine.

    Example: inferix doctor --json
    """
    facts = report()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    console = Console()
    console.print(f"inferix {facts['inferix']}, python {facts['python']}", highlight=False)
    packages = Table("package", "installed", "gives", title="Packages", title_justify="left")
    for name, version in facts["packages"].items():
        packages.add_row(name, version or "missing", GIVES[name])
    machine = Table("part", "facts", title="Machine", title_justify="left")
    cpu = facts["cpu"]
    memory = "memory unknown" if cpu["memory_gib"] is None else f"{cpu['memory_gib']} GiB of memory"
    machine.add_row("CPU", f"{cpu['machine']}, {counted(cpu['cores'], 'core')}, {memory}")
    for gpu in facts["gpus"]:
        described = f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
        machine.add_row("GPU", described)
    if not facts["gpus"]:
        machine.add_row("GPU", "none that torch can use")
    features = Table("feature", "verdict", title="Features", title_justify="left")
    for feature, verdict in facts["features"].items():
        features.add_row(feature, verdict)
    kernels = Table("op", "form that runs here", title="Kernels", title_justify="left")
    for op, form in facts["kernels"].items():
        kernels.add_row(op, form)
    for table in (packages, machine, kernels, features):
        console.print(table)
