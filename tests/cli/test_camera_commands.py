"""Worlds with a camera from the command line: videos along a path, keys of `play`, refusals before weights are read."""

import json

import numpy as np
import pytest
from oracles import SIZE, walk
from PIL import Image
from typer.testing import CliRunner

from inferix.cli import play
from inferix.cli.main import app
from inferix.cli.play import KEY_SECONDS, MOVES, Controls, split_keys
from inferix.export.checkpoint import write_random
from inferix.runtime import load as loading
from inferix.schemes.camera import CameraMove

ONE_BLOCK = 13  # pictures of four latent frames


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a first picture and a path of a camera."""
    folder = tmp_path_factory.mktemp("camera")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / "start.png")
    facts = {"poses": walk(ONE_BLOCK).tolist(), "intrinsics": [500, 500, 416, 240]}
    (folder / "path.json").write_text(json.dumps(facts))
    return folder


def generate(*arguments):
    return CliRunner().invoke(app, ["generate", "--device", "cpu", "--prompt", "a canal", *map(str, arguments)])


def test_a_video_along_a_path(files, tmp_path):
    """The length is that of the path; the camera is in the record."""
    given = ("--image", files / "start.png", "--camera", files / "path.json", "--size", "32x32")
    out = tmp_path / "walk.mp4"
    done = generate("--model", "lingbot-tiny", *given, "--set", "denoising_step_list=[1000]", "--out", out, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (len(result["blocks"]), result["frames"]) == (1, ONE_BLOCK) and out.stat().st_size > 0
    assert json.loads(out.with_suffix(".json").read_text())["opened_with"]["camera"] == str(files / "path.json")


@pytest.fixture
def unloaded(monkeypatch):
    """No weights are read in the test."""

    def fail(*arguments, **settings):
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "load", fail)


@pytest.mark.parametrize("kind", ["named", "folder"])
def test_what_a_stream_needs_is_asked_for_before_weights_are_read(kind, files, tmp_path, unloaded):
    model = "lingbot-tiny" if kind == "named" else write_random("lingbot-tiny", "lingbot", tmp_path / "model")
    own = ("--model", model, "--preset", "lingbot-v2", "--out", tmp_path / "out.mp4")
    image, camera = ("--image", files / "start.png"), ("--camera", files / "path.json")
    for given, named in ((camera, "--image"), (image, "--camera"), ((*camera, "--video", "a.mp4"), "--video")):
        done = generate(*own, *given)
        assert done.exit_code == 2 and named in done.stderr and str(model) in done.stderr.replace("\n", "")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("model", ["wan-tiny", "tinyworld"])
def test_a_camera_for_a_model_without_one_is_refused(model, files, tmp_path, unloaded):
    done = generate("--model", model, "--camera", files / "path.json", "--out", tmp_path / "out.mp4")
    assert done.exit_code == 2 and "--camera" in done.stderr and "path.json" in done.stderr


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"poses": [np.diag([2.0, 1, 1, 1]).tolist()] * ONE_BLOCK}, "poses[0]"),
        ({"poses": np.full((ONE_BLOCK, 4, 4), np.nan).tolist()}, "poses[0]"),
        ({"poses": np.eye(3).tolist()}, "[3, 3]"),
        ({"poses": [np.eye(4).tolist()] * ONE_BLOCK, "intrinsics": [0, 1, 2, 3]}, "intrinsics"),
        ({"intrinsics": [1, 1, 2, 3]}, "poses"),
        ({"poses": [np.eye(4).tolist()] * ONE_BLOCK, "fov": 90}, "fov"),
    ],
    ids=["rotation", "finite", "shape", "focal length", "none", "other"],
)
def test_files_of_cameras_that_cannot_be_used(facts, named, files, tmp_path, unloaded):
    (tmp_path / "bad.json").write_text(json.dumps(facts))
    image = ("--image", files / "start.png")
    done = generate("--model", "lingbot-tiny", *image, "--camera", tmp_path / "bad.json", "--out", tmp_path / "out.mp4")
    text = done.stderr.replace("\n", "")
    assert done.exit_code == 2 and "bad.json" in text and named in text


def test_serve_asks_for_an_image_before_weights_are_read(unloaded):
    done = CliRunner().invoke(app, ["serve", "--model", "lingbot-tiny", "--port", "0"])
    assert done.exit_code == 2 and "--image" in done.stderr


def test_play_asks_for_an_image_before_weights_are_read(unloaded, monkeypatch):
    monkeypatch.setattr(play, "check_terminal", lambda: None)
    done = CliRunner().invoke(app, ["play", "--model", "lingbot-tiny"])
    assert done.exit_code == 2 and "--image" in done.stderr


class Steered:
    """A session that records how it is moved."""

    def __init__(self):
        self.moves = []

    def move(self, move):
        self.moves.append(move)


def test_keys_of_play_move_and_turn_the_camera_until_they_expire():
    now = [0.0]
    controls, session = Controls((), lambda: now[0], camera=True), Steered()
    controls.steer(session)
    for key in split_keys("w\x1b[C\x1bOBa"):
        controls.key(key)
        controls.steer(session)
    now[0] += KEY_SECONDS
    controls.steer(session)
    keys = [CameraMove(forward=1), CameraMove(yaw=1), CameraMove(pitch=-1), CameraMove(right=-1)]
    assert session.moves == [CameraMove(), *keys, CameraMove()] and len(MOVES) == 12
