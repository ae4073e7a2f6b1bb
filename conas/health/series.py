"""The series that a collapse is judged by, read from files: published ones of many runs, or a search's own folder.

    {"runs": {NAME: {"epochs": [0, 2, ...], "dominant_eigenvalue": [0.18, 0.15, ...],
                     "skips_in_normal_cell_by_epoch": [0, 0, 1, ...]}}}

Eigenvalues are those of the epochs listed beside them, skips are by epoch from 0. Other fields are ignored.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from conas.errors import InputError
from conas.files import read_json, read_json_lines
from conas.health.collapse import FEWEST_EPOCHS, FEWEST_VALUES, LONG, collapsing_from, usable
from conas.runs.folder import read_arguments

SKIPS, EIGENVALUES = "skips_in_normal_cell_by_epoch", "dominant_eigenvalue"


@dataclass(frozen=True)
class Series:
    """Of one run: skips by epoch from 0, eigenvalues by epoch, and the number of epochs that it was started for."""

    skips: list[float]
    curvature: dict[int, float]
    epochs: int

    def verdict(self) -> str:
        """`collapsing from epoch N` or `sound`, with what it could not go by; or `not judged`, with the reason."""
        if not self.skips:
            return f"not judged: no {SKIPS}"
        if wrong := [epoch for epoch, value in enumerate(self.skips) if not math.isfinite(value)]:
            return f"not judged: the skips of epoch {wrong[0]} are {self.skips[wrong[0]]}"
        if self.epochs < FEWEST_EPOCHS:
            return f"not judged: {self.epochs} epochs; the rule needs {FEWEST_EPOCHS} or more"
        epoch = collapsing_from(self.skips, self.curvature, self.epochs)
        verdict = "sound" if epoch is None else f"collapsing from epoch {epoch}"
        return f"{verdict} ({'; '.join(remarks)})" if (remarks := self._remarks()) else verdict

    def _remarks(self) -> list[str]:
        remarks = []
        good = [epoch for epoch, value in self.curvature.items() if usable(value)]
        late = [epoch for epoch in good if epoch >= len(self.skips)]
        if not self.curvature:
            remarks.append("by skips alone: no eigenvalues")
        elif len(good) < len(self.curvature):
            remarks.append(f"without {len(self.curvature) - len(good)} of {len(self.curvature)} eigenvalues, which are "
                           "0, NaN or infinite")
        if late:
            remarks.append(f"without eigenvalues of {len(late)} epochs after the last skips")
        if self.curvature and sum(epoch < LONG * self.epochs for epoch in good) < FEWEST_VALUES:
            remarks.append(f"by skips alone: fewer than {FEWEST_VALUES} eigenvalues in the first fifth of the epochs")
        if len(self.skips) < self.epochs:
            remarks.append(f"after {len(self.skips)} of {self.epochs} epochs")
        return remarks


def read(path: str | Path, epochs: int | None = None) -> dict[str, Series]:
    """The series in a file or in the folder of a search, by the names of the runs.

    `epochs` is how many the runs of a file were started for, if not as many as they have skips of. Raises InputError
    for what is no such file or folder.
    """
    path = Path(path)
    if path.is_dir():
        return {path.name: read_search(path)}
    try:
        runs = read_json(path)["runs"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as series of searches ({type(error).__name__}: {error}); docs/"
                         "health.md shows their form") from error
    if not isinstance(runs, dict) or not runs:
        raise InputError(f"{path}: its runs must be an object with at least one run; docs/health.md shows its form")
    return {name: _series(run, f"{path}: run {name:.60}", epochs) for name, run in runs.items()}


def _series(run: object, where: str, epochs: int | None) -> Series:
    if not isinstance(run, dict):
        raise InputError(f"{where} is no object; docs/health.md shows its form")
    skips, values, at = (_numbers(run.get(name), f"{where}: {name}") for name in (SKIPS, EIGENVALUES, "epochs"))
    if values and len(values) != len(at):
        raise InputError(f"{where}: has {len(values)} of {EIGENVALUES}, but {len(at)} epochs; each needs its own")
    if not all(math.isfinite(a) and a >= 0 and a == int(a) for a in at) or len(set(at)) < len(at):
        raise InputError(f"{where}: its epochs must be distinct whole numbers from 0 on")
    if any(s < 0 for s in skips):
        raise InputError(f"{where}: {SKIPS} must not be negative")
    return Series(skips, {int(epoch): value for epoch, value in zip(at, values)}, epochs or len(skips))


def _numbers(value: object, where: str) -> list[float]:
    """A list of numbers, in which null is NaN; none at all is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > 100_000:
        raise InputError(f"{where} must be a list of numbers, and not {value!r:.60}")
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, (int, float, type(None))) or (
                isinstance(item, int) and abs(item) > 2**53):
            raise InputError(f"{where} must be a list of numbers, but its item {index} is {item!r:.60}")
    return [math.nan if item is None else float(item) for item in value]


def read_search(folder: Path) -> Series:
    """The series of the search in `folder`. Raises InputError for another folder, and for damaged files."""
    epochs = read_arguments(folder).get("epochs")
    path = folder / "metrics.jsonl"
    try:
        rows = read_json_lines(path)
        skips = [float(row["skips"]) for row in rows]
        curvature = {int(row["epoch"]): float(row["curvature"]) for row in rows if "curvature" in row}
        return Series(skips, curvature, int(epochs))
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise InputError(f"{path}: has no skips by epoch ({type(error).__name__}: {error}); name a search begun with "
                         "this version, or a file as docs/health.md shows it") from error
