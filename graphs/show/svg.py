"""A block graph as a picture 800 pixels wide: what each rewrite changed, then the launches of each pass.

A layer is drawn once, and a pass that launches as one before it is a line of text. Each launch is a row: its op, its
place in the model, operations, bytes, and the rewrite that made it. The bar is its share of the operations of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from ...kernels.spec import FAMILIES, Cost
from ..cost import PassCost
from ..rewrites import REWRITES
from ..types import BlockGraph, Role, Runs
from .outline import Launch, Section, attends, in_units, outline
from .text import WHEN, name

WIDTH, MARGIN, ROW, SIZE = 800, 20, 18, 12
OP, PLACE, FLOPS, BYTES, SHARE, REWRITE = 28, 172, 380, 455, 530, 672  # x of the columns of a launch
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


def svg(block: BlockGraph, costs: Sequence[PassCost] = ()) -> str:
    """The picture, as a document. costs: of `block.graphs`, where they are known."""
    canvas, costs = Canvas(), costs or [PassCost(graph) for graph in block.graphs]
    title(canvas, block, [one for one in costs if one.graph.runs == Runs.BLOCK])
    if block.changes:
        changes(canvas, block)
    legend(canvas)
    passes: list[tuple[str, list[Section]]] = []
    known: dict[tuple[Launch, ...], str] = {}  # launches of a layer: where they are drawn
    for one in costs:
        sections = outline(one)
        same = next((other for other, drawn in passes if drawn == sections), None)
        passes.append((one.graph.name, sections))
        draw_pass(canvas, one, sections, same, known)
    return canvas.document()


def title(canvas: Canvas, block: BlockGraph, each: list[PassCost]) -> None:
    """Model, preset and totals of a block."""
    shape, total = block.shape, sum((one.total for one in each), Cost())
    channels, height, width = shape.latent
    canvas.text(MARGIN, canvas.y + 16, f"One block of {block.model}, preset {block.preset}", 20, bold=True)
    lines = (
        f"{shape.frames} latent frames of {channels}×{height}×{width}, {shape.tokens_per_frame} tokens each, "
        f"{name(block.dtype)}",
        f"{len(each)} passes, {total.launches} launches, {in_units(total.flops, 'FLOP')}, "
        f"{in_units(total.nbytes, 'B')} read and written; counted from shapes, nothing is measured",
    )
    for index, line in enumerate(lines):
        canvas.text(MARGIN, canvas.y + 38 + 17 * index, line, 13, SOFT, room=WIDTH - 2 * MARGIN)
    canvas.y += 72


def legend(canvas: Canvas) -> None:
    """The colours, and the columns of a launch."""
    rule(canvas)
    x = float(MARGIN)
    for kind, colour in COLOURS.items():
        if x + 24 + width_of(kind, SIZE) > WIDTH - MARGIN:
            x, canvas.y = float(MARGIN), canvas.y + ROW
        canvas.box(x, canvas.y + 2, 12, 12, colour, round=2)
        canvas.text(x + 17, canvas.y + 12, kind, SIZE)
        x += 34 + width_of(kind, SIZE)
    canvas.y += ROW + 6


def rule(canvas: Canvas) -> None:
    canvas.box(MARGIN, canvas.y, WIDTH - 2 * MARGIN, 1, FAINT)
    canvas.y += 14


def draw_pass(
    canvas: Canvas, costs: PassCost, sections: list[Section], same: str | None, known: dict[tuple[Launch, ...], str]
) -> None:
    """A pass: its name and totals, and its layers unless they are drawn already."""
    graph, total = costs.graph, costs.total
    rule(canvas)
    canvas.text(MARGIN, canvas.y + 14, graph.name, 15, bold=True)
    facts = f"{total.launches} launches, {in_units(total.flops, 'FLOP')}, {in_units(total.nbytes, 'B')}"
    canvas.text(WIDTH - MARGIN, canvas.y + 14, facts, 13, anchor="end")
    canvas.y += 22
    for line in described(costs):
        canvas.text(MARGIN, canvas.y + 12, line, SIZE, SOFT, room=WIDTH - 2 * MARGIN)
        canvas.y += 16
    canvas.y += 6
    if same is not None:
        canvas.text(OP, canvas.y + 10, f"launches as {same}, on its own constants and literals", SIZE, SOFT)
        canvas.y += ROW
    elif graph.runs == Runs.LOAD:
        bands(canvas, sections)
    else:
        most = max((launch.cost.flops for section in sections for launch in section.launches), default=1)
        for section in sections:
            draw_section(canvas, section, graph.name, max(most, 1), known)
    canvas.y += 8


def described(costs: PassCost) -> list[str]:
    """The lines below a pass's name."""
    graph = costs.graph
    lines = ["; ".join((WHEN[graph.runs], *attends(graph)))]
    facts = []
    for role in (Role.WEIGHT, Role.CONSTANT):
        values = [value for value in graph.named(role).values() if value.data is None]
        if values:
            size = in_units(sum(value.nbytes for value in values), "B")
            facts.append(f"reads {len(values)} {role}{'s' * (len(values) > 1)}, {size}")
    if graph.outputs:
        size = in_units(sum(value.nbytes for value in graph.outputs), "B")
        names = ", ".join(value.name for value in graph.outputs)
        facts.append(f"gives {names if len(graph.outputs) < 4 else f'{len(graph.outputs)} values'}, {size}")
    if graph.writes:
        facts.append(f"writes its pages in {len(graph.writes)} layers")
    return [line for line in (*lines, "; ".join(facts)) if line]


