"""Autotuning: find the fastest implementation and config of an op on a GPU, and write them to the op's table.

Every candidate is checked against the reference on every case that it would serve; one wrong case excludes it. The
winner has the least mean time relative to the default, and enters the table only if it wins by a margin, so that the
table has no noise. Run: inferix bench kernels --op block_attention --tune
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

from ..errors import UsageError, quoted
from ..kernels.spec import KernelSpec, architecture
from ..kernels.tuning import SCHEMA, candidates, described, sort_of, table_path
from ..runtime.files import write_atomically
from .kernels import Log, Options, clone_inputs, mismatch, select, timed
from .machine import environment
from .rivals import Prepare, bound

MARGIN = 0.02  # of the default's time, by which another must win
Key = tuple[str, str]  # an implementation and its config
Clock = Callable[[Prepare, dict[str, Any], Options], list[float]]


def tune_here(options: Options, log: Log) -> dict[str, Path]:
    """Tune ops on the GPU and write their tables; return op -> file. Raises UsageError for a device without kernels."""
    if torch.device(options.device).type != "cuda":
        raise UsageError(f"device is {quoted(options.device)}; expected a GPU: a CPU has no kernels to tune")
    if options.cases or options.shape or options.case_file or options.forms:
        raise UsageError("tuning uses all cases and forms of an op; leave cases, shape, case_file and forms out")
    capability = architecture(torch.device(options.device))
    card = torch.cuda.get_device_name(options.device)
    if not capability:
        raise UsageError(f"{card} has no kernels to tune; expected compute capability 8.0 or newer")
    written = {}
    for spec in select(options):
        choices = tune(spec, options, capability, log)
        table = {"schema": SCHEMA, "op": spec.name, "card": card, "choices": choices}
        table["environment"] = environment(options.device)
        written[spec.name] = write_table(table, table_path(spec.name, card))
    return written


def write_table(table: Mapping[str, Any], path: Path) -> Path:
    """Write a table atomically."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(table, indent=1) + "\n"
    return write_atomically(path, lambda part: part.write_text(text, "utf-8"))


def tune(
    spec: KernelSpec, options: Options, capability: int, log: Log, clock: Clock = timed
) -> dict[str, dict[str, Any]]:
    """Choices that beat the op's default, by `sort_of`, each with its share of the default's time."""
    shares: dict[str, dict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
    refused: dict[str, set[Key]] = defaultdict(set)
    for case in spec.bench_cases:
        inputs = spec.make_inputs(case, options.dtype, options.device, 0)
        like, serving = inputs[spec.like], spec.serving(capability, inputs)
        if not serving:
            continue
        expected, sort = clone_inputs(inputs), sort_of(like)
        spec.reference(**expected)
        default = statistics.median(clock(bound(serving[0].load()), inputs, options))
        for form in serving:
            for config in candidates(spec, form.name, capability):
                key = form.name, described(config)
                prepare = bound(form.load() if config is None else partial(form.load(), config=config))
                if key in refused[sort] or mismatch(spec, prepare, inputs, expected, options.dtype):
                    refused[sort].add(key)
                else:
                    shares[sort][key].append(statistics.median(clock(prepare, inputs, options)) / default)
        log(f"{spec.name}, {case.name}: {len(shares[sort])} candidates; {len(refused[sort])} are refused")
    choices = {}
    for sort, by_key in shares.items():
        means = {key: statistics.mean(times) for key, times in by_key.items() if key not in refused[sort]}
        best = min(means, key=means.__getitem__, default=None)
        if best and means[best] < 1 - MARGIN:
            choices[sort] = {"form": best[0], "config": json.loads(best[1]), "share": round(means[best], 4)}
            log(f"{spec.name}, {sort}: {best[0]} {best[1]} takes {means[best]:.0%} of the default's time")
    return choices
