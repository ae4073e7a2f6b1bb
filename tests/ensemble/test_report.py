"""The committee's report: its numbers, text, files and pictures."""
import csv
import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from conas.runs.scores import Scores
from ensemble.combine.committee import Committee
from ensemble.combine.fit import fit
from ensemble.measure import metrics
from ensemble.report import pictures, report
from ensemble.report.page import Page

CLASSES = ["plain", "comma, \"quote\"", "<script>alert(1)</script>", "$x^{$", "ä--日", "a long name " * 5]


def make_scores(space, epoch, seed=0, images=40, classes=CLASSES, sha256="0" * 64, split="test",
                dataset="digits"):
    generator = torch.Generator().manual_seed(1000 * seed + epoch + 500 * (split == "valid"))
    labels = torch.arange(images) % len(classes)
    logits = 2 * torch.randn(images, len(classes), generator=generator)
    logits[torch.arange(images), labels] += 1 + 0.3 * epoch
    return Scores(logits=logits, labels=labels, space=space, stage="search", epoch=epoch, seed=seed, split=split,
                  checkpoint_sha256=sha256, dataset=dataset, fingerprint=split * 16, classes=list(classes))


def make_report(epochs=4, members=3, **options):
    entries = []
    for epoch in range(epochs):
        committee = Committee({f"m{i}": make_scores(f"m{i}", epoch, i, **options) for i in range(members)})
        entries.append(report.evaluate(committee, {f"m{i}": f"m{i}/epoch_{epoch:03d}.pt" for i in range(members)}))
    return report.assemble(entries, committee, {"m0": [epochs]}), committee


def from_answers(*answers):
    """A committee of members that are right (1) or wrong (0) on each image, equally sure each time."""
    members = {f"m{index}": dataclasses.replace(
        make_scores(f"m{index}", 0, images=len(right), classes=["yes", "no"]),
        labels=torch.zeros(len(right), dtype=torch.int64),
        logits=torch.tensor([[2.0, 0.0] if r else [0.0, 2.0] for r in right])) for index, right in enumerate(answers)}
    return report.evaluate(Committee(members), dict.fromkeys(members, "x.pt"))


def test_evaluate_measures_members_and_committee():
    summary, committee = make_report()
    last = summary["epochs"][-1]
    for entry, scores in zip(last["members"], committee.members.values()):
        assert entry["top1"] == pytest.approx(scores.top(1), abs=1e-12)
        assert entry["top5"] == pytest.approx(scores.top(5), abs=1e-12)
        assert entry["loss"] == pytest.approx(scores.loss(), rel=1e-12)
    mean = sum(scores.logits.double().softmax(dim=1) for scores in committee.members.values()) / 3
    right = (mean.argmax(dim=1) == committee.labels).double().mean().item()
    assert last["committee"]["top1"] == pytest.approx(100 * right)
    assert last["committee"]["loss"] == pytest.approx(-mean[torch.arange(40), committee.labels].log().mean().item())


def test_a_temperature_at_a_bound_is_called_one_everywhere(tmp_path):
    valid = {f"m{i}": make_scores(f"m{i}", 0, i, split="valid") for i in range(3)}
    valid["m0"].logits /= -1  # wrong wherever it is sure
    valid["m1"].logits /= 1000
    members = {name: dataclasses.replace(scores, split="test", fingerprint="test") for name, scores in valid.items()}
    fitted = fit(valid, "mean_softmax", temperatures=["members"])
    committee = fitted.committee(members)
    entry = report.evaluate(committee, dict.fromkeys(members, "x.pt"), fitted)
    assert [m["temperature_bound"] for m in entry["members"]] == ["upper", "lower", None]
    assert [m["calibrated"]["temperature_bound"] for m in entry["members"]] == ["upper", "lower", None]
    assert entry["committee"]["temperature_bound"] is None
    summary = report.assemble([entry], committee, {}, fitted)
    text = report.as_text(summary)
    assert "100.000 (bound)" in text and "0.010 (bound)" in text and text.count("(bound)") == 2
    assert "m0: T = 100 is the upper bound" in text and "m1: T = 0.01 is the lower bound" in text
    page = Page(summary, committee, [], None, None).members()
    assert "m0: T = 100 is the upper bound" in page and "m2: T" not in page
    report.write(tmp_path, summary, committee)
    with open(tmp_path / "committee.csv", encoding="utf-8", newline="") as file:
        assert [row["temperature_bound"] for row in csv.DictReader(file)] == ["upper", "lower", "", ""]


@pytest.mark.parametrize("answers, best, gain", [
    (([1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]), "m0", 25),     # two of three are right; the first of equals
    (([1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]), "m1", -75),    # two poor members outvote the good one
    (([1, 0], [1, 0], [1, 0]), "m0", 0),
])
def test_gain_is_over_the_best_member_and_may_be_negative(answers, best, gain):
    entry = from_answers(*answers)
    assert (entry["best_member"], entry["gain"]) == (best, gain)


