"""Hand-made passes in float64 against one dense call: mixed writes, texts, branches and page lists by head group.

The dense form runs all frames of a stream in one call of the model, each attending to its own frames and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from oracles import ROWS, SIZE, TOKENS, contiguous, make_engine
from torch import Tensor

from inferix.errors import UsageError
from inferix.graphs.passes import NULL, PROMPT, Group, Pass
from inferix.kernels.attention import attention
from inferix.kernels.block_attention import block_attention
from inferix.kernels.rope import rope_angles, rotate
from inferix.kernels.spec import using
from inferix.models.registry import make_preset
from inferix.runtime.engine import Engine
from inferix.runtime.noise import PhiloxNoise
from inferix.runtime.sampler import Sampler
from inferix.runtime.sessions.session import Session

NEGATIVE = ROWS.flip(0) * 0.5
FORMS = ["eager", "fused", "contiguous"]
HEADS = 2


def group(frames: Sequence[int], timestep: float, context: Sequence[int], write: bool, text: int = PROMPT, **more):
    return Group(tuple(frames), timestep, tuple(context), tuple(context), write, text, **more)


class DenseFrames:
    """Self-attention of all frames in one call: each head of a frame attends to its own list of frames."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        every = rope_angles([frame for part in self.groups for frame in part.frames], 2, 2, q.shape[-1])
        q, k = rotate(q, every), rotate(k, every)
        q, k, v = (part.unflatten(1, (-1, TOKENS)) for part in (q, k, v))
        place = {frame: index for index, frame in enumerate(f for part in self.groups for f in part.frames)}
        out = torch.empty_like(q)
        for part in self.groups:
            lists = part.head_contexts or (part.context,)
            for index, seen in enumerate(lists):
                heads = slice(index * HEADS // len(lists), (index + 1) * HEADS // len(lists))
                rows = [place[frame] for frame in seen]
                keys, values = (cached[:, rows][:, :, :, heads].flatten(1, 2) for cached in (k, v))
                for frame in part.frames:
                    out[:, place[frame], :, heads] = attention(q[:, place[frame], :, heads], keys, values)
        return out.flatten(1, 2)


class DenseText:
    """Cross-attention frame by frame, each to its own text."""

    def __init__(self, texts: Sequence) -> None:
        self.texts = texts

    def attend(self, layer: int, q: Tensor) -> Tensor:
        parts = q.chunk(len(self.texts), dim=1)
        return torch.cat([text.attend(layer, part) for part, text in zip(parts, self.texts, strict=True)], dim=1)


@torch.no_grad()
def dense(engine: Engine, groups: Sequence[Group], latents: Tensor) -> Tensor:
    """Velocity [F, C, H, W] of all frames of `groups` in one call of the model."""
    model = engine.parts.transformer
    rows = {PROMPT: ROWS, NULL: NEGATIVE}
    texts = {text: model.embed_text(engine.inputs.prompt_rows(None, given)[None]) for text, given in rows.items()}
    per_frame = [texts[part.text] for part in groups for _ in part.frames]
    timesteps = torch.tensor([[part.timestep for part in groups for _ in part.frames]])
    return model(latents[None], timesteps, DenseText(per_frame), DenseFrames(groups))[0]


@cache
def latents_of(frames: int) -> Tensor:
    return torch.randn(frames, 16, 4, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def open_engine(form: str, name: str = "rolling-forcing", **overrides: object) -> Engine:
    given = {"local_attn_size": 21, "clean_text": "null", "executor": "fused" if form == "fused" else "eager"}
    engine = make_engine(name, **(given | overrides))
    return contiguous(engine) if form == "contiguous" else engine


def open_session(engine: Engine, **kwargs: object) -> Session:
    return engine.open(prompt_embeds=ROWS, negative_embeds=NEGATIVE, size=SIZE, **kwargs)


@torch.no_grad()
def velocity(engine: Engine, session: Session, run: Pass) -> Tensor:
    """Run one hand-made pass of a session: its frames of `latents_of(15)`."""
    engine.loop.roll_caches(session.current, run)
    return engine.loop.velocity(session.current, run, latents_of(15)[list(run.frames)])


FIRST = group(range(0, 3), 0.0, range(0, 3), True, NULL)
CLEAN = group(range(3, 6), 0.0, range(3, 6), True, NULL)  # a commit and two noisy blocks in one pass
NEARLY = group(range(6, 9), 250.0, range(3, 9), False)
NOISY = group(range(9, 12), 750.0, range(0, 12), False)
AFTER = group(range(12, 15), 500.0, (0, 1, 2, 3, 4, 5, 12, 13, 14), False, NULL)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_pass_with_mixed_writes_and_texts_is_one_dense_call(form: str, order: tuple[int, ...]) -> None:
    """Whichever group of the pass writes; what it wrote is read by a later pass."""
    engine, parts = open_engine(form), [CLEAN, NEARLY, NOISY]
    mixed = Pass(tuple(parts[index] for index in order))
    expected = dense(engine, [FIRST, CLEAN, NEARLY, NOISY, AFTER], latents_of(15))
    with open_session(engine) as session:
        assert (velocity(engine, session, Pass((FIRST,))) - expected[:3]).abs().max() < 1e-12
        assert (velocity(engine, session, mixed) - expected[list(mixed.frames)]).abs().max() < 1e-12
        assert session.current.branches[0].cache.frames == tuple(range(6))
        assert (velocity(engine, session, Pass((AFTER,))) - expected[12:]).abs().max() < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kv_dtype", [None, "float16"])
def test_heads_can_read_pages_of_their_own(form: str, kv_dtype: str | None) -> None:
    if form == "contiguous" and kv_dtype:
        pytest.skip("the plain cache has no pages")
    engine = open_engine(form, kv_dtype=kv_dtype)
    sparse = Pass((
        group(range(3, 6), 300.0, range(0, 6), False, head_contexts=(tuple(range(6)), (0, 3, 4, 5))),
        group(range(6, 9), 600.0, range(0, 9), False, head_contexts=((6, 7, 8), (1, 2, 6, 8))),
    ))  # fmt: skip
    expected = dense(engine, [FIRST, *sparse.groups], latents_of(9))
    plain = [group(part.frames, part.timestep, part.context, False) for part in sparse.groups]
    everywhere = dense(engine, [FIRST, *plain], latents_of(9))
    with open_session(engine) as session:
        velocity(engine, session, Pass((FIRST,)))
        found = velocity(engine, session, sparse)
    assert (found - expected[3:]).abs().max() < (1e-12 if kv_dtype is None else 5e-3)
    assert (found - everywhere[3:]).abs().max() > 2e-2


@pytest.mark.parametrize("form", FORMS)
def test_a_branch_runs_its_own_groups(form: str) -> None:
    """The negative branch sees less of the past, and leaves one block out: its velocity is 0 there."""
    engine = open_engine(form, "causal-diffusion", num_steps=2, clean_text="prompt")
    seen, alone = group(range(3, 6), 500.0, range(0, 6), True), group(range(3, 6), 500.0, range(3, 6), True)
    more = group(range(6, 9), 900.0, range(3, 9), False, branch=0)
    run = Pass((replaced(seen, 0), replaced(alone, 1), more))
    scale = engine.preset.sampler.guidance_scale
    first = group(range(0, 3), 0.0, range(0, 3), True)
    conditional = dense(engine, [first, seen, more], latents_of(9))[3:]
    null = [Group(g.frames, g.timestep, g.context, g.positions, g.write, NULL) for g in (first, alone)]
    negative = torch.zeros_like(conditional)
    negative[:3] = dense(engine, null, latents_of(6))[3:]
    with open_session(engine) as session:
        velocity(engine, session, Pass((first,)))
        found = velocity(engine, session, run)
        caches = [branch.cache.frames for branch in session.current.branches]
    assert (found - (negative + scale * (conditional - negative))).abs().max() < 1e-12
    assert caches == [tuple(range(6)), tuple(range(3, 6))]


def replaced(part: Group, branch: int) -> Group:
    return Group(part.frames, part.timestep, part.context, part.positions, part.write, part.text, branch)


STAGED = {  # two chunks of two frames in flight, two steps between joins
    "num_frame_per_block": 2, "window_blocks": 2, "denoising_step_list": [1000, 750, 500, 250], "local_attn_size": 6,
    "sink_size": 0, "positions": "absolute", "commit_sees_sink": True, "noise2clean_kvrange": [3, 2],
    "clean_chunk_kvrange": 1, "context_noise": 20,
}  # fmt: skip


@torch.no_grad()
def dense_stream(engine: Engine, blocks: int) -> Tensor:
    """Chunks denoised in stages, as a plain loop: each pass is one dense call over all chunks so far."""
    sampler, noise, shape, every = Sampler(engine.preset.sampler), PhiloxNoise(0), (16, 4, 4), 2
    solvers = [sampler.begin() for _ in range(blocks + 1)]
    chunks = [noise.draw(c, range(2 * c, 2 * c + 2), 0, shape).double() for c in range(blocks + 1)]
    for stage in range(blocks + 1):
        for inner in range(every):
            groups, oldest = [], max(0, stage - 1)
            for chunk in range(stage + 1):
                own = range(2 * chunk, 2 * chunk + 2)
                if chunk < oldest:
                    groups.append(group(own, 20.0, own, True, NULL))
                    continue
                step = (stage - chunk) * every + inner
                start = max(0, chunk + 1 - (3, 2)[step // 2])
                groups.append(group(own, sampler.timesteps[step], range(2 * start, own.stop), False))
            found = dense(engine, groups, torch.cat(chunks[: stage + 1])).split(2)
            for chunk in range(oldest, stage + 1):
                step, frames = (stage - chunk) * every + inner, range(2 * chunk, 2 * chunk + 2)
                draw = lambda c=chunk, f=frames, s=step: noise.draw(c, f, s + 1, shape).double()  # noqa: E731
                chunks[chunk] = solvers[chunk].advance(chunks[chunk], found[chunk], step, draw)
    return torch.cat(chunks[:blocks])


@pytest.mark.parametrize("form", FORMS)
def test_staggered_chunks_with_key_ranges_are_a_dense_loop(form: str, tmp_path) -> None:
    """Saved half-way, forked and restored; pages stay within what a session needs."""
    engine = open_engine(form, **STAGED)
    with open_session(engine) as session:
        made = [block.latents for block in session.stream(3, decode=False)]
        if form == "contiguous":
            made += [block.latents for block in session.stream(3, decode=False)]
        else:
            session.save(tmp_path / "half.safetensors")
            with session.fork() as other:
                forked = [block.latents for block in other.stream(3, decode=False)]
            with Session.restore(engine, tmp_path / "half.safetensors") as again:
                made += [block.latents for block in again.stream(3, decode=False)]
            assert torch.equal(torch.cat(forked), torch.cat(made[3:]))
            cache = session.current.branches[0].cache
            assert len(cache.frames) <= 6
    assert (torch.cat(made) - dense_stream(engine, 6)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"window_blocks": 3}, "window_blocks is 3"),
        ({"noise2clean_kvrange": [3, 2, 2]}, "noise2clean_kvrange"),
        ({"noise2clean_kvrange": [3, 0]}, "noise2clean_kvrange"),
        ({"noise2clean_kvrange": [3, 2.5]}, "noise2clean_kvrange"),
        ({"noise2clean_kvrange": [4, 2]}, "local_attn_size 6"),
        ({"clean_chunk_kvrange": 3}, "clean_chunk_kvrange 3"),
        ({"commit_sees_sink": False, "sink_size": 1, "local_attn_size": 7}, "commit_sees_sink"),
        ({"clean_text": "caption"}, "clean_text"),
        ({"clean_text": "prompt", "prompt_switch": "recache"}, "window_blocks is 2.*recache"),
        ({"segment_frames": 6, "rebuild_frames": 2}, "window_blocks is 2.*segment_frames 6"),
        ({"commit": False, "rebuild_frames": 2}, "window_blocks is 2.*commit False"),
        ({"clean_text": "null", "prompt_switch": "recache"}, "clean_text"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(overrides: dict, named: str) -> None:
    make_preset("rolling-forcing", **STAGED)
    with pytest.raises(UsageError, match=named):
        make_preset("rolling-forcing", **(STAGED | overrides))


def test_a_null_caption_must_be_given() -> None:
    with pytest.raises(UsageError, match="negative_prompt"):
        open_engine("eager").open(prompt_embeds=ROWS, size=SIZE)


def test_page_lists_by_head_group_are_attention_of_each_group() -> None:
    """In the reference; another form refuses them and says its name."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 5, 6, 8, generator=generator, dtype=torch.float64)
    kv = torch.randn(2, 7, 3, 2, 8, generator=generator, dtype=torch.float64)
    table = torch.tensor([[[0, 1, 2], [3, 0, 0], [5, 6, 0]], [[4, 0, 0], [1, 3, 0], [2, 6, 5]]], dtype=torch.int32)
    count = torch.tensor([[3, 1, 2], [1, 2, 3]], dtype=torch.int32)
    found = block_attention(q, kv, table, count)
    for part in range(3):
        whole = block_attention(q, kv, table[:, part].contiguous(), count[:, part].contiguous())
        heads = slice(2 * part, 2 * part + 2)
        assert torch.equal(found[:, :, heads], whole[:, :, heads])
    with using(block_attention="sdpa"), pytest.raises(UsageError, match="sdpa"):
        block_attention(q, kv, table, count)
    with pytest.raises(UsageError, match="page_count"):
        block_attention(q, kv, table, count[:, 0].contiguous())
    with pytest.raises(UsageError, match="heads"):
        block_attention(q[:, :, :4].contiguous(), kv, table, count)
