"""A block graph as a picture: passes as rows, launches as boxes by layer, and what each rewrite changed.

Every box has its op, its place in the model, its operations and bytes, and the rewrite that made it; its bar is the
share of operations in those of the costliest box of its row. Passes that launch the same are drawn
once, and then only as a strip.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from ...kernels.spec import FAMILIES, Cost
from ..cost import PassCost
from ..rewrites import REWRITES
from ..types import BlockGraph, Role, Runs
from .outline import Launch, Section, attends, in_units, outline
from .text import WHEN, name

WIDTH, MARGIN, LABELS = 1640, 32, 236
BOX, BOX_HEIGHT, GAP, LINE = 92, 84, 6, 12
FRAME, HEAD = 8, 20  # of a layer's frame: padding, and room for its name
COLOURS = dict(
    zip(
        FAMILIES,
        ("#2f6db5", "#1d8a9e", "#d07a1f", "#2f8f63", "#9a7b1c", "#8457a8", "#b44a54", "#7b838c", "#4f56a8"),
        strict=True,
    )
)
INK, SOFT, FAINT, PAPER = "#1c2430", "#5b6675", "#e4e8ee", "#ffffff"


@dataclass
class Canvas:
    """The parts drawn so far, and the y at which the next begins."""

    y: float = MARGIN
    parts: list[str] = field(default_factory=list)

    def text(
        self, x: float, y: float, words: str, size: float = 11, colour: str = INK, bold: bool = False, room: float = 0,
        anchor: str = "start",
    ) -> None:  # fmt: skip
        """One line, in smaller letters where there is less room than it would take."""
        weight = ' font-weight="600"' if bold else ""
        if 0 < room < width_of(words, size, bold):
            size = round(size * room / width_of(words, size, bold), 1)
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, line: str = "none", round: float = 0
    ) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{max(width, 0):g}" height="{height:g}" rx="{round:g}" fill="{fill}" '
            f'stroke="{line}"/>'
        )

    def document(self) -> str:
        height = self.y + MARGIN
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}" font-family="Inter, Segoe UI, Helvetica, Arial, sans-serif">\n'
            f'<rect width="{WIDTH}" height="{height:g}" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )


def width_of(words: str, size: float, bold: bool = False) -> float:
    """About how wide a line is."""
    return len(words) * size * (0.62 if bold else 0.57)


def tint(colour: str) -> str:
    """A light shade of a colour."""
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - part) * 0.13):02x}" for part in parts)


def svg(block: BlockGraph) -> str:
    """The picture, as a document."""
    canvas, costs = Canvas(), [PassCost(graph) for graph in block.graphs]
    title(canvas, block, [one for one in costs if one.graph.runs == Runs.BLOCK])
    drawn: list[tuple[str, list[Section]]] = []
    for one in costs:
        sections = outline(one)
        same = next((other for other, known in drawn if known == sections), None)
        drawn.append((one.graph.name, sections))
        row(canvas, one, sections, same)
    if block.changes:
        changes(canvas, block)
    return canvas.document()


def title(canvas: Canvas, block: BlockGraph, each: list[PassCost]) -> None:
    """Model, preset and totals of a block, and the legend of colours."""
    shape, total = block.shape, sum((one.total for one in each), Cost())
    channels, height, width = shape.latent
    canvas.text(MARGIN, canvas.y + 16, f"One block of {block.model}, preset {block.preset}", 22, bold=True)
    canvas.text(
        MARGIN, canvas.y + 38,
        f"{shape.frames} latent frames of {channels}×{height}×{width}, {shape.tokens_per_frame} tokens each, "
        f"{name(block.dtype)}.  {len(each)} passes, {total.launches} launches, {in_units(total.flops, 'FLOP')}, "
        f"{in_units(total.nbytes, 'B')} read and written.", 13, SOFT,
    )  # fmt: skip
    x = float(MARGIN)
    for kind, colour in COLOURS.items():
        canvas.box(x, canvas.y + 54, 12, 12, colour, round=2)
        canvas.text(x + 18, canvas.y + 64, kind, 12)
        x += 36 + width_of(kind, 12)
    words = "bar: operations, against the costliest box of the row; in colour: the rewrite that made the box"
    canvas.text(x + 6, canvas.y + 64, words, 12, SOFT)
    canvas.y += 84


def row(canvas: Canvas, costs: PassCost, sections: list[Section], same: str | None) -> None:
    """A pass: its description on the left, its layers on the right."""
    graph = costs.graph
    canvas.box(MARGIN, canvas.y, WIDTH - 2 * MARGIN, 1, FAINT)
    canvas.y += 14
    top, left = canvas.y, MARGIN
    canvas.text(left, top + 12, graph.name, 15, bold=True)
    lines = described(costs)[: None if same is None else len(graph.groups) + 2]
    for index, line in enumerate(lines):
        canvas.text(left, top + 30 + 14.5 * index, line, 11, SOFT, room=LABELS - 14)
    bottom = top + 30 + 14.5 * len(lines)
    if same is not None:
        end = strip(canvas, sections, top, f"launches as {same}, on its own constants and literals")
    elif graph.runs == Runs.LOAD:
        end = bands(canvas, sections, top)
    else:
        end = layers(canvas, sections, top)
    canvas.y = max(bottom, end) + 8


def described(costs: PassCost) -> list[str]:
    """The lines on a row's left."""
    graph, total = costs.graph, costs.total
    lines = [WHEN[graph.runs], *attends(graph)]
    lines.append(f"{total.launches} launches, {in_units(total.flops, 'FLOP')}, {in_units(total.nbytes, 'B')}")
    for role in (Role.WEIGHT, Role.CONSTANT):
        values = [value for value in graph.named(role).values() if value.data is None]
        if values:
            size = in_units(sum(value.nbytes for value in values), "B")
            lines.append(f"reads {len(values)} {role}{'s' * (len(values) > 1)}, {size}")
    if graph.outputs:
        size = in_units(sum(value.nbytes for value in graph.outputs), "B")
        names = ", ".join(value.name for value in graph.outputs)
        lines.append(f"gives {names if len(graph.outputs) < 4 else f'{len(graph.outputs)} values'}, {size}")
    if graph.writes:
        lines.append(f"writes its pages in {len(graph.writes)} layers")
    return lines


