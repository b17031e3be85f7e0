"""Saved sessions: gone on with in another process, refused where they do not belong, and never left half-written."""

import hashlib
import json
import re
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
from inferix.runtime.kv.page_store import PagedStore
from inferix.runtime.limits import Limits
from inferix.runtime.noise import InjectedNoise
from inferix.runtime.sessions.lifecycle import State
from inferix.runtime.sessions.session import Session
from inferix.runtime.sessions.session_file import KEY
from inferix.runtime.sessions.session_state import DecoderForm

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


@pytest.fixture(scope="module")
def small():
    return make_engine("longlive", "float32", **SETTINGS)


OTHER_PROCESS = f"""
import sys, time
sys.path[:0] = {[str(TESTS), str(TESTS / "runtime"), *sys.path]!r}
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
    source, expected = saved
    path = tmp_path / "world.safetensors"
    path.write_bytes(source.read_bytes())
    child = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == f"[3, 4] {expected}\n"
        assert child.stdout.readline() == "half\n"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert path.read_bytes() == source.read_bytes()
    engine = make_engine("longlive", "float32", **SETTINGS)
    with Session.restore(engine, path) as session:
        with pytest.warns(UserWarning, match=r"world\.safetensors"):  # of what the killed one left
            session.save(path)
        assert hash_of(session.stream(2)) == expected
    assert len(list(tmp_path.glob("*.part"))) == 1 and len(list(tmp_path.iterdir())) == 2
    with Session.restore(engine, path) as session:
        assert hash_of(session.stream(2)) == expected


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

    def refused(message, by=engine, kind=InferixError):
        with pytest.raises(kind, match=message) as caught:
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
    refused("has version 99 of the format, this is version 2", kind=UsageError)
    first = {name: value for name, value in header.items() if name != "checksum"} | {"version": 1}
    save_file(tensors, path, {KEY: json.dumps(first)})
    refused("has version 1 of the format", kind=UsageError)
    save_file({"rows": tensors["rows"]}, path, {KEY: json.dumps(header)})
    refused("lacks 'cache.0.kv'.*; save it again")
    save_file(tensors, path, {KEY: json.dumps({"version": 2})})
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
    for message, change in others.items():
        refused(message, make_engine("longlive", "float32", **SETTINGS | change), UsageError)
    refused("another dtype: dtype is 'float32' there", make_engine("longlive", **SETTINGS), UsageError)
    weights = make_engine("longlive", "float32", **SETTINGS)
    randomise(weights.parts.transformer, seed=1)
    refused("another weights: transformer is", weights, UsageError)


def set_at(names, value):
    """A change of a saved header: the value at a path of names and indices."""

    def change(header, tensors):
        *inside, last = names
        for name in inside:
            header = header[name]
        header[last] = value

    return change


def delete(name):
    return lambda header, tensors: header.pop(name)


def other_tensor(name, of):
    def change(header, tensors):
        tensors[name] = of(tensors[name]) if name in tensors else of(None)
        header["tensors"] = sorted(tensors)

    return change


DAMAGE = {
    **{f"lacks '{name}'": delete(name) for name in ("size", "timeline", "strength", "caches", "flight", "decoder")},
    "the header is": None,
    "size is": set_at(["size"], "32x32"), "size is .32, 32, 3": set_at(["size"], [32, 32, 3]),
    "strength is 'x'": set_at(["strength"], "x"), "strength is nan": set_at(["strength"], float("nan")),
    "timeline.next_block is 'x'": set_at(["timeline", "next_block"], "x"),
    "timeline.next_frame is True": set_at(["timeline", "next_frame"], True),
    "timeline.places is": set_at(["timeline", "places"], [[0, 0], [0, 1]]),
    "no names but": set_at(["timeline", "preset"], None),
    "noise.seed is -1": set_at(["noise", "seed"], -1), "noise is": set_at(["noise"], {}),
    "caches is 2": set_at(["caches"], [{}, {}]),
    "caches.0.frames is 99": set_at(["caches", 0, "frames", 0], 99),
    "caches.0.frames is .0, 0": set_at(["caches", 0, "frames"], [0, 0, 0, 0, 0, 0]),
    "caches.0.places is 3": set_at(["caches", 0, "places", 0], [3, 0]),
    "'cache.0.kv' is": other_tensor("cache.0.kv", lambda tensor: tensor[:, :, :1].clone()),
    "actions.starts is": set_at(["actions", "starts"], [3]), "actions.held is": set_at(["actions", "held"], []),
    "flight is 2": set_at(["flight"], [{}, {}]), "change lacks 'left'": set_at(["change"], {"blocks": 1}),
    "decoder.frames is 'x'": set_at(["decoder", "frames"], "x"),
    "decoder.x": other_tensor("decoder.x", lambda tensor: torch.zeros(1)),
    "tensor 'rows' is": other_tensor("rows", lambda tensor: tensor[:1]),
    "tensor 'recent' is": other_tensor("recent", lambda tensor: tensor.int()),
    "tensor 'clamped' is": other_tensor("clamped", lambda tensor: torch.zeros(1)),
    "checksum 3 is not": set_at(["checksum"], 3), "checksum": other_tensor("cache.0.kv", lambda tensor: -tensor),
    "checksum '.*' is not": set_at(["timeline", "shot"], 1),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_field_is_named_and_nothing_is_left(message, saved, small, tmp_path):
    """Each with the tensors and the rest of the header as they were; checksums are compared last."""
    source, _ = saved
    with safe_open(source, "pt") as file:
        header, tensors = json.loads(file.metadata()[KEY]), {name: file.get_tensor(name) for name in file.keys()}  # noqa
    if DAMAGE[message] is None:
        header = [1, 2]
    else:
        DAMAGE[message](header, tensors)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, {KEY: json.dumps(header)})
    with pytest.raises(InferixError) as caught:
        Session.restore(small, path)
    assert "damaged.safetensors" in str(caught.value) and re.search(message, str(caught.value)), caught.value
    small.check_integrity()
    assert not small.manager.sessions and not small.manager.pages_in_use


@pytest.mark.parametrize("header", ['{"version": 2, "version": 2}', "{", "[" * 100_000])
def test_a_header_that_is_no_single_json_object_is_refused(header, small, tmp_path):
    save_file({"rows": torch.zeros(1)}, tmp_path / "damaged.safetensors", {KEY: header})
    with pytest.raises(InferixError, match=r"damaged\.safetensors"):
        Session.restore(small, tmp_path / "damaged.safetensors")


def test_a_restore_that_fails_on_its_way_leaves_nothing(saved, small, monkeypatch):
    """In reading, and in loading pages, by an error of no known kind."""
    path, expected = saved
    for owner, name in ((DecoderForm, "read"), (DecoderForm, "fill"), (PagedStore, "write")):
        for error in (ZeroDivisionError, KeyboardInterrupt):

            def failing(*args, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                with pytest.raises(error):
                    Session.restore(small, path)
            small.check_integrity()
            assert not small.manager.sessions and not small.manager.pages_in_use
            assert not any(store.users for store in small.kv_manager.stores.values())
    with Session.restore(small, path) as session:
        assert hash_of(session.stream(2)) == expected


def test_a_restored_session_needs_room_like_any_other(saved):
    path, expected = saved
    engine = make_engine("longlive", "float32", limits=Limits(sessions=1, when_full="queue"), **SETTINGS)
    first = engine.open(prompt_embeds=ROWS.float(), size=SIZE)
    queued = Session.restore(engine, path)
    with pytest.raises(InferixError, match="room"):
        queued.save(path)
    assert queued.state is State.NEW and engine.manager.pages_in_use == 0
    first.close()
    assert hash_of(queued.stream(2)) == expected
    with pytest.raises(UsageError, match="block 3"):
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
        expected = hash_of(session.stream(2))
    with Session.restore(engine, tmp_path / "a.safetensors") as session:
        assert hash_of(session.stream(2)) == expected
