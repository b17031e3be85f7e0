"""Many streams on one engine: each as if alone, forked, rewound, steered from other threads, and ended alone."""

import asyncio
import gc
import json
import os
import random
import re
import signal
import threading
import traceback
from concurrent.futures import Future, as_completed
from concurrent.futures import wait as wait_for_all
from dataclasses import replace
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine, remade

from inferix import load
from inferix.errors import InferixError, SessionEnded, UsageError
from inferix.runtime.kv.pages import OutOfPages
from inferix.runtime.limits import DegradationStep, Limits
from inferix.runtime.noise import InjectedNoise
from inferix.runtime.sessions import control_queue, delivery, session_manager
from inferix.runtime.sessions.lifecycle import State
from inferix.runtime.sessions.session import Demand, Session
from inferix.runtime.telemetry.records import RecordFile
from inferix.schemes.page_needs import least_pages

PROMPT, OTHER = ROWS.float(), ROWS.flip(0).float() * 1.5
NEGATIVE = {"causal-diffusion": {"negative_embeds": OTHER}}
WAIT = 60  # seconds after which a thread that should have gone on is taken to hang


@pytest.fixture(autouse=True)
def one_thread():
    """torch computes with one thread, so that blocks are decoded beside the next ones, as on a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_engine(preset="self-forcing", **overrides):
    settings = {"local_attn_size": 6, "denoising_step_list": [1000]} | overrides
    return make_engine(preset, "float32", **settings)


def opened(engine, seed=0, **extra):
    return engine.open(prompt_embeds=PROMPT, size=SIZE, seed=seed, **extra)


def alone(blocks, decode=False, seed=0, **overrides):
    """The blocks of a session that has an engine of its own."""
    with opened(small_engine(**overrides), seed) as session:
        return list(session.stream(blocks, decode))


def same(actual, expected):
    """Whether blocks are equal bit for bit, pictures too where there are some."""
    pairs = list(zip(actual, expected, strict=True))
    assert [a.index for a, _ in pairs] == [b.index for _, b in pairs]
    pictures = all(a.frames is None or (a.frames == b.frames).all() for a, b in pairs)
    return pictures and all(torch.equal(a.latents, b.latents) for a, b in pairs)


def in_thread(call, name="reader"):
    """Call something in a thread of its own; returns what waits for its end and gives its result, or its error."""
    results = []

    def run():
        try:
            results.append(call())
        except InferixError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True, name=name)
    thread.start()

    def wait():
        thread.join(WAIT)
        assert not thread.is_alive()
        return results[0]

    return wait


SCHEMES = {  # presets in a form in which windows roll, contexts restart and prompts switch within a few blocks
    "self-forcing": {"denoising_step_list": [1000, 500]},
    "longlive": {"sink_size": 3},
    "longlive-infinity": {"sink_size": 3, "sink_decay": 0.9, "kv_dtype": "int8"},
    "krea": {"local_attn_size": -1, "blend_blocks": 3},
    "causvid": {"local_attn_size": -1, "segment_frames": 6},
    "longlive2": {"local_attn_size": 8, "sink_size": 2, "num_frame_per_block": 2, "num_steps": 3},
    "rolling-forcing": {"local_attn_size": 9, "window_blocks": 2, "denoising_step_list": [1000, 500]},
    "causal-diffusion": {"num_steps": 2},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_fork_rewind_and_restore_equal_a_stream_never_interrupted(name, tmp_path):
    """Each goes on bit for bit, through a prompt that was told before; then one goes another way."""
    steps = {} if SCHEMES[name].keys() & {"num_steps"} else {"denoising_step_list": [1000]}
    settings = {"rewind_blocks": 2, "denoising_step_list": []} | steps | SCHEMES[name]
    engine = small_engine(name, **settings)
    decode = name in ("self-forcing", "causvid")

    def begun():
        session = opened(engine, **NEGATIVE.get(name, {}))
        blocks = list(session.stream(2, decode))
        session.prompt(embeds=OTHER)
        return session, blocks + list(session.stream(2, decode))

    whole, expected = begun()
    expected += whole.stream(2, decode)
    whole.close()
    session, blocks = begun()
    twin = session.fork()
    session.save(tmp_path / "world.safetensors")
    engine.check_integrity()
    assert same(blocks + list(session.stream(2, decode)), expected)
    assert same(list(twin.stream(2, decode)), expected[4:])
    engine.check_integrity()
    session.rewind(4)
    assert same(list(session.stream(2, decode)), expected[4:])
    twin.rewind(4)
    twin.prompt(embeds=PROMPT)
    *_, other = twin.stream(2, decode)  # a blend may begin with the old prompt alone
    assert not torch.equal(other.latents, expected[5].latents)
    restored = Session.restore(engine, tmp_path / "world.safetensors")
    assert same(list(restored.stream(2, decode)), expected[4:])
    engine.check_integrity()
    for each in (session, twin, restored):
        each.close()
        engine.check_integrity()
    assert engine.metrics()["gauges"]["pages_in_use"] == 0


def test_a_fork_shares_pages_and_decoder_state_until_it_goes_on():
    """Two prompts after one past: pages of the past count once and hold the same, and each goes on as if alone."""
    engine = small_engine(local_attn_size=12)
    session = opened(engine)
    blocks = list(session.stream(2))
    cache, used = session.current.branches[0].cache, engine.manager.pages_in_use
    twin = session.fork()
    assert engine.manager.pages_in_use == used == 6
    decoders = [each.current.decoder.state.history.values() for each in (session, twin)]
    assert all(a is b for a, b in zip(*decoders, strict=True))
    session.prompt(embeds=OTHER)
    twin.prompt(embeds=PROMPT * 0.5)
    two = list(zip(session.stream(2), twin.stream(2), strict=True))
    assert engine.manager.pages_in_use == 6 + 2 * 6
    past = [[s.current.branches[0].cache.table.pages[frame] for frame in range(6)] for s in (session, twin)]
    assert past[0] == past[1]
    assert not torch.equal(two[0][0].latents, two[0][1].latents)
    assert torch.equal(cache.export_pages().kv[:, :, :6], twin.current.branches[0].cache.export_pages().kv[:, :, :6])
    for prompt, actual in ((OTHER, [a for a, _ in two]), (PROMPT * 0.5, [b for _, b in two])):
        with opened(small_engine(local_attn_size=12)) as other:
            assert same(list(other.stream(2)), blocks)
            other.prompt(embeds=prompt)
            assert same(list(other.stream(2)), actual)
    session.close()
    engine.check_integrity()
    assert engine.manager.pages_in_use == 12
    twin.close()
    assert engine.manager.pages_in_use == 0


def test_rewinding_far_decodes_from_a_kept_state_on_again():
    """Eight blocks back, over snapshots taken every eight, with blocks made ahead dropped; memory is bounded."""
    engine = small_engine(rewind_blocks=8, num_frame_per_block=1, local_attn_size=3)
    expected = alone(20, decode=True, num_frame_per_block=1, local_attn_size=3)
    with opened(engine) as session:
        stream = session.stream(20)
        actual = [next(stream) for _ in range(12)]
        session.rewind(5)
        actual[5:] = list(stream)  # what was dropped is made again, and the stream is as long as asked for
        assert len(actual) == 13 and same(actual, expected[:13])
        assert same(list(session.stream(7)), expected[13:])
        decoder = session.current.decoder
        assert len(session.rewind_points) == 8 and len(decoder.checkpoints) <= 2 and len(decoder.decoded) <= 16
        for block in (19, 15, 12):
            session.rewind(block)
            assert session.next_block == block
            engine.check_integrity()
        assert same(list(session.stream(1)), expected[12:13])


def test_interleaved_sessions_equal_each_alone():
    engine = small_engine()
    sessions = [opened(engine, seed) for seed in range(3)]
    blocks = list(zip(*(session.stream(3, decode=False) for session in sessions), strict=True))
    for seed, session in enumerate(sessions):
        assert same([row[seed] for row in blocks], alone(3, seed=seed))
        session.close()


# Threads


def test_decoding_goes_on_beside_the_next_block(monkeypatch):
    """A decoder that is slow enough for the next block to begin meanwhile; the records show both at a time.

    Either waits for the other: block b is not denoised before the decoder is at b - 1, which goes on once b is.
    """
    engine = small_engine()
    expected = alone(4, decode=True)
    denoised, decoding = ([threading.Event() for _ in range(4)] for _ in range(2))
    velocity, decode, threads = engine.loop.network_pass, engine.parts.vae.decode, []

    def denoise(state, run, latents, record, *more):
        block = record.block
        denoised[block].set()
        assert block == 0 or decoding[block - 1].wait(WAIT)
        return velocity(state, run, latents, record, *more)

    def slow(latents, state):
        block = len(threads)
        threads.append(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        decoding[block].set()
        assert block == 3 or denoised[block + 1].wait(WAIT)
        return decode(latents, state)

    monkeypatch.setattr(engine.loop, "network_pass", denoise)
    monkeypatch.setattr(engine.parts.vae, "decode", slow)
    records = []
    engine.observe(records.append)
    with opened(engine) as session:
        blocks = list(session.stream(4))
    assert same(blocks, expected)
    assert all(name.startswith("inferix-decode") for name in threads)
    for before, after in pairwise(record["spans"] for record in records):
        assert before["decode"][0] < after["denoise"][1] and after["denoise"][0] < before["decode"][1]


def test_blocks_that_are_finished_after_a_look_are_not_waited_for(monkeypatch):
    """The decoder ends all blocks just after their reader has found none, and before it looks for others to make."""
    engine, waits = small_engine(), []
    condition = engine.manager.condition
    with opened(engine) as session:
        take, wait_after = session.output.take, condition.wait_after

        def late():
            block = take()
            if block is None:
                engine.manager.delivery.pipeline.wait(session.id)
            return block

        def watched(seen, timeout=None):
            waits.append(len(session.output.ready))
            assert condition.changes != seen or not session.output.ready, "it would wait for ever"
            return wait_after(seen, timeout)

        monkeypatch.setattr(session.output, "take", late)
        monkeypatch.setattr(condition, "wait_after", watched)
        blocks = list(session.stream(5))
    assert same(blocks, alone(5, decode=True)) and waits and max(waits) > 0


def test_a_halt_just_before_a_step_ends_the_loop(monkeypatch):
    engine = small_engine()
    prepare, wait_after, waits = engine.manager.prepare_step, engine.manager.condition.wait_after, []

    def late():
        engine.halt()
        return prepare()

    def watched(seen, timeout=None):
        waits.append(seen)
        assert engine.manager.condition.changes != seen, "it would wait for ever"
        return wait_after(seen, timeout)

    monkeypatch.setattr(engine.manager, "prepare_step", late)
    monkeypatch.setattr(engine.manager.condition, "wait_after", watched)
    engine.run(keep=True)
    assert len(waits) == 1


def test_torch_with_several_threads_decodes_between_blocks(monkeypatch):
    engine, threads, expected = small_engine(), [], alone(4, decode=True)
    decode = engine.parts.vae.decode

    def watched(latents, state):
        threads.append(threading.current_thread())
        return decode(latents, state)

    monkeypatch.setattr(engine.parts.vae, "decode", watched)
    with opened(engine) as session:
        blocks = list(session.stream(2))
        torch.set_num_threads(2)
        blocks += session.stream(2)
    assert same(blocks[:2], expected[:2])
    for block, other in zip(blocks[2:], expected[2:], strict=True):  # sums of two threads differ in their last bits
        assert (np.abs(block.frames.astype(int) - other.frames) <= 1).all()
    assert [thread is threading.main_thread() for thread in threads] == [False, False, True, True]
    for before, after in pairwise(blocks[2:]):
        assert before.record.spans["decode"][1] <= after.record.spans["prepare"][0]


def test_a_context_that_waits_for_pictures_does_not_decode_beside():
    with opened(small_engine("krea", local_attn_size=-1)) as session:
        blocks = list(session.stream(3))
    for before, after in pairwise(blocks):
        assert before.record.spans["decode"][1] <= after.record.spans["prepare"][0]


def test_blocks_are_awaited_on_one_loop_and_each_reader_wakes_for_its_own():
    engine = small_engine()
    sessions = [opened(engine, seed) for seed in range(4)]
    wakes = dict.fromkeys(range(4), 0)

    async def read(index):
        queue = sessions[index].output

        def count():
            wakes[index] += 1

        with queue.waking(count):
            return [block async for block in sessions[index].astream(2 if index < 3 else 1, decode=index != 1)]

    async def serve():
        actual = await asyncio.gather(*map(read, range(4)))
        sessions[2].stop()
        sessions[0].current.noise = None
        with pytest.raises(AttributeError):
            await anext(sessions[0].astream())
        with pytest.raises(SessionEnded):
            await asyncio.wrap_future(engine.soon(sessions[0].fork))
        async with asyncio.timeout(WAIT):
            rest = [block async for block in sessions[1].astream(3)]
        return actual, rest

    def loop():
        try:
            return asyncio.run(serve())
        finally:
            engine.halt()

    async def alone_in_its_thread():
        async for _ in sessions[1].astream(1):
            pass

    with pytest.raises(UsageError):
        asyncio.run(alone_in_its_thread())
    for seed in range(4):
        sessions[seed].close()
    sessions = [opened(engine, seed) for seed in range(4)]
    engine.hand_over()
    drive = in_thread(lambda: engine.run(keep=True))
    engine.soon(lambda: 1).result(WAIT)
    actual, rest = loop()
    drive()
    for seed, blocks in enumerate(actual):
        assert same(blocks, alone(len(blocks), decode=seed != 1, seed=seed))
    assert [block.index for block in rest] == [2, 3, 4]
    assert 1 <= wakes[3] < wakes[0] <= 6  # its demand and its blocks, not those of others


def test_a_blocked_reader_stops_its_own_session_only():
    engine = small_engine()
    slow, quick = opened(engine, 1), opened(engine, 2)
    taken, go_on = threading.Event(), threading.Event()

    def read_slowly():
        blocks = []
        for block in slow.stream(6):
            blocks.append(block)
            taken.set()
            assert go_on.wait(WAIT)
        slow.stop()
        return blocks

    def read_quickly():
        assert taken.wait(WAIT)
        blocks = list(quick.stream(8))
        with engine.manager.condition:
            queued = len(slow.output), slow.next_block
        go_on.set()
        quick.stop()
        return blocks, queued

    waits = [in_thread(read) for read in (read_slowly, read_quickly)]
    engine.run()
    blocks, (queued, begun) = waits[1]()
    assert queued <= 2 and begun <= 3  # one was taken, two wait
    assert same(blocks, alone(8, decode=True, seed=2))
    assert same(waits[0](), alone(6, decode=True, seed=1))
    assert slow.state is quick.state is State.CLOSED and not engine.manager.sessions


def test_controls_of_other_threads_count_from_the_next_block_and_are_acknowledged():
    """Told while block 1 is being made: the prompt shows in block 2, and so says its id."""
    engine = small_engine("self-forcing-framewise", spec=replace(TINY, actions=("stay", "left")))
    velocity, controls = engine.loop.network_pass, []

    def interrupted(state, run, latents, record, *more):
        if record.block == 1 and not controls:
            controls.extend(in_thread(lambda: (session.prompt(embeds=OTHER), session.act("left")))())
        return velocity(state, run, latents, record, *more)

    engine.loop.network_pass = interrupted
    with opened(engine) as session:
        blocks = list(session.stream(4, decode=False))
    acks = [[(ack.id, ack.kind) for ack in block.acks] for block in blocks]
    assert acks == [[], [], [(controls[0], "prompt"), (controls[1], "act")], []]
    assert all(ack.block == 2 and ack.seconds > 0 and ack.refused is None for ack in blocks[2].acks)
    with opened(small_engine("self-forcing-framewise", spec=replace(TINY, actions=("stay", "left")))) as session:
        expected = list(session.stream(2, decode=False))
        session.prompt(embeds=OTHER)
        session.act("left")
        assert same(blocks, expected + list(session.stream(2, decode=False)))


def test_with_several_blocks_in_flight_an_action_shows_in_the_one_that_joins_next():
    spec = replace(TINY, actions=("stay", "left"))
    engine = small_engine("rolling-forcing", spec=spec, **SCHEMES["rolling-forcing"])
    with opened(engine) as session:
        list(session.stream(2, decode=False))
        session.act("left")
        session.prompt(embeds=OTHER)
        blocks = list(session.stream(3, decode=False))
    assert [[ack.kind for ack in block.acks] for block in blocks] == [["prompt"], ["act"], []]


def test_a_prompt_that_the_text_encoder_refuses_changes_nothing():
    class Picky:
        def encode(self, prompt):
            raise UsageError(f"knows no word of {prompt!r}")

    engine = remade(small_engine(), text=Picky)
    with opened(engine) as session:
        session.prompt("qqq")
        (block,) = session.stream(1, decode=False)
    assert [ack.refused for ack in block.acks] == ["knows no word of 'qqq'"]
    assert same([block], alone(1))


def test_pause_resume_and_stop_from_another_thread():
    engine = small_engine()
    session, other = opened(engine, 1), opened(engine, 2)
    paused, resumed = threading.Event(), threading.Event()

    def watch(record):
        if record.get("kind") == "pause":
            paused.set()
        if record.get("kind") == "resume":
            resumed.set()

    engine.observe(watch)

    def read():
        stream = session.stream()
        blocks = [next(stream)]
        session.pause()
        assert paused.wait(WAIT)
        assert session.state is State.PAUSED
        begun = session.next_block
        list(other.stream(3, decode=False))  # others go on
        assert session.next_block == begun
        session.resume()
        assert resumed.wait(WAIT)
        blocks += [next(stream) for _ in range(4)]
        session.stop()
        blocks += stream  # those that were begun
        with other:
            pass
        return blocks

    wait = in_thread(read)
    engine.run()
    blocks = wait()
    assert session.state is State.CLOSED and other.state is State.CLOSED
    assert 5 <= len(blocks) <= 7
    assert same(blocks, alone(len(blocks), decode=True, seed=1))
    acks = [ack.kind for block in blocks for ack in block.acks]
    assert acks[:2] == ["pause", "resume"]
    engine.check_integrity()


def test_one_thread_drives_and_others_are_told_so(monkeypatch):
    engine = small_engine()
    session = opened(engine)
    calls = {
        "step": engine.step, "run": engine.run, "open": lambda: opened(engine), "fork": session.fork,
        "rewind": lambda: session.rewind(0), "save": lambda: session.save("never.safetensors"), "close": session.close,
        "restore": lambda: Session.restore(engine, "never.safetensors"), "hand_over": engine.hand_over,
    }  # fmt: skip
    for name, call in calls.items():
        error = in_thread(call, "outsider")()
        assert isinstance(error, UsageError), name
        assert f"{name}() was called in thread 'outsider', but 'MainThread' drives this engine" in str(error)
        engine.check_integrity()
    monkeypatch.setattr(delivery, "OWNER_WAIT", 0.05)
    error = in_thread(lambda: next(session.stream(1)))()
    assert "'MainThread', which drives the engine, makes none" in str(error)
    engine.hand_over()
    actual = in_thread(lambda: list(session.stream(2, decode=False)))()
    assert same(actual, alone(2))
    assert len(list(session.stream(1))) == 1  # that thread has ended, so the engine is free again
    session.close()


def test_the_driving_thread_opens_and_forks_for_others():
    engine = small_engine()

    def serve():
        with engine.soon(lambda: opened(engine)).result(WAIT) as session:
            first = list(session.stream(2, decode=False))
            with engine.soon(session.fork).result(WAIT) as twin:
                actual = first + list(twin.stream(2, decode=False))
        failed = engine.soon(session.fork).exception(WAIT)
        engine.halt()
        return actual, failed

    wait = in_thread(serve)
    engine.run(keep=True)
    actual, failed = wait()
    assert same(actual, alone(4))
    assert isinstance(failed, InferixError)
    assert engine.soon(lambda: 3).result(WAIT) == 3


@pytest.mark.parametrize("ids", ["abc", "cba"])
def test_sessions_run_in_the_order_they_were_opened_whatever_their_ids_are(ids, monkeypatch):
    engine, given = small_engine(), iter(ids)
    with monkeypatch.context() as patch:
        patch.setattr(session_manager, "new_id", lambda: next(given))
        sessions = [opened(engine, seed) for seed in range(2)]
        sessions.append(sessions[0].fork())
    for session in sessions:
        engine.manager.delivery.submit_demand(session, Demand(2, decode=False))
    order = [session.id for _ in range(6) for session in engine.step()]
    assert order == [*ids, *ids]


def test_nobody_guesses_an_id():
    engine = small_engine()
    ids = [opened(engine, seed).id for seed in range(8)]
    assert len(set(ids)) == 8 and all(re.fullmatch(r"[0-9a-f]{32}", name) for name in ids)


def test_waiting_for_ever_is_an_error():
    engine = small_engine(limits=Limits(sessions=1, when_full="queue"))
    session = opened(engine)
    next(session.stream(1, decode=False))
    session.pause()
    with pytest.raises(InferixError, match=f"{session.id} .*paused"):
        next(session.stream(1, decode=False))
    session.resume()
    waiting = opened(engine, 1)
    with pytest.raises(InferixError, match=f"{waiting.id} .* 1 .* 1 "):
        next(waiting.stream(1, decode=False))
    with pytest.raises(InferixError, match="room"):
        waiting.fork()
    stream = session.stream(3, decode=False)
    next(stream)
    list(session.stream(1, decode=False))
    with pytest.raises(InferixError, match=session.id):
        next(stream)
    session.close()
    assert same(list(waiting.stream(2, decode=False)), alone(2, seed=1))


def test_controls_that_no_one_takes_are_bounded(monkeypatch):
    monkeypatch.setattr(control_queue, "MOST_CONTROLS", 3)
    with opened(small_engine()) as session:
        for _ in range(3):
            session.prompt(embeds=OTHER)
        with pytest.raises(InferixError, match="3 pending controls"):
            session.prompt(embeds=OTHER)
        next(session.stream(1, decode=False))
        session.prompt(embeds=OTHER)


# Ends


def not_a_number(engine, session):
    session.current.noise = InjectedNoise(torch.full((9, 16, 4, 4), torch.nan))


def out_of_memory(engine, session):
    finish = engine.manager.finish_block

    def failing(this, latents, check):
        if this is session and this.record.block == 2:
            this.rollback_point = None
            raise torch.OutOfMemoryError("CUDA out of memory")
        return finish(this, latents, check)

    engine.manager.finish_block = failing


def broken_decoder(error):
    """Break the decoder of a session at block 2."""

    def harm(engine, session):
        decode = session.current.decoder.decode

        def failing(block, latents):
            if block == 2:
                raise error
            return decode(block, latents)

        session.current.decoder.decode = failing

    return harm


@pytest.mark.parametrize(
    ("harm", "message", "threads"),
    [
        (not_a_number, "block 0 is not finite", 1), (out_of_memory, "out of memory", 1),
        (broken_decoder(MemoryError("no memory for pictures")), "no memory for pict", 1),
        (broken_decoder(InferixError("no pictures")), "no pictures", 2),
    ],
)  # fmt: skip
def test_a_session_that_fails_ends_alone(harm, message, threads):
    torch.set_num_threads(threads)
    engine = small_engine(rewind_blocks=1)
    session, other = opened(engine, 1), opened(engine, 2)
    harm(engine, session)
    stream, beside = session.stream(6), other.stream(6)
    results = []
    with pytest.raises((InferixError, MemoryError, torch.OutOfMemoryError), match=message):
        while True:
            results.append(next(beside))
            next(stream)
    results += beside
    assert session.state is State.FAILED and session.id not in engine.manager.sessions
    assert same(results, alone(6, decode=True, seed=2))
    engine.check_integrity()
    with pytest.raises(InferixError, match=f"{session.id} .*{message}"):
        session.fork()
    with pytest.raises(InferixError, match=f"{session.id} .*{message}"):
        session.act("left")
    session.close()  # frees nothing more, and hides no reason
    assert session.state is State.FAILED
    other.close()
    assert engine.manager.pages_in_use == 0
    assert engine.metrics()["counters"]["sessions_failed"] == 1


PLACES = [
    *((name, where) for name in SCHEMES for where in ("pass", "page")), ("self-forcing", "whole block"),
    ("self-forcing", "pass, commit in next"), ("self-forcing", "whole block, commit in next"),
]


@pytest.mark.parametrize(("name", "where"), PLACES)
def test_a_block_that_memory_runs_out_for_is_taken_back(name, where, monkeypatch):
    """Block 3 fails at its first pass, or page, then at its second, and so on: it is made as if nothing had been."""
    where, _, following = where.partition(", ")
    settings = SCHEMES[name] | ({"executor": "fused", "denoising_step_list": [1000]} if where == "whole block" else {})
    settings |= {"commit_in_next": True} if following else {}
    engine = small_engine(name, **{"rewind_blocks": 1} | settings)
    session, other = opened(engine, 1, **NEGATIVE.get(name, {})), opened(engine, 2, **NEGATIVE.get(name, {}))
    beside = [*session.stream(3), *other.stream(1)][3:]
    twin = session.fork()
    for each in (session, twin):
        each.prompt(embeds=OTHER)
    expected = list(twin.stream(3))
    twin.close()
    pool, failed = engine.kv_manager.store(SIZE).pool, 0
    whole = (engine.executor, "run_block")
    places = {"pass": (engine.loop, "forward"), "page": (pool, "acquire"), "whole block": whole}
    owner, verb = places[where]
    plain = getattr(owner, verb)
    while True:
        left = failed

        def failing(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0 and where == "page" and args[0]:
                raise OutOfPages("no page is left")
            blocks = plain(*args, **kwargs)
            if left < 0 and where != "page":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return blocks

        with monkeypatch.context() as patch:
            patch.setattr(owner, verb, failing)
            try:
                blocks = list(session.stream(1))
                break
            except (OutOfPages, torch.OutOfMemoryError):
                failed += 1
        engine.check_integrity()
        assert session.next_block == 3 and session.state is State.RUNNING and not session.output.unfinished
        assert max(session.current.branches[0].cache.frames, default=0) < 3 * engine.preset.num_frame_per_block
        beside += other.stream(1)
    assert failed > (where == "pass") and engine.metrics()["counters"]["blocks_rolled_back"] == failed
    blocks += session.stream(2)
    assert same(blocks, expected)
    session.rewind(5)
    assert same(list(session.stream(1)), expected[-1:])
    engine.check_integrity()
    session.close()
    other.close()
    assert engine.manager.pages_in_use == 0
    with opened(engine, 2, **NEGATIVE.get(name, {})) as one:
        assert same(beside, list(one.stream(len(beside))))


def test_a_reader_gets_what_was_finished_before_it_is_told_of_a_shortage(monkeypatch):
    """In a thread of its own; then it asks again. On a CPU torch has no class for the error."""
    engine = small_engine()
    session, velocity, failures = opened(engine), engine.loop.network_pass, []

    def failing(state, run, latents, record, *more):
        if record.block == 2 and not failures:
            failures.append(torch.empty(10**15))
        return velocity(state, run, latents, record, *more)

    def read():
        with session:
            blocks, stream = [], session.stream(4)
            blocks += [next(stream), next(stream)]
            with pytest.raises(MemoryError, match="allocate memory"):
                next(stream)
            failures.append(len(blocks))
            return blocks + list(session.stream(2))

    monkeypatch.setattr(engine.loop, "network_pass", failing)
    wait = in_thread(read)
    engine.run()
    assert same(wait(), alone(4, decode=True)) and failures == [2]


def interruptible(engine, session):
    """(owner, name) of functions that are called while a block of `session` is made, in the thread that drives."""
    return {
        "controls": (engine, "_change_prompt"), "acknowledge": (engine.manager, "acknowledge"),
        "prepare": (engine.loop, "follow_prompt"), "pass": (engine.loop, "forward"), "draw": (engine.loop, "draw"),
        "finish": (session.current, "remember"), "decode": (engine.parts.vae, "decode"),
        "taken": (engine.manager.delivery, "_taken"),
    }  # fmt: skip


@pytest.mark.parametrize(("preset", "threads"), [("self-forcing", 1), ("self-forcing", 2), ("causvid", 1)])
def test_ctrl_c_takes_the_block_back_wherever_it_comes(preset, threads, monkeypatch):
    torch.set_num_threads(threads)
    engine = small_engine(preset, rewind_blocks=1)
    with opened(engine, 1) as whole:
        expected = list(whole.stream(2))
        whole.prompt(embeds=OTHER)
        expected += whole.stream(2)
    session = opened(engine, 1)
    blocks = list(session.stream(2))
    session.prompt(embeds=OTHER)
    for place, (owner, name) in interruptible(engine, session).items():
        if place == "decode" and preset == "self-forcing" and threads == 1:
            continue  # in a thread of its own, where no Ctrl-C arrives

        plain = getattr(owner, name)

        def interrupted(*args, plain=plain, **kwargs):
            plain(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                pytest.fail(f"{place}: {next(session.stream(1))}")
        assert session.state is State.RUNNING and session.next_block >= 2, place
        assert not session.output.unfinished and len(session.output.ready) == (place == "taken"), place
        engine.check_integrity()
    blocks += session.stream(2)
    assert same(blocks, expected)
    assert [ack.kind for block in blocks for ack in block.acks] == ["prompt"]
    session.rewind(3)
    assert same(list(session.stream(1)), expected[-1:])
    session.close()
    assert engine.manager.pages_in_use == 0


def test_an_interrupted_run_answers_every_call(monkeypatch):
    """In the thread of `run`, as its reader waits; the session goes on in another thread."""
    engine = small_engine()
    session = opened(engine, 1)
    with monkeypatch.context() as patch:
        futures = []

        def interrupted(*args):
            futures.append(engine.soon(lambda: 1))  # by the engine's own thread, in a block: made after it
            raise KeyboardInterrupt

        patch.setattr(engine.loop, "forward", interrupted)
        wait = in_thread(lambda: list(session.stream(2)))
        with pytest.raises(KeyboardInterrupt):
            engine.run(keep=True)
    futures.append(in_thread(lambda: engine.soon(lambda: 1))())
    assert all(isinstance(future.exception(WAIT), SessionEnded) for future in futures)
    session.stop()
    engine.run()
    assert not wait() and session.closed
    engine.check_integrity()


def test_calls_are_answered_around_halt():
    engine = small_engine()

    def serve():
        futures = [engine.soon(lambda: 1) for _ in range(20)]
        cancelled = engine.soon(lambda: 1)
        cancelled.cancel()
        futures += [engine.soon(lambda: 1 / 0), engine.soon(lambda: opened(engine).close())]
        engine.halt()
        return futures + [engine.soon(lambda: 1) for _ in range(20)]

    wait = in_thread(serve)
    engine.run(keep=True)
    futures = [*wait(), in_thread(lambda: engine.soon(lambda: 1))()]
    errors = [future.exception(WAIT) for future in futures]
    assert isinstance(errors[20], ZeroDivisionError) and isinstance(errors[-1], SessionEnded)
    assert all(error is None or isinstance(error, SessionEnded) for error in errors[:20] + errors[21:])
    engine.hand_over()
    late = engine.soon(lambda: 1)
    engine.halt()
    engine.run(keep=True)  # the halt came first
    assert late.result(WAIT) == 1


def next_completed(*futures):
    return next(as_completed(futures))


def test_waiting_for_a_call_in_the_thread_that_makes_it():
    """In an observer it is an error, which becomes a warning; between two blocks the call is made at once."""
    engine = small_engine()
    futures, errors = [], []

    def observe(record):
        future = engine.soon(lambda: 5)
        done = Future()
        done.set_result(1)
        for wait in (
            future.result,
            future.exception,
            lambda: wait_for_all([done, future]),
            lambda: next_completed(future, done),
        ):
            try:
                wait()
            except UsageError as error:
                errors.append(error)
        assert next_completed(done) is done and wait_for_all([done]).done == {done}
        futures.append(future)

    engine.observe(observe)
    with opened(engine) as session:
        assert len(list(session.stream(2, decode=False))) == 2
    assert len(errors) == 4 * len(futures) >= 4 and all("engine.soon()" in str(error) for error in errors)
    assert not wait_for_all(futures).not_done and {future.result() for future in futures} == {5}
    for wait in (lambda future: future, lambda future: wait_for_all([future]).done.pop(), next_completed):
        late = []
        in_thread(lambda: late.append(engine.soon(lambda: 7)))()  # noqa: B023
        assert wait(late[0]).result() == 7


def test_an_observer_that_waits_fails_with_a_warning_and_blocks_go_on():
    engine = small_engine()
    engine.observe(lambda record: engine.soon(lambda: 5).result())
    with opened(engine) as session, pytest.warns(RuntimeWarning, match="UsageError"):
        assert len(list(session.stream(2, decode=False))) == 2


def test_an_error_of_no_known_kind_ends_its_session_alone(monkeypatch):
    """In the decoder's thread and in a block, as the reader drives and as another thread does."""
    for driven in (False, True):
        engine = small_engine()
        first, second, other = (opened(engine, seed) for seed in range(3))
        monkeypatch.setattr(first.current.decoder, "decode", lambda block, latents: 1 / 0)
        monkeypatch.setattr(second.current, "noise", None)
        if driven:
            engine.hand_over()
            in_thread(lambda: engine.run(keep=True))  # noqa: B023
            engine.soon(lambda: 1).result(WAIT)
        for session, error in ((first, ZeroDivisionError), (second, AttributeError)):
            with pytest.raises(error):
                list(session.stream(3))
            with pytest.raises(SessionEnded) as ended:
                session.stream(1)
            assert isinstance(ended.value.__cause__, error)
        assert same(list(other.stream(2)), alone(2, decode=True, seed=2))
        if driven:
            engine.soon(other.close).result(WAIT)
            engine.halt()
        else:
            other.close()
        assert engine.metrics()["counters"]["sessions_failed"] == 2
        assert engine.manager.pages_in_use == 0


