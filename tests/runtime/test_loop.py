"""The block loop against dense masked passes in float64, its window table, and streams without an end."""

import gc

import pytest
import torch
from oracles import ROWS, SIZE, TINY, TOKENS, DenseAttention, frame_mask, make_engine, run

from inferix.errors import InferixError, UsageError
from inferix.graphs.passes import Group, Pass
from inferix.kernels.rope import rope_angles
from inferix.models.registry import make_preset
from inferix.models.solvers import noised
from inferix.runtime.noise import InjectedNoise
from inferix.runtime.sampler import Sampler
from inferix.schemes.timeline import Span, Timeline


def dense_velocity(engine, latents, timesteps, contexts, positions):
    """One call over all frames, each row of frames under its own context."""
    model = engine.parts.transformer
    text = model.embed_text(engine.inputs.prompt_rows(None, ROWS)[None])
    kv = DenseAttention(rope_angles(positions, 2, 2, TINY.head_dim), frame_mask(contexts, TOKENS))
    return model(latents[None], torch.tensor([timesteps]), text, kv)[0]


def dense_block(engine, past, index, contexts):
    """A 3-frame block denoised by dense masked passes over the clean past and itself; no cache, no solver."""
    sampler = Sampler(engine.preset.sampler)
    span = Span(index, range(len(past), len(past) + 3))
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        draws = [engine.loop.draw(session.current, span, step) for step in range(len(sampler.timesteps))]
    x = draws[0]
    for step, (timestep, sigma) in enumerate(zip(sampler.timesteps, sampler.sigmas, strict=True)):
        if step:
            x = noised(x, draws[step], sigma)
        timesteps = [0.0] * len(past) + [timestep] * 3
        velocity = dense_velocity(engine, torch.cat((past, x)), timesteps, contexts, range(len(past) + 3))
        x = x - sigma * velocity[len(past) :]
    return x


