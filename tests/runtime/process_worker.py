"""A worker in another process, over a pipe: plans as bytes, tensors as safetensors, nothing pickled.

As a program, `python process_worker.py`, it makes workers of the test model of `oracles.make_engine` and runs their
plans; each side draws weights and noise from their seeds.
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

HEADER = struct.Struct("<iII")  # number of the worker, bytes of the text and of the tensors
NEW = -1  # in place of a number: make a worker


def send(pipe: BinaryIO, number: int, text: bytes, tensors: Sequence[Tensor] = ()) -> None:
    data = save({str(index): tensor.contiguous() for index, tensor in enumerate(tensors)}) if tensors else b""
    pipe.write(HEADER.pack(number, len(text), len(data)) + text + data)
    pipe.flush()


def receive(pipe: BinaryIO) -> tuple[int, bytes, list[Tensor]] | None:
    """A message; None at the pipe's end."""
    if len(header := pipe.read(HEADER.size)) < HEADER.size:
        return None
    number, *lengths = HEADER.unpack(header)
    text, data = (pipe.read(length) for length in lengths)
    named = load(data) if data else {}
    return number, text, [named[str(index)].clone() for index in range(len(named))]


class WorkerProcess:
    """A process that serves workers."""

    def __init__(self) -> None:
        here = Path(__file__)
        paths = [str(here.parents[1]), str(here.parents[2] / "tools"), *sys.path]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, str(here)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.out, self.back = self.process.stdin, self.process.stdout

    def ask(self, number: int, text: bytes, tensors: Sequence[Tensor] = ()) -> tuple[bytes, list[Tensor]]:
        send(self.out, number, text, tensors)
        answer = receive(self.back)
        assert answer is not None, f"the worker's process ended at {text[:200]!r}"
        return answer[1:]

    def close(self) -> int:
        self.out.close()
        return self.process.wait(60)


class ProcessWorker:
    """Runs plans in another process."""

    def __init__(self, process: WorkerProcess, preset: str, **overrides: object) -> None:
        self.process = process
        ready, _ = process.ask(NEW, json.dumps([preset, overrides]).encode())
        self.number, self.supports_whole_block = json.loads(ready)
        self.plans: list[Plan] = []

    def execute(self, plan: Plan, tensors: Sequence[Tensor] = ()) -> list[Tensor]:
        self.plans.append(plan)
        return self.process.ask(self.number, encode_plan(plan), tensors)[1]


@torch.no_grad()
def serve() -> None:
    from oracles import make_engine

    torch.set_num_threads(1)
    workers = []
    pipe, sys.stdout = sys.stdout.buffer, sys.stderr  # whatever is printed does not go to the pipe
    while (message := receive(sys.stdin.buffer)) is not None:
        number, text, tensors = message
        if number == NEW:
            preset, overrides = json.loads(text)
            workers.append(make_engine(preset, **overrides).resources.worker)
            send(pipe, NEW, json.dumps([len(workers) - 1, workers[-1].supports_whole_block]).encode())
        else:
            send(pipe, number, b"", workers[number].execute(decode_plan(text), tensors))


if __name__ == "__main__":
    serve()
