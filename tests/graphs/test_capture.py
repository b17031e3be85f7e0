"""A failed capture leaves the stream and the memory pool usable; torch's CUDA calls are replaced by fakes."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from inferix.graphs.capture import CaptureFailed, CudaGraphs
from inferix.runtime.streams import claim


class Stream(SimpleNamespace):
    device_index = 0

    def wait_stream(self, other: Stream) -> None:
        pass


def test_a_capture_that_fails_leaves_stream_and_allocator_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    main, ended, current = Stream(name="main"), [], []
    pools = iter("abc")

    @contextmanager
    def graph(*args: object, **kwargs: object):
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None

    def ends(device: int, pool: str) -> None:
        ended.append(pool)
        if len(ended) > 1:
            raise RuntimeError("endAllocatePool: not currently recording")

    stand_ins = {
        "Stream": lambda device: Stream(name="side"), "graph_pool_handle": lambda: next(pools), "graph": graph,
        "current_stream": lambda device: main, "stream": nullcontext, "synchronize": lambda device: None,
        "CUDAGraph": lambda keep_graph: SimpleNamespace(replay=lambda: "replayed"), "set_stream": current.append,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ends, raising=False)
    graphs, launches = CudaGraphs(torch.device("cuda")), []

    def fails() -> None:
        launches.append(1)
        if len(launches) % 3 == 0:  # after two warm-ups
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    for pool in "ab":
        assert graphs.pool == pool
        with pytest.raises(CaptureFailed, match=r"^operation not permitted when stream is capturing$"):
            graphs.capture(fails)
    assert (graphs.pool, ended, current) == ("c", ["a", "b"], [main, main])
    assert graphs.capture(lambda: None)() == "replayed"


def test_memory_is_claimed_by_the_stream_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    claimed = []
    there = SimpleNamespace(is_cuda=True, device="cuda:0", record_stream=claimed.append)
    claim([there, SimpleNamespace(is_cuda=False), there])  # type: ignore[list-item]
    assert claimed == ["stream of cuda:0"] * 2
