"""Simulator of a warp-specialised Gluon kernel for sm_90: its own source runs in Python, with numpy as its arithmetic.

The interpreter of Triton has no Gluon. Here each warp group of a program is a thread, of which one runs at a time, and
barriers, copies and products behave as the hardware's: a barrier (mbarrier) counts arrivals and bytes and has a
phase, of which a wait knows the parity only; a copy (TMA) ends at any time after it began; a product (wgmma) reads its
operands in shared memory at any time until it is waited for. Which of them goes on is drawn from a seed.

Each fill of a stage and each read of it is an event. A thread learns of events through barriers alone, so that an
access which no barrier puts in order is found wherever it happened to run: `Race`. No thread able to go on: `Deadlock`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from random import Random
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.experimental.gluon.language as gl
from triton.runtime.jit import JITFunction

YIELDS = 0.2  # share of steps at which another warp group may go on, besides those that wait


class Race(AssertionError):
    """An access to shared memory or to a product that nothing puts behind what it depends on."""


class Deadlock(AssertionError):
    """Warp groups that wait for each other."""


class Stopped(BaseException):
    """Ends the threads of a program in which another one has failed."""


class Array(np.ndarray):
    """A tensor in registers; values of bfloat16 are kept in float32."""

    def to(self, dtype: Any) -> Any:
        if dtype == gl.bfloat16:
            return array(np.asarray(self).astype(ml_dtypes.bfloat16).astype(np.float32))
        return self


def array(values: Any) -> Any:
    return np.asarray(values).view(Array)


class Pointer:
    """An element of a tensor, or an array of such."""

    def __init__(self, flat: torch.Tensor, offset: Any = 0) -> None:
        self.flat, self.offset = flat, offset

    def __add__(self, by: Any) -> Pointer:
        return Pointer(self.flat, self.offset + by)


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all expected bytes are there."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phase = 0
        self.coming: set[int] = set()
        self.known: set[int] = set()

    def arrive(self, events: set[int], count: int = 1) -> None:
        if not self.count:
            raise Race("a barrier is used before it is initialised")
        self.pending -= count
        if self.pending < 0:
            raise Race("a barrier has more arrivals than a phase counts")
        self.coming |= events
        self.turn()

    def turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count
            self.known, self.coming = self.known | self.coming, set()


class Stage:
    """A tile in shared memory: the event of its last fill, and those of reads since."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.data = np.full(shape, np.nan, np.float32)
        self.fill: int | None = None
        self.reads: set[int] = set()


class View:
    """A stage as an operand of a product."""

    def __init__(self, stage: Stage, turned: bool = False) -> None:
        self.stage, self.turned = stage, turned

    def permute(self, order: tuple[int, int]) -> View:
        assert order == (1, 0)
        return View(self.stage, not self.turned)

    def read(self) -> np.ndarray:
        return self.stage.data.T if self.turned else self.stage.data


class Ring:
    """An allocation in shared memory: stages or barriers."""

    def __init__(self, dtype: Any, shape: list[int]) -> None:
        self.parts = [Barrier() if dtype == gl.int64 else Stage(tuple(shape[1:])) for _ in range(shape[0])]

    def index(self, at: int) -> Any:
        assert 0 <= at < len(self.parts), f"stage {at} of {len(self.parts)}"
        part = self.parts[at]
        return part if isinstance(part, Barrier) else View(part)


class Product:
    """A product in flight."""

    def __init__(self, a: Any, b: View, acc: Any, late: bool) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.views = [view for view in (a, b) if isinstance(view, View)]
        self.events: set[int] = set()
        self.value: Any = None
        self.early = None if late else self.compute()

    def compute(self) -> Any:
        a = self.a.read() if isinstance(self.a, View) else np.asarray(self.a)
        return array(np.asarray(self.acc) + a @ self.b.read())

    def in_flight(self, *_: Any) -> Any:
        raise Race("a product is used while it is in flight")

    __mul__ = __truediv__ = __array__ = in_flight


