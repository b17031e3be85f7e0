"""A worker in another process, over a pipe: plans as bytes, tensors as safetensors, nothing pickled.

As a program it serves one: `python process_worker.py PRESET '{"executor": "fused"}'` makes the test model of
`oracles.make_engine`, and each side draws weights and noise from their seeds.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import load, save
from torch import Tensor

from inferix.runtime.plans import Plan, decode_plan, encode_plan

LENGTHS = struct.Struct("<II")


def send(pipe: BinaryIO, text: bytes, tensors: Sequence[Tensor]) -> None:
    data = save({str(index): tensor.contiguous() for index, tensor in enumerate(tensors)}) if tensors else b""
    pipe.write(LENGTHS.pack(len(text), len(data)) + text + data)
    pipe.flush()


def receive(pipe: BinaryIO) -> tuple[bytes, list[Tensor]] | None:
    """A message; None at the pipe's end."""
    if len(header := pipe.read(LENGTHS.size)) < LENGTHS.size:
        return None
    text, data = (pipe.read(length) for length in LENGTHS.unpack(header))
    named = load(data) if data else {}
    return text, [named[str(index)].clone() for index in range(len(named))]


class ProcessWorker:
    """Runs plans in a process of its own."""

    def __init__(self, preset: str, **overrides: object) -> None:
        here = Path(__file__)
        paths = [str(here.parents[1]), str(here.parents[2] / "tools"), *sys.path]
        command = [sys.executable, str(here), preset, json.dumps(overrides)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.out, self.back = self.process.stdin, self.process.stdout
        ready = receive(self.back)
        assert ready is not None, "the worker's process ended"
        self.supports_whole_block = json.loads(ready[0])
        self.plans: list[Plan] = []

    def execute(self, plan: Plan, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        self.plans.append(plan)
        send(self.out, encode_plan(plan), tensors)
        answer = receive(self.back)
        assert answer is not None, f"the worker's process ended at {plan}"
        return answer[1]

    def close(self) -> int:
        self.out.close()
        return self.process.wait(60)


@torch.no_grad()
def serve(preset: str, overrides: dict[str, object]) -> None:
    from oracles import make_engine

    torch.set_num_threads(1)
    worker = make_engine(preset, **overrides).resources.worker
    pipe, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever is printed does not go to the pipe
    send(pipe, json.dumps(worker.supports_whole_block).encode(), ())
    while (message := receive(sys.stdin.buffer)) is not None:
        send(pipe, b"", worker.execute(decode_plan(message[0]), message[1]))


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
