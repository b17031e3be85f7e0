"""Finding the fastest form and config of an op on a card, and keeping them in the op's table for it.

Every candidate is held against the reference on every case that it would serve, and one that is wrong anywhere is
out. The fastest by the mean of its times, each as a share of the default's, is kept where it wins by a margin: a table
that says what the defaults say is noise. Run: inferix bench kernels --op block_attention --tune
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..kernels.spec import KernelSpec, architecture
from ..kernels.tuning import SCHEMA, candidates, described, sort_of, table_path
from ..runtime.files import write_atomically
from .kernels import Tell, Wanted, copied, mismatch, select, timed
from .machine import environment
from .rivals import Prepare, bound

MARGIN = 0.02  # of the default's time that another must win
Key = tuple[str, str]  # a form and its config
Clock = Callable[[Prepare, dict[str, Any], Wanted], list[float]]


def tune_here(wanted: Wanted, tell: Tell) -> dict[str, Path]:
    """Tune ops on the GPU and write their tables; returns op -> file. UsageError where there is no such GPU."""
    if torch.device(wanted.device).type != "cuda":
        raise UsageError("--tune times kernels on a GPU; on a CPU the plain references run, which have no configs")
    if wanted.cases or wanted.shape:
        raise UsageError("--tune goes by all the cases of an op; leave --case and --shape out")
    capability = architecture(torch.device(wanted.device))
    card = torch.cuda.get_device_name(wanted.device)
    if not capability:
        raise UsageError(f"--tune: {card} has no kernels; they are for compute capability 8.0 and newer")
    written = {}
    for spec in select(wanted):
        found = tune(spec, wanted, capability, tell)
        table = {"schema": SCHEMA, "op": spec.name, "card": card, "choices": found}
        written[spec.name] = keep(table | {"environment": environment(wanted.device)}, table_path(spec.name, card))
    return written


def keep(table: Mapping[str, Any], path: Path) -> Path:
    """Write a table, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(table, indent=1) + "\n"
    return write_atomically(path, lambda part: part.write_text(text, "utf-8"))


def tune(
    spec: KernelSpec, wanted: Wanted, capability: int, tell: Tell, clock: Clock = timed
) -> dict[str, dict[str, Any]]:
    """The choices that beat the op's default, by `sort_of`, each with its share of the default's time."""
    shares: dict[str, dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
    lost: dict[str, set[Key]] = defaultdict(set)
    for case in spec.bench_cases:
        inputs = spec.make_inputs(case, wanted.dtype, wanted.device, 0)
        like = inputs[spec.like]
        serving = [form for form in spec.implementations if form.serves(capability, like.dtype, like.shape[-1])]
        if not serving:
            continue
        expected, sort = copied(inputs), sort_of(like)
        spec.reference(**expected)
        default = statistics.median(clock(bound(serving[0].load()), inputs, wanted))
        for form in serving:
            for config in candidates(spec, form.name, capability):
                key = form.name, described(config)
                prepare = bound(form.load() if config is None else partial(form.load(), config=config))
                if key in lost[sort] or mismatch(spec, prepare, inputs, expected, wanted.dtype):
                    lost[sort].add(key)
                else:
                    shares[sort][key].append(statistics.median(clock(prepare, inputs, wanted)) / default)
        tell(f"{spec.name}, {case.name}: {len(shares[sort])} candidates; {len(lost[sort])} are wrong or do not fit")
    found = {}
    for sort, by_key in shares.items():
        means = {key: statistics.mean(times) for key, times in by_key.items() if key not in lost[sort]}
        best = min(means, key=means.__getitem__, default=None)
        if best and means[best] < 1 - MARGIN:
            found[sort] = {"form": best[0], "config": json.loads(best[1]), "share": round(means[best], 4)}
            tell(f"{spec.name}, {sort}: {best[0]} {best[1]} takes {means[best]:.0%} of the default's time")
    return found
