"""Draw genotypes and the committee as SVG or PNG, with matplotlib alone.

    python -m conas.draw cnn_space1/search-EXP/genotype.json --out cells
    python -m conas.draw cnn_space1/CONAS DARTS_V2 --out cells
    python -m conas.draw --committee A=a.json B=b.json C=c.json --layers 20 --out img/committee.svg

Equal genotypes give byte-identical files. Matplotlib is imported only when something is drawn.
"""
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conas.cli import Parser as Parser
from conas.cli import run
from conas.darts.genotype import Edge, Genotype
from conas.darts.published import GENOTYPES
from conas.draw.layout import RADIUS, Layout, Point, layout
from conas.errors import InputError
from conas.exchange.cells import find_cell
from conas.files import atomic_path

INK, GREY, FILL, END_FILL = "#1f2933", "#9aa5b1", "#f5f7fa", "#e4e9ef"
FAMILIES = {  # prefix of the operation: name and colour; at least 4.5:1 on white, apart in all kinds of colour vision
    "sep": ("separable convolution", "#2456b8"),
    "dil": ("dilated convolution", "#b45709"),
    "max_pool": ("pooling", "#12855a"),
    "avg_pool": ("pooling", "#12855a"),
    "skip": ("skip connection", "#3a3f46"),
    "": ("other", "#93408f"),
}


def family(operation: str) -> tuple[str, str]:
    """The name and colour of an operation's family."""
    return next(FAMILIES[prefix] for prefix in FAMILIES if operation.startswith(prefix))


class Picture:
    """A matplotlib Figure whose coordinates are inches from the lower left corner."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure
        self.figure = Figure(figsize=(width, height), facecolor="white")
        self.inches = {"transform": self.figure.dpi_scale_trans}

    def text(self, x: float, y: float, text: str, size: float = 9.5, **style) -> None:
        style = {"ha": "center", "va": "center_baseline", "color": INK, "math_fontfamily": "stix", **style}
        self.figure.text(x, y, text, fontsize=size, **self.inches, **style)

    def box(self, x: float, y: float, width: float, height: float, text: str = "", fill: str = FILL) -> None:
        from matplotlib.patches import FancyBboxPatch
        self.figure.add_artist(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=fill,
                                              edgecolor=INK, boxstyle="round,pad=0,rounding_size=0.06", **self.inches))
        self.text(x, y, text, va="center")

    def circle(self, x: float, y: float, radius: float, text: str = "", fill: str = FILL) -> None:
        from matplotlib.patches import Circle
        self.figure.add_artist(Circle((x, y), radius, facecolor=fill, edgecolor=INK, **self.inches))
        self.text(x, y, text)

    def line(self, points: Sequence[Point], colour: str, width: float, gid: str | None = None) -> None:
        """Level at every point, with S-curves where the height changes."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Curve
        vertices = [points[0]]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            vertices += [((x0 + x1) / 2, y0), ((x0 + x1) / 2, y1), (x1, y1)]
        codes = [Curve.MOVETO] + [Curve.CURVE4] * (len(vertices) - 1)
        self.figure.add_artist(PathPatch(Curve(vertices, codes), facecolor="none", edgecolor=colour, linewidth=width,
                                         gid=gid, **self.inches))

    def arrow(self, points: Sequence[Point], colour: str = GREY, width: float = 1.0, gid: str | None = None) -> None:
        from matplotlib.patches import Polygon
        (x, y), head = points[-1], 0.07 * width
        self.line([*points[:-1], (x - head, y), (x - head / 2, y)], colour, width, gid)
        self.figure.add_artist(Polygon([(x, y), (x - head, y + 0.4 * head), (x - head, y - 0.4 * head)],
                                       facecolor=colour, **self.inches))

    def save(self, path: str | Path, title: str, description: str) -> Path:
        """Write as the suffix says, atomically, without dates or versions."""
        return save_figure(self.figure, path, 200, {"Title": title, "Description": description})


def save_figure(figure, path: str | Path, dpi: int, metadata: dict[str, str]) -> Path:
    """Write a figure as the suffix says, atomically, without dates or versions: equal figures are equal files."""
    unstable = ("Date", "Creator") if picture_format(path) == "svg" else ("Software",)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=picture_format(path), dpi=dpi, metadata=metadata | dict.fromkeys(unstable))
    return Path(path)


def check_pictures() -> None:
    """Raise InputError unless matplotlib, its fonts and Pillow, which writes PNG for it, work here."""
    try:
        from matplotlib.figure import Figure
        with defaults():
            figure = Figure(figsize=(0.5, 0.2))
            figure.text(0, 0, "$c_{k}$ 0")
            for kind in ("svg", "png"):
                figure.savefig(io.BytesIO(), format=kind)
    except Exception as error:  # a broken installation can raise anything
        raise InputError(f"matplotlib: cannot draw pictures here ({type(error).__name__}: {error}); pip install "
                         "--force-reinstall matplotlib Pillow") from error


