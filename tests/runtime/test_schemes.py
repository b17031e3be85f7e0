"""Each decoding scheme against dense calls that know neither caches nor groups, and against the published tables.

The dense form of a block: one call over everything it may depend on, every frame with its own context,
positions and timestep (`FrameAttention`), repeated for each step.
"""

from itertools import islice

import numpy as np
import pytest
import torch
from oracles import ROWS, SIZE, WAN_PRESETS, FrameAttention, make_engine, run

from inferix.errors import InferixError, UsageError
from inferix.kernels.attention import attention
from inferix.kernels.rope import rope_angles, rotate
from inferix.models.decoder import StreamState
from inferix.models.registry import PRESETS, make_preset
from inferix.runtime.noise import InjectedNoise
from inferix.runtime.sampler import Sampler, scheduled_blocks
from inferix.runtime.sessions.session_manager import narrower
from inferix.schemes.actions import ActionTrack
from inferix.schemes.page_needs import page_needs
from inferix.schemes.timeline import Span, Timeline

OTHER = ROWS.flip(0) * 1.5
GRID = (2, 2)


def velocity(engine, latents, timesteps, rows, text=ROWS):
    model = engine.parts.transformer
    context = model.embed_text(engine.inputs.prompt_rows(None, text)[None])
    return model(latents[None], torch.tensor([timesteps]), context, FrameAttention(rows, GRID))[0]


def draws(engine, span):
    with engine.open(prompt_embeds=ROWS, size=SIZE, **NEGATIVE.get(engine.preset.name, {})) as session:
        return [engine.loop.draw(session.current, span, step) for step in range(len(session.current.sampler.timesteps))]


NEGATIVE = {"causal-diffusion": {"negative_embeds": OTHER}}


def dense_block(engine, past, rows, span, text=ROWS):
    """Denoise frames that stand after `past` clean ones; rows are (context, positions) of past and block."""
    sampler = Sampler(engine.preset.sampler)
    noise = draws(engine, span)
    x, solver = noise[0], sampler.begin()
    for step, timestep in enumerate(sampler.timesteps):
        timesteps = [0.0] * len(past) + [timestep] * len(x)
        predicted = velocity(engine, torch.cat((past, x)), timesteps, rows, text)[len(past) :]
        x = solver.advance(x, predicted, step, lambda step=step: noise[step + 1])
    return x


