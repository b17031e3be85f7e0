"""Exported programs through their runtimes, against the engine: a small one here, whole models in slow tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import SIZE
from safetensors.torch import load_file
from small_engine import PROMPTS, ROWS, compare, compare_small, convert_small, export_small, small_engine
from typer.testing import CliRunner

import inferix
from inferix.bench import engines
from inferix.cli.main import app
from inferix.errors import InferixError
from inferix.export.engine_folder import export_engine
from inferix.export.plan import Plan
from inferix.export.run import ExportedEngine


def test_onnx_equals_eager(onnx_folder: Path) -> None:
    compare_small(ExportedEngine(onnx_folder, 1))


def test_openvino_equals_eager(onnx_folder: Path, tmp_path: Path) -> None:
    compare_small(ExportedEngine(convert_small(onnx_folder, tmp_path / "engine"), 1))


@pytest.mark.slow  # the compiler takes a minute or two for each program
def test_aoti_equals_eager(tmp_path: Path) -> None:
    compare_small(ExportedEngine(export_small("aoti", tmp_path / "engine"), 1))


def test_programs_share_their_weights(onnx_folder: Path) -> None:
    parts = small_engine().parts
    weights = sum(tensor.nbytes for part in (parts.transformer, parts.vae) for tensor in part.parameters())
    assert (onnx_folder / "weights.bin").stat().st_size < 2 * weights


def test_the_command_runs_without_torch(onnx_folder: Path, tmp_path: Path) -> None:
    script = """
import sys
from inferix.export.run import main
main(sys.argv[1:])
assert not {"torch", "yaml", "typer", "safetensors"} & set(sys.modules)
"""
    out, latents = tmp_path / "out.y4m", tmp_path / "latents.npy"
    command = [sys.executable, "-c", script, str(onnx_folder), "--blocks", "2", "--out", str(out), "--threads", "1"]
    command += ["--latents", str(latents)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["blocks"] == 2 and made["frames"] == 5 and made["outputs"] == [str(out), str(latents)]
    assert np.load(latents).shape == (2, 16, 4, 4)
    header, _, body = out.read_bytes().partition(b"\n")
    assert header.startswith(b"YUV4MPEG2 W32 H32 F8:1") and len(body) == 5 * (6 + 3 * 32 * 32)
    refused = subprocess.run([*command, "--prompt", "a desert"], capture_output=True, text=True)
    assert refused.returncode == 2 and "a desert" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_generate_runs_an_engine(onnx_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    command = ["generate", "--engine", str(onnx_folder), "--blocks", "2", "--latents-only", "--out", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    stream = ExportedEngine(onnx_folder, 1).open(PROMPTS[0])
    made = np.concatenate([stream.next_block(decode=False).latents for _ in range(2)])
    np.testing.assert_allclose(load_file(out)["latents"].numpy(), made, rtol=0, atol=1e-4)
    refused = CliRunner().invoke(app, [*command, "--size", "64x64"])
    assert refused.exit_code == 2 and "--size" in refused.stderr


def test_engines_are_timed_beside_executors(onnx_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model stands in for the one that the plan names; a stream of another seed is refused."""
    seeds = {"eager": 4, "other": 5}

    def maker(plan: Plan, name: str, seed: int) -> engines.Maker:
        session = small_engine().open(prompt_embeds=ROWS[0], seed=seeds[name], size=SIZE)

        def make() -> tuple[Any, dict[str, float]]:
            (block,) = session.stream(1)
            return block.latents, {part: block.timings[part] for part in engines.PARTS}

        return make

    monkeypatch.setattr(engines, "executor_maker", maker)
    times = engines.measure([onnx_folder], ["eager"], 2, 4, 1, lambda line: None)
    assert [len(one.blocks) for one in times.values()] == [2, 2] and times[str(onnx_folder)].difference <= 1e-4
    made = engines.facts(times)["candidates"]
    assert made["eager"]["over_first"] == 1 and set(made[str(onnx_folder)]["parts"]) == set(engines.PARTS)
    with pytest.raises(InferixError, match="other"):
        engines.measure([onnx_folder], ["eager", "other"], 2, 4, 1, lambda line: None)


LONG: dict[str, tuple[str, dict[str, Any], list[str], float]] = {
    "small world": ("tinyworld", {}, ["right"] * 6 + ["down"] * 6, 2e-3),
    "wan-tiny": ("wan-tiny", {"preset": "longlive", "local_attn_size": 9}, [], 2e-3),
    "wan-tiny, tiny decoder": ("wan-tiny", {"preset": "self-forcing", "local_attn_size": 9, "vae": "taehv"}, [], 2e-3),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
@pytest.mark.parametrize("case", LONG)
def test_whole_models_past_the_window(case: str, target: str, tmp_path: Path) -> None:
    """Twenty blocks after the window is full, with two prompt switches and actions."""
    model, settings, script, most = LONG[case]
    prompts = () if model == "tinyworld" else PROMPTS
    folder = export_engine(model, out=tmp_path / "engine", target=target, prompts=prompts, **settings)
    engine = inferix.load(model, device="cpu", **settings)
    session = engine.open(prompt=PROMPTS[0], seed=3, actions=script)
    switch = lambda number: session.prompt(PROMPTS[number])  # noqa: E731
    latents, pixels, share = compare(ExportedEngine(folder, 1), session, switch, 26, script, 3)
    print(f"{case}, {target}: latents {latents:.2e}, pixels {pixels}, share {share:.2e}")
    assert latents <= 1e-4 and pixels <= 1 and share <= most
