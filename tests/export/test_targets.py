"""Exported programs through their runtimes, against the engine: a small one here, whole models in slow tests."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import SIZE, make_engine, remade
from safetensors.torch import load_file
from small_engine import (
    PROMPTS,
    ROWS,
    SPEC,
    compare,
    compare_small,
    export_small,
    halve_small,
    small_engine,
)
from torch import nn
from typer.testing import CliRunner

import inferix
from inferix.bench import engines
from inferix.cli.main import app
from inferix.errors import InferixError, UsageError
from inferix.export import engine_folder
from inferix.export.backends import OnnxRuntime
from inferix.export.engine_folder import export_engine, write_engine
from inferix.export.int8_layers import Int8Linear
from inferix.export.plan import Plan
from inferix.export.programs import Program
from inferix.export.run import ExportedEngine
from inferix.export.targets import TARGETS
from inferix.export.to_onnx import OnnxWriter, store_in_half
from inferix.runtime.engine import Engine
from inferix.runtime.sessions.output_queue import Block
from inferix.runtime.sessions.session import Session


def test_onnx_equals_eager(onnx_folder: Path) -> None:
    compare_small(ExportedEngine(onnx_folder, 1))


def test_openvino_equals_eager(openvino_folder: Path) -> None:
    compare_small(ExportedEngine(openvino_folder, 1))


@pytest.mark.slow  # the compiler takes a minute or two for each program
def test_aoti_equals_eager(aoti_folder: Path) -> None:
    compare_small(ExportedEngine(aoti_folder, 1))


def test_weights_in_float16(onnx_folder: Path, tmp_path: Path) -> None:
    """Half the bytes; passes stay in float32, so that the error is that of rounded weights."""
    folder = halve_small(onnx_folder, tmp_path / "engine")
    before, after = ((place / "weights.bin").stat().st_size for place in (onnx_folder, folder))
    assert after < 0.75 * before  # each tensor begins at a page
    plan = json.loads((folder / "plan.json").read_text("utf-8"))
    assert plan["dtype"] == "float32" and plan["built"]["options"]["weights"] == "float16"
    session = small_engine().open(prompt_embeds=ROWS[0], seed=5, size=SIZE)
    switch = lambda number: session.prompt(embeds=ROWS[number])  # noqa: E731
    latents, _, _ = compare(ExportedEngine(folder, 1), session, switch, 6, [], 5)
    assert 1e-5 < latents <= 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino"])
def test_several_blocks_in_flight(target: str, tmp_path: Path) -> None:
    """Twenty blocks past the window, five of them in each pass, with two prompt switches."""
    model = small_engine("rolling-forcing", num_frame_per_block=1, local_attn_size=8, sink_size=2)
    folder = export_small(target, tmp_path / "engine", engine=model)
    session = model.open(prompt_embeds=ROWS[0], seed=5, size=SIZE)
    switch = lambda number: session.prompt(embeds=ROWS[number])  # noqa: E731
    latents, pixels, share = compare(ExportedEngine(folder, 1), session, switch, 28, [], 5)
    print(f"{target}: latents {latents:.2e}, share {share:.2e}", flush=True)
    assert latents <= 1e-4 and pixels <= 1 and share <= 2e-3


@pytest.mark.slow
def test_keys_and_values_in_int8(tmp_path: Path) -> None:
    """Files of ONNX with QuantizeLinear and DequantizeLinear, against the model's own pages in int8."""
    import onnx

    folder = export_small("onnx", tmp_path / "engine", kv_dtype="int8")
    for name, operator in (("step", "DequantizeLinear"), ("commit", "QuantizeLinear")):
        nodes = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph.node
        assert operator in {node.op_type for node in nodes}
    session = small_engine(kv_dtype="int8").open(prompt_embeds=ROWS[0], seed=5, size=SIZE)
    switch = lambda number: session.prompt(embeds=ROWS[number])  # noqa: E731
    latents, _, _ = compare(ExportedEngine(folder, 1), session, switch, 12, [], 5)
    print(f"latents {latents:.2e}")
    assert latents <= 2e-3


