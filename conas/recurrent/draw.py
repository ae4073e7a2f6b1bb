"""Draw recurrent cells as SVG or PNG, in the manner of `conas.draw`.

    python -m conas.recurrent.draw rnn/search-EXP/genotype.json --out cells

Equal genotypes give byte-identical files.
"""
import sys
from collections.abc import Sequence
from pathlib import Path

from conas.cli import Parser, run
from conas.draw.cell import END_FILL, Picture, defaults
from conas.draw.layout import RADIUS, layout
from conas.errors import InputError
from conas.recurrent.genotype import Genotype, load

COLOURS = {"tanh": "#2456b8", "relu": "#b45709", "sigmoid": "#12855a", "identity": "#3a3f46"}


def recurrent_picture(genotype: Genotype) -> Picture:
    """One cell: word x_t and state h_{t-1} make state 0, every step a state, and the mean of states is h_t.

    The gids of its arrows are edge-STEP-SOURCE-TARGET-ACTIVATION and output-SOURCE, in the genotype's state numbers;
    x_t and h_{t-1} are -2 and -1 there, and their STEP is 0.
    """
    edges = [("tanh", 0), ("tanh", 1), *((name, 2 + source) for name, source in genotype.recurrent)]
    targets = [2, 2, *range(3, 3 + len(genotype.recurrent))]
    places = layout(edges, [2 + state for state in genotype.concat], targets)
    picture = Picture(*places.size)
    for state, wire in zip(genotype.concat, places.wires[len(edges):]):
        picture.arrow(wire, gid=f"output-{state}")
    for (name, source), target, wire in zip(edges, targets, places.wires):
        picture.arrow(wire, COLOURS[name], 1.4, f"edge-{target - 2}-{source - 2}-{target - 2}-{name}")
    for (name, _), (x, y) in zip(edges, places.labels):
        frame = {"boxstyle": "round,pad=0.3,rounding_size=0.5", "facecolor": "white", "edgecolor": COLOURS[name]}
        picture.text(x, y, name, 8, va="center", color=COLOURS[name], bbox=frame)
    for state, name in ((0, "$x_t$"), (1, "$h_{t-1}$"), (-1, "$h_t$")):
        picture.box(*places.states[state], 2 * RADIUS, 2 * RADIUS, name, END_FILL)
    for state, place in enumerate(places.states[2:-1]):
        picture.circle(*place, RADIUS, str(state))
    return picture


def describe(genotype: Genotype) -> str:
    """A cell in words, for those who cannot see the picture."""
    steps = [f"state {step + 1} = {name}(state {source})" for step, (name, source) in enumerate(genotype.recurrent)]
    return "; ".join(["state 0 = tanh(x_t, h_{t-1})", *steps,
                      f"h_t = mean of states {', '.join(map(str, genotype.concat))}"])


def draw_recurrent(genotype: Genotype, folder: str | Path) -> list[Path]:
    """Write recurrent.svg and recurrent.png into `folder`; returns their paths."""
    with defaults():
        picture = recurrent_picture(genotype)
        return [picture.save(Path(folder, f"recurrent.{suffix}"), "recurrent cell", describe(genotype))
                for suffix in ("svg", "png")]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError for an unreadable genotype and a folder that cannot be written."""
    parser = Parser(prog="python -m conas.recurrent.draw", description=__doc__.splitlines()[0])
    parser.add_argument("genotype", metavar="FILE", help="a recurrent genotype as JSON")
    parser.add_argument("--out", required=True, help="folder for the pictures")
    values = parser.parse_args(argv)
    try:
        print(*draw_recurrent(load(values.genotype), values.out), sep="\n")
    except OSError as error:
        raise InputError(f"{values.out}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    sys.exit(run(main))
