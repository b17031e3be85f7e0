"""Plans as bytes: those of every preset, any that the types allow, and damaged ones."""

from __future__ import annotations

import dataclasses
import json
import typing
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ROWS, SIZE, WAN_PRESETS, make_engine

from inferix.errors import InferixError
from inferix.runtime.plans import HEADER, KINDS, MAGIC, VERSION, PassPlan, Plan, WritePages, decode_plan, encode_plan
from inferix.runtime.worker import LocalWorker
from inferix.schemes.page_needs import needs_negative

FEW = {"causal-diffusion": {"num_steps": 2}}
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
PLANS = st.one_of([st.from_type(kind) for kind in KINDS.values()])


def plans_of(name: str, monkeypatch: pytest.MonkeyPatch, **overrides: object) -> list[Plan]:
    """Plans of a few blocks with a new prompt and a fork; passes are not run."""
    plans: list[Plan] = []
    execute = LocalWorker.execute

    def noting(self, plan, tensors=()):
        plans.append(plan)
        return [torch.zeros_like(tensors[0])] if isinstance(plan, PassPlan) else execute(self, plan, tensors)

    monkeypatch.setattr(LocalWorker, "execute", noting)
    engine = make_engine(name, "float32", **(FEW.get(name, {}) | overrides))
    more = {"negative_embeds": ROWS.float().flip(0)} if needs_negative(engine.preset) else {}
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, **more) as session:
        list(session.stream(5, decode=False))
        session.prompt(embeds=ROWS.float() * 2)
        with session.fork() as other:
            list(other.stream(2, decode=False))
        list(session.stream(2, decode=False))
    monkeypatch.undo()
    return plans


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_plans_of_every_preset_come_back_from_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = plans_of(name, monkeypatch)
    assert sum(isinstance(plan, PassPlan) for plan in plans) > 5
    for plan in plans:
        assert decode_plan(encode_plan(plan)) == plan


@given(PLANS)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_plan_comes_back_from_bytes(plan: Plan) -> None:
    found = decode_plan(encode_plan(plan))
    assert found == plan and type(found) is type(plan) and repr(found) == repr(plan)


@given(PLANS, st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_damaged_bytes_are_refused(plan: Plan, data: st.DataObject) -> None:
    whole = encode_plan(plan)
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    for damaged in (whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :], whole[:at], whole + b" "):
        with pytest.raises(InferixError, match="damaged"):
            decode_plan(damaged)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([], "no plan"),
        ({"Release": []}, "no plan"),
        (["Erase", [1]], "Erase"),
        (["Release"], "Release"),
        (["Release", [1], 2], "Release"),
        (["Release", [1.5]], r"Release.numbers\[0\] is 1.5"),
        (["Release", [True]], r"Release.numbers\[0\] is True"),
        (["Release", "12"], "Release.numbers is '12'"),
        (["WritePages", [1, 2, 3], []], "WritePages.grid"),
        (["WritePages", [1, None], []], r"WritePages.grid\[1\]"),
    ],
)
def test_content_of_another_form_is_refused(values: object, named: str) -> None:
    text = json.dumps(values).encode()
    with pytest.raises(InferixError, match=named):
        decode_plan(HEADER.pack(MAGIC, VERSION, zlib.crc32(text)) + text)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'["Release",[NaN]]', b"\xff", b""])
def test_text_that_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(InferixError, match="damaged"):
        decode_plan(HEADER.pack(MAGIC, VERSION, zlib.crc32(text)) + text)


def test_another_version_is_refused() -> None:
    whole = encode_plan(WritePages((2, 2), (1,)))
    with pytest.raises(InferixError, match=f"version {VERSION + 1}"):
        decode_plan(HEADER.pack(MAGIC, VERSION + 1, *HEADER.unpack_from(whole)[2:]) + whole[HEADER.size :])


def test_a_plan_holds_host_values_only() -> None:
    """No field of a plan is a tensor, at any depth."""

    def leaves(kind: object) -> set[object]:
        if dataclasses.is_dataclass(kind):
            return set().union(*map(leaves, typing.get_type_hints(kind).values()))
        arguments = [argument for argument in getattr(kind, "__args__", ()) if argument is not ...]
        return set().union(*map(leaves, arguments)) if arguments else {kind}

    assert set().union(*map(leaves, KINDS.values())) <= {int, float, bool, str, type(None)}
