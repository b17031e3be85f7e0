"""Exported engines whose passes have groups that see other frames, at other noise levels, and follow other texts.

MAGI-1 is the family whose presets need all of it: three branches of guidance, or two and a condition of each step, and
a commit in the next block's first pass. Quick tests run the programs as torch modules, slow ones the files of targets.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from engine_modules import NAMES, modules_of
from grouped_engines import CASES, PRESETS, TEXTS, magi, plain, rows_of, small
from oracles import SIZE
from safetensors.torch import load_file

import inferix
from inferix.errors import UsageError
from inferix.export.engine_folder import export_engine, write_engine
from inferix.export.inside import load_exported
from inferix.export.numerics import rotated
from inferix.export.plan import FILE, SCHEMA, read_plan
from inferix.export.programs import check_model
from inferix.export.run import ExportedEngine
from inferix.export.targets import TARGETS, check_target
from inferix.models.registry import make_preset
from inferix.models.rope import Rope
from inferix.runtime.engine import Engine
from inferix.runtime.limits import Limits
from inferix.runtime.sessions.session import Session

write = partial(write_engine, size=SIZE, target=NAMES)


class Errors:
    """Largest errors over a stream: of latents, relative to the largest latent, and of pictures, with their share."""

    def __init__(self) -> None:
        self.latents, self.largest, self.pixels, self.shares = 0.0, 0.0, 0, list[float]()

    def add(self, made: Any, block: Any) -> None:
        assert made.index == block.index and made.frames.shape == block.frames.shape
        latents = made.latents if isinstance(made.latents, np.ndarray) else made.latents.numpy()
        self.latents = max(self.latents, float(np.abs(latents - block.latents.numpy()).max()))
        self.largest = max(self.largest, float(block.latents.abs().max()))
        difference = np.abs(made.frames.astype(int) - block.frames.astype(int))
        self.pixels = max(self.pixels, int(difference.max()))
        self.shares.append(float((difference > 0).mean()))

    @property
    def facts(self) -> tuple[float, int, float]:
        return self.latents / self.largest, self.pixels, float(np.mean(self.shares))


def steered(engine: Engine, open_exported: Callable[..., Any], blocks: int) -> tuple[float, int, float]:
    """Stream an engine and its model with three prompt switches, the last past the window; returns their errors."""
    rows, errors, guided = rows_of(engine), Errors(), engine.preset.sampler.guidance_scale != 1
    negative = {"negative_embeds": rows[TEXTS[2]]} if guided else {}
    stream = open_exported(TEXTS[0], 7, negative_prompt=TEXTS[2]) if guided else open_exported(TEXTS[0], 7)
    with engine.open(prompt_embeds=rows[TEXTS[0]], seed=7, size=SIZE, **negative) as session:
        for index in range(blocks):
            if index in (1, 3, blocks - 2):
                text = TEXTS[(1, 3, blocks - 2).index(index) - 2]
                stream.prompt(text)
                session.prompt(embeds=rows[text])
            (block,) = session.stream(1)
            errors.add(stream.next_block(), block)
    return errors.facts


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Engine, int]:
    make, blocks = CASES[request.param]
    return make(), blocks


def with_modules(engine: Engine, folder: Path) -> Callable[..., Any]:
    """Opens streams of an engine whose programs are modules."""
    modules = modules_of(engine)
    return ExportedEngine(folder, load=lambda path: modules[path.stem]).open


def test_runner_equals_eager(case: tuple[Engine, int], tmp_path: Path) -> None:
    engine, blocks = case
    folder = write(engine, tmp_path / "engine", prompts=rows_of(engine))
    jsonschema.validate(json.loads((folder / FILE).read_text("utf-8")), json.loads(SCHEMA.read_text("utf-8")))
    assert read_plan(folder)["version"] == 3
    latents, pixels, share = steered(engine, with_modules(engine, folder), blocks)
    print(latents, pixels, share)
    assert latents <= 1e-5 and pixels <= 1 and share <= 1e-3


def inside(engine: Engine, folder: Path, **settings: Any) -> Engine:
    """The exported engine in Inferix, its programs as modules."""
    modules = modules_of(engine)
    return load_exported(folder, Limits(), settings, lambda path: modules[path.stem])


def test_a_negative_prompt_stands_for_the_null_caption(tmp_path: Path) -> None:
    engine = magi("magi-tiny")
    rows, errors = rows_of(engine), Errors()
    opens = with_modules(engine, write(engine, tmp_path / "engine", prompts=rows))
    stream, without = opens(TEXTS[0], 7, negative_prompt=TEXTS[2]), opens(TEXTS[0], 7)
    given = {"prompt_embeds": rows[TEXTS[0]], "negative_embeds": rows[TEXTS[2]]}
    with engine.open(**given, seed=7, size=SIZE) as session:
        for block in session.stream(2):
            errors.add(stream.next_block(), block)
            apart = np.abs(without.next_block().latents - block.latents.numpy()).max()
    latents, pixels, _ = errors.facts
    assert latents <= 1e-5 < apart and pixels <= 1


def test_a_wrong_mask_or_text_does_not_go_unseen(tmp_path: Path) -> None:
    """The comparison fails where frames see all others, and where all follow the first text."""
    engine = magi("magi-tiny-distill")
    folder, modules = write(engine, tmp_path / "engine", prompts=rows_of(engine)), modules_of(engine)
    for key, value in (("sees_own", True), ("text_of", 0)):

        def wrong(path: Path, key: str = key, value: int = value) -> Callable[[Any], Any]:
            return lambda values: modules[path.stem](values | {key: np.full_like(values[key], value)}
                                                     if key in values else values)  # fmt: skip

        latents, _, _ = steered(engine, ExportedEngine(folder, load=wrong).open, 3)
        assert latents > 1e-3


def played(engine: Engine, texts: dict[str, Any], file: Path) -> Iterator[Any]:
    """Blocks of two sessions in turn, with a switch, a rewind, a fork, and a file that another session goes on."""
    one, other = (engine.open(**texts[text], seed=seed, size=SIZE) for seed, text in enumerate(TEXTS[:2]))
    with one, other:
        for _ in range(3):
            yield from one.stream(1)
            yield from other.stream(1)
        one.prompt(**changed(texts[TEXTS[2]]))
        yield from one.stream(2)
        one.rewind(4)
        yield from one.stream(2)
        with one.fork() as fork:
            yield from fork.stream(1)
        one.save(file)
        yield from one.stream(1)
    with Session.restore(engine, file) as restored:
        yield from restored.stream(1)


def changed(text: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `Session.prompt` for those of `Engine.open`."""
    return {"text" if key == "prompt" else "embeds": value for key, value in text.items()}


