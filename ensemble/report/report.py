"""The committee's result as numbers, as text and as files.

A report is a plain dict, ready for JSON; accuracies are in percent, gains in percentage points, losses in nats:

    format version combination dataset fingerprint images classes    what was combined, and on what it was tested
    left_out      by member, the epochs that not all members have
    epochs        a list of {epoch, members, committee, best_member, gain}, where
                  members are {name, space, epoch, seed, stage, checkpoint, sha256, weight, TEMPERATURE, FIGURES},
                  checkpoint relative to the root,
                  committee is {TEMPERATURE, FIGURES, diversity, uncertainty},
                  and best_member is the one with the highest top-1 on the test images, of equals the one with the
                  lowest loss, and then the first by name
    held_out      None, or what the held-out images did: {images, fingerprint, pool, used_for, path, best_member};
                  then members and committee of the last epoch have `calibrated`: {TEMPERATURE, FIGURES}
    significance  {over_best_member, over_other}, each None or {name, top1, loss, mcnemar} of `significance.compare`
    shift         None, or what `corruptions.summarise` returns
    reference     None, or the published curve and ours beside it, as of `reference.beside`

TEMPERATURE is temperature, by which logits are divided, and temperature_bound: None, or "lower" or "upper" where the
fit stopped at that end of `calibration.RANGE`, for want of a minimum before it.
FIGURES are top1, top5, loss, brier, ece, adaptive_ece, per_class. ece and adaptive_ece are fractions; per_class are
percents by class, None for a class without images.
"""
import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

import conas
from conas.data.images import full_name
from conas.files import write_json, write_text
from ensemble.combine.calibration import apply_temperature, bound
from ensemble.combine.committee import Committee, span
from ensemble.combine.fit import Fit
from ensemble.measure import metrics
from ensemble.measure.diversity import diversity, uncertainty
from ensemble.measure.metrics import confusion_matrix, nll, softmax, topk_accuracy
from ensemble.report import reference


def measure(probabilities: Tensor, labels: Tensor) -> dict:
    """The FIGURES of (N, K) probabilities."""
    per_class = metrics.per_class_accuracy(probabilities, labels).tolist()
    return {"top1": 100 * topk_accuracy(probabilities, labels), "top5": 100 * topk_accuracy(probabilities, labels, 5),
            "loss": nll(probabilities, labels), "brier": metrics.brier(probabilities, labels),
            "ece": metrics.ece(probabilities, labels), "adaptive_ece": metrics.adaptive_ece(probabilities, labels),
            "per_class": [None if math.isnan(p) else 100 * p for p in per_class]}


def evaluate(committee: Committee, checkpoints: Mapping[str, str], fitted: Fit | None = None) -> dict:
    """One entry of a report's `epochs`, that of its latest member. `checkpoints` are the members' paths by name.

    Members are measured as they are, without temperature. `fitted` adds what temperature scaling makes of each.
    """
    probabilities = softmax(committee.logits)
    members = [{"name": name, "space": scores.space, "epoch": scores.epoch, "seed": scores.seed, "stage": scores.stage,
                "checkpoint": checkpoints[name], "sha256": scores.checkpoint_sha256, "weight": weight,
                **_temperature(temperature), **measure(p, scores.labels)}
               for (name, scores), p, weight, temperature in zip(
                   committee.members.items(), probabilities, committee.weights.tolist(),
                   committee.temperatures.tolist())]
    answers = probabilities.argmax(dim=2)
    scaled = softmax(committee.logits / committee.temperatures[:, None, None])
    doubt = uncertainty(scaled, committee.weights)
    varied = diversity(answers, committee.labels)
    ours = {**_temperature(committee.temperature), **measure(committee.probabilities, committee.labels),
            "diversity": {"disagreement": 100 * varied.disagreement, "q_statistic": varied.q_statistic,
                          "oracle": 100 * varied.oracle},
            "uncertainty": {name: values.mean().item() for name, values in doubt._asdict().items()}}
    if fitted is not None:
        for member, p, own in zip(members, probabilities, fitted.own_temperatures.tolist()):
            member["calibrated"] = {**_temperature(own), **measure(apply_temperature(p, own), committee.labels)}
        own = fitted.own_temperature
        ours["calibrated"] = {**_temperature(own), **measure(
            apply_temperature(committee.probabilities, own / committee.temperature), committee.labels)}
    best = min(members, key=lambda member: (-member["top1"], member["loss"], member["name"]))
    return {"epoch": max(scores.epoch for scores in committee.members.values()), "members": members, "committee": ours,
            "best_member": best["name"], "gain": ours["top1"] - best["top1"]}


