"""A block graph as text: the effect of each rewrite, when each graph runs, and its launches by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...kernels.spec import Cost
from ..cost import PassCost
from ..types import BlockGraph, Role, Runs
from .outline import Section, attends, in_units, outline

WHEN = {
    Runs.LOAD: "once the weights are there",
    Runs.PROMPT: "once per prompt",
    Runs.FRAMES: "once per block, for its cameras",
    Runs.SWITCH: "after a new prompt",
    Runs.REBUILD: "when the context is rebuilt",
    Runs.FLUSH: "where nothing follows or the commit cannot wait",
    Runs.BLOCK: "every block",
}


def text(block: BlockGraph, only: str | None = None, costs: Sequence[PassCost] = ()) -> str:
    """The whole block, or one graph of it call by call; KeyError for a name that it does not have.

    costs: of `block.graphs`, where they are known.
    """
    if only is not None:
        return "\n".join(listing(PassCost(block.named(only))))
    return "\n".join(lines(block, costs or [PassCost(graph) for graph in block.graphs]))


def lines(block: BlockGraph, costs: Sequence[PassCost]) -> Iterator[str]:
    shape = block.shape
    channels, height, width = shape.latent
    yield (
        f"{block.model}, preset {block.preset}, {name(block.dtype)}: {shape.frames} latent frames of "
        f"{channels}x{height}x{width}, {shape.tokens_per_frame} tokens each"
    )
    each = [one for one in costs if one.graph.runs == Runs.BLOCK]
    total = sum((one.total for one in each), Cost())
    yield (
        f"a block: {counted(len(each), 'pass')}, {counted(total.launches, 'launch')}, {in_units(total.flops, 'FLOP')}, "
        f"{in_units(total.nbytes, 'B')} read and written"
    )
    for one in costs:
        if one.graph in block.passes and one.graph.runs != Runs.BLOCK:
            launches = counted(one.total.launches, "launch")
            yield f"beside it, {one.graph.name} ({WHEN[one.graph.runs]}): {launches}"
    yield ""
    yield from changes(block)
    shown: list[tuple[str, list[Section]]] = []
    for one in costs:
        yield ""
        yield from summary(one)
        sections = outline(one)
        same = next((other for other, known in shown if known == sections), None)
        if same is not None:
            yield f"  launches as {same}"
        else:
            shown.append((one.graph.name, sections))
            for section in sections:
                yield from section_lines(section, one.graph.runs != Runs.LOAD)


def counted(count: int, noun: str) -> str:
    """`1 launch`, `2 launches`."""
    return f"{count} {noun}{'' if count == 1 else 'es'}"


def name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def changes(block: BlockGraph) -> Iterator[str]:
    """Places, calls and launches of each rewrite."""
    if not block.changes:
        yield "as traced: no rewrite was done"
        return
    yield f"{'rewrite':<15}{'places':>8}{'calls':>16}{'launches':>16}"
    for change in block.changes:
        calls = f"{change.nodes_before} > {change.nodes_after}"
        launches = f"{change.launches_before} > {change.launches_after}"
        yield f"{change.rewrite:<15}{change.places:>8}{calls:>16}{launches:>16}"


def summary(costs: PassCost) -> Iterator[str]:
    """A graph's head line, its groups, the values it reads and those it gives."""
    graph, total = costs.graph, costs.total
    yield (
        f"{graph.name} ({WHEN[graph.runs]}): {counted(total.launches, 'launch')}, {in_units(total.flops, 'FLOP')}, "
        f"{in_units(total.nbytes, 'B')}"
    )
    for line in attends(graph):
        yield f"  {line}"
    given = {role: list(graph.named(role).values()) for role in (Role.WEIGHT, Role.CONSTANT, Role.STATE)}
    sizes = [
        f"{len(values)} {role}s of {in_units(sum(value.nbytes for value in values), 'B')}"
        for role, values in given.items()
        if values
    ]
    own = [value.name for value in graph.named(Role.INPUT).values()]
    inputs = [name for name in own if not name.startswith(("prompt.", "frames."))]
    yield f"  reads {'; '.join([*sizes, *([', '.join(inputs)] if inputs else [])])}"
    outputs = graph.outputs
    size = in_units(sum(value.nbytes for value in outputs), "B")
    shown = ", ".join(value.name for value in outputs) if len(outputs) < 6 else f"{len(outputs)} values"
    yield f"  gives {f'{shown}, {size}' if outputs else 'nothing'}" + (
        f"; writes pages of {len(graph.writes)} layers" if graph.writes else ""
    )


def section_lines(section: Section, every: bool) -> Iterator[str]:
    """A layer's cost, and each of its launches if asked for."""
    cost = section.cost
    total = f"{counted(cost.launches, 'launch')}, {in_units(cost.flops, 'FLOP')}, {in_units(cost.nbytes, 'B')}"
    yield f"  {section.name}: {total}"
    for launch in section.launches if every else ():
        size = "x".join(map(str, launch.shape))
        yield (
            f"    {launch.op:<30}{launch.what:<32}{size:<18}{in_units(launch.cost.flops, 'FLOP'):>13}"
            f"{in_units(launch.cost.nbytes, 'B'):>10}  {launch.rewrite}"
        ).rstrip()


def listing(costs: PassCost) -> Iterator[str]:
    """Every call of a graph, views too, with its arguments, its result, and the cost of what it becomes."""
    graph = costs.graph
    for key, value in graph.inputs.items():
        yield f"{key}: {value.role} {value.name} {name(value.dtype)}{list(value.shape)} new each {value.when}"
    for node in graph:
        made = node.meta["val"]
        shape = f"{name(made.dtype)}{list(made.shape)}" if made is not None else ""
        cost = costs[node]
        note = f"  # {in_units(cost.flops, 'FLOP')}, {in_units(cost.nbytes, 'B')}" if cost.launches else ""
        args = ", ".join([*map(str, node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
        yield f"{node.name} = {node.target._schema.name}({args}) {shape}{note}"  # type: ignore[union-attr]
    yield f"return {', '.join(map(str, graph.graph.output_node().args[0]))}"  # type: ignore[arg-type]
