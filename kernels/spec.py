"""An op as data: reference, arguments with named dims, cost, picture label, fast forms, cases and tolerance.

Tests, the microbenchmark, the compile gate, the cost model, the printers and `inferix doctor` read the same spec. An
implementation is named by module and function and imported when it is first chosen, so nothing here needs Triton.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any, Protocol

import torch

from ..errors import UsageError, nearest, quoted
from ..user_python import is_function_of_file, load_function
from .own_forms import OwnForm, own_form

ARCHITECTURES = (80, 89, 90, 100, 120)  # compute capabilities, times ten, that GPU code is compiled for
HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32)
ANY_FLOAT = (*FLOATS, torch.float64)
FP8 = torch.float8_e4m3fn
LIMITS = {FP8: 448.0, torch.int8: 127.0}  # largest entry of a tensor that has scales beside it, by its dtype
GRID_480P = (30, 52)  # rows and columns of tokens in a latent frame of 832x480, for cases from real models
FRAME_480P = GRID_480P[0] * GRID_480P[1]
FAMILIES = (
    "matmul", "packed matmul", "attention", "norm and gate", "pages", "solver", "elementwise", "copy", "exchange",
)  # fmt: skip
NO_BUILTINS: dict[str, Any] = {"__builtins__": {}}  # of expressions: arithmetic of dims, no calls
MAX_ACCEPTED = 1024  # layouts of calls that an op remembers
CHOSEN: ContextVar[Mapping[str, str] | None] = ContextVar("implementations", default=None)


class Sized(Protocol):
    """A tensor, or a reference to one in a lowered program."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Cost:
    """Operations (a multiply and an add are 2), bytes read and written, and launches."""

    flops: int = 0
    nbytes: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.nbytes + other.nbytes, self.launches + other.launches)


@dataclass(frozen=True)
class Arg:
    """A tensor argument of an op.

    dims: one entry per dim, separated by spaces. A name is bound to the first size it meets and must be that size
    everywhere; a number or an expression of names must equal the size; `a|b` allows either. Names include the op's int
    arguments, and `has_<argument>` for an optional argument (1 where it is given, else 0).
    dtypes: those allowed, empty for any; the name of an argument stands for its dtype. Where the op computes in
    float64, float64 is allowed in the place of float32.
    listed_by: for a store of pages, [2, pages, ...]: the argument that lists the pages which a call touches, or an int
    argument that is their number.
    or_dims: the dims of another form, with more dims or fewer; empty for none.
    """

    dims: str
    dtypes: tuple[torch.dtype | str, ...] = ()
    listed_by: str = ""
    or_dims: str = ""

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        return tuple(self.dims.split())

    def sizes_for(self, rank: int) -> tuple[str, ...]:
        """The sizes by name of a tensor with `rank` dims."""
        other = tuple(self.or_dims.split())
        return other if len(other) == rank != len(self.sizes) else self.sizes


@dataclass(frozen=True)
class Implementation:
    """One form of an op: `run` is "module:function" inside this package, with the reference's signature.

    architectures: those a GPU form is declared for; empty where it runs wherever torch does. dtypes and last_dims
    (empty: any): of the tensors it is for; others are left to the reference. cpu: the form that a CPU takes, for all
    dtypes and sizes. A module that has `compile_cases` is compiled by Triton; it also has its `Config` and
    `candidates(architecture)`, the configs worth trying there.
    rules: expressions of dims that must hold for a call; others run in the form `otherwise` where an op chooses, and
    this one refuses them. unproved: why no card has run its kernel yet; it is then checked in a process of its own,
    and neither timed nor tuned beside others. reference: "module:function" of a form that rounds what the op's
    reference does not: it is judged by that, and never chosen unasked.
    """

    name: str
    run: str
    architectures: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = HALF
    last_dims: tuple[int, ...] = ()
    cpu: bool = False
    rules: tuple[str, ...] = ()
    otherwise: str = ""
    unproved: str = ""
    reference: str = ""

    @property
    def unasked(self) -> bool:
        """True for a form that may serve without being asked for: proved on a card, and exact."""
        return not self.unproved and not self.reference

    def serves(self, capability: int, dtype: torch.dtype, last_dim: int | None = None) -> bool:
        """Return True for tensors that this form is declared for on an architecture."""
        fits = last_dim is None or not self.last_dims or last_dim in self.last_dims
        return capability in self.architectures and dtype in self.dtypes and fits

    def module(self) -> ModuleType:
        return import_module(self.run.partition(":")[0], __package__)

    def load(self) -> Callable[..., Any]:
        return function_of(self.run)


