"""The C++ runner and its C interface against the runner in Python, on the same engines.

Run by ctest. Quick tests play an engine of toy programs, slow ones exported models.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_build import ROOT, Built
from grouped_engines import CASES, PRESETS, TEXTS, magi, rows_of
from numpy.typing import NDArray
from oracles import SIZE
from small_engine import PROMPTS, convert_small, export_small
from toy_programs import export_toy

import inferix
from inferix.export.engine_folder import export_engine, write_engine
from inferix.export.plan import FILE, read_plan
from inferix.export.run import ExportedEngine, MadeBlock
from inferix.export.run import main as inferix_run
from inferix.export.targets import TARGETS
from inferix.runtime.y4m import Y4mWriter

CONTROLS = ["--prompt-at", "0.6", PROMPTS[1], "--actions", "left right 2l 9s 4r"]  # a rest longer than the window
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml"}
MODELS: dict[str, dict[str, Any]] = {
    "Wan VAE": {"preset": "longlive", "local_attn_size": 9},
    "TAEHV": {"preset": "self-forcing", "local_attn_size": 9, "vae": "taehv"},
}


@pytest.fixture(scope="session")
def toys(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy engine for each target of the build that has one."""
    place = tmp_path_factory.mktemp("toys")
    return {target: export_toy(target, place / target) for target in SUFFIXES if target in built.targets}


@pytest.fixture
def toy(toys: dict[str, Path]) -> Path:
    """One toy engine."""
    return next(iter(toys.values()))


