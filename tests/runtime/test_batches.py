"""Sessions whose blocks run as one: each as if alone, each ended alone, and only where measured times say so."""

import json
import random
from dataclasses import replace

import pytest
import torch
from oracles import ROWS, SIZE, TINY, make_engine

from inferix.errors import AtCapacity, InferixError, SessionEnded, UsageError
from inferix.runtime.capacity.memory_need import MemoryNeed
from inferix.runtime.kv.pages import OutOfPages
from inferix.runtime.limits import Limits
from inferix.runtime.noise import InjectedNoise
from inferix.runtime.sessions.batch_profile import BatchProfile, read_profiles, save_profile
from inferix.runtime.sessions.lifecycle import State
from inferix.runtime.sessions.scheduler import Scheduler, SchedulerEntry
from inferix.runtime.sessions.session import Demand

PROMPTS = [ROWS, ROWS.flip(0) * 1.5, ROWS * 0.5]
IDS = A, B, C, D, E, F = "fedcba"  # in the order they join, which is not that of their values
FASTER = BatchProfile({1: 1.0, 2: 1.5, 3: 2.0, 4: 2.5, 8: 4.0})
SLOWER = BatchProfile({1: 1.0, 2: 2.2, 3: 3.3})


def engine_of(preset="self-forcing", times=FASTER, **overrides):
    settings = {"local_attn_size": 6, "denoising_step_list": [1000, 500]} | overrides
    engine = make_engine(preset, **settings)
    if times is not None:
        engine.follow_times(SIZE, times)
    return engine


def opened(engine, seed, **extra):
    return engine.open(prompt_embeds=PROMPTS[seed % 3].to(engine.dtype), size=SIZE, seed=seed, **extra)


SCHEMES = {  # presets whose windows roll, contexts restart and prompts switch within a few blocks
    "self-forcing": {},
    "longlive": {"sink_size": 3},
    "longlive-infinity": {"sink_size": 3, "sink_decay": 0.9},
    "krea": {"local_attn_size": -1, "blend_blocks": 3},
    "causvid": {"local_attn_size": -1, "segment_frames": 6},
    "longlive2": {"local_attn_size": 8, "sink_size": 2, "num_frame_per_block": 2, "num_steps": 2},
    "rolling-forcing": {"local_attn_size": 9, "window_blocks": 2},
    "causal-diffusion": {"num_steps": 2},
}
NEGATIVE = {"causal-diffusion": {"negative_embeds": PROMPTS[1]}}


def settings_of(name):
    return SCHEMES[name] | ({"denoising_step_list": []} if "num_steps" in SCHEMES[name] else {})


@pytest.mark.parametrize("name", SCHEMES)
def test_sessions_of_a_batch_equal_each_alone(name):
    """Three prompts and seeds, the first session two blocks ahead of the others; one is given another prompt midway."""
    engine, extra = engine_of(name, **settings_of(name)), NEGATIVE.get(name, {})
    decode = name in ("self-forcing", "causvid")
    sessions = [opened(engine, seed, **extra) for seed in range(3)]
    actual = [list(sessions[0].stream(2, decode)), [], []]
    streams = [session.stream(4, decode) for session in sessions]
    for made in range(4):
        for blocks, stream in zip(actual, streams, strict=True):
            blocks.append(next(stream))
        if made == 1:
            shown = sessions[1].next_block
            sessions[1].prompt(embeds=PROMPTS[2])
    engine.check_integrity()
    sizes = [block.record.batch for blocks in actual for block in blocks]
    assert sizes[:2] == [1, 1] and sizes.count(3) >= (1 if decode else 6)  # one that is full of pictures stays out
    for session in sessions:
        session.close()
    engine.check_integrity()
    lone = engine_of(name, times=None, **settings_of(name))
    for seed, blocks in enumerate(actual):
        with opened(lone, seed, **extra) as session:
            for block in blocks:
                if seed == 1 and block.index == shown:
                    session.prompt(embeds=PROMPTS[2])
                (expected,) = session.stream(1, decode)
                assert expected.index == block.index and expected.record.batch == 1
                assert (block.latents - expected.latents).abs().max() <= 1e-9
                assert not decode or abs(block.frames.astype(int) - expected.frames).max() <= 1
    assert engine.metrics()["counters"]["blocks_in_batches"] == sum(size > 1 for size in sizes)


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"kv_dtype": "int8", "dtype": "float32"}, 1e-2),
        ({"kv_dtype": "float16", "dtype": "float32"}, 1e-2),
        ({"dtype": "float32"}, 1e-5),
        ({"spec": replace(TINY, actions=("stay", "left"))}, 1e-9),
    ],
)
def test_pages_of_fewer_bits_float32_and_actions(settings, bound):
    """Relative to the largest latent; a key that is rounded the other way in a page of few bits is seen again."""
    engine, lone = engine_of(**settings), engine_of(times=None, **settings)
    sessions = [opened(engine, seed) for seed in range(2)]
    if engine.spec.actions:
        sessions[1].act("left")
    blocks = list(zip(*(session.stream(4, decode=False) for session in sessions), strict=True))
    assert sum(block.record.batch == 2 for row in blocks for block in row) >= 6
    for seed in range(2):
        with opened(lone, seed) as session:
            if seed and engine.spec.actions:
                session.act("left")
            for row, expected in zip(blocks, session.stream(4, decode=False), strict=True):
                off = (row[seed].latents - expected.latents).abs().max() / expected.latents.abs().max()
                assert off <= bound