def test_an_observer_that_raises_loses_no_block():
    engine = small_engine(spec=replace(TINY, actions=("stay", "left")))
    refused = []

    def observer(record):
        for call in (engine.step, lambda: opened(engine), session.fork, session.close, lambda: engine.use_lora(None)):
            with pytest.raises(UsageError):
                call()
            refused.append(call)
        raise OSError("no space left")

    session = opened(engine)
    engine.observe(observer)
    session.act("left")
    with pytest.warns(RuntimeWarning, match="no space left"):
        blocks = list(session.stream(2))
    assert [block.index for block in blocks] == [0, 1] and len(refused) == 15
    session.close()
    engine.check_integrity()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize("driven", [False, True])
def test_a_forked_process_makes_blocks_or_says_why_not(driven):
    engine = small_engine()
    session, busy = opened(engine), opened(engine, 1)
    expected = [*session.stream(1), *busy.stream(1)]
    twin = session.fork()
    expected += twin.stream(1)
    begun, release = threading.Event(), threading.Event()
    decode = busy.current.decoder.decode

    def slow(block, latents):
        begun.set()
        assert release.wait(WAIT)
        return decode(block, latents)

    busy.current.decoder.decode = slow
    if driven:
        engine.hand_over()
        in_thread(lambda: engine.run(keep=True))
        engine.soon(lambda: 1).result(WAIT)
        stream = in_thread(lambda: list(busy.stream(1)))
    else:
        stream = busy.stream(1, decode=True)
        engine.manager.delivery.submit_demand(busy, Demand(1, decode=True))
        engine.step()
    assert begun.wait(WAIT)

    def child():
        if driven:
            with pytest.raises(SessionEnded):
                opened(engine)
            with pytest.raises(SessionEnded):
                next(session.stream(1))
            assert isinstance(engine.soon(lambda: 1).exception(WAIT), SessionEnded)
            return
        assert same(list(session.stream(1)), expected[2:])
        with pytest.raises(SessionEnded):
            next(busy.stream(1))
        engine.check_integrity()

    pid = os.fork()
    if pid == 0:
        signal.alarm(WAIT)
        code = 1
        try:
            child()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    release.set()
    if driven:
        assert [block.index for block in stream()] == [1]
        engine.halt()
    else:
        assert [block.index for block in stream] == [1]