def block_causal(past, block, step=3):
    """Contexts of frames in blocks of `step`, at positions from 0."""
    total = past + block
    contexts = [tuple(range(min(frame // step * step + step, total))) for frame in range(total)]
    return [(context, context) for context in contexts]


def record(engine, monkeypatch):
    """Passes of each block as they run; the list is filled by streaming."""
    passes, plain = [], engine.loop.network_pass

    def run_and_note(state, this, *more):
        passes.append(this)
        return plain(state, this, *more)

    monkeypatch.setattr(engine.loop, "network_pass", run_and_note)
    return passes


TABLE = {  # network timesteps, sigmas (None: timestep / 1000), passes of block 0 and of a later one
    "self-forcing": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "self-forcing-framewise": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "causal-forcing": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "causal-forcing-framewise": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "causal-forcing-2step": ((1000, 833.3333), None, (5, 3)),
    "causal-forcing-1step": ((1000,), None, (5, 2)),
    "sgf": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "sgf-framewise": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "sgf-plus": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "sgf-plus-framewise": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "self-forcing-a14b": (
        (1000, 985.5072, 965.5172, 936.1702, 865.9794, 819.8758, 750, 631.5789), None, (9, 9),
    ),
    "causvid": ((1000, 757, 522), (1, 0.7567568, 0.5217391), (4, 4)),
    "longlive": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "longlive-infinity": ((1000, 937.5, 833.3333, 625), None, (5, 5)),
    "krea": ((1000, 908.843, 713.979, 0), (1, 0.908843, 0.713979, 0.00498), (4, 5)),
    "longlive2": ((999, 937, 833, 624), (0.99980, 0.93727, 0.83306, 0.62469), (5, 5)),
    "rolling-forcing": ((1000, 952.381, 882.353, 769.2308, 555.5556), None, (6, 2)),
    "causal-diffusion": (None, None, (51, 51)),
    "tinyworld": ((999, 899, 749, 499), (0.9996664, 0.8996398, 0.7496248, 0.4996666), (5, 5)),
}
ATTENDED = {  # frames attended by block 1 and by block 8
    "self-forcing": (range(6), range(6, 27)),
    "self-forcing-framewise": (range(2), range(9)),
    "causal-forcing": (range(6), range(6, 27)),
    "causal-forcing-framewise": (range(2), range(9)),
    "causal-forcing-2step": (range(2), range(9)),
    "causal-forcing-1step": (range(2), range(9)),
    "sgf": (range(6), (0, 1, 2, *range(18, 27))),
    "sgf-framewise": (range(2), range(9)),
    "sgf-plus": (range(6), (0, 1, 2, *range(18, 27))),
    "sgf-plus-framewise": (range(2), range(9)),
    "self-forcing-a14b": (range(8), range(16, 36)),
    "causvid": (range(6), range(18, 27)),
    "longlive": (range(6), (0, 1, 2, *range(18, 27))),
    "longlive-infinity": (range(6), (0, 1, 2, *range(18, 27))),
    "krea": (range(6), range(21, 27)),
    "longlive2": (range(16), (*range(8), *range(48, 72))),
    "rolling-forcing": (range(18), (0, 1, 2, *range(21, 39))),
    "causal-diffusion": (range(6), range(6, 27)),
    "tinyworld": (range(2), (0, *range(4, 9))),
}


@pytest.mark.parametrize("name", WAN_PRESETS)
def test_the_published_tables(name, monkeypatch):
    timesteps, sigmas, passes = TABLE[name]
    sampler = Sampler(PRESETS[name].sampler)
    all_steps = {"denoising_step_list": PRESETS[name].sampler.denoising_step_list}
    steps = {"num_steps": 2} if name == "causal-diffusion" else all_steps
    if timesteps is not None:
        assert sampler.timesteps == pytest.approx(timesteps, abs=6e-4)
        assert sampler.sigmas == pytest.approx(sigmas or [t / 1000 for t in timesteps], abs=1e-5)
    engine = make_engine(name, dtype="float32", **steps)
    counted = record(engine, monkeypatch)
    seen, counts = [], []
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, **NEGATIVE.get(name, {})) as session:
        for _ in range(9):
            (block,) = session.stream(1)
            # The last pass that denoised this block, before its commit.
            denoising = counted[:-1] if engine.preset.context.commit else counted
            seen.append(denoising[-1].groups[0].context)
            counts.append(len(counted))
            counted.clear()
            first = block.index == 0
            step = engine.preset.num_frame_per_block
            assert len(block.frames) == (step * 4 - 3 if first else step * 4)
    expected = (passes[0] - 48, passes[1] - 48) if name == "causal-diffusion" else passes
    assert (counts[0], counts[5]) == expected
    assert (seen[1], seen[8]) == tuple(map(tuple, ATTENDED[name]))


@torch.no_grad()
def test_causvid_restarts_from_three_frames_the_first_encoded_again():
    engine = make_engine("causvid")
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        blocks = list(session.stream(8))
    vae, clip = engine.parts.vae, engine.parts.vae.new_state()
    pixels = torch.cat([vae.decode(block.latents, clip) for block in blocks[:7]])
    head = vae.encode(pixels[-9:-8], vae.new_state())
    past = torch.cat((head, blocks[6].latents[1:]))
    want = dense_block(engine, past, block_causal(3, 3), Span(7, range(21, 24)))
    assert (blocks[7].latents - want).abs().max() <= 1e-10
    again = vae.decode(torch.cat((past, want)), vae.new_state())[9:]
    assert len(blocks[7].frames) == 12
    assert abs(blocks[7].frames.astype(int) - ((again * 0.5 + 0.5) * 255).permute(0, 2, 3, 1).numpy()).max() <= 0.51


@pytest.mark.parametrize("rebuild_frames", [3, 6])
@torch.no_grad()
def test_krea_recomputes_its_context_before_each_block(rebuild_frames):
    engine = make_engine("krea", rebuild_frames=rebuild_frames)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        blocks = list(session.stream(4, decode=False))
    assert (dense_block(engine, blocks[0].latents, block_causal(3, 3), Span(1, range(3, 6))) - blocks[1].latents).abs(
    ).max() <= 1e-10  # the first frames are taken as they are
    vae = engine.parts.vae
    pixels = vae.decode(torch.cat([block.latents for block in blocks[:3]]), vae.new_state())
    head = vae.encode(pixels[-(rebuild_frames - 1) * 4 - 1 :][:1], vae.new_state())
    past = torch.cat((head, torch.cat([block.latents for block in blocks[:3]])[1 - rebuild_frames :]))
    want = dense_block(engine, past, block_causal(rebuild_frames, 3), Span(3, range(9, 12)))
    assert (blocks[3].latents - want).abs().max() <= 1e-10


class FrameCache:
    """Keys, not rotated, and values of single frames, as a plain loop keeps them; `shown` is what a pass sees.

    frames: those of the pass. shown: the position of each frame it sees. read_only: frames that it does not overwrite.
    """

    def __init__(self) -> None:
        self.kv, self.frames, self.shown, self.read_only = {}, (), {}, ()

    def attend(self, layer, q, k, v):
        q, k, v = (part.unflatten(1, (-1, GRID[0] * GRID[1])) for part in (q, k, v))
        for index, frame in enumerate(self.frames):
            if frame not in self.read_only:
                self.kv[layer, frame] = k[:, index], v[:, index]

        def at(tokens, position):
            return rotate(tokens, rope_angles([position], *GRID, tokens.shape[-1]))

        keys = torch.cat([at(self.kv[layer, frame][0], place) for frame, place in self.shown.items()], dim=1)
        values = torch.cat([self.kv[layer, frame][1] for frame in self.shown], dim=1)
        places = [self.shown.get(frame, frame) for frame in self.frames]
        return attention(torch.cat([at(q[:, i], place) for i, place in enumerate(places)], dim=1), keys, values)

    def run(self, engine, latents, timesteps, frames, shown, text=ROWS, read_only=()):
        """Velocity [F, C, H, W] of one pass."""
        self.frames, self.shown, self.read_only = tuple(frames), shown, tuple(read_only)
        model = engine.parts.transformer
        context = model.embed_text(engine.inputs.prompt_rows(None, text)[None])
        return model(latents[None], torch.tensor([timesteps], dtype=torch.float32), context, self)[0]

    def denoise(self, engine, span, shown, text=ROWS, noise=None, sampler=None):
        """A block by all sampler steps; each pass writes where the clean block will stand. noise: of each draw."""
        sampler = sampler or Sampler(engine.preset.sampler)
        noise = draws(engine, span) if noise is None else noise
        x, solver = noise[0], sampler.begin()
        for step, timestep in enumerate(sampler.timesteps):
            predicted = self.run(engine, x, [timestep] * len(x), span.frames, shown, text)
            x = solver.advance(x, predicted, step, lambda step=step: noise[step + 1])
        return x


@torch.no_grad()
def test_injected_noise_of_an_independent_first_frame():
    """Blocks of 1, 3 and 3 frames from the given tensors, by hand; block 0 uses the first frame of its row."""
    engine = make_engine(independent_first_frame=True)
    generator = torch.Generator().manual_seed(3)
    initial, renoise = (torch.randn(*shape, 16, 4, 4, generator=generator).double() for shape in ((7,), (3, 3, 3)))
    streamed = run(engine, 3, noise=InjectedNoise(initial, renoise))
    cache, start = FrameCache(), 0
    for index, size in enumerate((1, 3, 3)):
        span = Span(index, range(start, start + size))
        start += size
        shown = {frame: frame for frame in range(start)}
        noise = [initial[span.frames.start : start], *(row[:size] for row in renoise[index])]
        want = cache.denoise(engine, span, shown, noise=noise)
        assert (streamed[index].latents - want).abs().max() <= 1e-10
        cache.run(engine, want, [0.0] * size, span.frames, shown)
    with pytest.raises(UsageError, match="block 1"):
        run(engine, 2, noise=InjectedNoise(initial, renoise[:, :, :1]))


@pytest.mark.parametrize("steps", [(1000, 500), (1000,)], ids=["two-steps", "one-step"])
@pytest.mark.parametrize("executor", ["eager", "fused"])
@torch.no_grad()
def test_the_first_block_has_a_step_list_of_its_own(steps, executor):
    """Causal-Forcing++ by hand: four warped steps for the first frame, one or two for each frame after it."""
    first = (1000, 750, 500, 250)
    settings = {"denoising_step_list": steps, "denoising_step_list_first_chunk": first, "executor": executor}
    engine = make_engine("self-forcing-framewise", local_attn_size=3, **settings)
    streamed = run(engine, 5)
    plain = [make_engine("self-forcing-framewise", denoising_step_list=those) for those in (first, steps)]
    timesteps = {1: (1000,), 2: (1000, 833.3333)}[len(steps)]
    assert Sampler(plain[1].preset.sampler).timesteps == pytest.approx(timesteps, abs=6e-4)
    cache = FrameCache()
    for index in range(5):
        oracle, span = plain[min(index, 1)], Span(index, range(index, index + 1))
        shown = {frame: frame for frame in range(max(0, index - 2), index + 1)}
        want = cache.denoise(oracle, span, shown)
        assert (streamed[index].latents - want).abs().max() <= (1e-10 if executor == "eager" else 1e-6)
        cache.run(oracle, want, [0.0], span.frames, shown)
    counts = [len(block.passes) for block in islice(scheduled_blocks(engine.preset), 3)]
    assert counts == [5, len(steps) + 1, len(steps) + 1]


def test_an_image_as_first_frame_leaves_the_first_list_to_the_first_generated_block(monkeypatch):
    first = {"denoising_step_list": [1000], "denoising_step_list_first_chunk": [1000, 750, 500, 250]}
    engine = make_engine("self-forcing-framewise", dtype="float32", **first)
    counted = record(engine, monkeypatch)
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    with engine.open(prompt_embeds=ROWS.float(), size=SIZE, image=image) as session:
        counted.clear()
        list(session.stream(2, decode=False))
    assert [this.timesteps[0] for this in counted] == pytest.approx([1000, 937.5, 833.3333, 625, 0, 1000, 0])


def after_switch(engine, before, blocks, **kwargs):
    """Latents of a stream with another prompt from block `before` on."""
    with engine.open(prompt_embeds=ROWS, size=SIZE, **kwargs) as session:
        made = list(session.stream(before, decode=False))
        session.prompt(embeds=OTHER)
        made += session.stream(blocks - before, decode=False)
    return [block.latents for block in made]


@pytest.mark.parametrize("name", ["longlive", "longlive-infinity"])
@pytest.mark.parametrize("before", [1, 4, 5])
@torch.no_grad()
def test_longlive_recaches_the_sink_until_the_window_rolls(name, before):
    """The published switch by hand: the last 12 frames in one pass, which overwrites the sink only from frame 0."""
    engine = make_engine(name)
    streamed = after_switch(engine, before, before + 2)
    cache = FrameCache()

    def shown(end):
        frames = range(end) if end <= 12 else [*range(3), *range(end - 9, end)]
        return {frame: index if name == "longlive-infinity" else frame for index, frame in enumerate(frames)}

    for block in range(before):
        span = Span(block, range(block * 3, block * 3 + 3))
        cache.run(engine, streamed[block], [0.0] * 3, span.frames, shown(span.frames.stop))
    end = before * 3
    frames = range(max(0, end - 12), end)
    latents = torch.cat(streamed[:before])[frames.start :]
    read_only = range(3) if frames.start > 0 else ()
    cache.run(engine, latents, [0.0] * len(frames), frames, shown(end), OTHER, read_only)
    for block in range(before, before + 2):
        span = Span(block, range(block * 3, block * 3 + 3))
        want = cache.denoise(engine, span, shown(span.frames.stop), OTHER)
        assert (streamed[block] - want).abs().max() <= 1e-10
        cache.run(engine, want, [0.0] * 3, span.frames, shown(span.frames.stop), OTHER)


@pytest.mark.parametrize("recache_sink", [False, True], ids=["sink-kept", "sink-recached"])
@pytest.mark.parametrize("before", [2, 4, 5])
@torch.no_grad()
def test_longlive_recache_equals_a_dense_pass(recache_sink, before):
    """All frames of the window see each other under the new prompt; a sink that is kept is seen as it was."""
    engine = make_engine("longlive", recache_sink=recache_sink)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        blocks = list(session.stream(before, decode=False))
        cache = session.current.branches[0].cache
        old = cached(cache)
        session.prompt(embeds=OTHER)
        engine._apply_controls(session)
        engine.loop.run_alone(engine.loop.follow_prompt(session.current, lambda: None))
        end = before * 3
        latents = torch.cat([block.latents for block in blocks])
        window = list(range(max(0, end - 12), end))
        recomputed = recache_sink or end <= 12
        frames = window if recomputed else [frame for frame in cache.frames if frame >= 3]
        assert list(cache.frames) == (window if recomputed else [0, 1, 2, *frames])
        assert set(frames) <= set(window)
        model = engine.parts.transformer
        kv = WithSink(old, frames, sinks=0 if recomputed else 3)
        text = model.embed_text(engine.inputs.prompt_rows(None, OTHER)[None])
        model(latents[frames][None], torch.zeros(1, len(frames)), text, kv)
        for (keys, values), (wanted_keys, wanted_values) in zip(cached(cache), kv.made, strict=True):
            assert (keys - wanted_keys).abs().max() <= 1e-10
            assert (values - wanted_values).abs().max() <= 1e-10
        (after,) = session.stream(1, decode=False)
    assert (after.latents - run(engine, before + 1)[before].latents).abs().max() > 1e-3


def cached(cache):
    """Keys and values [1, frames*P, n, c] of each layer."""
    return [(k.flatten(0, 1)[None], v.flatten(0, 1)[None]) for k, v in cache.export_pages().kv]


class WithSink:
    """Full attention among the frames of a call and some given keys before them."""

    def __init__(self, old, frames, sinks):
        self.old, self.frames, self.tokens, self.made = old, frames, sinks * 4, []

    def attend(self, layer, q, k, v):
        angles = rope_angles(self.frames, *GRID, q.shape[-1])
        keys = torch.cat((self.old[layer][0][:, : self.tokens], rotate(k, angles)), dim=1)
        values = torch.cat((self.old[layer][1][:, : self.tokens], v), dim=1)
        self.made.append((keys, values))
        return attention(rotate(q, angles), keys, values)


@torch.no_grad()
def test_a_cut_changes_the_text_and_nothing_else():
    engine = make_engine("self-forcing")
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        blocks = list(session.stream(2, decode=False))
        keys = session.current.branches[0].cache.export_pages().kv
        session.prompt(embeds=OTHER)
        engine._apply_controls(session)
        engine.loop.run_alone(engine.loop.follow_prompt(session.current, lambda: None))
        assert torch.equal(keys, session.current.branches[0].cache.export_pages().kv)
        (after,) = session.stream(1, decode=False)
    model = engine.parts.transformer
    assert torch.equal(session.current.rows, engine.inputs.prompt_rows(None, OTHER))
    assert not torch.equal(after.latents, run(engine, 3)[2].latents)
    assert model is engine.parts.transformer and len(blocks) == 2


@torch.no_grad()
def test_krea_recomputes_its_context_under_the_prompt_of_the_block_before():
    """The published server by hand: a new prompt's share is 0, 1/3, 2/3, 1, and the context lags a block behind it."""
    engine = make_engine("krea")
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        blocks = list(session.stream(2, decode=False))
        session.prompt(embeds=OTHER)
        blocks += session.stream(5, decode=False)
    vae, latents = engine.parts.vae, [block.latents for block in blocks]
    old, new = (engine.inputs.prompt_rows(None, rows) for rows in (ROWS, OTHER))
    rows = [old, old, *(old + share * (new - old) for share in (0, 1 / 3, 2 / 3, 1, 1))]
    for index in range(2, 7):
        past, span = range(index * 3 - 3, index * 3), Span(index, range(index * 3, index * 3 + 3))
        pixels = vae.decode(torch.cat(latents[:index]), vae.new_state())
        context = torch.cat((vae.encode(pixels[-9:][:1], vae.new_state()), latents[index - 1][1:]))
        cache = FrameCache()
        cache.run(engine, context, [0.0] * 3, past, {frame: frame - past.start for frame in past}, rows[index - 1])
        shown = {frame: frame - past.start for frame in range(past.start, span.frames.stop)}
        assert (latents[index] - cache.denoise(engine, span, shown, rows[index])).abs().max() <= 1e-10
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:  # before the first block there is nothing to blend
        session.prompt(embeds=OTHER)
        (first,) = session.stream(1, decode=False)
    with engine.open(prompt_embeds=OTHER, size=SIZE) as session:
        assert torch.equal(first.latents, next(iter(session.stream(1, decode=False))).latents)


@torch.no_grad()
def test_a_decoder_that_starts_from_zero_caches_changes_pictures_and_the_latents_made_from_them():
    """Against one call over the whole clip, in which every latent frame becomes four pictures."""
    engine = make_engine("krea", decoder_zero_start=True)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        blocks = list(session.stream(3))
    assert [len(block.frames) for block in blocks] == [9, 12, 12]
    vae, latents = engine.parts.vae, [block.latents for block in blocks]
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (vae.spec.mean, vae.spec.std))
    clip = (torch.cat(latents) * std + mean).transpose(0, 1)[None]
    pixels = vae.decoder(vae.post_quant_conv(clip), StreamState({}, 1))[0].transpose(0, 1).clamp(-1, 1)[3:]
    shown = ((pixels * 0.5 + 0.5) * 255).permute(0, 2, 3, 1).numpy()
    assert abs(np.concatenate([block.frames for block in blocks]).astype(int) - shown).max() <= 0.51
    context = torch.cat((vae.encode(pixels[12:13], vae.new_state()), latents[1][1:]))
    want = dense_block(engine, context, block_causal(3, 3), Span(2, range(6, 9)))
    assert (latents[2] - want).abs().max() <= 1e-10
    plain = run(make_engine("krea"), 3)
    assert torch.equal(plain[1].latents, latents[1]) and (plain[2].latents - latents[2]).abs().max() > 1e-6


@torch.no_grad()
def test_a_blend_arrives_after_its_blocks():
    engine = make_engine("krea", blend_blocks=4)
    new, old = engine.inputs.prompt_rows(None, OTHER), engine.inputs.prompt_rows(None, ROWS)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(1))
        session.prompt(embeds=OTHER)
        for part in (0.0, 1 / 3, 2 / 3, 1.0, 1.0):
            list(session.stream(1))
            assert (session.current.rows - (old + part * (new - old))).abs().max() <= 1e-12
        assert torch.equal(session.current.rows, new)


@torch.no_grad()
@pytest.mark.parametrize("name", ["self-forcing", "krea"])
def test_a_control_says_over_how_many_blocks_a_prompt_is_blended_in(name):
    engine = make_engine(name)
    new, old = engine.inputs.prompt_rows(None, OTHER), engine.inputs.prompt_rows(None, ROWS)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        list(session.stream(1, decode=False))
        session.prompt(embeds=OTHER, blend_blocks=3)
        for part in (0.0, 0.5, 1.0):
            list(session.stream(1))
            assert (session.current.rows - (old + part * (new - old))).abs().max() <= 1e-12
        session.prompt(embeds=ROWS, blend_blocks=1)
        list(session.stream(1))
        assert torch.equal(session.current.rows, old)
        with pytest.raises(UsageError, match=r"blend_blocks.*0"):
            session.prompt(embeds=OTHER, blend_blocks=0)


@torch.no_grad()
def test_the_rolling_window_equals_the_same_groups_in_dense_calls():
    """Five blocks at five noise levels, the anchor moved before the working frames; clean blocks committed in place."""
    engine = make_engine("rolling-forcing")
    blocks = run(engine, 5)
    timeline, sampler = Timeline(engine.preset), Sampler(engine.preset.sampler)
    clean, clean_rows, flight = [], [], []
    made, index = [], 0
    while len(made) < 5:
        span = Span(index, range(index * 3, index * 3 + 3))
        flight.append({"span": span, "noise": draws(engine, span), "step": 0})
        flight[-1]["x"] = flight[-1]["noise"][0]
        index += 1
        end = flight[-1]["span"].frames.stop
        context = timeline.visible(end)
        shown = tuple(range(end - len(context), end))  # contiguous, up to the block's own positions
        past = torch.cat(clean) if clean else torch.zeros(0, 16, 4, 4, dtype=torch.float64)
        rows = [*clean_rows, *[(context, shown)] * (end - len(past))]
        timesteps = [0.0] * len(past) + [sampler.timesteps[b["step"]] for b in flight for _ in range(3)]
        predicted = velocity(engine, torch.cat((past, *[b["x"] for b in flight])), timesteps, rows)[len(past) :]
        for block, part in zip(flight, predicted.split(3), strict=True):
            step = block["step"]
            block["x"] = sampler.begin().advance(block["x"], part, step, lambda b=block, s=step: b["noise"][s + 1])
            block["step"] += 1
        if flight[0]["step"] == 5:
            done = flight.pop(0)
            made.append(done["x"])
            clean.append(done["x"])
            seen = tuple(range(done["span"].frames.stop))
            clean_rows += [(seen, seen)] * 3
    for got, want in zip(blocks, made, strict=True):
        assert (got.latents - want).abs().max() <= 1e-10
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        parts = [*session.stream(2, decode=False), *session.stream(3, decode=False)]
    assert torch.equal(parts[4].latents, blocks[4].latents)


@torch.no_grad()
def test_a_rolling_commit_sees_the_last_21_frames_without_the_anchor():
    """The published loop by hand, until it rolls: 24 frames are kept, the anchor (the first three) and the last 21."""
    engine = make_engine("rolling-forcing")
    streamed, most = [], 0
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        for block in session.stream(10, decode=False):
            streamed.append(block.latents)
            frames = session.current.branches[0].cache.frames
            most = max(most, len(frames))
        assert frames == (0, 1, 2, *range(9, 30)) and most == 24 == page_needs(engine.preset).context
    sampler, cache = Sampler(engine.preset.sampler), FrameCache()
    noise = [draws(engine, Span(index, range(index * 3, index * 3 + 3))) for index in range(14)]
    x, steps = [drawn[0] for drawn in noise], [0] * 14
    for newest in range(14):
        flight = range(max(0, newest - 4), newest + 1)
        first, end = flight.start * 3, newest * 3 + 3
        shown = {frame: frame for frame in range(first, end)}
        if first:
            working = range(max(3, first - (21 - len(shown) - 3)), first)
            anchor = first - len(working) - 3
            shown = {frame: anchor + frame for frame in range(3)} | {frame: frame for frame in working} | shown
        levels = [sampler.timesteps[steps[block]] for block in flight for _ in range(3)]
        predicted = cache.run(engine, torch.cat([x[block] for block in flight]), levels, range(first, end), shown)
        for block, part in zip(flight, predicted.split(3), strict=True):
            step, drawn = steps[block], noise[block]
            x[block] = sampler.begin().advance(x[block], part, step, lambda drawn=drawn, step=step: drawn[step + 1])
            steps[block] += 1
        if steps[flight.start] == 5:
            assert (streamed[flight.start] - x[flight.start]).abs().max() <= 1e-9
            span = range(first, first + 3)
            seen = {frame: frame for frame in range(max(0, span.stop - 21), span.stop)}
            cache.run(engine, x[flight.start], [0.0] * 3, span, seen)


@torch.no_grad()
def test_longlive2_blocks_shots_and_positions():
    """Sink, newest shot and window, with positions that jump by the offset at a cut."""
    engine = make_engine("longlive2", local_attn_size=12, sink_size=2, num_frame_per_block=2, shot_offset=5)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session:
        blocks = list(session.stream(3, decode=False))
        session.current.timeline.cut_shot()
        blocks += session.stream(7, decode=False)
        assert session.current.timeline.pinned == (6, 7)
        assert session.current.timeline.visible(20) == (0, 1, 6, 7, *range(12, 20))
    timeline = Timeline(engine.preset)
    timeline.pinned = (6, 7)
    positions = [frame + (5 if frame >= 6 else 0) for frame in range(20)]
    past, rows = torch.cat([block.latents for block in blocks[:9]]), []
    for frame in range(20):
        context = timeline.visible(frame // 2 * 2 + 2)
        rows.append((context, tuple(positions[seen] for seen in context)))
    want = dense_block(engine, past, rows, Span(9, range(18, 20)))
    assert (blocks[9].latents - want).abs().max() <= 1e-10


def test_a_scene_cut_is_told_by_its_prefix():
    preset = PRESETS["longlive2"]
    timeline = Timeline(preset)
    timeline.admit()
    timeline.cut_shot()
    assert timeline.admit().frames == range(8, 16)
    assert timeline.pinned == tuple(range(8, 16)) and timeline.places[8] == 16
    plain = Timeline(PRESETS["self-forcing"])
    plain.cut_shot()
    assert plain.shot == 0


def test_the_sink_moves_to_the_place_of_a_rest_as_it_leaves_the_window():
    """Once the first of its frames leaves the window, which has their places back as the stream moves on."""
    timeline, seen = Timeline(PRESETS["tinyworld"]), []
    track = ActionTrack(("stay", "left"), ["stay"] * 8 + ["left"] * 7 + ["stay"] * 9 + ["left"] * 5 + ["stay"] * 7)
    for frame in range(37):
        timeline.admit()
        timeline.follow_rest(track.resting_since(frame - 1))
        seen.append(timeline.visible(frame + 1))
    since = {-1: None, 0: 0, 8: 0, 9: None, 15: None, 16: 15, 24: 15, 25: None}
    assert {frame: track.resting_since(frame) for frame in since} == since
    assert seen[5] == tuple(range(6))
    assert seen[6] == (0, 1, 2, 3, 5, 6)  # the stream begins at rest
    assert seen[9] == (0, 1, 2, 3, 8, 9)
    assert seen[10:13] == [(0, 1, 2, 8, 9, 10), (0, 1, 8, 9, 10, 11), (0, 8, 9, 10, 11, 12)]
    assert seen[19] == (0, 15, 16, 17, 18, 19)
    assert seen[20] == (15, 16, 17, 18, 19, 20)  # the frame that arrived is the first of the sink
    assert seen[21] == (15, 16, 17, 18, 20, 21)
    assert seen[25] == (15, 16, 17, 18, 24, 25)
    assert seen[26] == (15, 16, 17, 24, 25, 26)
    assert seen[30] == (15, 26, 27, 28, 29, 30)
    assert seen[34:36] == [(29, 30, 31, 32, 33, 34), (29, 30, 31, 32, 34, 35)]


def test_the_sink_of_a_rest_is_held_again_after_a_single_step():
    timeline = Timeline(PRESETS["tinyworld"])
    track = ActionTrack(("stay", "left"), [*["stay"] * 7, "left", *["stay"] * 9])
    seen, cached = [], set()
    for frame in range(17):
        timeline.admit()
        timeline.follow_rest(track.resting_since(frame - 1))
        assert cached >= set(timeline.visible(frame + 1)) - {frame}  # only frames that are still in the cache
        cached = set(timeline.visible(frame + 1))
        seen.append(timeline.visible(frame + 1))
    assert seen[8:12] == [(0, 1, 2, 3, 7, 8), (0, 1, 2, 7, 8, 9), (0, 1, 7, 8, 9, 10), (0, 7, 8, 9, 10, 11)]
    assert seen[12:15] == [(0, 8, 9, 10, 11, 12), (8, 9, 10, 11, 12, 13), (8, 9, 10, 11, 13, 14)]


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 4), ({"local_attn_size": 12}, 10), ({"local_attn_size": 3}, 1), ({"local_attn_size": 2}, 0),
        ({"local_attn_size": -1}, 0), ({"sink_size": 0, "recache_sink": False}, 0), ({"sink_size": 2}, 0),
        ({"sink_decay": 0.9}, 0), ({"window_blocks": 2, "prompt_switch": "cut"}, 0),
        ({"segment_frames": 6, "rebuild_frames": 3}, 0), ({"commit": False, "rebuild_frames": 3}, 0),
        ({"commit_in_next": True, "prompt_switch": "cut"}, 0), ({"clean_chunk_kvrange": 2}, 0),
        ({"num_frame_per_block": 2}, 2),
    ],
)  # fmt: skip
def test_a_rest_holds_as_many_frames_as_other_settings_allow(settings, most):
    assert make_preset("tinyworld", **settings).context.rest_sink == min(4, most)
    assert make_preset("tinyworld", **settings, rest_sink=0).context.rest_sink == 0
    if most:
        assert make_preset("tinyworld", **settings, rest_sink=most).context.rest_sink == most
    with pytest.raises(UsageError, match=f"rest_sink is {most + 1}"):
        make_preset("tinyworld", **settings, rest_sink=most + 1)


