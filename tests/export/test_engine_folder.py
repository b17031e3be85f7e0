"""Exported engines: the runner against the engine itself, the plan, and engines that are refused.

Most tests run the programs as torch modules, which takes no export; `test_onnx.py` runs the files of the targets.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from engine_modules import NAMES, NameWriter, modules_of
from oracles import SIZE, TINY, WAN_PRESETS, make_engine, remade

import inferix
from inferix.errors import CheckpointError, InferixError, UsageError
from inferix.export import backends
from inferix.export.engine_folder import export_engine, write_engine
from inferix.export.inside import load_exported
from inferix.export.numerics import normals
from inferix.export.plan import FILE, SCHEMA, preset_of, preset_values, read_plan
from inferix.export.programs import Program, solver_matrix
from inferix.export.run import ExportedEngine
from inferix.export.run import main as run_command
from inferix.export.targets import TARGETS, Target
from inferix.export.word_table import known_words
from inferix.kernels.philox import philox_normals
from inferix.models.registry import PRESETS, family_of, make_preset
from inferix.models.tinyworld.words import SKIPPED, WORDS
from inferix.models.tinyworld.words import known_words as encoder_words
from inferix.runtime.engine import Engine
from inferix.runtime.limits import Limits
from inferix.runtime.sampler import Sampler
from inferix.runtime.sessions.session import Session
from inferix.schemes.fixed_window import FixedWindow
from inferix.schemes.sampler_spec import SamplerSpec

GENERATOR = torch.Generator().manual_seed(1)
PROMPTS = {text: torch.randn(TINY.text_len, TINY.text_dim, generator=GENERATOR) for text in ("a hill", "a lake")}
WORLD = dataclasses.replace(TINY, actions=("stay", "left", "right"), fps=8)


class FullDisk(NameWriter):
    """Fails at the third program."""

    def write(self, program: Program) -> None:
        super().write(program)
        if program.name == "commit":
            raise InferixError("no room")


write = partial(write_engine, size=SIZE, target=NAMES, prompts=PROMPTS)


def as_modules(engine: Engine, folder: Path, unroll: bool = False) -> ExportedEngine:
    modules = modules_of(engine, unroll)
    return ExportedEngine(folder, load=lambda path: modules[path.stem])


def steered(engine: Engine, exported: ExportedEngine, blocks: int, guided: bool = False) -> tuple[float, float, float]:
    """Stream both under the same controls; returns the largest error of latents and pixels, and the share of pixels."""
    script = ["left", "right", "left"] if engine.spec.actions else []
    negative = {"negative_embeds": PROMPTS["a lake"]} if guided else {}
    stream = exported.open("a hill", 7, script, "a lake" if guided else None)
    latents, pixels, share = [], [], []
    with engine.open(prompt_embeds=PROMPTS["a hill"], seed=7, actions=script, size=SIZE, **negative) as session:
        for index in range(blocks):
            if index in (2, blocks - 4):
                text = "a lake" if index == 2 else "a hill"
                stream.prompt(text)
                session.prompt(embeds=PROMPTS[text])
            if index == blocks - 3 and script:
                stream.act("right")
                session.act("right")
            made, (block,) = stream.next_block(), session.stream(1)
            assert made.index == block.index and made.frames is not None
            latents.append(np.abs(made.latents - block.latents.numpy()).max())
            difference = np.abs(made.frames.astype(int) - block.frames.astype(int))
            pixels.append(difference.max())
            share.append((difference > 0).mean())
    return max(latents), max(pixels), float(np.mean(share))


MEMORY = {"local_attn_size": 5, "sink_size": 1, "denoising_step_list": (1000, 500)}
ROLLING = {"num_frame_per_block": 1, "local_attn_size": 8, "sink_size": 2}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "moving positions, recached sink, actions": ("tinyworld", 9, {"spec": WORLD}),
    "rest, recached": ("tinyworld", 18, {"spec": WORLD}),
    "unrolled": ("tinyworld", 6, {"spec": WORLD, "unroll": True}),
    "recache beside a sink": ("longlive", 7, {}),
    "single first frame": ("self-forcing", 5, {"independent_first_frame": True, "local_attn_size": 9}),
    "guidance": ("causal-diffusion", 5, {"num_steps": 3, "local_attn_size": 9, "guided": True}),
    "first block of two steps": (
        "self-forcing-framewise", 6,
        {"local_attn_size": 4, "denoising_step_list_first_chunk": (1000, 500), "unroll": True},
    ),
    "several blocks in flight, sink beside the window": (
        "rolling-forcing", 12, {**ROLLING, "spec": WORLD},
    ),
    "blend": ("self-forcing-framewise", 7, {"local_attn_size": 4, "prompt_switch": "blend", "blend_blocks": 3}),
    "memory weights": ("sgf-plus-framewise", 7, MEMORY),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_runner_equals_eager(case: str, tmp_path: Path) -> None:
    preset, blocks, settings = CASES[case]
    settings = dict(settings)
    unroll, guided = settings.pop("unroll", False), settings.pop("guided", False)
    engine = make_engine(preset, dtype="float32", **settings)
    exported = as_modules(engine, write(engine, tmp_path / "engine", unroll=unroll), unroll)
    latents, pixels, share = steered(engine, exported, blocks, guided)
    assert latents <= 1e-4 and pixels <= 1 and share <= 1e-3


def inside(engine: Engine, folder: Path, **settings: Any) -> Engine:
    """The exported engine in Inferix, its programs as modules."""
    modules = modules_of(engine)
    return load_exported(folder, Limits(), settings, lambda path: modules[path.stem])


def test_commits_by_the_plain_weights_do_not_go_unseen(tmp_path: Path) -> None:
    """The comparison fails for an engine whose memory weights are the plain ones; then it has no second prompt."""
    engine = make_engine("sgf-plus-framewise", dtype="float32", **MEMORY)
    plain = remade(engine, more=(engine.parts.transformer,))
    sizes = [len(modules_of(each)["prompt"].program.results) for each in (engine, plain)]
    assert sizes[0] == 2 * sizes[1]
    latents, _, _ = steered(engine, as_modules(plain, write(plain, tmp_path / "engine")), 4)
    assert latents > 1e-2


SESSIONS = [("tinyworld", {}), ("rolling-forcing", ROLLING)]


@pytest.mark.parametrize(
    ("preset", "settings"), [*SESSIONS, pytest.param("sgf-plus-framewise", MEMORY, marks=pytest.mark.slow)]
)
def test_sessions_on_an_exported_engine(preset: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Two sessions in turn, a fork, a rewind and a restored file give what the model itself gives."""
    model = make_engine(preset, dtype="float32", spec=WORLD, rewind_blocks=2, **settings)
    exported = inside(model, write(model, tmp_path / "engine"))
    assert exported.config.executor == "exported"

    def stream(engine: Engine) -> list[Any]:
        one = engine.open("a hill", seed=1, actions=["left"]) if engine is exported else engine.open(
            prompt_embeds=PROMPTS["a hill"], seed=1, actions=["left"], size=SIZE)  # fmt: skip
        other = engine.open(prompt_embeds=PROMPTS["a lake"], seed=2, size=SIZE)
        with one, other:
            blocks = [block for _ in range(4) for session in (one, other) for block in session.stream(1)]
            other.prompt(embeds=PROMPTS["a hill"])
            blocks += list(other.stream(4))
            with one.fork() as fork:
                fork.act("right")
                blocks += list(fork.stream(2))
            one.rewind(2)
            blocks += list(one.stream(5))
            one.save(tmp_path / f"{engine is exported}.session")
        with Session.restore(engine, tmp_path / f"{engine is exported}.session") as restored:
            return blocks + list(restored.stream(2))

    expected, blocks = stream(model), stream(exported)
    assert [block.index for block in blocks] == [block.index for block in expected]
    for made, block in zip(blocks, expected, strict=True):
        torch.testing.assert_close(made.latents, block.latents, rtol=0, atol=1e-4)
        assert np.abs(made.frames.astype(int) - block.frames.astype(int)).max() <= 1


