"""Streams of MAGI-1 equal the same passes over whole sequences, each chunk seeing what the published masks say."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_family import DenseFrames

import inferix
from inferix.errors import UsageError
from inferix.models.cross_attention import TextByFrames
from inferix.models.magi.costs import MagiCosts
from inferix.models.magi.spec import MAGI_TINY, MAGI_TINY_FP8
from inferix.models.registry import make_preset
from inferix.models.transformer import TextContext
from inferix.runtime.engine import Engine
from inferix.runtime.noise import InjectedNoise
from inferix.runtime.programs.block_graph import BranchJoin, SolverStep, branch_velocity
from inferix.runtime.programs.block_plan import plan_block
from inferix.runtime.sampler import Sampler
from inferix.schemes.block_schedule import branch_run

SIZE, GRID, CHUNK, CLEAN = (32, 32), (2, 2), 6, 0.9999
PROMPT = torch.randn(5, MAGI_TINY.text_dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
NOISE = torch.randn(8 * CHUNK, 16, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def load(preset: str, **more: object) -> Engine:
    settings = {"device": "cpu", "dtype": "float64", "executor": "eager"} | more
    return inferix.load("magi-tiny", preset=preset, **settings)


def published_times(steps: int) -> list[float]:
    """Time before each step, and 1."""
    lengths = [2, 1, 1] * 4 if steps == 12 else [1] * steps
    u = [sum(lengths[:index]) / sum(lengths) for index in range(steps + 1)]
    return [value**2 / (3 - 2 * value**2) for value in u]


@dataclass
class Chunk:
    """One chunk of a dense sequence. step: None for a clean one; fresh: it is fed again for the first time."""

    latents: Tensor
    step: int | None
    fresh: bool = False


class Dense:
    """Whole sequences through the model, written from the published rules."""

    def __init__(self, engine: Engine, steps: int, window: int = 4) -> None:
        self.model, self.steps, self.window = engine.parts.transformer, steps, window
        self.times = published_times(steps)
        rows = torch.cat((PROMPT, PROMPT.new_zeros(MAGI_TINY.text_len - len(PROMPT), MAGI_TINY.text_dim)))
        null = self.model.null_text()
        given = {"prompt": (rows, False), "clean": (null, False), "null": (null, True)}
        self.texts: dict[str, TextContext] = {
            name: self.model.embed_text(self.model.text_inputs(*value)[None]) for name, value in given.items()
        }

    def time(self, chunk: Chunk) -> float:
        return CLEAN if chunk.step is None else self.times[chunk.step]

    def blocks_seen(self, chunk: Chunk) -> int:
        return 1 if chunk.step is None else (5, 4, 3, 2)[chunk.step * 4 // self.steps]

    def run(self, chunks: list[Chunk], texts: list[str], alone: bool, conditions: list[float]) -> list[Tensor]:
        """Velocity of each chunk in one pass over all of them. conditions: of each, none for base models."""
        groups = []
        for index, chunk in enumerate(chunks):
            own = range(CHUNK * index, CHUNK * (index + 1))
            first = index if alone else max(0, index + 1 - self.blocks_seen(chunk))
            groups.append((own, range(CHUNK * first, own.stop), range(CHUNK) if alone else own))
        times = torch.tensor([[1000 * self.time(chunk) for chunk in chunks for _ in range(CHUNK)]])
        if conditions:
            by_frame = torch.tensor([[condition for condition in conditions for _ in range(CHUNK)]])
            times = torch.stack((times, by_frame), dim=-1)
        context = TextByFrames([(CHUNK, self.texts[name]) for name in texts])
        latents = torch.cat([chunk.latents for chunk in chunks])[None]
        return list(self.model(latents, times, context, DenseFrames(self.model.rope, groups, GRID))[0].split(CHUNK))

    def distilled(self, chunks: list[Chunk]) -> list[Tensor]:
        lengths = [2, 1, 1] * 4 if self.steps == 12 else [1] * self.steps
        # chunks in flight take steps of one length; a clean one was fed again in the first step of a stage
        conditions = [
            8 / lengths[chunk.step or 0] if self.steps == 12 else self.steps / 4 * 2 for chunk in chunks
        ]
        texts = ["clean" if chunk.step is None else "prompt" for chunk in chunks]
        past, alone = (self.run(chunks, texts, own, conditions) for own in (False, True))
        return [
            0.7 * past[index] + 0.3 * alone[index] if self.time(chunk) >= 0.3 - 1e-9 else past[index]
            for index, chunk in enumerate(chunks)
        ]

    def guided(self, chunks: list[Chunk]) -> list[Tensor]:
        texts = ["prompt" if chunk.step is not None else "clean" if chunk.fresh else "null" for chunk in chunks]
        nulls = ["null"] * len(chunks)
        full, past, free = (self.run(chunks, *form, []) for form in ((texts, False), (nulls, False), (nulls, True)))
        late = [self.time(chunk) >= 0.3 - 1e-9 for chunk in chunks]
        return [
            past[index] if late[index] else -0.5 * free[index] + (1.5 - 7.5) * past[index] + 7.5 * full[index]
            for index in range(len(chunks))
        ]

    @torch.no_grad()
    def stream(self, count: int, is_distilled: bool, given: Tensor | None = None) -> list[Tensor]:
        """Latents of `count` chunks after a prefix; what the prefix leaves over is put over the next chunk."""
        given = NOISE[:0] if given is None else given
        whole, paste = len(given) // CHUNK, given[len(given) // CHUNK * CHUNK :]
        share = self.steps // self.window
        chunks = [Chunk(part, None) for part in given[: whole * CHUNK].split(CHUNK)] if whole else []
        total = whole + count
        for stage in range(whole, total + self.window - 1):
            if stage < total:
                chunks.append(Chunk(NOISE[CHUNK * stage : CHUNK * (stage + 1)], 0))
            for inner in range(share):
                if len(paste):
                    first = chunks[whole]
                    first.latents = torch.cat((paste, first.latents[len(paste) :]))
                moving = [chunk for chunk in chunks if chunk.step is not None]
                for chunk in chunks:
                    chunk.fresh = chunk.fresh and inner == 0
                found = self.distilled(chunks) if is_distilled else self.guided(chunks)
                for chunk, velocity in zip(chunks, found, strict=True):
                    if chunk.step is not None:
                        length = self.times[chunk.step + 1] - self.times[chunk.step]
                        chunk.latents, chunk.step = chunk.latents + length * velocity, chunk.step + 1
                assert len(moving) <= self.window
            if (done := chunks[max(whole, stage - self.window + 1)]).step == self.steps:
                self.finished.append(done.latents)
                done.step, done.fresh = None, True
            if len(self.finished) == count:
                break
        return self.finished

    @property
    def finished(self) -> list[Tensor]:
        if not hasattr(self, "kept"):
            self.kept: list[Tensor] = []
        return self.kept


def streamed(engine: Engine, count: int, **more: object) -> list[Tensor]:
    with engine.open(prompt_embeds=PROMPT, noise=InjectedNoise(NOISE), size=SIZE, **more) as session:
        made = [block.latents for block in session.stream(count, decode=False)]
        engine.check_integrity()
    return made


def assert_same(made: list[Tensor], wanted: list[Tensor]) -> None:
    assert [len(part) for part in made] == [len(part) for part in wanted]
    assert max((a - b).abs().max().item() for a, b in zip(made, wanted, strict=True)) < 1e-10


@pytest.mark.parametrize("steps", [8, 12])
def test_a_distilled_stream_is_the_dense_form(steps: int) -> None:
    engine = load("magi-tiny-distill", num_steps=steps)
    assert_same(streamed(engine, 3), Dense(engine, steps).stream(3, is_distilled=True))


def test_a_guided_stream_is_the_dense_form() -> None:
    engine = load("magi-tiny", num_steps=8)
    assert_same(streamed(engine, 3), Dense(engine, 8).stream(3, is_distilled=False))




class GivenLatents:
    """Frames of a video that the autoencoder encodes as given latents."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: Engine, frames: int) -> None:
        self.latents = torch.randn(frames, 16, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        self.left = self.latents
        monkeypatch.setattr(engine.parts.vae, "encode", self.encode)

    def encode(self, pixels: Tensor, state: object) -> Tensor:
        made, self.left = self.left[: len(pixels) // 4], self.left[len(pixels) // 4 :]
        return made


@pytest.mark.parametrize(
    ("preset", "frames"),
    [("magi-tiny-distill", 1), ("magi-tiny-distill", 8), ("magi-tiny-distill", 12), ("magi-tiny", 8)],
)
def test_a_prefix_is_the_dense_form(preset: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole chunks are committed, the rest is put over the next chunk, which a video's stream does not show again."""
    engine = load(preset, num_steps=8)
    given = GivenLatents(monkeypatch, engine, frames)
    pixels = np.zeros((4 * frames, SIZE[1], SIZE[0], 3), np.uint8)
    still = {"image": pixels[0]} if frames == 1 else {"video": pixels}
    wanted = Dense(engine, 8).stream(2, preset.endswith("distill"), given.latents)
    if frames > CHUNK:
        wanted[0] = wanted[0][frames % CHUNK :]
    made = streamed(engine, 2, **still)
    assert_same(made, wanted)
    assert [len(part) for part in made] == [{1: 6, 8: 4, 12: 6}[frames], 6]


@pytest.mark.parametrize("preset", ["magi-tiny-distill", "magi-tiny"])
def test_a_stream_goes_on_after_save_fork_and_rewind(preset: str, tmp_path: Path) -> None:
    """Bit for bit, with a finished chunk that the next pass commits."""
    engine = load(preset, num_steps=8, rewind_blocks=1)
    with engine.open(prompt_embeds=PROMPT, seed=3, size=SIZE) as session:
        list(session.stream(2, decode=False))
        session.save(tmp_path / "magi.safetensors")
        with session.fork() as other:
            forked = [block.latents for block in other.stream(2, decode=False)]
        wanted = [block.latents for block in session.stream(2, decode=False)]
        session.rewind(3)
        (again,) = (block.latents for block in session.stream(1, decode=False))
        engine.check_integrity()
    with inferix.Session.restore(load(preset, num_steps=8, rewind_blocks=1), tmp_path / "magi.safetensors") as session:
        restored = [block.latents for block in session.stream(2, decode=False)]
    assert torch.equal(torch.cat(forked), torch.cat(wanted)) and torch.equal(torch.cat(restored), torch.cat(wanted))
    assert torch.equal(again, wanted[1])


def test_masked_rows_of_a_prompt_are_not_seen() -> None:
    engine, mask = load("magi-tiny-distill", num_steps=8), torch.tensor([1, 0, 1, 0, 0])
    opened = {"noise": InjectedNoise(NOISE), "size": SIZE}
    with engine.open(prompt_embeds=PROMPT, prompt_mask=mask, **opened) as session:
        (masked,) = (block.latents for block in session.stream(1, decode=False))
    with engine.open(prompt_embeds=PROMPT[mask.bool()], **opened) as session:
        (packed,) = (block.latents for block in session.stream(1, decode=False))
    (whole,) = streamed(engine, 1)
    assert (masked - packed).abs().max() < 1e-10 < (masked - whole).abs().max()
    with pytest.raises(UsageError, match=r"prompt_mask.*3"):
        engine.open(prompt_embeds=PROMPT, prompt_mask=mask[:3], **opened)


def test_velocities_of_branches_are_joined_by_block() -> None:
    """In a block's graph a branch that leaves a block out has no part in its velocity."""
    preset = make_preset("magi-tiny", num_steps=8)
    planned = next(planned for planned in plan_block(preset) if planned.lead == 0)
    guidance = preset.sampler.guide
    runs = {number: branch_run(guidance, planned.run, number) for number in range(3)}
    present = {number: run for number, run in runs.items() if run is not None}
    parts = {number: torch.randn(1, len(run.frames), 1, 1, 1) for number, run in present.items()}
    assert [len(run.frames) for run in present.values()] == [24, 24, 18]
    step = SolverStep(Sampler(preset.sampler), planned.steps, CHUNK)
    values = {branch_velocity(planned.name, number): part for number, part in parts.items()}
    latents = {name: torch.zeros(1, CHUNK, 1, 1, 1) for name in planned.latents}
    made = BranchJoin(guidance, planned, present, step)(values | latents)
    lengths = [after - before for before, after in pairwise(published_times(8))]
    nearly_clean = lengths[planned.steps[0]] * parts[1][:, :CHUNK]
    noisy = lengths[planned.steps[1]] * sum(
        weight * parts[number][:, at : at + CHUNK] for number, weight, at in ((0, 7.5, 6), (1, -6.0, 6), (2, -0.5, 0))
    )
    assert torch.allclose(made["clean"], nearly_clean) and torch.allclose(made["latents.0"], noisy)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["magi-tiny-distill", "magi-tiny"])
def test_graphs_are_what_eager_runs(preset: str) -> None:
    eager, fused = (streamed(load(preset, num_steps=8, executor=name), 3) for name in ("eager", "fused"))
    assert_same(fused, eager)


# A prompt for each chunk


OTHER = PROMPT.flip(0) * 1.5


class DensePrompts(Dense):
    """Dense sequences in which each chunk follows the prompt of its number."""

    def __init__(self, engine: Engine, steps: int, second: int) -> None:
        super().__init__(engine, steps)
        self.second = second
        rows = torch.cat((OTHER, OTHER.new_zeros(MAGI_TINY.text_len - len(OTHER), MAGI_TINY.text_dim)))
        self.texts["other"] = self.model.embed_text(self.model.text_inputs(rows, False)[None])

    def run(self, chunks: list[Chunk], texts: list[str], alone: bool, conditions: list[float]) -> list[Tensor]:
        own = ["other" if text == "prompt" and at >= self.second else text for at, text in enumerate(texts)]
        return super().run(chunks, own, alone, conditions)


@pytest.mark.parametrize(("preset", "second"), [("magi-tiny-distill", 1), ("magi-tiny-distill", 2), ("magi-tiny", 2)])
def test_each_chunk_follows_its_own_prompt(preset: str, second: int) -> None:
    engine = load(preset, num_steps=8)
    wanted = DensePrompts(engine, 8, second).stream(3, preset.endswith("distill"))
    assert_same(streamed(engine, 3, prompts={second: OTHER}), wanted)


def test_a_new_prompt_is_that_of_chunks_that_join_later(tmp_path: Path) -> None:
    """Four chunks have joined when the first is finished, so the fifth, number 4, is the first under the new prompt."""
    engine = load("magi-tiny-distill", num_steps=8)
    wanted = DensePrompts(engine, 8, 4).stream(3, True)
    with engine.open(prompt_embeds=PROMPT, noise=InjectedNoise(NOISE), size=SIZE) as session:
        made = list(session.stream(1, decode=False))
        session.prompt(embeds=OTHER)
        made += session.stream(1, decode=False)
        with session.fork() as other:
            forked = [block.latents for block in other.stream(1, decode=False)]
        made += session.stream(1, decode=False)
    assert_same([block.latents for block in made], wanted)
    assert_same(forked, wanted[2:])


def test_prompts_of_chunks_are_saved(tmp_path: Path) -> None:
    engine = load("magi-tiny-distill", num_steps=8)
    with engine.open(prompt_embeds=PROMPT, seed=4, size=SIZE, prompts={2: OTHER, 5: PROMPT * 2}) as session:
        list(session.stream(1, decode=False))
        session.save(tmp_path / "magi.safetensors")
        wanted = [block.latents for block in session.stream(2, decode=False)]
    with inferix.Session.restore(load("magi-tiny-distill", num_steps=8), tmp_path / "magi.safetensors") as session:
        restored = [block.latents for block in session.stream(2, decode=False)]
    assert torch.equal(torch.cat(restored), torch.cat(wanted))


@pytest.mark.parametrize(
    ("prompts", "named"),
    [({0: "a fox"}, "0"), ({"1": "a fox"}, "'1'"), (["a fox"], "a fox"), ({1: 3}, "3")],
)
def test_prompts_that_are_not_by_block_are_refused(prompts: object, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        load("magi-tiny-distill").open(prompt_embeds=PROMPT, size=SIZE, prompts=prompts)
    with pytest.raises(UsageError, match="recache"):
        inferix.load("wan-tiny", "longlive", device="cpu", force=True).open(prompt="a fox", prompts={1: "a cat"})


def test_latents_are_in_float32_between_steps() -> None:
    engine = load("magi-tiny-distill", num_steps=8, dtype="bfloat16")
    with engine.open(prompt_embeds=PROMPT.bfloat16(), seed=3, size=SIZE) as session:
        (block,) = session.stream(1)
    assert block.latents.dtype == torch.float32 and len(block.frames) == 24


def test_a_stream_of_fp8_layers_is_the_dense_form() -> None:
    engine = inferix.load("magi-tiny-fp8", executor="eager", **FP8)
    assert_same(streamed(engine, 1), Dense(engine, 8).stream(1, is_distilled=True))


FP8 = {"preset": "magi-tiny-distill", "device": "cpu", "dtype": "float64", "num_steps": 8}


@pytest.mark.slow
def test_the_plan_counts_the_float32_copies_that_graphs_keep() -> None:
    engine = inferix.load("magi-tiny-fp8", **FP8 | {"dtype": "bfloat16", "executor": "fused"})
    with engine.open(prompt_embeds=PROMPT.bfloat16(), seed=1, size=SIZE) as session:
        list(session.stream(1, decode=False))
    planned = MagiCosts(MAGI_TINY_FP8).wide_bytes("bfloat16")
    assert 0.8 * planned <= engine.executor.bytes_by_owner()["constants"] <= 1.1 * planned


@pytest.mark.slow
def test_graphs_of_fp8_layers_are_what_eager_runs() -> None:
    eager, fused = (streamed(inferix.load("magi-tiny-fp8", executor=name, **FP8), 1) for name in ("eager", "fused"))
    assert_same(fused, eager)