@pytest.mark.parametrize(("window", "sink"), [(5, (0, 1, 2)), (4, (0, 1)), (3, (0,)), (2, (0,))])
def test_a_narrower_window_holds_less_of_a_rest(window, sink):
    timeline, track = Timeline(PRESETS["tinyworld"]), ActionTrack(("stay", "left"), ["stay"] * 30)
    cached = set()
    for frame in range(20):
        timeline.preset = narrower(PRESETS["tinyworld"], window) if frame >= 10 else PRESETS["tinyworld"]
        timeline.admit()
        timeline.follow_rest(track.resting_since(frame - 1))
        seen = timeline.visible(frame + 1)
        assert cached >= set(seen) - {frame}
        cached = set(seen)
    assert timeline.sink == sink and seen == (*sink, *range(20 - window + len(sink), 20))



@torch.no_grad()
def test_an_image_is_clamped_as_the_first_frame():
    engine = make_engine("longlive2")
    image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
    with engine.open(prompt_embeds=ROWS, size=SIZE, image=image) as session:
        head = session.current.clamped
        assert head.shape == (1, 16, 4, 4)
        first, second = session.stream(2, decode=False)
    assert torch.equal(first.latents[:1], head)
    sampler, noise = Sampler(engine.preset.sampler), draws(engine, Span(0, range(8)))
    x, solver = torch.cat((head, noise[0][1:])), sampler.begin()
    everything = tuple(range(8))
    for step, timestep in enumerate(sampler.timesteps):
        predicted = velocity(engine, x, [0.0] + [timestep] * 7, [(everything, everything)] * 8)
        x = torch.cat((head, solver.advance(x, predicted, step, lambda: noise[0])[1:]))
    assert (first.latents - x).abs().max() <= 1e-10
    assert not torch.equal(second.latents[:1], head)