def _temperature(value: float) -> dict:
    return {"temperature": value, "temperature_bound": bound(value)}


def bounds_reached(entry: dict) -> list[str]:
    """A sentence for every temperature in an entry of `epochs` that is an end of its range."""
    sentences = []
    for name, figures in [*((m["name"], m) for m in entry["members"]), ("committee", entry["committee"])]:
        fitted = figures.get("calibrated", figures)
        if end := fitted.get("temperature_bound"):
            sentences.append(f"{name}: T = {fitted['temperature']:g} is the {end} bound of the range, not a minimum; "
                             "its loss on held-out images still falls beyond it")
    return sentences


def assemble(epochs: Sequence[dict], last: Committee, left_out: Mapping[str, Sequence[int]],
             fitted: Fit | None = None, significance: dict | None = None, shift: dict | None = None) -> dict:
    """The report of what `evaluate` returned for all common epochs, `last` being the committee of the last one."""
    return {"format": "conas-committee", "version": conas.__version__,
            "combination": fitted.combination if fitted else last.combination,
            "dataset": last.dataset, "fingerprint": last.fingerprint, "images": len(last.labels),
            "classes": last.classes, "left_out": dict(left_out), "epochs": list(epochs),
            "held_out": fitted and {**fitted.about, "best_member": fitted.best_member},
            "significance": significance or {"over_best_member": None, "over_other": None}, "shift": shift,
            "reference": reference.beside(epochs)}


def as_text(report: dict) -> str:
    """The report for the terminal: the last epoch, what decided it and how sure it is, then all epochs if several."""
    epochs, last, classes = report["epochs"], report["epochs"][-1], len(report["classes"])
    lines = [f"Committee of {len(last['members'])} by {report['combination']}: {full_name(report['dataset'])}, "
             f"{report['images']} test images, {classes} classes"]
    lines += [f"{name} also has epoch{'s' * (len(extra) > 1)} {span(extra)}: left out, since not all members have them"
              for name, extra in report["left_out"].items()]

    columns = {"top-1 %": ("top1", ".2f"), "top-5 %": ("top5", ".2f"), "loss": ("loss", ".4f"),
               "Brier": ("brier", ".4f"), "ECE": ("ece", ".4f"), "adaptive ECE": ("adaptive_ece", ".4f")}
    if classes <= 5:  # the five best of five classes are always right
        del columns["top-5 %"]
    figures = [(member["name"], member) for member in last["members"]] + [("committee", last["committee"])]
    header, rows = list(columns), [[name, *(format(f[key], form) for key, form in columns.values())]
                                   for name, f in figures]
    if report["held_out"]:
        header += ["calibrated: T", "loss", "ECE"]
        for row, (_, f) in zip(rows, figures):
            row += [f"{f['calibrated']['temperature']:.3f}{' (bound)' * bool(f['calibrated']['temperature_bound'])}",
                    f"{f['calibrated']['loss']:.4f}", f"{f['calibrated']['ece']:.4f}"]
    if len({member["weight"] for member in last["members"]}) > 1:
        header.append("weight")
        for row, (_, f) in zip(rows, figures):
            row.append(f"{f.get('weight', 1):.3f}")
    alike = len({member["epoch"] for member in last["members"]}) == 1
    lines += ["", *table([f"epoch {last['epoch']}" if alike else "member", *header], rows), *bounds_reached(last),
              *_evidence(report), *_published(report)]
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


