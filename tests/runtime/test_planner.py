"""The planner against what streams do: their passes, what they hold, what torch counts, and the published figures."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from oracles import ROWS, SIZE, SMALL_VAE, TINY, WAN_PRESETS, contiguous, make_engine, remade
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from inferix.errors import UsageError
from inferix.graphs.lowered import lower_block
from inferix.graphs.rewrites import chosen
from inferix.graphs.types import Role
from inferix.models.registry import MODELS, PRESETS, make_preset
from inferix.models.wan.family import WAN
from inferix.models.wan.vae import CausalVae
from inferix.models.wan.vae_spec import TAEW21, WAN21_VAE
from inferix.runtime.capacity import planner
from inferix.runtime.capacity.costs import arena_bytes, cross_bytes, merged_bytes, page_bytes, table_bytes
from inferix.runtime.capacity.memory_need import batch_row_bytes
from inferix.runtime.capacity.planner import Ceiling, Workload, longest_window, memory, needed, suggestions
from inferix.runtime.kv.kv_manager import KVManager
from inferix.runtime.kv.page_space import PageSpace
from inferix.runtime.kv.page_store import KV_DTYPES, PagedStore
from inferix.runtime.programs.graph_builder import GraphBuilder, GraphKey
from inferix.runtime.sampler import scheduled_blocks
from inferix.runtime.worker_client import WorkerClient
from inferix.schemes.page_needs import least_pages, page_needs, staging_slots

NEGATIVE = {"causal-diffusion": {"negative_embeds": ROWS.float().flip(0)}}
FEW = {"causal-diffusion": {"num_steps": 2}}
TOP = Ceiling(1.0, 1.0, "given")


def tiny(name, **overrides):
    return Workload(TINY, make_preset(name, **FEW.get(name, {}) | overrides), SMALL_VAE, 0, SIZE, "float32", "float32")


def full(name, model="wan-1.3b", decoder=WAN21_VAE, **changed):
    load = Workload(MODELS[model], make_preset(name), decoder, 0, (832, 480), "bfloat16", "bfloat16")
    return replace(load, **changed)


def shape(run):
    return [(group.frames, group.context, group.positions, group.write) for group in run.groups]


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_planned_work_is_what_the_engine_does(name, monkeypatch):
    """Passes, decoded frames and pictures encoded again of ten blocks, and no pass is longer than `longest_pass`.

    Nothing is computed: the network says zeros, and so do decoder and encoder.
    """
    engine = make_engine(name, dtype="float32", **FEW.get(name, {}))
    stride, (height, width) = engine.spec.vae_stride[0], SIZE[::-1]
    done = []

    def run(state, this, latents, *more):
        done.append(("pass", shape(this)))
        yield from ()
        return torch.zeros_like(latents)

    def decode(latents, state):
        done.append(("decode", len(latents)))
        return torch.zeros(len(latents) * stride, 3, height, width)

    def encode(pixels, state):
        done.append(("encode", len(pixels)))
        return torch.zeros(1, engine.spec.out_channels, *engine.spec.latent_size(SIZE))

    monkeypatch.setattr(engine.loop, "network_pass", run)
    monkeypatch.setattr(engine.parts.vae, "decode", decode)
    monkeypatch.setattr(engine.parts.vae, "encode", encode)
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, **NEGATIVE.get(name, {})) as session:
        for planned in islice(scheduled_blocks(engine.preset), 10):
            (block,) = session.stream(1)
            ran = [actual for kind, actual in done if kind == "pass"]
            assert ran == [shape(scheduled.run) for scheduled in planned.passes]
            assert sum(count for kind, count in done if kind == "decode") == planned.decoded
            assert sum(count for kind, count in done if kind == "encode") == planned.encoded
            assert len(block.latents) == len(planned.span.frames)
            done.clear()
    blocks = list(islice(scheduled_blocks(engine.preset), 12))
    passes = [scheduled for block in blocks for scheduled in block.passes]
    passes += [block.recache for block in blocks if block.recache is not None]
    assert max(len(scheduled.run.frames) for scheduled in passes) == planner.longest_pass(engine.preset)


SMALL = {  # presets with a past that is soon full
    "longlive": {"local_attn_size": 6, "denoising_step_list": [1000]},
    "krea": {"denoising_step_list": [1000]},
    "causvid": {"segment_frames": 6, "denoising_step_list": [1000]},
    "causal-diffusion": {"local_attn_size": 6, "num_steps": 1},
    "rolling-forcing": {"local_attn_size": 9, "window_blocks": 2, "denoising_step_list": [1000, 500]},
}


def countable(engine):
    """The same engine with a smaller VAE, over the plain cache, whose attention torch can count."""
    engine = remade(engine, vae=CausalVae(SMALL_VAE).eval().requires_grad_(False))
    engine.manager.delivery.pipeline.submit = lambda session, job: job()  # counted in the thread that counts
    engine = contiguous(engine)
    engine.executor.passes = engine.executor.plain  # whose time embeddings are computed in every pass, as planned
    return engine


@pytest.mark.parametrize("name", SMALL)
def test_a_real_session(name):
    """Operations of four blocks, as torch counts them, decoder and all; then what the session holds.

    Pages, cross keys and decoder state to the byte; latents up to the planned bytes.
    """
    engine, size = countable(make_engine(name, dtype="float32", **SMALL[name])), (32, 16)
    load = replace(tiny(name, **SMALL[name]), decoder=SMALL_VAE, size=size)
    rows = {"prompt_embeds": ROWS.float(), **NEGATIVE.get(name, {})}
    with engine.open(size=size, **rows) as session, sdpa_kernel(SDPBackend.MATH):
        for block in islice(scheduled_blocks(load.preset), 4):
            with FlopCounterMode(display=False) as counter:
                next(iter(session.stream(1)))
            speed = planner.speed(load, block, TOP)
            assert counter.get_total_flops() == speed.transformer_flops + speed.decoder_flops
        planned = memory(load).each
        prompts = [engine.resources.worker.prompts[branch.text.number] for branch in session.current.branches]
        texts = [text for prompt in prompts for text in prompt.texts.values()]
        keys = [tensor.nbytes for text in texts for pair in text.text for tensor in pair]
        latents = [tensor.nbytes for tensor in (session.current.recent, session.current.pixels) if tensor is not None]
        latents += [block.latents.nbytes for block in session.current.flight]
        scratch = page_needs(load.preset).scratch  # pages for the length of a pass
        pages = sum(branch.cache.nbytes for branch in session.current.branches)
        assert pages + scratch * page_bytes(TINY, load.tokens, "float32") == planned["pages"]
        assert sum(keys) + len(session.current.branches) * session.current.rows.nbytes == planned["cross_keys"]
        assert session.current.decoder.state.nbytes == planned["decoder_state"]
        assert sum(latents) <= planned["latents"]


class Idle:
    """A worker that does nothing."""

    def execute(self, plan, tensors=()):
        return []


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8", "int8"])
@pytest.mark.parametrize("name", ["longlive", "krea", "rolling-forcing", "causal-diffusion"])
def test_pages_and_their_buffer_are_what_is_allocated(name, kind):
    preset = make_preset(name, sink_size=1, sink_decay=0.9) if name == "longlive" else make_preset(name)
    dtypes = (torch.float32, {"float32": torch.float32, **KV_DTYPES}[kind])
    form = KVManager(TINY, preset, dtypes, [WorkerClient(Idle())], None).form(SIZE)
    pages, slots = least_pages(preset), staging_slots(preset)
    store = PagedStore(form, WAN.build(TINY).rope, pages, slots, torch.device("cpu"))
    assert PageSpace(form, pages, slots, WorkerClient(Idle()), grows=True).nbytes == store.nbytes
    split = memory(Workload(TINY, preset, SMALL_VAE, 0, SIZE, "float32", kind))
    assert store.nbytes == split.each["pages"] + split.once["page_buffer"]
    assert (split.once["page_buffer"] > 0) == (kind != "float32")
    if name == "longlive":
        wide = store.restored([0], torch.float32)
        assert split.each["moving_sink"] == wide.nbytes


@pytest.mark.parametrize(
    ("model", "name", "parts", "whole"),
    [
        ("wan-1.3b", "longlive", ((1, 3),), True),
        ("wan-1.3b", "longlive", ((1, 9),), False),
        ("wan-14b", "krea", ((1, 3),), True),
    ],
)
@pytest.mark.parametrize("steps", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_plan_of_real_graphs(model, name, parts, whole, steps):
    """At full width and two layers: the arena within its bound, the constants exact."""
    listed = PRESETS[name].sampler.denoising_step_list[:steps]
    spec, preset = replace(MODELS[model], num_layers=2), make_preset(name, denoising_step_list=listed)
    frames, latent = parts[0][0] * parts[0][1], spec.latent_size(spec.default_size)
    key = GraphKey(whole, parts, (frames, spec.out_channels, *latent), sinks=False, width=16, pages=16)
    made = GraphBuilder(spec, preset, "reference", torch.bfloat16, "cpu", tuple(chosen()))(key)
    lowered = lower_block(made)
    bound = arena_bytes(spec, spec.tokens_per_frame(spec.default_size), frames, "bfloat16")
    assert lowered.body.plan.size <= bound <= 1.5 * lowered.body.plan.size
    fold = lowered.fold.program
    constants = sum(fold.buffers[ref.buffer].nbytes for ref in fold.outputs.values())
    tables = table_bytes(spec, frames, preset.sampler.steps, preset.context.commit, "bfloat16") if whole else 0
    literals = 2048  # the sinusoid's
    assert 0 <= constants - merged_bytes(spec, "bfloat16") - tables <= literals
    inputs = sum(buffer.nbytes for buffer in lowered.body.program.of(Role.INPUT) if buffer.name.startswith("prompt"))
    assert inputs <= cross_bytes(spec, "bfloat16") <= 2 * inputs


@pytest.mark.slow
@pytest.mark.parametrize("sessions", [2, 4])
def test_the_arena_of_a_batch(sessions):
    """At full width and two layers, within the bound of a session and of each further one."""
    spec, preset = replace(MODELS["wan-1.3b"], num_layers=2), make_preset("longlive")
    key = GraphKey(True, ((1, 3),), (3, 16, *spec.latent_size(spec.default_size)), False, 16, 16, sessions=sessions)
    arena = lower_block(GraphBuilder(spec, preset, "reference", torch.bfloat16, "cpu", tuple(chosen()))(key)).body.plan
    first = arena_bytes(spec, spec.tokens_per_frame(spec.default_size), 3, "bfloat16")
    bound = first + (sessions - 1) * batch_row_bytes(preset, spec, spec.default_size, "bfloat16", graphs=True)
    assert arena.size <= bound <= 1.6 * arena.size


def test_a_batch_shares_the_weights_and_adds_activations():
    load = Workload(MODELS["wan-1.3b"], make_preset("longlive"), WAN21_VAE, 0, (832, 480), "bfloat16", "bfloat16", 4)
    slow, wide = Ceiling(1e9, 1.0, "all is traffic"), Ceiling(1.0, 1e9, "all is arithmetic")
    for executor in ("eager", "fused", "captured"):
        turns = replace(load, executor=executor)
        batch = replace(turns, batch=4)
        assert planner.batch_sizes(batch) == [1, 2, 4] and planner.batch_sizes(turns) == [1]
        more = memory(batch).once["batch"] - memory(turns).once["batch"]
        assert needed(batch) - needed(turns) == more > 0
        one, four = (planner.steady_speed(each, slow).transformer_seconds for each in (turns, batch))
        assert one / 4 < four < one
        one, four = (planner.steady_speed(each, wide).transformer_seconds for each in (turns, batch))
        assert four == pytest.approx(one)
    for wrong in (0, 5):
        with pytest.raises(UsageError, match=f"batch is {wrong}"):
            replace(load, batch=wrong)


@pytest.mark.parametrize("name", ["longlive", "krea", "rolling-forcing"])
def test_what_a_graph_executor_holds(name):
    """Programs made, and constants, of a stream with a new prompt in a full window; merged weights are there once."""
    settings = {"local_attn_size": 6} if name == "longlive" else SMALL[name]
    engine = make_engine(name, dtype="float32", executor="fused", **settings)
    load = replace(tiny(name, **settings), executor="fused")
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        list(session.stream(3, decode=False))
        session.prompt(embeds=ROWS.float().flip(0))
        list(session.stream(1, decode=False))
    loaded = engine.executor.loaded
    assert sorted(key.latent[0] for key in loaded) == sorted(planner.programs(load.preset))
    planned, gaps = memory(load).once, 8192  # between constants, and what making them took
    assert 0 <= engine.executor.bytes_by_owner()["constants"] - planned["constants"] <= gaps
    attention = engine.parts.transformer.blocks[0].self_attn
    assert len({layer.weight.untyped_storage().data_ptr() for layer in (attention.q, attention.k, attention.v)}) == 1


def test_published_blocks():
    """TFLOP of a steady block, and of a whole clip of 81 frames, at 832x480."""
    for load, tflop in (
        (full("self-forcing"), 202),
        (full("longlive"), 141.5),
        (full("krea", "wan-14b"), 730.8),
    ):
        assert planner.steady_speed(load, TOP).transformer_flops / 1e12 == pytest.approx(tflop, abs=0.1)
    assert planner.steady_speed(full("longlive"), TOP).decoder_flops / 1e12 == pytest.approx(40.65, abs=0.01)
    assert planner.steady_speed(full("longlive", decoder=TAEW21), TOP).decoder_flops / 1e12 == pytest.approx(
        1.63, abs=0.01
    )
    blocks = islice(scheduled_blocks(PRESETS["self-forcing"]), 7)
    clip = [planner.speed(full("self-forcing"), block, TOP) for block in blocks]
    assert sum(block.transformer_flops for block in clip) / 1e15 == pytest.approx(0.99, abs=0.005)
    assert memory(full("self-forcing")).each["pages"] / 2**30 == pytest.approx(5.62, abs=0.01)


def test_floors_take_the_slower_of_operations_and_bytes():
    load = full("longlive")
    compute = planner.steady_speed(load, Ceiling(500, math.inf, "given"))
    both = compute.transformer_flops + compute.decoder_flops
    assert compute.seconds == pytest.approx(both / 500e12)
    assert compute.fps == pytest.approx(12 / compute.seconds)
    traffic = planner.steady_speed(load, Ceiling(math.inf, 1000, "given"))
    # Five passes read the weights, twelve pages and write three; three frames read and write the decoder's state.
    least = 5 * (2 * 1.3e9 + 15 * memory(load).each["pages"] / 12) + 6 * memory(load).each["decoder_state"]
    assert least / 1e12 < traffic.seconds < 1.1 * least / 1e12
    slow = Ceiling(500, 100, "given")
    assert max(compute.seconds, 10 * traffic.seconds) <= planner.steady_speed(load, slow).seconds
    first = planner.first_speed(load, Ceiling(500, math.inf, "given"))
    assert first.frames == 9 and first.seconds < compute.seconds
    assert planner.prompt_seconds(load, slow) > planner.prompt_seconds(full("self-forcing"), slow) > 0


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_the_longest_window_is_the_longest(name):
    load = tiny(name)
    shortest = planner.shortest_window(load.preset)
    for frames in (shortest, shortest + 4):
        budget = needed(replace(load, preset=planner.with_window(load.preset, frames)))
        assert longest_window(load, budget) == frames
        assert longest_window(load, budget - 1) == (None if frames == shortest else frames - 1)
    with pytest.raises(UsageError):
        planner.with_window(load.preset, shortest - 1)


def test_sessions_share_what_is_there_once():
    load = full("longlive")
    for count in (1, 3):
        budget = needed(replace(load, sessions=count))
        assert planner.most_sessions(load, budget) == count
        assert planner.most_sessions(load, budget - 1) == count - 1
    assert planner.most_sessions(load, 10**9) == 0


def test_suggestions_say_what_would_fit():
    load = full("self-forcing", text=5_000_000_000, sessions=2, dtype="float32", kv_dtype="float32")
    actual = suggestions(load, 24 * 10**9)
    single, combined = actual[:-1], actual[-1]
    assert not any(change.fits for change in single) and combined.fits
    assert combined.options[:2] == ("--no-text-encoder", "--dtype bfloat16")
    assert all(change.needed < needed(load) for change in actual)
    load = full("krea", "wan-14b")
    assert not any("taehv" in option for change in suggestions(load, 10**9) for option in change.options)
    assert not any(change.fits for change in suggestions(load, 10**9))


def test_endless_windows_and_no_sessions_are_refused():
    with pytest.raises(UsageError, match="local_attn_size"):
        replace(full("longlive"), preset=make_preset("longlive", local_attn_size=-1))
    with pytest.raises(UsageError, match="sessions is 0"):
        full("longlive", sessions=0)
