"""The rule beside two others on the same searches, with its gain chosen on other seeds than it is judged on."""
from collections.abc import Callable, Mapping

from conas.errors import InputError
from conas.health.collapse import GAIN, LIMIT, LONG, MOST_SKIPS, collapsing_from, published_stop
from conas.health.series import Series

COLLAPSED = 5  # skip connections in the last cell of a search that has collapsed
GAINS = [step / 100 for step in range(20, 155, 5)]
Rule = Callable[[Series], int | None]


def published(series: Series) -> int | None:
    """Where `published_stop` stops a search."""
    found = published_stop(series.curvature)
    return found and found[0]


def counting(series: Series) -> int | None:
    """More than MOST_SKIPS skip connections from epoch 10 on."""
    return next((epoch for epoch, skips in enumerate(series.skips) if epoch >= 10 and skips > MOST_SKIPS), None)


def with_gain(gain: float) -> Rule:
    return lambda series: collapsing_from(series.skips, series.curvature, series.epochs, gain)


class Judged:
    """What a rule does on searches whose outcome is known."""

    def __init__(self, rule: Rule, runs: Mapping[str, Series]):
        self.in_time = self.late = self.false = self.collapsed = self.sound = 0
        for series in runs.values():
            epoch = rule(series)
            if series.skips[-1] >= COLLAPSED:
                self.collapsed += 1
                self.in_time += epoch is not None and series.skips[epoch] <= MOST_SKIPS
                self.late += epoch is not None and series.skips[epoch] > MOST_SKIPS
            elif max(series.skips[round(LONG * series.epochs):]) <= MOST_SKIPS:
                self.sound += 1
                self.false += epoch is not None

    @property
    def worth(self) -> float:
        return self.in_time / max(1, self.collapsed) - self.false / max(1, self.sound)

    def line(self, name: str) -> str:
        return (f"| {name} | {self.in_time} of {self.collapsed} | {self.late} of {self.collapsed} | "
                f"{self.false} of {self.sound} |")


def choose_gain(runs: Mapping[str, Series]) -> float:
    """The gain that is worth most on these runs: the middle one of several, the higher of two."""
    worth = {gain: Judged(with_gain(gain), runs).worth for gain in GAINS}
    best = [gain for gain in GAINS if worth[gain] > max(worth.values()) - 1e-9]
    return best[len(best) // 2]


def table(runs: Mapping[str, Series]) -> str:
    """The rules on `runs`, whose names end in /SEED, as a table in Markdown. Raises InputError for other names."""
    seeds = sorted({name.rpartition("/")[2] for name in runs})
    if not all("/" in name for name in runs) or len(seeds) < 2:
        raise InputError("--table: the names of the runs must end in /SEED, with two seeds or more")
    if any(not series.skips or not series.curvature for series in runs.values()):
        raise InputError("--table: each run must have skips and eigenvalues, to compare rules that go by either")
    lines = ["| rule | in time | late | false alarms |", "| --- | --- | --- | --- |",
             Judged(published, runs).line("eigenvalues, as published"),
             Judged(counting, runs).line(f"more than {MOST_SKIPS} skips"),
             Judged(with_gain(GAIN), runs).line(f"this one, gain {GAIN}")]
    total = Judged(with_gain(GAIN), {})
    for seed in seeds:
        own = {name: series for name, series in runs.items() if name.endswith(f"/{seed}")}
        gain = choose_gain({name: series for name, series in runs.items() if name not in own})
        judged = Judged(with_gain(gain), own)
        lines.append(judged.line(f"this one on seed {seed}, gain {gain} chosen on the others"))
        for count in vars(total):
            setattr(total, count, getattr(total, count) + getattr(judged, count))
    lines.append(total.line("this one, each seed left out once"))
    return "\n".join([*lines, "", f"Collapsed: {COLLAPSED} skips or more at the end. Sound: at most {MOST_SKIPS} after "
                      f"the first fifth of the epochs. In time: stopped with at most {MOST_SKIPS}. Projected skips "
                      f"must exceed {LIMIT}."])
