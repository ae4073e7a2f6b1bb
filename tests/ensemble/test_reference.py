"""The published curve beside ours: where it is shown, and that its figures stand beside the right ones of ours."""
import pytest
import torch

from ensemble.combine.committee import Committee
from ensemble.report.page import Page
from tests.ensemble.test_committee_script import add_run, result, root, start  # noqa: F401
from tests.ensemble.test_report import make_scores

CIFAR = {"classes": [f"class {k}" for k in range(10)], "dataset": "cifar10_jpeg"}


def test_the_published_curve_lies_under_a_search_on_cifar10(root, monkeypatch, capsys):
    for n in (1, 2, 3):
        add_run(root, n, range(3), **CIFAR)
    code, out, err = start(monkeypatch, capsys)
    assert code == 0, err
    published = result(root)["reference"]
    assert {name: len(line) for name, line in published["top1"].items()} == dict.fromkeys(
        ("committee", "space 1", "space 2", "space 3", "unrestricted"), 50)
    for epoch in range(3):
        logits = torch.stack([make_scores("", epoch, n, **CIFAR).logits.double() for n in (1, 2, 3)])
        labels = make_scores("", 0, **CIFAR).labels
        for rule, combined in (("logit_sum", logits.sum(dim=0)), ("mean_softmax", logits.softmax(dim=2).mean(dim=0))):
            right = (combined.argmax(dim=1) == labels).double().mean().item()
            assert published["ours"][rule][epoch] == pytest.approx(100 * right)
    rows = {row.split()[0]: row.split() for row in out.splitlines() if row.split()[:1] in (["0"], ["1"], ["2"])}
    assert [rows[str(epoch)][3] for epoch in range(3)] == ["53.65", "63.94", "68.01"]
    assert [rows[str(epoch)][5] for epoch in range(3)] == ["47.74", "58.47", "63.22"]
    assert "commit 19b061f" in out and "92.08" in out and "of all 10,000 test images, ours of 40" in out
    assert "cifar10_jpeg (JPEG copy, quality 75), 40 test images" in out
    svg = (root / "committee-EXP" / "accuracy_by_epoch.svg").read_text(encoding="utf-8")
    for label in ("published: committee", "published: supernets", "committee, logits summed", "JPEG copy, quality 75"):
        assert f"<!-- {label} -->" in svg or label in svg, label
    members = {f"cnn_space{n}": make_scores("", 2, n, **CIFAR) for n in (1, 2, 3)}
    page = Page(result(root), Committee(members), [], None, None).sections({})
    assert page["epochs"][1].count('class="line muted"') == 5 and "logits summed" in page["epochs"][1]
    assert "cifar10_jpeg (JPEG copy, quality 75)" in page["provenance"][1]


@pytest.mark.parametrize("options, flags", [
    (CIFAR | {"dataset": "digits"}, []), (CIFAR | {"dataset": "cifar100"}, []), (CIFAR, ["--no-reference"])])
def test_other_data_have_no_published_curve(root, monkeypatch, capsys, options, flags):
    for n in (1, 2):
        add_run(root, n, [0, 1], **options)
    code, out, err = start(monkeypatch, capsys, *flags)
    assert code == 0, err
    assert result(root)["reference"] is None and "published" not in out
    assert "published" not in (root / "committee-EXP" / "accuracy_by_epoch.svg").read_text(encoding="utf-8")


def test_a_curve_that_is_asked_for_beside_other_data_is_refused(root, monkeypatch, capsys):
    for n in (1, 2):
        add_run(root, n, [0])
    code, _, err = start(monkeypatch, capsys, "--reference")
    assert code == 2 and "of the stage search on digits; leave it out" in err


def test_more_epochs_than_the_published_run_has(root, monkeypatch, capsys):
    for n in (1, 2):
        add_run(root, n, [*range(0, 48, 3), *range(48, 53)], **CIFAR)
    code, out, err = start(monkeypatch, capsys)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if len(line.split()) == 6 and line.split()[0].isdigit()]
    assert rows[-1][0] == "49" and rows[-1][3] == "92.08" and 6 <= len(rows) <= 12
    members = {f"cnn_space{n}": make_scores("", 52, n, **CIFAR) for n in (1, 2)}
    assert "<polyline" in Page(result(root), Committee(members), [], None, None).epochs()
