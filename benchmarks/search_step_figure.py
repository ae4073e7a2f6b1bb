"""The figure of benchmarks/search_step.py: how many times the textbook's speed, and how time grows."""
from pathlib import Path

from benchmarks.counts import ROOT
from conas.draw.cell import INK, defaults, save_figure
from ensemble.report.pictures import COLOURS, RULE, STYLE

WORKS = {"architect": "architect step", "weights": "weight step", "iteration": "iteration", "evaluation": "evaluation"}


def draw(results: dict, name: str) -> Path:
    """Write img/NAME.svg."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with defaults(), rc_context(STYLE):
        curves = results["growth"].get("curves", [])
        varied = list(dict.fromkeys(curve["varied"] for curve in curves))
        figure = Figure(figsize=(9, 3.2 + 0.4 * len(results["settings"]) + 4.5 * bool(varied)), facecolor="white",
                        layout="constrained")
        parts = figure.subfigures(2, height_ratios=(1, 1)) if varied else [figure]
        _bars(parts[0].subplots(), dict(sorted(results["settings"].items())))
        for axes, of in zip(parts[1].subplots(1, len(varied)) if varied else [], varied):
            _growth(axes, of, [curve for curve in curves if curve["varied"] == of])
        return save_figure(figure, ROOT / "img" / f"{name}.svg", 200, {"Title": "The search step",
                           "Description": "Speed against a textbook implementation, and growth of the time"})


def _over_stronger(result: dict) -> dict:
    """The ratios to the faster form of the textbook, of those that were measured."""
    return min((result[name] for name in ("textbook_over_ours", "channels_last_over_ours") if name in result),
               key=lambda of: of["iteration"]["median"])


def _bars(axes, settings: dict) -> None:
    height = 0.8 / len(WORKS)
    for i, (work, label) in enumerate(WORKS.items()):
        values = [_over_stronger(result)[work] for result in settings.values()]
        medians = [value["median"] for value in values]
        errors = [[abs(value["quartiles"][side] - value["median"]) for value in values] for side in (0, 1)]
        at = [row + (i - 1.5) * height for row in range(len(values))]
        axes.barh(at, medians, height, xerr=errors, color=COLOURS[i], label=label, error_kw={"ecolor": INK, "lw": 1})
    axes.set(title="Speed against the textbook's faster form", xlabel="times as fast (median, quartiles)")
    axes.set_yticks(range(len(settings)), [title.replace("cnn_", "") for title in settings])
    axes.invert_yaxis()
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.grid(axis="x", color=RULE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if settings:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _growth(axes, varied: str, curves: list[dict]) -> None:
    from matplotlib.ticker import LogLocator
    for i, curve in enumerate(sorted(curves, key=lambda curve: curve["space"])):
        for name, style in ("ours", "o-"), ("textbook", "o--"):
            label = f"{curve['space'].removeprefix('cnn_')}, {name}: exponent {curve['exponents'][name]:.2f}"
            axes.plot(curve["values"], curve["seconds"][name], style, color=COLOURS[i], label=label, markersize=3)
    axes.set(xscale="log", yscale="log", xlabel=varied.replace("_", " "), ylabel="seconds for an iteration")
    axes.set_xticks(curves[0]["values"], curves[0]["values"])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(color=RULE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.2))
