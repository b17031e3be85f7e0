"""The cache of exported engines: what is found in it, and when the model itself runs."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_modules import NAMES, modules_of
from oracles import write_untrained_world
from typer.testing import CliRunner

import inferix
from inferix.cli.doctor import cached_verdict
from inferix.cli.main import app
from inferix.errors import UsageError
from inferix.export import engine_cache, inside
from inferix.export.engine_cache import MEASURED, VARIABLE, engine_key, find_cached, make_cached
from inferix.runtime.engine import Engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_untrained_world(tmp_path_factory.mktemp("model") / "world"))


@pytest.fixture(scope="module")
def made(world: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with an engine of the world, its programs as torch modules."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        patch.setattr(engine_cache, "find_target", lambda name: NAMES)
        patch.setattr(engine_cache, "TIMED", 1)
        modules = modules_of(inferix.load(world, "tinyworld", device="cpu", executor="eager"), size=(64, 64))
        patch.setattr(inside, "program_loader", lambda plan: lambda path: modules[path.stem])
        cached = make_cached(world, "tinyworld")
        assert make_cached(world, "tinyworld") == cached and cached.folder.parent == folder
        set_speedup(cached.folder, 2.0)
        yield cached.folder


def set_speedup(folder: Path, speedup: float) -> None:
    (folder / MEASURED).write_text(json.dumps({"eager": speedup, "exported": 1.0}))


def test_auto_runs_the_cached_engine(world: str, made: Path) -> None:
    """Its stream is that of the model, also behind a picture."""
    engine = inferix.load(world, "tinyworld", executor="auto", rewind_blocks=2)
    assert engine.config.engine == str(made) and engine.config.executor == "exported"
    model = inferix.load(world, "tinyworld", device="cpu", executor="eager", rewind_blocks=2)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    prompt = "a blue fox in a meadow by day"
    with engine.open(prompt, image=picture) as session, model.open(prompt, image=picture) as expected:
        for block, other in zip(session.stream(2), expected.stream(2), strict=True):
            torch.testing.assert_close(block.latents, other.latents, rtol=0, atol=1e-3)


def test_generate_runs_the_cached_engine(world: str, made: Path, tmp_path: Path) -> None:
    command = ["generate", "--model", world, "--preset", "tinyworld", "--prompt", "a fox", "--blocks", "1"]
    command += ["--latents-only", "--out", str(tmp_path / "out.safetensors")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and str(made) in done.stderr
    done = CliRunner().invoke(app, [*command, "--executor", "eager"])
    assert done.exit_code == 0 and str(made) not in done.stderr


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"eager": 1}', '{"eager": 1, "exported": 0}', '{"eager": "1", "exported": 1}']
)
def test_with_changed_times_the_model_runs_and_a_warning_names_the_file(text: str, world: str, made: Path) -> None:
    (made / MEASURED).write_text(text)
    with pytest.warns(UserWarning, match=MEASURED):
        assert find_cached(world, "tinyworld", None, {}) is None
    set_speedup(made, 2.0)


OTHERS: dict[str, dict[str, Any]] = {
    "dtype": {"dtype": "bfloat16"}, "device": {"device": "cuda"}, "adapter": {"lora": "style"}, "ranks": {"gpus": 2},
    "form": {"kernels": {"rms_norm": "reference"}}, "longer block": {"num_frame_per_block": 3},
    "decoder's start": {"decoder_zero_start": True}, "longer window": {"local_attn_size": 40},
    "recomputed context": {"segment_frames": 6, "rebuild_frames": 3},
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_settings_that_leave_the_model_to_run(case: str, world: str, made: Path) -> None:
    assert find_cached(world, "tinyworld", None, {}) == made
    assert find_cached(world, "tinyworld", None, OTHERS[case]) is None


def test_what_is_not_found(world: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change_weights() -> None:
        (Path(other) / "vae" / "config.json").write_text("{}")

    other = str(write_untrained_world(tmp_path / "world"))
    assert find_cached(other, "tinyworld", (64, 64), {}) == made  # equal weights elsewhere
    change_weights()
    changes: list[Callable[[], object]] = [
        lambda: set_speedup(made, 0.9), lambda: monkeypatch.setattr(engine_cache, "__version__", "9.9"),
        lambda: monkeypatch.setenv(VARIABLE, "off"),
        lambda: monkeypatch.setattr(engine_cache, "find_spec", lambda name: None),
        lambda: monkeypatch.setattr(engine_cache, "code_hash", lambda: "other"),
    ]  # fmt: skip
    assert find_cached(other, "tinyworld", None, {}) is None
    assert find_cached(world, "tinyworld", (32, 32), {}) is None and find_cached("wan-tiny", None, None, {}) is None
    for change in changes:
        with monkeypatch.context():
            change()
            assert find_cached(world, "tinyworld", None, {}) is None
        set_speedup(made, 2.0)
    loaded = inferix.load(world, "tinyworld", device="cpu", executor="auto")
    assert loaded.config.executor == "eager"


def test_what_the_cache_refuses(world: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    with pytest.raises(UsageError, match=VARIABLE):
        make_cached(world)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(UsageError, match="wan-tiny"):
        make_cached("wan-tiny")
    monkeypatch.setattr(engine_cache, "LARGEST", 1000)
    assert engine_key(world, None, None) is None
    refused = CliRunner().invoke(app, ["export", "--cache", "--out", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "--out" in refused.stderr


def test_the_advice_to_make_an_engine_is_given_once(
    world: str, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = inferix.load(world, "tinyworld", device="cpu", executor="eager")
    assert engine_cache.cache_advice(engine) is None  # the cache has one
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    command = ["generate", "--model", world, "--preset", "tinyworld", "--blocks", "1", "--latents-only", "--force"]
    command += ["--device", "cpu", "--out", str(tmp_path / "out.safetensors")]
    chosen = CliRunner().invoke(app, [*command, "--executor", "eager"]).stderr
    first, second = (CliRunner().invoke(app, command).stderr for _ in range(2))
    assert f"inferix export --cache --model {world} --preset tinyworld" in first
    assert "inferix export --cache" not in chosen + second
    monkeypatch.setenv(VARIABLE, "off")
    assert engine_cache.cache_advice(engine) is None


def test_no_engine_is_advised_that_could_not_run_or_be_written(
    world: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(**settings: Any) -> Engine:
        return inferix.load(world, "tinyworld", device="cpu", executor="eager", **settings)

    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    plain = load()
    for settings in ({"kernels": {"rms_norm": "reference"}}, {"kv_dtype": "int8"}, {"local_attn_size": 12}):
        assert engine_cache.cache_advice(load(**settings)) is None
    assert engine_cache.cache_advice(plain, (32, 32)) is None
    with monkeypatch.context() as patch:
        patch.setattr(engine_cache, "needed_features", lambda *_: ["averaged sink"])
        assert engine_cache.cache_advice(plain) is None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", denied)
        assert engine_cache.cache_advice(plain) is None
    assert not (tmp_path / "cache").exists()
    advice = engine_cache.cache_advice(plain, plain.default_size)
    assert advice is not None and world in advice


def denied(path: Path) -> bool:
    raise PermissionError(13, "denied", str(path))


def test_doctor_names_the_engine_that_runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert VARIABLE in cached_verdict()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert "inferix export --cache" in cached_verdict()
    monkeypatch.setattr(engine_cache, "find_cached", lambda *_: made)
    assert str(made) in cached_verdict()