INT8 = {"longlive": ({}, 1e-5), "tinyworld": ({"spec": WORLD}, 1e-3)}  # the sink's keys are rounded again as it moves


@pytest.mark.parametrize("preset", INT8)
def test_keys_and_values_in_int8(preset: str, tmp_path: Path) -> None:
    """Against the model's own pages in int8, within an error below theirs; scales that are 2% off are rejected."""
    settings, most = INT8[preset]
    model = make_engine(preset, dtype="float32", kv_dtype="int8", **settings)
    folder = write(model, tmp_path / "engine", kv_dtype="int8")
    jsonschema.validate(json.loads((folder / FILE).read_text("utf-8")), json.loads(SCHEMA.read_text("utf-8")))
    modules = modules_of(model, kv_dtype="int8")

    def scaled(path: Path, factor: float) -> Callable[[Any], dict[str, Any]]:
        def program(values: Any) -> dict[str, Any]:
            results = modules[path.stem](values).items()
            return {key: value * np.float32(factor) if "scale" in key else value for key, value in results}

        return program

    def played(factor: float) -> list[np.ndarray]:
        stream = ExportedEngine(folder, load=partial(scaled, factor=factor)).open("a hill", 7)
        return [stream.next_block(decode=False).latents for _ in range(5)]

    inner = load_exported(folder, Limits(), {}, lambda path: modules[path.stem])
    assert inner.config.kv_dtype == "int8"
    with model.open(prompt_embeds=PROMPTS["a hill"], seed=7, size=SIZE) as session, inner.open("a hill", seed=7) as own:
        expected, inside = ([block.latents.numpy() for block in each.stream(5)] for each in (session, own))
    largest = max(np.abs(latents).max() for latents in expected)
    errors = [
        max(np.abs(one - other).max() for one, other in zip(latents, expected, strict=True)) / largest
        for latents in (inside, played(1), played(1.02))
    ]
    assert max(errors[:2]) <= most < errors[2]


