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

import numpy as np
from numpy.typing import ArrayLike

from conas.darts.genotype import Edge

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
    a, b, c, d = np.array(pairs, dtype=int).reshape(-1, 4).T
    left, right = np.array(links, dtype=int).reshape(-1, 2).T
    inside = [(np.array(list(column)), np.array(list(column.values()))) for column in columns]

    # `y` has a row for each start, and columns for the items
    def push(y: np.ndarray) -> None:
        for items, halves in inside:
            order = y[:, items].argsort(axis=1, kind="stable")
            y[np.arange(len(y))[:, None], items[order]] = spread(np.sort(y[:, items], axis=1), halves[order])

    def relax(y: np.ndarray, rounds: int) -> np.ndarray:
        for _ in range(rounds):
            for item, others in enumerate(near):
                if others:
                    y[:, item] = (y[:, item] + y[:, others].mean(axis=1)) / 2
            push(y)
        return y

    def least(y: np.ndarray) -> np.ndarray:
        crossings = ((y[:, a] - y[:, c]) * (y[:, b] - y[:, d]) < 0).sum(axis=1)
        at = (crossings + 0.3 * ((y[:, left] - y[:, right]) ** 2).sum(axis=1)).argmin()
        return y[at:at + 1]

    starts = np.array([[generator.uniform(-1, 1) for _ in spans] for _ in range(500)])
    best = least(relax(starts, 4))
    y = least(np.concatenate([best, relax(best.copy(), 40)])).copy()
    for _ in range(100):  # alternating projections converge to no overlap in any column
        before = y.copy()
        push(y)
        if np.abs(y - before).max() < 1e-12:
            break
    heights = y[0] if y[0, 0] > y[0, 1] else -y[0]  # mirrored it is as good: let c_{k-2} be above c_{k-1}
    low = min((heights[items] - halves).min() for items, halves in inside)
    return (MARGIN + heights - low).tolist()


def spread(wanted: ArrayLike, halves: ArrayLike, low: float = -math.inf, high: float = math.inf) -> np.ndarray:
    """The positions (..., n) nearest to `wanted` (least squares) in its order, `halves` clear of each other, in the
    bounds.

    Isotonic regression by the formula of Barlow et al. (1972): a level is the greatest, over all beginnings, of the
    least mean of what begins there and ends here or later.
    """
    wanted, halves = np.asarray(wanted, dtype=float), np.asarray(halves, dtype=float)
    offsets = np.zeros(wanted.shape)
    offsets[..., 1:] = np.cumsum(halves[..., :-1] + halves[..., 1:], axis=-1)
    sums = np.zeros((*wanted.shape[:-1], wanted.shape[-1] + 1))
    sums[..., 1:] = np.cumsum(wanted - offsets, axis=-1)
    first = np.arange(wanted.shape[-1])
    size = first + 1 - first[:, None]  # from a row's first to a column's last
    means = np.where(size > 0, sums[..., None, 1:] - sums[..., :-1, None], np.inf) / np.where(size > 0, size, 1)
    least = np.minimum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]
    levels = np.where(size > 0, least, -np.inf).max(axis=-2)
    return np.minimum(np.maximum(levels, low), high - offsets[..., -1:]) + offsets
