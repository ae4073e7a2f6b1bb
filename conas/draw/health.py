"""The health of searches by epoch, as curves: accuracy, skip connections, entropy of the alphas, curvature.

    python -m conas.draw cnn_space1/search-EXP --out health.svg
    python -m conas.draw plain=cnn_space1/search-1 plain=cnn_space1/search-2 decay=cnn_space1/search-3 --out health.svg

Searches that are given one name, for example seeds, have one colour; a thick line is their mean.
"""
import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from conas.draw.cell import GREY, INK, defaults, picture_format, save_figure
from conas.errors import InputError
from conas.files import read_json_lines

# Of each panel: its title, and the fields of metrics.jsonl with their names; what a search has none of is left out.
PANELS = {"top-1, %": {"valid_top1": "images for alphas", "train_top1": "images for weights"},
          "skip connections in the normal cell": {"skips": ""},
          "entropy of the alphas, nats": {"entropy_normal": "normal", "entropy_reduce": "reduction"},
          "curvature: dominant eigenvalue": {"curvature": ""}}
COLOURS = "#2456b8", "#b45709", "#2e7d32", "#7b1fa2"


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


def draw_health(searches: Sequence[tuple[str, Path]], path: str | Path) -> Path:
    """Draw searches, each a name and its folder, as .svg or .png, as the suffix of `path` says.

    Of several, the first field of each panel is drawn. Raises InputError for a folder without a search's metrics.
    """
    picture_format(path)
    runs = [(name, read_rows(folder / "metrics.jsonl")) for name, folder in searches]
    for (_, folder), (_, rows) in zip(searches, runs):
        if not any(name in row for fields in PANELS.values() for name in fields for row in rows):
            raise InputError(f"{folder}: its metrics are not those of a search; name a folder cnn_spaceN/search-EXP")
    shown = {title: fields for title, fields in PANELS.items()
             if any(name in row for name in fields for _, rows in runs for row in rows)}
    with defaults():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
        figure = Figure(figsize=(6.4, 1.5 * len(shown) + 0.4), facecolor="white", layout="constrained")
        for axes, (title, fields) in zip(figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0],
                                         shown.items()):
            axes.set_title(title, fontsize=9, loc="left", color=INK)
            axes.grid(color=GREY, alpha=0.3)
            axes.tick_params(labelsize=8, color=GREY, labelcolor=INK)
            if len(runs) == 1:
                _fields(axes, runs[0][1], fields)
            else:
                _groups(axes, runs, next(iter(fields)))
            if title.startswith("skip"):
                axes.set_ylim(-0.3, 8.3)
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize=8, frameon=False)
        axes.set_xlabel("epoch", fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return save_figure(figure, path, 150, {"Title": "health of a search" if len(runs) == 1 else
                                               "health of searches", "Description": _in_words(runs, shown)})


def _fields(axes, rows: Sequence[dict], fields: Mapping[str, str]) -> None:
    for (name, label), colour in zip(fields.items(), COLOURS):
        epochs, values = series(rows, name)
        if epochs:
            axes.plot(epochs, values, color=colour, marker="o" if len(epochs) < 30 else "", markersize=3, label=label,
                      gid=name)


def _groups(axes, runs: Sequence[tuple[str, list[dict]]], name: str) -> None:
    """The field `name` of each search as a thin line, and the mean over the epochs that all of a group have."""
    for group, colour in zip(dict.fromkeys(group for group, _ in runs), cycle(COLOURS)):
        curves = [dict(zip(*series(rows, name))) for own, rows in runs if own == group]
        for curve in filter(None, curves if len(curves) > 1 else []):
            axes.plot(*zip(*curve.items()), color=colour, linewidth=0.8, alpha=0.5)
        common = sorted(set.intersection(*map(set, curves)))
        if common:
            axes.plot(common, [sum(curve[epoch] for curve in curves) / len(curves) for epoch in common], color=colour,
                      linewidth=2, gid=f"{name}-{group}",
                      label=group if len(curves) == 1 else f"{group}, mean of {len(curves)}")


def _in_words(runs: Sequence[tuple[str, list[dict]]], shown: Mapping[str, Mapping[str, str]]) -> str:
    lines = []
    for name, rows in runs:
        fields = [name for fields in shown.values() for name in fields]
        last = {field: values[-1] for field in fields if (values := series(rows, field)[1])}
        words = ", ".join(f"{field} {value:.4g}" for field, value in last.items())
        lines.append(f"{name + ', ' if len(runs) > 1 else ''}after epoch {rows[-1]['epoch']}: {words}")
    return "; ".join(lines)


def draw_searches(arguments: Sequence[str], out: str) -> None:
    """`python -m conas.draw [NAME=]FOLDER ... --out OUT`. Raises InputError for what is no folder of a search."""
    searches = []
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or os.path.isdir(argument):
            name, folder = Path(argument).name, argument
        if not os.path.isdir(folder):
            raise InputError(f"{argument}: curves are of searches, and this is no folder; name only searches, or only "
                             "cells")
        searches.append((name, Path(folder)))
    if not out.lower().endswith((".svg", ".png")):
        raise InputError(f"{searches[0][1]}: is a folder, and a search's curves are one picture, written as .svg or "
                         f".png and not {out}; for its cells name its genotype.json")
    try:
        print(draw_health(searches, out))
    except OSError as error:
        raise InputError(f"{out}: cannot be written ({error.strerror})") from error