def test_a_layer_in_int8_is_exact_in_onnx_runtime(tmp_path: Path) -> None:
    """All optimisations on; weights and rows at both ends of their range, whose sums would overflow in 16 bits."""
    plain = nn.Linear(64, 24)
    rows = torch.linspace(-3, 3, 5)[:, None] * torch.linspace(-1, 1, 64).sign() + 1e-3 * torch.arange(64)
    with torch.no_grad():
        plain.weight.copy_(torch.where(torch.arange(24)[:, None] % 2 == 0, 1.0, torch.linspace(-1, 1, 64)))
        module = Int8Linear(plain, torch.int8)
        expected = module(rows[None]).numpy()
    program = Program("layer", module, {"x": rows[None]}, {"x": {}}, ("x",), ("y",))
    with OnnxWriter(tmp_path) as writer:
        writer.write(program)
    made = OnnxRuntime(Plan(tmp_path, {}), 1).load(tmp_path / "layer.onnx", ["x"], ["y"])({"x": rows[None].numpy()})
    np.testing.assert_allclose(made["y"], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_the_command_passes_on_which_layers_are_in_int8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def record(*_: object, **settings: Any) -> None:
        given.update(settings)
        raise UsageError("enough")

    monkeypatch.setattr(engine_folder, "export_engine", record)
    keep = ["--set", 'lowp_keep=["blocks.0.*"]']
    done = CliRunner().invoke(app, ["export", "--lowp", "int8", *keep, "--out", str(tmp_path / "engine")])
    assert done.exit_code == 2
    assert given["lowp"] == "int8" and list(given["lowp_keep"]) == ["blocks.0.*"]


@pytest.mark.slow
def test_linear_layers_in_int8(tmp_path: Path) -> None:
    """Files of ONNX against the model's own packed layers, in all blocks' passes, as far as roundings flip."""
    import onnx

    model = small_engine(lowp="int8")
    folder = export_small("onnx", tmp_path / "engine", engine=model)
    nodes = onnx.load(folder / "step.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "MatMulInteger" for node in nodes) == 8  # q, k, v, o; q, o of the text; two of the ffn
    session = model.open(prompt_embeds=ROWS[0], seed=5, size=SIZE)
    switch = lambda number: session.prompt(embeds=ROWS[number])  # noqa: E731
    latents, _, _ = compare(ExportedEngine(folder, 1), session, switch, 12, [], 5)
    print(f"latents {latents:.2e}")
    assert latents <= 2e-2


def test_a_weight_beyond_float16_stays_in_float32() -> None:
    import onnx_ir

    weights = {"small": np.ones((32, 32), np.float32), "large": np.full((32, 32), 1e5, np.float32)}
    model = onnx_ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[1,32] x) => (float[1,32] z)'
        "{ y = MatMul(x, small) z = MatMul(y, large) }",
        initializers=[onnx_ir.tensor(value, name=name) for name, value in weights.items()],
    )
    store_in_half(model)
    dtypes = {name: value.const_value.dtype.name for name, value in model.graph.initializers.items()}
    assert dtypes == {"small.float16": "FLOAT16", "large": "FLOAT"}
    assert [node.op_type for node in model.graph] == ["Cast", "MatMul", "MatMul"]


RESTORE = """
import sys
from inferix import Session, load
from safetensors.torch import save_file
import torch
session = Session.restore(load(engine=sys.argv[1], rewind_blocks=2), sys.argv[2])
save_file({"latents": torch.cat([block.latents for block in session.stream(3)])}, sys.argv[3])
"""


def steered(engine: Engine, number: int, file: Path) -> list[Block]:
    """A stream with an action, a prompt switch after the window is full, a rewind, a fork and a saved file."""
    rows, size = ROWS[number], SIZE
    with engine.open(prompt_embeds=rows, seed=number, actions=["left", "right"], size=size) as session:
        blocks = list(session.stream(8))
        session.prompt(embeds=ROWS[1 - number])
        session.act("left")
        blocks += session.stream(2)
        session.rewind(8)
        blocks += session.stream(1)
        with session.fork() as fork:
            fork.act("right")
            blocks += fork.stream(2)
        session.save(file)
        return blocks + list(session.stream(3))


def check_sessions(folder: Path, place: Path) -> None:
    """Sessions of an exported engine give what the model gives, in another process and two at once the same bits."""
    exported, model = inferix.load(engine=folder, rewind_blocks=2), small_engine(rewind_blocks=2)
    blocks, expected = (
        steered(engine, 0, place / f"{name}.session") for name, engine in (("exported", exported), ("model", model))
    )
    for made, block in zip(blocks, expected, strict=True):
        torch.testing.assert_close(made.latents, block.latents, rtol=0, atol=1e-4 * float(block.latents.abs().max()))
        assert np.abs(made.frames.astype(int) - block.frames.astype(int)).max() <= 1
    command = [sys.executable, "-c", RESTORE, str(folder), str(place / "exported.session"), str(place / "restored")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(place / "restored")["latents"], torch.cat([block.latents for block in blocks[-3:]]))
    alone = [list(open_one(exported, number).stream(9)) for number in (0, 1)]
    with open_one(exported, 0) as one, open_one(exported, 1) as other:
        both = [[next(one.stream(1)), next(other.stream(1))] for _ in range(9)]
    for number in (0, 1):
        for made, block in zip((pair[number] for pair in both), alone[number], strict=True):
            assert torch.equal(made.latents, block.latents) and np.array_equal(made.frames, block.frames)


