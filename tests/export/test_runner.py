"""The C++ runner and its C interface against the runner in Python, on the same engines.

`ctest` gives the programs that cmake has built (INFERIX_RUNNER, INFERIX_LIBRARY, INFERIX_BACKENDS); without them the
tests build them, which takes a minute.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_engine import PROMPTS, convert_small, export_small

from inferix.export.plan import FILE
from inferix.export.run import ExportedEngine, MadeBlock

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
CONTROLS = ["--prompt-at", "0.6", PROMPTS[1], "--actions", "left right 2l stay 6r"]


@dataclass(frozen=True)
class Built:
    """What cmake builds. targets: those that it has backends for."""

    runner: Path
    library: Path
    targets: tuple[str, ...]

    def run(self, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [self.runner, "--threads", "1", *map(str, arguments)]  # threads that spin would wait for each other
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if "INFERIX_RUNNER" in os.environ:
        targets = tuple(os.environ["INFERIX_BACKENDS"].split())
        return Built(Path(os.environ["INFERIX_RUNNER"]), Path(os.environ["INFERIX_LIBRARY"]), targets)
    cmake, compiler = shutil.which("cmake"), shutil.which("c++")
    if cmake is None or compiler is None:
        pytest.skip("cmake or a C++ compiler is not installed")
    place = tmp_path_factory.mktemp("build")
    configured = subprocess.run([cmake, "-S", ROOT, "-B", place, f"-DPython3_EXECUTABLE={sys.executable}",
                                 "-DINFERIX_TORCH=OFF"], capture_output=True, text=True)  # fmt: skip
    assert configured.returncode == 0, configured.stderr
    made = subprocess.run([cmake, "--build", place], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
    (line,) = (line for line in configured.stdout.splitlines() if "backends:" in line)
    return Built(place / "inferix-runner", place / "libinferix.so", tuple(line.split(": ")[1].split(";")))


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


@pytest.fixture(params=["onnx", "openvino", "aoti"])
def engine(request: pytest.FixtureRequest, built: Built, engines: Callable[[str], Path]) -> Path:
    if request.param not in built.targets:
        pytest.skip(f"cmake found no runtime for {request.param}")
    return engines(request.param)


def in_python(folder: Path, seed: int, blocks: int) -> list[MadeBlock]:
    """The stream of `CONTROLS` by the runner in Python."""
    script = ["left", "right", "left", "left", "stay", *["right"] * 6]
    stream, made = ExportedEngine(folder, 1).open(PROMPTS[0], seed, script), []
    for index in range(blocks):
        if index == 2:  # the first block that begins 0.6 s into a video of 8 frames a second
            stream.prompt(PROMPTS[1])
        made.append(stream.next_block())
    return made


def planes(path: Path, size: int) -> NDArray[np.int64]:
    """All bytes of the pictures of a y4m file."""
    header, _, body = path.read_bytes().partition(b"\n")
    assert header == f"YUV4MPEG2 W{size} H{size} F8:1 Ip A1:1 C444".encode()
    pictures = np.frombuffer(body, np.uint8).reshape(-1, 6 + 3 * size * size)
    assert all(picture[:6].tobytes() == b"FRAME\n" for picture in pictures)
    return pictures[:, 6:].astype(np.int64)


def test_the_runner_equals_python(built: Built, engine: Path, tmp_path: Path) -> None:
    """Given the folder, prompts, actions and a seed above 2**32, it makes the latents and pictures of Python."""
    from inferix.runtime.y4m import Y4mWriter

    seed, blocks = (1 << 40) + 5, 12
    out, latents, expected = tmp_path / "out.y4m", tmp_path / "out.npy", tmp_path / "expected.y4m"
    done = built.run(engine, "--seed", seed, "--out", out, "--latents", latents, *CONTROLS)
    assert done.returncode == 0, done.stderr
    made = in_python(engine, seed, blocks)
    reference = np.concatenate([block.latents for block in made])
    np.testing.assert_allclose(np.load(latents), reference, rtol=0, atol=1e-5 * np.abs(reference).max())
    with Y4mWriter(expected, 8, (32, 32)) as writer:
        for block in made:
            assert block.frames is not None
            writer.add(block.frames)
    difference = np.abs(planes(out, 32) - planes(expected, 32))
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-4
    assert built.run(engine, "--check").returncode == 0


def test_a_stream_saved_by_the_runner_goes_on(built: Built, engines: Callable[[str], Path], tmp_path: Path) -> None:
    folder = engines(next(target for target in ("onnx", "openvino") if target in built.targets))
    whole, parts, saved = tmp_path / "whole.y4m", [tmp_path / f"{part}.y4m" for part in range(2)], tmp_path / "a.stream"
    assert built.run(folder, "--blocks", 9, "--seed", 3, "--out", whole).returncode == 0
    assert built.run(folder, "--blocks", 5, "--seed", 3, "--out", parts[0], "--save", saved).returncode == 0
    assert built.run(folder, "--blocks", 4, "--restore", saved, "--out", parts[1]).returncode == 0
    np.testing.assert_array_equal(np.concatenate([planes(part, 32) for part in parts]), planes(whole, 32))
    content = saved.read_bytes()
    for damaged in (content[:-70], b"x" + content[1:], content[:100] + b"?" + content[101:], b""):
        saved.write_bytes(damaged)
        refused = built.run(folder, "--restore", saved, "--blocks", 1, "--out", tmp_path / "none.y4m")
        assert refused.returncode == 2 and str(saved) in refused.stderr
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "none.y4m").exists()


def test_what_the_runner_refuses(built: Built, engines: Callable[[str], Path], tmp_path: Path) -> None:
    """One line on stderr and exit code 2, for each bad input."""
    folder = engines(next(target for target in ("onnx", "openvino") if target in built.targets))
    suffix = next(folder.glob("step.*")).suffix if not list(folder.glob("step.xml")) else ".xml"

    def damaged(name: str, harm: Callable[[Path], object]) -> Path:
        copy = shutil.copytree(folder, tmp_path / name)
        harm(copy)
        return copy

    def change(copy: Path, **values: object) -> None:
        plan = json.loads((copy / FILE).read_text("utf-8"))
        (copy / FILE).write_text(json.dumps(plan | values), "utf-8")

    step = f"step{suffix}"
    cases: list[tuple[Path, list[str], str]] = [
        (tmp_path, [], FILE),
        (damaged("missing", lambda copy: (copy / step).unlink()), [], step),
        (damaged("cut", lambda copy: (copy / step).write_bytes(b"ste")), [], step),
        (damaged("swapped", lambda copy: shutil.copy(copy / f"commit{suffix}", copy / step)), [], step),
        (damaged("version", lambda copy: change(copy, version=9)), [], "9"),
        (damaged("target", lambda copy: change(copy, target="onyx")), [], "onyx"),
        (damaged("json", lambda copy: (copy / FILE).write_text('{"format": ')), [], "byte"),
        (folder, ["--blocks", "1", "--prompt", "a desert"], "a desert"),
        (folder, ["--actions", "8Q"], "q"),
        (folder, ["--actions", "8R", "--blocks", "3"], "3"),
        (folder, ["--seed", "-1"], "-1"),
        (folder, ["--blocks", "1", "--negative-prompt", "fog"], "guidance"),
        (folder, ["--out", "out.mp4"], "out.mp4"),
        (folder, ["--sed", "1"], "--sed"),
    ]
    for engine, arguments, named in cases:
        done = built.run(engine, *arguments, cwd=tmp_path)
        assert done.returncode == 2 and named in done.stderr, (arguments, named, done.stderr)
        assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.glob("*.y4m*"))


class CBlock(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_int64), ("frames", ctypes.POINTER(ctypes.c_uint8)), ("pictures", ctypes.c_int64),
        ("height", ctypes.c_int64), ("width", ctypes.c_int64), ("latents", ctypes.POINTER(ctypes.c_float)),
        ("latent_frames", ctypes.c_int64), ("channels", ctypes.c_int64), ("latent_height", ctypes.c_int64),
        ("latent_width", ctypes.c_int64),
    )  # fmt: skip


def test_the_c_interface(built: Built, engines: Callable[[str], Path], tmp_path: Path) -> None:
    """Prompts, actions, saving and errors through the shared library, against the runner in Python."""
    folder = engines(next(target for target in ("onnx", "openvino") if target in built.targets))
    library = ctypes.CDLL(str(built.library))
    library.inferix_open.restype = library.inferix_restore.restype = ctypes.c_void_p
    library.inferix_error.restype = ctypes.c_char_p
    place = str(folder).encode()

    def next_block(stream: ctypes.c_void_p) -> tuple[int, NDArray[np.uint8]]:
        block = CBlock()
        assert library.inferix_next_block(stream, ctypes.byref(block)) == 0, library.inferix_error()
        shape = (block.pictures, block.height, block.width, 3)
        return block.index, np.ctypeslib.as_array(block.frames, shape).copy()

    stream = ctypes.c_void_p(library.inferix_open(place, PROMPTS[0].encode(), None, ctypes.c_uint64(4), 1))
    assert stream.value, library.inferix_error()
    reference = ExportedEngine(folder, 1).open(PROMPTS[0], 4)
    saved = str(tmp_path / "a.stream").encode()
    for index in range(6):
        if index == 2:
            assert library.inferix_act(stream, b"right") == 0
            reference.act("right")
        if index == 3:
            assert library.inferix_prompt(stream, PROMPTS[1].encode()) == 0
            reference.prompt(PROMPTS[1])
        if index == 4:
            assert library.inferix_save(stream, saved) == 0
            library.inferix_close(stream)
            stream = ctypes.c_void_p(library.inferix_restore(place, saved, 1))
            assert stream.value, library.inferix_error()
        number, frames = next_block(stream)
        expected = reference.next_block().frames
        assert expected is not None and number == index
        assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 1
    assert library.inferix_act(stream, b"fly") == -1 and b"fly" in library.inferix_error()
    assert library.inferix_prompt(stream, b"a desert") == -1 and b"a desert" in library.inferix_error()
    assert next_block(stream)[0] == 6
    assert library.inferix_prompt(stream, None) == -1 and b"prompt" in library.inferix_error()
    assert library.inferix_act(None, b"left") == -1 and b"stream" in library.inferix_error()
    library.inferix_close(stream)
    library.inferix_close(None)
    assert not library.inferix_open(b"/none", b"", None, ctypes.c_uint64(0), 1) and b"/none" in library.inferix_error()
