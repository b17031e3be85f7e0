"""Times the calls of a model that runs without a program, under a dispatch mode, and makes a program of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from ...graphs.cost import spec_of
from ...graphs.lowering import ROOM, storage, tensors
from ...graphs.observed import observed_call
from ...graphs.program import Call, Program, Section


class CallTimer(TorchDispatchMode):
    """Within the block, each call that launches something is noted, with a mark before it; views are not.

    counts: of a call that reads pages, how many each row reads, by the call's index; on the device.
    """

    def __init__(self, mark: Callable[[], Any]) -> None:
        super().__init__()
        self.mark = mark
        self.marks: list[Any] = []
        self.calls: list[Call] = []
        self.counts: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        begin = self.mark()
        result = func(*args, **kwargs)
        results = list(tensors(result))
        memory = {storage(tensor) for tensor in tensors([*args, *kwargs.values()])}
        fresh = any(storage(tensor) not in memory for tensor in results)
        if func in ROOM or not (fresh or func._schema.is_mutable):
            return result
        spec = spec_of(func)
        if spec is not None and spec.counted_by:
            given = dict(zip(spec.names, args, strict=False)) | kwargs
            self.counts[len(self.calls)] = given[spec.counted_by].sum()
        self.marks.append(begin)
        self.calls.append(observed_call(func, args, kwargs, results, ""))
        return result

    def program(self, name: str) -> Program:
        """The calls as a program of one section."""
        return Program({}, tuple(self.calls), {}, (Section(name, 0, len(self.calls)),))

    def pages_read(self) -> dict[int, int]:
        """Number of pages that each call with a page table read."""
        return {index: int(count) for index, count in self.counts.items()}