def test_linear_layers_in_int8(tmp_path: Path) -> None:
    """Against the model's own packed layers: a rounding may flip, but one layer more or less is told from it."""
    make = partial(make_engine, dtype="float32", denoising_step_list=(1000,))
    model = make(lowp="int8", lowp_keep=("blocks.0.*",))
    folder = write(model, tmp_path / "engine")
    plan = json.loads((folder / FILE).read_text("utf-8"))
    jsonschema.validate(plan, json.loads(SCHEMA.read_text("utf-8")))
    assert plan["lowp"] == {"kind": "int8", "layers": ["blocks.*"], "keep": ["blocks.0.*"]} and plan["version"] == 1
    config = inside(model, folder).config
    assert (config.lowp, config.lowp_keep) == ("int8", ("blocks.0.*",))

    def error(other: Engine) -> float:
        made = as_modules(other, folder).open("a hill", 7).next_block(decode=False).latents
        return float(np.sqrt(np.square(made - expected).mean() / np.square(expected).mean()))

    with model.open(prompt_embeds=PROMPTS["a hill"], seed=7, size=SIZE) as session:
        expected = next(iter(session.stream(1, decode=False))).latents.numpy()
    assert error(model) <= 2e-3 and min(error(make()), error(make(lowp="int8"))) > 5e-3
    with pytest.raises(UsageError, match="nothing"):
        write(make(lowp="int8", lowp_keep=("nothing",)), tmp_path / "other")