def test_a_session_whose_reader_is_gone_ends(monkeypatch):
    engine = small_engine(limits=Limits(consumer_timeout=5.0))
    session, other = opened(engine, 1), opened(engine, 2)
    stream = session.stream(9, decode=False)
    next(stream)
    other_stream = other.stream(9, decode=False)
    while not session.output.ready:
        next(other_stream)
    assert session.state is State.RUNNING
    session.output.touched -= 6.0
    next(other_stream)
    assert session.state is State.FAILED
    next(stream)  # what was finished is not lost
    with pytest.raises(InferixError, match=rf"{session.id} .*\b[67]\.?\d* s"):
        list(stream)
    engine.check_integrity()


def test_bad_input_leaves_everything_whole():
    engine = small_engine(rewind_blocks=1, kv_memory=24 * 4096, spec=replace(TINY, actions=("stay", "left")))
    session = opened(engine)
    list(session.stream(3, decode=False))
    closed = opened(engine, 1)
    closed.close()
    cases = [
        (lambda: session.rewind(1), "cannot be rewound to block 1: the next is 3, and blocks from 2 on are kept"),
        (lambda: session.rewind(7), "cannot be rewound to block 7"),
        (lambda: session.rewind(-1), "cannot be rewound to block -1"),
        (closed.fork, f"{closed.id} is closed"),
        (closed.close, f"{closed.id} is closed"),
        (lambda: closed.prompt(embeds=OTHER), f"{closed.id} is closed"),
        (lambda: closed.stream(1), f"{closed.id} is closed"),
        (lambda: session.act("jump"), "no action 'jump'; there are stay, left"),
        (lambda: session.act(("left", "left")), "action"),
        (lambda: session.act(3), "action is 3"),
        (lambda: session.prompt(), "give a prompt"),
        (lambda: session.prompt("no encoder"), "has no text encoder"),
        (lambda: session.prompt(embeds=torch.zeros(3, 5)), r"\[3, 5\]"),
        (lambda: small_engine(local_attn_size=2), "local_attn_size 2 is smaller than a block of 3 frames"),
        (lambda: small_engine(sink_size=9), "smaller than a block of 3 frames plus sink_size 9"),
        (lambda: small_engine(rewind_blocks=-1), "rewind_blocks is -1"),
        (lambda: opened(small_engine(kv_memory=4096)), "kv_memory is 4.096 kB, but one session of self-forcing needs"),
        (lambda: opened(small_engine(limits=Limits(memory_bytes=10_000))), "more than memory_bytes 10 kB even alone"),
        (lambda: small_engine(limits=Limits(overload=(DegradationStep("window", 2),))), "local_attn_size 2 is smaller"),
        (lambda: small_engine(limits=Limits(overload=(DegradationStep("decoder"),))), "there is none; give fast_vae"),
        (lambda: engine.open(prompt_embeds=PROMPT, size=(30, 32)), "multiple of 16"),
    ]
    for call, message in cases:
        with pytest.raises(InferixError, match=message):
            call()
        engine.check_integrity()
    session.stop()
    assert not engine.step()
    assert session.state is State.CLOSED
    with pytest.raises(InferixError, match="is closed"):
        session.resume()
    engine.check_integrity()


