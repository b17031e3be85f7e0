"""Presets that run several sets of weights: a memory set for commits (SGF+), and experts by noise level (Wan 2.2)."""

import copy
import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from oracles import ROWS, SIZE, TINY, FrameAttention, make_engine, run
from safetensors.torch import save_file
from torch import Tensor

from inferix.errors import UsageError
from inferix.export.targets import TARGETS, check_target
from inferix.graphs.rewrites import chosen, rewritten
from inferix.graphs.types import OF_SET, Role
from inferix.graphs.validate import validate
from inferix.kernels.attention import attention
from inferix.kernels.rope import rope_angles, rotate
from inferix.models.family import Checkpoint
from inferix.models.registry import MODELS, PRESETS, make_preset
from inferix.models.wan.checkpoint import merging
from inferix.models.wan.write_checkpoint import random_lora
from inferix.runtime.engine import Engine
from inferix.runtime.load import load
from inferix.runtime.plans import PassPlan
from inferix.runtime.programs.block_graph import BlockGraphBuilder
from inferix.runtime.sampler import Sampler
from inferix.runtime.sessions.session import Session
from inferix.schemes.page_needs import conditionings
from inferix.schemes.timeline import Span

GRID = (2, 2)
Row = tuple[tuple[int, ...], tuple[int, ...]]  # frames that a frame sees, and their positions


class OverPast:
    """The last frames of `rows` attend to given keys and values of the frames before them, and to their own."""

    def __init__(self, past: list[tuple[Tensor, Tensor]], rows: list[Row], tokens: int) -> None:
        self.past, self.rows, self.tokens = past, rows, tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (-1, self.tokens)) for part in (q, k, v))
        before = len(self.rows) - q.shape[1]
        keys, values = (torch.cat(pair, dim=1) for pair in zip(self.past[layer], (k, v), strict=True))
        out = []
        for frame, (context, positions) in enumerate(self.rows[before:]):
            here = positions[context.index(before + frame)]
            angles, all_angles = (rope_angles(p, *GRID, q.shape[-1]) for p in ([here], positions))
            seen, read = keys[:, list(context)].flatten(1, 2), values[:, list(context)].flatten(1, 2)
            out.append(attention(rotate(q[:, frame], angles), rotate(seen, all_angles), read))
        return torch.cat(out, dim=1)


def dense_block(engine: Engine, past: Tensor, span: Span, rows: list[Row]) -> Tensor:
    """A block by dense calls: one over the clean past by the weights that commit it, then one for each step.

    rows: of the frames of past and block, as each saw them when it was committed.
    """
    preset, models = engine.preset, engine.parts.transformers
    embeds = engine.inputs.prompt_rows(None, ROWS)[None]
    sampler, pasts = Sampler(preset.sampler), dict[int, list[tuple[Tensor, Tensor]]]()
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        noise = [engine.loop.draw(session.current, span, step) for step in range(len(sampler.timesteps))]
    x, solver = noise[0], sampler.begin()
    for step, timestep in enumerate(sampler.timesteps):
        expert = int(timestep < 1000 * preset.sampler.boundary_ratio)
        if expert not in pasts:
            by = models[-1] if preset.context.clean_weights == "memory" else models[expert]
            kv = FrameAttention(rows[: len(past)], GRID)
            by(past[None], torch.zeros(1, len(past)), by.embed_text(embeds), kv)
            pasts[expert] = [
                tuple(part.unflatten(1, (-1, kv.tokens)) for part in layer) for layer in kv.seen  # type: ignore[misc]
            ]
        attends = OverPast(pasts[expert], rows, GRID[0] * GRID[1])
        times = torch.full((1, len(x)), timestep, dtype=torch.float32)
        model = models[expert]
        velocity = model(x[None], times, model.embed_text(embeds), attends)[0]
        x = solver.advance(x, velocity, step, lambda step=step: noise[step + 1])
    return x