@torch.no_grad()
def test_guidance_equals_two_separate_runs():
    guided = make_engine("causal-diffusion", num_steps=3, guidance_scale=4.0)
    plain = make_engine("causal-diffusion", num_steps=3, guidance_scale=1.0)
    blocks = run(guided, 2, negative_embeds=OTHER)
    sampler = Sampler(plain.preset.sampler)
    with (
        plain.open(prompt_embeds=ROWS, size=SIZE) as prompted,
        plain.open(prompt_embeds=OTHER, size=SIZE) as negative,
    ):
        for block in blocks:
            span = prompted.current.timeline.admit()
            negative.current.timeline.admit()
            x, solver = plain.loop.draw(prompted.current, span, 0), sampler.begin()
            for step, timestep in enumerate(sampler.timesteps):
                predicted = []
                for session in (prompted, negative):
                    this = session.current.timeline.joint_pass([(span.frames, timestep)], frozenset())
                    plain.loop.roll_caches(session.current, this)
                    predicted.append(plain.loop.velocity(session.current, this, x))
                x = solver.advance(x, predicted[1] + 4.0 * (predicted[0] - predicted[1]), step, lambda x=x: x)
            for session in (prompted, negative):
                plain.loop.run_alone(plain.loop.commit(session.current, span, x))
            assert (block.latents - x).abs().max() <= 1e-10
    with pytest.raises(UsageError, match="negative prompt"):
        guided.open(prompt_embeds=ROWS, size=SIZE)
    with pytest.raises(UsageError, match="no guidance"):
        plain.open(prompt_embeds=ROWS, negative_embeds=OTHER, size=SIZE)


