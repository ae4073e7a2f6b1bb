"""Pictures inside a web page: small SVG with real text, whose colours are CSS classes and follow the page's theme."""
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from html import escape
from itertools import pairwise

from conas.darts.genotype import Edge
from conas.draw.cell import describe
from conas.draw.layout import RADIUS, Point, layout, spread

INCH = 100  # units of a cell's picture
FAMILIES = "sep", "dil", "max_pool", "avg_pool", "skip"


def svg(width: float, height: float, title: str, body: str, kind: str) -> str:
    """An <svg> that is as wide as its place and no wider than its nature, and that a screen reader reads as `title`."""
    return (f'<svg class="{kind}" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
            f'aria-label="{escape(title)}">{body}</svg>')


def family(operation: str) -> str:
    """The CSS class of an operation's colour."""
    return "op-" + next((name for name in FAMILIES if operation.startswith(name)), "other").split("_")[-1]


@cache
def cell(edges: tuple[Edge, ...], concat: tuple[int, ...]) -> str:
    """A cell, placed as `conas.draw` places it."""
    places = layout(edges, concat)
    width, height = (INCH * side for side in places.size)

    def at(point: Point) -> tuple[float, float]:
        return INCH * point[0], height - INCH * point[1]

    def arrow(wire: Sequence[Point], kind: str) -> str:
        *points, (x, y) = map(at, wire)
        path = [f"M{points[0][0]:.0f} {points[0][1]:.0f}"]
        points = [*points, (x - 6, y)]
        for (x0, y0), (x1, y1) in pairwise(points):
            middle = (x0 + x1) / 2
            path.append(f"C{middle:.0f} {y0:.0f} {middle:.0f} {y1:.0f} {x1:.0f} {y1:.0f}")
        return (f'<g class="{kind}"><path d="{"".join(path)}"/><path class="head" d="M{x:.0f} {y:.0f}l-8-4v8z"/></g>')

    parts = [arrow(wire, "output") for wire in places.wires[len(edges):]]
    parts += [arrow(wire, family(operation)) for (operation, _), wire in zip(edges, places.wires)]
    for (operation, _), point in zip(edges, places.labels):
        x, y = at(point)
        name = re.sub(r"(?<=\d)x(?=\d)", "×", operation).replace("_", " ")
        half = 2.9 * len(name) + 8
        parts.append(f'<g class="label {family(operation)}"><rect x="{x - half:.0f}" y="{y - 10:.0f}" '
                     f'width="{2 * half:.0f}" height="20" rx="10"/><text x="{x:.0f}" y="{y + 4:.0f}">{escape(name)}'
                     '</text></g>')
    nodes = map(str, range(len(places.states) - 3))
    names = ["c<tspan>k−2</tspan>", "c<tspan>k−1</tspan>", *nodes, "c<tspan>k</tspan>"]
    for state, (name, point) in enumerate(zip(names, places.states)):
        (x, y), r = at(point), INCH * RADIUS
        end = state in (0, 1, len(names) - 1)
        parts.append(f'<g class="state"><rect x="{x - r:.0f}" y="{y - r:.0f}" width="{2 * r:.0f}" height="{2 * r:.0f}" '
                     f'rx="{6 if end else r:.0f}"/><text x="{x:.0f}" y="{y + 4:.0f}">{name}</text></g>')
    return svg(width, height, describe(edges, concat), "".join(parts), "cell")