def test_forked_and_rewound_sessions_go_on_in_a_batch():
    """Two that share a past go apart in one batch; then one is taken back and comes the same way again."""
    engine = engine_of(rewind_blocks=1)
    session = opened(engine, 0)
    past = list(session.stream(2, decode=False))
    twin = session.fork()
    twin.prompt(embeds=PROMPTS[1])
    blocks = list(zip(session.stream(3, decode=False), twin.stream(3, decode=False), strict=True))
    assert [row[0].record.batch for row in blocks] == [1, 2, 2]
    engine.check_integrity()
    twin.rewind(4)
    (again,) = twin.stream(1, decode=False)
    assert (again.latents - blocks[2][1].latents).abs().max() <= 1e-9
    engine.check_integrity()
    lone = engine_of(times=None)
    for column, prompt in enumerate((None, PROMPTS[1])):
        with opened(lone, 0) as other:
            assert all(torch.equal(a.latents, b.latents) for a, b in zip(past, other.stream(2, False), strict=True))
            if prompt is not None:
                other.prompt(embeds=prompt)
            for row, expected in zip(blocks, other.stream(3, decode=False), strict=True):
                assert (row[column].latents - expected.latents).abs().max() <= 1e-9


# Ends


def not_a_number(engine, session):
    initial, renoise = (torch.full(shape, torch.nan) for shape in ((30, 16, 4, 4), (9, 1, 3, 16, 4, 4)))
    session.current.noise = InjectedNoise(initial, renoise)


def no_pages(engine, session):
    set_window = session.current.branches[0].cache.set_window

    def failing(frames):
        if frames[-1] > 8:
            raise InferixError("5 pages of KV memory are needed, 3 of 9 are free")
        set_window(frames)

    session.current.branches[0].cache.set_window = failing


def no_table(engine, session):
    place = session.current.branches[0].cache.layout

    def failing(run):
        if run.frames[-1] > 8:
            raise InferixError("frames [3] are attended to, but nothing has written them")
        return place(run)

    session.current.branches[0].cache.layout = failing


def reader_is_gone(engine, session):
    session.output.touched -= 1e6


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (not_a_number, "is not finite"),
        (no_pages, "pages of KV memory are needed"),
        (no_table, "nothing has written them"),
        (reader_is_gone, "nobody took its blocks"),
    ],
)
def test_a_session_that_fails_in_a_batch_ends_alone(harm, message):
    """The other two go on, within 1e-9 of each alone, and every page that the third had is free again."""
    engine = engine_of(limits=Limits(consumer_timeout=1e5))
    sessions = [opened(engine, seed) for seed in range(3)]
    streams = [session.stream(5, decode=False) for session in sessions]
    actual = [[next(stream) for stream in streams] for _ in range(2)]
    harm(engine, sessions[1])
    with pytest.raises(InferixError, match=message):
        while True:
            actual.append([next(streams[0]), None, next(streams[2])])
            next(streams[1])
    actual += ([a, None, b] for a, b in zip(streams[0], streams[2], strict=True))
    assert sessions[1].state is State.FAILED and sessions[0].state is sessions[2].state is State.RUNNING
    engine.check_integrity()
    assert {block.record.batch for row in actual for block in row if block} >= {2, 3}
    lone = engine_of(times=None)
    for seed in (0, 2):
        with opened(lone, seed) as session:
            for row, expected in zip(actual, session.stream(5, decode=False), strict=True):
                assert (row[seed].latents - expected.latents).abs().max() <= 1e-9
    for session in sessions:
        session.close()
    assert engine.manager.pages_in_use == 0 and engine.metrics()["counters"]["sessions_failed"] == 1