@pytest.fixture(scope="session")
def engines(onnx_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small engine for a target, exported once."""
    place, made = tmp_path_factory.mktemp("engines"), {"onnx": onnx_folder}

    def engine(target: str) -> Path:
        if target not in made:
            out = place / target
            made[target] = convert_small(onnx_folder, out) if target == "openvino" else export_small(target, out)
        return made[target]

    return engine


def expect_backend(built: Built, target: str) -> None:
    if target not in built.targets:
        pytest.skip(f"the runner was built for {', '.join(built.targets)}, not for {target}")


def in_python(folder: Path, seed: int, blocks: int) -> list[MadeBlock]:
    """The stream of `CONTROLS` by the runner in Python."""
    script = ["left", "right", "left", "left", *["stay"] * 9, *["right"] * 4]
    stream, made = ExportedEngine(folder, 1).open(PROMPTS[0], seed, script), []
    for index in range(blocks):
        if index == 2:  # the first block that begins 0.6 s into a video of 8 frames a second
            stream.prompt(PROMPTS[1])
        made.append(stream.next_block())
    return made


def planes(path: Path, size: int) -> NDArray[np.int64]:
    """All bytes of the pictures of a y4m file."""
    header, _, body = path.read_bytes().partition(b"\n")
    assert header.startswith(f"YUV4MPEG2 W{size} H{size} F".encode()) and header.endswith(b":1 Ip A1:1 C444")
    pictures = np.frombuffer(body, np.uint8).reshape(-1, 6 + 3 * size * size)
    assert all(picture[:6].tobytes() == b"FRAME\n" for picture in pictures)
    return pictures[:, 6:].astype(np.int64)


def written(frames: list[NDArray[np.uint8]], fps: int, path: Path) -> NDArray[np.int64]:
    """Pictures as the y4m file of the runner in Python holds them."""
    size = frames[0].shape[1]
    with Y4mWriter(path, fps, (size, size)) as writer:
        for part in frames:
            writer.add(part)
    return planes(path, size)


def compare_controlled(built: Built, folder: Path, tmp_path: Path) -> None:
    """Play an engine under `CONTROLS` and a seed above 2**32 by both runners."""
    seed, blocks = (1 << 40) + 5, 18
    out, latents = tmp_path / "out.y4m", tmp_path / "out.npy"
    done = built.run(folder, "--seed", seed, "--out", out, "--latents", latents, *CONTROLS)
    assert done.returncode == 0, done.stderr
    made = in_python(folder, seed, blocks)
    reference = np.concatenate([block.latents for block in made])
    assert reference.std() > 0.1  # not a stream of one value
    np.testing.assert_allclose(np.load(latents), reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    expected = written([block.frames for block in made if block.frames is not None], 8, tmp_path / "expected.y4m")
    difference = np.abs(planes(out, 32) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-4


@pytest.mark.parametrize("target", SUFFIXES)
def test_toy_streams_equal_python(target: str, built: Built, toys: dict[str, Path], tmp_path: Path) -> None:
    expect_backend(built, target)
    compare_controlled(built, toys[target], tmp_path)


def compare_grouped(built: Built, folder: Path, guided: bool, tmp_path: Path) -> None:
    """Play an engine with two prompt switches by both runners, in C++ also in two parts: all bytes are the same."""
    begin = ["--prompt", TEXTS[0], "--seed", 7, *(["--negative-prompt", TEXTS[2]] if guided else [])]
    plan = read_plan(folder)
    block = plan.preset.num_frame_per_block * plan["size"]["pictures_per_latent"] / plan["model"]["fps"]  # seconds
    switches = ["--prompt-at", 1.3 * block, TEXTS[1], "--prompt-at", 6.3 * block, TEXTS[2]]
    latents, pictures = [tmp_path / f"{part}.npy" for part in range(4)], [tmp_path / f"{part}.y4m" for part in range(4)]
    saved = tmp_path / "saved.stream"

    def play(part: int, *arguments: object) -> None:
        done = built.run(folder, "--out", pictures[part], "--latents", latents[part], *arguments)
        assert done.returncode == 0, done.stderr

    play(0, *begin, *switches, "--blocks", 14)
    play(1, *begin, *switches[:3], "--blocks", 5, "--save", saved)
    play(2, "--restore", saved, "--blocks", 9)
    arguments = [*begin, *switches, "--blocks", 14, "--threads", 1, "--out", pictures[3], "--latents", latents[3]]
    inferix_run([str(folder), *map(str, arguments)])
    whole, first, rest, python = (np.load(path) for path in latents)
    assert python.std() > 0.1 and np.abs(whole[-len(rest) :] - rest).max() > 1e-3  # the second switch shows
    np.testing.assert_array_equal(whole[: len(first)], first)
    np.testing.assert_allclose(whole, python, rtol=0, atol=1e-5 * np.abs(python).max())
    difference = np.abs(planes(pictures[0], 32) - planes(pictures[3], 32))
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-4
    play(0, *begin, *switches[:3], "--blocks", 14)
    np.testing.assert_array_equal(np.load(latents[0])[len(first) :], rest)


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("name", CASES)
def test_toy_passes_of_groups_equal_python(name: str, target: str, built: Built, tmp_path: Path) -> None:
    expect_backend(built, target)
    engine = CASES[name][0]()
    folder = export_toy(target, tmp_path / "engine", engine=engine, rows=rows_of(engine))
    compare_grouped(built, folder, engine.preset.sampler.guidance_scale != 1, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "aoti"])
@pytest.mark.parametrize("preset", PRESETS)
def test_passes_of_groups_equal_python(preset: str, target: str, built: Built, tmp_path: Path) -> None:
    """The small models of MAGI-1, past their window."""
    expect_backend(built, target)
    engine = magi(preset)
    folder = write_engine(engine, tmp_path / "engine", SIZE, TARGETS[target], rows_of(engine))
    compare_grouped(built, folder, False, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "aoti"])
def test_the_runner_equals_python(target: str, built: Built, engines: Callable[[str], Path], tmp_path: Path) -> None:
    expect_backend(built, target)
    compare_controlled(built, engines(target), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnx", "openvino", "aoti"])
@pytest.mark.parametrize("decoder", MODELS)
def test_whole_models_equal_eager(decoder: str, target: str, built: Built, tmp_path: Path) -> None:
    """wan-tiny from a folder, a prompt and a seed alone, past its window, against the pictures of the engine itself."""
    expect_backend(built, target)
    settings, blocks, seed = MODELS[decoder], 6, 11
    folder = export_engine("wan-tiny", out=tmp_path / "engine", target=target, prompts=PROMPTS, **settings)
    out = tmp_path / "out.y4m"
    done = built.run(folder, "--prompt", PROMPTS[1], "--seed", seed, "--blocks", blocks, "--out", out)
    assert done.returncode == 0, done.stderr
    engine = inferix.load("wan-tiny", device="cpu", **settings)
    with engine.open(prompt=PROMPTS[1], seed=seed) as session:
        frames = [block.frames for block in session.stream(blocks)]
    fps = json.loads((folder / FILE).read_text("utf-8"))["model"]["fps"]
    difference = np.abs(planes(out, frames[0].shape[1]) - written(frames, fps, tmp_path / "expected.y4m"))
    print(f"{decoder}, {target}: largest difference {difference.max()}, share {(difference > 0).mean():.2e}")
    assert difference.max() <= 1 and (difference > 0).mean() <= 2e-3


def test_the_runner_names_its_targets(built: Built) -> None:
    done = built.run("--version")
    assert done.returncode == 0 and inferix.__version__ in done.stdout
    assert set(built.targets) & {"onnx", "openvino", "aoti"}


def test_the_result_as_json(built: Built, toy: Path, tmp_path: Path) -> None:
    out, latents = tmp_path / 'a "b"\n.y4m', tmp_path / "latents.npy"
    done = built.run(toy, "--blocks", 2, "--out", out, "--latents", latents, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made.pop("seconds") > 0
    assert made == {"blocks": 2, "frames": len(planes(out, 32)), "outputs": [str(out), str(latents)]}


def test_a_stream_saved_by_the_runner_goes_on(built: Built, toy: Path, tmp_path: Path) -> None:
    whole, parts, saved = tmp_path / "whole.y4m", [tmp_path / f"{part}.y4m" for part in range(2)], tmp_path / "a.stream"
    assert built.run(toy, "--blocks", 12, "--seed", 3, "--out", whole).returncode == 0
    assert built.run(toy, "--blocks", 8, "--seed", 3, "--out", parts[0], "--save", saved).returncode == 0
    assert built.run(toy, "--blocks", 4, "--restore", saved, "--out", parts[1]).returncode == 0
    np.testing.assert_array_equal(np.concatenate([planes(part, 32) for part in parts]), planes(whole, 32))
    content = saved.read_bytes()
    for damaged in (content[:-70], b"x" + content[1:], content[:100] + b"?" + content[101:], b""):
        saved.write_bytes(damaged)
        refused = built.run(toy, "--restore", saved, "--blocks", 1, "--out", tmp_path / "none.y4m")
        assert refused.returncode == 2 and str(saved) in refused.stderr
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "none.y4m").exists()


def test_bad_input_is_refused_in_one_line(built: Built, toys: dict[str, Path], toy: Path, tmp_path: Path) -> None:
    """Exit code 2 and one line on stderr for bad arguments and damaged engines, and no file is written."""
    target = next(iter(toys))
    step, commit = f"step{SUFFIXES[target]}", f"commit{SUFFIXES[target]}"
    larger = export_toy(target, tmp_path / "larger", (64, 64))
    saved = tmp_path / "larger.stream"
    assert built.run(larger, "--blocks", 1, "--out", tmp_path / "larger.y4m", "--save", saved).returncode == 0
    (tmp_path / "larger.y4m").unlink()

    def damaged(name: str, harm: Callable[[Path], object]) -> Path:
        copy = shutil.copytree(toy, tmp_path / name)
        harm(copy)
        return copy

    def change(copy: Path, **values: object) -> None:
        plan = json.loads((copy / FILE).read_text("utf-8"))
        (copy / FILE).write_text(json.dumps(plan | values), "utf-8")

    def change_context(copy: Path, **values: object) -> None:
        preset = json.loads((copy / FILE).read_text("utf-8"))["preset"]
        change(copy, preset=preset | {"context": preset["context"] | values})

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def drop(copy: Path, key: str) -> None:
        plan = json.loads((copy / FILE).read_text("utf-8"))
        del plan[key]
        (copy / FILE).write_text(json.dumps(plan), "utf-8")

    def copy_size(copy: Path) -> None:
        change(copy, size=json.loads((larger / FILE).read_text("utf-8"))["size"])

    cases: list[tuple[Path, list[str], str]] = [
        (tmp_path, [], FILE),
        (damaged("missing", lambda copy: (copy / step).unlink()), [], step),
        (damaged("cut", lambda copy: (copy / step).write_bytes(b"ste")), [], step),
        (damaged("changed", lambda copy: flip(copy / step)), [], step),
        (damaged("rows", lambda copy: flip(copy / "prompts.npy")), [], "prompts.npy"),
        (damaged("swapped", lambda copy: shutil.copy(copy / commit, copy / step)), [], step),
        (damaged("version", lambda copy: change(copy, version=9)), [], "9"),
        (damaged("versions", lambda copy: change(copy, version="nine")), [], FILE),
        (damaged("target", lambda copy: change(copy, target="onyx")), [], "onyx"),
        (damaged("unbuilt", lambda copy: change(copy, target="tensorrt")), [], "tensorrt"),
        (damaged("json", lambda copy: (copy / FILE).write_text('{"format": ')), [], "byte"),
        (damaged("key", lambda copy: drop(copy, "sampler")), ["--blocks", "1"], "sampler"),
        (damaged("other", lambda copy: change(copy, format="x")), [], FILE),
        (damaged("size", copy_size), [], "64x64"),
        (damaged("int8", lambda copy: change(copy, version=2, kv_dtype="int8")), [], "int8"),
        (damaged("averages", lambda copy: change_context(copy, sink_decay=0.5)), [], "tinyworld"),
        (toy, ["--json", "--out", "-"], "--json"),
        (toy, ["--size", "64x64"], "64x64"),
        (toy, ["--blocks", "1", "--restore", str(saved)], str(saved)),
        (toy, ["--blocks", "1", "--prompt", "a desert"], "a desert"),
        (toy, ["--blocks", "4", "--prompt-at", "0.6", "a\ndesert"], "desert"),
        (toy, ["--actions", "8Q"], "q"),
        (toy, ["--actions", "8R", "--blocks", "3"], "3"),
        (toy, ["--seed", "-1"], "-1"),
        (toy, ["--blocks", "0"], "0"),
        (toy, ["--seconds", "-1"], "-1"),
        (toy, ["--blocks", "1", "--negative-prompt", "fog"], "guidance"),
        (toy, ["--out", "out.mp4"], "out.mp4"),
        (toy, ["--sed", "1"], "--sed"),
    ]
    for engine, arguments, named in cases:
        done = built.run(engine, *arguments, cwd=tmp_path)
        assert done.returncode == 2 and named in done.stderr, (engine.name, arguments, named, done.stderr)
        assert len(done.stderr.splitlines()) == 1, (engine.name, arguments, done.stderr)
    assert not list(tmp_path.glob("*.y4m*"))


def test_a_program_of_another_make_is_named(built: Built, toys: dict[str, Path], toy: Path, tmp_path: Path) -> None:
    """A program with the right hash that the runtime refuses, or that takes other shapes: exit code 1, one line."""
    suffix = SUFFIXES[next(iter(toys))]

    def replaced(name: str, program: str, content: bytes) -> Path:
        copy = shutil.copytree(toy, tmp_path / name)
        (copy / f"{program}{suffix}").write_bytes(content)
        plan = json.loads((copy / FILE).read_text("utf-8"))
        plan["files"][f"{program}{suffix}"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (copy / FILE).write_text(json.dumps(plan), "utf-8")
        return copy

    larger = export_toy(next(iter(toys)), tmp_path / "larger", (64, 64))
    for engine, program in (
        (replaced("empty", "commit", b"no program"), "commit"),
        (replaced("shapes", "commit", (larger / f"commit{suffix}").read_bytes()), "commit"),
    ):
        done = built.run(engine, "--blocks", 1, "--out", tmp_path / "none.y4m")
        assert done.returncode == 1 and f"{program}{suffix}" in done.stderr, done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not list(tmp_path.glob("none*"))


def test_compiled_engines_are_held_to_their_versions(built: Built, toy: Path, tmp_path: Path) -> None:
    """An engine of target aoti by another torch, or for another CPU."""
    expect_backend(built, "aoti")
    plan = json.loads((toy / FILE).read_text("utf-8"))
    for name, torch, cpu in (("torch", "1.0.0", "AVX2"), ("cpu", plan["built"]["packages"]["torch"], "Z80")):
        copy = shutil.copytree(toy, tmp_path / name)
        built_by = plan["built"] | {"packages": {"torch": torch}, "options": {"cpu": cpu}}
        (copy / FILE).write_text(json.dumps(plan | {"target": "aoti", "built": built_by}), "utf-8")
        done = built.run(copy, "--blocks", 1, cwd=tmp_path)
        assert done.returncode == 2 and (torch if name == "torch" else cpu) in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_plan_is_checked(built: Built, toy: Path) -> None:
    assert built.run(toy, "--check").returncode == 0


def test_seconds_are_rounded_up_to_blocks(built: Built, toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.y4m"
    assert built.run(toy, "--seconds", 0.7, "--out", out).returncode == 0  # 6 pictures: frames of 1, 4 and 4
    assert len(planes(out, 32)) == 9


def test_the_c_interface(built: Built, toy: Path, tmp_path: Path) -> None:
    """Prompts, actions, saving and errors through the shared library, against the runner in Python."""
    command = [sys.executable, ROOT / "tests" / "c_interface.py", built.library, toy, tmp_path, *PROMPTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference, frames = ExportedEngine(toy, 1).open(PROMPTS[0], 4), []
    for index in range(6):
        if index == 2:
            reference.act("right")
        if index == 3:
            reference.prompt(PROMPTS[1])
        frames.append(reference.next_block().frames)
    expected = np.concatenate([part for part in frames if part is not None]).astype(int)
    assert np.abs(np.load(tmp_path / "frames.npy").astype(int) - expected).max() <= 1