@pytest.mark.parametrize("index", [1, 3])
@torch.no_grad()
def test_cached_generation_equals_one_dense_block_causal_pass(index):
    """Clean past and noisy block in one masked call give each step's velocity, hence the same block."""
    engine = make_engine()
    blocks = run(engine, index + 1)
    past = torch.cat([block.latents for block in blocks[:index]])
    end = index * 3 + 3
    contexts = [tuple(range(frame // 3 * 3 + 3)) for frame in range(end)]
    assert (dense_block(engine, past, index, contexts) - blocks[index].latents).abs().max() <= 1e-10


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (9, 3), (7, 2), (4, 1), (3, 0)])
@torch.no_grad()
def test_window_and_sink_equal_a_dense_pass_with_the_same_mask(window, sink):
    engine = make_engine(local_attn_size=window, sink_size=sink)
    blocks = run(engine, 5)
    end = 15
    contexts = [Timeline(engine.preset).visible(frame // 3 * 3 + 3) for frame in range(end)]
    past = torch.cat([block.latents for block in blocks[:-1]])
    assert (dense_block(engine, past, 4, contexts) - blocks[4].latents).abs().max() <= 1e-10
    unbounded = make_engine(local_attn_size=-1)
    assert (run(unbounded, 5)[4].latents - blocks[4].latents).abs().max() > 1e-6  # the window did something


@pytest.mark.parametrize(
    ("window", "sink", "expected"),
    [
        (6, 0, {1: range(6), 3: range(6, 12), 8: range(21, 27)}),
        (9, 3, {1: range(6), 3: (0, 1, 2, *range(6, 12)), 8: (0, 1, 2, *range(21, 27))}),
        (12, 3, {1: range(6), 3: range(12), 8: (0, 1, 2, *range(18, 27))}),
        (21, 0, {1: range(6), 3: range(12), 8: range(6, 27)}),
    ],
)
def test_attended_frames(window, sink, expected):
    timeline = Timeline(make_preset("self-forcing", local_attn_size=window, sink_size=sink))
    for block, frames in expected.items():
        assert timeline.visible(block * 3 + 3) == tuple(frames)


@pytest.mark.parametrize("positions", ["absolute", "window-relative"])
@torch.no_grad()
def test_groups_in_one_pass_equal_passes_one_by_one(positions):
    """The commit of one block and the first step of the next, in one call with two timesteps and two contexts."""
    engine = make_engine(positions=positions, local_attn_size=-1)
    clean, noisy = (torch.randn(3, 16, 4, 4, dtype=torch.float64) for _ in range(2))
    first = Group((0, 1, 2), 0.0, (0, 1, 2), (0, 1, 2))
    second = Group((3, 4, 5), 1000.0, tuple(range(6)), tuple(range(6)))
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        session.current.branches[0].cache.set_window(tuple(range(6)))
        together = engine.loop.velocity(session.current, Pass((first, second)), torch.cat((clean, noisy)))
        keys = session.current.branches[0].cache.export_pages().kv
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        session.current.branches[0].cache.set_window(tuple(range(6)))
        pairs = ((first, clean), (second, noisy))
        apart = [engine.loop.velocity(session.current, Pass((group,)), x) for group, x in pairs]
        assert (torch.cat(apart) - together).abs().max() <= 1e-10
        assert (session.current.branches[0].cache.export_pages().kv - keys).abs().max() <= 1e-10


@torch.no_grad()
def test_a_group_that_does_not_write_leaves_the_cache_as_it_was():
    engine = make_engine()
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        session.current.branches[0].cache.set_window(tuple(range(3)))
        written = engine.loop.velocity(session.current, Pass((Group((0, 1, 2), 500.0, (0, 1, 2), (0, 1, 2)),)), x)
        before = session.current.branches[0].cache.export_pages().kv
        reading = Pass((Group((0, 1, 2), 500.0, (0, 1, 2), (0, 1, 2), write=False),))
        read = engine.loop.velocity(session.current, reading, x)
        mixed = Pass((Group((0, 1), 700.0, (0, 1), (0, 1)), Group((2,), 500.0, (2,), (2,), write=False)))
        other = engine.loop.velocity(session.current, mixed, x)
        assert torch.equal(written, read)
        assert not torch.equal(other, read)
        after = session.current.branches[0].cache.export_pages().kv
        assert torch.equal(before[:, :, 2], after[:, :, 2]) and not torch.equal(before[:, :, :2], after[:, :, :2])


@torch.no_grad()
def test_window_relative_positions_equal_absolute_ones_until_the_window_rolls():
    absolute = run(make_engine(local_attn_size=9, sink_size=3), 5)
    relative = run(make_engine(local_attn_size=9, sink_size=3, positions="window-relative"), 5)
    for block in range(3):
        assert (absolute[block].latents - relative[block].latents).abs().max() <= 1e-10
    assert (absolute[4].latents - relative[4].latents).abs().max() > 1e-6


@torch.no_grad()
def test_without_a_sink_window_relative_positions_change_nothing():
    """Rotary attention knows differences only."""
    absolute = run(make_engine(local_attn_size=6), 6)
    relative = run(make_engine(local_attn_size=6, positions="window-relative"), 6)
    assert (absolute[5].latents - relative[5].latents).abs().max() <= 1e-8


def test_a_stream_runs_past_frame_1024_in_flat_memory():
    engine = make_engine(
        dtype="float32", num_frame_per_block=12, local_attn_size=18, sink_size=3, positions="window-relative",
        denoising_step_list=[1000],
    )  # fmt: skip
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE) as session:
        sizes, tensors = [], []
        for block in session.stream(88, decode=False):
            assert block.latents.isfinite().all()
            if block.index in (20, 87):
                gc.collect()
                sizes.append(session.current.branches[0].cache.nbytes + len(session.current.timeline.places))
                tensors.append(sum(torch.is_tensor(item) for item in gc.get_objects()))
        assert session.current.timeline.next_frame == 1056
    assert sizes[0] == sizes[1]
    assert tensors[1] <= tensors[0] + 2


def test_the_same_seed_gives_the_same_latents_and_another_seed_others():
    engine = make_engine()
    first, again, other = run(engine, 2), run(engine, 2), run(engine, 2, seed=1)
    assert torch.equal(first[1].latents, again[1].latents)
    assert not torch.equal(first[0].latents, other[0].latents)


def test_injected_noise_replaces_every_draw():
    engine = make_engine()
    with engine.open(prompt_embeds=ROWS, size=SIZE, seed=4) as session:
        spans = [session.current.timeline.admit(), session.current.timeline.admit()]
        draw, state = engine.loop.draw, session.current
        initial = torch.cat([draw(state, span, 0) for span in spans])
        renoise = torch.stack([torch.stack([draw(state, span, s) for s in (1, 2, 3)]) for span in spans])
    injected = run(engine, 2, noise=InjectedNoise(initial, renoise))
    assert torch.equal(injected[1].latents, run(engine, 2, seed=4)[1].latents)
    with pytest.raises(UsageError, match="injected noise"):
        run(engine, 3, noise=InjectedNoise(initial, renoise))


@torch.no_grad()
def test_independent_first_frame_and_an_image_prefix():
    engine = make_engine(dtype="float32", independent_first_frame=True)
    assert [len(block.latents) for block in run(engine, 3)] == [1, 3, 3]
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, image=image) as session:
        assert len(session.prefix_frames) == 1
        blocks = list(session.stream(2))
    assert [len(block.latents) for block in blocks] == [3, 3]
    assert [len(block.frames) for block in blocks] == [12, 12]
    assert session.prefix_frames.shape == (1, 32, 32, 3)
    with pytest.raises(UsageError, match="independent_first_frame"):
        make_engine().open(prompt_embeds=ROWS, size=SIZE, image=image)


@torch.no_grad()
def test_a_generated_video_as_prefix_continues_like_the_stream_itself():
    engine = make_engine(local_attn_size=9)
    blocks = run(engine, 4)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        engine.loop.cache_prefix(session.current, torch.cat([block.latents for block in blocks[:3]]))
        session.current.timeline.next_block = 3
        (block,) = session.stream(1, decode=False)
    assert torch.equal(block.latents, blocks[3].latents)


@torch.no_grad()
def test_a_video_prefix_keeps_its_end():
    engine = make_engine(dtype="float32")
    video = torch.randint(0, 256, (16, 32, 32, 3), dtype=torch.uint8).numpy()
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, video=video) as session:
        assert session.current.timeline.next_frame == 3
        assert len(session.prefix_frames) == 9
        shorter, _ = engine.inputs.prefix_latents(None, video[-9:], SIZE)
        whole, left = engine.inputs.prefix_latents(None, video, SIZE)
        assert torch.equal(whole, shorter) and left is None