def test_the_best_member_has_the_highest_accuracy_and_among_equals_the_lowest_loss():
    labels = torch.zeros(2, dtype=torch.int64)
    sure, unsure, often_wrong = [[9.0, 0], [0, 9.0]], [[1.0, 0], [0, 1.0]], [[0, 0.1], [0, 0.1]]
    members = {name: dataclasses.replace(make_scores(name, 0, images=2, classes=["yes", "no"]), labels=labels,
                                         logits=torch.tensor(logits))
               for name, logits in (("often_wrong", often_wrong), ("sure", sure), ("unsure", unsure))}
    entry = report.evaluate(Committee(members), dict.fromkeys(members, "x.pt"))
    assert entry["members"][0]["loss"] == min(member["loss"] for member in entry["members"])
    assert entry["best_member"] == "unsure"


def test_text_shows_signs_names_and_aligned_columns():
    summary, committee = make_report()
    summary["epochs"][-1] |= {"gain": -2.5, "best_member": "m1"}
    text = report.as_text(summary)
    assert "gain over m1, the best member of this epoch: -2.50 percentage points in top-1 (-1 images)" in text
    assert "m0 also has epoch 4: left out" in text
    for title in ("epoch 3 ", "epochs 0 to 3"):
        lines = text.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(title))
        block = lines[start:start + 5]
        assert len({len(line) for line in block}) == 1
        assert [line.split()[0] for line in block[1:]] == ["m0", "m1", "m2", "committee"]
    assert f"{committee.members['m2'].top(1):.2f}" in text


def test_text_summarises_all_epochs():
    summary, _ = make_report(epochs=3)
    for entry, top1, gain in zip(summary["epochs"], [50, 80, 70], [5, 0, -2]):
        entry["committee"]["top1"], entry["gain"] = top1, gain
    lines = report.as_text(summary).splitlines()
    assert next(line for line in reversed(lines) if line.startswith("committee")).split()[1::2] == ["66.67", "80.00"]
    assert next(line for line in reversed(lines) if line.startswith("committee")).split()[-1] == "1"
    assert "+1.00 percentage points in top-1 on average, from -2.00 to +5.00" in "\n".join(lines)
    assert "ahead in 1 of 3 epochs, level in 1, behind in 1" in "\n".join(lines)


def test_text_has_no_top5_where_it_says_nothing():
    assert "top-5" in report.as_text(make_report()[0])
    assert "top-5" not in report.as_text(make_report(classes=CLASSES[:5])[0])


def test_files_read_back_equal_the_tensors(tmp_path):
    summary, committee = make_report()
    report.write(tmp_path, summary, committee)
    assert json.loads((tmp_path / "committee.json").read_text(encoding="utf-8")) == summary

    with open(tmp_path / "committee.csv", encoding="utf-8", newline="") as file:
        rows = {(int(row["epoch"]), row["name"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4 * (3 + 1)
    for name, scores in committee.members.items():
        assert float(rows[3, name]["top1"]) == 100 * metrics.topk_accuracy(scores.logits, scores.labels)
    assert float(rows[3, "committee"]["loss"]) == metrics.nll(committee.probabilities, committee.labels)
    assert float(rows[2, "committee"]["gain"]) == summary["epochs"][2]["gain"]

    with open(tmp_path / "confusion_matrix.csv", encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header[1:] == [line[0] for line in lines] == CLASSES
    assert [list(map(int, line[1:])) for line in lines] == metrics.confusion_matrix(
        committee.probabilities, committee.labels).tolist()


def test_pictures_show_the_report():
    summary, committee = make_report(members=8)
    figure = pictures.accuracy_figure(summary)
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
    assert list(curves["committee"]) == [entry["committee"]["top1"] for entry in summary["epochs"]]
    assert list(curves["m5"]) == [entry["members"][5]["top1"] for entry in summary["epochs"]]
    looks = {(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].get_lines()}
    assert len(looks) == 9

    matrix = metrics.confusion_matrix(committee.probabilities, committee.labels)
    axes = pictures.confusion_figure(matrix, CLASSES, 3).axes[0]
    written = {tuple(text.get_position()): int(text.get_text()) for text in axes.texts}
    assert written == {(j, i): n for i, row in enumerate(matrix.tolist()) for j, n in enumerate(row) if n}


@pytest.mark.parametrize("classes", [CLASSES, [f"class {k}" for k in range(31)]], ids=len)
def test_pictures_are_whole_and_reproducible(tmp_path, classes):
    summary, committee = make_report(epochs=1, images=200, classes=classes)
    matrix = metrics.confusion_matrix(committee.probabilities, committee.labels)
    first, second = (pictures.draw(tmp_path / name, summary, matrix) for name in "ab")
    assert [path.name for path in first] == ["accuracy_by_epoch.png", "accuracy_by_epoch.svg", "confusion_matrix.png",
                                             "confusion_matrix.svg"]
    for one, other in zip(first, second):
        assert one.read_bytes() == other.read_bytes()
        if one.suffix == ".svg":
            tags = {element.tag.split("}")[-1] for element in ElementTree.parse(one).iter()}
            assert "svg" in tags
            assert "script" not in tags
