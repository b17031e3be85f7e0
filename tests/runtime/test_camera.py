"""Worlds that a camera steers, in float64: the block loop against dense passes, and cameras in sessions."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from oracles import ROWS, SIZE, TINY, TOKENS, DenseAttention, frame_mask, make_engine, remade, walk
from recording import FakeGraphs
from thread_ranks import difference, pair

from inferix.errors import UsageError
from inferix.kernels.rope import rope_angles
from inferix.models.registry import MODELS, make_preset
from inferix.models.solvers import noised
from inferix.models.wan.transformer import Block, WanTransformer
from inferix.runtime.execution.executors import GraphExecutor
from inferix.runtime.frame_channels import ImageCondition, frame_channels
from inferix.runtime.sampler import Sampler
from inferix.runtime.sessions.batch_profile import BatchProfile
from inferix.runtime.sessions.saved_values import InvalidField
from inferix.runtime.sessions.session import Session
from inferix.runtime.sessions.session_state import CameraForm, SavedFields
from inferix.schemes import layouts
from inferix.schemes.camera import Camera, CameraMove
from inferix.schemes.timeline import Span, Timeline

SPEC = dataclasses.replace(
    TINY, in_channels=MODELS["lingbot-tiny"].in_channels, camera_channels=MODELS["lingbot-tiny"].camera_channels
)
SHORT = {"spec": dataclasses.replace(SPEC, num_layers=1), "denoising_step_list": [1000]}  # traced in little time
IMAGE = np.random.default_rng(1).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
CAMERA = Camera(poses=walk(16, step=0.4), rate="latent", intrinsics=(30, 30, 16, 16), size=SIZE)
BLOCK = {"num_frame_per_block": 2, "local_attn_size": 6, "sink_size": 1}


def camera_engine(**settings):
    return make_engine("lingbot-v2", **{"spec": SPEC} | BLOCK | settings)


def opened(engine, camera=CAMERA, **settings):
    return engine.open(prompt_embeds=ROWS.to(engine.dtype), size=SIZE, image=IMAGE, camera=camera, **settings)


def latents_of(engine, blocks, camera=CAMERA):
    with opened(engine, camera) as session:
        return [block.latents for block in session.stream(blocks, decode=False)]


def dense_block(engine, past, index, contexts):
    """A block denoised by dense masked passes over the clean past and itself; no cache, no kept constants."""
    sampler, model, size = Sampler(engine.preset.sampler), engine.parts.transformer, engine.preset.num_frame_per_block
    end = len(past) + size
    with opened(engine) as session:
        state, span = session.current, Span(index, range(len(past), end))
        draws = [engine.loop.draw(state, span, step) for step in range(len(sampler.timesteps))]
        channels = frame_channels(SPEC, state.image, state.camera, range(end), past)[None]
    text = model.embed_text(engine.inputs.prompt_rows(None, ROWS)[None])
    frames = model.embed_frames(channels, each_layer=False)
    kv = DenseAttention(rope_angles(range(end), 2, 2, SPEC.head_dim), frame_mask(contexts, TOKENS))
    x, schedule = draws[0], sampler.schedule
    for step, timestep in enumerate(schedule.timesteps):
        if step:
            x = noised(x, draws[step], schedule.added[step])
        times = torch.tensor([[0.0] * len(past) + [timestep] * size])
        velocity = model(torch.cat((past, x))[None], times, text, kv, frames=frames)[0]
        x = x - schedule.sigmas[step] * velocity[len(past) :]
    return x


@pytest.mark.parametrize(("executor", "most"), [("eager", 1e-10), ("fused", 1e-6)])
@torch.no_grad()
def test_cached_generation_equals_a_dense_pass_across_an_eviction_inside_a_block(executor, most):
    engine = camera_engine(executor=executor)
    blocks = latents_of(engine, 5)
    contexts = [Timeline(engine.preset).visible(frame // 2 * 2 + 2) for frame in range(10)]
    assert contexts[-1] == (0, 5, 6, 7, 8, 9)  # frame 4, of the block 4 and 5, is gone
    want = dense_block(camera_engine(), torch.cat(blocks[:4]), 4, contexts)
    assert (want - blocks[4]).abs().max() <= most
    assert (latents_of(engine, 5, Camera(intrinsics=CAMERA.intrinsics))[4] - blocks[4]).abs().max() > 1e-3


@pytest.mark.parametrize("executor", ["eager", "fused"])
def test_what_a_camera_decides_once_for_a_block_equals_once_for_each_pass(executor):
    once, each = (latents_of(camera_engine(executor=executor, camera_layers=how), 2) for how in ("block", "pass"))
    assert all((one - other).abs().max() <= 1e-10 for one, other in zip(once, each, strict=True))


@torch.no_grad()
def test_zeroed_camera_layers_change_nothing_to_the_bit():
    plain = WanTransformer(dataclasses.replace(SPEC, camera_channels=None)).double()
    engine = camera_engine()
    model = engine.parts.transformer
    for block in model.blocks:
        for layer in (block.camera.scale, block.camera.shift):
            layer.weight.zero_()
            layer.bias.zero_()
    plain.load_state_dict(model.state_dict(), strict=False)
    channels = torch.randn(1, 2, SPEC.frame_channels, 4, 4, dtype=torch.float64)
    latents, times = torch.randn(1, 2, 16, 4, 4, dtype=torch.float64), torch.tensor([[500.0, 500.0]])
    text, kv = model.embed_text(ROWS[None]), DenseAttention(rope_angles(range(2), 2, 2, SPEC.head_dim))
    with_camera = model(latents, times, text, kv, frames=model.embed_frames(channels))
    bare = plain.embed_frames(channels[:, :, : SPEC.condition_channels])
    assert torch.equal(with_camera, plain(latents, times, text, kv, frames=bare))


@torch.no_grad()
def test_the_camera_scales_and_shifts_the_residual_stream_before_the_prompt():
    """With every other layer at rest, a block is (1 + scale) * x + shift; tokens read (channel, dy, dx)."""
    model = camera_engine().parts.transformer
    block = model.blocks[0]
    assert isinstance(block, Block)
    for layer in (block.self_attn.o, block.cross_attn.o, block.ffn.down):
        layer.weight.zero_()
        layer.bias.zero_()
    channels = torch.randn(1, 2, SPEC.frame_channels, 4, 4, dtype=torch.float64)
    frames = model.embed_frames(channels, each_layer=False)
    rays = channels[0, 1, SPEC.condition_channels :]
    token = rays[:, 2:4, 0:2].flatten()  # of frame 1, row 1, column 0
    embedding = model.camera_embedding
    c = embedding.projection(token)
    c = c + embedding.linear_2(torch.nn.functional.silu(embedding.linear_1(c)))
    assert torch.allclose(frames.camera[0, 4 + 2], c, atol=1e-12)
    u = c + block.camera.linear_2(torch.nn.functional.silu(block.camera.linear_1(c)))
    x = torch.randn(1, 8, SPEC.dim, dtype=torch.float64)
    kv = DenseAttention(rope_angles(range(2), 2, 2, SPEC.head_dim))
    modulation = torch.randn(1, 2, 6, SPEC.dim, dtype=torch.float64)
    out = block(x, modulation, model.embed_text(ROWS[None]), kv, frames)
    assert torch.allclose(out[0, 6], (1 + block.camera.scale(u)) * x[0, 6] + block.camera.shift(u), atol=1e-12)


def test_the_graph_runs_the_camera_once_for_a_block():
    engine = camera_engine(executor="fused")
    latents_of(engine, 1)
    (lowered,) = engine.executor.programs.values()
    assert lowered.frames is not None
    names = [buffer.name for buffer in lowered.body.program.buffers.values()]
    assert not any(".camera." in name or name.startswith("camera_embedding") for name in names)
    linears = [call for call in lowered.frames.program.calls if "mm" in call.op.name()]
    assert len(linears) == 3 + 4 * SPEC.num_layers


def test_a_path_at_once_equals_the_same_path_block_by_block():
    engine = camera_engine()
    whole = latents_of(engine, 4)
    poses = CAMERA.poses
    with opened(engine) as session:
        scale = session.current.camera.scale
    with opened(engine, dataclasses.replace(CAMERA, poses=poses[:2], scale=scale)) as session:
        for index in range(4):
            if index:
                session.camera(poses[2 * index : 2 * index + 2])
            (block,) = session.stream(1, decode=False)
            assert torch.equal(block.latents, whole[index])


def test_keys_apply_from_the_next_block_and_are_acknowledged_with_it():
    engine = camera_engine()
    with opened(engine) as session:
        first = next(session.stream(1, decode=False))
        control = session.move(CameraMove(yaw=1))
        (block,) = session.stream(1, decode=False)
        (ack,) = block.acks
        assert (ack.id, ack.kind, ack.block) == (control, "camera", 1)
    steady = latents_of(engine, 2)
    assert torch.equal(first.latents, steady[0]) and not torch.equal(block.latents, steady[1])


def test_a_fork_with_another_camera_leaves_its_parent_untouched():
    engine = camera_engine()
    want = latents_of(engine, 4)
    with opened(engine) as session:
        got = [block.latents for block in session.stream(2, decode=False)]
        twin = session.fork()
        twin.move(CameraMove(forward=-1, yaw=0.5))
        other = [block.latents for block in twin.stream(2, decode=False)]
        got += [block.latents for block in session.stream(2, decode=False)]
        twin.close()
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
    assert not torch.equal(other[0], want[2])


def test_rewind_and_restore_go_on_with_the_camera(tmp_path):
    engine = camera_engine(rewind_blocks=2)
    with opened(engine) as session:
        session.move(CameraMove(yaw=0.5, turn=(12.0, 3.0)))
        blocks = [block.latents for block in session.stream(3, decode=False)]
        session.rewind(1)
        assert torch.equal(next(session.stream(1, decode=False)).latents, blocks[1])
        session.save(tmp_path / "world.safetensors")
    restored = Session.restore(remade(engine), tmp_path / "world.safetensors")
    assert torch.equal(next(restored.stream(1, decode=False)).latents, blocks[2])
    restored.close()


@torch.no_grad()
def test_condition_frames_as_they_are_read_equal_those_of_a_whole_clip():
    """The mask, then latents; once the encoder repeats itself, nothing more is encoded."""
    engine = camera_engine()
    vae = engine.parts.vae
    pixels = torch.from_numpy(IMAGE).double().permute(2, 0, 1)[None] / 127.5 - 1
    condition = ImageCondition(SPEC, vae, pixels)
    streamed = [condition.of(frame) for frame in range(40)]
    whole = vae.encode(torch.cat((pixels, torch.zeros(4 * 39, *pixels.shape[1:]).double())), vae.new_state())
    assert torch.equal(torch.stack(streamed)[:, 4:], whole)
    assert [frame[:4].mean() for frame in streamed] == [1.0] + [0.0] * 39
    assert condition.state is None and len(condition.latents) < 35


def test_schedules_of_the_published_models():
    """Timesteps, levels of x0 and of the noise before each step, to seven digits."""
    for name, timesteps, sigmas, added in (
        ("lingbot-v2", (999, 967, 908, 768), (0.9998999, 0.9679494, 0.9089255, 0.7689939),
         (0.9677834, 0.9085941, 0.7680442)),
        ("lingbot-v2-1.3b", (999, 937, 833, 624), (0.9997998, 0.9378895, 0.8336104, 0.6246874),
         (0.9375778, 0.8330554, 0.6246874)),
        ("lingbot-v1", (999, 978, 947, 825), (0.9998999, 0.9789710, 0.9479089, 0.8258526),
         (0.9788296, 0.9476930, 0.8251926)),
    ):  # fmt: skip
        schedule = Sampler(make_preset(name).sampler).schedule
        assert schedule.timesteps == timesteps
        assert schedule.sigmas == pytest.approx(sigmas, abs=6e-8)
        assert schedule.added[1:] == pytest.approx(added, abs=6e-8)


def test_windows_of_the_published_models():
    timeline = Timeline(make_preset("lingbot-v2"))
    assert timeline.visible(20) == (*range(6), *range(8, 20)) and timeline.visible(24) == (*range(6), *range(12, 24))


def test_what_cannot_be_opened():
    engine = camera_engine()
    prompt = {"prompt_embeds": ROWS, "size": SIZE}
    for settings, named in (
        ({"image": IMAGE}, "camera"),
        ({"camera": CAMERA}, "image"),
        ({"camera": CAMERA, "video": IMAGE[None]}, "video"),
        ({"image": IMAGE, "camera": dataclasses.replace(CAMERA, rate="picture", poses=CAMERA.poses[:4])}, "poses"),
    ):
        with pytest.raises(UsageError, match=named):
            engine.open(**prompt, **settings)
    plain = make_engine()
    with pytest.raises(UsageError, match="camera"):
        plain.open(**prompt, camera=CAMERA)
    with plain.open(**prompt) as session, pytest.raises(UsageError, match="camera"):
        session.move(CameraMove())
    with opened(engine) as session, pytest.raises(UsageError, match="3"):
        session.camera(CAMERA.poses[:3], rate="picture")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("poses", [[0.0] * 16]), ("first", -1), ("scale", 0), ("normalize", "none"), ("intrinsics", [1, 2, 3]),
        ("turn", "x"), ("turn", [1]), ("tap_frames", 1.5), ("held", {}), ("tapped", {"yaw": 1}),
        ("speeds", {"move": 1}), ("seconds", "1"),
    ],
)  # fmt: skip
def test_a_damaged_camera_in_a_saved_session(name, value):
    engine = camera_engine()
    with opened(engine) as session:
        file = SavedFields(engine.resources, engine.preset, {}, {})
        session.current.save(file)
    file = dataclasses.replace(file, header=json.loads(json.dumps(file.header)))
    CameraForm().check(file)
    file.header["camera"][name] = value
    with pytest.raises(InvalidField, match="camera"):
        CameraForm().check(file)


def test_an_image_as_channels_without_a_camera_for_any_preset_and_two_experts():
    """Wan 2.2's image to video models: 36 channels, no image encoder, an expert below and above a noise level."""
    spec = dataclasses.replace(SHORT["spec"], camera_channels=None)
    settings = {"image": "channels", "boundary_ratio": 0.9, "local_attn_size": 6, "denoising_step_list": [1000, 500]}
    eager, fused = (make_engine(spec=spec, executor=executor, **settings) for executor in ("eager", "fused"))
    made = []
    for engine, image in ((eager, IMAGE), (fused, IMAGE), (eager, IMAGE[::-1].copy())):
        with engine.open(prompt_embeds=ROWS, size=SIZE, image=image) as session:
            made.append(torch.cat([block.latents for block in session.stream(3, decode=False)]))
            with pytest.raises(UsageError, match="camera"):
                session.move(CameraMove())
    assert (made[1] - made[0]).abs().max() <= 1e-6
    assert (made[2] - made[0])[:3].abs().max() > 1e-3
    with pytest.raises(UsageError, match="image"):
        eager.open(prompt_embeds=ROWS, size=SIZE)


