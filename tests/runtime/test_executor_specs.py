"""Executors by name: the entries, what they refuse, and one that a user adds."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracles import ROWS, SIZE, make_engine

import inferix
from inferix.bench.candidates import candidates
from inferix.bench.subject import Subject
from inferix.cli.plan_report import workload
from inferix.errors import UsageError
from inferix.runtime.capacity.planner import memory
from inferix.runtime.config import EngineConfig
from inferix.runtime.executor_specs import EXECUTORS, REFERENCE, ExecutorSpec, default_executor, executor_spec

PAGE = Path(__file__).resolve().parents[2] / "docs" / "graph.md"


@pytest.fixture
def counting() -> Iterator[dict[str, object]]:
    """The example of docs/graph.md, run; its entry is taken out again."""
    before = dict(EXECUTORS)
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL))
    names: dict[str, object] = {}
    try:
        exec(compile(example, str(PAGE), "exec"), names)
        yield names
    finally:
        EXECUTORS.clear()
        EXECUTORS.update(before)


def latents(engine: inferix.Engine) -> torch.Tensor:
    with engine.open(prompt_embeds=ROWS.to(engine.dtype), size=SIZE, seed=3) as session:
        return torch.cat([block.latents for block in session.stream(4, decode=False)])


@pytest.mark.parametrize("preset", ["self-forcing", "rolling-forcing"])
def test_an_executor_of_a_users_own_streams_the_same_bits(counting: dict[str, object], preset: str) -> None:
    plain, mine = (make_engine(preset, executor=name) for name in ("eager", "counting"))
    assert torch.equal(latents(mine), latents(plain))
    assert type(mine.executor) is counting["CountingExecutor"] and mine.executor.passes_run > 4
    assert repr("counting") in repr(mine)


def test_everyone_knows_it_by_its_entry(counting: dict[str, object]) -> None:
    load = workload(None, "longlive", None, 1, "bfloat16", None, "counting", None, True, {})
    assert memory(load) == memory(replace(load, executor=REFERENCE)) != memory(replace(load, executor="fused"))
    engine = make_engine(dtype="float32", executor="counting")
    offered, left_out = candidates(engine, ROWS.float(), Subject("wan-tiny"))
    assert {"eager", "fused", "counting"} <= {candidate.name for candidate in offered} and "captured" in left_out
    with pytest.raises(UsageError, match=r"lowp.*'int8'.*'counting'.*eager or fused"):
        make_engine(executor="counting", lowp="int8")
    with pytest.raises(UsageError, match=r"graphs.*'folder'.*'counting'.*fused"):
        make_engine(executor="counting", graphs="folder")


def test_an_unknown_name_lists_what_there_is(counting: dict[str, object]) -> None:
    for call in (lambda: inferix.load(executor="count", device="cpu"), lambda: executor_spec("count", "--executor")):
        with pytest.raises(UsageError, match=r"executor is 'count'.*'counting'.*eager, fused, captured, counting"):
            call()


def test_settings_that_an_entry_does_not_take_are_refused() -> None:
    def config(**changes: object) -> EngineConfig:
        return EngineConfig.of("test", "self-forcing", device="cpu", dtype="float32", **changes)

    EXECUTORS["narrow"] = ExecutorSpec(about="", make="nowhere:f", devices=("xpu",), kv_dtypes=("fp8",))
    try:
        with pytest.raises(UsageError, match=r"kv_dtype.*'int8'.*'narrow'.*eager or fused or captured"):
            config(executor="narrow", kv_dtype="int8")
        with pytest.raises(UsageError, match=r"executor 'narrow'.*xpu.*'cpu'.*eager or fused"):
            config(executor="narrow", kv_dtype="fp8")
    finally:
        del EXECUTORS["narrow"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        ("nowhere.at.all:make", "nowhere"),
        ("inferix.errors:make_nothing", "make_nothing"),
        (lambda config, preset, parts: object(), "'broken'.*forward.*run_block"),
        (3, "make is 3"),
    ],
)
def test_an_entry_that_makes_no_executor_is_refused(make: object, named: str) -> None:
    EXECUTORS["broken"] = ExecutorSpec(about="", make=make)
    try:
        with pytest.raises(UsageError, match=named):
            make_engine(executor="broken")
    finally:
        del EXECUTORS["broken"]


def test_defaults_follow_the_device() -> None:
    assert (default_executor("cpu"), default_executor("cuda:1")) == ("eager", "captured")
    assert default_executor("cpu", lambda spec: spec.graphs) == "fused"
    assert default_executor("cuda", lambda spec: not spec.graphs) == "eager"
