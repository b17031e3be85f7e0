"""Exported ONNX programs through the runner, against the engine: a small one here, whole models in slow tests."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SIZE, TINY, make_engine, randomise, remade
from safetensors.torch import load_file
from typer.testing import CliRunner

import inferix
from inferix.cli.main import app
from inferix.export.engine_folder import export_engine, write_engine
from inferix.export.run import ExportedEngine
from inferix.export.targets import TARGETS
from inferix.models.wan.taehv import TinyDecoder, TinySpec
from inferix.runtime.engine import Engine

SPEC = dataclasses.replace(TINY, num_layers=1, actions=("stay", "left", "right"), fps=8)
PROMPTS = ("a red robot in a snowy forest by day", "a blue fox in a meadow at night")
ROWS = torch.randn(2, SPEC.text_len, SPEC.text_dim, generator=torch.Generator().manual_seed(2))


def compare(
    exported: ExportedEngine, session: Any, switch: Callable[[int], None], blocks: int, script: list[str], seed: int
) -> tuple[float, int, float]:
    """Stream an engine and its session under the same controls; returns errors of latents and pixels, and their share.

    switch: changes the session's prompt to that of a number.
    """
    stream = exported.open(PROMPTS[0], seed, script)
    latents, pixels, share = [0.0], [0], []
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
            difference = np.abs(made.frames.astype(int) - block.frames.astype(int))
            pixels.append(int(difference.max()))
            share.append(float((difference > 0).mean()))
    return max(latents), max(pixels), float(np.mean(share))


@pytest.fixture(scope="module")
def small() -> Engine:
    decoder = TinyDecoder(TinySpec(z_dim=SPEC.out_channels, widths=(8, 8, 8, 8), time=(1, 2, 2), patch=1))
    randomise(decoder, scale=0.1).requires_grad_(False)  # larger weights enlarge the error of the latents
    return remade(make_engine("tinyworld", dtype="float32", spec=SPEC), vae=decoder)


@pytest.fixture(scope="module")
def folder(small: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = dict(zip(PROMPTS, ROWS, strict=True))
    return write_engine(small, tmp_path_factory.mktemp("onnx") / "engine", SIZE, TARGETS["onnx"], prompts)


def test_onnx_equals_eager(small: Engine, folder: Path) -> None:
    script = ["left", "right", "left"]
    session = small.open(prompt_embeds=ROWS[0], seed=5, actions=script, size=SIZE)
    switch = lambda number: session.prompt(embeds=ROWS[number])  # noqa: E731
    latents, pixels, share = compare(ExportedEngine(folder), session, switch, 12, script, 5)
    assert latents <= 1e-4 and pixels <= 1 and share <= 2e-3


def test_programs_share_their_weights(small: Engine, folder: Path) -> None:
    weights = sum(tensor.nbytes for part in (small.parts.transformer, small.parts.vae) for tensor in part.parameters())
    assert (folder / "weights.bin").stat().st_size < 2 * weights


def test_the_command_runs_without_torch(folder: Path, tmp_path: Path) -> None:
    script = """
import sys
from inferix.export.run import main
main(sys.argv[1:])
assert not {"torch", "yaml", "typer", "safetensors"} & set(sys.modules)
"""
    out, latents = tmp_path / "out.y4m", tmp_path / "latents.npy"
    command = [sys.executable, "-c", script, str(folder), "--blocks", "2", "--out", str(out), "--latents", str(latents)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["blocks"] == 2 and made["frames"] == 5 and made["outputs"] == [str(out), str(latents)]
    assert np.load(latents).shape == (2, 16, 4, 4)
    header, _, body = out.read_bytes().partition(b"\n")
    assert header.startswith(b"YUV4MPEG2 W32 H32 F8:1") and len(body) == 5 * (6 + 3 * 32 * 32)
    refused = subprocess.run([*command, "--prompt", "a desert"], capture_output=True, text=True)
    assert refused.returncode == 2 and "a desert" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_generate_runs_an_engine(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = ["generate", "--engine", str(folder), "--blocks", "2", "--latents-only", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    stream = ExportedEngine(folder).open(PROMPTS[0])
    made = np.concatenate([stream.next_block(decode=False).latents for _ in range(2)])
    np.testing.assert_allclose(load_file(out)["latents"].numpy(), made, rtol=0, atol=1e-4)
    refused = CliRunner().invoke(app, [*command, "--size", "64x64"])
    assert refused.exit_code == 2 and "--size" in refused.stderr


LONG: dict[str, tuple[str, dict[str, Any], list[str], float]] = {
    "small world": ("tinyworld", {}, ["right"] * 6 + ["down"] * 6, 2e-3),
    "wan-tiny": ("wan-tiny", {"preset": "longlive", "local_attn_size": 9}, [], 2e-3),
    "wan-tiny, tiny decoder": ("wan-tiny", {"preset": "self-forcing", "local_attn_size": 9, "vae": "taehv"}, [], 2e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_whole_models_past_the_window(case: str, tmp_path: Path) -> None:
    """Twenty blocks after the window is full, with two prompt switches and actions."""
    model, settings, script, most = LONG[case]
    prompts = () if model == "tinyworld" else PROMPTS
    folder = export_engine(model, out=tmp_path / "engine", prompts=prompts, **settings)
    engine = inferix.load(model, device="cpu", **settings)
    session = engine.open(prompt=PROMPTS[0], seed=3, actions=script)
    switch = lambda number: session.prompt(PROMPTS[number])  # noqa: E731
    latents, pixels, share = compare(ExportedEngine(folder), session, switch, 26, script, 3)
    print(f"{case}: latents {latents:.2e}, pixels {pixels}, share {share:.2e}")
    assert latents <= 1e-4 and pixels <= 1 and share <= most
