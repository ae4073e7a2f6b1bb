"""The health of a search by epoch, as curves: accuracy, skip connections, entropy of the alphas, curvature.

    python -m conas.draw cnn_space1/search-EXP --out health.svg
"""
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from conas.draw.cell import GREY, INK, defaults, picture_format, save_figure
from conas.errors import InputError
from conas.files import read_json_lines

# Of each panel: its title, and the fields of metrics.jsonl with their names; what a search has none of is left out.
PANELS = {"top-1, %": {"valid_top1": "images for alphas", "train_top1": "images for weights"},
          "skip connections in the normal cell": {"skips": ""},
          "entropy of the alphas, nats": {"entropy_normal": "normal", "entropy_reduce": "reduction"},
          "curvature: dominant eigenvalue": {"curvature": ""}}
COLOURS = "#2456b8", "#b45709"


def read_rows(path: Path) -> list[dict]:
    """The lines of a search's metrics.jsonl, each with its epoch and its finite numbers by name.

    Raises InputError for another file.
    """
    try:
        rows = [{name: value for name, value in row.items() if type(value) in (int, float) and math.isfinite(value)}
                for row in read_json_lines(path)]
        if [row["epoch"] for row in rows] == list(range(len(rows))) and rows:
            return rows
    except (OSError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: cannot be read as a search's lines of metrics ({type(error).__name__}: {error}); "
                         "name a folder cnn_spaceN/search-EXP") from error
    raise InputError(f"{path}: has no epochs, or not one line for each; name a folder cnn_spaceN/search-EXP")


def series(rows: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """The epochs that have a field, and its values in them."""
    known = [(row["epoch"], row[name]) for row in rows if name in row]
    return [epoch for epoch, _ in known], [value for _, value in known]


def draw_health(folder: Path, path: str | Path) -> Path:
    """Draw the search in `folder` as .svg or .png, as the suffix of `path` says. Raises InputError without metrics."""
    picture_format(path)
    rows = read_rows(folder / "metrics.jsonl")
    shown = {title: fields for title, fields in PANELS.items() if any(name in row for name in fields for row in rows)}
    if not shown:
        raise InputError(f"{folder}: its metrics are not those of a search; name a folder cnn_spaceN/search-EXP")
    with defaults():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
        figure = Figure(figsize=(6.4, 1.5 * len(shown) + 0.4), facecolor="white", layout="constrained")
        for axes, (title, fields) in zip(figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0],
                                         shown.items()):
            axes.set_title(title, fontsize=9, loc="left", color=INK)
            axes.grid(color=GREY, alpha=0.3)
            axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
            for (name, label), colour in zip(fields.items(), COLOURS):
                epochs, values = series(rows, name)
                if epochs:
                    axes.plot(epochs, values, color=colour, marker="o" if len(epochs) < 30 else "", markersize=3,
                              label=label, gid=name)
            if title.startswith("skip"):
                axes.set_ylim(-0.3, 8.3)
            if all(fields.values()):
                axes.legend(fontsize=8, frameon=False)
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        last = {name: values[-1] for fields in shown.values() for name in fields if (values := series(rows, name)[1])}
        words = ", ".join(f"{name} {value:.4g}" for name, value in last.items())
        return save_figure(figure, path, 150, {"Title": "health of a search",
                                               "Description": f"after epoch {rows[-1]['epoch']}: {words}"})


def draw_alone(folder: str, values: Namespace) -> None:
    """`python -m conas.draw FOLDER`. Raises InputError if more is asked for, or if nothing can be written."""
    if len(values.genotypes) > 1 or values.committee:
        raise InputError(f"{folder}: a search is drawn alone; name nothing beside it")
    try:
        print(draw_health(Path(folder), values.out))
    except OSError as error:
        raise InputError(f"{values.out}: cannot be written ({error.strerror})") from error
