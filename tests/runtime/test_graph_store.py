"""Stored graphs: a second start traces nothing and gives the same; graphs of something else are refused."""

from __future__ import annotations

import json
import re
import shutil
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
    """A folder of graphs, and what the engine that made them gave."""
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


def test_graphs_of_something_else_are_refused(stored: tuple[Path, torch.Tensor], monkeypatch) -> None:
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
    folder, _ = stored
    broken = tmp_path / "graphs"
    broken.mkdir()
    for path in folder.iterdir():
        text = path.read_text()
        (broken / path.name).write_text(text if path.name == "identity.json" else text[:100])
    with pytest.raises(InferixError, match=r"block-.*json"):
        first_block(make_engine(executor="fused", graphs=str(broken)))
    graphs = make_engine(executor="fused").executor.graph_of
    with pytest.raises(UsageError, match=r"nothing.*graph"):
        GraphStore.open(tmp_path / "nothing", graphs, create=False)
    with pytest.raises(UsageError, match=r"graphs is 'x'.*executor"):
        make_engine(graphs="x")


@pytest.mark.parametrize("name", ["identity.json", "block"])
@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"key": {}}', "[" * 100_000, '{"key": 1, "lowered": 2}'])
def test_a_damaged_file_is_refused(stored: tuple[Path, torch.Tensor], tmp_path: Path, name: str, content: str) -> None:
    folder = tmp_path / "graphs"
    shutil.copytree(stored[0], folder)
    (damaged,) = folder.glob(f"{name}*")
    damaged.write_text(content)
    graphs = make_engine(executor="fused").executor.graph_of
    with pytest.raises(InferixError, match=re.escape(str(folder))):
        stored_for(folder)
        GraphStore.open(folder, graphs, create=False).programs()


def test_the_first_difference_is_named() -> None:
    here = {"format": 1, "model": {"dim": 64, "layers": 2}}
    assert difference(here, json.loads(json.dumps(here))) is None
    assert difference(here, {"format": 1, "model": {"dim": 64, "layers": 3}}) == ("model.layers", 2, 3)
    assert difference(here, {"format": 1}) == ("model", here["model"], None)


def test_too_little_memory_says_how_much_and_what_would_fit(stored: tuple[Path, torch.Tensor], monkeypatch) -> None:
    folder, latents = stored
    cases = ((-(10**9), "no smaller"), (1000, "dtype=bfloat16"))
    for free, advice in cases:
        monkeypatch.setattr(launcher, "free_bytes", lambda device, free=free: free)
        engine = make_engine(executor="fused", graphs=str(folder))
        with pytest.raises(InferixError, match=rf"scratch .*, inputs .*{advice}"):
            first_block(engine)
    monkeypatch.setattr(launcher, "free_bytes", lambda device: None)  # where nobody knows, nothing is refused
    assert torch.equal(first_block(make_engine(executor="fused", graphs=str(folder))), latents)
