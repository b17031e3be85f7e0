"""Stored graphs: a second start traces nothing and gives the same; graphs of another configuration are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import ROWS, SIZE, make_engine

from inferix.errors import InferixError, UsageError
from inferix.runtime.engine import Engine
from inferix.runtime.execution import launcher
from inferix.runtime.programs import graph_store
from inferix.runtime.programs.graph_store import GraphStore, difference, stored_for


def first_block(engine: Engine) -> torch.Tensor:
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        (block,) = session.stream(1, decode=False)
        return block.latents


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A folder of stored graphs, and the latents of the engine that stored them."""
    folder = tmp_path_factory.mktemp("stored") / "graphs"
    engine = make_engine(executor="fused", graphs=str(folder))
    latents = first_block(engine)
    assert engine.executor.traces == 1
    return folder, latents


def test_a_second_start_traces_nothing_and_gives_the_same(stored: tuple[Path, torch.Tensor]) -> None:
    folder, latents = stored
    engine = make_engine(executor="fused", graphs=str(folder))
    assert torch.equal(first_block(engine), latents)
    assert engine.executor.traces == 0
    assert {path.name[:6] for path in folder.iterdir()} == {"identi", "block-"}


def test_graphs_of_another_configuration_are_refused(stored: tuple[Path, torch.Tensor], monkeypatch) -> None:
    folder, _ = stored
    with pytest.raises(InferixError, match=r"dtype 'float64'.*'float32'"):
        make_engine(dtype="float32", executor="fused", graphs=str(folder))
    with pytest.raises(InferixError, match=r"preset.name 'self-forcing'.*'longlive'"):
        make_engine("longlive", executor="fused", graphs=str(folder))
    monkeypatch.setattr(graph_store, "card_of", lambda device: "NVIDIA H100 sm_90")
    with pytest.raises(InferixError, match=r"card 'cpu .*'NVIDIA H100 sm_90'"):
        make_engine(executor="fused", graphs=str(folder))
    current = graph_store.FORMAT
    monkeypatch.setattr(graph_store, "FORMAT", 99)
    with pytest.raises(InferixError, match=f"format {current}.*99"):
        make_engine(executor="fused", graphs=str(folder))


def test_a_broken_file_and_an_empty_folder_are_refused(stored: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, latents = stored
    broken = tmp_path / "graphs"
    broken.mkdir()
    for path in folder.iterdir():
        text = path.read_text()
        (broken / path.name).write_text(text if path.name == "identity.json" else text[:100])
    engine = make_engine(executor="fused", graphs=str(broken))
    with pytest.warns(UserWarning, match=r"cannot read .*block-"):
        assert torch.equal(first_block(engine), latents)
    assert engine.executor.traces == 1
    (path,) = (path for path in broken.iterdir() if path.name != "identity.json")
    assert json.loads(path.read_text()) == json.loads((folder / path.name).read_text())  # made again
    graphs = make_engine(executor="fused").executor.graph_of
    with pytest.raises(UsageError, match=r"nothing.*graph"):
        GraphStore.open(tmp_path / "nothing", graphs, create=False)
    with pytest.raises(UsageError, match=r"graphs is 'x'.*executor"):
        make_engine(graphs="x")


def a_call(program):
    return next(call for call in program["calls"] if call[4] == "out" and "ref" in str(call[1]))


def reference(call):
    """[buffer, dtype, size, stride, offset] of a call's first result."""
    return call[3][0]["ref"]


HARM = {
    "a file's op": lambda body: a_call(body).__setitem__(0, "aten::from_file.out"),
    "an op on storages": lambda body: a_call(body).__setitem__(0, "aten::set.source_Storage_out"),
    "an op in place": lambda body: a_call(body).__setitem__(0, "aten::add_.Tensor"),
    "no op": lambda body: a_call(body).__setitem__(0, "aten::"),
    "another library's op": lambda body: a_call(body).__setitem__(0, "prims::add"),
    "an offset": lambda body: reference(a_call(body)).__setitem__(4, 10**9),
    "a negative offset": lambda body: reference(a_call(body)).__setitem__(4, -8),
    "a size": lambda body: reference(a_call(body)).__setitem__(2, [10**9] * len(reference(a_call(body))[2])),
    "a dtype that is a function": lambda body: reference(a_call(body)).__setitem__(1, "load"),
    "an unknown buffer": lambda body: reference(a_call(body)).__setitem__(0, "nothing"),
    "places": lambda body: [slot.__setitem__(1, 256) for slot in body["plan"]["slots"]],
    "the arena's size": lambda body: body["plan"].__setitem__("size", 0),
    "a buffer's size": lambda body: body["buffers"][-1].__setitem__(3, ["x"]),
    "a section": lambda body: body["sections"][0].__setitem__(2, 10**6),
    "no calls": lambda body: body.pop("calls"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_harmful_or_damaged_program_is_not_used(harm: str, stored: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = stored
    (path,) = (path for path in folder.iterdir() if path.name != "identity.json")
    data = json.loads(path.read_text())
    key = graph_store.key_of(data["key"])
    assert GraphStore(folder).find(key) is not None
    HARM[harm](data["lowered"]["body"])
    (tmp_path / path.name).write_text(json.dumps(data))
    with pytest.warns(UserWarning, match=path.name):
        assert GraphStore(tmp_path).find(key) is None


def test_a_program_under_another_key_is_not_used(stored: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = stored
    (path,) = (path for path in folder.iterdir() if path.name != "identity.json")
    key = graph_store.key_of(json.loads(path.read_text())["key"])
    store, other = GraphStore(tmp_path), replace(key, pages=key.pages + 1)
    store.path(other).write_text(path.read_text())
    with pytest.warns(UserWarning, match=store.path(other).name):
        assert store.find(other) is None


@pytest.mark.parametrize("content", ["[]", "{}", '{"model": 3}', '{"model": {"name": 1}, "preset": {}}', "[" * 100_000])
def test_an_identity_that_names_nothing_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "identity.json").write_text(content)
    with pytest.raises(InferixError, match=r"identity\.json"):
        stored_for(tmp_path)


def test_a_long_value_of_the_identity_is_cut(stored: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    identity = json.loads((stored[0] / "identity.json").read_text())
    (tmp_path / "identity.json").write_text(json.dumps(identity | {"card": "x" * 10_000}))
    with pytest.raises(InferixError, match="card 'xxx") as caught:
        make_engine(executor="fused", graphs=str(tmp_path))
    assert len(str(caught.value)) < 1000


def test_the_first_difference_is_named() -> None:
    here = {"format": 1, "model": {"dim": 64, "layers": 2}}
    assert difference(here, json.loads(json.dumps(here))) is None
    assert difference(here, {"format": 1, "model": {"dim": 64, "layers": 3}}) == ("model.layers", 2, 3)
    assert difference(here, {"format": 1}) == ("model", here["model"], None)


def test_too_little_memory_says_how_much_and_what_would_fit(stored: tuple[Path, torch.Tensor], monkeypatch) -> None:
    folder, latents = stored
    cases = ((-(10**9), "no smaller"), (1000, "dtype=.bfloat16"))
    for free, advice in cases:
        monkeypatch.setattr(launcher, "free_bytes", lambda device, free=free: free)
        engine = make_engine(executor="fused", graphs=str(folder))
        with pytest.raises(InferixError, match=rf"scratch .*, inputs .*{advice}"):
            first_block(engine)
    monkeypatch.setattr(launcher, "free_bytes", lambda device: None)  # where nobody knows, nothing is refused
    assert torch.equal(first_block(make_engine(executor="fused", graphs=str(folder))), latents)