def test_a_block_of_a_batch_that_memory_runs_out_for_is_taken_back_alone():
    engine = engine_of()
    sessions = [opened(engine, seed) for seed in range(3)]
    streams = [session.stream(5, decode=False) for session in sessions]
    actual = [[next(stream)] for stream in streams]
    place, failed = sessions[1].current.branches[0].cache.layout, []

    def failing(run):
        if run.frames[-1] > 8 and len(failed) < 2:  # in the batch, and by itself
            failed.append(run)
            raise OutOfPages("5 pages of KV memory are needed, 3 of 9 are free")
        return place(run)

    sessions[1].current.branches[0].cache.layout = failing
    with pytest.raises(OutOfPages):
        for _ in range(4):
            for blocks, stream in zip(actual, streams, strict=True):
                blocks.append(next(stream))
    engine.check_integrity()
    assert len(failed) == 2 and all(session.state is State.RUNNING for session in sessions)
    streams[1] = sessions[1].stream(5 - len(actual[1]), decode=False)
    for blocks, stream in zip(actual, streams, strict=True):
        blocks.extend(stream)
    counters = engine.metrics()["counters"]
    assert counters["blocks_rolled_back"] == 1 and "batches_split" not in counters
    lone = engine_of(times=None)
    for seed, blocks in enumerate(actual):
        with opened(lone, seed) as session:
            for block, expected in zip(blocks, session.stream(5, decode=False), strict=True):
                assert (block.latents - expected.latents).abs().max() <= 1e-9


def test_a_batch_that_does_not_fit_is_run_in_turns_and_not_tried_again():
    engine = engine_of()
    forward, sizes = engine.executor.forward, []

    def failing(latents, *rest):
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(latents, *rest)

    engine.executor.forward = failing
    streams = [opened(engine, seed).stream(4, decode=False) for seed in range(3)]
    with pytest.warns(UserWarning, match=r"\b3\b.*CUDA out of memory"):
        actual = [[next(stream) for stream in streams] for _ in range(2)]
    tried = len(sizes)
    actual += [[next(stream) for stream in streams] for _ in range(2)]
    assert 3 in sizes[:tried] and 2 in sizes[tried:] and max(sizes[tried:]) == 2
    assert engine.metrics()["counters"]["batches_split"] >= 1
    engine.check_integrity()
    lone = engine_of(times=None)
    for seed in range(3):
        with opened(lone, seed) as session:
            for row, expected in zip(actual, session.stream(4, decode=False), strict=True):
                assert (row[seed].latents - expected.latents).abs().max() <= 1e-9


@pytest.mark.parametrize(("error", "state"), [(KeyboardInterrupt, State.RUNNING), (ZeroDivisionError, State.FAILED)])
def test_an_interrupted_batch_is_taken_back_and_an_error_ends_all_that_are_in_it(error, state):
    engine = engine_of()
    sessions = [opened(engine, seed) for seed in range(3)]
    streams = [session.stream(3, decode=False) for session in sessions[:2]]
    taken = [[next(stream).index] for stream in streams]
    forward = engine.executor.forward

    def interrupted(*given):
        raise error

    engine.executor.forward = interrupted
    with pytest.raises(error) as raised:
        for _ in range(2):
            for stream, indices in zip(streams, taken, strict=True):
                indices.append(next(stream).index)
    engine.executor.forward = forward
    assert [session.state for session in sessions] == [state, state, State.NEW], raised.value
    engine.check_integrity()
    if state is State.RUNNING:
        for session, indices in zip(sessions[:2], taken, strict=True):
            indices += [block.index for block in session.stream(2, decode=False)]
            assert indices == list(range(len(indices)))
    else:
        for session in sessions[:2]:
            with pytest.raises(SessionEnded):
                session.stream(1)
    assert len(list(sessions[2].stream(2, decode=False))) == 2
    for session in sessions:
        session.close()
    assert engine.manager.pages_in_use == 0