def test_streams_begin_with_pictures(tmp_path: Path) -> None:
    """A video, and a picture that is repeated, in the runner and in Inferix; two pictures too many are left out."""
    model = make_engine("tinyworld", dtype="float32", spec=WORLD)
    folder = write(model, tmp_path / "engine", prefixes=True)
    video = np.random.default_rng(0).integers(0, 255, (15, 32, 32, 3), np.uint8)
    exported, runner = inside(model, folder), as_modules(model, folder)
    for pictures in (video, video[:1]):
        session = model.open(prompt_embeds=PROMPTS["a hill"], seed=7, video=pictures, size=SIZE)
        other, stream = exported.open("a hill", seed=7, video=pictures), runner.open("a hill", 7, prefix=pictures)
        expected, begun = session.prefix_frames, stream.prefix_frames
        assert begun is not None and len(begun) == len(expected) > 0
        for made in (other.prefix_frames, begun):
            assert np.abs(made.astype(int) - expected.astype(int)).max() <= 1
        with session, other:
            for block, inner in zip(session.stream(4), other.stream(4), strict=True):
                torch.testing.assert_close(inner.latents, block.latents, rtol=0, atol=1e-4)
                np.testing.assert_allclose(stream.next_block().latents, block.latents, rtol=0, atol=1e-4)


def test_pictures_that_a_runner_cannot_begin_with(folder: Path, tmp_path: Path) -> None:
    video = np.zeros((9, 32, 32, 3), np.uint8)
    stream = ExportedEngine(folder, load=lambda path: lambda values: {})
    with pytest.raises(UsageError, match="prefix"):
        stream.open("a hill", prefix=video)
    model = make_engine("self-forcing", dtype="float32")
    encoder = as_modules(model, write(model, tmp_path / "engine", prefixes=True))
    for wrong in (video[:, :16], video.astype(np.float32), video[:5]):
        with pytest.raises(UsageError, match=str(wrong.shape[0])):
            encoder.open("a hill", prefix=wrong)
    tiny = remade(model, vae=family_of(TINY).random_decoder(TINY, True, torch.float32, "cpu"))
    with pytest.raises(UsageError, match="prefixes"):
        write(tiny, tmp_path / "tiny", prefixes=True)
    assert not (tmp_path / "tiny").exists()


def test_what_an_exported_engine_refuses_inside(folder: Path, tmp_path: Path) -> None:
    refused = {"lora": "style", "dtype": "float16", "window_blocks": 2, "clean_weights": "memory"}
    for key, value in refused.items():
        with pytest.raises(UsageError, match="blocks" if key == "window_blocks" else key):
            load_exported(folder, Limits(), {key: value}, lambda path: pytest.fail("no program is loaded"))
    with pytest.raises(UsageError, match="engine"):
        inferix.load("wan-tiny", engine=folder)
    loaded = load_exported(folder, Limits(), {}, lambda path: lambda values: {})
    with pytest.raises(UsageError, match="lora"):
        loaded.use_lora(tmp_path / "style.safetensors")
    with pytest.raises(UsageError, match="64x64"):
        loaded.open("a hill", size=(64, 64))
    with pytest.raises(UsageError, match="image"):
        loaded.open("a hill", video=np.zeros((9, 32, 32, 3), np.uint8), size=SIZE)


def test_plan_fits_its_schema(tmp_path: Path) -> None:
    engine = make_engine("tinyworld", dtype="float32", spec=WORLD)
    folder = write(engine, tmp_path / "engine")
    plan = json.loads((folder / FILE).read_text("utf-8"))
    schema = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.validate(plan, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plan | {"version": 5}, schema)
    check = plan["noise"]["check"]
    drawn = normals(check["seed"], [check["frame"]], check["draw"], (2, 2, 2))
    np.testing.assert_array_equal(drawn.ravel(), np.array(check["normals"], np.float32))
    plan["programs"]["step"]["inputs"][0]["dtype"] = "int7"
    with pytest.raises(jsonschema.ValidationError, match="int7"):
        jsonschema.validate(plan, schema)