def picture_format(path: str | Path) -> str:
    """svg or png, by the suffix. Raises InputError for another."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise InputError(f"{path}: a picture is written as .svg or .png")
    return suffix[1:]


@contextmanager
def defaults() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's matplotlibrc says, so that equal input gives equal bytes."""
    import matplotlib
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def cell_picture(edges: Sequence[Edge], concat: Sequence[int]) -> Picture:
    """One cell. The gids of its arrows are edge-INDEX-SOURCE-TARGET-OPERATION and output-SOURCE, in state numbers."""
    places = layout(edges, concat)
    picture = Picture(*places.size)
    for state, wire in zip(concat, places.wires[len(edges):]):
        picture.arrow(wire, gid=f"output-{state}")
    for index, ((operation, source), wire) in enumerate(zip(edges, places.wires)):
        picture.arrow(wire, family(operation)[1], 1.4, f"edge-{index}-{source}-{2 + index // 2}-{operation}")
    for (operation, _), (x, y) in zip(edges, places.labels):
        name, colour = re.sub(r"(?<=\d)x(?=\d)", "×", operation).replace("_", " "), family(operation)[1]
        frame = {"boxstyle": "round,pad=0.3,rounding_size=0.5", "facecolor": "white", "edgecolor": colour}
        picture.text(x, y, name, 8, va="center", color=colour, bbox=frame, parse_math=False)
    for state, name in ((0, "$c_{k-2}$"), (1, "$c_{k-1}$"), (-1, "$c_{k}$")):
        picture.box(*places.states[state], 2 * RADIUS, 2 * RADIUS, name, END_FILL)
    for node, place in enumerate(places.states[2:-1]):
        picture.circle(*place, RADIUS, str(node))
    return picture


