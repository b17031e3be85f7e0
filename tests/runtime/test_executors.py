"""Every executor gives what `eager` gives, in every scheme; one capture serves a stream, its prompts and others."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref

import numpy as np
import pytest
import torch
from oracles import KINDS, ROWS, SIZE, TINY, make_engine, remade
from recording import FakeGraphs
from safetensors.torch import save_file

from inferix.errors import UsageError
from inferix.graphs.lowered import lower_block, with_pages
from inferix.kernels.own_forms import OwnForm
from inferix.models.registry import PRESETS
from inferix.models.wan.write_checkpoint import random_lora
from inferix.runtime.config import EngineConfig
from inferix.runtime.engine import Engine
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.noise import InjectedNoise, PhiloxNoise
from inferix.runtime.programs.warmup import graph_keys

OTHER = ROWS.flip(0) * 1.5
TOLERANCE = 1e-9  # float64; no rewrite: the same ops in the same order, so in fact equal
SMALL = {  # windows that roll within a few blocks
    "self-forcing": {"local_attn_size": 7},
    "self-forcing-framewise": {"local_attn_size": 3},
    "causal-forcing": {"local_attn_size": 6, "independent_first_frame": True},
    "causvid": {"segment_frames": 9},
    "longlive": {"local_attn_size": 9},
    "longlive-infinity": {"local_attn_size": 9},
    "krea": {},
    "longlive2": {"num_frame_per_block": 2, "local_attn_size": 6, "sink_size": 2},
    "rolling-forcing": {"num_frame_per_block": 1, "local_attn_size": 7, "sink_size": 1},
    "causal-diffusion": {"num_steps": 3, "local_attn_size": 6},
    "tinyworld": {"local_attn_size": 4},
    "causal-forcing-2step": {"local_attn_size": 3},
    "sgf-plus": {"num_frame_per_block": 1, "local_attn_size": 4, "sink_size": 1},
    "self-forcing-a14b": {"num_frame_per_block": 1, "local_attn_size": 3, "denoising_step_list": [1000, 500, 250]},
}
TWO_STEPS = {"denoising_step_list": [1000, 500]}
ONE_LAYER = dataclasses.replace(TINY, num_layers=1)
PASSWISE = {  # several blocks in flight, several branches of guidance or experts
    "rolling-forcing", "causal-diffusion", "self-forcing-a14b"
}


def stream(engine: Engine, blocks: int = 5, **given: object) -> torch.Tensor:
    """Latents of a stream whose prompt changes after two blocks."""
    if engine.preset.sampler.guidance_scale != 1:
        given["negative_embeds"] = OTHER
    with engine.open(prompt_embeds=ROWS.to(engine.dtype), size=SIZE, **given) as session:
        actual = [block.latents for block in session.stream(2, decode=False)]
        session.prompt(embeds=OTHER.to(engine.dtype))
        return torch.cat(actual + [block.latents for block in session.stream(blocks - 2, decode=False)])


def two_steps(preset: str) -> dict[str, object]:
    """Settings for two denoising steps; none where as many blocks are in flight as there are steps."""
    sampler = PRESETS[preset].sampler
    if preset in PASSWISE:
        return {}
    return {"num_steps": 2} if sampler.solver == "unipc" else {"denoising_step_list": sampler.denoising_step_list[:2]}


@pytest.mark.parametrize("all_steps", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["two", "all"])
@pytest.mark.parametrize("preset", sorted(KINDS))
def test_fused_equals_eager(preset: str, all_steps: bool) -> None:
    spec = TINY if preset in ("self-forcing", "longlive") else ONE_LAYER
    settings = SMALL[preset] | {"spec": spec} | ({} if all_steps else two_steps(preset))
    eager, fused = (make_engine(preset, executor=name, **settings) for name in ("eager", "fused"))
    expected, actual = stream(eager), stream(fused)
    assert (actual - expected).abs().max() <= TOLERANCE
    assert fused.executor.supports_whole_block == (preset not in PASSWISE)
    assert any(key.whole for key in fused.executor.loaded) == (preset not in PASSWISE)
    assert set(fused.executor.loaded) <= set(graph_keys(fused.spec, fused.preset, SIZE))


@pytest.mark.parametrize("acts", [True, False], ids=["actions", "no actions"])
def test_noise_of_another_scale(acts: bool) -> None:
    """Of all frames but those at rest; the same in one launch of a block, pass by pass, and as injected noise."""
    spec = dataclasses.replace(ONE_LAYER, actions=("stay", "left")) if acts else ONE_LAYER
    settings = {"spec": spec, "num_steps": 2, "noise_scale": 1.5}
    moves = [False, True, *[False] * 7, True, True]
    given = {"actions": ["left" if move else "stay" for move in moves[1:]]} if acts else {}
    eager, fused = (make_engine("tinyworld", executor=name, **settings) for name in ("eager", "fused"))
    expected, actual = (stream(engine, len(moves), **given) for engine in (eager, fused))
    assert (actual - expected).abs().max() <= TOLERANCE and any(key.whole for key in fused.executor.loaded)
    noise = PhiloxNoise(0).draw(0, range(len(moves)), 0, expected.shape[1:]).double()
    scales = torch.tensor([1.5 if move or not acts else 1.0 for move in moves], dtype=noise.dtype)
    plain = make_engine("tinyworld", **settings | {"noise_scale": 1})
    injected = stream(plain, len(moves), noise=InjectedNoise(noise * scales[:, None, None, None]), **given)
    assert (injected - expected).abs().max() <= TOLERANCE
    assert (stream(plain, len(moves), **given) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("preset", "kind"), [("self-forcing", "fp8"), ("longlive-infinity", "int8"), ("rolling-forcing", "bfloat16")]
)
def test_graphs_over_pages_in_fewer_bits(preset: str, kind: str) -> None:
    """Read as they lie, or through the buffer, a rotated sink; pass by pass too. Not what pages of all bits give."""
    backend = FakeGraphs()
    settings = {**SMALL[preset], "kv_dtype": kind, "spec": ONE_LAYER}
    settings |= {"local_attn_size": 6} if preset == "self-forcing" else {}
    expected, engine = stream(make_engine(preset, **settings)), captured_engine(backend, preset, **settings)
    assert (stream(engine) - expected).abs().max() <= TOLERANCE
    assert backend.captures == len(engine.executor.loaded)
    settings.pop("kv_dtype")
    assert (stream(make_engine(preset, **settings)) - expected).abs().max() > 1e-4
    asked = graph_keys(engine.spec, engine.preset, SIZE, staged=True)
    assert {dataclasses.replace(key, pages=0) for key in engine.executor.loaded} <= {
        dataclasses.replace(key, pages=0) for key in asked
    }


def test_a_difference_between_executors_is_seen() -> None:
    fused = make_engine(executor="fused", local_attn_size=6)
    expected = stream(make_engine(local_attn_size=6))
    with torch.no_grad():
        fused.parts.transformer.blocks[0].ffn.down.bias[0] += 1e-6
    assert (stream(fused) - expected).abs().max() > TOLERANCE


def test_float32_agrees_to_rounding() -> None:
    settings = {"dtype": "float32", "local_attn_size": 6}
    expected, actual = (stream(make_engine(executor=name, **settings)) for name in ("eager", "fused"))
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_block_that_is_partly_given_or_has_other_noise_goes_pass_by_pass() -> None:
    image = np.full((SIZE[1], SIZE[0], 3), 90, np.uint8)
    noise = InjectedNoise(torch.randn(6, 16, 4, 4).double(), torch.randn(2, 3, 3, 16, 4, 4).double())
    for preset, overrides, given, wholes in (
        ("longlive2", SMALL["longlive2"], {"image": image}, 1),  # only the first block holds the image
        ("self-forcing", {}, {"noise": noise}, 0),
        ("self-forcing", {}, {"video": np.repeat(image[None], 9, 0), "strength": 0.6}, 0),
    ):
        expected, actual = [], []
        for name, latents in (("eager", expected), ("fused", actual)):
            engine = make_engine(preset, executor=name, spec=ONE_LAYER, **overrides)
            with engine.open(prompt_embeds=ROWS, size=SIZE, **given) as session:
                latents += [block.latents for block in session.stream(1 + wholes, decode=False)]
        assert (torch.cat(actual) - torch.cat(expected)).abs().max() <= TOLERANCE
        assert sum(key.whole for key in engine.executor.loaded) == wholes
        if preset == "longlive2":  # the held frame and the other one are two groups; their commit is one
            assert {key.parts for key in engine.executor.loaded if not key.whole} == {((2, 1),), ((1, 2),)}


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (32, 16)])
def test_pictures_one_patch_wide_or_high(size: tuple[int, int]) -> None:
    settings = {"dtype": "float32", "spec": ONE_LAYER, **TWO_STEPS}
    expected, actual = (first_block(make_engine(executor=name, **settings), size) for name in ("eager", "fused"))
    assert (actual - expected).abs().max() <= 1e-4


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    """Output of executor eager in float32."""
    return stream(make_engine(dtype="float32", local_attn_size=6, **TWO_STEPS), 3)


@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.05), ("int8", 0.015)])
def test_linear_layers_in_low_precision(kind: str, most: float, plain: torch.Tensor) -> None:
    """Near eager's latents, by root mean square as a share of theirs; layers that are kept come nearer.

    And as near as with packed layers in plain modules.
    """

    def share(launched: int, **settings: object) -> float:
        eager, fused = (
            make_engine(dtype="float32", executor=name, local_attn_size=6, lowp=kind, **TWO_STEPS, **settings)
            for name in ("eager", "fused")
        )
        actual = stream(fused, 3)
        (body,) = [loaded.lowered.body.program for loaded in fused.executor.loaded.values()]
        assert sum("linear_lowp" in call.op.name() for call in body.calls) == launched
        assert off(actual, plain) == pytest.approx(off(stream(eager, 3), plain), rel=0.1)
        return off(actual, plain)

    layers, passes = TINY.num_layers, 3
    every = share(6 * layers * passes - 5)  # q, k and v are one; the last layer of the commit has no more
    all_but_first = share(6 * (layers - 1) * passes - 5, lowp_keep=("blocks.0.*",))
    assert 0 < all_but_first < every < most
    share(6 * layers * passes - 5, kv_dtype="fp8")


PACKED = (("blocks.*",), ("*",), ("blocks.*.self_attn.*", "*.up"))


def test_queries_in_fp8_over_fp8_pages(monkeypatch) -> None:
    """Through the plain form that rounds as `fp8_qk` does, which needs a GPU."""
    pytest.importorskip("triton", reason="Triton is not installed; pip install triton")
    from inferix.kernels.block_attention import SPEC as ATTENTION
    from inferix.kernels.block_attention.fp8_qk import reference

    monkeypatch.setitem(ATTENTION.own_forms, "rounded", OwnForm(ATTENTION.name, "rounded", reference, True))
    settings = {"dtype": "float32", "kv_dtype": "fp8", "local_attn_size": 6, "spec": ONE_LAYER, **TWO_STEPS}
    exact, low = (
        stream(make_engine(**settings, kernels={"block_attention": name})) for name in ("reference", "rounded")
    )
    assert 1e-4 < off(low, exact) < 0.01


@pytest.mark.parametrize(
    ("kind", "patterns"), [("fp8", PACKED), ("int8", PACKED[2:]), pytest.param("int8", PACKED, marks=pytest.mark.slow)]
)
def test_packed_layers_in_graphs_are_those_of_plain_modules(kind: str, patterns: tuple[tuple[str, ...], ...]) -> None:
    """After one pass. Longer streams part: a value at a tie that is rounded the other way turns others later."""
    settings: dict[str, object] = {"dtype": "float32", "denoising_step_list": (1000,)}
    full = first_block(make_engine(**settings))
    for layers in patterns:
        expected, actual = (
            first_block(make_engine(executor=name, lowp=kind, lowp_layers=layers, **settings))
            for name in ("eager", "fused")
        )
        assert off(actual, expected) < 0.1 * off(expected, full)


def first_block(engine: Engine, size: tuple[int, int] = SIZE) -> torch.Tensor:
    with engine.open(prompt_embeds=ROWS.to(engine.dtype), size=size) as session:
        (block,) = session.stream(1, decode=False)
    return block.latents


def off(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_packed_layers_follow_weights_and_leave_the_model_alone() -> None:
    engine = make_engine(dtype="float32", lowp="int8", local_attn_size=6)
    before = stream(engine, 3)
    assert not any("PackedLinear" in type(part).__name__ for part in engine.parts.transformer.modules())
    with torch.no_grad():
        engine.parts.transformer.blocks[0].ffn.down.weight.mul_(-1)
    changed = stream(engine, 3)
    assert not torch.equal(before, changed)
    fresh = make_engine(dtype="float32", lowp="int8", local_attn_size=6)
    fresh.parts.transformer.load_state_dict(engine.parts.transformer.state_dict())
    assert torch.equal(stream(fresh, 3), changed)


def captured_engine(backend: FakeGraphs, preset: str = "self-forcing", **overrides: object) -> Engine:
    """An engine whose executor captures on a fake; its pages are enough for three sessions."""
    engine = make_engine(preset, executor="fused", kv_memory=1 << 24, **overrides)
    return remade(engine, GraphExecutor(engine.config, engine.preset, engine.parts, backend))


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
def test_pages_that_grow_are_followed_without_a_trace_and_the_old_ones_are_let_go(kv_dtype: str | None) -> None:
    engine = make_engine(dtype="float32", executor="fused", local_attn_size=6, kv_dtype=kv_dtype)
    backend = FakeGraphs()
    engine = remade(engine, GraphExecutor(engine.config, engine.preset, engine.parts, backend))
    first = engine.open(prompt_embeds=ROWS.float(), size=SIZE)
    actual = [block.latents for block in first.stream(2, decode=False)]
    (store,) = engine.resources.worker.stores.values()
    pages, old = store.kv[0].shape[1], [weakref.ref(kv) for kv in store.kv]
    second = engine.open(prompt_embeds=OTHER.float(), size=SIZE)
    list(second.stream(1, decode=False))
    actual += [block.latents for block in first.stream(2, decode=False)]
    assert store.kv[0].shape[1] > pages and (engine.executor.traces, backend.captures) == (1, 2)
    assert {key.pages for key in engine.executor.loaded} == {store.kv[0].shape[1]}
    gc.collect()
    assert not any(kv() is not None for kv in old)
    plain = make_engine(dtype="float32", local_attn_size=6, kv_dtype=kv_dtype)
    with plain.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        expected = torch.cat([block.latents for block in session.stream(4, decode=False)])
    assert off(torch.cat(actual), expected) < 1e-3


@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "fp8"}, {"preset": "longlive-infinity"}])
def test_a_program_for_more_pages_is_what_lowering_gives(settings: dict[str, str]) -> None:
    engine = make_engine(executor="fused", dtype="float32", local_attn_size=6, spec=ONE_LAYER, **TWO_STEPS, **settings)
    for key in graph_keys(engine.spec, engine.preset, SIZE, staged="kv_dtype" in settings):
        more = dataclasses.replace(key, pages=key.pages + 5)
        assert with_pages(lower_block(engine.executor.graph_of(key)), more.pages) == lower_block(
            engine.executor.graph_of(more)
        )


def test_one_capture_serves_fifty_blocks_prompts_a_fork_a_rewind_new_weights_and_another_session() -> None:
    backend = FakeGraphs(idle=True)
    engine = captured_engine(backend, local_attn_size=6, rewind_blocks=2)
    first = engine.open(prompt_embeds=ROWS, size=SIZE)
    second = engine.open(prompt_embeds=OTHER, seed=2**63, size=SIZE)
    list(first.stream(20, decode=False))
    first.prompt(embeds=OTHER)
    list(first.stream(20, decode=False))
    list(second.stream(2, decode=False))
    fork = first.fork()
    first.rewind(38)
    for session in (fork, first, fork, second):
        list(session.stream(2, decode=False))
    with torch.no_grad():
        for weight in engine.parts.transformer.parameters():
            weight.mul_(1.001)
    engine.refresh_derived_weights()
    list(first.stream(2, decode=False))
    assert (backend.captures, backend.replays) == (1, 52)
    assert engine.executor.traces == 1
    for session in (first, second, fork):
        session.close()
    engine.check_integrity()


def test_an_adapter_goes_on_and_off_in_place(tmp_path) -> None:
    """Between blocks, on layers of every kind: what follows is what eager gives, and nothing is captured again."""
    time = {"lora_A": torch.ones(1, TINY.freq_dim) * 0.01, "lora_B": torch.ones(TINY.dim, 1)}  # in constants of graphs
    adapter = random_lora(TINY, 3) | {f"time_embedding.0.{part}.weight": tensor for part, tensor in time.items()}
    save_file(adapter, tmp_path / "lora.safetensors")
    backend, actual = FakeGraphs(), []
    for engine in (make_engine(local_attn_size=6), captured_engine(backend, local_attn_size=6)):
        weights = {name: weight.clone() for name, weight in engine.parts.transformer.named_parameters()}
        plain = stream(engine)
        with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
            made = [block.latents for block in session.stream(2, decode=False)]
            engine.use_lora(tmp_path / "lora.safetensors", 4.0)
            made += [block.latents for block in session.stream(2, decode=False)]
            with pytest.raises(UsageError, match="no LoRA"):
                engine.use_lora(tmp_path / "none.safetensors")
            with engine.open(prompt_embeds=ROWS, size=SIZE) as later:
                fresh = next(iter(later.stream(1, decode=False))).latents
            engine.use_lora(None)
            made += [block.latents for block in session.stream(1, decode=False)]
            early = engine.open(prompt_embeds=ROWS, size=SIZE)  # its prompt is encoded before the adapter is applied
            engine.use_lora(tmp_path / "lora.safetensors", 4.0)
            assert torch.equal(next(iter(early.stream(1, decode=False))).latents, fresh)
            engine.use_lora(None)
            early.close()
        assert (torch.cat(made)[:6] - plain[:6]).abs().max() == 0
        assert all(torch.equal(weights[name], now) for name, now in engine.parts.transformer.named_parameters())
        assert torch.equal(stream(engine), plain)
        actual.append(torch.cat(made))
    assert (actual[1] - actual[0]).abs().max() <= TOLERANCE
    with make_engine(local_attn_size=6).open(prompt_embeds=ROWS, size=SIZE) as session:
        without = torch.cat([block.latents for block in session.stream(5, decode=False)])
    assert (actual[0] - without)[6:12].abs().max() > 1e-3
    assert (backend.captures, engine.executor.traces, engine.executor.prompts) == (1, 1, 9)


def test_replays_give_what_eager_gives() -> None:
    backend = FakeGraphs()
    actual = stream(captured_engine(backend, local_attn_size=6))
    assert (actual - stream(make_engine(local_attn_size=6))).abs().max() <= TOLERANCE
    assert (backend.captures, backend.replays) == (1, 5)


MANY_SHAPES = {
    "local_attn_size": 9, "independent_first_frame": True, "denoising_step_list": [1000], "spec": ONE_LAYER
}  # fmt: skip


def test_captures_are_counted_by_query_shape() -> None:
    """A first block of one frame, the blocks after it, and each shape of re-cache pass: nothing else."""
    backend = FakeGraphs(idle=True)
    engine = captured_engine(backend, "longlive", **MANY_SHAPES)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        for _ in range(8):
            list(session.stream(1, decode=False))
            session.prompt(embeds=OTHER)
    shapes = {(key.whole, key.latent[0]) for key in engine.executor.loaded}
    assert shapes == {(True, 1), (True, 3), (False, 1), (False, 4), (False, 7), (False, 6)}
    assert backend.captures == len(shapes)


def test_the_prompt_graph_runs_once_for_each_prompt(monkeypatch) -> None:
    """Whatever reads it: blocks of both shapes, passes over the past under a new prompt. Forks share what it made."""
    backend = FakeGraphs(idle=True)
    engine = captured_engine(backend, "longlive", **MANY_SHAPES)
    run, launched = engine.executor.launcher.run, []

    def counted(bound, given):
        launched.extend(section.name for section in bound.launches.program.sections if section.name == "prompt")
        return run(bound, given)

    monkeypatch.setattr(engine.executor.launcher, "run", counted)
    runs, session = [], engine.open(prompt_embeds=ROWS, size=SIZE)
    for embeds in (None, OTHER, ROWS):
        if embeds is not None:
            session.prompt(embeds=embeds)
        list(session.stream(3, decode=False))
        runs.append(len(launched))
    assert runs == [1, 2, 3]
    assert len(engine.executor.loaded) > 2  # that many programs read it
    fork, other = session.fork(), engine.open(prompt_embeds=OTHER, size=SIZE)
    for one, after in ((fork, 3), (session, 3), (other, 4)):
        list(one.stream(2, decode=False))
        assert len(launched) == engine.executor.prompts == after
    prompt = other.current.branches[0].text.number
    engine.resources.worker.prompts[prompt].texts[engine.executor].cached.clear()  # the prompt graph must run again
    list(other.stream(1, decode=False))
    assert len(launched) == 5


def test_pages_that_move_are_followed() -> None:
    """Without a budget the store grows for a second session; the program is bound to the new pages."""
    engine = make_engine(executor="fused", local_attn_size=6)
    expected = stream(make_engine(local_attn_size=6))
    with engine.open(prompt_embeds=OTHER, size=SIZE) as other:
        list(other.stream(1, decode=False))
        assert (stream(engine) - expected).abs().max() <= TOLERANCE


def test_what_contradicts_is_refused() -> None:
    def config(**changes: object) -> EngineConfig:
        plain = EngineConfig.of("test", "self-forcing", device="cpu", dtype="float32")
        return dataclasses.replace(plain, **changes)

    with pytest.raises(UsageError, match=r"executor 'captured'.*cuda.*'cpu'"):
        config(executor="captured")
    with pytest.raises(UsageError, match=r"executor is 'fuse'.*'fused'"):
        config(executor="fuse")
    with pytest.raises(UsageError, match=r"'fp4'.*fp8, int8"):
        config(executor="fused", lowp="fp4")
    with pytest.raises(UsageError, match=r"lowp_layers.*lowp_keep"):
        config(executor="fused", lowp_keep=("head",))
    for executor, name in (("fused", "blok.*"), ("eager", "blok.*"), ("eager", "time_embedding.*")):
        with pytest.raises(UsageError, match=rf"'{re.escape(name)}'.*'blocks.0.cross_attn.k'"):
            make_engine(executor=executor, lowp="int8", lowp_layers=(name,))
