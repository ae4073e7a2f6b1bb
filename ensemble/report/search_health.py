"""How healthy the members' searches were, by epoch, for the report."""
from collections.abc import Sequence
from html import escape
from pathlib import Path

from conas.draw.health import read_rows, series
from ensemble.report import svg

CHARTS = {"valid_top1": "Top-1 of the supernet on the images for alphas, %",
          "skips": "Skip connections among the 8 edges of the normal cell",
          "entropy_normal": "Entropy of the alphas of the normal cell, nats",
          "curvature": "Curvature: magnitude of the dominant eigenvalue of the Hessian w.r.t. the alphas"}


def read_health(folders: Sequence[Path], names: Sequence[str]) -> dict[str, list[dict]]:
    """The lines of metrics of the searches in `folders` by name, without those from before skips were counted."""
    found = {name: read_rows(folder / "metrics.jsonl") for folder, name in zip(folders, names)
             if (folder / "metrics.jsonl").exists()}
    return {name: rows for name, rows in found.items() if any("skips" in row for row in rows)}


def html(searches: dict[str, list[dict]]) -> str:
    """A chart for each sign, with a line for each search; nothing without searches."""
    parts = []
    for field, title in CHARTS.items():
        groups: dict[tuple[int, ...], dict[str, list[float]]] = {}  # by the epochs in which it is known
        for name, rows in searches.items():
            epochs, values = series(rows, field)
            if epochs:
                groups.setdefault(tuple(epochs), {})[name] = values
        parts += [f"<figure>{svg.curves(lines, epochs, 'epoch', f'{title}, by epoch')}<figcaption>{escape(title)}."
                  "</figcaption></figure>" for epochs, lines in groups.items()]
    if not parts:
        return ""
    return ("<p>A search collapses if skip connections take over its normal cell. A growing curvature announces it; "
            "docs/health.md has the rule.</p>" + "".join(parts))
