"""Dry run of a block for a GPU on a machine without one: fake CUDA tensors, real forms of all ops, compiled kernels.

The program of a block is bound to fake tensors and launched call by call. Each op runs the form that such a card
takes; a Triton kernel is compiled with the arguments of the program and not launched. A dispatch mode notes every
launch and refuses what a captured CUDA graph cannot hold: reads of values on the host, copies between host and card,
and random numbers of a generator. Calls that allocate are allowed there and counted.

It shows that a block compiles, fits and can be captured, and what it launches. It computes nothing.

Run: inferix graph --dry-run cuda:90
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InferixError, UsageError, quoted
from ..graphs.cost import PACKED, call_cost, counts_of, family, pages_read, spec_of
from ..graphs.launch import LaunchPlan
from ..graphs.lowered import Planned, lower_block
from ..graphs.lowering import HOST_READS, ROOM, storage, tensors
from ..graphs.observed import memory_of, observed_call
from ..graphs.passes import Group
from ..graphs.shards import Axis, Shard, Stage
from ..graphs.types import BlockGraph, Role
from ..kernels.collectives import RankGroup, add_group, group_of
from ..kernels.spec import ARCHITECTURES, FP8, KernelSpec, OpSpec, has_triton
from ..kernels.tuning import choose
from ..models.decoder import Decoder
from ..schemes.layouts import RankGrid
from . import compile_gate
from .machine import commit
from .time_model import Rates, attention_tiles, tiles_of

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_efficient_attention.default
CUDNN = aten._scaled_dot_product_cudnn_attention.default
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dims
EXCHANGE = "exchange"  # the family of collectives
# Of A100, L40S, H100 and H200, B200, RTX PRO 6000.
MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148, 120: 188}
CARD = "dry run"  # the name of a card that no table is tuned for


@dataclass(frozen=True)
class Launch:
    """One launch: an ATen call, or a Triton kernel of an op.

    part: `block`, `frames`, `prompt`, `fold`, `decoder`. section: the pass. node: the graph's node, empty in a decoder.
    allocated: bytes of new memory. rate: the time model's rate of its arithmetic. tiles: of the time model.
    """

    part: str
    section: str
    node: str
    op: str
    kind: str
    flops: int
    nbytes: int
    allocated: int
    rate: str
    tiles: int


@dataclass
class DryRun:
    """Launches in order, broken rules of capture by part, and compiled kernels by name."""

    architecture: int
    launches: list[Launch] = field(default_factory=list)
    broken: dict[str, list[str]] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, compile_gate.Row] = field(default_factory=dict)  # of the kernels, once they were inspected

    def of(self, part: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.part == part]

    def faults(self) -> list[str]:
        """Broken rules of the parts that are captured, and kernels that spill or do not fit."""
        return [*self.broken.get("block", []), *compile_gate.problems(self.resources())]

    def resources(self) -> dict[str, compile_gate.Row]:
        """Registers, stack, shared memory and instructions of the compiled kernels."""
        if len(self.rows) != len(self.kernels):
            self.rows = compile_gate.inspect(self.kernels, self.architecture)
        return self.rows


class FakeCard(FakeTensorMode):
    """Fake tensors on a GPU, also where torch was built without CUDA.

    A copy, and a call that writes into tensors it is given, return these: torch's fake forms of both ask the driver.
    A convolution gives the layout that cuDNN would, which torch's fake form asks of the build.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.copy.default:
            place, source = args[:2]
            torch.broadcast_shapes(place.shape, source.shape)
            return place
        schema = func._schema
        written = [name for name, is_write in writes_of(func).items() if is_write]
        if written and len(written) == len(schema.returns):
            given = dict(zip(writes_of(func), args, strict=False)) | dict(kwargs or {})
            places = tuple(given[name] for name in written)
            return places[0] if len(places) == 1 else places
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten.convolution.default and isinstance(result, Tensor):
            layout = CHANNELS_LAST.get(result.ndim, torch.contiguous_format)
            if any(tensor.is_contiguous(memory_format=layout) for tensor in args[:2]):
                with self:
                    return torch.empty_like(result, memory_format=layout)
        return result


