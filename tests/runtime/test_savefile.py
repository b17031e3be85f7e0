"""Saved sessions: gone on with in another process, refused where they do not belong, and never left half-written."""

import hashlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine, randomise
from safetensors import safe_open
from safetensors.torch import save_file

from inferix.errors import InferixError, UsageError
from inferix.runtime.limits import Limits
from inferix.runtime.noise import InjectedNoise
from inferix.runtime.sessions.lifecycle import State
from inferix.runtime.sessions.session import Session
from inferix.runtime.sessions.session_file import KEY

TESTS = Path(__file__).parents[1]
SETTINGS = {"local_attn_size": 6, "sink_size": 3, "denoising_step_list": [1000, 500]}


def hash_of(blocks):
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block.latents.numpy().tobytes() + block.frames.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file, and what its session went on to make."""
    path = tmp_path_factory.mktemp("saved") / "world.safetensors"
    engine = make_engine("longlive", "float32", **SETTINGS)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, seed=2**63) as session:
        list(session.stream(2))
        session.prompt(embeds=ROWS.flip(0).float())
        list(session.stream(1))
        session.save(path)
        return path, hash_of(session.stream(2))


OTHER_PROCESS = f"""
import sys, time
sys.path.insert(0, {str(TESTS / "runtime")!r})
sys.path.insert(0, {str(TESTS)!r})
sys.path.insert(0, {str(TESTS.parent / "tools")!r})
import test_savefile as here
from inferix.runtime.sessions import session_file as savefile

engine = here.make_engine("longlive", "float32", **here.SETTINGS)
session = here.Session.restore(engine, sys.argv[1])
blocks = list(session.stream(2))
print([block.index for block in blocks], here.hash_of(blocks), flush=True)
write = savefile.write_tensors

def stuck(tensors, path, metadata):
    write(tensors, path, metadata)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    print("half", flush=True)
    time.sleep(600)

savefile.write_tensors = stuck
session.save(sys.argv[1])
"""


def test_another_process_goes_on_bit_for_bit_and_its_death_leaves_the_old_file(saved, tmp_path):
    """Decoder included; the process is killed while it writes over the file it came from."""
    source, wanted = saved
    path = tmp_path / "world.safetensors"
    path.write_bytes(source.read_bytes())
    child = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == f"[3, 4] {wanted}\n"
        assert child.stdout.readline() == "half\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert path.read_bytes() == source.read_bytes()
    engine = make_engine("longlive", "float32", **SETTINGS)
    with Session.restore(engine, path) as session:
        with pytest.warns(UserWarning, match=r"world\.safetensors"):  # of what the killed one left
            session.save(path)
        assert hash_of(session.stream(2)) == wanted
    assert len(list(tmp_path.glob("*.part"))) == 1 and len(list(tmp_path.iterdir())) == 2
    with Session.restore(engine, path) as session:
        assert hash_of(session.stream(2)) == wanted


def full_disk(handle):
    raise OSError("disk full")


def test_a_save_that_fails_leaves_the_old_file(saved, tmp_path, monkeypatch):
    source, _ = saved
    path = tmp_path / "world.safetensors"
    path.write_bytes(source.read_bytes())
    engine = make_engine("longlive", "float32", **SETTINGS)
    with Session.restore(engine, path) as session:
        monkeypatch.setattr("inferix.runtime.files.os.fsync", full_disk)
        with pytest.raises(InferixError, match=r"world.safetensors' failed: disk full"):
            session.save(path)
        with pytest.raises(UsageError, match="/proc/none/world"):
            session.save("/proc/none/world.safetensors")
    assert path.read_bytes() == source.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["world.safetensors"]


def test_cut_and_foreign_files_are_refused_in_one_line(saved, tmp_path):
    source, _ = saved
    whole, path = source.read_bytes(), tmp_path / "world.safetensors"
    engine = make_engine("longlive", "float32", **SETTINGS)

    def refused(said, by=engine, kind=InferixError):
        with pytest.raises(kind, match=said) as caught:
            Session.restore(by, path)
        assert "\n" not in str(caught.value)
        by.check_integrity()
        assert not by.manager.sessions

    refused("no saved session", kind=UsageError)
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("is cut short or no saved session")
    path.write_bytes(b"not a world at all, but longer than a header" * 10)
    refused("is cut short or no saved session")
    save_file({"x": torch.zeros(2)}, path)
    refused("is a safetensors file, but no saved session", kind=UsageError)

    with safe_open(source, "pt") as file:
        header, tensors = json.loads(file.metadata()[KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa
    save_file(tensors, path, {KEY: json.dumps(header | {"version": 99})})
    refused("has version 99 of the format, this is version 1", kind=UsageError)
    save_file({"rows": tensors["rows"]}, path, {KEY: json.dumps(header)})
    refused("lacks 'cache.0.kv'.*; save it again")
    save_file(tensors, path, {KEY: json.dumps({"version": 1})})
    refused("lacks 'made_by'; save it again")
    save_file(tensors, path, {KEY: json.dumps(header | {"size": [30, 32]})})
    refused("size 30x32 is not possible", kind=UsageError)

    path.write_bytes(whole)
    others = {
        "another model: num_layers is 2 there and 1 here": {"spec": replace(TINY, num_layers=1)},
        "another preset: local_attn_size is 6 there and 9 here": {"local_attn_size": 9},
        "another preset: denoising_step_list is": {"denoising_step_list": [1000]},
        "another dtype: kv is None there and 'int8' here": {"kv_dtype": "int8"},
    }
    for said, change in others.items():
        refused(said, make_engine("longlive", "float32", **SETTINGS | change), UsageError)
    refused("another dtype: dtype is 'float32' there", make_engine("longlive", **SETTINGS), UsageError)
    weights = make_engine("longlive", "float32", **SETTINGS)
    randomise(weights.parts.transformer, seed=1)
    refused("another weights: transformer is", weights, UsageError)


def test_a_restored_session_needs_room_like_any_other(saved):
    path, wanted = saved
    engine = make_engine("longlive", "float32", limits=Limits(sessions=1, when_full="queue"), **SETTINGS)
    first = engine.open(prompt_embeds=ROWS.float(), size=SIZE)
    queued = Session.restore(engine, path)
    with pytest.raises(InferixError, match="still waits for room"):
        queued.save(path)
    assert queued.state is State.NEW and engine.manager.pages_in_use == 0
    first.close()
    assert hash_of(queued.stream(2)) == wanted
    with pytest.raises(UsageError, match="cannot be rewound to block 3"):
        queued.rewind(3)


def test_noise_that_was_given_is_saved_too(tmp_path):
    engine = make_engine("self-forcing", "float32", local_attn_size=6, denoising_step_list=[1000, 500])
    generator = torch.Generator().manual_seed(0)
    noise = InjectedNoise(
        torch.randn(12, 16, 4, 4, generator=generator), torch.randn(4, 1, 3, 16, 4, 4, generator=generator)
    )
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, noise=noise) as session:
        list(session.stream(2))
        session.save(tmp_path / "a.safetensors")
        wanted = hash_of(session.stream(2))
    with Session.restore(engine, tmp_path / "a.safetensors") as session:
        assert hash_of(session.stream(2)) == wanted