def curves(lines: Mapping[str, Sequence[float]], xs: Sequence[float], x_title: str, title: str,
           muted: Collection[str] = ()) -> str:
    """Lines of numbers over `xs`, each with its name at its end; the first is drawn strongest, `muted` ones grey.

    A line may end earlier than `xs`; one that is empty is left out.
    """
    lines = {name: line for name, line in lines.items() if line}
    width, height, left, right, top, bottom = 860, 330, 46, 200, 14, 42
    values = [value for line in lines.values() for value in line]
    low, high = min(values), max(values)
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if (high - low) / s <= 6), 20)
    low, high = step * (low // step), step * -(-(high + 1e-9) // step)
    first, span = xs[0], (xs[-1] - xs[0]) or 1

    def place(x: float, y: float) -> Point:
        return (left + (width - left - right) * ((x - first) / span if len(xs) > 1 else 0.5),
                height - bottom - (height - top - bottom) * (y - low) / (high - low))

    parts = []
    for k in range(round((high - low) / step) + 1):
        _, y = place(first, low + k * step)
        parts.append(f'<line class="rule" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{low + k * step:g}</text>')
    for x in xs[::-(-len(xs) // 12)]:
        parts.append(f'<text class="tick" x="{place(x, low)[0]:.1f}" y="{height - bottom + 18}" '
                     f'text-anchor="middle">{x:g}</text>')
    parts.append(f'<text class="tick" x="{(left + width - right) / 2:.0f}" y="{height - 4}" text-anchor="middle">'
                 f'{escape(x_title)}</text>')
    ends = sorted(lines, key=lambda name: place(first, lines[name][-1])[1])
    heights = dict(zip(ends, spread([place(first, lines[name][-1])[1] + 4 for name in ends], [8.5] * len(ends),
                                    top + 4, height - bottom + 4)))
    for index, (name, line) in reversed(list(enumerate(lines.items()))):
        points = [place(x, y) for x, y in zip(xs, line)]
        marked = points if len(xs) <= 25 and name not in muted else ()
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3 if index else 4}"/>' for x, y in marked)
        kind = "muted" if name in muted else f"m{index % 7}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<g class="line {kind}"><polyline points="{path}"/>{dots}'
                     f'<text x="{points[-1][0] + 12:.0f}" y="{heights[name]:.1f}">{escape(short(name))} '
                     f'{line[-1]:.2f}</text></g>')
    return svg(width, height, title, "".join(parts), "chart")


def reliability(bins: Sequence[tuple[int, float, float]], title: str) -> str:
    """Accuracy over confidence: for each of equally wide bins its (count, confidence, accuracy)."""
    side, left, top = 190, 30, 8
    width = side / len(bins)
    total = sum(count for count, _, _ in bins)
    parts = []
    for tick in (0, 0.5, 1):
        y = top + side * (1 - tick)
        parts.append(f'<line class="rule" x1="{left}" x2="{left + side}" y1="{y:.0f}" y2="{y:.0f}"/>'
                     f'<text class="tick" x="{left - 5}" y="{y + 4:.0f}" text-anchor="end">{100 * tick:.0f}</text>'
                     f'<text class="tick" x="{left + side * tick:.0f}" y="{top + side + 16}" text-anchor="middle">'
                     f'{100 * tick:.0f}</text>')
    for b, (count, confidence, accuracy) in enumerate(bins):
        if count:
            x, high, low = left + b * width, max(accuracy, confidence), min(accuracy, confidence)
            opacity = 0.35 + 0.65 * (count / total) ** 0.5
            gap = "over" if confidence > accuracy else "under"
            across = f'x="{x + 0.5:.1f}" width="{width - 1:.1f}"'
            parts.append(f'<g><title>{count} images: {100 * accuracy:.1f} % right, {100 * confidence:.1f} % sure'
                         f'</title><rect class="bar" style="opacity:{opacity:.2f}" {across} '
                         f'y="{top + side * (1 - accuracy):.1f}" height="{side * accuracy:.1f}"/><rect class="{gap}" '
                         f'{across} y="{top + side * (1 - high):.1f}" height="{side * (high - low):.1f}"/></g>')
    parts.append(f'<line class="ideal" x1="{left}" y1="{top + side}" x2="{left + side}" y2="{top}"/>')
    return svg(left + side + 14, top + side + 24, title, "".join(parts), "chart")


def short(name: str, longest: int = 22) -> str:
    """A name that fits beside a line."""
    return name if len(name) <= longest else f"{name[:longest - 1]}…"
