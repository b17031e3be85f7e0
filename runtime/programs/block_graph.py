"""Block graph of a model and a preset: each pass traced over pages, followed by the step of its solver.

Tracing uses fake weights, so a graph of any model size takes seconds. A pass is the forward of the model and the step
of the sampler, with the frames that the block schedule gives once the window is full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ...errors import UsageError
from ...graphs.compose import chained
from ...graphs.paged_attention import PagedAttention
from ...graphs.passes import Pass
from ...graphs.shards import ALONE, NONE, WHOLE, Axis, OnPages, Shard, Stage, run_on_ranks
from ...graphs.staged_attention import StagedAttention
from ...graphs.tables import PassTables
from ...graphs.trace import fake_model, trace
from ...graphs.types import BlockGraph, GraphShape, PassGraph, Role, Value, When, name_in_set
from ...kernels.frame_noise import frame_noise
from ...models.cross_attention import TextByFrames, TextKeyValues
from ...models.family import Family
from ...models.registry import family_of
from ...models.spec import ModelSpec
from ...models.transformer import FrameContext, KeyValues, TextContext, Transformer
from ...schemes.block_schedule import branch_run
from ...schemes.guidance import Guidance, classifier_free
from ...schemes.presets import Preset
from ...schemes.sampler_spec import SamplerSpec
from ..kv.page_store import PageForm
from ..sampler import Sampler, guided, latent_dtype
from .block_plan import PlannedPass, latent_names, plan_block

TRACES = 64  # passes and steps of a process, each kept for blocks of the same shapes
TABLES = ("pages", "page_table", "page_count", "rope_time", "rope_sink", "sink_count")
WRITTEN = ("written_slots", "written_pages")  # where pages have another dtype than the model
SEEN = ("seen_pages", "seen_slots")  # and are restored into the staging buffer to be read


@dataclass(frozen=True)
class Layout:
    """Key of a traced pass: passes with equal layouts share one trace.

    parts: (groups, frames of each). latents: names of the input latents, in order. tables: prefix of the names of its
    tables. sinks: True if queries are rotated once more for the sink. slots: size of the staging buffer; 0 where pages
    have the model's dtype. texts: (text, frames) in token order where frames follow different ones, else empty.
    head_groups: groups of heads that read lists of their own; 0 for one list for all. branch: prefix of the names of
    the texts of a branch that runs by itself.
    """

    parts: tuple[tuple[int, int], ...]
    latents: tuple[str, ...]
    tables: str
    sinks: bool
    slots: int = 0
    texts: tuple[tuple[int, int], ...] = ()
    head_groups: int = 0
    branch: str = ""

    @property
    def frames(self) -> int:
        return sum(groups * frames for groups, frames in self.parts)

    @property
    def text_names(self) -> tuple[str, ...]:
        """Names of the texts' rows, ascending by number."""
        numbers = sorted({text for text, _ in self.texts})
        return tuple(f"{self.branch}text.{number}" for number in numbers) or (f"{self.branch}text",)

    def table(self, part: int, what: str) -> str:
        """Name of table `what` of one part within the block graph."""
        return ".".join([self.tables, *([str(part)] if len(self.parts) > 1 else []), what])