def test_integrity_notices_a_page_that_no_session_holds():
    engine = small_engine()
    with opened(engine) as session:
        list(session.stream(1, decode=False))
        cache = session.current.branches[0].cache
        cache.store.pool.acquire(1)
        with pytest.raises(InferixError, match=r"\(1, 0\)"):
            engine.check_integrity()


# Room and time


def test_a_queued_session_begins_with_its_video_once_there_is_room():
    video = torch.randint(0, 256, (13, 32, 32, 3), dtype=torch.uint8).numpy()
    engine = small_engine("self-forcing-framewise", limits=Limits(sessions=1, when_full="queue"))
    first = opened(engine)
    list(first.stream(1, decode=False))
    queued = opened(engine, 1, video=video)
    assert queued.prefix_frames is None and engine.metrics()["gauges"]["sessions_waiting"] == 1
    first.close()
    blocks = list(queued.stream(2))
    assert len(queued.prefix_frames) == 13
    with opened(small_engine("self-forcing-framewise"), 1, video=video) as session:
        assert same(blocks, list(session.stream(2)))


@pytest.mark.parametrize("rewind_blocks", [0, 1])
def test_pages_of_a_paused_session_make_room_for_another(rewind_blocks, monkeypatch):
    engine = small_engine(
        kv_memory=(10 + 3 * rewind_blocks) * 4096, kv_offload=True, rewind_blocks=rewind_blocks,
        limits=Limits(when_full="queue"),
    )  # fmt: skip
    resting, other = opened(engine, 1), opened(engine, 2)
    blocks = list(resting.stream(3, decode=False))
    with pytest.raises(InferixError, match=f"{other.id} .*pages"):
        next(other.stream(1, decode=False))
    with monkeypatch.context() as patch:
        patch.setattr(resting, "offload", lambda: torch.empty(10**15))
        resting.pause()
        with pytest.warns(UserWarning, match=f"{resting.id} .*allocate memory"):
            engine.step()
    resting.resume()
    resting.pause()
    beside = list(other.stream(3, decode=False))
    assert resting.away and engine.manager.pages_in_use == len(other.caches[0].frames) + 3 * rewind_blocks
    engine.check_integrity()
    with pytest.raises(InferixError, match="in host memory"):
        resting.fork()
    resting.resume()
    with pytest.raises(InferixError, match=f"{resting.id} .*pages"):
        next(resting.stream(1, decode=False))
    beside += other.stream(1, decode=False)
    other.close()
    blocks += resting.stream(2, decode=False)
    assert same(blocks, alone(5, seed=1)) and same(beside, alone(4, seed=2))
    engine.check_integrity()


