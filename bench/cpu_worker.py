"""One candidate of `cpu_pairs` in a process of its own: loads a model, then runs blocks on command.

It is started as a file, so that the package it imports is that of the tree to measure, and uses only what older trees
have as well. Standard input has a JSON command in each line, and the answers go to standard output:
`{"threads": 1, "blocks": 2, "decode": true}` is answered with the CPU time and the wall time of these blocks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from typing import Any, TextIO


class EngineBlocks:
    """Blocks of a session, continued from command to command."""

    def __init__(self, engine: Any, rows: Any, size: tuple[int, int]) -> None:
        self.session = engine.open(prompt_embeds=rows, seed=0, size=size)

    def run(self, blocks: int, decode: bool) -> list[Any]:
        return [block.frames for block in self.session.stream(blocks, decode)]


class LoopBlocks:
    """Blocks of one of the baselines, over the weights of an engine."""

    def __init__(self, engine: Any, rows: Any, size: tuple[int, int], name: str) -> None:
        if name == "diffusers":
            loops = import_module("inferix.bench.diffusers_loop")
            self.loop: Any = loops.DiffusersLoop(engine, rows, 0, size)
        else:
            loops = import_module("inferix.bench.baseline")
            self.loop = loops.PlainLoop(engine, rows, 0, size, loops.run_layer)

    def run(self, blocks: int, decode: bool) -> list[Any]:
        return [self.loop.step(decode).frames for _ in range(blocks)]


class ExportedBlocks:
    """Blocks of an exported engine, by its runtime alone; `run` of the stream for the current count of threads."""

    def __init__(self, folder: str, threads: list[int]) -> None:
        exported = import_module("inferix.export.run").ExportedEngine
        engines = {count: exported(folder, count) for count in threads}
        prompt = engines[threads[0]].plan["defaults"]["prompt"]
        self.streams = {count: engine.open(prompt, seed=0) for count, engine in engines.items()}
        self.threads = threads[0]

    def run(self, blocks: int, decode: bool) -> list[Any]:
        return [self.streams[self.threads].next_block(decode).frames for _ in range(blocks)]


def prompt_rows(engine: Any) -> Any:
    """Random rows of a text encoder [text_len, text_dim], zero after the first quarter."""
    import torch

    spec = engine.spec
    rows = torch.zeros(spec.text_len, spec.text_dim)
    used = max(1, spec.text_len // 4)
    rows[:used] = torch.randn(used, spec.text_dim, generator=torch.Generator().manual_seed(0))
    return rows.to(engine.dtype)


def main() -> None:
    """Run the candidate that the JSON in the first argument describes until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is no answer
    given = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    if given["engine"] is not None:
        return answer(ExportedBlocks(given["engine"], given["threads"]), given, answers)
    executor = "fused" if given["candidate"] == "fused" else "eager"
    settings = {"preset": given["preset"], "device": "cpu", "dtype": given["dtype"], "executor": executor}
    load = import_module("inferix").load  # of the tree to measure
    engine = load(given["model"], **settings, **given["settings"])
    rows, size = prompt_rows(engine), tuple(given["size"])
    if given["candidate"] in ("plain", "diffusers"):
        stream: Any = LoopBlocks(engine, rows, size, given["candidate"])
    else:
        stream = EngineBlocks(engine, rows, size)
    answer(stream, given, answers)


def answer(stream: Any, given: dict[str, Any], answers: TextIO) -> None:
    """Fill the window of a stream, then run the commands on standard input."""
    import numpy as np
    import torch

    begin = given["pictures"] if given["frames"] else 0
    frames = stream.run(begin, True)
    if begin:
        np.save(given["frames"], np.concatenate(frames))
    stream.run(given["fill"] - begin, False)
    exported = isinstance(stream, ExportedBlocks)
    for count in given["threads"][1:] if exported else ():
        stream.threads = count
        stream.run(given["fill"], False)
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        torch.set_num_threads(command["threads"])
        if exported:
            stream.threads = command["threads"]
        wall, cpu = time.perf_counter(), time.process_time()
        stream.run(command["blocks"], command["decode"])
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(json.dumps({"cpu": cpu, "wall": wall}), file=answers)


if __name__ == "__main__":
    main()
