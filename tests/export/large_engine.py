"""Export a model of the size of Wan 1.3B with random weights, or read it back, and print the peak memory as JSON.

`large_engine.py write FOLDER LAYERS` and `large_engine.py read FOLDER`, each a process of its own, since the peak is
the process's. Both run one step over the same inputs; `read` prints the largest difference, relative to the largest
value.
"""

import dataclasses
import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np

SIZE = (64, 64)
PAST = 6  # frames
RESULT = "step.npy"  # beside the engine's folder


def step_inputs(plan: Any) -> dict[str, Any]:
    """Random inputs of `step`, the same in both processes."""
    generator = np.random.default_rng(0)
    return {
        value["name"]: generator.standard_normal([PAST if n == "past" else n for n in value["shape"]], np.float32)
        for value in plan["programs"]["step"]["inputs"]
    }


def write(folder: Path, layers: int) -> dict[str, Any]:
    import torch

    from inferix.export.engine_folder import describe_programs, write_engine
    from inferix.export.plan import read_plan
    from inferix.export.targets import TARGETS
    from inferix.graphs.shards import ALONE
    from inferix.models.registry import MODELS, make_preset
    from inferix.runtime.config import EngineConfig
    from inferix.runtime.engine import Engine
    from inferix.runtime.execution.loading import random_components

    spec = dataclasses.replace(MODELS["wan-1.3b"], num_layers=layers)
    config = EngineConfig.of("large", "self-forcing", device="cpu", dtype="float32", executor="eager", vae="taehv")
    preset = make_preset("self-forcing")
    engine = Engine(config, preset, random_components(spec, config, preset, lambda *_, **__: ALONE))
    loaded = peak()
    rows = {"a hill": torch.zeros(spec.text_len, spec.text_dim)}
    write_engine(engine, folder, SIZE, TARGETS["onnx"], rows, progress=lambda line: print(line, file=sys.stderr))
    (step,) = (program for program in describe_programs(engine, SIZE, False)[0] if program.name == "step")
    values = {name: torch.from_numpy(value) for name, value in step_inputs(read_plan(folder)).items()}
    names = iter(step.names)
    inputs = {key: [values[next(names)] for _ in value] if isinstance(value, list) else values[next(names)]
              for key, value in step.inputs.items()}  # fmt: skip
    with torch.no_grad():
        np.save(folder.parent / RESULT, step.module(**inputs).numpy())
    parameters = sum(parameter.numel() for parameter in engine.parts.transformer.parameters())
    return {"parameters": parameters, "loaded_gib": loaded, "bytes": (folder / "weights.bin").stat().st_size}


def read(folder: Path) -> dict[str, Any]:
    from inferix.export.backends import program_loader
    from inferix.export.plan import read_plan

    plan = read_plan(folder)
    path = plan.program("step")
    assert path is not None
    result, expected = program_loader(plan)(path)(step_inputs(plan))["velocity"], np.load(folder.parent / RESULT)
    assert "torch" not in sys.modules
    return {"difference": float(np.abs(result - expected).max() / np.abs(expected).max())}


def peak() -> float:
    """Largest resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    command, place, *layers = sys.argv[1:]
    facts = write(Path(place), int(layers[0])) if command == "write" else read(Path(place))
    print(json.dumps(facts | {"peak_gib": peak()}))