class ModelPass(nn.Module):
    """The model over pages: named tensors in, velocity [B, F, C, H, W] of B sessions out.

    With guidance of n branches the batch has n*B rows, branch by branch, and the velocity is the guided one. shard:
    part of the pass that this rank computes; velocities are whole on every rank.
    """

    def __init__(self, model: Transformer, layout: Layout, guidance: Guidance, shard: Shard = ALONE) -> None:
        super().__init__()
        self.model, self.layout, self.guidance, self.shard = model, layout, guidance, shard
        self.half_split = model.rope.half_split

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        layout, spec = self.layout, self.model.spec
        parts = [
            PassTables(**{what: values.get(layout.table(part, what)) for what in TABLES})  # type: ignore[arg-type]
            for part in range(len(layout.parts))
        ]
        layers = range(len(self.shard.stage.layers(spec.num_layers)))
        kv = [values[f"kv.{index}"] for index in layers]
        rope = values["rope_rows"], values["rope_columns"]
        attention: OnPages = PagedAttention(parts, kv, *rope, half_split=self.half_split)
        if layout.slots:
            slots, pages = (values[f"{layout.tables}.{what}"] for what in WRITTEN)
            seen = [values[name] for what in SEEN if (name := f"{layout.tables}.{what}") in values]
            scales = [values[f"scale.{index}"] for index in layers] if "scale.0" in values else None
            written, through = (slots, pages), (seen[0], seen[1]) if seen else None
            attention = StagedAttention(
                parts, kv, scales, values["staging"], written, through, *rope, half_split=self.half_split
            )
        latents = [values[name] for name in layout.latents]
        x = latents[0] if len(latents) == 1 else torch.cat(latents, dim=1)
        count = len(self.guidance.branches)
        rows = torch.cat([x] * count) if count > 1 else x
        timesteps = values["timesteps"]
        timesteps = timesteps.expand(len(rows), *timesteps.shape[1:])
        actions = values[f"{layout.tables}.actions"] if spec.action_dim is not None else None
        text, beside = self.text(values, len(rows)), self.frames(values)

        def run(latents: Tensor, kv: KeyValues, origin: tuple[int, int] | None = None) -> Tensor:
            more = () if origin is None else (origin,)
            result: Tensor = self.model(latents, timesteps, text, kv, actions, *more, **beside)
            return result

        velocity = run_on_ranks(run, self.shard, spec.patch, spec.grid, rows, attention)
        if count > 1:
            velocity = guided(self.guidance, dict(enumerate(velocity.split(len(x)))), [0.0])
        return {"velocity": velocity}

    def frames(self, values: dict[str, Tensor]) -> dict[str, FrameContext]:
        """Argument `frames` of the model for the pass: condition channels and camera; empty for models without them.

        Layers make their modulation where they use it: the rewrite `hoist-frames` computes it once for a block.
        """
        channels = values.get(f"{self.layout.tables}.frame_channels")
        if channels is None:
            return {}
        if (branches := len(self.guidance.branches)) > 1:
            channels = torch.cat([channels] * branches)
        if self.shard.ranks > 1:
            channels = self.shard.cut(channels, self.model.spec.patch)
        return {"frames": self.model.embed_frames(channels, each_layer=False)}

    def text(self, values: dict[str, Tensor], rows: int) -> TextKeyValues:
        """Cross-attention of the pass, each frame's to the text that it follows; one text may be that of all rows."""
        texts = {name: self.embedded(values[name], rows) for name in self.layout.text_names}
        if not self.layout.texts:
            return texts[f"{self.layout.branch}text"]
        prefix = f"{self.layout.branch}text"
        return TextByFrames([(frames, texts[f"{prefix}.{text}"]) for text, frames in self.layout.texts])

    def embedded(self, text: Tensor, rows: int) -> TextContext:
        context = self.model.embed_text(text)
        return context if len(text) == rows else context.for_rows(rows)


class SolverStep(nn.Module):
    """Solver step over each block in flight: velocity in, latents of the next noise level out.

    A single block keeps the name `latents`. Of several, each keeps its name until the first is clean: that is `clean`
    then, and each other takes the name of the one before it. The history of a multistep solver is named after the step
    that made it.
    """

    def __init__(self, sampler: Sampler, steps: tuple[int, ...], frames: int, lead: int = 0) -> None:
        super().__init__()
        self.sampler, self.steps, self.frames, self.lead = sampler, steps, frames, lead
        assert sampler.sigmas  # computed before tracing, so that the trace does not contain the computation

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        results, names = dict[str, Tensor](), latent_names(len(self.steps))
        finished = len(names) > 1 and self.steps[0] + 1 == len(self.sampler.sigmas)
        after = ("clean", *names) if finished else names
        for slot, step in enumerate(self.steps):
            rows = slice(slot * self.frames, (slot + 1) * self.frames)
            latents = values[names[slot]]
            draw = partial(self.draw, values, latents, rows, step + 1)
            solver = self.sampler.begin()
            solver.resume(step, values)
            velocity = values["velocity"][:, self.lead + rows.start : self.lead + rows.stop]
            results[after[slot]] = solver.advance(latents, velocity, step, draw)
            results |= solver.written(step)
        return results

    def draw(self, values: dict[str, Tensor], latents: Tensor, rows: slice, draw: int) -> Tensor:
        """Noise of the frames in `rows`, equal to what `PhiloxNoise` draws for the session."""
        _, _, channels, height, width = latents.shape
        noise = frame_noise(values["frames"][:, rows], values["noise_key"], (channels, height, width), draw=draw)
        return noise.to(latents.dtype)