@pytest.mark.parametrize(
    ("executor", "wide"), [("eager", True), ("eager", False), pytest.param("fused", True, marks=pytest.mark.slow)]
)
def test_latents_of_a_bfloat16_model_are_in_float32_between_steps(executor, wide):
    """Unless the preset says otherwise."""
    (exact,) = latents_of(camera_engine(**SHORT), 1)
    with opened(camera_engine(executor=executor, dtype="bfloat16", wide_latents=wide, **SHORT)) as session:
        (block,) = session.stream(1)
    assert (block.latents.dtype == torch.float32, block.frames.dtype) == (wide, np.uint8)
    assert torch.equal(block.latents, block.latents.bfloat16()) != wide
    assert (block.latents - exact).square().mean().sqrt() <= 0.05 * exact.square().mean().sqrt()


def test_graphs_that_are_captured_replay_blocks_with_a_camera():
    backend = FakeGraphs()
    fused = camera_engine(executor="fused", kv_memory=1 << 24, **SHORT)
    engine = remade(fused, GraphExecutor(fused.config, fused.preset, fused.parts, backend))
    actual, expected = latents_of(engine, 4), latents_of(camera_engine(**SHORT), 4)
    assert all((one - two).abs().max() <= 1e-6 for one, two in zip(actual, expected, strict=True))
    # passes and commit are one graph; what the camera decides is launched once before them
    assert (engine.executor.traces, backend.captures, backend.replays) == (1, 1, 4)