@torch.no_grad()
def test_a_video_is_started_from_with_a_strength():
    engine = make_engine()
    video = torch.randint(0, 256, (21, 32, 32, 3), dtype=torch.uint8).numpy()
    kwargs = {"prompt_embeds": ROWS, "size": SIZE, "video": video}
    with engine.open(**kwargs, strength=1.0) as session:
        whole = list(session.stream(2, decode=False))
    assert torch.equal(whole[1].latents, run(engine, 2)[1].latents)  # from noise alone
    with engine.open(**kwargs, strength=0.4) as session:
        assert session.current.sampler.timesteps[0] < 1000
        sigma, given = session.current.sampler.sigmas[0], session.current.source
        start = engine.loop.admit(session.current)
        noise = engine.loop.draw(session.current, start.span, 0)
        assert (start.latents - ((1 - sigma) * given[:3] + sigma * noise)).abs().max() <= 1e-6
    with engine.open(**kwargs, strength=0.4) as session, pytest.raises(InferixError, match="block 2"):
        list(session.stream(3))
    for strength in (0, 1.5):
        with pytest.raises(UsageError, match="strength"):
            engine.open(**kwargs, strength=strength)
    with pytest.raises(UsageError, match="no video"):
        engine.open(prompt_embeds=ROWS, size=SIZE, strength=0.5)


