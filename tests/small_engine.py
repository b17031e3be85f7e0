"""A small model with actions and a tiny decoder, exported: what tests of runtimes and of the C++ runner share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
import torch
from oracles import SIZE, TINY, make_engine, randomise, remade

from inferix.export.engine_folder import write_engine
from inferix.export.programs import Program
from inferix.export.run import ExportedEngine
from inferix.export.targets import TARGETS
from inferix.export.to_onnx import OnnxWriter
from inferix.export.to_openvino import OpenVinoWriter, convert
from inferix.models.wan.taehv import TinyDecoder, TinySpec
from inferix.runtime.engine import Engine

SPEC = dataclasses.replace(TINY, num_layers=1, actions=("stay", "left", "right"), fps=8)
PROMPTS = ("a red robot in a snowy forest by day", "a blue fox in a meadow at night")
ROWS = torch.randn(2, SPEC.text_len, SPEC.text_dim, generator=torch.Generator().manual_seed(2))


@cache
def small_engine(preset: str = "tinyworld", **settings: Any) -> Engine:
    decoder = TinyDecoder(TinySpec(z_dim=SPEC.out_channels, widths=(8, 8, 8, 8), time=(1, 2, 2), patch=1))
    randomise(decoder, scale=0.1).requires_grad_(False)  # larger weights enlarge the error of the latents
    return remade(make_engine(preset, dtype="float32", spec=SPEC, **settings), vae=decoder)


def export_small(
    target: str, out: Path, dtype: str = "float32", kv_dtype: str = "float32", engine: Engine | None = None
) -> Path:
    rows = dict(zip(PROMPTS, ROWS, strict=True))
    return write_engine(engine or small_engine(), out, SIZE, TARGETS[target], rows, dtype=dtype, kv_dtype=kv_dtype)


def convert_small(onnx: Path, out: Path) -> Path:
    """The small engine for OpenVINO, converted from its ONNX folder, since tracing it again would take minutes."""

    def write(self: OpenVinoWriter, program: Program) -> None:
        convert(onnx / f"{program.name}.onnx", self.folder / f"{program.name}.xml")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenVinoWriter, "write", write)
        return export_small("openvino", out)


def halve_small(onnx: Path, out: Path) -> Path:
    """The small engine with weights in float16, made from its ONNX folder."""

    def write(self: OnnxWriter, program: Program) -> None:
        self.save(onnx_ir.load(onnx / f"{program.name}.onnx"), program.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxWriter, "write", write)
        return export_small("onnx", out, "float16")


def compare(
    exported: Any, session: Any, switch: Callable[[int], None], blocks: int, script: list[str], seed: int
) -> tuple[float, int, float]:
    """Stream an engine and its session under the same controls; returns errors of latents and pixels, and their share.

    The error of latents is relative to the largest latent, since an error of one block passes on to the next.
    exported: an `ExportedEngine`, or what opens a stream as it does. switch: changes the session's prompt to that of a
    number.
    """
    stream = exported.open(PROMPTS[0], seed, script)
    latents, pixels, share, largest = [0.0], [0], [], 0.0
    with session:
        for index in range(blocks):
            if index in (blocks // 3, blocks // 2):
                number = int(index == blocks // 3)
                stream.prompt(PROMPTS[number])
                switch(number)
            if index == blocks // 2 + 1 and script:
                stream.act(script[0])
                session.act(script[0])
            made, (block,) = stream.next_block(), session.stream(1)
            assert made.frames is not None
            latents.append(float(np.abs(made.latents - block.latents.numpy()).max()))
            largest = max(largest, float(block.latents.abs().max()))
            difference = np.abs(made.frames.astype(int) - block.frames.astype(int))
            pixels.append(int(difference.max()))
            share.append(float((difference > 0).mean()))
    return max(latents) / largest, max(pixels), float(np.mean(share))


def compare_small(exported: ExportedEngine) -> None:
    """Compare an exported small engine with the model itself over twelve blocks."""
    script = ["left", "right", "left"]
    session = small_engine().open(prompt_embeds=ROWS[0], seed=5, actions=script, size=SIZE)
    switch = lambda number: session.prompt(embeds=ROWS[number])  # noqa: E731
    latents, pixels, share = compare(exported, session, switch, 12, script, 5)
    assert latents <= 1e-4 and pixels <= 1 and share <= 2e-3