def describe(edges: Sequence[Edge], concat: Sequence[int]) -> str:
    """A cell in words, for those who cannot see the picture."""
    names = ["c_{k-2}", "c_{k-1}", *(f"node {node}" for node in range(len(edges) // 2))]
    terms = [f"{operation}({names[source]})" for operation, source in edges]
    sums = [f"{name} = {a} + {b}" for name, a, b in zip(names[2:], terms[::2], terms[1::2])]
    return "; ".join([*sums, f"c_k = concat({', '.join(names[state] for state in concat)})"])


def draw_cell(edges: Sequence[Edge], concat: Sequence[int], path: str | Path) -> Path:
    """Draw one cell as the suffix of `path` says. Raises InputError for another than .svg or .png."""
    picture_format(path)
    with defaults():
        return cell_picture(edges, concat).save(path, "cell", describe(edges, concat))


def draw_genotype(genotype: Genotype, folder: str | Path) -> list[Path]:
    """Write normal.svg, normal.png, reduce.svg and reduce.png into `folder`; returns their paths."""
    written = []
    with defaults():
        for kind, cell in (("normal", genotype[:2]), ("reduce", genotype[2:])):
            picture = cell_picture(*cell)
            written += [picture.save(Path(folder, f"{kind}.{suffix}"), f"{kind} cell", describe(*cell))
                        for suffix in ("svg", "png")]
    return written


def draw_committee(members: Sequence[tuple[str, Genotype | None]], path: str | Path, layers: int = 20) -> Path:
    """Draw networks of `layers` cells whose softmax outputs are averaged, a row for each (name, genotype).

    Cells are shown in miniature where the genotype is known. Raises InputError for a suffix other than .svg or .png,
    and if there is no member or no layer.
    """
    picture_format(path)
    if not members:
        raise InputError(f"{path}: a committee needs at least one member")
    if layers < 1:
        raise InputError(f"layers {layers}: a network needs at least 1")
    with defaults():
        names = ", ".join(name for name, _ in members)
        return committee_picture(members, layers).save(path, "committee", f"mean of the softmax outputs of {names}")


def committee_picture(members: Sequence[tuple[str, Genotype | None]], layers: int) -> Picture:
    """A row for each member; all lengths in inches, reductions at one and two thirds as in DARTS (section 3.1)."""
    kinds = ["reduction" if index in (layers // 3, 2 * layers // 3) else "normal" for index in range(layers)]
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]
    shown = {family(operation) for _, genotype in members if genotype
             for operation, _ in [*genotype.normal, *genotype.reduce]}
    left, gap, pitch, bottom = 1.12, 0.17, 1.14, 0.42 if shown else 0
    parts = [("stem", 0.56), *((run, 1.06) for run in runs), ("classifier", 0.82), ("softmax", 0.74)]  # widths
    right = left + sum(width + gap for _, width in parts)
    end = right + 1.92
    picture = Picture(end, bottom + pitch * len(members))
    middle = bottom + pitch * len(members) / 2 - 0.06

    for row, (name, genotype) in enumerate(members):
        x, y = left, middle + pitch * ((len(members) - 1) / 2 - row)
        cells = {"normal": genotype[:2], "reduction": genotype[2:]} if genotype else {}
        places = {kind: (cell, layout(*cell)) for kind, cell in cells.items()}
        picture.text(x, y + 0.47, name, 10.5, ha="left", weight="bold", parse_math=False)
        picture.arrow([(0.76, middle), (0.82, middle), (x - 0.12, y), (x, y)])
        for part, width in parts:
            if part != "softmax":
                picture.arrow([(x + width, y), (x + width + gap, y)])
            if isinstance(part, str):
                picture.box(x + width / 2, y, width, 0.4, part)
            else:
                kind, count = part
                block(picture, x + width / 2, y, width, kind, count, places.get(kind))
            x += width + gap
        picture.arrow([(right - gap, y), (right - gap + 0.04, y), (right + 0.26, middle), (right + 0.4, middle)])

    picture.box(0.42, middle, 0.68, 0.4, "image", END_FILL)
    picture.box(right + 0.77, middle, 0.74, 0.5, "mean of\nsoftmax")
    picture.arrow([(right + 1.14, middle), (right + 1.3, middle)])
    picture.box(right + 1.57, middle, 0.54, 0.4, "class", END_FILL)
    entry = min(1.95, (end - left) / max(len(shown), 1))  # a legend in one row, however narrow the picture is
    for i, (name, colour) in enumerate(value for value in dict.fromkeys(FAMILIES.values()) if value in shown):
        picture.line([(left + entry * i, 0.2), (left + entry * i + 0.25, 0.2)], colour, 2.5)
        picture.text(left + entry * i + 0.33, 0.2, name, 8.5, ha="left")
    return picture


def block(picture: Picture, x: float, y: float, width: float, kind: str, count: int,
          cell: tuple[tuple, Layout] | None) -> None:
    """A stack of `count` equal cells, with the cell in miniature on the uppermost."""
    fill = "white" if kind == "normal" else END_FILL
    for card in reversed(range(min(count, 3))):
        picture.box(x + 0.03 * card, y + 0.03 * card, width, 0.56, fill=fill)
    picture.text(x, y - 0.41, f"{count} × {kind}", 8.5)
    if cell is None:
        picture.text(x, y, "cell")
    else:
        (edges, concat), places = cell

        def scaled(point: Point) -> Point:
            return (x + (width - 0.1) * (point[0] / places.size[0] - 0.5), y + 0.5 * (point[1] / places.size[1] - 0.5))

        colours = [family(operation)[1] for operation, _ in edges] + [GREY] * len(concat)
        for wire, colour in reversed(list(zip(places.wires, colours))):
            picture.line([scaled(point) for point in wire], colour, 0.9)
        for point in places.states:
            picture.circle(*scaled(point), 0.032, fill=INK)


def _name(argument: str) -> str:
    """What a cell is called that was given without a name."""
    if re.search(r"[(\[{]", argument):
        return "cell"
    file, colon, part = argument.rpartition(":")
    if colon and os.path.isfile(file):
        return part
    return Path(argument).stem if argument.endswith(".json") or os.path.exists(argument) else argument.replace("/", "-")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError for unreadable genotypes and for pictures that cannot be written."""
    parser = Parser(prog="python -m conas.draw", description=__doc__.splitlines()[0])
    parser.add_argument("genotypes", nargs="+", metavar="[NAME=]FILE",
                        help="published names, SPACE/NAME as cnn_space1/CONAS, files or texts of cells, in a form of "
                             "docs/extending.md; or folders of searches, for their curves")
    parser.add_argument("--committee", action="store_true", help="draw the genotypes as one committee")
    parser.add_argument("--layers", type=int, default=20, help="cells of a committee's member (default: 20)")
    parser.add_argument("--out", required=True, help="folder for cells (several genotypes: in it, one folder for each, "
                                                     "called NAME); .svg or .png for a committee or "
                                                     "curves")
    values = parser.parse_args(argv)
    if any(os.path.isdir(argument) or os.path.isdir(argument.partition("=")[2]) for argument in values.genotypes):
        from conas.draw.health import draw_searches
        if values.committee:
            raise InputError("--committee: a committee is of cells, and these are searches; leave it out")
        return draw_searches(values.genotypes, values.out)
    members = {}
    for argument in values.genotypes:
        name, equals, file = argument.partition("=")
        if not equals or os.path.exists(argument) or re.search(r"[(\[{]", name):  # the text of a cell may hold "="
            name, file = _name(argument), argument
        if name in members:
            raise InputError(f"{argument}: a second genotype called {name}; write NAME=FILE with distinct names")
        members[name], read_from = find_cell(file, {} if os.path.isfile(file) else GENOTYPES, "", None)
        print(f"{name}: {read_from}", file=sys.stderr)
    try:
        if values.committee:
            print(draw_committee(list(members.items()), values.out, values.layers))
        else:
            for name, genotype in members.items():
                print(*draw_genotype(genotype, Path(values.out, name if len(members) > 1 else "")), sep="\n")
    except OSError as error:
        raise InputError(f"{values.out}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(run(main))