# Which run as one


@pytest.mark.parametrize(
    "given", [{"times": SLOWER}, {"times": None}, {"limits": Limits(batch=1)}], ids=["slower", "unmeasured", "off"]
)
def test_sessions_take_turns_where_a_batch_is_not_faster(given):
    """And then they are, bit for bit, as each alone."""
    engine, lone = engine_of(**given), engine_of(times=None)
    blocks = list(zip(*(opened(engine, seed).stream(3, decode=False) for seed in range(3)), strict=True))
    assert {block.record.batch for row in blocks for block in row} == {1}
    assert engine.metrics()["counters"]["blocks_in_batches"] == 0
    for seed in range(3):
        with opened(lone, seed) as session:
            for row, expected in zip(blocks, session.stream(3, decode=False), strict=True):
                assert torch.equal(row[seed].latents, expected.latents)


def test_only_blocks_that_match_run_as_one():
    """Pictures of another size, and an image that is held as the first frame, stay out."""
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    engine = engine_of("longlive2", **settings_of("longlive2"))
    engine.follow_times((32, 48), FASTER)
    sessions = [
        opened(engine, 0), opened(engine, 1), opened(engine, 2, image=image),
        *(engine.open(prompt_embeds=ROWS, size=(32, 48), seed=seed) for seed in range(2)),
    ]  # fmt: skip
    for session in sessions:
        engine.manager.delivery.submit_demand(session, Demand(2, decode=False))
    steps = [sorted(sessions.index(session) for session in engine.step()) for _ in range(6)]
    assert steps[:3] == [[0, 1], [2], [3, 4]]
    assert steps[3:] == [[0, 1, 2], [3, 4], []]
    engine.check_integrity()


def test_images_held_as_the_first_frame_make_passes_of_two_parts():
    """One frame told that it is clean, and two that are not; each part has a row for each session."""
    settings = settings_of("longlive2") | {"num_frame_per_block": 3, "local_attn_size": 6, "sink_size": 3}
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8).numpy()
    engine, lone = engine_of("longlive2", **settings), engine_of("longlive2", times=None, **settings)
    sessions = [opened(engine, seed, image=images[seed]) for seed in range(2)]
    for session in sessions:
        engine.manager.delivery.submit_demand(session, Demand(2, decode=False))
    assert [len(engine.step()) for _ in range(3)] == [2, 2, 0]
    for seed, session in enumerate(sessions):
        with opened(lone, seed, image=images[seed]) as other:
            for expected in other.stream(2, decode=False):
                assert (session.output.take().latents - expected.latents).abs().max() <= 1e-9


def test_int8_pages_of_a_budget_run_as_one_within_it():
    """Its staging buffer has room for as many sessions as its pages."""
    for budget in (None, 10**6):
        engine = engine_of(dtype="float32", kv_dtype="int8", kv_memory=budget)
        blocks = list(zip(*(opened(engine, seed).stream(3, decode=False) for seed in range(2)), strict=True))
        assert {block.record.batch for row in blocks for block in row} == {1, 2}
        (store,), (space,) = engine.resources.worker.stores.values(), engine.kv_manager.stores.values()
        assert budget is None or (store.nbytes <= budget and store.nbytes == space.nbytes)


def new_scheduler(admitted, times=FASTER, **limits):
    scheduler = Scheduler(Limits(**limits), batch_profiles={"small": times})
    for session in IDS[:admitted]:
        scheduler.join(session, SchedulerEntry(MemoryNeed(), "small", 1.0))
    return scheduler


def test_as_many_as_measured_times_say_and_the_most_urgent_first():
    scheduler = new_scheduler(6)
    assert scheduler.pick([A, B, C, D, E, F], [], 0.0) == A
    assert scheduler.pick_batch(A, [B, C, D, E, F], 0.0) == [A, B, C, D]
    assert scheduler.pick([A, B, C, D, E, F], [], 0.0) == E
    assert scheduler.pick_batch(E, [A, B, C, D, F], 0.0) == [E, F, A, B]
    assert scheduler.pick_batch(C, [], 0.0) == [C]
    assert new_scheduler(3, SLOWER).pick_batch(A, [B, C], 0.0) == [A]
    assert new_scheduler(3, BatchProfile({1: 1.0, 2: 2.0})).pick_batch(A, [B, C], 0.0) == [A]
    assert new_scheduler(5, BatchProfile({1: 1.0, 4: 2.0})).pick_batch(A, [B, C], 0.0) == [A]
    assert new_scheduler(6, batch=2).pick_batch(A, [B, C, D], 0.0) == [A, B]
    scheduler.batch_room = 3
    assert scheduler.pick_batch(A, [B, C, D, E, F], 0.0) == [A, C, D]