def visible(engine: Engine, blocks: int) -> list[Row]:
    """Rows of all frames of `blocks` blocks, from the definition: sink, then the last frames of the window."""
    policy, step, rows = engine.preset.context, engine.preset.num_frame_per_block, list[Row]()
    for end in range(step, blocks * step + 1, step):
        recent = max(0, end - policy.local_attn_size + policy.sink_size)
        seen = tuple(range(end)) if end <= policy.local_attn_size else (*range(policy.sink_size), *range(recent, end))
        rows += [(seen, tuple(range(len(seen))) if policy.positions == "window-relative" else seen)] * step
    return rows


CASES = {  # overrides that make the window roll within the blocks
    "sgf": (6, {}),
    "sgf-framewise": (7, {"local_attn_size": 6}),
    "sgf-plus": (6, {}),
    "sgf-plus-framewise": (7, {"local_attn_size": 6}),
    "self-forcing-a14b": (4, {"num_frame_per_block": 2, "local_attn_size": 6}),
    "causal-forcing-framewise": (4, {"local_attn_size": 3}),
    "causal-forcing-2step": (4, {"local_attn_size": 3}),
    "causal-forcing-1step": (4, {"local_attn_size": 3}),
}


SLOW = pytest.mark.slow
FUSED = {"sgf-plus", "self-forcing-a14b"}  # in the quick tests


@pytest.mark.parametrize(
    ("name", "executor"),
    [
        *((name, "eager") for name in CASES),
        *(pytest.param(name, "fused", marks=() if name in FUSED else SLOW) for name in CASES),
    ],
)
@torch.no_grad()
def test_the_last_block_equals_dense_calls(name, executor):
    blocks, overrides = CASES[name]
    engine = make_engine(name, executor=executor, **overrides)
    made = [block.latents for block in run(engine, blocks)]
    step = engine.preset.num_frame_per_block
    span = Span(blocks - 1, range((blocks - 1) * step, blocks * step))
    want = dense_block(engine, torch.cat(made[:-1]), span, visible(engine, blocks))
    assert (made[-1] - want).abs().max() <= 1e-10


@pytest.mark.parametrize("name", ["sgf-plus", "self-forcing-a14b"])
@torch.no_grad()
def test_one_set_of_weights_in_place_of_two_does_not_go_unseen(name):
    """The same comparison fails where commits, or the steps of low noise, take the first set."""
    blocks, overrides = CASES[name]
    engine = make_engine(name, **overrides)
    made = [block.latents for block in run(engine, blocks)]
    step = engine.preset.num_frame_per_block
    span = Span(blocks - 1, range((blocks - 1) * step, blocks * step))
    one = dataclasses.replace(engine.parts, more=(engine.parts.transformer,))
    engine.resources = dataclasses.replace(engine.resources, parts=one)
    wrong = dense_block(engine, torch.cat(made[:-1]), span, visible(engine, blocks))
    assert (made[-1] - wrong).abs().max() > 1e-4


def sets_run(engine: Engine, blocks: int) -> list[list[tuple[int, float]]]:
    """(set of weights, timestep) of each pass of each block."""
    ran, execute = [], engine.resources.client.execute

    def note(plan, *tensors):
        if isinstance(plan, PassPlan):
            ran.append((plan.weights, plan.timesteps[0][0]))
        return execute(plan, *tensors)

    engine.resources.client.execute = note
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        made = []
        for _ in range(blocks):
            list(session.stream(1, decode=False))
            made.append(list(ran))
            ran.clear()
    return made


def test_a_memory_set_runs_commits_and_an_image():
    engine = make_engine("sgf-plus-framewise")
    assert [number for number, _ in sets_run(engine, 2)[1]] == [0, 0, 0, 0, 1]
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    ran, execute = [], engine.resources.worker.execute
    engine.resources.worker.execute = lambda plan, tensors=(): (ran.append(plan), execute(plan, tensors))[1]
    engine.open(prompt_embeds=ROWS, size=SIZE, image=image).close()
    assert [plan.weights for plan in ran if isinstance(plan, PassPlan)] == [1]


