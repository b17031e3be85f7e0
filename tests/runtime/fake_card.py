"""A stand-in for a GPU that notices when the host waits for it, or takes memory on it, between two launches.

Tensors of the host are real; those of the card are fake and hold nothing. It shows what the engine's thread asks of the
card, and nothing of what a card computes or how long that takes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from inferix.bench.dry_run import FakeCard, WithoutDriver
from inferix.graphs.capture import Replay
from inferix.graphs.lowering import storage, tensors

aten = torch.ops.aten
OF_HOST = (Tensor.__getitem__, Tensor.contiguous, Tensor.new_zeros)
COPIES = (aten.copy.default, aten._to_copy.default)


@dataclass
class Watch:
    """What was seen between launches of one thread. launches: replays so far. results: bytes of what each may give.

    taken: of these, since the last launch. begun: launches from which on something counts.
    """

    results: int
    begun: int
    launches: int = 0
    taken: int = 0
    faults: list[str] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    def launched(self) -> None:
        self.launches, self.taken = self.launches + 1, 0

    def note(self, fault: str) -> None:
        if self.launches >= self.begun and threading.get_ident() == self.thread:
            self.faults.append(f"after launch {self.launches}: {fault}")

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        memory = tensor.untyped_storage().data_ptr()
        return any(memory == other.untyped_storage().data_ptr() for other in self.pinned)


class HostAndCard(FakeCard):
    """Runs calls on tensors of the host as they are, and others on fake tensors, and notes what would wait."""

    def __init__(self, watch: Watch, contents: Callable[[], float]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.watch, self.contents = watch, contents  # what a copy from the card brings

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors([*args, *kwargs.values()]))
        on_card = [one for one in given if isinstance(one, FakeTensor)]
        wanted = kwargs.get("device")
        if not on_card and (wanted is None or torch.device(wanted).type != "cuda"):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.watch.note("a value is read on the host")
            return self.contents()
        if func in COPIES:
            self.note_copy(func, args, kwargs)
        if func is aten.copy.default and not isinstance(args[0], FakeTensor):
            return args[0].fill_(self.contents())
        if func is aten._to_copy.default and wanted is not None and torch.device(wanted).type == "cpu":
            return torch.full(args[0].shape, self.contents(), dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten._to_copy.default and not on_card:
            layout = list(args[0].shape), list(args[0].stride())
            options = {"dtype": kwargs.get("dtype") or args[0].dtype, "device": wanted}
            result = super().__torch_dispatch__(aten.empty_strided.default, (), layout, options)
        else:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        memory = {storage(one) for one in given}
        for one in tensors(result):
            if isinstance(one, FakeTensor) and one.nbytes and storage(one) not in memory:
                self.note_memory(func, one)
        return result

    def note_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note a copy between host and card that is not pinned and asynchronous."""
        source = args[1] if func is aten.copy.default else args[0]
        target = args[0] if func is aten.copy.default else None
        to_card = isinstance(target, FakeTensor) or torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if isinstance(source, FakeTensor) == to_card:
            return
        host = source if to_card else target
        if not (kwargs.get("non_blocking") or (target is not None and True in args[2:])):
            self.watch.note(f"{func.name()} waits: it is not non_blocking")
        if host is None or not self.watch.is_pinned(host):
            self.watch.note(f"{func.name()} waits: the host's memory is not pinned")

    def note_memory(self, func: Any, tensor: Tensor) -> None:
        if func is aten.clone.default and self.watch.taken + tensor.nbytes <= self.watch.results:
            self.watch.taken += tensor.nbytes  # the block itself, which belongs to who takes it
            return
        self.watch.note(f"{func.name()} takes {tensor.nbytes} bytes on the card")


class HostCalls(WithoutDriver):
    """Calls of torch's that need a driver even for the host: pinned memory."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return self.watch.pin(args[0].clone())
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        if kwargs.pop("pin_memory", False):
            return self.watch.pin(func(*args, **kwargs))
        if func in OF_HOST and not isinstance(args[0], FakeTensor):
            return func(*args, **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


class Graphs:
    """A capture backend whose replays are launches of a watch and compute nothing."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def event(self) -> Event:
        raise AssertionError("nothing is profiled")

    def capture(self, launch: Callable[[], None]) -> Replay:
        return self.watch.launched


class Event:
    """A CUDA event; a wait for one that was recorded after the last launch is noted."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.after = watch, 0

    def record(self, stream: object = None) -> None:
        self.after = self.watch.launches

    def synchronize(self) -> None:
        if self.after >= self.watch.launches:
            self.watch.note("the host waits for an event behind the last launch")

    def elapsed_time(self, end_event: Event) -> float:
        return float(end_event.after - self.after)


class Stream:
    """A CUDA stream."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def synchronize(self) -> None:
        self.watch.note("the host waits for a stream")

    def wait_stream(self, other: Stream) -> None:
        """Order work on the card; the host does not wait."""

    def wait_event(self, event: Event) -> None:
        """Order work on the card; the host does not wait."""


@contextmanager
def fake_card(watch: Watch, contents: Callable[[], float]) -> Iterator[pytest.MonkeyPatch]:
    """Within the block, this thread has a card of compute capability 9.0."""
    stream = Stream(watch)
    calls: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "a stand-in",
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=132),
        "mem_get_info": lambda device=None: (1 << 40, 1 << 40), "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0, "current_stream": lambda device=None: stream,
        "Stream": lambda device=None: Stream(watch), "stream": lambda stream: nullcontext(),
        "Event": lambda **options: Event(watch),
        "synchronize": lambda device=None: watch.note("the host waits for the card"),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in calls.items():
            patch.setattr(torch.cuda, name, stand_in)
        with torch.no_grad(), HostCalls(watch), HostAndCard(watch, contents):
            yield patch
