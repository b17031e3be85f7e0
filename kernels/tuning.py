"""Which form of an op runs, and the tables of what is fastest on one card: form and config by dtype and last dim.

`kernels/<op>/tuned/<card>.json` is written by `inferix bench kernels --tune`, on request only, and read when an op
first runs on such a card. Where there is none, the op's first form and the configs above its kernel serve. A table
that does not fit the code any more is refused aloud: it would be a config that nobody checked.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, quoted
from .spec import CHOSEN, KernelSpec, architecture

SCHEMA = 1


def choose(spec: KernelSpec, like: torch.Tensor) -> Callable[..., None]:
    """Return the form for such a tensor: the one of `using`, else the card's tuned one, else the first declared.

    A call that breaks a rule of the form goes to the form that it names for such calls.
    """
    if wanted := (CHOSEN.get() or {}).get(spec.name):
        return with_rules(spec, wanted, spec.named(wanted, like.device))
    if like.device.type == "cuda" and (best := tuned(spec, like)):
        return best
    name = spec.chosen(like.device, like.dtype, like.shape[-1])
    return with_rules(spec, name, spec.named(name))


def with_rules(spec: KernelSpec, name: str, run: Callable[..., None]) -> Callable[..., None]:
    """The function of a form, or one that leaves the calls which break its rules to another form."""
    form = next((form for form in spec.implementations if form.name == name), None)
    if form is None or not form.rules:
        return run
    other = spec.form(form.otherwise)

    def take(*args: Any) -> None:
        broken = spec.broken(form, dict(zip(spec.names, args, strict=True)))
        (other.load() if broken else run)(*args)

    return take


def tuned(spec: KernelSpec, like: torch.Tensor) -> Callable[..., None] | None:
    """Return the entry of the card's table for such a tensor; None where there is no table or no entry."""
    card, capability = torch.cuda.get_device_name(like.device), architecture(like.device)
    return choices(spec, card, capability).get(sort_of(like))


def sort_of(like: torch.Tensor) -> str:
    """Key of a table: dtype and last dim of the tensor by which a form is chosen."""
    return f"{str(like.dtype)[6:]} {like.shape[-1]}"


def table_path(op: str, card: str) -> Path:
    """Where an op's table for a card lies, the card as the driver names it."""
    return Path(__file__).parent / op / "tuned" / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")


@cache
def choices(spec: KernelSpec, card: str, capability: int) -> Mapping[str, Callable[..., None]]:
    """Forms by `sort_of` from the card's table, empty without one; UsageError for a table that cannot be used."""
    path = table_path(spec.name, card)
    if not path.exists():
        return {}
    try:
        return read(spec, json.loads(path.read_text("utf-8")), capability)
    except ValueError as error:
        again = f"inferix bench kernels --op {spec.name} --tune"
        raise UsageError(f"{quoted(path)}: {error}; write it again with {again}, or delete it") from None


def read(spec: KernelSpec, table: Any, capability: int) -> dict[str, Callable[..., None]]:
    """The forms and configs of a table; ValueError saying what is wrong with it."""
    if not isinstance(table, dict) or table.get("schema") != SCHEMA or table.get("op") != spec.name:
        raise ValueError(f"expected a table with schema {SCHEMA} and op {spec.name!r}")
    if not isinstance(table.get("choices"), dict):
        raise ValueError("it has no choices")
    found = {}
    for sort, choice in table["choices"].items():
        if not isinstance(choice, dict) or not isinstance(choice.get("form"), str):
            raise ValueError(f"{sort!r} has no form")
        form = spec.form(choice["form"])
        known = {described(config): config for config in candidates(spec, form.name, capability)}
        held = json.dumps(choice.get("config"), sort_keys=True)
        if held not in known:
            raise ValueError(f"{sort!r} has config {held}, which is none that {form.name} has for sm_{capability}")
        config = known[held]
        run = form.load() if config is None else partial(form.load(), config=config)
        found[sort] = with_rules(spec, form.name, run)
    return found


def candidates(spec: KernelSpec, form: str, capability: int) -> tuple[Any, ...]:
    """Configs of a form that are worth trying on an architecture; a library's form has one, None."""
    chosen = spec.form(form)
    if chosen.architectures and capability not in chosen.architectures:
        return ()
    module = chosen.module()
    return tuple(module.candidates(capability)) if hasattr(module, "candidates") else (None,)


def described(config: Any) -> str:
    """A config as a table holds it."""
    return json.dumps(None if config is None else dataclasses.asdict(config), sort_keys=True)