def test_seconds_to_blocks():
    engine = make_engine()
    assert engine.blocks_for(81 / 16) == 7
    assert engine.blocks_for(0.1) == 1
    assert engine.blocks_for(1e300) > 1e298  # at once
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="seconds"):
            engine.blocks_for(seconds)


@pytest.mark.parametrize("blocks", [0, -1, 1.5, "2", True])
def test_bad_block_counts(blocks):
    with make_engine().open(prompt_embeds=ROWS, size=SIZE) as session, pytest.raises(UsageError, match="blocks"):
        next(session.stream(blocks))


def test_a_closed_session_says_so():
    session = make_engine().open(prompt_embeds=ROWS, size=SIZE)
    session.close()
    with pytest.raises(InferixError, match="closed"):
        session.close()
    with pytest.raises(InferixError, match="closed"):
        next(session.stream(1))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"local_atn_size": 6}, "'local_attn_size'"),
        ({"local_attn_size": 2}, "local_attn_size 2 "),
        ({"sink_size": 20}, "sink_size"),
        ({"num_frame_per_block": 1.5}, "num_frame_per_block.*1.5"),
        ({"num_frame_per_block": 0}, "num_frame_per_block.*0"),
        ({"independent_first_frame": 1}, "independent_first_frame.*1"),
        ({"positions": "relativ"}, "window-relative"),
        ({"denoising_step_list": "1000"}, "denoising_step_list"),
        ({"timestep_shift": 0}, "timestep_shift"),
    ],
)
def test_bad_settings(overrides, named):
    with pytest.raises(UsageError, match=named):
        make_preset("self-forcing", **overrides)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="'self-forcing'"):
        make_preset("selfforcing")