def test_experts_change_at_the_boundary_and_both_commit():
    engine = make_engine("self-forcing-a14b")
    block = sets_run(engine, 1)[0]
    assert [number for number, _ in block] == [0, 0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert [timestep for _, timestep in block[3:5]] == pytest.approx([936.1702, 865.9794], abs=1e-3)
    assert [timestep for _, timestep in block[8:]] == [0, 0]
    at = make_engine("self-forcing-a14b", denoising_step_list=[1000, 500], timestep_shift=1.0, boundary_ratio=0.5)
    assert [number for number, _ in sets_run(at, 1)[0]] == [0, 0, 0, 1]  # the boundary itself is high noise


def test_forks_and_saved_sessions_go_on_bit_for_bit(tmp_path):
    for name in ("sgf-plus", "self-forcing-a14b"):
        engine = make_engine(name, num_frame_per_block=1, local_attn_size=4, sink_size=1)
        with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
            list(session.stream(2, decode=False))
            session.save(tmp_path / f"{name}.safetensors")
            with session.fork() as fork:
                forked = [block.latents for block in fork.stream(2, decode=False)]
            went_on = [block.latents for block in session.stream(2, decode=False)]
        with Session.restore(engine, tmp_path / f"{name}.safetensors") as session:
            restored = [block.latents for block in session.stream(2, decode=False)]
        for others in (forked, restored):
            assert all(torch.equal(one, other) for one, other in zip(went_on, others, strict=True))


def test_random_sets_differ():
    engine = load("wan-tiny", "sgf-plus", device="cpu", dtype="float32", force=True)
    first, second = (module.head.linear.weight for module in engine.parts.transformers)
    assert not torch.equal(first, second)


def latents(engine: Engine, blocks: int = 2) -> Tensor:
    return torch.cat([block.latents for block in run(engine, blocks)])


@pytest.mark.parametrize("name", ["sgf-plus", pytest.param("self-forcing-a14b", marks=SLOW)])
def test_an_adapter_changes_the_sets_that_are_named(name, tmp_path):
    """In both executors, and as weights that were merged before; it comes off exactly."""
    settings = {"num_frame_per_block": 1, "local_attn_size": 4, "denoising_step_list": (1000, 250)}
    settings |= {"spec": dataclasses.replace(TINY, num_layers=1)} | ({"sink_size": 1} if name == "sgf-plus" else {})
    file, sets = tmp_path / "lora.safetensors", PRESETS[name].weight_sets
    save_file(random_lora(settings["spec"], 3), file)
    eager, fused = (make_engine(name, executor=executor, **settings) for executor in ("eager", "fused"))
    plain = latents(fused)
    results = []
    for weights in (None, *sets):
        for engine in (eager, fused):
            engine.use_lora(file, 8.0, weights=weights)
        results.append(latents(eager))
        assert (latents(fused) - results[-1]).abs().max() <= 1e-10
        merged = dataclasses.replace(eager.parts, **merged_copies(eager, file, 8.0, weights))
        assert torch.equal(latents(Engine(eager.config, eager.preset, merged)), results[-1])
        for engine in (eager, fused):
            engine.use_lora(None)
    assert torch.equal(latents(fused), plain)
    assert all((one - other).abs().max() > 1e-4 for one, other in pairwise([plain, *results]))
    with pytest.raises(UsageError, match=rf"weights is 'late'.*{sets[1]}"):
        eager.use_lora(file, weights="late")


def merged_copies(engine: Engine, file: Path, scale: float, weights: str | None) -> dict[str, object]:
    """The engine's sets of weights as they are, in copies with an adapter merged by the checkpoints' own way."""
    engine.use_lora(None)
    copies = [copy.deepcopy(module) for module in engine.parts.transformers]
    for number, module in enumerate(copies):
        if weights in (None, engine.preset.weight_sets[number]):
            state = module.state_dict()
            change = merging(Checkpoint(file, "test", (file,), state, module.spec, None), [(file, scale)])
            module.load_state_dict({key: change(key, tensor) for key, tensor in state.items()})
    return {"transformer": copies[0], "more": tuple(copies[1:])}


def test_an_adapter_of_a_load_is_in_every_set(tmp_path):
    save_file(random_lora(MODELS["wan-tiny"], 3), tmp_path / "lora.safetensors")
    settings = {"device": "cpu", "dtype": "float32", "force": True}
    plain = load("wan-tiny", "sgf-plus", **settings)
    changed = load("wan-tiny", "sgf-plus", lora=tmp_path / "lora.safetensors", **settings)
    pairs = zip(plain.parts.transformers, changed.parts.transformers, strict=True)
    assert [torch.equal(one.blocks[0].ffn.up.weight, other.blocks[0].ffn.up.weight) for one, other in pairs] == [
        False, False
    ]  # fmt: skip


def test_sets_share_a_launcher():
    """Passes of the second set are the programs of the first over its weights; a block of both is one graph."""
    engine = make_engine("sgf-plus-framewise", executor="fused", spec=dataclasses.replace(TINY, num_layers=1))
    first, second = engine.resources.executors
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    with engine.open(prompt_embeds=ROWS, size=SIZE, image=image) as session:
        list(session.stream(1, decode=False))
    assert first.launcher is second.launcher and (first.traces, second.traces) == (1, 1)
    assert [key.whole for key in first.loaded] == [True] and [key.whole for key in second.loaded] == [False]
    names = {buffer.name for loaded in second.loaded.values() for buffer in loaded.lowered.body.program.of(Role.WEIGHT)}
    assert names and all(name.endswith(f"{OF_SET}1") for name in names)
    assert second.bytes_by_owner() == {} != first.bytes_by_owner()


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("self-forcing-a14b", {"boundary_ratio": 1.0}, "boundary_ratio is 1.0"),
        ("self-forcing-a14b", {"guidance_scale": 5.0}, "guidance_scale 5.0"),
        ("self-forcing-a14b", {"image": "clamp"}, "image 'clamp'"),
        ("self-forcing-a14b", {"clean_weights": "memory"}, "clean_weights 'memory'"),
        ("rolling-forcing", {"boundary_ratio": 0.875}, "window_blocks is 5"),
        ("magi-tiny-distill", {"boundary_ratio": 0.875}, "boundary_ratio is 0.875"),
        ("magi-tiny", {"clean_weights": "memory"}, "clean_weights is 'memory'"),
        ("sgf", {"clean_weights": "other"}, "clean_weights is 'other'"),
    ],
)
def test_settings_that_need_two_sets_at_once_are_refused(name, settings, named):
    with pytest.raises(UsageError, match=named):
        make_preset(name, **settings)


