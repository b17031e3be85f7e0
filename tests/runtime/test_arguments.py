"""Public calls with arguments of wrong types: UsageError with the name and the value, and nothing is made."""

import math

import numpy as np
import pytest
import torch
from oracles import ROWS, SIZE, make_engine

from inferix import DegradationStep, InjectedNoise, Limits, Session, load
from inferix.errors import UsageError
from inferix.runtime import arguments

NAN, BIG = float("nan"), 10**400
NOT_TEXT = (5, NAN, b"x", np.zeros(3), ["x"], torch.zeros(2))
NOT_PATHS = (5, NAN, b"x", np.zeros(3), ["x"], (32,), "", "a\0b", True)
NOT_INTEGERS = (NAN, math.inf, 1.5, "1", b"1", np.zeros(3), [1], True, np.float64(2))
NOT_NUMBERS = ("1", b"1", np.zeros(3), [1], True, NAN, math.inf, -math.inf, BIG, 1j)
NOT_FLAGS = (1, 0, "yes", None, NAN)
NOT_FUNCTIONS = (None, 5, "x")

OPEN = {
    "prompt": NOT_TEXT, "negative_prompt": NOT_TEXT, "prompt_embeds": NOT_PATHS, "negative_embeds": NOT_PATHS,
    "seed": (*NOT_INTEGERS, None, -1, 1 << 64), "noise": (5, "x", InjectedNoise),
    "size": (5, NAN, "x", b"xx", np.zeros(3), ["x"], (32,), (32, NAN), (32.0, 32), (True, 32), (2**20, 2**20), (0, 32),
             (32, BIG), {"w": 32, "h": 32}),
    "actions": (None, 5, NAN, "8R", b"x", np.zeros(3), {"stay": 1}, [5]),
    "strength": (*NOT_NUMBERS, 0, -0.5, 1.5), "fit": (None, 5, "crops"), "live": NOT_FLAGS,
    "image": (5, NAN, b"x", np.zeros(3), ["x"], (32,), "", np.zeros((32, 32, 3))),
    "video": (5, NAN, b"x", np.zeros(3), ["x"], (32,), "", np.zeros((9, 32, 32, 4), np.uint8)),
}  # fmt: skip
SESSION = {
    "path": (lambda session, value: session.save(value), NOT_PATHS),
    "text": (lambda session, value: session.prompt(value), NOT_TEXT),
    "embeds": (lambda session, value: session.prompt(embeds=value), NOT_PATHS),
    "action": (lambda session, value: session.act(value), (*NOT_TEXT, None)),
    "block": (lambda session, value: session.rewind(value), (*NOT_INTEGERS, None)),
    "blocks": (lambda session, value: session.stream(value), (*NOT_INTEGERS, 0, -1)),
    "decode": (lambda session, value: session.stream(1, value), NOT_FLAGS),
}
ENGINE = {
    "lora": (lambda engine, value: engine.use_lora(value), NOT_PATHS),
    "scale": (lambda engine, value: engine.use_lora("x", value), NOT_NUMBERS),
    "partial": (lambda engine, value: engine.use_lora("x", 1.0, value), NOT_FLAGS),
    "weights": (lambda engine, value: engine.use_lora("x", weights=value), ("memory", 1, b"plain")),
    "keep": (lambda engine, value: engine.run(value), NOT_FLAGS),
    "call": (lambda engine, value: engine.soon(value), NOT_FUNCTIONS),
    "observer": (lambda engine, value: engine.observe(value), NOT_FUNCTIONS),
    "seconds": (lambda engine, value: engine.blocks_for(value), (*NOT_NUMBERS, 0, -1)),
    "latent_frames": (lambda engine, value: engine.blocks_for_frames(value), NOT_INTEGERS),
    "times": (lambda engine, value: engine.follow_times(SIZE, value), (None, {1: 0.5})),
    "path": (lambda engine, value: Session.restore(engine, value), NOT_PATHS),
    "engine": (lambda engine, value: Session.restore(value, "x"), (None, "x")),
}
LIMITS = {
    "schedule": (None, 5, "robin"), "when_full": (None, "wait"), "realtime": NOT_FLAGS,
    "overload": (None, 5, "x", ["window"], DegradationStep("decoder")),
    "consumer_timeout": (*NOT_NUMBERS, 0, -1.0),
    **dict.fromkeys(("late_blocks", "queue_blocks"), (*NOT_INTEGERS, None, 0)),
    **dict.fromkeys(("sessions", "memory_bytes", "batch"), (*NOT_INTEGERS, "1 GB", 0, -1)),
}  # fmt: skip
LOAD = {
    "limits": (None, 5, {"sessions": 1}), "model": (*NOT_PATHS[:5], "a\0b"), "preset": NOT_TEXT, "device": NOT_TEXT,
    "rewind_blocks": NOT_INTEGERS[:8], "guidance_scale": NOT_NUMBERS, "denoising_step_list": ([NAN], 5, "x", [BIG]),
    "lora_scale": NOT_NUMBERS, "use_ema": (1, "yes"), "kv_memory": (NAN, [1], "9" * 400, "1e9", -1, True, 0),
}  # fmt: skip
NOISE = {
    "initial": (None, 5, "x", torch.zeros(3), torch.zeros(3, 16, 4, 4).int()),
    "renoise": (5, torch.zeros(3, 16, 4, 4)), "first": (*NOT_INTEGERS, -1),
}  # fmt: skip