class InitialNoise(nn.Module):
    """Latents at the start of a block: noise of each session's seed, as `PhiloxNoise` draws it, times `scale`.

    actions: name of the frames' actions, of which the first, rest, keeps the noise as it is; None for no actions.
    """

    def __init__(self, size: tuple[int, int, int], dtype: torch.dtype, scale: float, actions: str | None) -> None:
        super().__init__()
        self.size, self.dtype, self.scale, self.actions = size, dtype, scale, actions

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        frames = values["frames"]
        noise = frame_noise(frames, values["noise_key"], self.size, draw=0, dtype=self.dtype)
        if self.scale != 1:
            scales: Tensor | float = self.scale
            if self.actions is not None:
                rests = values[self.actions][: len(frames), :, 0].to(self.dtype)
                scales = torch.where(rests == 1, 1.0, self.scale).to(self.dtype)[:, :, None, None, None]
            noise = noise * scales
        return {"latents": noise}


@dataclass(frozen=True)
class PassSource:
    """Arguments that the trace of a pass depends on besides its layout and shapes.

    family: since another family may be registered under the same name. weights: ranks that divide the weights.
    stage: of ranks that hold layers.
    """

    family: Family
    spec: ModelSpec
    precision: str
    dtype: torch.dtype
    device: str
    weights: Axis = NONE
    stage: Stage = WHOLE


@lru_cache(maxsize=8)
def fake_transformer(source: PassSource) -> Transformer:
    """Make the transformer with fake weights once in a process."""

    def make() -> Transformer:
        model = source.family.build(source.spec, source.precision)
        if (shards := source.family.weight_shards(source.spec, source.weights, source.stage)) is not None:
            shards.divide(model)
        return model

    return fake_model(make, source.dtype, source.device)


@lru_cache(maxsize=TRACES)
def traced_pass(
    source: PassSource, layout: Layout, guidance: Guidance, shard: Shard, inputs: tuple[Value, ...]
) -> PassGraph:
    """Trace a pass of the model once in a process; nothing changes the graph, which builders copy."""
    module = ModelPass(fake_transformer(source), layout, guidance, shard)
    return trace("the model's pass", module, inputs, model="model", device=source.device)


@lru_cache(maxsize=TRACES)
def traced_step(
    spec: SamplerSpec, steps: tuple[int, ...], frames: int, lead: int, device: str, inputs: tuple[Value, ...]
) -> PassGraph:
    """Trace a solver step once in a process."""
    return trace("the solver's step", SolverStep(Sampler(spec), steps, frames, lead), inputs, device=device)


