"""From a traced graph to a program: no allocation, no view and no Python between its first call and its last.

The graph is run once on fake tensors under a dispatch mode, so what is recorded is what torch would launch:
composite ops fall apart, and a view shows itself by sharing storage, whatever op made it. Every op is then
taken in its `out=` form, found by its schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InferixError
from .program import Buffer, Call, Form, Program, Ref, Section
from .types import PassGraph, Role

aten = torch.ops.aten
# Ops without an `out=` form that may be called all the same: what they return is copied into its place.
UNPLANNED = (aten.scaled_dot_product_attention.default,)
# Ops that only make room: the value they return is not written yet.
ROOM = (
    aten.empty.memory_format, aten.empty_strided.default, aten.empty_like.default, aten.empty_permuted.default,
    aten.new_empty.default, aten.new_empty_strided.default,
)  # fmt: skip
COPIES = (aten._to_copy.default, aten.clone.default, aten.lift_fresh_copy.default)
CHECKS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)
OUTSIDE = (aten.from_file, aten.set, aten.resize, aten.resize_as)  # of files and storages, not of values
HOST_READS = (DataDependentOutputException, DynamicOutputShapeException)


def lower(graphs: Sequence[PassGraph], results: Sequence[str]) -> Program:
    """One program of graphs that run one after the other; what one hands on is what the next reads by that name.

    results: names of values that are left at the end. Raises InferixError, naming the node, for an op that has no
    `out=` form and is not in `UNPLANNED`, for sizes that are not fixed, and for ops that read values on the host.
    """
    recorder, sections, values = _Recorder(), [], dict[str, Tensor]()
    with torch.no_grad(), FakeTensorMode(), recorder:
        for graph in graphs:
            first = len(recorder.calls)
            _Lowering(graph, recorder, values).run()
            sections.append(Section(graph.name, first, len(recorder.calls)))
    outputs = {name: recorder.ref(values[name]) for name in results}
    return Program(recorder.buffers, tuple(recorder.calls), outputs, tuple(sections))


class _Lowering(fx.Interpreter):
    """Runs a graph node by node on fake tensors; `values` has those of all values so far, by name."""

    def __init__(self, graph: PassGraph, recorder: _Recorder, values: dict[str, Tensor]) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), graph.graph))
        self.pass_graph, self.recorder, self.values = graph, recorder, values
        self.given = {node.name: node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"}

    def run_node(self, n: fx.Node) -> Any:
        self.recorder.node = f"{self.pass_graph.name}/{n.name}"
        try:
            return super().run_node(n)
        except HOST_READS as error:
            raise InferixError(
                f"cannot lower {self.recorder.node}: {n.target} reads a tensor's values on the host; keep that out of "
                "the model, or use executor eager"
            ) from error

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        value, like = self.pass_graph.inputs[target], self.given[target]
        if not all(isinstance(size, int) for size in (*like.shape, *like.stride())):
            raise InferixError(
                f"cannot lower {self.recorder.node}: sizes {tuple(like.shape)} are not fixed; trace with fixed ones"
            )
        if (name := value.name) not in self.values:
            with self.recorder.paused():
                fake = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
            self.recorder.define(fake, name, value.role)
            self.values[name] = fake
        tensor = self.values[name]
        return tensor if tensor.stride() == like.stride() else tensor.contiguous()

    def output(self, target: Any, args: Any, kwargs: Any) -> None:
        outputs = self.pass_graph.outputs
        self.values |= {value.name: tensor for value, tensor in zip(outputs, tensors(args[0]), strict=True)}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in CHECKS:
            return None
        if target not in UNPLANNED:
            return super().call_function(target, args, kwargs)
        with self.recorder.paused():
            result = target(*args, **kwargs)
        self.recorder.record(target, args, kwargs, result)
        return result


class _Recorder(TorchDispatchMode):
    """Notes every op that reaches the dispatcher, and which storage its results have."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[str, Buffer] = {}
        self.calls: list[Call] = []
        self.names: dict[int, str] = {}  # storage -> buffer
        self.alive: list[Tensor] = []  # so that no storage's number is used again
        self.taken = Counter[str]()  # results of each node so far
        self.node, self.active = "", True

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.active = False
        yield
        self.active = True

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.active:
            self.record(func, args, kwargs or {}, result)
        return result

    def record(self, op: OpOverload, args: Any, kwargs: Any, result: Any) -> None:
        if op._schema.is_mutable:
            self._add(op, args, kwargs, (), Form.WRITES)
            return
        results = list(tensors(result))
        fresh = [tensor for tensor in results if storage(tensor) not in self.names]
        if not fresh:
            return  # views, however many
        if len(fresh) < len(results):
            raise InferixError(f"cannot lower {self.node}: {op.name()} returns a view beside a new tensor")
        places = [self.define(tensor, self._new_name(), Role.SCRATCH) for tensor in fresh]
        if op in ROOM:
            return
        if op in COPIES:
            self.calls.append(
                Call(aten.copy_.default, (places[0], self._argument(args[0])), (), (), Form.WRITES, self.node)
            )
        elif (out := out_form(op)) is not None:
            form, keywords = out
            given = {name: value for name, value in kwargs.items() if name in keywords}
            self._add(form, args, given, tuple(places), Form.OUT)
        elif op in UNPLANNED:
            self._add(op, args, kwargs, tuple(places), Form.COPIED)
        else:
            raise InferixError(
                f"cannot lower {self.node}: {op.name()} has no out= form; give it one, or list it in graphs/lowering.py"
            )

    def define(self, tensor: Tensor, name: str, role: Role) -> Ref:
        """A new value, whose memory is this tensor's."""
        self.alive.append(tensor)
        self.names[storage(tensor)] = name
        self.buffers[name] = Buffer(name, role, tensor.dtype, tuple(tensor.shape), tensor.stride())
        return self.ref(tensor)

    def ref(self, tensor: Tensor) -> Ref:
        name = self.names[storage(tensor)]
        return Ref(name, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def _new_name(self) -> str:
        """The node's name, with a number from its second result on."""
        taken = self.taken[self.node]
        self.taken[self.node] += 1
        return f"{self.node}.{taken}" if taken else self.node

    def _add(self, op: OpOverload, args: Any, kwargs: Any, outs: tuple[Ref, ...], form: Form) -> None:
        named = tuple((name, self._argument(value)) for name, value in kwargs.items())
        self.calls.append(Call(op, tuple(map(self._argument, args)), named, outs, form, self.node))

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        return tuple(map(self._argument, value)) if isinstance(value, list | tuple) else value


def emits(op: OpOverload, form: Form) -> bool:
    """Return True if a program may call `op` in a form: as one that writes places it is given, and nothing else."""
    if op.namespace not in ("aten", "inferix") or op.overloadpacket in OUTSIDE:
        return False
    if form is Form.WRITES:
        return op is aten.copy_.default or (op.namespace == "inferix" and op._schema.is_mutable)
    if form is Form.COPIED:
        return op in UNPLANNED
    types = {str(argument.type) for argument in op._schema.arguments}
    outs = sum(argument.is_out for argument in op._schema.arguments)
    return outs == len(op._schema.returns) > 0 and not types & {"Storage", "Optional[Generator]"}


def tensors(result: Any) -> Iterator[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from tensors(part)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@cache
def out_form(op: OpOverload) -> tuple[OpOverload, tuple[str, ...]] | None:
    """The overload that takes the same arguments and writes its results, and which keywords it knows."""
    parameters = [(argument.name, str(argument.type)) for argument in op._schema.arguments]
    for name in op.overloadpacket.overloads():
        form = getattr(op.overloadpacket, name)
        arguments = form._schema.arguments
        outs = [argument for argument in arguments if argument.is_out]
        known = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        # A factory's `out=` form knows no dtype or device: they are those of the place.
        missing = [name for name, _ in parameters if name not in dict(known)]
        if outs and len(outs) == len(op._schema.returns) and set(known) <= set(parameters) and set(missing) <= FACTORY:
            return form, tuple(name for name, _ in known)
    return None


FACTORY = {"dtype", "layout", "device", "pin_memory"}