def test_overload_takes_its_steps_and_says_so():
    """A model whose video plays faster than it can be made: first a narrower window, then the fast decoder."""
    spec = replace(TINY, fps=10**6)
    steps = (DegradationStep("window", 3), DegradationStep("decoder"), DegradationStep("sessions", 1))
    limits = Limits(realtime=True, late_blocks=1, overload=steps, schedule="earliest-deadline")
    engine = small_engine(spec=spec, fast_vae="taehv", limits=limits)
    first, second = opened(engine, 1), opened(engine, 2)
    with pytest.warns(UserWarning, match="window 3"):
        blocks = [*first.stream(2), *first.stream(1)]
    assert blocks[1].record.slack < 0
    assert engine.preset.context.local_attn_size == first.current.preset.context.local_attn_size == 3
    with pytest.warns(UserWarning, match="overload step decoder"):
        blocks += first.stream(1)
    assert [len(block.frames) for block in blocks] == [9, 12, 12, 12]
    assert first.current.decoder.vae is second.current.decoder.vae is engine.parts.fast_vae
    with pytest.warns(UserWarning, match="sessions 1"):
        blocks += first.stream(1)
    assert blocks[-1].record.as_dict()["overload"] == ["window", "decoder", "sessions"]
    assert second.state is State.PAUSED and first.state is State.RUNNING
    assert len(first.current.branches[0].cache.frames) == 3
    with pytest.raises(InferixError, match=r"session [0-9a-f]{32} .* 2 .* 1 "):
        opened(engine, 3)
    assert engine.metrics()["counters"]["overload_steps"] == 3
    first.close()
    second.resume()
    assert len(list(second.stream(1))) == 1
    second.close()
    engine.check_integrity()


