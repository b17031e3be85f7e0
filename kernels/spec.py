"""What an op is, as data: its reference, its fast forms and where they run, its cases, and how exact it must be.

Tests, the microbenchmark, the compile gate and `inferix doctor` all read the same `KernelSpec`. An
implementation is named by module and function and imported when it is first chosen, so nothing here needs Triton.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

ARCHITECTURES = (80, 89, 90, 100, 120)  # compute capabilities, times ten, that GPU code is compiled for
HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32)
GRID_480P = (30, 52)  # rows and columns of tokens in a latent frame of 832x480, for cases from real models
FRAME_480P = GRID_480P[0] * GRID_480P[1]
CHOSEN: ContextVar[Mapping[str, str] | None] = ContextVar("implementations", default=None)


@dataclass(frozen=True)
class Implementation:
    """One form of an op: `run` is "module:function" inside this package, with the reference's signature.

    architectures: those a GPU form is declared for; empty where it runs wherever torch does. dtypes and last_dims
    (empty: any): of the tensors it is for; others are left to the reference. A module that has `compile_cases` is
    compiled by Triton; it also has its `Config` and `candidates(architecture)`, the configs worth trying there.
    """

    name: str
    run: str
    architectures: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = HALF
    last_dims: tuple[int, ...] = ()

    def serves(self, capability: int, dtype: torch.dtype, last_dim: int | None = None) -> bool:
        """Whether it is for such tensors on an architecture."""
        fits = last_dim is None or not self.last_dims or last_dim in self.last_dims
        return capability in self.architectures and dtype in self.dtypes and fits

    def module(self) -> ModuleType:
        return import_module(self.run.partition(":")[0], __package__)

    def load(self) -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(self.module(), self.run.partition(":")[2])
        return loaded


@dataclass(frozen=True)
class Case:
    """Named sizes of one call; `options` are what else `make_inputs` wants to know."""

    name: str
    dims: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, dim: str) -> int:
        return self.dims[dim]


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """An op.

    reference: plain torch, in float32 or better inside, same signature as every implementation: it writes into
    the tensors named by `outputs`; by the one named `like` a form is chosen. make_inputs(case, dtype, device, seed)
    gives the keyword arguments of a call.
    tolerance: largest error by dtype, relative to the largest value of the exact result. nbytes and flops tell
    what a call must move and compute. reads_host: forms that read tensors on the host, which no recording allows.
    """

    name: str
    reference: Callable[..., None]
    outputs: tuple[str, ...]
    like: str
    implementations: tuple[Implementation, ...]
    make_inputs: Callable[[Case, torch.dtype, str, int], dict[str, Any]]
    test_cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    tolerance: Mapping[torch.dtype, float]
    nbytes: Callable[[Case, torch.dtype], int]
    flops: Callable[[Case], int]
    reads_host: tuple[str, ...] = ()

    def choose(self, like: torch.Tensor) -> Callable[..., None]:
        """The form for such a tensor, in the config that was found best on this card if that was ever asked."""
        if wanted := (CHOSEN.get() or {}).get(self.name):
            return self.named(wanted, like.device)
        if like.device.type == "cuda" and (best := tuned(self, like)):
            return best
        return self.named(self.chosen(like.device, like.dtype, like.shape[-1]))

    def chosen(self, device: torch.device, dtype: torch.dtype, last_dim: int | None = None) -> str:
        """Its name: the one asked for by `using`, else the first for device, dtype and size, else the reference."""
        if wanted := (CHOSEN.get() or {}).get(self.name):
            return wanted
        if device.type == "cuda" and has_triton():
            capability = architecture(device)
            for form in self.implementations:
                if form.serves(capability, dtype, last_dim):
                    return form.name
        return "reference"

    def form(self, name: str) -> Implementation:
        """An implementation by name; ValueError for one the op does not have."""
        for form in self.implementations:
            if form.name == name:
                return form
        names = ", ".join(["reference", *(form.name for form in self.implementations)])
        raise ValueError(f"{self.name}: no implementation {name!r}; there are {names}")

    def named(self, name: str, device: torch.device | None = None) -> Callable[..., None]:
        """What runs under a name; ValueError for one that is not there, or not for the GPU `device`."""
        if name == "reference":
            return self.reference
        form = self.form(name)
        known = form.architectures
        if device is not None and device.type == "cuda" and known and architecture(device) not in known:
            has = "{}.{}".format(*torch.cuda.get_device_capability(device))
            wants = ", ".join(f"{one // 10}.{one % 10}" for one in known)
            raise ValueError(
                f"{self.name}: compute capability of {device} is {has}; {name} is for {wants}; take the reference"
            )
        return form.load()


@contextmanager
def using(**names: str) -> Iterator[None]:
    """Within the block, take these implementations: `using(block_attention="reference")`."""
    token = CHOSEN.set({**(CHOSEN.get() or {}), **names})
    try:
        yield
    finally:
        CHOSEN.reset(token)


def tuned(spec: KernelSpec, like: torch.Tensor) -> Callable[..., None] | None:
    """What the card's saved table says for such a tensor; None where there is no table, or nothing about it."""
    from .tuning import choices

    card, capability = torch.cuda.get_device_name(like.device), architecture(like.device)
    return choices(spec, card, capability).get(sort_of(like))