def test_a_batch_makes_no_session_late_that_is_in_time_alone():
    scheduler = new_scheduler(4, realtime=True)
    scheduler.admitted[A].due = 11.7
    assert scheduler.pick_batch(A, [B, C, D], 10.0) == [A, B]
    assert scheduler.pick_batch(A, [B, C, D], 10.5) == [A]
    assert scheduler.pick_batch(A, [B, C, D], 11.0) == [A, C, D, B]  # it is late in any case


def test_a_batch_is_as_large_as_its_staging_buffer_and_the_limit():
    scheduler = new_scheduler(4)
    scheduler.admitted[A].most_batched = 2
    assert scheduler.pick_batch(A, [B, C, D], 0.0) == [A, B]
    assert scheduler.pick_batch(B, [C, D], 0.0) == [B, C, D]


def test_admission_counts_the_activations_of_a_batch():
    def joined(**limits):
        scheduler = Scheduler(Limits(memory_bytes=100, **limits), batch_profiles={"small": FASTER})
        for count, session in enumerate(IDS):
            try:
                scheduler.join(session, SchedulerEntry(MemoryNeed(pages=20, activations=10), "small", 1.0))
            except AtCapacity:
                return count, scheduler.batch_bytes()

    assert joined() == (3, 20)  # 60 bytes of pages, and two rows beyond the first
    assert joined(batch=2) == (4, 10)
    assert joined(batch=1) == (5, 0)


def test_a_block_waits_for_sessions_that_raise_throughput():
    scheduler = new_scheduler(4, batch_wait=0.5)
    assert [scheduler.batch_wait([A], 3, 10.0, now) for now in (10.0, 10.25, 11.0)] == [0.5, 0.25, 0.0]
    assert scheduler.batch_wait([A, B], 2, 10.0, 10.0) == 0.0  # 3.0 s for four are no better than 1.5 s for two
    assert scheduler.batch_wait([A], 0, 10.0, 10.0) == 0.0
    scheduler.admitted[A].due = 12.75
    assert scheduler.batch_wait([A], 3, 10.0, 10.0) == 0.25  # a batch of four takes 2.5 s
    scheduler.admitted[A].due = 12.0
    assert scheduler.batch_wait([A], 3, 10.0, 10.0) == 0.0
    off, slower = new_scheduler(4), new_scheduler(4, SLOWER, batch_wait=1.0)
    for other in (off, slower, new_scheduler(4, batch=1, batch_wait=1.0)):
        assert other.batch_wait([A], 3, 10.0, 10.0) == 0.0
    for wrong in (0, 1.5, "half"):
        with pytest.raises(UsageError, match="batch_wait"):
            Limits(batch_wait=wrong)


@pytest.mark.parametrize("wait", [None, 0.5])
def test_a_session_that_is_read_meanwhile_joins_the_batch(wait, monkeypatch):
    times = BatchProfile({1: 1e3, 2: 1.2e3})  # seconds, so that the wait does not end by itself
    engine = engine_of(times=times, limits=Limits(queue_blocks=1, batch_wait=wait))
    sessions, condition = [opened(engine, seed) for seed in range(2)], engine.manager.condition
    for session in sessions:
        engine.manager.delivery.submit_demand(session, Demand(2, decode=False))
    assert len(engine.step()) == 2
    sessions[0].output.take()

    def read_the_other(seen, timeout):
        assert 0 < timeout <= 500.001  # rounding
        return sessions[1].output.take()

    monkeypatch.setattr(condition, "wait_after", read_the_other)
    assert list(engine.step()) == (sessions[:1] if wait is None else sessions)