def layers(canvas: Canvas, sections: list[Section], top: float) -> float:
    """Layers as frames of boxes, from left to right, then in the next line; returns how far down they reach."""
    most = max((launch.cost.flops for section in sections for launch in section.launches), default=1)
    start, room = MARGIN + LABELS, WIDTH - 2 * MARGIN - LABELS
    across = int((room - 2 * FRAME + GAP) // (BOX + GAP))
    x, y, tallest = float(start), top, 0.0
    for section in sections:
        count = min(len(section.launches), across)
        width = max(count * (BOX + GAP) - GAP, width_of(section.name, 11, bold=True)) + 2 * FRAME
        deep = -(-len(section.launches) // across)
        height = HEAD + deep * (BOX_HEIGHT + GAP) - GAP + FRAME
        if x > start and x + width > start + room:
            x, y, tallest = float(start), y + tallest + LINE, 0.0
        canvas.box(x, y, width, height, "#f7f9fb", FAINT, 6)
        canvas.text(x + FRAME, y + 14, section.name, 11, bold=True, room=width - 2 * FRAME)
        if len(section.launches) > 3:
            cost = section.cost
            total = f"{cost.launches} launches, {in_units(cost.flops, 'FLOP')}, {in_units(cost.nbytes, 'B')}"
            canvas.text(x + width - FRAME, y + 14, total, 11, SOFT, anchor="end")
        for index, launch in enumerate(section.launches):
            across_at, down_at = index % across, index // across
            draw_launch(
                canvas, launch, x + FRAME + across_at * (BOX + GAP), y + HEAD + down_at * (BOX_HEIGHT + GAP), most
            )
        x, tallest = x + width + GAP, max(tallest, height)
    return y + tallest


def draw_launch(canvas: Canvas, launch: Launch, x: float, y: float, most: int) -> None:
    colour = COLOURS[launch.family]
    canvas.box(x, y, BOX, BOX_HEIGHT, tint(colour), colour, 4)
    room = BOX - 10
    canvas.text(x + 5, y + 14, launch.label, 11, bold=True, room=room)
    for index, part in enumerate(launch.what.split(", ")[:2]):
        canvas.text(x + 5, y + 26 + 11 * index, part, 9, SOFT, room=room)
    canvas.text(x + 5, y + 51, in_units(launch.cost.flops, "FLOP"), 9.5, room=room)
    canvas.text(x + 5, y + 62, in_units(launch.cost.nbytes, "B"), 9.5, room=room)
    canvas.text(x + 5, y + 73, launch.rewrite, 8.5, colour, bold=True, room=room)
    canvas.box(x + 5, y + BOX_HEIGHT - 6, room, 3, FAINT, round=1.5)
    canvas.box(x + 5, y + BOX_HEIGHT - 6, max(1.0, room * launch.cost.flops / most), 3, colour, round=1.5)


def strip(canvas: Canvas, sections: list[Section], top: float, words: str) -> float:
    """All launches as thin marks, by the operations in them."""
    start, room = MARGIN + LABELS, WIDTH - 2 * MARGIN - LABELS
    canvas.text(start, top + 12, words, 11, SOFT)
    marks = [launch for section in sections for _ in section.layers for launch in section.launches]
    each = room / len(marks)
    for index, launch in enumerate(marks):
        canvas.box(start + index * each, top + 20, each, 16, COLOURS[launch.family])
    return top + 40


def bands(canvas: Canvas, sections: list[Section], top: float) -> float:
    """A graph of many small calls: one line for each layer or run of layers, equal ones counted."""
    start, y, counts = MARGIN + LABELS, top, dict[str, int]()
    for section in sections:
        cost = section.cost
        kinds = ", ".join(dict.fromkeys(launch.label for launch in section.launches))
        line = f"{section.name}: {cost.launches} launches, {in_units(cost.nbytes, 'B')} ({kinds})"
        counts[line] = counts.get(line, 0) + 1
    for line, count in counts.items():
        canvas.text(start, y + 12, f"{line}{f', {count} times' if count > 1 else ''}", 11, room=0)
        y += 16
    return y


def changes(canvas: Canvas, block: BlockGraph) -> None:
    """Launches of all passes after each rewrite, as bars that shrink."""
    canvas.box(MARGIN, canvas.y, WIDTH - 2 * MARGIN, 1, FAINT)
    canvas.y += 14
    canvas.text(MARGIN, canvas.y + 14, "What each rewrite changed: launches of all passes", 15, bold=True)
    canvas.y += 30
    start, room = MARGIN + 640, WIDTH - 2 * MARGIN - 640 - 150
    most = max(block.changes[0].launches_before, 1)
    rows = [("as traced", "", 0, most, most)]
    rows += [
        (change.rewrite, REWRITES[change.rewrite].claim, change.places, change.launches_before, change.launches_after)
        for change in block.changes
    ]
    for rewrite, claim, places, before, after in rows:
        canvas.text(MARGIN, canvas.y + 12, rewrite, 12, bold=True)
        canvas.text(MARGIN + 110, canvas.y + 12, claim, 12, SOFT)
        canvas.text(start - 20, canvas.y + 12, f"{places} places" if places else "", 12, SOFT, anchor="end")
        canvas.box(start, canvas.y + 2, room * before / most, 12, FAINT, round=2)
        canvas.box(start, canvas.y + 2, room * after / most, 12, COLOURS["matmul"], round=2)
        canvas.text(start + room * max(before, after) / most + 8, canvas.y + 12, str(after), 12)
        canvas.y += 20