def check_sessions(model: Engine, exported: Engine, place: Path) -> tuple[float, int, float]:
    """Compare sessions of an engine with those of its model; returns their errors."""
    errors, rows = Errors(), rows_of(model)
    given = [{text: {"prompt": text} for text in rows}, {text: {"prompt_embeds": own} for text, own in rows.items()}]
    streams = [
        played(engine, texts, place / f"{number}.session")
        for number, (engine, texts) in enumerate(zip((exported, model), given, strict=True))
    ]
    for made, block in zip(*streams, strict=True):
        errors.add(made, block)
    return errors.facts


@pytest.mark.parametrize("preset", ["magi-tiny-distill", pytest.param("magi-tiny", marks=pytest.mark.slow)])
def test_sessions_on_an_exported_engine(preset: str, tmp_path: Path) -> None:
    model = magi(preset, rewind_blocks=1)
    folder = write(model, tmp_path / "engine", prompts=rows_of(model))
    latents, pixels, share = check_sessions(model, inside(model, folder), tmp_path)
    print(latents, pixels, share)
    assert latents <= 1e-5 and pixels <= 1 and share <= 1e-3


def test_what_such_an_engine_refuses(tmp_path: Path) -> None:
    model = magi("magi-tiny-distill")
    rows = rows_of(model)
    for settings, named in (({"unroll": True}, "unroll"), ({"prefixes": True}, "prefixes")):
        with pytest.raises(UsageError, match=named):
            write(model, tmp_path / "engine", prompts=rows, **settings)
    with pytest.raises(UsageError, match="num_frame_per_block"):
        write(magi("magi-tiny-distill", num_frame_per_block=4), tmp_path / "engine", prompts=rows)
    with pytest.raises(UsageError, match="FP8"):
        check_model(inferix.load("magi-tiny-fp8", "magi-tiny-distill", device="cpu").parts.transformer)
    for target in TARGETS:
        moving = make_preset("tinyworld", prompt_switch="cut", commit_in_next=True)
        with pytest.raises(UsageError, match="sink at several distances"):
            check_target(TARGETS[target], moving, "float32", False)
        with pytest.raises(UsageError, match="int8 in passes of groups"):
            check_target(TARGETS[target], model.preset, "float32", False, kv_dtype="int8")
    with pytest.raises(UsageError, match="guidance by past"):
        check_target(TARGETS["tensorrt"], model.preset, "float32", False)
    folder = write(model, tmp_path / "engine", prompts=rows)
    with pytest.raises(UsageError, match="solver"):
        load_exported(folder, Limits(), {"solver": "magi-euler"}, lambda path: pytest.fail("no program is loaded"))
    ungrouped = small()
    folder = write(ungrouped, tmp_path / "ungrouped", prompts=rows_of(ungrouped))
    for key, value in (("commit_in_next", True), ("clean_chunk_kvrange", 1), ("clean_text", "null")):
        with pytest.raises(UsageError, match=key):
            load_exported(folder, Limits(), {key: value}, lambda path: pytest.fail("no program is loaded"))
    with pytest.raises(UsageError, match="negative_prompt"):
        ExportedEngine(folder, load=lambda path: lambda values: {}).open(TEXTS[0], negative_prompt=TEXTS[1])
    joining = small(prompt_switch="join")
    folder = write(joining, tmp_path / "joining", prompts=rows_of(joining))
    with pytest.raises(UsageError, match="window_blocks"):  # with which its passes would have groups
        load_exported(folder, Limits(), {"window_blocks": 2}, lambda path: pytest.fail("no program is loaded"))
    with pytest.raises(UsageError, match="kv_dtype"):
        write(plain("magi-tiny-distill"), tmp_path / "masked", prompts=rows, kv_dtype="int8")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_reader_needs_no_family_for_the_rules_of_its_solver(preset: str, tmp_path: Path) -> None:
    """A process without torch knows no solver of a family, and takes from the plan what the engine knows of it."""
    model = magi(preset)
    folder = write(model, tmp_path / "engine", prompts=rows_of(model))
    script = """
import json, sys
from dataclasses import replace
from inferix.errors import UsageError
from inferix.export.plan import read_plan
sampler = read_plan(sys.argv[1]).preset.sampler
print(json.dumps([sampler.steps, sampler.takes_strength, [sampler.condition(step) for step in range(sampler.steps)]]))
for asked in ({"num_steps": 16}, {"solver": "unipc"}):
    try:
        replace(sampler, **asked)
    except UsageError:
        continue
    raise AssertionError(asked)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = model.preset.sampler
    assert json.loads(done.stdout) == [8, own.takes_strength, [own.condition(step) for step in range(8)]]
    assert read_plan(folder).preset == model.preset


def test_keys_of_half_splits_are_rotated_in_time() -> None:
    generator = torch.Generator().manual_seed(4)
    keys, frequencies = torch.randn(3, 2, 24, generator=generator), torch.rand(3, generator=generator).double()
    rope = Rope(frequencies, frequencies[:2], frequencies[:2], half_split=True)
    angles = 5 * frequencies
    expected = rope.rotate_time(keys, torch.stack((angles.cos(), angles.sin()), -1))
    np.testing.assert_allclose(rotated(keys.numpy(), angles.numpy(), sum(rope.pairs)), expected, rtol=0, atol=1e-6)


# Files of targets


RESTORE = """
import sys
from inferix import Session, load
from safetensors.torch import save_file
import torch
session = Session.restore(load(engine=sys.argv[1], rewind_blocks=1), sys.argv[2])
save_file({"latents": torch.cat([block.latents for block in session.stream(2)])}, sys.argv[3])
"""


class Inside:
    """Streams of a session, as the runner has them."""

    def __init__(self, folder: Path) -> None:
        self.engine = inferix.load(engine=folder)

    def open(self, prompt: str, seed: int) -> "Inside":
        self.session = self.engine.open(prompt, seed=seed)
        return self

    def prompt(self, text: str) -> None:
        self.session.prompt(text)

    def next_block(self) -> Any:
        (block,) = self.session.stream(1)
        return block


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "aoti"])
@pytest.mark.parametrize("preset", PRESETS)
def test_files_of_targets(preset: str, target: str, tmp_path: Path) -> None:
    """Twenty blocks past the window by the runner and in a session, then sessions, two at once, and another process."""
    model = magi(preset, rewind_blocks=1)
    folder = write(model, tmp_path / "engine", target=TARGETS[target], prompts=rows_of(model))
    for name, opens in (("runner", ExportedEngine(folder, 1).open), ("session", Inside(folder).open)):
        latents, pixels, share = steered(model, opens, 28)
        print(f"{preset}, {target}, {name}: latents {latents:.2e}, pixels {pixels}, share {share:.2e}", flush=True)
        assert latents <= 1e-4 and pixels <= 1 and share <= 2e-3
    exported = inferix.load(engine=folder, rewind_blocks=1)
    latents, pixels, share = check_sessions(model, exported, tmp_path)
    assert latents <= 1e-4 and pixels <= 1 and share <= 2e-3
    with exported.open(TEXTS[0], seed=3) as session:
        list(session.stream(2))
        session.save(tmp_path / "saved")
        expected = torch.cat([block.latents for block in session.stream(2)])
    command = [sys.executable, "-c", RESTORE, str(folder), str(tmp_path / "saved"), str(tmp_path / "restored")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "restored")["latents"], expected)


@pytest.mark.slow
def test_the_commands(tmp_path: Path) -> None:
    """`inferix export` of the model by name, and `inferix-run` without torch; the prompts are those of its encoder."""
    folder = export_engine("magi-tiny", "magi-tiny-distill", out=tmp_path / "engine", size=SIZE, prompts=TEXTS)
    script = """
import sys
from inferix.export.run import main
main(sys.argv[1:])
assert not {"torch", "yaml", "typer", "safetensors"} & set(sys.modules)
"""
    out, latents = tmp_path / "out.y4m", tmp_path / "latents.npy"
    command = [sys.executable, "-c", script, str(folder), "--seconds", "1.5", "--out", str(out), "--json"]
    command += ["--latents", str(latents), "--prompt-at", "0.5", TEXTS[1], "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["blocks"] == 2 and made["frames"] == 48
    engine = inferix.load("magi-tiny", "magi-tiny-distill", device="cpu", executor="eager", dtype="float32")
    with engine.open(TEXTS[0], seed=0, size=SIZE) as session:
        first = list(session.stream(1))
        session.prompt(TEXTS[1])
        expected = torch.cat([block.latents for block in [*first, *session.stream(1)]])
    np.testing.assert_allclose(np.load(latents), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