def refused(name, value, call):
    with pytest.raises(UsageError) as caught:
        call()
    message = str(caught.value)
    assert name in message or name == "kv_memory", (name, value)
    assert len(message) < 600, len(message)


@pytest.fixture(scope="module")
def engine():
    return make_engine("self-forcing", "float32", local_attn_size=6, denoising_step_list=[1000])


@pytest.mark.parametrize("name", OPEN)
def test_open(name, engine):
    for value in OPEN[name]:
        given = {"prompt_embeds": ROWS, "size": SIZE, "video": np.zeros((9, 32, 32, 3), np.uint8)}
        if name != "strength":
            del given["video"]
        if name == "prompt":
            del given["prompt_embeds"]
        refused(name, value, lambda: engine.open(**given | {name: value}))  # noqa: B023
    assert not engine.manager.sessions and not engine.manager.pages_in_use
    assert not any(store.users for store in engine.kv_manager.stores.values())


def test_calls_of_sessions_and_engines(engine):
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        for table, target in ((SESSION, session), (ENGINE, engine)):
            for name, (call, values) in table.items():
                for value in values:
                    refused(name, value, lambda: call(target, value))  # noqa: B023
        assert not session.controls.waiting
        assert len(list(session.stream(np.int64(1), np.bool_(False)))) == 1
    engine.check_integrity()


def test_limits_noise_and_load():
    for name, values in LIMITS.items():
        for value in values:
            refused(name, value, lambda: Limits(**{name: value}))  # noqa: B023
    for value in (*NOT_INTEGERS, None, 0):
        refused("value", value, lambda: DegradationStep("window", value))  # noqa: B023
    refused("kind", 5, lambda: DegradationStep(5))
    for name, values in NOISE.items():
        for value in values:
            refused(name, value, lambda: InjectedNoise(**{"initial": torch.zeros(3, 16, 4, 4), name: value}))  # noqa: B023
    for name, values in LOAD.items():
        for value in values:
            given = {"model": "wan-tiny", "preset": "causal-diffusion", "device": "cpu", name: value}
            refused(name, value, lambda: load(**given))  # noqa: B023


def test_numbers_of_numpy_are_accepted(engine):
    overload = [DegradationStep("window", np.int8(3))]
    limits = Limits(sessions=np.int32(2), consumer_timeout=np.float32(2), overload=overload)
    assert type(limits.sessions) is int and type(limits.overload[0].value) is int and limits.consumer_timeout == 2.0
    with engine.open(prompt_embeds=ROWS, size=np.array(SIZE), seed=np.uint64(2**63)) as session:
        assert session.size == SIZE and session.current.noise.seed == 2**63
        session.rewind(np.int64(0))
    assert arguments.size("size", [np.int64(32), 48]) == (32, 48)


def test_a_long_value_is_cut():
    with pytest.raises(UsageError) as caught:
        Limits(sessions="9" * 10**6)
    assert "sessions" in str(caught.value) and len(str(caught.value)) < 400