# Measures


def test_records_and_metrics_are_plain_data(tmp_path):
    engine = small_engine(limits=Limits(realtime=True))
    with RecordFile(tmp_path / "records.jsonl") as records:
        engine.observe(records)
        with opened(engine) as session:
            list(session.stream(2))
            session.prompt(embeds=OTHER)
            list(session.stream(1))
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    blocks = [line for line in lines if "passes" in line]
    (control,) = [line for line in lines if "control" in line]
    assert [line["block"] for line in blocks] == [0, 1, 2]
    for line in blocks:
        assert set(line["seconds"]) == {"queue", "encode", "prepare", "denoise", "commit", "decode", "emit"}
        assert len(line["passes"]) == 2
        assert sum(line["passes"]) <= line["seconds"]["denoise"] + line["seconds"]["commit"]
        assert line["pages"] == min(3 * (line["block"] + 1), 6)
    assert blocks[0]["slack"] is None and blocks[1]["slack"] is not None
    assert control["kind"] == "prompt" and control["block"] == 2
    assert blocks[2]["acks"][0]["id"] == control["control"]
    metrics = json.loads(json.dumps(engine.metrics()))
    assert metrics["counters"]["blocks"] == 3 and metrics["counters"]["frames"] == 33
    assert metrics["histograms"]["denoise_seconds"]["count"] == 3
    assert metrics["gauges"]["pages_in_use"] == 0
    with pytest.raises(ZeroDivisionError), RecordFile(tmp_path / "half.jsonl") as records:
        records({"block": 1 / 0})
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


