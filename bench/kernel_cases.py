"""Cases of a user's for the kernel benchmark: sizes on the command line, and files in JSON or Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, nearest, quoted
from ..kernels.spec import Case, KernelSpec
from ..user_files import read_json
from ..user_python import SUFFIX, load_module

LARGEST = 10**9  # of a size
SMALLEST_PAGE = 16  # tokens of a page that is chosen; where no such one divides the keys, they are one page
MOST_CASES = 1000  # in a file


def parse_shape(spec: KernelSpec, text: str) -> Case:
    """Parse sizes in any order that replace those of the op's first case, such as "q=4680,kv=32760,heads=12,dim=128".

    Raises UsageError for a size that is unknown, given twice or out of range, and for sizes that do not fit each other.
    """
    like, given = first_case(spec), dict[str, int]()
    known = [*like.dims, *spec.shape_names]
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        if not value.isdecimal() or len(value) > 9 or int(value) < 1:
            raise UsageError(f"shape {quoted(text)}: {quoted(part)} is no size; expected name=number, such as dim=128")
        if name not in known:
            has = ", ".join(known)
            raise UsageError(f"shape: {spec.name} has no size {quoted(name)}{nearest(name, known)}; it has {has}")
        if name in given:
            raise UsageError(f"shape {quoted(text)}: {name} stands twice; give it once")
        given[name] = int(value)
    return Case(text, sizes_of(spec, given, like.dims), like.options)


def first_case(spec: KernelSpec) -> Case:
    """The case whose sizes and options serve where a user's case has none."""
    return (*spec.bench_cases, *spec.test_cases)[0]


def sizes_of(spec: KernelSpec, given: Mapping[str, int], defaults: Mapping[str, int]) -> dict[str, int]:
    """All sizes of a case from those given, among them `shape_names`. UsageError for sizes that do not fit."""
    dims = {name: given.get(name, size) for name, size in defaults.items()}
    if "heads" in given and "kv_heads" in dims and "kv_heads" not in given:
        dims["kv_heads"] = given["heads"]
    for name, (size, *unit) in spec.shape_names.items():
        if name not in given:
            continue
        total = given[name]
        if not unit:
            dims[size] = given.get(size, total)
        elif unit[0] in given:
            dims[size] = given.get(size, max(1, total // dims[unit[0]]))
        elif size in given:
            dims[unit[0]] = max(1, total // dims[size])
        else:
            dims[unit[0]] = fitting_page(total, defaults[unit[0]])
            dims[size] = total // dims[unit[0]]
        product = dims[size] * (dims[unit[0]] if unit else 1)
        if product != total:
            parts = " x ".join(f"{part}={dims[part]}" for part in (size, *unit))
            raise UsageError(f"shape: {name}={total} is not {parts}; give sizes whose product it is, or {name} alone")
    return dims


def fitting_page(total: int, default: int) -> int:
    """Tokens of a page that divide all keys: the most up to the default, or one page of all."""
    page = next(size for size in range(min(total, default), 0, -1) if total % size == 0)
    return page if page >= min(SMALLEST_PAGE, total) else total


def read_cases(spec: KernelSpec, path: Path) -> list[Case]:
    """Cases of a file: JSON with a list, or Python with a list CASES, of {"name", "dims", "options"} or of `Case`s.

    dims: as in `parse_shape`. options: of the op's own cases. Raises UsageError that names the file and the entry.
    """
    where = f"case file {quoted(path)}"
    if path.suffix == SUFFIX:
        entries = getattr(load_module(path, "case file"), "CASES", None)
    else:
        entries = read_json(path, "case file")
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not 0 < len(entries) <= MOST_CASES:
        what = "CASES is" if path.suffix == SUFFIX else "its content is"
        raise UsageError(f"{where}: {what} {quoted(entries, 60)}; expected a list of 1 to {MOST_CASES} cases")
    cases = [read_case(spec, entry, f"{where}, case {number}") for number, entry in enumerate(entries, 1)]
    names = [case.name for case in cases]
    if again := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{where}: name {quoted(again[0])} stands {names.count(again[0])} times; expected once")
    return cases


def read_case(spec: KernelSpec, entry: Any, where: str) -> Case:
    """One entry of a case file; UsageError that begins with `where`."""
    if isinstance(entry, Case):
        entry = {"name": entry.name, "dims": entry.dims, "options": entry.options}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise UsageError(f"{where} is {quoted(entry, 60)}; expected an object with name, dims and options")
    if unknown := [key for key in entry if key not in ("name", "dims", "options")]:
        raise UsageError(f"{where} has {quoted(unknown[0])}; expected name, dims and options")
    like = first_case(spec)
    known = [*like.dims, *spec.shape_names]
    dims, options = entry.get("dims", {}), entry.get("options", {})
    if not isinstance(dims, Mapping) or not isinstance(options, Mapping):
        raise UsageError(f"{where}: dims and options are {quoted(dims, 60)}, {quoted(options, 60)}; expected objects")
    for name, size in dims.items():
        if name not in known:
            hint, has = nearest(str(name), known), ", ".join(known)
            raise UsageError(f"{where}: {spec.name} has no size {quoted(name)}{hint}; it has {has}")
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < LARGEST:
            value = quoted(size, 60)
            raise UsageError(f"{where}: {name} is {value}; expected a whole number from 1 on, below {LARGEST}")
    taken = {key for case in (*spec.test_cases, *spec.bench_cases) for key in case.options}
    for name in options:
        if name not in taken:
            hint, has = nearest(str(name), taken), ", ".join(sorted(taken)) or "none"
            raise UsageError(f"{where}: {spec.name} has no option {quoted(name)}{hint}; it has {has}")
    return Case(entry["name"], sizes_of(spec, dims, like.dims), dict(options))