def open_one(engine: Engine, number: int) -> Session:
    return engine.open(prompt_embeds=ROWS[number], seed=number, size=SIZE)


def test_sessions_on_onnx(onnx_folder: Path, tmp_path: Path) -> None:
    check_sessions(onnx_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["openvino", "aoti"])
def test_sessions_on_other_targets(target: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    check_sessions(request.getfixturevalue(f"{target}_folder"), tmp_path)


@pytest.mark.slow
def test_memory_weights_on_onnx(tmp_path: Path) -> None:
    """A commit by the second set of weights, through ONNX Runtime."""
    settings = {"local_attn_size": 5, "sink_size": 1, "denoising_step_list": (1000, 500)}
    engine = make_engine("sgf-plus-framewise", dtype="float32", spec=SPEC, **settings)
    engine = remade(engine, vae=small_engine().parts.vae)
    prompts = dict(zip(PROMPTS, ROWS, strict=True))
    folder = write_engine(engine, tmp_path / "engine", SIZE, TARGETS["onnx"], prompts)
    session = engine.open(prompt_embeds=ROWS[0], seed=5, size=SIZE)
    switch = lambda number: session.prompt(embeds=ROWS[number])  # noqa: E731
    latents, _, _ = compare(ExportedEngine(folder, 1), session, switch, 7, [], 5)
    assert latents <= 1e-4


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
    refused = subprocess.run([*command, "--json", "--out", "-"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--json" in refused.stderr and not refused.stdout


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


LONG: dict[str, tuple[str, dict[str, Any], list[str], int]] = {  # model, settings, actions, seed
    # Seed 3 takes the small world past a place where it enlarges any error more than tenfold within a few blocks.
    "small world": ("tinyworld", {}, ["right"] * 6 + ["down"] * 6, 4),
    "wan-tiny": ("wan-tiny", {"preset": "longlive", "local_attn_size": 9}, [], 3),
    "wan-tiny, several blocks in flight": ("wan-tiny", {"preset": "rolling-forcing"}, [], 3),
    "wan-tiny, tiny decoder": ("wan-tiny", {"preset": "self-forcing", "local_attn_size": 9, "vae": "taehv"}, [], 3),
}


class Inside:
    """A session of an exported engine, as `compare` drives a runner's stream."""

    def __init__(self, folder: Path) -> None:
        self.engine = inferix.load(engine=folder)

    def open(self, prompt: str, seed: int, script: list[str]) -> "Inside":
        self.session = self.engine.open(prompt, seed=seed, actions=script)
        return self

    def prompt(self, text: str) -> None:
        self.session.prompt(text)

    def act(self, action: str) -> None:
        self.session.act(action)

    def next_block(self) -> Block:
        (block,) = self.session.stream(1)
        return block


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "aoti"])
@pytest.mark.parametrize("case", LONG)
def test_whole_models_past_the_window(case: str, target: str, tmp_path: Path) -> None:
    """Twenty blocks after the window is full, with two prompt switches and actions, by the runner and in a session."""
    model, settings, script, seed = LONG[case]
    prompts = () if model == "tinyworld" else PROMPTS
    folder = export_engine(model, out=tmp_path / "engine", target=target, prompts=prompts, **settings)
    engine = inferix.load(model, device="cpu", executor="eager", **settings)
    for name, exported in (("runner", ExportedEngine(folder, 1)), ("session", Inside(folder))):
        session = engine.open(prompt=PROMPTS[0], seed=seed, actions=script)
        switch = lambda number, session=session: session.prompt(PROMPTS[number])  # noqa: E731
        latents, pixels, share = compare(exported, session, switch, 26, script, seed)
        print(f"{case}, {target}, {name}: latents {latents:.2e}, pixels {pixels}, share {share:.2e}", flush=True)
        assert latents <= 1e-4 and pixels <= 1 and share <= 2e-3


@pytest.mark.slow
def test_a_large_model_is_written_and_read_in_little_memory(tmp_path: Path) -> None:
    """1.4 billion random parameters, 5.7 GB in float32, as ONNX with weights beside the programs."""
    script, folder = str(Path(__file__).with_name("large_engine.py")), str(tmp_path / "engine")
    made = {}
    for command in (("write", folder, "30"), ("read", folder)):
        done = subprocess.run([sys.executable, script, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made[command[0]] = json.loads(done.stdout)
        assert made[command[0]]["peak_gib"] < 12
    print(made)
    assert made["write"]["parameters"] > 1.3e9 and made["read"]["difference"] <= 1e-4