def test_only_plans_that_older_readers_cannot_play_have_the_newer_version(tmp_path: Path) -> None:
    plain = make_engine("self-forcing", dtype="float32")
    joint = make_engine("rolling-forcing", dtype="float32", **ROLLING)
    loud = make_engine("self-forcing", dtype="float32", noise_scale=1.1)
    world, still = (make_engine("tinyworld", dtype="float32", spec=WORLD, noise_scale=1, **rests) for rests in (
        {}, {"rest_sink": 0}
    ))  # fmt: skip
    cases = [(1, plain, "float32"), (2, plain, "int8"), (2, joint, "float32"), (4, loud, "float32")]
    cases += [(4, world, "float32"), (1, still, "float32")]
    for number, (version, engine, kv_dtype) in enumerate(cases):
        folder = write(engine, tmp_path / str(number), kv_dtype=kv_dtype)
        assert read_plan(folder)["version"] == version
        jsonschema.validate(json.loads((folder / FILE).read_text("utf-8")), json.loads(SCHEMA.read_text("utf-8")))


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    target = dataclasses.replace(NAMES, writer=f"{__name__}:FullDisk")
    with pytest.raises(InferixError, match="no room"):
        write(make_engine("self-forcing", dtype="float32"), tmp_path / "engine", target=target)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with stand-ins for programs."""
    return write(make_engine("self-forcing", dtype="float32"), tmp_path_factory.mktemp("exported") / "engine")


def copied(folder: Path, place: Path) -> Path:
    place.mkdir()
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    return place


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "step.onnx").unlink(), "step.onnx"),
    "cut": (lambda folder: (folder / "step.onnx").write_bytes(b"ste"), "step.onnx"),
    "swapped": (lambda folder: (folder / "commit.onnx").write_bytes(b"prompt"), "commit.onnx"),
    "other version": (
        lambda folder: (folder / FILE).write_text((folder / FILE).read_text().replace('"version": 1', '"version": 9')),
        "9",
    ),
    "other format": (lambda folder: (folder / FILE).write_text("{}"), FILE),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_engine_is_refused(damage: str, folder: Path, tmp_path: Path) -> None:
    harm, named = DAMAGE[damage]
    broken = copied(folder, tmp_path / "engine")
    read_plan(broken)
    harm(broken)
    with pytest.raises(CheckpointError, match=named):
        read_plan(broken)


def test_what_an_engine_was_not_made_for(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=FILE):
        read_plan(tmp_path)
    exported = ExportedEngine(folder, load=lambda path: lambda values: pytest.fail("no program runs"))
    for arguments, named in (
        ({"prompt": "a desert"}, "a desert"), ({"prompt": "a hill", "negative_prompt": "fog"}, "negative_prompt"),
        ({"prompt": "a hill", "seed": -1}, "-1"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            exported.open(**arguments)


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf"])
def test_a_length_that_is_none_is_refused(seconds: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command([str(folder), "--seconds", seconds, "--out", str(tmp_path / "out.y4m")])
    assert ended.value.code == 2 and not (tmp_path / "out.y4m").exists()


def with_plan(folder: Path, place: Path, **values: Any) -> Path:
    """A copy of an engine with other values in its plan."""
    copied(folder, place)
    plan = json.loads((place / FILE).read_text("utf-8"))
    (place / FILE).write_text(json.dumps(plan | values), "utf-8")
    return place


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_without_the_runtime(target: Target, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    engine = with_plan(folder, tmp_path / "engine", target=target.name)
    with pytest.raises(InferixError, match=f"pip install {target.runtime}"):
        ExportedEngine(engine)


def test_an_unknown_target_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="onyx"):
        ExportedEngine(with_plan(folder, tmp_path / "engine", target="onyx"))


@pytest.mark.parametrize("torch_version, cpu, named", [("1.0.0", None, "1.0"), (None, "PDP11", "PDP11")])
def test_programs_compiled_elsewhere_are_refused(
    torch_version: str | None, cpu: str | None, named: str, folder: Path, tmp_path: Path
) -> None:
    built = {
        "packages": {"torch": torch_version or torch.__version__},
        "options": {"cpu": cpu or torch.backends.cpu.get_cpu_capability()},
    }
    with pytest.raises(CheckpointError, match=named):
        ExportedEngine(with_plan(folder, tmp_path / "engine", target="aoti", built=built))


def test_the_runner_imports_numpy_alone() -> None:
    """Refuse every import but numpy, onnxruntime, this package and the standard library."""
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        first = name.split(".")[0]
        if first not in ("numpy", "onnxruntime", "inferix") and first not in sys.stdlib_module_names:
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Refuse())
import inferix.export.run
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_presets_that_cannot_be_exported_are_refused_before_weights(name: str, tmp_path: Path) -> None:
    """No file of weights is there, so an error of another kind would show that it was looked for."""
    if name in ("causvid", "krea", "self-forcing-a14b"):
        with pytest.raises(UsageError, match=name):
            export_engine(tmp_path / "none.safetensors", name, out=tmp_path / "engine")
    else:
        with pytest.raises(InferixError, match="none"):
            export_engine(tmp_path / "none.safetensors", name, out=tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_bad_arguments_of_an_export(tmp_path: Path) -> None:
    for settings, named in (
        ({"target": "onyx"}, "onyx"), ({"dtype": "float8"}, "float8"), ({"kv_dtype": "int4"}, "int4"),
        ({"target": "aoti", "kv_dtype": "int8"}, "keys and values in int8"), ({"lowp": "int3"}, "int3"),
        ({"target": "openvino", "lowp": "int8"}, "layers in int8"), ({"lowp": "fp8"}, "layers in fp8"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=named):
            export_engine("tinyworld", out=tmp_path / "engine", **settings)


def test_a_preset_survives_the_plan() -> None:
    for preset in PRESETS.values():
        assert preset_of(json.loads(json.dumps(preset_values(preset)))) == preset
    with pytest.raises(CheckpointError, match="later"):
        preset_of(preset_values(make_preset("longlive")) | {"later": 1})


@pytest.mark.parametrize("prompt", ["a red robott in a snowy forest by day", "The Blue FOX!, zzz", "wizard"])
def test_words_are_those_of_the_encoder(prompt: str) -> None:
    with pytest.warns() if "robott" in prompt or "zzz" in prompt else pytest.MonkeyPatch.context():
        assert known_words(prompt, WORDS, SKIPPED) == encoder_words(prompt)


def test_numpy_noise_is_the_engines() -> None:
    seed, frames = (1 << 63) + 12345, range(1000, 1003)
    expected = philox_normals(seed, frames, 3, (5, 3, 3)).numpy()
    np.testing.assert_allclose(normals(seed, frames, 3, (5, 3, 3)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["renoise", "unipc"])
def test_solver_weights_are_the_solver(solver: str) -> None:
    steps = (1000, 750, 500, 250) if solver == "renoise" else ()
    sampler = Sampler(SamplerSpec(steps, bool(steps), 5.0, 0.0, solver, 0 if steps else 6))
    generator = torch.Generator().manual_seed(0)
    matrix = solver_matrix(sampler)
    draws = len(matrix[0]) - 1
    seen = [torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(draws)]
    latents, running = seen[0], sampler.begin()
    for step, row in enumerate(matrix):
        velocity = torch.randn(7, generator=generator, dtype=torch.float64)
        latents = running.advance(latents, velocity, step, lambda following=step + 1: seen[following])
        seen.append(velocity)
        total = sum(weight * part for weight, part in zip(row, seen, strict=True))
        torch.testing.assert_close(total, latents, rtol=1e-9, atol=1e-9)


def test_slots_hold_what_is_seen() -> None:
    window, content = FixedWindow(), {}
    pending: tuple[int, ...] = ()
    for past in [(), (0, 1), (0, 1, 2, 3), (0, 3, 4, 5), (0, 5, 6, 7), (5, 7), (5, 7, 8), ()]:
        new = tuple(frame for frame in past if frame not in window.frames) or pending
        update = window.update(past, new)
        for frame, slot in update.writes:
            content[slot] = frame
        for source, slot in update.moves:
            content[slot] = content[source]
        assert sorted(window.frames) == sorted(past)
        assert [content[slot] for slot in range(len(past))] == window.frames
    with pytest.raises(AssertionError):
        window.update((1,), ())
