"""The warp-specialised kernel in a simulator: right in any order of its warps; wrong tables and sources are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; pip install triton")

from checker import changed, check
from gluon_simulator import Deadlock, Race, Simulated

from inferix.bench import form_check
from inferix.errors import UsageError
from inferix.kernels.block_attention import SPEC, hopper
from inferix.kernels.block_attention.reference import sizes
from inferix.kernels.block_attention.schedule import Schedule, Step, make_schedule
from inferix.kernels.spec import Case, using
from inferix.kernels.tuning import choose

FORM = SPEC.form("hopper")
TWO_ITEMS = Case("two heads", sizes(1, 20, 2, 200, 2, 1, 128), {"lse": True, "sinks": 1})
CASES = [
    *(case for case in SPEC.test_cases if case["dim"] == 128 and case["page_tokens"] >= 128),
    Case("pages of one tile", sizes(1, 129, 3, 128, 1, 1, 128), {"order": "one"}),
    Case("runs, grouped heads, two groups of queries", sizes(2, 70, 4, 130, 4, 2, 128), {"sinks": 1, "order": "runs"}),
    Case("unequal rows", sizes(3, 9, 4, 150, 2, 1, 128), {"sinks": 2, "order": "one", "lse": True}),
]


@pytest.fixture
def simulated(monkeypatch):
    """Simulate the kernel in a number of programs, its warps ordered by a seed, perhaps over another schedule."""

    def simulate(module=hopper, programs=1, seed=0, schedule=None):
        monkeypatch.setattr(module, "programs_at_once", lambda device: programs)
        kernel = Simulated(module, "_attend", seed)
        monkeypatch.setattr(module, "_attend", kernel)
        if schedule is not None:
            monkeypatch.setattr(module, "schedule_of", lambda stages, groups: schedule)
        return kernel

    return simulate


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_kernel_equals_the_reference(case, programs, simulated):
    kernel = simulated(programs=programs, seed=programs)
    check(SPEC, hopper.block_attention, case, torch.bfloat16)
    assert kernel.launches == 1


@pytest.mark.parametrize("stages", [1, 3])
def test_other_depths_of_the_rings_are_right(stages, simulated):
    simulated(schedule=make_schedule(stages, hopper.GROUPS))
    check(SPEC, hopper.block_attention, TWO_ITEMS, torch.bfloat16)


def with_steps(schedule: Schedule, part: str, steps: list[Step]) -> Schedule:
    parts = tuple((name, tuple(steps) if name == part else kept) for name, kept in schedule.parts)
    return replace(schedule, parts=parts)


def wrong_schedules() -> dict[str, Schedule]:
    """Schedules with a step dropped, a phase flipped, a number of arrivals off, or a pair of steps in disorder."""
    right, wrong = make_schedule(2, hopper.GROUPS), {}
    for part, steps in right.parts:
        for at, step in enumerate(steps):
            name, before, after = f"{part}: {step.does} {step.on}".rstrip(), steps[:at], steps[at + 1 :]
            changes = {"dropped": ()}
            if step.does == "wait":
                changes["of the other phase"] = (replace(step, phase=1 - step.phase),)
            if step.does == "arrive":
                changes["twice"] = (step, step)
            if step.back:
                changes["of the current tile"] = (replace(step, back=0),)
            if step.left:
                changes["with one more in flight"] = (replace(step, left=step.left + 1),)
            for what, instead in changes.items():
                wrong[f"{name} {what}"] = with_steps(right, part, [*before, *instead, *after])
            if step.does == "arrive" and at and steps[at - 1].does == "ready":
                early = [*steps[: at - 1], step, steps[at - 1], *after]
                wrong[f"{name} before the product is complete"] = with_steps(right, part, early)
    for at, barrier in enumerate(right.barriers):
        for arrivals in (barrier.arrivals - 1, barrier.arrivals + 1):
            barriers = (*right.barriers[:at], replace(barrier, arrivals=arrivals), *right.barriers[at + 1 :])
            wrong[f"{barrier.name} with {arrivals} arrivals"] = replace(right, barriers=barriers)
    return wrong


def test_a_release_that_another_barrier_puts_in_order_is_no_race(simulated):
    """The producer waits for v_free, which comes after the product, before it fills the stage of keys again."""
    simulated(schedule=wrong_schedules()[HARMLESS])
    check(SPEC, hopper.block_attention, TWO_ITEMS, torch.bfloat16)


HARMLESS = "each: arrive k_free before the product is complete"
WRONG_SCHEDULES = [
    pytest.param(schedule, id=name, marks=() if name.startswith(("fill tile", "each")) else pytest.mark.slow)
    for name, schedule in wrong_schedules().items() if name != HARMLESS
]  # fmt: skip


@pytest.mark.parametrize("schedule", WRONG_SCHEDULES)
def test_a_wrong_schedule_is_found(schedule, simulated):
    """By a wait without end, an access out of order, a wrong value, or a value that no step has made."""
    simulated(schedule=schedule)
    with pytest.raises((Deadlock, Race, AssertionError, UnboundLocalError)):
        check(SPEC, hopper.block_attention, TWO_ITEMS, torch.bfloat16)


@pytest.mark.parametrize(("schedule", "error"), [
    ("each: arrive k_free dropped", Deadlock), ("fill tile: expect v_full dropped", Deadlock),
    ("each: wait k_full dropped", Race), ("fill tile: wait v_free dropped", Race),
    ("each: arrive v_free before the product is complete", Race), ("each: ready pv dropped", Race),
])  # fmt: skip
def test_a_wrong_schedule_is_found_for_what_is_wrong(schedule, error, simulated):
    simulated(schedule=wrong_schedules()[schedule], programs=2)
    with pytest.raises(error):
        check(SPEC, hopper.block_attention, TWO_ITEMS, torch.bfloat16)


GROUPED = Case("grouped heads, two rows", sizes(2, 20, 3, 136, 4, 2, 128), {"sinks": 2, "order": "runs"})
WRONG = {  # a piece of the source, and what replaces it
    "mask off by one": (">= seen", "> seen"),
    "no mask": (">= seen", ">= 0"),
    "beyond a run": ("gl.minimum(start, length - KEYS)", "start"),
    "a stale page": ("page = gl.load(table_ptr + first)", "page = gl.load(table_ptr)"),
    "pages in another order": ("page + last - first", "page + first - last"),
    "values of the keys' pages": ("k_row + pages * PAGE", "k_row"),
    "the wrong head": ("head // (HEADS // KV_HEADS) * DIM", "head % KV_HEADS * DIM"),
    "queries of another row": ("q_row = row * tokens + query", "q_row = query"),
    "the wrong queries": ("            if SINK:\n                q = q_buffer.index(gl.where(first < sinks",
                          "            if SINK:\n                q = q_buffer.index(gl.where(first > sinks"),
    "one group's queries for both": ("q = q_buffer.index(GROUP)", "q = q_buffer.index(0)"),
    "queries beyond the row": ("gl.expand_dims(offs_q < tokens, 1)", "gl.expand_dims(offs_q >= 0, 1)"),
    "no fence": ("    fence_async_shared()\n", ""),
    "stages that do not move on": ("                tile += 1\n            first += run\n        filled",
                                   "            first += run\n        filled"),
}  # fmt: skip


QUICK = ("mask off by one", "beyond a run", "values of the keys' pages", "no fence", "stages that do not move on")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WRONG]
)
def test_a_wrong_kernel_is_rejected(name, simulated, tmp_path):
    wrong = changed(hopper, *WRONG[name], tmp_path)
    simulated(wrong, seed=1)
    two_groups = Case("queries of two groups, no sink", sizes(1, 70, 2, 136, 1, 1, 128))
    case = two_groups if name == "one group's queries for both" else GROUPED
    with pytest.raises((AssertionError, IndexError)):
        check(SPEC, wrong.block_attention, case, torch.bfloat16)


def test_pages_in_another_order_give_the_same_attention(simulated):
    simulated()
    inputs = SPEC.make_inputs(TWO_ITEMS, torch.bfloat16, "cpu", 0) | {"q_sink": None, "sink_count": None}
    first = block_attention_with(inputs)
    turned = inputs | {"page_table": inputs["page_table"].flip(1)}
    assert (block_attention_with(turned) - first).abs().max() < 4e-3


def block_attention_with(inputs):
    out = torch.zeros_like(inputs["out"])
    hopper.block_attention(**inputs | {"out": out})
    return out.float()


NOT_TAKEN = {
    "page_tokens is 64": {"page_tokens": 64}, "has_kv_scale is 1": {"fp8": True},
}  # fmt: skip


@pytest.mark.parametrize("reason", NOT_TAKEN)
def test_a_call_that_breaks_a_rule_is_refused_by_the_form_and_taken_by_the_other(reason, monkeypatch):
    option = NOT_TAKEN[reason]
    case = Case("", sizes(1, 4, 2, option.get("page_tokens", 128), 1, 1, 128), {"fp8": option.get("fp8", False)})
    inputs = SPEC.make_inputs(case, torch.bfloat16, "cpu", 0)
    with pytest.raises(UsageError, match=f"hopper: {reason}"):
        hopper.block_attention(**inputs)
    assert taken_by(inputs, monkeypatch) == "triton"
    fitting = SPEC.make_inputs(TWO_ITEMS, torch.bfloat16, "cpu", 0)
    assert taken_by(fitting, monkeypatch) == "hopper"


def taken_by(inputs, monkeypatch) -> str:
    """The form that takes a call where `hopper` is asked for."""
    taken = []
    for form in ("triton", "hopper"):
        module = SPEC.form(form).module()
        monkeypatch.setattr(module, "block_attention", lambda *args, form=form: taken.append(form))
    with using(block_attention="hopper"):
        choose(SPEC, inputs["q"])(*(inputs[name] for name in SPEC.names))
    return taken[0]


def test_a_list_for_each_group_of_heads_is_refused():
    inputs = SPEC.make_inputs(TWO_ITEMS, torch.bfloat16, "cpu", 0) | {"q_sink": None, "sink_count": None}
    lists = {"page_table": inputs["page_table"][:, None].repeat(1, 2, 1),
             "page_count": inputs["page_count"][:, None].repeat(1, 2)}  # fmt: skip
    with pytest.raises(UsageError, match="head_groups is 2"):
        hopper.block_attention(**inputs | lists)


def test_a_form_that_no_card_has_run_is_never_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    inputs = SPEC.make_inputs(TWO_ITEMS, torch.bfloat16, "cpu", 0)
    first = replace(SPEC, implementations=(FORM, *(form for form in SPEC.implementations if form is not FORM)))
    assert first.chosen(torch.device("cuda"), torch.bfloat16, 128) == "triton"
    assert FORM not in SPEC.serving(90, inputs)
    assert SPEC.serving(90, inputs, [FORM]) == [FORM]
    assert SPEC.serving(100, inputs, [FORM]) == []


def test_the_check_of_the_form_compares_all_cases_it_takes_and_times_those_of_real_sizes(simulated, monkeypatch):
    """As on a card, over small cases."""
    monkeypatch.setattr(form_check, "architecture", lambda device: 90)
    short = Case("short pages", sizes(1, 4, 2, 64, 1, 1, 128))
    spec = replace(SPEC, test_cases=(short, TWO_ITEMS), bench_cases=(TWO_ITEMS, short))
    simulated()
    facts = form_check.check_here(spec, FORM, "cpu")
    assert facts["checked"] == 1  # the case in bfloat16 with pages of a tile
    assert facts["wrong"] == {}
    assert list(facts["ms"]) == [TWO_ITEMS.name]
    simulated(schedule=wrong_schedules()["each: rescale dropped"])
    facts = form_check.check_here(spec, FORM, "cpu")
    assert "is off by" in facts["wrong"][f"hopper, {TWO_ITEMS.name}, bfloat16"]
    assert facts["ms"] == {}
