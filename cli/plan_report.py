"""Facts and tables of `inferix plan`: memory that streams need, and lower bounds of their time.

Everything is computed from sizes (`runtime/capacity/planner.py`). Every time is a lower bound ("floor"), not a
measurement, and should not be quoted as one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import UsageError, nearest, quoted
from ..models.registry import default_preset, family_of, find_spec, make_preset
from ..runtime.byte_sizes import format_bytes, parse_bytes
from ..runtime.capacity import planner, rank_planner
from ..runtime.capacity.gpus import CARDS, Card
from ..runtime.capacity.links import read_link
from ..runtime.capacity.measured_layouts import read_measured
from ..runtime.capacity.planner import Ceiling, Workload
from ..runtime.config import DTYPES, check_choice
from ..runtime.executor_specs import default_executor, executor_spec
from ..runtime.kv.page_store import KV_DTYPES
from ..schemes.layouts import MOST_RANKS
from ..schemes.page_needs import least_pages, window
from .options import DEFAULT_MODEL, counted, parse_size

HALF = ("bfloat16", "float16")  # dtypes of makers' figures
TABLE_ROWS = (
    ("wan-1.3b", "self-forcing"), ("wan-1.3b", "longlive"), ("wan-1.3b", "rolling-forcing"),
    ("wan-5b", "longlive2"), ("wan-14b", "self-forcing"), ("wan-14b", "longlive"), ("wan-14b", "krea"),
)  # fmt: skip
JOINT_ROWS = (  # of presets with several blocks in flight
    ("magi-4.5b", "magi-4.5b"), ("magi-4.5b", "magi-4.5b-distill"), ("magi-4.5b-fp8", "magi-4.5b-distill"),
    ("magi-24b", "magi-24b"), ("magi-24b", "magi-24b-distill"), ("magi-24b-fp8", "magi-24b-distill"),
)  # fmt: skip
JOINT_CARD = "h200"
TABLE_MEMORIES = (16, 24, 80, 141)
TABLE_CARDS = ("rtx-4090", "rtx-5090", "h200", "b200")


def workload(
    model: str | None,
    preset: str | None,
    size: str | None,
    sessions: int,
    dtype: str,
    kv_dtype: str | None,
    executor: str | None,
    vae: str | None,
    text_encoder: bool,
    settings: dict[str, Any],
    names: Path | None = None,
) -> Workload:
    """Make the workload of the options. Raises UsageError that names the nearest choice for an unknown one."""
    scheme = make_preset(preset or default_preset(model or DEFAULT_MODEL), **settings)
    spec = find_spec(model or (scheme.about.base if preset else DEFAULT_MODEL), names)
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--kv-dtype", kv_dtype or dtype, dict.fromkeys((dtype, *KV_DTYPES)))
    if vae not in (None, "taehv"):
        raise UsageError(
            f"--vae is {quoted(vae)}{nearest(str(vae), ['taehv'])}; leave it out for the model's own, or use taehv"
        )
    if vae and scheme.context.encodes_pictures:
        raise UsageError(f"{scheme.name} encodes pictures, which the tiny decoder cannot; leave --vae out")
    family = family_of(spec)
    family.check_preset(scheme, spec.name, spec)
    decoder = family.chosen_decoder_spec(spec, tiny=bool(vae))
    pictures = parse_size(size) if size else spec.default_size
    text = family.text_parameters(spec) if text_encoder else 0
    runs = executor or default_executor("cuda")
    executor_spec(runs, "--executor")
    return Workload(
        spec, scheme, decoder, text, pictures, dtype, kv_dtype or dtype, sessions, executor=runs, on_gpu=True
    )


def known_card(name: str) -> Card:
    if name.lower() not in CARDS:
        known = ", ".join(CARDS)
        raise UsageError(f"--gpu is {quoted(name)}{nearest(name.lower(), CARDS)}; there are {known}; or --memory")
    return CARDS[name.lower()]


def parse_memory(text: str) -> int:
    if text.strip().replace(".", "", 1).isdecimal():
        raise UsageError(f"--memory is {quoted(text)}, which has no unit; expected such as {text.strip()}GB")
    return parse_bytes(text)


def ceiling(card: Card | None, tflops: float | None, bandwidth: float | None, dtype: str) -> Ceiling | None:
    """Return the ceiling for floors: the given figures, else the GPU's; None if there are none for the dtype."""
    for name, value in (("--tflops", tflops), ("--bandwidth", bandwidth)):
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{name} is {value:g}; expected a number above 0")
    if tflops is not None and bandwidth is not None:
        return Ceiling(tflops, bandwidth, "given")
    if card is None:
        if tflops is not None or bandwidth is not None:
            raise UsageError("--tflops and --bandwidth make a ceiling together; give both, or a --gpu for the other")
        return None
    if tflops is None and dtype not in HALF:
        return None
    partly = "" if tflops is None and bandwidth is None else ", one given"
    return Ceiling(tflops or card.tflops, bandwidth or card.bandwidth, f"{card.name}, maker's figures{partly}")