@torch.no_grad()
def test_a_live_video_gives_the_blocks_of_the_same_video_in_a_file(tmp_path):
    """Block by block; also after a rewind, which goes back to the pictures of that time, and in a fork."""
    engine = make_engine(rewind_blocks=2)
    video = torch.randint(0, 256, (33, 32, 32, 3), dtype=torch.uint8).numpy()
    kwargs = {"prompt_embeds": ROWS, "size": SIZE, "strength": 0.4}
    with engine.open(**kwargs, video=video) as session:
        whole = [block.latents for block in session.stream(2, decode=False)]
    with engine.open(**kwargs, live=True) as session:
        assert session.pictures_wanted == 9
        session.feed(video[:9])
        assert session.pictures_wanted == 0
        with pytest.raises(UsageError, match="pictures"):
            session.feed(video[9:21])
        (first,) = session.stream(1, decode=False)
        assert session.pictures_wanted == 12
        for wrong in (video[9:20], video[9:21, :16], video[9:21].astype(float), None, "x.mp4"):
            with pytest.raises(UsageError, match="pictures"):
                session.feed(wrong)
        with pytest.raises(UsageError, match="live"):
            session.save(tmp_path / "x")
        session.feed(video[9:21])
        twin = session.fork()
        second, again = (next(each.stream(1, decode=False)).latents for each in (session, twin))
        assert torch.equal(first.latents, whole[0]) and torch.equal(second, whole[1]) and torch.equal(again, whole[1])
        session.rewind(1)
        assert session.pictures_wanted == 0
        assert torch.equal(next(session.stream(1, decode=False)).latents, whole[1])
        assert session.current.live.first == 3 and len(session.current.live.latents) == 3
        session.feed(video[21:])
        assert (session.current.live.first, session.current.live.end) == (6, 9)
        twin.close()
    with engine.open(**kwargs, live=True) as session:
        with pytest.raises(InferixError, match="block 0"):
            next(session.stream(1))
        session.feed(video[:9])  # late, and the session goes on
        assert torch.equal(next(session.stream(1, decode=False)).latents, whole[0])
    for wrong in ({"strength": None}, {"video": video}, {"image": video[0]}, {"live": 1}):
        with pytest.raises(UsageError, match="live"):
            engine.open(**kwargs | {"live": True} | wrong)
    with pytest.raises(UsageError, match="blocks in flight"):
        make_engine("rolling-forcing").open(**kwargs, live=True)
    with engine.open(prompt_embeds=ROWS, size=SIZE) as session, pytest.raises(UsageError, match="pictures"):
        session.feed(video[:9])


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("krea", {"rebuild_frames": 0}, "rebuild_frames is 0"),
        ("causvid", {"segment_frames": 5}, "segment_frames 5"),
        ("rolling-forcing", {"window_blocks": 3}, "window_blocks is 3.*5 steps"),
        ("rolling-forcing", {"local_attn_size": 15}, "5 at a time"),
        ("longlive2", {"num_steps": 0}, "num_steps"),
        ("longlive", {"prompt_switch": "re-cache"}, "recache"),
        ("longlive", {"commit_sees_sink": False}, "commit_sees_sink"),
        ("longlive", {"denoising_step_list_first_chunk": [250, 1000]}, "first_chunk"),
        ("longlive", {"denoising_step_list_first_chunk": [999.5]}, "first_chunk"),
        ("longlive2", {"denoising_step_list_first_chunk": [1000]}, "unipc"),
        ("rolling-forcing", {"denoising_step_list_first_chunk": [1000]}, "window_blocks 5"),
        ("longlive2", {"solver": "euler"}, "unipc"),
        ("causal-diffusion", {"guidance_scale": -1}, "guidance_scale"),
    ],
)
def test_bad_settings(name, overrides, message):
    with pytest.raises(UsageError, match=message):
        make_engine(name, **overrides)
