"""Where the parts of a drawn cell go.

States stand in the even columns and labels in the odd ones. Every arrow runs level on a track of its own, from the
first column after its source to the last before its target. So no two labels can overlap, and no arrow can run
through a label or a state that is not its own; arrows cross only in the gaps between columns.
"""
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from conas.genotype import Edge

Point = tuple[float, float]

# All lengths are inches.
MARGIN, RADIUS, RIM = 0.08, 0.18, 0.13  # around the picture; of a state; of the part of its rim that arrows use
STATE, LABEL, WIRE = (0.28, 0.44), (0.17, 1.1), (0.065, 0.0)  # half height and width that each needs in a column


class Layout(NamedTuple):
    """Where everything in a cell goes, from the lower left corner."""

    states: list[Point]       # centres: two inputs, the nodes, the output
    wires: list[list[Point]]  # corners, to be rounded: of the edges, then of the concatenated states
    labels: list[Point]       # centres, one for each edge
    size: Point


def layout(edges: Sequence[Edge], concat: Sequence[int], targets: Sequence[int] | None = None) -> Layout:
    """Place a cell. Its items are the states and, numbered after them, the tracks of the arrows.

    `targets` are the states that the edges lead to, ascending from 2; by default two edges lead to each.
    """
    targets = [2 + i // 2 for i in range(len(edges))] if targets is None else targets
    column = [0, 0]
    for _, into in itertools.groupby(zip(edges, targets), key=lambda pair: pair[1]):
        column.append(2 + max(column[source] for (_, source), _ in into))
    output = len(column)
    column.append(1 + max(column))
    ends = [(source, target) for (_, source), target in zip(edges, targets)] + [(state, output) for state in concat]
    tracks = [range(column[source] + 1, column[target]) for source, target in ends]
    label_at: dict[int, int] = {}  # a long arrow has its label where there are fewest, else close to its target
    for i in sorted(range(len(edges)), key=lambda i: len(tracks[i])):
        label_at[i] = min(tracks[i][::-2], key=list(label_at.values()).count)

    spans = [range(at, at + 1) for at in column] + tracks
    columns = [{item: STATE if item <= output else LABEL if label_at.get(item - output - 1) == at else WIRE
                for item, span in enumerate(spans) if at in span} for at in range(1 + column[output])]
    chains = [[source, output + 1 + i, target] if track else [source, target]  # the items along each arrow
              for i, ((source, target), track) in enumerate(zip(ends, tracks))]
    links = [link for chain in chains for link in itertools.pairwise(chain)]
    y = arrange(spans, [{item: half for item, (half, _) in inside.items()} for inside in columns], links)

    widths = [max(width for _, width in inside.values()) for inside in columns]
    x = [MARGIN + widths[0] / 2]
    for at in range(1, len(columns)):
        climb = max((abs(y[a] - y[b]) for a, b in links if at in (spans[a].stop, spans[b].start)), default=0)
        x.append(x[-1] + (widths[at - 1] + widths[at]) / 2 + 0.22 + 0.24 * climb)

    def rim(state: int, side: int) -> dict[int, Point]:
        """Where arrows leave (side 1) or reach (side -1) a state: as level with their tracks as the rim allows."""
        goal = {i: y[chain[::side][1]] - y[state] for i, chain in enumerate(chains) if chain[::side][0] == state}
        fan = sorted(goal, key=goal.__getitem__)
        heights = spread([goal[i] for i in fan], [min(0.045, RIM / len(fan)) for _ in fan], -RIM, RIM)
        reach = [math.sqrt(RADIUS ** 2 - dy ** 2) if 2 <= state < output else RADIUS for dy in heights]
        return {i: (x[column[state]] + side * dx, y[state] + dy) for i, dx, dy in zip(fan, reach, heights)}

    wires = []
    for i, ((source, target), track) in enumerate(zip(ends, tracks)):
        corners = [(track[0], -1), (track[-1], 1)] if track else []
        level = [(x[at] + side * widths[at] / 2, y[output + 1 + i]) for at, side in corners]
        wires.append([rim(source, 1)[i], *level, rim(target, -1)[i]])
    top = max(y[item] + half for inside in columns for item, (half, _) in inside.items())
    return Layout([(x[at], y[state]) for state, at in enumerate(column)], wires,
                  [(x[label_at[i]], y[output + 1 + i]) for i in range(len(edges))],
                  (x[-1] + widths[-1] / 2 + MARGIN, top + MARGIN))


def arrange(spans: Sequence[range], columns: Sequence[dict[int, float]],
            links: Sequence[tuple[int, int]]) -> list[float]:
    """Heights of items that span columns: few crossings of the links, short climbs, no overlap.

    `columns` has {item: half height} for each column. From many random starts, items are pulled to the mean of their
    neighbours and pushed apart column by column; the best end is refined.
    """
    generator = random.Random(0)
    near = [[a + b - item for a, b in links if item in (a, b)] for item in range(len(spans))]
    gaps = [[(a, b) for a, b in links if spans[a].stop == at] + [(i, i) for i, span in enumerate(spans)
            if span.start < at < span.stop] for at in range(1, len(columns))]
    pairs = [(*one, *two) for gap in gaps for one, two in itertools.combinations(gap, 2)]

    def push(y: list[float]) -> None:
        for column in columns:
            order = sorted(column, key=y.__getitem__)
            for item, height in zip(order, spread([y[i] for i in order], [column[i] for i in order])):
                y[item] = height

    def relax(y: list[float], rounds: int) -> list[float]:
        for _ in range(rounds):
            for item, others in enumerate(near):
                y[item] = (y[item] + sum(y[i] for i in others) / len(others)) / 2 if others else y[item]
            push(y)
        return y

    def cost(y: list[float]) -> float:
        crossings = sum((y[a] - y[c]) * (y[b] - y[d]) < 0 for a, b, c, d in pairs)
        return crossings + 0.3 * sum((y[a] - y[b]) ** 2 for a, b in links)

    best = min((relax([generator.uniform(-1, 1) for _ in spans], 4) for _ in range(500)), key=cost)
    y = min(best, relax(best.copy(), 40), key=cost)
    for _ in range(100):  # alternating projections converge to no overlap in any column
        push(y)
    sign = 1 if y[0] > y[1] else -1  # a mirrored layout is as good: let c_{k-2} be above c_{k-1}
    low = min(sign * y[item] - half for column in columns for item, half in column.items())
    return [MARGIN + sign * height - low for height in y]


def spread(wanted: Sequence[float], halves: Sequence[float], low=-math.inf, high=math.inf) -> list[float]:
    """The positions nearest to `wanted` (least squares) in its order, `halves` clear of each other, in the bounds."""
    offsets = list(itertools.accumulate((a + b for a, b in itertools.pairwise(halves)), initial=0))
    blocks: list[tuple[float, int]] = []  # isotonic regression, pool adjacent violators: sums and sizes of the pools
    for position, offset in zip(wanted, offsets):
        total, size = position - offset, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / size:
            total, size = total + blocks[-1][0], size + blocks[-1][1]
            blocks.pop()
        blocks.append((total, size))
    levels = [total / size for total, size in blocks for _ in range(size)]
    return [min(max(level, low), high - offsets[-1]) + offset for level, offset in zip(levels, offsets)]