@cache
def writes_of(op: OpOverload) -> dict[str, bool]:
    """Arguments of an op by name: True for one that it writes."""
    return {
        argument.name: argument.alias_info is not None and argument.alias_info.is_write
        for argument in op._schema.arguments
    }


class WithoutDriver(TorchFunctionMode):
    """Calls that ask the driver even for fake tensors on a GPU, in forms that do not.

    A copy into a tensor is `aten::copy`, which `FakeCard` takes for one; an index of numbers and slices is ATen views.
    Torch's attention is one launch, whichever backend a card would take.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.copy_, aten.copy_.default):
            return aten.copy.default(*args, **(kwargs or {}))
        if func in (F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default):
            return attended(*args, **(kwargs or {}))
        if func is Tensor.new_zeros:
            size = args[1] if isinstance(args[1], list | tuple) else args[1:]
            return aten.new_zeros.default(args[0], list(size), **(kwargs or {}))
        if func is Tensor.contiguous:
            return dense(*args, **(kwargs or {}))
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        tensor, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
        taken = sum(part is not None and part is not Ellipsis for part in index)
        at = index.index(Ellipsis) if Ellipsis in index else len(index)
        index = (*index[:at], *[slice(None)] * (tensor.ndim - taken), *index[at + 1 :])
        dim = 0
        for part in index:
            if part is None:
                tensor = tensor.unsqueeze(dim)
            elif isinstance(part, slice):
                tensor = aten.slice.Tensor(tensor, dim, part.start, part.stop, 1 if part.step is None else part.step)
            elif isinstance(part, int):
                tensor = tensor.select(dim, part)
                continue
            else:
                raise InferixError(f"an index by {type(part).__name__} has no form on fake tensors of a GPU")
            dim += 1
        return tensor


def attended(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Torch's attention. A mask of bools becomes a bias, as torch makes one, and stays as small as it is."""
    if unknown := options.keys() - {"scale"}:
        raise InferixError(f"attention with {', '.join(sorted(unknown))} has no form on fake tensors of a GPU")
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = aten.zeros_like.default(attn_mask, dtype=q.dtype)
    out, *_ = ATTENTION(q, k, v, bias, False, **options)
    return out