def sort_of(like: torch.Tensor) -> str:
    """What decides between configs: the dtype and last dim of the tensor by which a form is chosen."""
    return f"{str(like.dtype)[6:]} {like.shape[-1]}"


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def architecture(device: torch.device) -> int:
    """The newest of `ARCHITECTURES` that code for a GPU can be taken from; 0 below all of them."""
    major, minor = torch.cuda.get_device_capability(device)
    fitting = [known for known in ARCHITECTURES if known // 10 == major and known <= 10 * major + minor]
    return max(fitting, default=0)


def expect(op: str, what: str, got: object, wanted: object) -> None:
    """ValueError unless `got` is `wanted`, naming the op, the dimension and both."""
    if got != wanted:
        raise ValueError(f"{op}: {what} is {got}; expected {wanted}")


def expect_one_of(op: str, what: str, got: object, allowed: tuple[object, ...]) -> None:
    if got not in allowed:
        raise ValueError(f"{op}: {what} is {got}; expected one of {', '.join(map(str, allowed))}")


def indexable(store: torch.Tensor) -> torch.Tensor:
    """A store whose pages torch can pick and set on every device: FP8 as the bytes it is."""
    return store.view(torch.uint8) if store.dtype == torch.float8_e4m3fn else store


def expect_fp8(op: str, device: torch.device) -> None:
    """ValueError on a GPU that has no FP8 numbers."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        has = "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise ValueError(f"{op}: compute capability of {device} is {has}; FP8 needs 8.9 or more, so take INT8 or half")


def expect_dense(op: str, **tensors: torch.Tensor | None) -> None:
    """ValueError for a tensor that is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {tensor.stride()}; expected a contiguous tensor")


def expect_together(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """ValueError for a tensor that is on another device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}; expected {device}")


def debugging() -> bool:
    """Whether to read page lists and scales on the host and check them before each call, at the price of a wait."""
    return os.environ.get("INFERIX_DEBUG") == "1"


def expect_pages(op: str, what: str, listed: torch.Tensor, pages: int, *, once: bool = False) -> None:
    """ValueError for a page that a store does not have, or that is listed twice where it may be only `once`."""
    held = listed.flatten().tolist()
    if wrong := [page for page in held if not 0 <= page < pages]:
        raise ValueError(f"{op}: {what} lists page {wrong[0]}; expected 0..{pages - 1}")
    if once and (again := [page for page in held if held.count(page) > 1]):
        raise ValueError(f"{op}: {what} lists page {again[0]} {held.count(again[0])} times; expected once")


def expect_scales(op: str, scale: torch.Tensor | None) -> None:
    """ValueError for a scale that is not above 0."""
    if scale is not None and not bool((scale > 0).all()):
        raise ValueError(f"{op}: a scale of the pages is {float(scale.min())}; expected numbers above 0")