# For long


@pytest.mark.parametrize("blocks", [30, pytest.param(250, marks=pytest.mark.slow)])
def test_a_soak_over_8_sessions(blocks):
    """Under random controls nothing is left over, memory is flat, and every block is as if its session were alone."""
    settings = {
        "spec": replace(TINY, num_layers=1, actions=("stay", "left")), "local_attn_size": 4, "sink_size": 1,
        "rewind_blocks": 1, "prompt_switch": "recache",
    }  # fmt: skip
    engine = small_engine("self-forcing-framewise", **settings)
    prompts = [PROMPT, OTHER, PROMPT * 0.5]
    rng = random.Random(0)
    sessions = [opened(engine, seed) for seed in range(8)]
    streams = [session.stream(blocks, decode=False) for session in sessions]
    sent = [{} for _ in sessions]  # by block: what it is the first to follow
    actual = [[] for _ in sessions]
    memory, process, pool = [], psutil.Process(), engine.kv_manager.store(SIZE).pool
    for made in range(blocks):
        for place, (session, stream) in enumerate(zip(sessions, streams, strict=True)):
            chance = rng.random()
            if chance < 0.05:
                session.prompt(embeds=rng.choice(prompts))
                sent[place].setdefault(made, []).append(session.controls.waiting[-1])
            elif chance < 0.15:
                session.act(rng.choice(("stay", "left")))
                sent[place].setdefault(made, []).append(session.controls.waiting[-1])
            elif chance < 0.17:
                session.pause()
                session.resume()
            block = next(stream)
            assert block.index == made
            actual[place].append(block.latents.sum().item())
        assert pool.used <= 8 * least_pages(engine.preset)
        if made in (blocks // 4, blocks - 1):
            gc.collect()
            memory.append((pool.size, len(engine.manager.sessions), len(engine.manager.delivery.pipeline.jobs)))
            memory.append(process.memory_info().rss)
    engine.check_integrity()
    assert memory[0] == memory[2]
    assert memory[3] < memory[1] + 8 * 2**20
    for session in sessions:
        session.close()
    engine.check_integrity()
    assert engine.manager.pages_in_use == 0 and not engine.manager.scheduler.admitted
    assert engine.metrics()["counters"]["blocks"] == 8 * blocks
    for seed in range(8):
        with opened(small_engine("self-forcing-framewise", **settings), seed) as session:
            for made in range(blocks):
                for control in sent[seed].get(made, ()):
                    session.controls.put(control.kind, control.value)
                (block,) = session.stream(1, decode=False)
                assert block.latents.sum().item() == actual[seed][made], (seed, made)


def test_a_prompt_that_is_no_text_or_empty_is_refused_at_once():
    engine = load("wan-tiny", device="cpu", dtype="float32", local_attn_size=6)
    with engine.open(prompt="a boat", size=(32, 32)) as session:
        for prompt, message in ((5, "is 5"), (" ", "prompt")):
            with pytest.raises(UsageError, match=message):
                session.prompt(prompt)
            with pytest.raises(UsageError, match=message):
                engine.open(prompt=prompt, size=(32, 32))
