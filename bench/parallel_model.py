"""Predicted times of one world over 1 to 64 GPUs: the model of `inferix plan --gpus`, as a table in Markdown.

`python -m inferix.bench.parallel_model --picture docs/parallel.png` prints the table of docs/parallel.md and draws it;
`--overlap` prints what collectives beside the compute of their layer would gain. Nothing is measured; every constant is
an option, and those left out are the planner's.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import one_line_errors
from ..models.registry import MODELS, family_of, make_preset
from ..runtime.capacity import planner, rank_planner
from ..runtime.capacity.costs import ITEMSIZE
from ..runtime.capacity.gpus import CARDS
from ..runtime.capacity.links import LINKS, Link, read_link
from ..runtime.capacity.planner import Ceiling, Workload
from ..runtime.capacity.rank_planner import RankPlan
from ..runtime.files import check_output, write_atomically

ROWS = (
    ("wan-1.3b", "self-forcing"), ("wan-1.3b", "longlive"), ("wan-14b", "self-forcing"), ("wan-14b", "krea"),
    ("magi-24b", "magi-24b-distill"),
)  # fmt: skip
COUNTS = (1, 2, 4, 8, 16, 64)
DRAWN = (1, 2, 3, 4, 5, 6, 8, 10, 12, 13, 15, 16, 20, 24, 26, 30, 32, 39, 40, 48, 52, 60, 64)  # of the picture


def workload(model: str, preset: str) -> Workload:
    spec = MODELS[model]
    decoder = family_of(spec).chosen_decoder_spec(spec, tiny=False)
    return Workload(
        spec, make_preset(preset), decoder, 0, spec.default_size, "bfloat16", "bfloat16", executor="captured"
    )


def fastest(load: Workload, count: int, memory: int, ceiling: Ceiling, link: Link) -> RankPlan | str:
    """The fastest layout of one world of all GPUs that fits, or why there is none."""
    if count > 1 and not rank_planner.divided_of(load).layouts(count):
        return "does not divide"
    listed = rank_planner.plans(load, count, memory, ceiling, link)
    options = [one for one in listed if one.replicas == 1]
    best = min((one for one in options if one.fits), key=lambda one: one.block, default=None)
    return best or ("does not fit" if options else "does not divide")


def picture(card: str, links: Sequence[Link], path: Path) -> None:
    """Draw milliseconds a pass over GPUs, a panel for each model and preset, a line for each link."""
    from matplotlib.figure import Figure

    known = CARDS[card]
    ceiling, memory = Ceiling(known.tflops, known.bandwidth, known.name), known.memory_gb * 10**9
    figure = Figure(figsize=(7.2, 8.4), layout="constrained")
    for axis, (model, preset) in zip(figure.subplots(3, 2, sharex=True).flat, ROWS, strict=False):
        load = workload(model, preset)
        for number, link in enumerate(links):
            plans = [(count, fastest(load, count, memory, ceiling, link)) for count in DRAWN]
            points = [(count, plan.per_pass) for count, plan in plans if isinstance(plan, RankPlan)]
            if not points:  # it fits nowhere
                continue
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=link.source)
            if number == 0:
                first, time = points[0]
                axis.plot([first, 64], [time, time * first / 64], color="#6b7280", linestyle=":", label="1/N")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
        axis.set_title(f"{model}, {preset}", fontsize=9)
        axis.grid(color="#d9dde3", linewidth=0.6)
    legend = figure.axes[-1]
    legend.axis("off")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend.legend(handles, labels, loc="center", frameon=False, fontsize=9)
    figure.supxlabel(f"GPUs of one world ({card}; numbers that divide the model)", fontsize=9)
    figure.supylabel("ms a pass, predicted by a model, not measured", fontsize=9)
    write_atomically(path, lambda part: figure.savefig(part, dpi=130, format="png", metadata={"Software": None}))


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
                best = fastest(load, count, memory, ceiling, link)
                if isinstance(best, str):
                    cells.append(best)
                    continue
                layout = "" if best.ranks == 1 else f" {best.layout}"
                cells.append(f"{best.per_pass:.1f}{layout}{', shard_weights' if best.shard_weights else ''}")
            yield f"| {model}, {preset} | {link.source} | {' | '.join(cells)} |"


def gained(load: Workload, best: RankPlan, ceiling: Ceiling, link: Link) -> float:
    """Milliseconds of a block that values save if they travel while queries and keys are made (ulysses); below 0: lose.

    They travel in a collective of their own, so each layer has one more, whose latency is hidden, too, where queries
    and keys take as long.
    """
    spec, item, saved = load.spec, ITEMSIZE[load.dtype], 0.0
    grid = rank_planner.divided_of(load).grid_of(best.layout, best.ranks)
    if grid is None or grid.heads == 1:
        return 0.0
    blocks = planner.steady_blocks(load.preset)
    for run in (run for block in blocks for run in rank_planner.runs_at(load, block, grid, 0)):
        tokens = len(run.frames) * load.tokens / grid.tiles
        sent = (grid.heads - 1) / grid.heads * tokens * spec.kv_heads * spec.head_dim * item
        made = 2 * tokens * spec.dim * (spec.num_heads + spec.kv_heads) * spec.head_dim
        making = made / (ceiling.tflops * rank_planner.EFFICIENCY * 1e12)
        saved += spec.num_layers * min(sent / (link.bandwidth * 1e9), making - link.latency / 1e6)
    return saved / len(blocks) * 1e3


def overlap_table(card: str, links: Sequence[Link], counts: Sequence[int] = (2, 4, 8)) -> Iterator[str]:
    """Rows of the table of overlap: shares of a pass, of bytes and of latency, and what sending values early gains."""
    known = CARDS[card]
    ceiling, memory = Ceiling(known.tflops, known.bandwidth, known.name), known.memory_gb * 10**9
    yield "| model, preset | link | " + " | ".join(f"{count} GPUs" for count in counts) + " |"
    yield "|---" * (2 + len(counts)) + "|"
    for model, preset in ROWS:
        load = workload(model, preset)
        for link in links:
            cells = []
            for count in counts:
                best = fastest(load, count, memory, ceiling, link)
                if isinstance(best, str):
                    cells.append(best)
                    continue
                passes = best.predicted - best.decoding
                parts = (best.sending, best.waiting, gained(load, best, ceiling, link))
                cells.append("{:.1f} + {:.1f} %, {:+.1f} %".format(*(100 * part / passes for part in parts)))
            yield f"| {model}, {preset} | {link.source} | {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--card", default="h200", choices=sorted(CARDS))
    parser.add_argument("--link", action="append", help=f"{', '.join(LINKS)}, or a JSON file; repeatable")
    parser.add_argument("--bandwidth", type=float, help="GB/s of every link, in place of its own")
    parser.add_argument("--latency", type=float, help="microseconds of a collective, in place of the link's own")
    parser.add_argument("--picture", type=Path, help="PNG file to draw to")
    parser.add_argument("--overlap", action="store_true", help="print what overlap within a layer would gain instead")
    chosen = parser.parse_args(arguments)
    links = [read_link(name) for name in chosen.link or LINKS]
    if chosen.bandwidth is not None:
        links = [replace(link, bandwidth=chosen.bandwidth) for link in links]
    if chosen.latency is not None:
        links = [replace(link, latency=chosen.latency) for link in links]
    print("\n".join((overlap_table if chosen.overlap else table)(chosen.card, links)))
    if chosen.picture is not None:
        picture(chosen.card, links, check_output(chosen.picture))


if __name__ == "__main__":
    with one_line_errors():
        main()