@pytest.mark.slow
def test_the_graph_of_a_block_reads_both_sets():
    """A pass reads the weights of its set alone; the graph stays one that executors accept."""
    preset = make_preset("sgf-plus-framewise", local_attn_size=6)
    spec = dataclasses.replace(TINY, num_layers=1)
    block = rewritten(BlockGraphBuilder(spec, preset, SIZE, torch.float64).build(), chosen())
    validate(block)
    for graph in block.passes:
        names = [value.name for value in graph.named(Role.WEIGHT).values()]
        assert names and {name.endswith(f"{OF_SET}1") for name in names} == {graph.name == "commit"}
    assert {"blocks.0.cross_attn.k.weight", f"blocks.0.self_attn.k.weight{OF_SET}1"} <= set(block.values(Role.WEIGHT))


def test_an_export_of_two_experts_is_refused_by_the_table():
    for target in TARGETS.values():
        with pytest.raises(UsageError, match=rf"{target.name}.*self-forcing-a14b.*two experts"):
            check_target(target, make_preset("self-forcing-a14b"), "float32", unroll=False)
        check_target(target, make_preset("sgf-plus"), "float32", unroll=False)


@pytest.mark.parametrize("frames", [3, 7])
def test_blocks_of_other_published_sizes_are_settings(frames):
    preset = make_preset("self-forcing-a14b", num_frame_per_block=frames, local_attn_size=21)
    assert (preset.block_size(0), preset.blocks_for_frames(21)) == (frames, 21 // frames)


def test_sets_and_conditionings_of_presets():
    named = {name: PRESETS[name].weight_sets for name in ("sgf", "sgf-plus", "self-forcing-a14b")}
    assert list(named.values()) == [("plain",), ("plain", "memory"), ("high-noise", "low-noise")]
    assert [conditionings(PRESETS[name]) for name in named] == [1, 2, 2]