def function_of(place: str) -> Callable[..., Any]:
    """The function of "module:function" inside this package."""
    module, _, name = place.partition(":")
    loaded: Callable[..., Any] = getattr(import_module(module, __package__), name)
    return loaded


@dataclass(frozen=True)
class Case:
    """Named sizes of one call; `options` are further arguments of `make_inputs`."""

    name: str
    dims: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, dim: str) -> int:
        return self.dims[dim]


@dataclass(frozen=True, eq=False, kw_only=True)
class OpSpec:
    """An op that graphs know, with or without a kernel of its own.

    reference: plain torch; its parameters are the op's schema. It writes into the tensors named by `outputs`.
    args: the tensor arguments. dense: they must be contiguous.
    rules: expressions of dims that must hold, such as `heads % kv_heads == 0`; one with an unbound name is skipped.
    needs: optional arguments that are given only with another one. scaled: tensors that may be FP8 or INT8, with the
    argument of their scales, given exactly where the dtype is such. defaults: dims of arguments that are left out.
    family: the kind of work, one of FAMILIES; pictures colour by it. label: a short name in pictures.
    flops: an expression of dims; `listed` is the number of pages read. counted_by: the argument, int32 [rows], that
    says how many pages of its table each row reads. check_values: checks page lists and scales, which lie on the
    device; it gets the arguments by name, under INFERIX_DEBUG=1 only. detail: words for the variant of a call, from the
    names of the arguments that are given. reads_host: forms that read tensors on the host, which cannot be captured.
    awaited: another rank waits for the call, so it runs even where nothing reads what it writes.
    """

    name: str
    reference: Callable[..., None]
    outputs: tuple[str, ...]
    like: str
    args: Mapping[str, Arg]
    family: str
    label: str
    flops: str
    rules: tuple[str, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    scaled: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    dense: bool = True
    counted_by: str = ""
    check_values: Callable[[Mapping[str, Any]], None] | None = None
    detail: Callable[[frozenset[str]], str] | None = None
    reads_host: tuple[str, ...] = ()
    awaited: bool = False

    def __post_init__(self) -> None:
        assert self.family in FAMILIES, f"{self.name}: family is {self.family!r}; expected one of {FAMILIES}"
        unknown = {*self.args, *self.outputs, self.like} - set(self.names)
        assert not unknown, f"{self.name}: {sorted(unknown)} are no parameters of its reference"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the op's arguments, in order."""
        return tuple(inspect.signature(self.reference).parameters)

    def chosen(self, device: torch.device, dtype: torch.dtype, last_dim: int | None = None) -> str:
        """Name of the implementation that serves such tensors; here there is only the reference."""
        return "reference"

    def is_host_form(self, name: str) -> bool:
        """Return True for a form that reads tensors on the host, and so cannot be captured."""
        return name in self.reads_host

    def check(self, *args: Any) -> None:
        """Raise UsageError, with argument, value and expectation, unless the arguments fit each other.

        Shapes, dtypes, devices and strides that have passed once are not compared again.
        """
        layout = tuple(map(layout_of, args))
        if layout not in self.accepted or debugging():
            self._check(*args)
            if len(self.accepted) >= MAX_ACCEPTED:
                self.accepted.clear()
            self.accepted.add(layout)

    @cached_property
    def accepted(self) -> set[tuple[object, ...]]:
        """Layouts of arguments that passed `check`."""
        return set()

    def _check(self, *args: Any) -> None:
        given = dict(zip(self.names, args, strict=True))
        tensors = {name: given[name] for name in self.args if given[name] is not None}
        for name, tensor in tensors.items():
            shape, sizes = tuple(tensor.shape), self.args[name].sizes_for(tensor.ndim)
            if len(shape) != len(sizes):
                self._refuse(f"shape of {name}", shape, f"{len(sizes)} dims, [{', '.join(sizes)}]")
            if 0 in shape:
                self._refuse(name, list(shape), "1 or more of each")
        for name, other in self.needs:
            if given[name] is not None and given[other] is None:
                raise UsageError(f"{self.name}: {name} is given without {other}; give {other} too, or leave {name} out")
        dims = self._dims(given)
        for rule in self.rules:
            names = compiled(rule).co_names
            if all(name in dims for name in names) and not evaluated(rule, dims):
                values = ", ".join(f"{name} is {dims[name]}" for name in names)
                raise UsageError(f"{self.name}: {values}; expected {rule}")
        for name, tensor in tensors.items():
            shape, sizes = tuple(tensor.shape), self.args[name].sizes_for(tensor.ndim)
            allowed = [tuple(evaluated(part, dims) for part in size.split("|")) for size in sizes]
            if any(size not in fitting for size, fitting in zip(shape, allowed, strict=True)):
                expected = ", ".join(" or ".join(map(str, fitting)) for fitting in allowed)
                comma = "," if len(allowed) == 1 else ""
                self._refuse(f"shape of {name}", shape, f"({expected}{comma}), that is [{', '.join(sizes)}]")
        self._check_dtypes(given, tensors)
        device = given[self.like].device
        for name, tensor in tensors.items():
            if tensor.device != device:
                self._refuse(f"device of {name}", tensor.device, device)
            if self.dense and not tensor.is_contiguous():
                self._refuse(f"strides of {name}", tensor.stride(), "a contiguous tensor")
        if self.check_values is not None and debugging():
            self.check_values(given)

    def cost(
        self, given: Mapping[str, Any], listed: int | None = None, memory: Callable[[Sized], Hashable] = id
    ) -> Cost:
        """Cost of one call from the shapes of its arguments.

        listed: pages that all rows read together, where `counted_by` says so on the device; without it, as many as the
        table has room for. memory: tells whether two arguments are the same memory, whose bytes count once.
        """
        dims, moved = self._dims(given), dict[Hashable, int]()
        for name, value in given.items():
            if not hasattr(value, "shape"):
                continue
            nbytes = math.prod(value.shape) * value.dtype.itemsize
            if store := name in self.args and self.args[name].listed_by:
                count = given[store]
                room = count if isinstance(count, int) else math.prod(count.shape)
                dims["listed"] = room if listed is None or not self.counted_by else listed
                nbytes = nbytes // value.shape[1] * dims["listed"] // dims.get("head_groups", 1)
            key = memory(value), store
            moved[key] = max(moved.get(key, 0), nbytes)
        return Cost(int(evaluated(self.flops, dims)), sum(moved.values()), 1)

    def _dims(self, given: Mapping[str, Any]) -> dict[str, int]:
        """Sizes by name, as the arguments first show them."""
        dims = {name: value for name, value in given.items() if isinstance(value, int)}
        dims |= {f"has_{name}": int(given.get(name) is not None) for name in self.args}
        for name, arg in self.args.items():
            shape = getattr(given.get(name), "shape", ())
            for size, actual in zip(arg.sizes_for(len(shape)), shape, strict=False):
                if size.isidentifier():
                    dims.setdefault(size, actual)
        return dict(self.defaults) | dims

    def _check_dtypes(self, given: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Refuse dtypes that are not declared, and low-precision tensors without scales or the reverse."""
        wide = tensors[self.like].dtype == torch.float64
        for name, tensor in tensors.items():
            wanted = self.args[name].dtypes
            allowed = [given[part].dtype if isinstance(part, str) else part for part in wanted]
            allowed += [torch.float64] if wide and name != self.like and torch.float32 in allowed else []
            if wanted and tensor.dtype not in allowed:
                self._refuse(f"dtype of {name}", tensor.dtype, " or ".join(map(str, dict.fromkeys(allowed))))
        for name, scale in self.scaled.items():
            dtype, has_scale = given[name].dtype, given[scale] is not None
            if has_scale != (dtype in LIMITS):
                wants = f"no {scale}, or {' or '.join(map(str, LIMITS))}" if has_scale else f"{scale} beside it"
                self._refuse(f"dtype of {name}", dtype, wants)

    def _refuse(self, what: str, value: object, expected: object) -> None:
        raise UsageError(f"{self.name}: {what} is {value}; expected {expected}")


@dataclass(frozen=True, eq=False, kw_only=True)
class KernelSpec(OpSpec):
    """An op with fast forms: every implementation has the reference's signature.

    By the tensor argument named `like` a form is chosen. make_inputs(case, dtype, device, seed) gives the keyword
    arguments of a call. tolerance: largest error by dtype, relative to the largest value of the exact result.
    tensor_cores: its GPU code must use them. stack: bytes that its GPU code may keep on the stack.
    shape_names: names for sizes that `inferix bench kernels --shape` takes besides the cases' own: each is a product of
    two dims of a case, of which the first is set (`kv` of pages and page_tokens), or one dim by another name.
    """

    implementations: tuple[Implementation, ...]
    make_inputs: Callable[[Case, torch.dtype, str, int], dict[str, Any]]
    test_cases: tuple[Case, ...]
    bench_cases: tuple[Case, ...]
    tolerance: Mapping[torch.dtype, float]
    tensor_cores: bool = False
    stack: int = 0
    shape_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def chosen(self, device: torch.device, dtype: torch.dtype, last_dim: int | None = None) -> str:
        """Name of the form `using` asks for, else of the first for device, dtype and size, else "reference"."""
        if wanted := (CHOSEN.get() or {}).get(self.name):
            return wanted
        if device.type == "cuda" and has_triton():
            capability = architecture(device)
            for form in self.implementations:
                if form.serves(capability, dtype, last_dim) and form.unasked:
                    return form.name
        elif device.type == "cpu":
            return next((form.name for form in self.implementations if form.cpu), "reference")
        return "reference"

    def serving(
        self, capability: int, given: Mapping[str, Any], forms: Sequence[Implementation] | None = None
    ) -> list[Implementation]:
        """Those of some forms that take a call on an architecture; without `forms`, of all that need not be asked for.
        """
        like = given[self.like]
        offered = [form for form in self.implementations if form.unasked] if forms is None else forms
        return [
            form for form in offered
            if form.serves(capability, like.dtype, like.shape[-1]) and not self.broken(form, given)
        ]  # fmt: skip

    def broken(self, form: Implementation, given: Mapping[str, Any]) -> str | None:
        """The first rule of a form that a call breaks, with the sizes in it; None if the form takes the call."""
        dims = self._dims(given) if form.rules else {}
        for rule in form.rules:
            if not evaluated(rule, dims):
                values = ", ".join(f"{name} is {dims[name]}" for name in compiled(rule).co_names)
                return f"{values}; expected {rule}"
        return None

    def judging(self, form: Implementation) -> KernelSpec:
        """The spec that says what a form computes: with the form's own reference, where it has one."""
        return replace(self, reference=function_of(form.reference)) if form.reference else self

    def expect_taken(self, name: str, given: Mapping[str, Any]) -> None:
        """UsageError for a call that breaks a rule of a form."""
        form = self.form(name)
        if reason := self.broken(form, given):
            raise UsageError(f"{self.name}: implementation {name}: {reason}; use {form.otherwise} or reference")

    @cached_property
    def own_forms(self) -> dict[str, OwnForm]:
        """Forms that users registered, by name."""
        return {}

    def register(self, name: str, function: Callable[..., None], *, reads_host: bool = False) -> OwnForm:
        """Add a user's form, in place of an earlier one of that name, which `using` and `kernels=` of an engine take.

        function: the reference's parameters, in order; further ones have defaults. reads_host: it reads tensors on the
        host, so that it cannot be captured. Raises UsageError for other parameters, and for a name of the op's own.
        """
        if name == "reference" or any(form.name == name for form in self.implementations):
            raise UsageError(f"{self.name}: name is {quoted(name)}, a form that the op has already; choose another")
        self.own_forms[name] = form = own_form(self.name, self.names, name, function, reads_host)
        return form

    def form(self, name: str) -> Implementation:
        """Return an implementation by name; UsageError for one the op does not have."""
        for form in self.implementations:
            if form.name == name:
                return form
        names = ["reference", *(form.name for form in self.implementations), *self.own_forms]
        raise UsageError(
            f"{self.name}: no implementation {quoted(name)}{nearest(name, names)}; there are {', '.join(names)}, and "
            "FILE.py:FUNCTION names one of your own"
        )

    def named(self, name: str, device: torch.device | None = None) -> Callable[..., None]:
        """Return the function of a form; UsageError for one that is unknown, or not for the GPU `device`.

        `FILE.py:FUNCTION` is loaded and registered under that name when it is first asked for.
        """
        if name == "reference":
            return self.reference
        if name not in self.own_forms and is_function_of_file(name):
            return self.register(name, load_function(name, f"{self.name}: form"))
        if own := self.own_forms.get(name):
            return own
        form = self.form(name)
        known = form.architectures
        if device is not None and device.type == "cuda" and known and architecture(device) not in known:
            has = "{}.{}".format(*torch.cuda.get_device_capability(device))
            wants = ", ".join(f"{one // 10}.{one % 10}" for one in known)
            raise UsageError(
                f"{self.name}: compute capability of {device} is {has}; {name} is for {wants}; take the reference"
            )
        return form.load()

    def is_host_form(self, name: str) -> bool:
        own = self.own_forms.get(name)
        return super().is_host_form(name) if own is None else own.reads_host


@contextmanager
def using(**names: str) -> Iterator[None]:
    """Within the block, take these forms: `using(block_attention="reference")`, or one that a user registered.

    It holds for calls in this thread; the `kernels` of an engine hold wherever the engine runs.
    """
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


@cache
def compiled(expression: str) -> CodeType:
    """An expression of a spec, parsed once."""
    return compile(expression, "<spec>", "eval")


def evaluated(expression: str, dims: Mapping[str, int]) -> int:
    """The value of an expression of a spec, all of whose names are bound."""
    if expression in dims:
        return dims[expression]
    value: int = eval(compiled(expression), NO_BUILTINS, dims)
    return value


def layout_of(value: Any) -> object:
    """Layout of an argument, as `OpSpec.check` compares it."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device, value.stride()
    return value


def multiprocessors_of(device: str) -> int:
    """Number of multiprocessors of a GPU; 0 for a CPU."""
    is_gpu = torch.device(device).type == "cuda"
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if is_gpu else 0


def indexable(store: torch.Tensor) -> torch.Tensor:
    """View a store whose dtype torch cannot index (FP8) as bytes; other stores as they are."""
    return store.view(torch.uint8) if store.dtype == FP8 else store


def expect_fp8(op: str, device: torch.device) -> None:
    """UsageError on a GPU without FP8 numbers."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        has = "{}.{}".format(*torch.cuda.get_device_capability(device))
        raise UsageError(f"{op}: compute capability of {device} is {has}; FP8 needs 8.9 or more, so take INT8 or half")


def debugging() -> bool:
    """Return True under INFERIX_DEBUG=1: page lists and scales are read on the host and checked before each call."""
    return os.environ.get("INFERIX_DEBUG") == "1"


def expect_pages(op: str, what: str, listed: torch.Tensor, pages: int, *, once: bool = False) -> None:
    """UsageError for a page that a store does not have, or that is listed twice where it may be only `once`."""
    numbers = listed.flatten().tolist()
    if wrong := [page for page in numbers if not 0 <= page < pages]:
        raise UsageError(f"{op}: {what} lists page {wrong[0]}; expected 0..{pages - 1}")
    if once and (again := [page for page in numbers if numbers.count(page) > 1]):
        raise UsageError(f"{op}: {what} lists page {again[0]} {numbers.count(again[0])} times; expected once")


def expect_scales(op: str, scale: torch.Tensor | None) -> None:
    """UsageError for a scale that is not above 0."""
    if scale is not None and not bool((scale > 0).all()):
        raise UsageError(f"{op}: a scale of the pages is {float(scale.min())}; expected numbers above 0")
