"""The committee's result as numbers, as text and as files.

A report is a plain dict, ready for JSON; accuracies are in percent, gains in percentage points, losses in nats:

    format version combination dataset fingerprint images classes    what was combined, and on what it was tested
    left_out     by member, the epochs that not all members have
    epochs       a list of {epoch, members, committee, best_member, gain}, where
                 members are {name, stage, checkpoint, sha256, top1, top5, loss}, checkpoint relative to the root,
                 committee is {top1, top5, loss}, and best_member the one with the highest top-1 on the test images
"""
import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

import conas
from conas.files import write_json, write_text
from ensemble.committee import Committee, span
from ensemble.metrics import confusion_matrix, nll, topk_accuracy


def measure(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """top1 and top5 in percent, loss in nats, of (N, K) probabilities."""
    return {"top1": 100 * topk_accuracy(probabilities, labels), "top5": 100 * topk_accuracy(probabilities, labels, 5),
            "loss": nll(probabilities, labels)}


def evaluate(committee: Committee, checkpoints: Mapping[str, str]) -> dict:
    """One entry of a report's `epochs`. `checkpoints` are the members' paths by name; they share an epoch."""
    members = [{"name": name, "stage": scores.stage, "checkpoint": checkpoints[name],
                "sha256": scores.checkpoint_sha256, **measure(scores.logits.double().softmax(dim=1), scores.labels)}
               for name, scores in committee.members.items()]
    ours = measure(committee.probabilities, committee.labels)
    best = max(members, key=lambda member: (member["top1"], -member["loss"]))
    return {"epoch": next(iter(committee.members.values())).epoch, "members": members, "committee": ours,
            "best_member": best["name"], "gain": ours["top1"] - best["top1"]}


def assemble(epochs: Sequence[dict], last: Committee, left_out: Mapping[str, Sequence[int]]) -> dict:
    """The report of what `evaluate` returned for all common epochs, `last` being the committee of the last one."""
    return {"format": "conas-committee", "version": conas.__version__, "combination": last.combination,
            "dataset": last.dataset, "fingerprint": last.fingerprint, "images": len(last.labels),
            "classes": last.classes, "left_out": dict(left_out), "epochs": list(epochs)}


def as_text(report: dict) -> str:
    """The report for the terminal: the last epoch, then all epochs if there are several."""
    epochs, last, classes = report["epochs"], report["epochs"][-1], len(report["classes"])
    lines = [f"Committee of {len(last['members'])} by {report['combination']}: {report['dataset']}, "
             f"{report['images']} test images, {classes} classes"]
    lines += [f"{name} also has epoch{'s' * (len(extra) > 1)} {span(extra)}: left out, since not all members have them"
              for name, extra in report["left_out"].items()]

    figures = [(member["name"], member) for member in last["members"]] + [("committee", last["committee"])]
    header, rows = ["top-1 %", "loss"], [[name, f"{f['top1']:.2f}", f"{f['loss']:.4f}"] for name, f in figures]
    if classes > 5:  # the five best of five classes are always right
        header.insert(1, "top-5 %")
        for row, (_, f) in zip(rows, figures):
            row.insert(2, f"{f['top5']:.2f}")
    lines += ["", *table([f"epoch {last['epoch']}", *header], rows),
              f"gain over {last['best_member']}, the best member of this epoch: {points(last['gain'])} in top-1 "
              f"({last['gain'] * report['images'] / 100:+.0f} images)"]
    if len(epochs) == 1:
        return "\n".join(lines)

    by_name = {name: [next(m for m in entry["members"] if m["name"] == name) for entry in epochs]
               for name in (member["name"] for member in last["members"])}
    by_name["committee"] = [entry["committee"] for entry in epochs]
    rows = []
    for name, curve in by_name.items():
        best = max(range(len(epochs)), key=lambda i: curve[i]["top1"])
        rows.append([name, f"{mean(f['top1'] for f in curve):.2f}", f"{mean(f['loss'] for f in curve):.4f}",
                     f"{curve[best]['top1']:.2f}", str(epochs[best]["epoch"])])
    gains = [entry["gain"] for entry in epochs]
    ahead, level = sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains)
    lines += ["", *table([f"epochs {span([entry['epoch'] for entry in epochs])}", "mean top-1 %", "mean loss",
                          "best top-1 %", "at epoch"], rows),
              f"gain over the best member of each epoch: {points(mean(gains))} in top-1 on average, from "
              f"{min(gains):+.2f} to {max(gains):+.2f};",
              f"ahead in {ahead} of {len(gains)} epochs, level in {level}, behind in {len(gains) - ahead - level}",
              "Best epochs and best members are picked on these test images themselves, so their figures flatter."]
    return "\n".join(lines)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def points(gain: float) -> str:
    """A gain with its sign: "+1.39 percentage points"."""
    return f"{gain:+.2f} percentage points"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    return ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in (header, *rows)]


def write(folder: Path, report: dict, last: Committee) -> list[Path]:
    """Write committee.json, committee.csv (a line for each member and committee of each epoch) and the last epoch's
    confusion_matrix.csv (a row for each true class), each whole or not at all. Returns their paths.
    """
    lines = [["epoch", "name", "top1", "top5", "loss", "gain", "checkpoint", "sha256"]]
    for entry in report["epochs"]:
        lines += [[entry["epoch"], m["name"], m["top1"], m["top5"], m["loss"], "", m["checkpoint"], m["sha256"]]
                  for m in entry["members"]]
        ours = entry["committee"]
        lines.append([entry["epoch"], "committee", ours["top1"], ours["top5"], ours["loss"], entry["gain"], "", ""])
    matrix = confusion_matrix(last.probabilities, last.labels).tolist()
    write_json(folder / "committee.json", report)
    write_text(folder / "committee.csv", _csv(lines))
    write_text(folder / "confusion_matrix.csv", _csv([["true \\ predicted", *last.classes],
                                                      *([name, *row] for name, row in zip(last.classes, matrix))]))
    return [folder / name for name in ("committee.json", "committee.csv", "confusion_matrix.csv")]


def _csv(lines: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
