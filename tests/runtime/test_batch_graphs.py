"""Batches in graphs: sessions of one launch equal each alone, whatever joins, leaves, rewinds or fails beside them."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence

import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine, remade
from recording import FakeGraphs

from inferix.errors import InferixError
from inferix.models.wan.vae_spec import TINY_VAE
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.execution.prompts import PromptSlots
from inferix.runtime.executor_specs import EXECUTORS
from inferix.runtime.sessions.batch_profile import BatchProfile
from inferix.runtime.sessions.lifecycle import State
from inferix.runtime.sessions.output_queue import Block
from inferix.runtime.sessions.session import Demand, Session

PROMPTS = [ROWS, ROWS.flip(0) * 1.5, ROWS * 0.5, ROWS.roll(1, 0)]
SPEC = dataclasses.replace(TINY, num_layers=1, actions=("stay", "left"))
VAE = dataclasses.replace(TINY_VAE, base_channels=4, decoder_channels=4)
FASTER = BatchProfile({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5, 8: 4.0})
TOLERANCE = 1e-9  # of the largest latent, in float64: matmuls of more rows add in another order
TWO_STEPS = {"local_attn_size": 6, "denoising_step_list": [1000, 500]}
GUIDED = {"local_attn_size": 6, "num_steps": 2}
SCHEMES = {
    "self-forcing": TWO_STEPS,
    "longlive": TWO_STEPS | {"local_attn_size": 9},
    "causal-diffusion": GUIDED,
    "rolling-forcing": {"num_frame_per_block": 1, "local_attn_size": 7, "sink_size": 1},
    "self-forcing-framewise": {"local_attn_size": 3},
    "causal-forcing": {"local_attn_size": 6, "independent_first_frame": True},
    "causvid": {"segment_frames": 9},
    "longlive-infinity": {"local_attn_size": 9},
    "krea": {},
    "longlive2": {"num_frame_per_block": 2, "local_attn_size": 6, "sink_size": 2},
    "tinyworld": {"local_attn_size": 4},
}
Event = tuple[str, int]  # what happens to a session, by number


def engine_of(preset: str, batches: bool = True, **settings: object) -> Engine:
    """Its pages do not move: there is room for all sessions."""
    common = {"executor": "fused", "spec": SPEC, "vae_spec": VAE, "rewind_blocks": 1, "kv_memory": 1 << 24}
    engine = make_engine(preset, **common | settings)
    if batches:
        engine.follow_times(SIZE, FASTER)
    return engine


def opened(engine: Engine, number: int) -> Session:
    prompt, other = (PROMPTS[(number + by) % 4].to(engine.dtype) for by in (0, 1))
    guided = {} if engine.preset.sampler.guidance_scale == 1 else {"negative_embeds": other}
    return engine.open(prompt_embeds=prompt, seed=number, size=SIZE, **guided)


def made(engine: Engine, sessions: Sequence[Session]) -> list[Block]:
    """The next block of each session."""
    for session in sessions:
        engine.manager.delivery.submit_demand(session, Demand(1, decode=False))
    while engine.step():
        pass
    return [session.output.take() for session in sessions]


def played(engine: Engine, script: Sequence[Event]) -> dict[int, list[Block]]:
    """Blocks of each session of a script. `block` makes one of every open session; others act on one."""
    sessions: dict[int, Session] = {}
    blocks: dict[int, list[Block]] = defaultdict(list)
    for kind, number in script:
        if kind == "open":
            sessions[number] = opened(engine, number)
        elif kind == "block":
            for each, block in zip(sessions, made(engine, list(sessions.values())), strict=True):
                blocks[each].append(block)
        elif kind == "prompt":
            sessions[number].prompt(embeds=PROMPTS[(number + 2) % 4].to(engine.dtype))
        elif kind == "act":
            sessions[number].act(engine.spec.actions[number % len(engine.spec.actions)])
        elif kind == "rewind":
            sessions[number].rewind(sessions[number].next_block - 1)
        else:
            sessions.pop(number).close()
    engine.check_integrity()
    for session in sessions.values():
        session.close()
    assert engine.manager.pages_in_use == 0
    return blocks


def compare(actual: dict[int, list[Block]], expected: dict[int, list[Block]], tolerance: float = TOLERANCE) -> None:
    assert actual.keys() == expected.keys()
    for number, blocks in expected.items():
        assert [block.index for block in actual[number]] == [block.index for block in blocks]
        for one, other in zip(actual[number], blocks, strict=True):
            assert other.record.batch == 1
            error = (one.latents - other.latents).abs().max() / other.latents.abs().max()
            assert error <= tolerance, (number, one.index)


STEPS = [
    ("open", 0), ("block", 0), ("open", 1), ("block", 0), ("open", 2), ("block", 0), ("open", 3), ("block", 0),
    ("rewind", 1), ("prompt", 2), ("act", 3), ("block", 0), ("leave", 0), ("block", 0), ("block", 0),
]  # fmt: skip


@pytest.mark.parametrize(
    "preset", ["self-forcing", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SCHEMES)[1:])]
)
def test_one_to_four_sessions_of_a_launch_equal_each_alone(preset: str) -> None:
    """Windows not yet full, other prompts and positions; one is rewound, one has a new prompt, one leaves."""
    engine, lone = (engine_of(preset, batches, **SCHEMES[preset]) for batches in (True, False))
    expected = played(lone, STEPS)
    actual = played(engine, STEPS)
    compare(actual, expected)
    assert torch.equal(actual[0][0].latents, expected[0][0].latents)  # of one row, bit for bit
    sizes = {block.record.batch for block in actual[0]}  # first blocks of some schemes match no later ones
    assert {1, 4} < sizes and sizes <= {key.sessions for key in engine.executor.loaded}
    of_four = [key.whole for key in engine.executor.loaded if key.sessions == 4]
    assert any(of_four) == engine.executor.supports_whole_block


FEW_BITS = 2e-2  # a value that is rounded the other way is seen again
FEATURES = {
    "no actions": ({"spec": dataclasses.replace(SPEC, actions=())}, TOLERANCE),
    "float32": ({"dtype": "float32"}, 1e-4),
    "fp8 pages": ({"dtype": "float32", "kv_dtype": "fp8"}, FEW_BITS),
    "int8 pages": ({"dtype": "float32", "kv_dtype": "int8"}, FEW_BITS),
    "fp8 layers": ({"dtype": "float32", "lowp": "fp8"}, 0.2),
    "int8 layers": ({"dtype": "float32", "lowp": "int8"}, 0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_features_of_graphs_in_batches(feature: str) -> None:
    settings, tolerance = FEATURES[feature]
    steps = [event for event in STEPS if event[0] != "act" or feature != "no actions"]
    engine, lone = (engine_of("self-forcing", batches, **TWO_STEPS, **settings) for batches in (True, False))
    compare(played(engine, steps), played(lone, steps), tolerance)
    assert {key.sessions for key in engine.executor.loaded} >= {3, 4}


def random_script(seed: int, blocks: int) -> list[Event]:
    """Sessions that come, go, rewind and change prompts at random, for so many blocks of all together."""
    draw, script, fresh, number, count = random.Random(seed), list[Event](), dict[int, int](), 0, 0
    while count < blocks:
        kind = draw.choice(["open", "leave", "prompt", "rewind", "act", *["block"] * 5])
        if kind == "open" and len(fresh) < 4:
            fresh[number] = 0
            script.append((kind, number))
            number += 1
        elif kind == "block" and fresh:
            count += len(fresh)
            fresh = {each: since + 1 for each, since in fresh.items()}
            script.append((kind, 0))
        elif fresh and kind not in ("open", "block"):
            chosen = draw.choice(sorted(fresh))
            if kind == "rewind" and fresh[chosen] < 2:
                continue
            script.append((kind, chosen))
            if kind == "rewind":
                fresh[chosen] = 0
            elif kind == "leave":
                del fresh[chosen]
    return script


@pytest.mark.parametrize("blocks", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_random_controls(blocks: int) -> None:
    script = random_script(blocks, blocks)
    compare(*(played(engine_of("self-forcing", batches, **TWO_STEPS), script) for batches in (True, False)))


def test_a_row_that_is_not_finite_is_taken_out_and_the_others_keep_their_bits() -> None:
    """In that launch; then they go on without it, and a session that takes its pages is as if alone."""
    blocks = {}
    for harmed in (False, True):
        engine = engine_of("self-forcing", **TWO_STEPS)
        sessions = [opened(engine, number) for number in range(3)]
        first = made(engine, sessions)
        if harmed:
            state = sessions[1].current
            state.branches[0].text = engine.resources.client.condition(torch.full_like(state.rows, torch.nan))
            for session in sessions:
                engine.manager.delivery.submit_demand(session, Demand(1, decode=False))
            while engine.step():
                pass
            assert sessions[1].state is State.FAILED
            with pytest.raises(InferixError, match="block 1 is not finite"):
                sessions[1].stream(1)
            sessions[1] = opened(engine, 5)
            second = [sessions[0].output.take(), None, sessions[2].output.take()]
        else:
            second = made(engine, sessions)
        third = made(engine, sessions)
        assert {block.record.batch for row in (first, second, third) for block in row if block} >= {3}
        engine.check_integrity()
        blocks[harmed] = first, second, third
    for row in range(2):
        for column in (0, 2):
            assert torch.equal(blocks[True][row][column].latents, blocks[False][row][column].latents)
    lone = engine_of("self-forcing", False, **TWO_STEPS)
    for column, number, count in ((0, 0, 3), (2, 2, 3), (1, 5, 1)):
        with opened(lone, number) as session:
            *_, expected = session.stream(count, decode=False)
            actual = blocks[True][2][column].latents
            assert (actual - expected.latents).abs().max() <= TOLERANCE * expected.latents.abs().max()


def captured_engine(monkeypatch: pytest.MonkeyPatch, backend: FakeGraphs, **settings: object) -> Engine:
    """An engine whose executor captures on a fake, for the numbers of sessions that `captured` has graphs for."""
    sizes = EXECUTORS["captured"].batch_sizes
    monkeypatch.setitem(EXECUTORS, "fused", dataclasses.replace(EXECUTORS["fused"], batch_sizes=sizes))
    fused = engine_of("self-forcing", False, **settings)
    engine = remade(fused, GraphExecutor(fused.config, fused.preset, fused.parts, backend))
    engine.follow_times(SIZE, FASTER)
    return engine


def test_sessions_join_leave_and_change_prompts_without_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for each of 1, 2 and 4 sessions; three run as two and one. They equal sessions in turns."""
    backend = FakeGraphs()
    engine = captured_engine(monkeypatch, backend, **TWO_STEPS)
    lone = engine_of("self-forcing", False, **TWO_STEPS)
    compare(played(engine, STEPS), played(lone, STEPS))
    assert {key.sessions for key in engine.executor.loaded} == {1, 2, 4} and backend.captures == 3
    assert engine.executor.traces == 3
    script = random_script(3, 20)
    compare(played(engine, script), played(lone, script))
    assert (backend.captures, engine.executor.traces) == (3, 3)


def test_prompts_stay_in_their_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that change places in a batch, leave it and come back are found by table; a new prompt is one copy."""
    engine = engine_of("self-forcing", **TWO_STEPS)
    sessions, copied = [opened(engine, number) for number in range(2)], []
    copy = PromptSlots.copy

    def counted(slots: PromptSlots, prompt: dict[str, torch.Tensor]) -> int:
        copied.append(prompt)
        return copy(slots, prompt)

    monkeypatch.setattr(PromptSlots, "copy", counted)
    made(engine, sessions)
    assert len(copied) == 2
    made(engine, sessions[::-1])
    made(engine, sessions[:1])
    made(engine, sessions)
    assert len(copied) == 2
    sessions[1].prompt(embeds=PROMPTS[3])
    made(engine, sessions)
    assert len(copied) == 3 and engine.executor.prompts == 3