class BranchJoin(nn.Module):
    """Velocities of branches that ran by themselves, joined, and the solver step.

    runs: the pass as each branch ran it, by number. A branch that did not run a block has velocity 0 there.
    """

    def __init__(self, guidance: Guidance, planned: PlannedPass, runs: Mapping[int, Pass], step: SolverStep) -> None:
        super().__init__()
        self.guidance, self.name, self.run, self.runs, self.step = guidance, planned.name, planned.run, runs, step

    def forward(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        weighted = self.guidance.branches_at([group.timestep for group in self.run.groups if group.denoised])
        velocities = {number: self.whole(number, values[branch_velocity(self.name, number)]) for number in weighted}
        return self.step(values | {"velocity": guided(self.guidance, velocities, self.run.timesteps)})

    def whole(self, number: int, velocity: Tensor) -> Tensor:
        """Velocity of all frames of the pass [B, F, C, H, W] from that of the frames that a branch ran."""
        own, parts, at = set(self.runs[number].frames), list[Tensor](), 0
        for group in self.run.groups:
            count = len(group.frames)
            if group.frames[0] in own:
                parts.append(velocity[:, at : at + count])
                at += count
            else:
                parts.append(torch.zeros_like(velocity[:, :1]).expand(-1, count, -1, -1, -1))
        return torch.cat(parts, dim=1)


def branch_name(name: str, number: int) -> str:
    return f"{name}, branch {number}"


def branch_velocity(name: str, number: int) -> str:
    """Name of the velocity that a branch hands on; see `BlockGraphBuilder.one`."""
    return f"{branch_name(name, number)}.velocity"


class BlockGraphBuilder:
    """Builds the block graph of one model, preset and picture size, before any rewrite.

    size: (width, height) of the pictures; None for the model's default. sessions: sessions in the batch. pages: size of
    the page pool; None for enough for one block of each session. fuse_commit: run the commit of the previous block in
    the first pass. kv_dtype: dtype of the pages; None for the model's. slots: of the staging buffer; None for enough.
    shard: part of each pass that this rank computes. texts: rows of a text; None for one for each row of the batch, 1
    where all rows have the same unless a table says otherwise. timesteps: rows of the timesteps; 1 for the same in all.
    """

    def __init__(
        self,
        spec: ModelSpec,
        preset: Preset,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        precision: str = "reference",
        sessions: int = 1,
        pages: int | None = None,
        fuse_commit: bool = False,
        kv_dtype: torch.dtype | None = None,
        slots: int | None = None,
        shard: Shard = ALONE,
        texts: int | None = None,
        timesteps: int = 1,
    ) -> None:
        self.spec, self.preset, self.dtype, self.device, self.sessions = spec, preset, dtype, device, sessions
        self.guide = preset.sampler.guide
        self.guidance = self.guide if self.guide.is_even else classifier_free(1)  # of one batch
        self.rows = sessions * len(self.guidance.branches)
        self.texts, self.timesteps = self.rows if texts is None else texts, timesteps
        self.sampler = Sampler(preset.sampler)
        self.latent_dtype = latent_dtype(preset.sampler, dtype)
        self.planned = plan_block(preset, fuse_commit)
        self.latent = (spec.out_channels, *spec.latent_size(size or spec.default_size))
        self.grid = (self.latent[1] // spec.patch[0], self.latent[2] // spec.patch[1])
        self.max_pages = max(len(group.context) for planned in self.planned for group in planned.run.groups)
        frames = max(len(planned.run.frames) for planned in self.planned)
        self.pages = pages if pages is not None else self.rows * (self.max_pages + frames)
        self.shard = shard
        self.form = PageForm(spec, self.grid, dtype, kv_dtype or dtype, shard)
        self.slots = (slots or self.rows * (self.max_pages + frames)) if self.form.staged else 0
        self.source = PassSource(family_of(spec), spec, precision, dtype, device, shard.weights, shard.stage)
        self.model = fake_transformer(self.source)

    def build(self) -> BlockGraph:
        """Build the graph; UsageError for a model or preset that has none."""
        spec, preset = self.spec, self.preset
        if spec.image_dim is not None:
            raise UsageError(f"streams of {spec.name} are not in this version, so there is no graph of its block")
        if preset.window_blocks > 1 and self.sampler.begin().keeps_history:
            raise UsageError(
                f"window_blocks is {preset.window_blocks} with solver {preset.sampler.solver}, which keeps a history; "
                "that has no graph, use renoise"
            )
        passes = [graph for planned in self.planned for graph in self.graphs_of(planned)]
        flight = self.preset.window_blocks
        frames = self.preset.num_frame_per_block
        results = latent_names(1) if flight == 1 else ("clean", *latent_names(flight)[:-1])
        return BlockGraph(
            model=self.spec.name,
            preset=self.preset.name,
            dtype=self.dtype,
            device=self.device,
            shape=GraphShape(
                self.rows, frames * flight, self.latent, self.grid[0] * self.grid[1], self.pages, self.max_pages
            ),
            timesteps=self.sampler.timesteps,
            sigmas=self.sampler.sigmas,
            passes=tuple(passes),
            prompt=None,
            fold=None,
            results=results,
        )

    def graphs_of(self, planned: PlannedPass) -> list[PassGraph]:
        """Graphs of one planned pass: one, or one for each branch that runs by itself, and one that joins them."""
        if self.guide is self.guidance:
            return [self.one(planned)]
        runs = {number: branch_run(self.guide, planned.run, number) for number in range(len(self.guide.branches))}
        present = {number: run for number, run in runs.items() if run is not None}
        graphs = [self.branch_pass(planned, number, run) for number, run in present.items()]
        return [*graphs, self.join(planned, present)] if planned.steps else graphs

    def branch_pass(self, planned: PlannedPass, number: int, run: Pass) -> PassGraph:
        """Graph of a planned pass as one branch runs it; hands on its `branch_velocity`."""
        frames = planned.run.frames
        size, own = len(frames) // len(planned.latents), set(run.frames)
        latents = tuple(name for slot, name in enumerate(planned.latents) if frames[slot * size] in own)
        name, tables = branch_name(planned.name, number), branch_name(planned.tables, number)
        part = replace(planned, name=name, run=run, latents=latents, tables=tables, steps=(), lead=0)
        text = self.guide.branches[number].text
        return self.one(part, branch="" if text == "prompt" else f"{text}.")

    def join(self, planned: PlannedPass, runs: Mapping[int, Pass]) -> PassGraph:
        """Graph that joins the velocities of branches and takes the solver step."""
        step = SolverStep(self.sampler, planned.steps, self.preset.num_frame_per_block, planned.lead)
        values = [value for value in self.step_values(planned) if value.name != "velocity"]
        for number, run in runs.items():
            shape = (self.sessions, len(run.frames), *self.latent)
            name = branch_velocity(planned.name, number)
            values.append(Value(name, Role.INPUT, shape, self.latent_dtype, When.PASS))
        module = BranchJoin(self.guide, planned, runs, step)
        traced = trace("the join of branches", module, values, device=self.device)
        return replace(chained(f"{planned.name}, join", traced), groups=planned.run.groups, runs=planned.runs)

    def one(self, planned: PlannedPass, branch: str = "") -> PassGraph:
        """Graph of one planned pass: the traced model with the timesteps of the pass, then the solver step."""
        model = self.model_pass(replace(self.layout(planned), branch=branch))
        timesteps = planned.run.timesteps
        condition = [] if planned.run.condition is None else [planned.run.condition]
        rows = [number for timestep in timesteps for number in (timestep, *condition)]
        literals = {"timesteps": Value.of_literal(rows, self.timesteps_shape(len(timesteps)), torch.float32)}
        step = self.step(planned) if planned.steps else None
        graph = chained(planned.name, model, step, literals)
        if number := planned.run.weights:
            weights = graph.named(Role.WEIGHT).items()
            named = {key: replace(value, name=name_in_set(value.name, number)) for key, value in weights}
            graph = replace(graph, inputs=graph.inputs | named)
        if step is None:  # the pass is run for the pages it writes; nothing reads its velocity
            graph = replace(graph, outputs=(replace(graph.outputs[0], name=f"{planned.name}.velocity"),))
        return replace(graph, groups=planned.run.groups, runs=planned.runs)

    def model_pass(self, layout: Layout) -> PassGraph:
        """Traced pass of a layout. Layouts that differ in names alone share one trace."""
        shared = replace(layout, latents=latent_names(len(layout.latents)), tables="block", branch="")
        inputs = self.inputs(shared)
        graph = traced_pass(self.source, shared, self.guidance, self.shard, tuple(inputs))
        own = {value.name: given for value, given in zip(inputs, self.inputs(layout), strict=True)}
        return replace(graph, inputs={key: own.get(value.name, value) for key, value in graph.inputs.items()})

    def timesteps_shape(self, frames: int) -> tuple[int, ...]:
        """Shape of the timesteps of a pass, with the conditions of steps where the network takes them."""
        rows = self.timesteps
        return (rows, frames) if self.preset.sampler.condition(0) is None else (rows, frames, 2)

    def layout(self, planned: PlannedPass) -> Layout:
        sinks = self.preset.context.rotates_sink  # in every pass, as in `rotates_for_sink`
        lists = len(planned.run.groups[0].head_contexts)
        return Layout(
            planned.parts, planned.latents, planned.tables, sinks, self.slots, planned.run.mixed_texts, lists
        )

    def inputs(self, layout: Layout) -> list[Value]:
        """Inputs and states of the model's pass."""
        spec, frames = self.spec, layout.frames
        height, width = self.shard.regions(self.grid).part(self.grid)
        rope_dtype = torch.promote_types(self.dtype, torch.float32)
        time, row, column = self.model.rope.pairs

        def given(name: str, when: When, size: tuple[int, ...], dtype: torch.dtype, owned: bool = False) -> Value:
            return Value(name, Role.INPUT, size, dtype, when, owned=owned)

        each = frames // len(layout.latents)
        latents = (self.sessions, each, *self.latent)
        values = [given(name, When.PASS, latents, self.latent_dtype) for name in layout.latents]
        text = (self.texts, spec.text_rows, spec.text_dim)
        values += [
            given("timesteps", When.LOAD, self.timesteps_shape(frames), torch.float32),
            *(given(name, When.PROMPT, text, self.dtype) for name in layout.text_names),
        ]
        if spec.action_dim is not None:
            actions = (self.rows, frames, spec.action_dim)
            values.append(given(f"{layout.tables}.actions", When.BLOCK, actions, self.dtype))
        if spec.frame_channels:
            channels = (self.sessions, frames, spec.frame_channels, *self.latent[1:])
            values.append(given(f"{layout.tables}.frame_channels", When.FRAMES, channels, self.dtype))
        for part, (groups, part_frames) in enumerate(layout.parts):
            rows = self.rows * groups
            lists = (rows, layout.head_groups) if layout.head_groups else (rows,)
            shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
                "pages": ((rows, part_frames), torch.int32),
                "page_table": ((*lists, self.max_pages), torch.int32),
                "page_count": (lists, torch.int32),
                "rope_time": ((rows, part_frames, time, 2), rope_dtype),
            }
            if layout.sinks:
                shapes["rope_sink"] = shapes["rope_time"]
                shapes["sink_count"] = shapes["page_count"]
            values += [
                given(layout.table(part, what), When.BLOCK, size, dtype, owned=what == "pages")
                for what, (size, dtype) in shapes.items()
            ]
        for name, size in (("rope_rows", (height, row)), ("rope_columns", (width, column))):
            values.append(given(name, When.LOAD, (*size, 2), rope_dtype))
        return values + self.pages_of(layout)

    def pages_of(self, layout: Layout) -> list[Value]:
        """Page tensors of all layers; for staged pages also the staging buffer and its slot lists."""
        form, layers = self.form, range(self.form.layers)
        stores: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        stores += [(f"kv.{index}", (2, self.pages, *form.shape), form.kv_dtype) for index in layers]
        if form.scaled:
            stores += [(f"scale.{index}", (2, self.pages, form.shape[1]), torch.float32) for index in layers]
        lists: list[tuple[str, int]] = []
        if layout.slots:
            stores.append(("staging", (2, layout.slots, *form.shape), self.dtype))
            lists += [(what, self.rows * layout.frames) for what in WRITTEN]
            lists += [(what, layout.slots) for what in SEEN if not form.read_in_place]
        return [Value(name, Role.STATE, size, dtype, When.PASS) for name, size, dtype in stores] + [
            Value(f"{layout.tables}.{what}", Role.INPUT, (count,), torch.int32, When.BLOCK, owned=True)
            for what, count in lists
        ]

    def step(self, planned: PlannedPass) -> PassGraph:
        """Traced solver step of a denoising pass."""
        frames, values = self.preset.num_frame_per_block, tuple(self.step_values(planned))
        return traced_step(self.preset.sampler, planned.steps, frames, planned.lead, self.device, values)

    def step_values(self, planned: PlannedPass) -> list[Value]:
        """Inputs of a solver step."""
        frames = self.preset.num_frame_per_block
        total = frames * len(planned.steps)
        wide = torch.promote_types(self.dtype, torch.float32)
        names = latent_names(len(planned.steps))
        velocity = (self.sessions, planned.lead + total, *self.latent)
        values = [Value("velocity", Role.INPUT, velocity, self.latent_dtype, When.PASS), *self.noise_values(total)]
        latents = (self.sessions, frames, *self.latent)
        values += [Value(name, Role.INPUT, latents, self.latent_dtype, When.PASS) for name in names]
        history = self.sampler.begin().reads(planned.steps[0])
        values += [Value(name, Role.INPUT, latents, wide, When.PASS) for name in history]
        return values

    def noise(self) -> PassGraph:
        """Graph of the latents that a block starts from."""
        frames, scale, actions = self.preset.num_frame_per_block, self.sampler.spec.noise_scale, None
        values = self.noise_values(frames)
        if self.spec.action_dim is not None and scale != 1:
            actions = "block.actions"
            values.append(Value(actions, Role.INPUT, (self.rows, frames, self.spec.action_dim), self.dtype, When.BLOCK))
        noise = InitialNoise(self.latent, self.latent_dtype, scale, actions)
        traced = trace("the initial noise", noise, values, device=self.device)
        return chained("noise", traced)

    def noise_values(self, frames: int) -> list[Value]:
        """Inputs that noise depends on: absolute frames, and the seed of each session."""
        return [
            Value("frames", Role.INPUT, (self.sessions, frames), torch.int32, When.BLOCK),
            Value("noise_key", Role.INPUT, (self.sessions,), torch.int64, When.BLOCK),
        ]