def dense(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """A tensor in a memory format: itself, or a copy."""
    fits = tensor.is_contiguous(memory_format=memory_format)
    return tensor if fits else aten.clone.default(tensor, memory_format=memory_format)


class Address:
    """A fake tensor as Triton sees it while it compiles: dtype, shape, strides and how its address is aligned."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape, self.strides = tensor.dtype, tuple(tensor.shape), tensor.stride()
        self.offset = int(tensor.storage_offset()) * tensor.itemsize

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return 0


class Allocations(TorchDispatchMode):
    """Counts the bytes of new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        memory = {storage(tensor) for tensor in tensors([*args, *(kwargs or {}).values()])}
        self.nbytes += sum(tensor.nbytes for tensor in tensors(result) if storage(tensor) not in memory)
        return result


class Recorder(TorchDispatchMode):
    """Notes the launches of calls on fake tensors and what capture would refuse."""

    def __init__(self, run: DryRun, part: str) -> None:
        super().__init__()
        self.run, self.part = run, part
        self.section = self.node = ""
        self.listed: int | None = None  # pages that the call of the program reads
        self.spec: OpSpec | None = None  # of the op whose form runs
        self.given: Mapping[str, Any] = {}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "inferix":
            self.run_op(func, args)
            return None
        return self.launch(func, args, kwargs or {})

    def run_op(self, op: OpOverload, args: Sequence[Any]) -> None:
        """Run the form of an op that the card takes."""
        spec = spec_of(op)
        assert spec is not None
        self.spec, self.given = spec, dict(zip(spec.names, args, strict=True))
        if spec.family == EXCHANGE:
            self.run_collective(spec, args)
            return
        like = self.given[spec.like]
        form = choose(spec, like) if isinstance(spec, KernelSpec) else spec.reference
        if form is spec.reference and spec.is_host_form("reference"):
            raise InferixError(
                f"{spec.name} has no kernel for {str(like.dtype).removeprefix('torch.')} {list(like.shape)} on this "
                "card, and its reference reads tensors on the host, which no graph holds; see docs/kernels.md"
            )
        if form is spec.reference and any(arg.listed_by for arg in spec.args.values()):
            self.run_reference(spec, args)  # the cost of a call of torch's would be that of all pages
        else:
            with self, WithoutDriver():  # the mode around the call is off within it
                form(*args)
        self.spec = None

    def run_reference(self, spec: OpSpec, args: Sequence[Any]) -> None:
        """Run an op on pages that has no kernel of its own: one launch of the op's cost, and all that it allocates."""
        memory = Allocations()
        with memory, WithoutDriver():
            spec.reference(*args)
        cost = spec.cost(self.given, self.listed, memory=memory_of)  # type: ignore[arg-type]
        self.note(f"inferix::{spec.name}", spec.family, cost.flops, cost.nbytes, memory.nbytes)

    def run_collective(self, spec: OpSpec, args: Sequence[Any]) -> None:
        """Run a collective between the ranks of `fake_shard`, in which nothing travels, and note what it would send."""
        traffic = group_of(self.given["group"]).traffic
        before = traffic.sent
        with WithoutDriver():
            spec.reference(*args)
        self.note(f"inferix::{spec.name}", EXCHANGE, 0, traffic.sent - before, 0, "link")

    def launch(self, op: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run an ATen call on fake tensors and note it."""
        given = list(tensors([*args, *kwargs.values()]))
        draws = torch.Tag.nondeterministic_seeded in op.tags and op not in (ATTENTION, CUDNN)  # whose dropout is 0
        if draws:
            self.refuse(op, "draws random numbers of a generator")
        try:
            result = op(*args, **kwargs)
        except HOST_READS as error:
            raise InferixError(f"{self.place(op)} reads a tensor's values on the host, which no graph holds") from error
        results = list(tensors(result))
        if len({tensor.device.type for tensor in (*given, *results) if tensor.ndim or tensor.device.type != "cpu"}) > 1:
            self.refuse(op, "copies between host and card")
        memory = {storage(tensor) for tensor in given}
        fresh = sum(tensor.nbytes for tensor in results if storage(tensor) not in memory)
        if torch.Tag.generated in op.tags:  # an out= form that makes a new tensor and copies it
            fresh += sum(tensor.nbytes for tensor in results)
        if op in ROOM or op is aten.lift_fresh.default:
            self.note(str(op.name()), "copy", 0, 0, fresh, launched=False)
        elif draws:
            self.note(op.name(), "elementwise", 0, sum(tensor.nbytes for tensor in (*given, *results)), fresh)
        elif op is aten.copy.default:
            self.note_aten(aten.copy_.default, args, kwargs, results, 0)
        elif fresh or op._schema.is_mutable:
            self.note_aten(op, args, kwargs, results, fresh)
        return result

    def note_aten(
        self, op: OpOverload, args: Any, kwargs: Mapping[str, Any], results: Sequence[Tensor], fresh: int
    ) -> None:
        call = observed_call(op, args, kwargs, results, self.node)
        kind, cost = family(call), call_cost(call)
        rate, tiles = "", 0
        if kind == PACKED:
            rate, tiles = "fp8_matmul", tiles_of(call.writes[0].size)
        elif op is CUDNN:
            rate, tiles = "cudnn", attention_tiles(call.named["query"].size)
        elif kind == "attention":
            rate = "sdpa"
        elif kind == "matmul" and "convolution" in op.name():
            rate = "convolution"
        elif kind == "matmul":
            is_wide = all(ref.dtype == torch.float32 for ref in call.reads)
            rate, tiles = "fp32_matmul" if is_wide else "matmul", tiles_of(call.writes[0].size)
        self.note(op.name(), kind, cost.flops, cost.nbytes, fresh, rate, tiles)

    def note_kernel(self, name: str, grid: Sequence[int], packs_queries: bool) -> None:
        """Note a Triton kernel of the op whose form runs, with the op's cost. packs_queries: it multiplies them in FP8.
        """
        spec = self.spec
        assert spec is not None, f"{name} was launched outside of an op"
        cost = spec.cost(self.given, self.listed, memory=memory_of)  # type: ignore[arg-type]
        rate, like = "", self.given[spec.like].dtype
        if spec.family == "attention":
            over_fp8 = "fp8_qk" if packs_queries else "fp8_attention"
            rate = over_fp8 if self.given["kv"].dtype == FP8 else "attention"
        elif spec.family == PACKED:
            rate = "fp8_matmul" if like == FP8 else "int8_matmul"
        tiles = math.prod(grid) if rate else 0
        self.note(f"inferix::{spec.name}", spec.family, cost.flops, cost.nbytes, 0, rate, tiles)

    def note(
        self, op: str, kind: str, flops: int, nbytes: int, allocated: int, rate: str = "", tiles: int = 0,
        launched: bool = True,
    ) -> None:  # fmt: skip
        kind = kind if launched else "allocation"
        self.run.launches.append(
            Launch(self.part, self.section, self.node, op, kind, flops, nbytes, allocated, rate, tiles)
        )

    def refuse(self, op: OpOverload, reason: str) -> None:
        self.run.broken.setdefault(self.part, []).append(f"{self.place(op)} {reason}")

    def place(self, op: OpOverload) -> str:
        return f"{op.name()} ({self.node or self.part})"


@contextmanager
def card(run: DryRun, recorder: Callable[[], Recorder], compiled: bool) -> Iterator[None]:
    """Within the block, torch and Triton see a card of the architecture, and Triton's launches are noted.

    compiled: compile what is launched.
    """
    import triton

    capability = divmod(run.architecture, 10)
    replaced = {"get_device_capability": lambda device=None: capability, "get_device_name": lambda device=None: CARD}
    before = {name: getattr(torch.cuda, name) for name in replaced}

    def launch(start: Callable[..., Any], kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        recorder().note_kernel(kernel.__name__, grid, bool(kwargs.get("LOW")))
        if not compiled:
            return None
        args = tuple(map(address, args))
        made = start(kernel, *args, grid=grid, warmup=True, **{name: address(one) for name, one in kwargs.items()})
        spec = recorder().spec
        known = [name for name, other in run.kernels.items() if other is made]
        if spec is not None and not known:
            number = sum(compile_gate.op_of(name) == spec.name for name in run.kernels)
            run.kernels[f"{spec.name}, {recorder().node or recorder().part} ({number})"] = made
        return made

    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(compile_gate.StandInDriver(run.architecture))
    try:
        for name, stand_in in replaced.items():
            setattr(torch.cuda, name, stand_in)
        with compile_gate.intercepted(launch):
            yield
    finally:
        for name, own in before.items():
            setattr(torch.cuda, name, own)
        triton.runtime.driver.set_active(active)


def address(value: Any) -> Any:
    return Address(value) if isinstance(value, Tensor) else value


def run_program(planned: Planned, recorder: Recorder, groups: Mapping[str, Sequence[Group]]) -> None:
    """Launch a program on fake tensors. groups: of each section, which say how many pages its attention reads."""
    program = planned.program
    given = {
        buffer.name: torch.empty_strided(buffer.size, buffer.stride, dtype=buffer.dtype, device="cuda")
        for buffer in program.buffers.values()
        if buffer.role is not Role.SCRATCH
    }
    arena = torch.empty(planned.plan.size, dtype=torch.uint8, device="cuda")
    launches = LaunchPlan(program, planned.plan, arena, given)
    for section in program.sections:
        calls = program.calls[section.first : section.stop]
        pages = pages_read(calls, groups.get(section.name, ()))
        recorder.section = section.name
        for call, launch in zip(calls, launches.calls[section.first : section.stop], strict=True):
            recorder.node = call.node
            recorder.listed = pages.get(counts_of(call))
            with recorder:
                launch()


def dry_run(block: BlockGraph, architecture: int, compiled: bool = True) -> DryRun:
    """Run a block graph, with its fold and prompt programs, for a GPU of an architecture on fake tensors.

    compiled: compile each Triton kernel, which takes about a second for each. UsageError for an architecture without
    GPU code; InferixError without Triton, and for a call that reads values on the host.
    """
    check_architecture(architecture)
    run, lowered = DryRun(architecture), lower_block(block)
    groups = {graph.name: graph.groups for graph in block.graphs}
    current: list[Recorder] = []
    with card(run, lambda: current[-1], compiled), torch.no_grad(), WithoutDriver(), FakeCard():
        parts = {"fold": lowered.fold, "prompt": lowered.prompt, "frames": lowered.frames, "block": lowered.body}
        for part, planned in parts.items():
            if planned is not None:
                current.append(Recorder(run, part))
                run_program(planned, current[-1], groups)
    return run


def run_decoder(
    architecture: int,
    make: Callable[[], Decoder],
    latents: tuple[int, ...],
    dtype: torch.dtype,
    compiled: bool = True,
    faster: Callable[[Decoder], Decoder] = lambda decoder: decoder,
) -> DryRun:
    """Run the second block of a stream, latents [F, C, h, w], through a decoder on fake tensors: part `decoder`.

    faster: gives the decoder the layers of its device.
    """
    check_architecture(architecture)
    run = DryRun(architecture)
    recorder = Recorder(run, "decoder")
    before = torch.get_default_dtype()
    with card(run, lambda: recorder, compiled), torch.no_grad(), WithoutDriver(), FakeCard():
        torch.set_default_dtype(dtype)
        try:
            with torch.device("cuda"):
                decoder = make().eval()
        finally:
            torch.set_default_dtype(before)
        decoder = faster(decoder)
        state = decoder.new_state()
        block = torch.empty(latents, dtype=dtype, device="cuda")
        decoder.decode(block, state)
        with recorder:
            decoder.decode(block, state)
    return run


def joined(runs: Sequence[DryRun]) -> DryRun:
    """Several dry runs for one architecture as one."""
    whole = DryRun(runs[0].architecture)
    for run in runs:
        whole.launches += run.launches
        whole.broken |= run.broken
        whole.kernels |= run.kernels
    return whole


def fake_shard(grid: RankGrid, shard_weights: bool = False) -> Shard:
    """The part of rank 0 in a grid of ranks that are not there: torch's fake process groups, which send nothing."""

    def group(size: int) -> int:
        return add_group(RankGroup(FakeProcessGroup._create_internal(0, size), 0, size)) if size > 1 else 0

    heads, tokens, tiles = (Axis(size, 0, group(size)) for size in (grid.heads, grid.tokens, grid.tiles))
    stage = Stage(grid.layers, 0, 0, group(2), group(grid.layers)) if grid.layers > 1 else Stage()
    return Shard(heads, tokens, tiles.group, Axis(grid.branches), tiles if shard_weights else Axis(), stage=stage)


def check_architecture(architecture: int) -> None:
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"cuda:{one}" for one in ARCHITECTURES)
        raise UsageError(f"architecture is {quoted(str(architecture))}; GPU code is made for {known}")
    if not has_triton():
        raise InferixError("Triton is not installed, so no form of a GPU can run; pip install triton")


def summary(run: DryRun, rates: Rates | None) -> dict[str, Any]:
    """Totals of each part as plain values, by kind of work and by op."""
    parts = dict.fromkeys(launch.part for launch in run.launches)
    return {
        part: totals(run.of(part), rates, part != "decoder")
        | {
            "kinds": grouped(run.of(part), rates, lambda launch: launch.kind),
            "ops": grouped(run.of(part), rates, lambda launch: launch.op),
            "broken": dict(Counter(run.broken.get(part, []))),
        }
        for part in parts
    }


def facts(run: DryRun, rates: Rates | None, block: BlockGraph) -> dict[str, Any]:
    """A dry run as plain values, with what it was of."""
    return {
        "model": block.model,
        "preset": block.preset,
        "dtype": str(block.dtype).removeprefix("torch."),
        "architecture": run.architecture,
        "commit": commit(),
        "parts": summary(run, rates),
        "kernels": run.resources(),
        "faults": run.faults(),
        "assumed": None if rates is None else asdict(rates),
    }


def totals(launches: Sequence[Launch], rates: Rates | None, captured: bool = True) -> dict[str, Any]:
    """Calls, allocations, operations and bytes of launches, and their predicted time, s.

    captured: False where the host launches each call, which then takes at least the model's time of a call.
    """
    calls = [launch for launch in launches if launch.kind != "allocation"]
    sums: dict[str, Any] = {
        "calls": len(calls),
        "allocating": sum(launch.allocated > 0 for launch in launches),
        "allocated": sum(launch.allocated for launch in launches),
        "flops": sum(launch.flops for launch in launches),
        "bytes": sum(launch.nbytes for launch in launches),
    }
    if rates is not None:
        seconds = sum(rates.seconds(launch.rate, launch.flops, launch.nbytes, launch.tiles) for launch in calls)
        sums["predicted"] = seconds if captured else max(seconds, len(calls) * rates.host * 1e-6)
    return sums


def grouped(launches: Sequence[Launch], rates: Rates | None, key: Callable[[Launch], str]) -> dict[str, dict[str, Any]]:
    names = sorted({key(launch) for launch in launches})
    rows = {name: totals([launch for launch in launches if key(launch) == name], rates) for name in names}
    return dict(sorted(rows.items(), key=lambda item: (-item[1].get("predicted", 0), -item[1]["bytes"], item[0])))


def report(run: DryRun, rates: Rates | None) -> str:
    """The table that `inferix graph --dry-run` prints."""
    lines = []
    for part, sums in summary(run, rates).items():
        lines.append(f"{part}: {shown(sums)}")
        rows = sums["kinds"]
        if part in ("block", "decoder"):
            lines += [f"  {name:<14}{shown(row)}" for name, row in rows.items()]
        lines += [f"  {count} x {text}" for text, count in sums["broken"].items()]
    if run.kernels:
        lines.append(f"{len(run.kernels)} kernels compiled for sm_{run.architecture}:")
        for name, row in run.resources().items():
            spilled = f", {row['stack']} bytes of stack" if row["stack"] else ""
            lines.append(f"  {name}: {row['registers']} registers, {row['shared'] / 1024:.0f} KiB shared{spilled}")
    if rates is None:
        lines.append(f"no rates are stated for sm_{run.architecture}, so no time is predicted")
    else:
        lines.append("predicted by a model, not measured: " + ", ".join(f"{k} {v:g}" for k, v in asdict(rates).items()))
    return "\n".join(lines)


def shown(sums: Mapping[str, Any]) -> str:
    time = f", predicted {sums['predicted'] * 1e3:.1f} ms" if "predicted" in sums else ""
    return (
        f"{sums['calls']:>6} calls, {sums['allocating']} allocating {sums['allocated'] / 1e9:.2f} GB, "
        f"{sums['flops'] / 1e12:.2f} TFLOP, {sums['bytes'] / 1e9:.2f} GB{time}"
    )