def test_a_batch_counts_for_its_share_of_real_time():
    engine = engine_of(limits=Limits(realtime=True))
    streams = [opened(engine, seed).stream(6, decode=False) for seed in range(3)]
    blocks = [next(stream) for _ in range(4) for stream in streams]
    spans = [block.record.spans for block in blocks if block.record.batch == 3]
    shares = [(span["commit"][1] - span["encode"][0]) / 3 for span in spans]
    (measured,) = engine.manager.scheduler.block_seconds.values()
    assert measured < 3 * max(shares)


# The measurement


def test_times_are_kept_for_what_they_were_made_on(tmp_path):
    path = tmp_path / "batches.json"
    engine = engine_of()
    about = engine.timed_on
    save_profile(path, about, (32, 32), SLOWER)
    save_profile(path, about, (64, 32), FASTER)
    save_profile(path, about | {"dtype": "bfloat16"}, (32, 32), SLOWER)
    save_profile(path, about, (32, 32), FASTER)
    assert read_profiles(path, about) == {(32, 32): FASTER, (64, 32): FASTER}
    assert read_profiles(path, about | {"card": "another"}) == {}
    assert read_profiles(path, engine_of(local_attn_size=9).timed_on) == {}
    assert len(json.loads(path.read_text())) == 3
    assert engine_of(times=None, batches=str(path)).manager.scheduler.batch_profiles == {
        (32, 32): FASTER, (64, 32): FASTER
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [None, "no json", "{}", '[{"about": 1}]', '[{"about": %s, "size": 3, "seconds": {"1": 4}}]',
     '[{"about": %s, "size": [1e999, 32], "seconds": {"1": 4}}]', "[" * 100_000],
)  # fmt: skip
def test_a_file_that_holds_no_times_is_refused(content, tmp_path):
    path, about = tmp_path / "batches.json", engine_of(times=None).timed_on
    if content is not None:
        path.write_text(content.replace("%s", json.dumps(about)))
    with pytest.raises(InferixError, match=str(path)):
        read_profiles(path, about)


def test_bad_settings():
    for seconds in ({}, {2: 1.0}, {1: 0.0}, {1: 1.0, 0: 1.0}, {1: 1.0, 2.5: 1.0}):
        with pytest.raises(UsageError, match="seconds"):
            BatchProfile(seconds)
    with pytest.raises(UsageError, match="batch is 0"):
        Limits(batch=0)


# For long


@pytest.mark.parametrize("count", [16, pytest.param(50, marks=pytest.mark.slow)])
def test_a_soak_in_batches(count):
    """Under random controls, pauses and ends nothing is left over, and blocks are as if each session were alone."""
    settings = {
        "spec": replace(TINY, num_layers=1, actions=("stay", "left")), "local_attn_size": 4, "sink_size": 1,
        "prompt_switch": "recache", "denoising_step_list": [1000],
    }  # fmt: skip
    engine, rng = engine_of("self-forcing-framewise", **settings), random.Random(1)
    sessions = [opened(engine, seed) for seed in range(6)]
    streams = [session.stream(count, decode=False) for session in sessions]
    sent = [{} for _ in sessions]
    actual = [[] for _ in sessions]
    for made in range(count):
        for place, (session, stream) in enumerate(zip(sessions, streams, strict=True)):
            if rng.random() < 0.1:
                session.prompt(embeds=rng.choice(PROMPTS))
                sent[place].setdefault(session.next_block, []).append(session.controls.waiting[-1])
            elif rng.random() < 0.1:
                session.act(rng.choice(("stay", "left")))
                sent[place].setdefault(session.next_block, []).append(session.controls.waiting[-1])
            elif rng.random() < 0.05:
                session.pause()
                session.resume()
            actual[place].append(next(stream))
        if made % 10 == 0:
            engine.check_integrity()
    sizes = [block.record.batch for blocks in actual for block in blocks]
    assert len(sizes) == 6 * count and set(sizes) > {1, 2, 3}
    for session in sessions:
        session.close()
    engine.check_integrity()
    assert engine.manager.pages_in_use == 0 and not engine.manager.scheduler.admitted
    lone = engine_of("self-forcing-framewise", times=None, **settings)
    for seed, blocks in enumerate(actual):
        with opened(lone, seed) as session:
            for block in blocks:
                for control in sent[seed].get(block.index, ()):
                    session.controls.put(control.kind, control.value)
                (expected,) = session.stream(1, decode=False)
                assert (block.latents - expected.latents).abs().max() <= 1e-9, (seed, block.index)
