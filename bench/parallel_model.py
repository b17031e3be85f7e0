"""Predicted times of one world over 1 to 64 GPUs: the model of `inferix plan --gpus`, as a table in Markdown.

`python -m inferix.bench.parallel_model` prints the table of docs/parallel.md. Nothing is measured; every constant is an
option, and those left out are the planner's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..errors import one_line_errors
from ..models.registry import MODELS, family_of, make_preset
from ..runtime.capacity import rank_planner
from ..runtime.capacity.gpus import CARDS
from ..runtime.capacity.links import LINKS, Link, read_link
from ..runtime.capacity.planner import Ceiling, Workload

ROWS = (
    ("wan-1.3b", "self-forcing"), ("wan-1.3b", "longlive"), ("wan-14b", "self-forcing"), ("wan-14b", "krea"),
    ("magi-24b", "magi-24b-distill"),
)  # fmt: skip
COUNTS = (1, 2, 4, 8, 16, 64)


def workload(model: str, preset: str) -> Workload:
    spec = MODELS[model]
    decoder = family_of(spec).chosen_decoder_spec(spec, tiny=False)
    return Workload(
        spec, make_preset(preset), decoder, 0, spec.default_size, "bfloat16", "bfloat16", executor="captured"
    )


def table(card: str, links: Sequence[Link], counts: Sequence[int] = COUNTS) -> Iterator[str]:
    """Rows of the table: milliseconds a pass of the fastest layout, and that layout."""
    known = CARDS[card]
    ceiling, memory = Ceiling(known.tflops, known.bandwidth, known.name), known.memory_gb * 10**9
    yield "| model, preset | link | " + " | ".join(f"{count} GPU{'s' * (count > 1)}" for count in counts) + " |"
    yield "|---" * (2 + len(counts)) + "|"
    for model, preset in ROWS:
        load = workload(model, preset)
        for link in links:
            cells = []
            for count in counts:
                listed = rank_planner.plans(load, count, memory, ceiling, link)
                options = [one for one in listed if one.replicas == 1]
                best = min((one for one in options if one.fits), key=lambda one: one.block, default=None)
                if best is None:
                    cells.append("does not fit" if options else "does not divide")
                    continue
                layout = "" if best.ranks == 1 else f" {best.layout}"
                cells.append(f"{best.per_pass:.1f}{layout}{', shard_weights' if best.shard_weights else ''}")
            yield f"| {model}, {preset} | {link.source} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--card", default="h200", choices=sorted(CARDS))
    parser.add_argument("--link", action="append", help=f"{', '.join(LINKS)}, or a JSON file; repeatable")
    parser.add_argument("--bandwidth", type=float, help="GB/s of every link, in place of its own")
    parser.add_argument("--latency", type=float, help="microseconds of a collective, in place of the link's own")
    chosen = parser.parse_args(arguments)
    links = [read_link(name) for name in chosen.link or LINKS]
    if chosen.bandwidth is not None:
        links = [replace(link, bandwidth=chosen.bandwidth) for link in links]
    if chosen.latency is not None:
        links = [replace(link, latency=chosen.latency) for link in links]
    print("\n".join(table(chosen.card, links)))


if __name__ == "__main__":
    with one_line_errors():
        main()
