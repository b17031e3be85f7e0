"""What an op is, as data: its reference, its fast forms and where they run, its cases, and how exact it must be.

Tests, the microbenchmark, the compile gate and `inferix doctor` all read the same `KernelSpec`. An
implementation is named by module and function and imported when it is first chosen, so nothing here needs Triton.
"""

from __future__ import annotations

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

    architectures: those a GPU form is declared for; empty where it runs wherever torch does. dtypes: of the
    tensors it is for; others are left to the reference.
    """

    name: str
    run: str
    architectures: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = HALF

    def module(self) -> ModuleType:
        """Where it lives; one that has `compile_cases` is compiled by Triton, another is a library's."""
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


@dataclass(frozen=True)
class KernelSpec:
    """An op.

    reference: plain torch, in float32 or better inside, same signature as every implementation: it writes into
    the tensors named by `outputs`. make_inputs(case, dtype, device, seed) gives the keyword arguments of a call.
    tolerance: largest error by dtype, relative to the largest value of the exact result. nbytes and flops tell
    what a call must move and compute.
    """

    name: str
    reference: Callable[..., None]
    outputs: tuple[str, ...]
    implementations: tuple[Implementation, ...]
    make_inputs: Callable[[Case, torch.dtype, str, int], dict[str, Any]]
    test_cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    tolerance: Mapping[torch.dtype, float]
    nbytes: Callable[[Case, torch.dtype], int]
    flops: Callable[[Case], int]

    def choose(self, like: torch.Tensor) -> Callable[..., None]:
        """The form for such a tensor."""
        return self.named(self.chosen(like.device, like.dtype))

    def chosen(self, device: torch.device, dtype: torch.dtype) -> str:
        """Its name: the one asked for by `using`, else the first for the device and dtype, else the reference."""
        if wanted := (CHOSEN.get() or {}).get(self.name):
            return wanted
        if device.type == "cuda" and has_triton():
            capability = architecture(device)
            for form in self.implementations:
                if capability in form.architectures and dtype in form.dtypes:
                    return form.name
        return "reference"

    def named(self, name: str) -> Callable[..., None]:
        """An implementation by name; ValueError for one the op does not have."""
        if name == "reference":
            return self.reference
        for form in self.implementations:
            if form.name == name:
                return form.load()
        names = ", ".join(["reference", *(form.name for form in self.implementations)])
        raise ValueError(f"{self.name}: no implementation {name!r}; there are {names}")


@contextmanager
def using(**names: str) -> Iterator[None]:
    """Within the block, take these implementations: `using(block_attention="reference")`."""
    token = CHOSEN.set({**(CHOSEN.get() or {}), **names})
    try:
        yield
    finally:
        CHOSEN.reset(token)


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