def describe(load: Workload, budget: int | None, top: Ceiling | None) -> dict[str, Any]:
    """Return the whole plan as plain values, in bytes and seconds."""
    split = planner.memory(load)
    total = split.needed(load.sessions)
    fits = None if budget is None else total <= budget
    limit = top or Ceiling(float("inf"), float("inf"), "none")
    blocks = {"first": planner.first_speed(load, limit), "steady": planner.steady_speed(load, limit)}
    facts: dict[str, Any] = {
        "model": load.spec.name,
        "preset": load.preset.name,
        "size": load.size,
        "dtype": load.dtype,
        "kv_dtype": load.kv_dtype,
        "executor": load.executor,
        "vae": "own" if load.decoder.encodes else "taehv",
        "text_encoder": load.text > 0,
        "sessions": load.sessions,
        "window": window(load.preset),
        "pages": least_pages(load.preset),
        "memory": {
            "once": split.once,
            "each_session": split.each,
            "needed": total,
            "given": budget,
        },
        "fits": fits,
        "work": {
            name: {
                "frames": one.frames,
                "transformer_flops": round(one.transformer_flops),
                "decoder_flops": round(one.decoder_flops),
                "transformer_bytes": round(one.transformer_bytes),
                "decoder_bytes": round(one.decoder_bytes),
            }
            for name, one in blocks.items()
        },
        "predicted": None,
        "changes": [],
    }
    if load.sessions > 1 and executor_spec(load.executor).batches:
        facts["batches"] = describe_batches(load, budget, top)
    if budget is not None:
        facts["sessions_that_fit"] = planner.most_sessions(load, budget)
        facts["longest_window"] = planner.longest_window(load, budget)
    if fits is False and budget is not None:
        facts["changes"] = [
            {"options": change.options, "needed": change.needed, "fits": change.fits}
            for change in planner.suggestions(load, budget)
        ]
    if top is not None:
        facts["predicted"] = {
            "kind": "floor: every operation at the ceiling; a prediction, not a measurement",
            "assumed_efficiency": 1.0,
            "ceiling": asdict(top),
            "blocks": {
                name: {
                    "transformer_seconds": one.transformer_seconds,
                    "decoder_seconds": one.decoder_seconds,
                    "seconds": one.seconds,
                    "fps": one.fps,
                }
                for name, one in blocks.items()
            },
            "new_prompt_seconds": planner.prompt_seconds(load, top),
            "sessions_in_real_time": int(blocks["steady"].fps // load.spec.fps),
        }
    return facts


def describe_batches(load: Workload, budget: int | None, top: Ceiling | None) -> list[dict[str, Any]]:
    """Return the memory of all sessions and the floor of their blocks where so many run as one, as plain values."""
    rows = []
    for size in planner.batch_sizes(replace(load, batch=load.sessions)):
        batch = replace(load, batch=size)
        total = planner.needed(batch)
        row: dict[str, Any] = {"batch": size, "needed": total, "fits": None if budget is None else total <= budget}
        if top is not None:
            steady = planner.steady_speed(batch, top)
            row |= {"seconds": size * steady.seconds, "fps": steady.fps}
        rows.append(row)
    return rows


def describe_ranks(
    load: Workload, gpus: int, budget: int, top: Ceiling | None, link: str, goal: str, measured: Path | None,
    card: str | None,
) -> dict[str, Any]:
    """Return the layouts of several GPUs with predicted times, the choice and its reason, as plain values."""
    if not 1 <= gpus <= MOST_RANKS:
        raise UsageError(f"--gpus is {gpus}; expected 1 to {MOST_RANKS}")
    check_choice("--goal", goal, rank_planner.GOALS)
    if top is None:
        raise UsageError(f"--dtype is {quoted(load.dtype)}, for which --gpu has no figure; give --tflops too")
    between = read_link(link)
    times = None if measured is None else read_measured(str(measured))
    if times is not None:
        times.check(load, card=None if card is None else known_card(card).name)
    options = list(rank_planner.plans(load, gpus, budget, top, between, times))
    best, reason = rank_planner.choose(options, goal)
    return {
        "kind": "model: stated constants, not measured" + ("" if times is None else f"; blocks of {times.file} are"),
        "assumed_efficiency": rank_planner.EFFICIENCY,
        "link": asdict(between),
        "goal": goal,
        "layouts": [asdict(one) | {"per_pass": one.per_pass, "block": one.block, "fps": one.fps} for one in options],
        "chosen": options.index(best),
        "reason": reason,
    }


def batches_table(facts: dict[str, Any]) -> Table:
    """Make the table of batches: memory of all sessions, and floors where there is a ceiling."""
    predicted = facts["predicted"] is not None
    columns = ("sessions in a batch", "GB", "fits", *(("seconds for a block each", "FPS of all at most") * predicted))
    title = f"{facts['sessions']} sessions in batches" + (", floors predicted as above" if predicted else "")
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns:
        column.justify = "right"
    for row in facts["batches"]:
        fits = {True: "yes", False: "no", None: ""}[row["fits"]]
        floors = (f"{row['seconds']:.3g}", f"{row['fps']:.1f}") if predicted else ()
        table.add_row(str(row["batch"]), f"{row['needed'] / 1e9:.2f}", fits, *floors)
    return table


def ranks_table(facts: dict[str, Any]) -> Table:
    """Make the table of layouts; times in milliseconds."""
    link, share = facts["link"], facts["assumed_efficiency"]
    title = (
        f"Predicted by a model, not measured: {share:.1%} of the ceiling, {link['bandwidth']:g} GB/s and "
        f"{link['latency']:g} us a collective ({link['source']})"
    )
    columns = ("layout", "worlds", "GB a GPU", "fits", "ms a pass", "compute", "send", "wait", "decode", "block", "FPS")
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for number, one in enumerate(facts["layouts"]):
        name = "one GPU" if one["ranks"] == 1 else f"{one['layout']} on {one['ranks']}"
        name += ", shard_weights" if one["shard_weights"] else ""
        mark = "*" if number == facts["chosen"] else ""
        times = [f"{one[part]:.1f}" for part in ("per_pass", "computing", "sending", "waiting", "decoding", "block")]
        times[-1] += "" if one["measured"] is None else " measured"
        memory, fits = f"{one['memory'] / 1e9:.1f}", "yes" if one["fits"] else "no"
        table.add_row(name + mark, str(one["replicas"]), memory, fits, *times, f"{one['fps']:.1f}")
    return table


PARTS = {
    "transformer": "transformer weights",
    "vae": "VAE weights",
    "text_encoder": "text encoder weights",
    "pass_scratch": "scratch of passes, at most",
    "constants": "constants of graphs",
    "static_inputs": "inputs of graphs",
    "camera_inputs": "cameras of a block, in graphs",
    "making": "more, while graphs are made",
    "decode_scratch": "scratch of decoding, at most",
    "page_buffer": "buffer for pages of another dtype",
    "batch": "more for batches, at most",
    "pages": "KV pages",
    "moving_sink": "averages of a moving sink",
    "cross_keys": "cross-attention keys",
    "decoder_state": "decoder state",
    "latents": "latents in flight and stored",
    "camera": "camera and image of a block",
}


def print_plan(load: Workload, facts: dict[str, Any]) -> None:
    """Print the plan as tables and its conclusions as sentences."""
    console = Console(width=None if sys.stdout.isatty() else 110)
    echo = partial(console.print, highlight=False, soft_wrap=True)
    vae = "TAEHV" if facts["vae"] == "taehv" else "its own VAE"
    echo(
        f"{load.spec.name} with preset {load.preset.name} and {vae}: {load.size[0]}x{load.size[1]}, {load.dtype}, "
        f"pages in {load.kv_dtype}, executor {load.executor}, window of {facts['window']} latent frames"
    )
    console.print(memory_table(load, facts["memory"]))
    if facts["predicted"] is not None:
        console.print(floor_table(facts))
    if "batches" in facts:
        console.print(batches_table(facts))
    for line in verdict(load, facts):
        echo(line)
    if "ranks" in facts:
        console.print(ranks_table(facts["ranks"]))
        echo(facts["ranks"]["reason"])


def memory_table(load: Workload, memory: dict[str, Any]) -> Table:
    unit, scale = ("GB", 1e9) if memory["needed"] >= 1e9 else ("MB", 1e6)
    table = Table("part", unit, title="Memory", title_justify="left")
    table.columns[1].justify = "right"
    for name, count in memory["once"].items():
        if count:
            table.add_row(PARTS[name], f"{count / scale:.2f}")
    table.add_section()
    times = f" x {load.sessions} sessions" if load.sessions > 1 else ""
    for name, count in memory["each_session"].items():
        if count:
            table.add_row(PARTS[name] + times, f"{count * load.sessions / scale:.2f}")
    table.add_section()
    table.add_row("needed", f"{memory['needed'] / scale:.2f}")
    if memory["given"] is not None:
        table.add_row("given", f"{memory['given'] / scale:.2f}")
    return table


def floor_table(facts: dict[str, Any]) -> Table:
    """Make the table of predicted floors, of the first block and of a steady one."""
    top = facts["predicted"]["ceiling"]
    title = f"Predicted floor, 100 % of {top['tflops']:g} TFLOP/s and {top['bandwidth']:g} GB/s ({top['source']})"
    columns = ("block", "part", "TFLOP", "GB moved at least", "seconds", "FPS at most")
    table = Table(*columns, title=title, title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for name, predicted in facts["predicted"]["blocks"].items():
        work = facts["work"][name]
        for part in ("transformer", "decoder"):
            flops, moved, seconds = work[f"{part}_flops"], work[f"{part}_bytes"], predicted[f"{part}_seconds"]
            table.add_row(name, part, f"{flops / 1e12:.4g}", f"{moved / 1e9:.4g}", f"{seconds:.3g}", "")
        total = f"{predicted['seconds']:.3g}", f"{predicted['fps']:.1f}"
        table.add_row(name, f"{work['frames']:g} frames", "", "", *total)
        table.add_section()
    return table


def verdict(load: Workload, facts: dict[str, Any]) -> Iterator[str]:
    """Yield the conclusions of a plan, one line each."""
    predicted, given = facts["predicted"], facts["memory"]["given"]
    if predicted is None:
        total = sum(facts["work"]["steady"][f"{part}_flops"] for part in ("transformer", "decoder"))
        yield f"A steady block is {total / 1e12:.4g} TFLOP; for its floor in seconds give --tflops and --bandwidth" + (
            f" ({load.dtype} is not what makers' figures are for)." if load.dtype not in HALF else ", or a --gpu."
        )
    else:
        yield (
            "Floors are predictions with every operation at the ceiling and no waiting. They are not measurements; "
            "real runs are slower."
        )
        count = predicted["sessions_in_real_time"]
        yield (
            f"At this floor, {counted(count, 'session')} would run in real time ({load.spec.fps} FPS)." if count
            else f"Even at this floor, no session would run in real time ({load.spec.fps} FPS)."
        )
    if given is None:
        yield "Give --memory or --gpu to see what fits."
    elif facts["fits"]:
        count = facts["sessions_that_fit"]
        yield (
            f"It fits: there is memory for {counted(count, 'session')}, or for {load.sessions} with a window of "
            f"{facts['longest_window']} latent frames (a model is trained for one window)."
        )
    else:
        yield f"It does not fit: {format_bytes(facts['memory']['needed'] - given)} too much. Options:"
        for change in facts["changes"]:
            end = "fits" if change["fits"] else f"still {format_bytes(change['needed'] - given)} too much"
            yield f"  {' '.join(change['options'])}: {format_bytes(change['needed'])}, {end}"
        if not any(change["fits"] for change in facts["changes"]):
            least = min((change["needed"] for change in facts["changes"]), default=facts["memory"]["needed"])
            yield f"  No option is enough: {format_bytes(least)} need {larger_cards(least)}."


def larger_cards(needed: int) -> str:
    """Name the smallest known GPUs with at least `needed` bytes."""
    ascending = sorted(CARDS.values(), key=lambda card: card.memory_gb)
    names = [card.name for card in ascending if card.memory_gb * 10**9 >= needed][:4]
    return f"a GPU such as {', '.join(names)}" if names else "more than any known GPU has"


def tables() -> list[str]:
    """Return the tables of docs/plan.md: memory needs, floors of a steady block, and both of blocks made together."""
    return ["\n".join(markdown(rows)) for rows in (memory_rows(), floor_rows(), joint_rows())]


def markdown(rows: list[list[str]]) -> Iterator[str]:
    for index, row in enumerate(rows):
        yield f"| {' | '.join(row)} |"
        if index == 0:
            yield "|" + "---|" * len(row)


def table_workloads() -> Iterator[tuple[str, Workload]]:
    """Yield each row as published, then with the smallest pages and decoder that its preset allows."""
    for model, preset in TABLE_ROWS:
        plain = workload(model, preset, None, 1, "bfloat16", None, None, None, False, {})
        tiny = None if plain.preset.context.reencode_head else "taehv"
        small = workload(model, preset, None, 1, "bfloat16", "fp8", None, tiny, False, {})
        yield "as published", plain
        yield "fp8 pages" + (", TAEHV" if tiny else ""), small


def memory_rows() -> list[list[str]]:
    rows = [["model", "preset", "", "needs", *(f"{memory} GB" for memory in TABLE_MEMORIES)]]
    for form, load in table_workloads():
        cells = []
        for memory in TABLE_MEMORIES:
            count, longest = (
                limit(load, memory * 10**9) for limit in (planner.most_sessions, planner.longest_window)
            )
            cells.append(f"{count}; {longest}" if count else "no")
        needs = f"{planner.needed(load) / 1e9:.1f} GB"
        rows.append([load.spec.name, f"`{load.preset.name}`", form, needs, *cells])
    return rows


def floor_rows() -> list[list[str]]:
    rows = [["model", "preset", "", "TFLOP", *(f"{name}: seconds, FPS" for name in TABLE_CARDS)]]
    for form, load in table_workloads():
        cells = []
        for name in TABLE_CARDS:
            steady = planner.steady_speed(load, Ceiling(CARDS[name].tflops, CARDS[name].bandwidth, name))
            cells.append(f"{steady.seconds:.3f}, {steady.fps:.1f}")
        total = f"{(steady.transformer_flops + steady.decoder_flops) / 1e12:.0f}"
        rows.append([load.spec.name, f"`{load.preset.name}`", form, total, *cells])
    return rows


def joint_rows() -> list[list[str]]:
    """Rows of presets with several blocks in flight, for one stream with the text encoder loaded."""
    card = CARDS[JOINT_CARD]
    top = Ceiling(card.tflops, card.bandwidth, card.name)
    floors = (f"{card.name}: seconds, FPS", "seconds of the first")
    rows = [["model", "preset", "steps", "passes", "PFLOP", "TB moved", "weights", "pages", "needs", *floors]]
    for model, preset in JOINT_ROWS:
        load = workload(model, preset, None, 1, "bfloat16", None, None, None, True, {})
        split, (block, *_) = planner.memory(load), planner.steady_blocks(load.preset)
        steady, first = planner.steady_speed(load, top), planner.first_speed(load, top)
        flops, moved = steady.transformer_flops + steady.decoder_flops, steady.transformer_bytes + steady.decoder_bytes
        sizes = (split.once["transformer"], split.each["pages"], planner.needed(load))
        rows.append([
            model, f"`{preset}`", str(load.preset.sampler.steps), str(len(planner.runs_of(block, load.preset))),
            f"{flops / 1e15:.1f}", f"{moved / 1e12:.2f}", *(f"{size / 1e9:.1f} GB" for size in sizes),
            f"{steady.seconds:.1f}, {steady.fps:.2f}", f"{first.seconds:.1f}",
        ])  # fmt: skip
    return rows