def draw_section(
    canvas: Canvas, section: Section, graph: str, most: int, known: dict[tuple[Launch, ...], str]
) -> None:
    """A layer, or equal layers drawn once; a line of text where an earlier pass has the same launches."""
    cost, count = section.cost, len(section.layers)
    facts = f"{cost.launches} launches, {in_units(cost.flops, 'FLOP')}, {in_units(cost.nbytes, 'B')}"
    place = known.setdefault(section.launches, f"{section.layers[0]} of {graph}")
    seen = place != f"{section.layers[0]} of {graph}" and len(section.launches) > 1
    canvas.box(MARGIN, canvas.y, WIDTH - 2 * MARGIN, ROW + 2, "#f1f4f8", round=3)
    words = f"{section.name}{f', as {place}' if seen else ''}"
    canvas.text(OP, canvas.y + 14, words, SIZE, bold=True, room=420)
    canvas.text(WIDTH - MARGIN - 6, canvas.y + 14, facts, SIZE, SOFT, anchor="end")
    canvas.y += ROW + 6
    if not seen:
        if count > 1:
            canvas.text(OP, canvas.y + 10, "one of them:", SIZE, SOFT)
            canvas.y += ROW
        for launch in section.launches:
            draw_launch(canvas, launch, most)
        canvas.y += 6


def draw_launch(canvas: Canvas, launch: Launch, most: int) -> None:
    colour, y = COLOURS[launch.family], canvas.y
    canvas.box(MARGIN, y + 1, 4, ROW - 4, colour, colour, 1)
    canvas.text(OP, y + 12, launch.label, SIZE, bold=True, room=PLACE - OP - 8)
    canvas.text(PLACE, y + 12, launch.what, SIZE, SOFT, room=FLOPS - PLACE - 14)
    canvas.text(FLOPS + 62, y + 12, in_units(launch.cost.flops, "FLOP"), SIZE, anchor="end")
    canvas.text(BYTES + 62, y + 12, in_units(launch.cost.nbytes, "B"), SIZE, anchor="end")
    room = REWRITE - SHARE - 12
    canvas.box(SHARE, y + 4, room, 8, FAINT, round=2)
    canvas.box(SHARE, y + 4, max(1.0, room * launch.cost.flops / most), 8, colour, round=2)
    canvas.text(REWRITE, y + 12, launch.rewrite, SIZE, colour, room=WIDTH - MARGIN - REWRITE)
    canvas.y += ROW


def bands(canvas: Canvas, sections: list[Section]) -> None:
    """A graph of many small calls: one line for each layer or run of layers, equal ones counted."""
    counts = dict[str, int]()
    for section in sections:
        cost = section.cost
        kinds = ", ".join(dict.fromkeys(launch.label for launch in section.launches))
        line = f"{section.name}: {cost.launches} launches, {in_units(cost.nbytes, 'B')} ({kinds})"
        counts[line] = counts.get(line, 0) + 1
    for line, count in counts.items():
        canvas.text(OP, canvas.y + 12, f"{line}{f', {count} times' if count > 1 else ''}", SIZE, room=WIDTH - 2 * OP)
        canvas.y += ROW


def changes(canvas: Canvas, block: BlockGraph) -> None:
    """Launches of all passes after each rewrite, as bars that shrink."""
    first, last = block.changes[0].launches_before, block.changes[-1].launches_after
    canvas.text(MARGIN, canvas.y + 14, f"Launches of all passes after each rewrite: {first} to {last}", 15, bold=True)
    canvas.y += 26
    start, room = MARGIN + 420, WIDTH - 2 * MARGIN - 420 - 48
    rows = [("as traced", "", first)]
    rows += [(change.rewrite, REWRITES[change.rewrite].claim, change.launches_after) for change in block.changes]
    for rewrite, claim, after in rows:
        canvas.text(MARGIN, canvas.y + 12, rewrite, SIZE, bold=True)
        canvas.text(MARGIN + 122, canvas.y + 12, shortened(claim, 310), SIZE, SOFT)
        canvas.box(start, canvas.y + 2, room * after / max(first, 1), 12, COLOURS["matmul"], round=2)
        canvas.text(start + room * after / max(first, 1) + 6, canvas.y + 12, str(after), SIZE)
        canvas.y += 19
    canvas.y += 10


def shortened(words: str, room: float) -> str:
    """Cut a line at a word, with dots, where it is wider than `room`."""
    while width_of(words, SIZE) > room:
        words = words.removesuffix(" ...").rpartition(" ")[0] + " ..."
    return words