@pytest.mark.parametrize("layout", [layouts.HEADS, pytest.param(layouts.TOKENS, marks=pytest.mark.slow)])
def test_two_ranks_make_the_stream_of_one(layout):
    with pair("lingbot-v2", layout, **SHORT, **BLOCK) as (alone, ranked):
        alone, ranked = latents_of(alone, 3), latents_of(ranked, 3)
    assert all(difference(one, two) <= 1e-10 for one, two in zip(ranked, alone, strict=True))


@pytest.mark.parametrize("executor", ["eager", "fused"])
def test_a_batch_of_worlds_with_cameras_equals_each_alone(executor):
    """Blocks of two sessions in one launch, each with the camera and the image of its own."""
    engine = camera_engine(executor=executor, **SHORT)
    worlds = [(CAMERA, IMAGE), (Camera(intrinsics=(30, 40, 16, 16), size=SIZE), IMAGE[::-1].copy())]
    alone = []
    for camera, image in worlds:
        with engine.open(prompt_embeds=ROWS, size=SIZE, image=image, camera=camera) as session:
            alone.append([block.latents for block in session.stream(3, decode=False)])
    engine.follow_times(SIZE, BatchProfile({1: 1.0, 2: 1.5}))
    sessions = [engine.open(prompt_embeds=ROWS, size=SIZE, image=image, camera=camera) for camera, image in worlds]
    streams = [session.stream(3, decode=False) for session in sessions]
    batched = [[next(stream) for stream in streams] for _ in range(3)]
    for session in sessions:
        session.close()
    assert {block.record.batch for blocks in batched for block in blocks} >= {2}
    for number, expected in enumerate(alone):
        for blocks, latents in zip(batched, expected, strict=True):
            assert (blocks[number].latents - latents).abs().max() <= 1e-10