class Thread:
    """A warp group: the events it knows of, its products in flight, and the condition it waits for."""

    def __init__(self, name: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.name, self.function, self.args = name, function, args
        self.known: set[int] = set()
        self.products: list[Product] = []
        self.ready: Callable[[], bool] = lambda: True
        self.baton = threading.Semaphore(0)
        self.ended = False


class Program:
    """One program of the grid: shared memory, its threads, and copies in flight."""

    def __init__(self, number: int, programs: int, random: Random) -> None:
        self.number, self.programs, self.random = number, programs, random
        self.copies: list[Callable[[], None]] = []
        self.fills: set[int] = set()
        self.events = 0
        self.threads: list[Thread] = []
        self.current: Thread | None = None
        self.error: Exception | None = None
        self.stopped = self.fenced = False

    def event(self) -> int:
        self.events += 1
        return self.events

    def pause(self) -> Thread:
        """Perhaps let others go on; returns the current thread."""
        return self.until(lambda: True) if self.random.random() < YIELDS else self.running()

    def running(self) -> Thread:
        assert self.current is not None, "outside of a warp group"
        return self.current

    def until(self, ready: Callable[[], bool]) -> Thread:
        """Let others go on until `ready`; returns the current thread."""
        thread = self.running()
        thread.ready = ready
        if self.choose() is not thread:
            thread.baton.acquire()
        if self.stopped:
            raise Stopped
        return thread

    def choose(self) -> Thread | None:
        """End copies and wake a thread, at random, so that one runs; returns it, None when all have ended."""
        while True:
            waiting = [thread for thread in self.threads if not thread.ended]
            able: list[Any] = [*(thread for thread in waiting if thread.ready()), *self.copies]
            if not able:
                if waiting:
                    raise Deadlock(f"{', '.join(thread.name for thread in waiting)} wait for each other")
                return None
            chosen = self.random.choice(able)
            if isinstance(chosen, Thread):
                before, self.current = self.current, chosen
                if chosen is not before:
                    chosen.baton.release()
                return chosen
            self.copies.remove(chosen)
            chosen()

    def run(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        """Run the warp groups to their ends."""
        if not self.fenced:
            raise Race("copies may see barriers that are not initialised: no fence before the warp groups begin")
        self.threads = [Thread(f"warp group {at}", *partition) for at, partition in enumerate(partitions)]
        workers = [threading.Thread(target=self.work, args=(thread,), daemon=True) for thread in self.threads]
        for worker in workers:
            worker.start()
        self.choose()
        for worker in workers:
            worker.join()
        if self.error is not None:
            raise self.error
        if self.fills - set().union(*(thread.known for thread in self.threads)):
            raise Race("a copy may be in flight when the program ends")

    def work(self, thread: Thread) -> None:
        thread.baton.acquire()
        try:
            if not self.stopped:
                thread.function(*thread.args)
                if thread.products:
                    raise Race("a product is in flight when its warp group ends")
                thread.ended = True
                self.current = None
                self.choose()
        except Stopped:
            pass
        except Exception as error:
            self.error, self.stopped = error, True
            for other in self.threads:
                other.baton.release()

    # What a kernel calls.

    def wait(self, barrier: Barrier, phase: int) -> None:
        self.until(lambda: barrier.phase & 1 != phase).known.update(barrier.known)

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        barrier.arrive(set(self.pause().known), count)

    def expect(self, barrier: Barrier, nbytes: int) -> None:
        thread = self.pause()
        barrier.bytes += nbytes
        barrier.arrive(set(thread.known))

    def load_tile(self, tiles: Any, place: list[int], barrier: Barrier, view: View) -> None:
        """Begin a copy of a tile; rows beyond the matrix are 0, as a descriptor gives them."""
        thread, stage = self.pause(), view.stage
        if stage.reads - thread.known or (stage.fill is not None and stage.fill not in thread.known):
            raise Race("a stage is filled while it may still be read")
        fill = stage.fill = self.event()
        stage.reads = set()
        self.fills.add(fill)
        rows, columns = tiles.block_shape
        row, column = place
        assert row >= 0 <= column and column + columns <= tiles.shape[1], f"a tile at {place} of {tiles.shape}"
        data = np.zeros((rows, columns), np.float32)
        source = tiles.base[row : row + rows, column : column + columns].float().numpy()
        data[: len(source)] = source
        stage.data = np.full_like(data, np.nan)

        def complete() -> None:
            stage.data = data
            barrier.bytes -= data.size * 2
            barrier.coming.add(fill)
            barrier.turn()

        self.copies.append(complete)

    def product(self, a: Any, b: View, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        thread = self.pause()
        product = Product(a, b, acc if use_acc else 0.0, late=self.random.random() < 0.5)
        for view in product.views:
            if view.stage.fill not in thread.known:
                raise Race("a stage is read before it is filled")
            event = self.event()
            view.stage.reads.add(event)
            product.events.add(event)
        thread.products.append(product)
        return product

    def ready(self, left: int, values: list[Any]) -> Any:
        """Wait until at most `left` products are in flight; returns the values, products among them complete."""
        thread = self.pause()
        while len(thread.products) > left:
            product = thread.products.pop(0)
            product.value = product.compute() if product.early is None else product.early
            thread.known |= product.events
        complete = [value.value if isinstance(value, Product) else value for value in values]
        if any(value is None for value in complete):
            raise Race("a product is used while it is in flight")
        return complete[0] if len(complete) == 1 else tuple(complete)

    def language(self) -> SimpleNamespace:
        """What a kernel finds under the name `gl`; layouts and dtypes are Gluon's own."""
        names = {name: getattr(gl, name) for name in dir(gl) if name.endswith("Layout") or name in (
            "bfloat16", "float32", "int64", "constexpr")}  # fmt: skip
        return SimpleNamespace(
            **names,
            program_id=lambda axis: self.number,
            num_programs=lambda axis: self.programs,
            static_range=range,
            allocate_shared_memory=lambda dtype, shape, layout: Ring(dtype, shape),
            warp_specialize=lambda partitions, warps, registers: self.run(partitions),
            load=lambda pointer: pointer.flat[pointer.offset].item(),
            store=store,
            cast=lambda value, dtype: value,
            convert_layout=lambda value, layout: value,
            minimum=min,
            maximum=np.maximum,
            where=where,
            arange=lambda start, end, layout: array(np.arange(start, end)),
            full=lambda shape, value, dtype, layout: array(np.full(shape, value, np.float32)),
            zeros=lambda shape, dtype, layout: array(np.zeros(shape, np.float32)),
            max=lambda value, axis: value.in_flight() if isinstance(value, Product) else value.max(axis),
            sum=lambda value, axis: value.sum(axis),
            exp2=np.exp2,
            log2=np.log2,
            expand_dims=np.expand_dims,
        )  # fmt: skip


def where(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(condition, np.ndarray):
        return array(np.where(condition, one, other))
    return one if condition else other


def store(pointer: Pointer, value: np.ndarray, mask: np.ndarray) -> None:
    places, inside = np.broadcast_arrays(pointer.offset, mask)
    values = torch.from_numpy(np.ascontiguousarray(np.broadcast_to(value, places.shape)[inside]))
    assert (places[inside] >= 0).all()
    pointer.flat[torch.from_numpy(places[inside])] = values.to(pointer.flat.dtype)


class Simulated:
    """A Gluon kernel of a module in place of itself: `kernel[grid](*args)` runs its programs one after the other."""

    def __init__(self, module: ModuleType, kernel: str, seed: int = 0) -> None:
        self.module, self.kernel, self.seed = module, kernel, seed
        found = getattr(module, kernel)
        self.source: JITFunction[Any] = found.source if isinstance(found, Simulated) else found
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launch(grid[0], args, options)

    def launch(self, programs: int, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.launches += 1
        random = Random(self.seed)
        args = tuple(Pointer(arg.view(-1)) if isinstance(arg, torch.Tensor) else arg for arg in args)
        options.pop("num_warps")
        for number in range(programs):
            program = Program(number, programs, random)
            self.functions(program)[self.kernel](*args, **options)

    def functions(self, program: Program) -> dict[str, Any]:
        """The module's functions over the simulator's language in place of Gluon's."""
        names: dict[str, Any] = dict(vars(self.module)) | {
            "gl": program.language(),
            "mbarrier": SimpleNamespace(
                init=init, wait=program.wait, arrive=program.arrive, expect=program.expect, MBarrierLayout=lambda: None
            ),
            "load_tile": program.load_tile,
            "warpgroup_mma": program.product,
            "warpgroup_mma_wait": program.ready,
            "fence_async_shared": lambda: setattr(program, "fenced", True),
        }
        for name, value in (vars(self.module) | {self.kernel: self.source}).items():
            if isinstance(value, JITFunction):
                names[name] = FunctionType(value.fn.__code__, names, name)
        return names


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count
