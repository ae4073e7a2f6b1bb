"""Pictures of a committee's result: accuracy by epoch, and the confusion matrix. Equal results give equal files."""
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from conas.data.images import full_name
from conas.draw.cell import INK, defaults, save_figure
from ensemble.report.reference import RULES

MUTED, RULE, PAPER, PUBLISHED = "#52606d", "#e4e9ef", "#ffffff", "#9aa5b1"
SHORTEST = 9  # the published curve is drawn to this epoch at least
COLOURS = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"  # Okabe and Ito, 2008
DASHES = "-", (0, (5, 1.5)), (0, (1.5, 1.2))
STYLE = {"font.size": 9, "text.color": INK, "text.parse_math": False,
         "axes.edgecolor": MUTED, "axes.labelcolor": INK, "axes.titlecolor": INK, "axes.titlesize": 11,
         "axes.titlelocation": "left", "axes.titlepad": 10, "axes.titleweight": "bold",
         "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
         "svg.hashsalt": "conas"}  # without a salt, the ids in an SVG are random


def draw(folder: Path, report: dict, matrix: Tensor) -> list[Path]:
    """Draw a report and its (K, K) confusion matrix, as PNG and SVG each. Returns the paths."""
    from matplotlib import rc_context
    epoch = report["epochs"][-1]["epoch"]
    with defaults(), rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a class name in a script that the font lacks
        return [*_save(accuracy_figure(report), folder / "accuracy_by_epoch",
                       "Accuracy by epoch of the committee and its members"),
                *_save(confusion_figure(matrix, report["classes"], epoch), folder / "confusion_matrix",
                       f"Confusion matrix of the committee, epoch {epoch}")]


def accuracy_figure(report: dict):
    """A matplotlib Figure of top-1 by epoch: the committee's line over those of its members."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    epochs = [entry["epoch"] for entry in report["epochs"]]
    figure = Figure(figsize=(7, 4.2), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    marker = "o" if len(epochs) <= 20 else None
    if published := report.get("reference"):
        _draw_published(axes, published, max(epochs), report["combination"])
    for index, member in enumerate(report["epochs"][0]["members"]):
        axes.plot(epochs, [entry["members"][index]["top1"] for entry in report["epochs"]], label=_short(member["name"]),
                  color=COLOURS[index % len(COLOURS)], linewidth=1.4,
                  linestyle=DASHES[(index + index // len(COLOURS)) % len(DASHES)], marker=marker, markersize=3)
    axes.plot(epochs, [entry["committee"]["top1"] for entry in report["epochs"]], label="committee", color=INK,
              linewidth=2.6, marker=marker, markersize=5)
    axes.set(title="Accuracy by epoch", xlabel="epoch", ylabel=f"top-1 on {report['images']:,} test images, %")
    if full_name(report["dataset"]) != report["dataset"]:
        axes.set_ylabel(f"{axes.get_ylabel()}\n{full_name(report['dataset'])}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: (labels[i].startswith("published"), labels[i] != "committee"))
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right center", frameon=False,
                  handlelength=2.6)
    return figure


def _draw_published(axes, published: dict, last: int, combination: str) -> None:
    """The published curve under ours, as far as ours goes, and our committee by the other rule, for comparison."""
    shown = max(last, SHORTEST) + 1
    for index, (name, line) in enumerate(published["top1"].items()):
        committee = name == "committee"
        label = "published: committee" if committee else "published: supernets" if index == 1 else None
        axes.plot(range(len(line))[:shown], line[:shown], label=label, color=PUBLISHED, zorder=1,
                  linewidth=2.2 if committee else 0.9, linestyle=(0, (4, 1.5)) if committee else "-")
    for (rule, line), style in zip(published["ours"].items(), ((0, (1, 1)), (0, (5, 1, 1, 1)))):
        if rule != combination:
            axes.plot(published["epochs"], line, label=f"committee, {RULES[rule]}", color=INK, linewidth=1,
                      linestyle=style)


def confusion_figure(matrix: Tensor, classes: Sequence[str], epoch: int):
    """A matplotlib Figure of a (K, K) confusion matrix; counts are written into it where there is room."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    K, total = len(classes), matrix.sum(dim=1, keepdim=True)
    share = (100 * matrix / total.clamp_min(1)).numpy()
    side = min(max(4.5, 0.42 * K), 13)
    figure = Figure(figsize=(side + 1.5, side + 0.8), facecolor=PAPER, layout="constrained")
    axes = figure.add_subplot()
    # the square root: with most images on the diagonal, a linear scale would show the mistakes as white
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    axes.set(title=f"Confusion matrix of the committee, epoch {epoch}", xlabel="predicted class", ylabel="true class")
    step = -(-K // 120)  # beyond that, only every so manyth name can be read
    size = min(9, 72 * side / K * step * 0.75)
    names = [_short(name) for name in classes[::step]]
    axes.set_xticks(range(0, K, step), names, fontsize=size, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(0, K, step), names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_color(RULE)
    for at in range(10, K, 10) if K > 30 else ():
        axes.axhline(at - 0.5, color=RULE, linewidth=0.8)
        axes.axvline(at - 0.5, color=RULE, linewidth=0.8)
    if K <= 30:
        for i, row in enumerate(matrix.tolist()):
            for j, count in enumerate(row):
                if count:
                    axes.text(j, i, count, ha="center", va="center", fontsize=size * 0.9,
                              color=PAPER if share[i, j] > 40 else INK)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_label("% of the images of the true class")
    bar.outline.set_visible(False)
    return figure


def _short(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"{name[:longest - 1]}…"


def _save(figure, stem: Path, title: str) -> list[Path]:
    """Write as PNG and SVG."""
    return [save_figure(figure, stem.with_suffix(suffix), 160, {"Title": title}) for suffix in (".png", ".svg")]