def _evidence(report: dict) -> list[str]:
    """What the last epoch's committee gains, how its members differ, and which images decided what."""
    last, held_out, significance = report["epochs"][-1], report["held_out"], report["significance"]
    lines = []
    if not significance["over_best_member"]:
        lines.append(f"gain over {last['best_member']}, the best member of this epoch: {points(last['gain'])} in top-1 "
                     f"({last['gain'] * report['images'] / 100:+.0f} images)")
    for key, title in ("over_best_member", "the best on held-out images"), ("over_other", "the other committee"):
        if gain := significance[key]:
            top1, loss, test = gain["top1"], gain["loss"], gain["mcnemar"]
            lines += [f"gain over {gain['name']}, {title}: {points(top1['gain'])} in top-1, 95 % interval "
                      f"{top1['low']:+.2f} to {top1['high']:+.2f};",
                      f"    loss lower by {loss['gain']:.4f}, {loss['low']:+.4f} to {loss['high']:+.4f}; exact McNemar "
                      f"test p = {test['p']:.2g} (right alone on {test['only_ours']} and {test['only_theirs']} images)"]
    varied, doubt = last["committee"]["diversity"], last["committee"]["uncertainty"]
    if len(last["members"]) > 1:
        q = "" if varied["q_statistic"] is None else f" (Q-statistic {varied['q_statistic']:.2f})"
        lines.append(f"two members disagree on {varied['disagreement']:.2f} % of the images{q}, one at least is right "
                     f"on {varied['oracle']:.2f} %;")
        lines.append(f"    uncertainty: {doubt['total']:.3f} nats, of which {doubt['expected']:.3f} within the members "
                     f"and {doubt['mutual_information']:.3f} between them")
    if shift := report["shift"]:
        errors = ", ".join(f"{name} {error:.2f}" for name, error in shift["mce"].items())
        lines.append(f"mean error in % under {len(shift['names'])} corruptions ({shift['source']}) at "
                     f"{len(shift['severities'])} severities: {errors}")
    if held_out:
        lines.append(f"{held_out['images']} held-out training images, which no member's weights have seen, decided "
                     f"{', '.join(held_out['used_for'])}")
        lines.append(f"and the calibrated figures; the {report['images']} test images decided nothing of this")
    return lines


def _published(report: dict) -> list[str]:
    """The published curve beside the epochs of the report."""
    if not (published := report.get("reference")):
        return []
    header, rows = reference.table_rows(published, report["epochs"])
    return ["", *(table(header, rows) if rows else []), reference.note(published, report["images"])]


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
    """Write committee.json, committee.csv (a line for each member and committee of each epoch) and of the last epoch
    confusion_matrix.csv (a row for each true class) and images.csv (a row for each test image: the committee's answer,
    its uncertainty and the members' votes), each whole or not at all. Returns their paths.
    """
    figures = "top1", "top5", "loss", "brier", "ece", "adaptive_ece"
    lines = [["epoch", "name", *figures, "gain", "weight", "temperature", "temperature_bound", "checkpoint",
              "sha256"]]
    for entry in report["epochs"]:
        ours = entry["committee"]
        lines += [[entry["epoch"], m["name"], *(m[key] for key in figures), "", m["weight"], m["temperature"],
                   m["temperature_bound"], m["checkpoint"], m["sha256"]] for m in entry["members"]]
        lines.append([entry["epoch"], "committee", *(ours[key] for key in figures), entry["gain"], "",
                      ours["temperature"], ours["temperature_bound"], "", ""])
    matrix = confusion_matrix(last.probabilities, last.labels).tolist()
    write_json(folder / "committee.json", report)
    write_text(folder / "committee.csv", _csv(lines))
    write_text(folder / "confusion_matrix.csv", _csv([["true \\ predicted", *last.classes],
                                                      *([name, *row] for name, row in zip(last.classes, matrix))]))
    write_text(folder / "images.csv", _csv(_images(last)))
    return [folder / name for name in ("committee.json", "committee.csv", "confusion_matrix.csv", "images.csv")]


def _images(committee: Committee) -> list[list]:
    """Each image's label, answer, its probability, uncertainty in nats, and every member's vote."""
    scaled = softmax(committee.logits / committee.temperatures[:, None, None])
    doubt, (probability, answer) = uncertainty(scaled, committee.weights), committee.probabilities.max(dim=1)
    names, votes = committee.classes, committee.logits.argmax(dim=2).T.tolist()
    rows = zip(committee.labels.tolist(), answer.tolist(), probability.tolist(),
               *(values.tolist() for values in doubt), votes)
    return [["image", "label", "answer", "probability", *doubt._fields, *committee.members],
            *([i, names[y], names[a], f"{p:.6f}", *(f"{u:.6f}" for u in us), *(names[v] for v in vote)]
              for i, (y, a, p, *us, vote) in enumerate(rows))]


def _csv(lines: Sequence[Sequence]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
