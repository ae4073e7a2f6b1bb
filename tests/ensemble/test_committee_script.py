"""test_ensemble.py on stored probabilities: its members, rules, figures and files, and what it refuses."""
import csv
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

import test_ensemble
from conas import cli
from conas.runs import checkpoint
from conas.runs.scores import load_scores, save_scores
from ensemble.combine.committee import Committee
from ensemble.measure import metrics
from tests.ensemble.test_report import CLASSES, make_scores
from tests.helpers import launch


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A root with three spaces and no run, in which `test_ensemble.py` then works."""
    for n in (1, 2, 3):
        (tmp_path / f"cnn_space{n}").mkdir()
        (tmp_path / f"cnn_space{n}" / "model_search.py").touch()
    monkeypatch.setattr(test_ensemble, "ROOT", tmp_path)
    return tmp_path


def add_run(root: Path, n: int, epochs, save="EXP", held_out=True, **options):
    """Tested checkpoints. Their files hold no network: only stored probabilities that fit by content can be used."""
    for epoch in epochs:
        path = root / f"cnn_space{n}" / f"search-{save}" / "checkpoints" / f"epoch_{epoch:03d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{n} {epoch}".encode())
        for split, suffix in (("test", ""), ("valid", ".valid"))[:1 + held_out]:
            scores = make_scores(f"cnn_space{n}", epoch, n, sha256=checkpoint.sha256(path), split=split, **options)
            save_scores(path.parent.parent / "probabilities" / f"{path.stem}{suffix}.npz", scores)


def start(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["test_ensemble.py", *arguments])
    code = cli.run(test_ensemble.main)
    return code, *capsys.readouterr()


def test_script_combines_stored_probabilities(root, monkeypatch, capsys):
    for n, epochs in ((1, 3), (2, 5), (3, 3)):
        add_run(root, n, range(epochs))
    code, out, err = start(monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert "cnn_space2 also has epochs 3 to 4: left out" in out
    summary = json.loads((root / "committee-EXP" / "committee.json").read_text(encoding="utf-8"))
    assert [entry["epoch"] for entry in summary["epochs"]] == [0, 1, 2]
    for entry in summary["epochs"]:
        for member in entry["members"]:
            assert checkpoint.sha256(root / member["checkpoint"]) == member["sha256"]
    members = {f"cnn_space{n}": make_scores(f"cnn_space{n}", 2, n) for n in (1, 2, 3)}
    expected = metrics.nll(Committee(members).probabilities, members["cnn_space1"].labels)
    assert summary["epochs"][-1]["committee"]["loss"] == expected
    assert sorted(path.name for path in (root / "committee-EXP").iterdir()) == [
        "accuracy_by_epoch.png", "accuracy_by_epoch.svg", "committee.csv", "committee.json", "confusion_matrix.csv",
        "confusion_matrix.png", "confusion_matrix.svg", "images.csv"]


def test_flags_have_an_effect(root, monkeypatch, capsys):
    for n in (1, 2, 3):
        add_run(root, n, [0], save="other")
    code, out, _ = start(monkeypatch, capsys, "--save", "other", "--spaces", "cnn_space3", "cnn_space1",
                         "--combination", "logit_sum")
    assert code == 0
    assert "Committee of 2 by logit_sum" in out
    summary = json.loads((root / "committee-other" / "committee.json").read_text(encoding="utf-8"))
    assert [member["name"] for member in summary["epochs"][0]["members"]] == ["cnn_space1", "cnn_space3"]
    logits = torch.stack([make_scores("", 0, n).logits for n in (1, 3)])
    assert summary["epochs"][0]["committee"]["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits.double().sum(dim=0), make_scores("", 0).labels).item(), rel=1e-12)


def test_a_space_without_a_run_is_named(root, monkeypatch, capsys):
    add_run(root, 1, [0], classes=CLASSES[:2])
    add_run(root, 3, [0], classes=CLASSES[:2])
    code, out, _ = start(monkeypatch, capsys)
    assert code == 0
    assert "cnn_space2: no checkpoints in search-EXP, left out" in out


@pytest.mark.parametrize("runs, arguments, message", [
    ([], [], "none of the chosen spaces has checkpoints in search-EXP, and a committee needs two members: "
             "cd cnn_space1 && python train_search.py\n"),
    ([1], [], "only cnn_space1 has checkpoints in search-EXP, and a committee needs two members: "
              "cd cnn_space2 && python train_search.py\n"),
    ([1, 2], ["--save", "X"], "python train_search.py --save X\n"),
    ([1, 2], ["--save", "../X"], "--save ../X: "),
    ([1, 2], ["--spaces", "cnn_space1", "cnn_space1"], "only cnn_space1 has checkpoints"),
    ([1, 2], ["--spaces", "cnn_space9"], "--spaces cnn_space9: no such folder; there are cnn_space1, cnn_space2, "),
    ([1, 2], ["--combination", "sum"], "--combination: invalid choice: 'sum'"),
])
def test_what_is_missing_gets_one_line(root, monkeypatch, capsys, runs, arguments, message):
    for n in runs:
        add_run(root, n, [0])
    code, out, err = start(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(root.glob("committee-*"))


def test_probabilities_of_another_checkpoint_are_not_used(root, monkeypatch, capsys):
    for n in (1, 2):
        add_run(root, n, [0])
    (root / "cnn_space2/search-EXP/checkpoints/epoch_000.pt").write_bytes(b"another network")
    code, _, err = start(monkeypatch, capsys)
    assert code == 2
    assert "cnn_space2/search-EXP/checkpoints/epoch_000.pt" in err


def test_the_script_starts_from_any_folder():
    script = Path(test_ensemble.__file__).resolve()
    finished = launch.start(script, "--save", "no-such-run", cwd="/")
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: none of the chosen spaces has checkpoints in search-no-such-run")


def result(root, save="EXP"):
    return json.loads((root / f"committee-{save}" / "committee.json").read_text(encoding="utf-8"))


def test_figures_of_members_and_committee_are_those_of_metrics(root, monkeypatch, capsys):
    for n in (1, 2, 3):
        add_run(root, n, [0, 1])
    assert start(monkeypatch, capsys)[0] == 0
    entry = result(root)["epochs"][-1]
    scores = make_scores("cnn_space2", 1, 2)
    member, p = entry["members"][1], scores.logits.double().softmax(dim=1)
    assert member["brier"] == pytest.approx(metrics.brier(p, scores.labels))
    assert member["ece"] == pytest.approx(metrics.ece(p, scores.labels))
    assert member["adaptive_ece"] == pytest.approx(metrics.adaptive_ece(p, scores.labels))
    assert member["per_class"] == pytest.approx((100 * metrics.per_class_accuracy(p, scores.labels)).tolist())
    assert (member["weight"], member["temperature"], member["seed"]) == (pytest.approx(1 / 3), 1, 2)
    doubt = entry["committee"]["uncertainty"]
    assert doubt["total"] == pytest.approx(doubt["expected"] + doubt["mutual_information"])
    assert entry["committee"]["diversity"]["oracle"] >= max(m["top1"] for m in entry["members"])


def test_the_best_member_is_chosen_on_held_out_images_and_the_gain_tested(root, monkeypatch, capsys):
    for n in (1, 2, 3):
        add_run(root, n, [0])
    _, out, _ = start(monkeypatch, capsys)
    held_out = {n: make_scores("", 0, n, split="valid") for n in (1, 2, 3)}
    best = max(held_out, key=lambda n: (held_out[n].top(1), -held_out[n].loss()))
    summary = result(root)
    gain = summary["significance"]["over_best_member"]
    assert gain["name"] == summary["held_out"]["best_member"] == f"cnn_space{best}"
    top1 = [member["top1"] for member in summary["epochs"][-1]["members"]][best - 1]
    assert gain["top1"]["gain"] == pytest.approx(summary["epochs"][-1]["committee"]["top1"] - top1)
    assert gain["top1"]["low"] <= gain["top1"]["gain"] <= gain["top1"]["high"]
    assert "95 % interval" in out and "McNemar" in out
    assert "40 held-out training images, which no member's weights have seen, decided the choice of the best" in out
    assert "the 40 test images decided nothing" in out


def test_without_held_out_images_plain_rules_go_on_and_fitted_ones_do_not(root, monkeypatch, capsys):
    for n in (1, 2):
        add_run(root, n, [0], held_out=False)
    code, out, _ = start(monkeypatch, capsys)
    assert code == 0
    assert "the held-out images were not scored" in out and "the best member of this epoch" in out
    assert result(root)["held_out"] is None
    for flags in (["--combination", "greedy"], ["--temperatures", "members"]):
        code, _, err = start(monkeypatch, capsys, *flags)
        assert code == 2 and "epoch_000.pt" in err


@pytest.mark.parametrize("combination", ["weighted", "greedy", "beam"])
def test_fitted_rules_use_what_they_say(root, monkeypatch, capsys, combination):
    for n in (1, 2, 3):
        add_run(root, n, range(3))
    code, _, err = start(monkeypatch, capsys, "--combination", combination, "--size", "4")
    assert code == 0, err
    summary = result(root)
    pool = 3 if combination == "weighted" else 9
    assert summary["combination"] == combination and summary["held_out"]["pool"] == pool
    members = summary["epochs"][-1]["members"]
    assert sum(member["weight"] for member in members) == pytest.approx(1)
    scores = [make_scores("", member["epoch"], int(member["space"][-1])) for member in members]
    mean = sum(m["weight"] * s.logits.double().softmax(dim=1) for m, s in zip(members, scores))
    assert summary["epochs"][-1]["committee"]["loss"] == pytest.approx(metrics.nll(mean, scores[0].labels))
    if combination != "weighted":
        assert len(summary["held_out"]["path"]) == 4


def test_members_are_checkpoints_of_any_spaces_seeds_and_epochs(root, monkeypatch, capsys):
    add_run(root, 1, [0, 1], save="a")
    add_run(root, 1, [0], save="b")
    add_run(root, 3, [2], save="b")
    add_run(root, 2, [0], save="c")
    code, _, err = start(monkeypatch, capsys, "--members", "cnn_space*/search-b/checkpoints/*.pt",
                           str(root / "cnn_space1/search-a/checkpoints/epoch_001.pt"), "--save", "mixed",
                           "--against", "cnn_space1/search-[ab]/checkpoints/*.pt")
    assert code == 0, err
    summary = result(root, "mixed")
    assert [member["name"] for member in summary["epochs"][0]["members"]] == [
        "cnn_space1/search-b 000", "cnn_space3/search-b 002", "cnn_space1/search-a 001"]
    over = summary["significance"]["over_other"]
    rivals = Committee({str(i): make_scores("", epoch, 1) for i, epoch in enumerate([0, 1, 0])})
    ours = summary["epochs"][0]["committee"]
    assert over["top1"]["gain"] == pytest.approx(
        ours["top1"] - 100 * metrics.topk_accuracy(rivals.probabilities, rivals.labels))
    assert over["loss"]["gain"] == pytest.approx(metrics.nll(rivals.probabilities, rivals.labels) - ours["loss"])


@pytest.mark.parametrize("change", [
    lambda scores: dataclasses.replace(scores, labels=scores.labels[:20], logits=scores.logits[:20]),  # a tenth
    lambda scores: dataclasses.replace(scores, fingerprint="of another --split_seed"),
])
def test_members_with_unlike_held_out_images_are_combined_by_plain_rules(root, monkeypatch, capsys, change):
    for n in (1, 2, 3):
        add_run(root, n, [0])
    (root / "cnn_space2/search-EXP").rename(root / "cnn_space2/train-EXP")
    path = root / "cnn_space2/train-EXP/probabilities/epoch_000.valid.npz"
    save_scores(path, change(load_scores(path)))
    flags = ["--members", "cnn_space*/*/checkpoints/epoch_000.pt"]
    code, out, err = start(monkeypatch, capsys, *flags, "--against", "cnn_space[12]/*/checkpoints/*.pt")
    assert (code, err) == (0, "")
    line = out.splitlines()[0]
    assert line.startswith("no held-out images in common, and so no calibration and no test of the gain over the best "
                           "member: cnn_space1/search-EXP 000 (epoch 0) and cnn_space2/train-EXP 000 (epoch 0) hold")
    assert "calibrated" not in out.split(line)[1]
    summary = result(root)
    assert summary["held_out"] is None and summary["significance"]["over_best_member"] is None
    assert summary["significance"]["over_other"] is not None
    members = {str(n): make_scores("", 0, n) for n in (1, 2, 3)}
    assert summary["epochs"][0]["committee"]["loss"] == metrics.nll(Committee(members).probabilities,
                                                                   members["1"].labels)
    for fitted in (["--combination", "weighted"], ["--combination", "greedy"], ["--temperatures", "members"]):
        code, _, err = start(monkeypatch, capsys, *flags, *fitted)
        assert code == 2 and err.count("\n") == 1 and "hold out different" in err and "nothing can be fitted" in err

    path = root / "cnn_space2/train-EXP/probabilities/epoch_000.npz"  # other test images, too
    save_scores(path, change(load_scores(path)))
    code, out, err = start(monkeypatch, capsys, *flags)
    assert (code, out) == (2, "") and "were tested on different" in err and "cannot be combined" in err


def test_one_network_of_published_cells_is_a_rival_or_a_member(root, monkeypatch, capsys):
    for n in (1, 2):
        add_run(root, n, [0])
    path = root / "cnn/train-EXP/checkpoints/epoch_000.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a network")
    (root / "cnn/genotypes.py").touch()
    for split, suffix in ("test", ""), ("valid", ".valid"):
        save_scores(root / f"cnn/train-EXP/probabilities/epoch_000{suffix}.npz",
                    make_scores("cnn", 0, 3, sha256=checkpoint.sha256(path), split=split))
    ours, rival = "cnn_space*/search-EXP/checkpoints/*.pt", "cnn/train-EXP/checkpoints/epoch_000.pt"
    code, _, err = start(monkeypatch, capsys, "--members", ours, "--against", rival)
    assert (code, err) == (0, "")
    found = result(root)["significance"]["over_other"]["top1"]["gain"]
    committee, alone = Committee({str(n): make_scores("", 0, n) for n in (1, 2)}), make_scores("", 0, 3)
    top1 = [(answers.argmax(1) == alone.labels).double().mean() for answers in (committee.probabilities, alone.logits)]
    assert found == pytest.approx(100 * float(top1[0] - top1[1]))
    assert start(monkeypatch, capsys, "--members", ours, rival)[0] == 0
    assert len(result(root)["epochs"][0]["members"]) == 3
    code, _, err = start(monkeypatch, capsys, "--spaces", "cnn_space1", "cnn_space2", "--members", ours, rival)
    assert code == 2 and "no known space" in err


@pytest.mark.parametrize("arguments, message", [
    (["--members", "nothing/*.pt"], "--members nothing/*.pt: no checkpoint has such a path"),
    (["--members", "cnn_space1/search-EXP/checkpoints/epoch_000.pt"], "a committee needs two members"),
    (["--members", "elsewhere/search-EXP/checkpoints/*.pt"], "no known space"),
    (["--combination", "greedy", "--size", "0"], "--size 0"),
    (["--objective", "ece"], "--objective"),
])
def test_wrong_members_get_one_line(root, monkeypatch, capsys, arguments, message):
    for n in (1, 2):
        add_run(root, n, [0])
    (root / "elsewhere/search-EXP/checkpoints").mkdir(parents=True)
    (root / "elsewhere/search-EXP/checkpoints/epoch_000.pt").touch()
    code, _, err = start(monkeypatch, capsys, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_reordered_member_is_refused_by_the_script(root, monkeypatch, capsys):
    for n in (1, 2):
        add_run(root, n, [0])
    path = root / "cnn_space2/search-EXP/probabilities/epoch_000.npz"
    scores = load_scores(path)
    save_scores(path, dataclasses.replace(scores, labels=scores.labels.flip(0), logits=scores.logits.flip(0)))
    code, _, err = start(monkeypatch, capsys)
    assert code == 2 and "cnn_space1" in err and "cnn_space2" in err and "labels" in err


def test_images_csv_holds_every_answer(root, monkeypatch, capsys):
    for n in (1, 2):
        add_run(root, n, [0])
    start(monkeypatch, capsys)
    with open(root / "committee-EXP" / "images.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    committee = Committee({f"cnn_space{n}": make_scores("", 0, n) for n in (1, 2)})
    assert [row["answer"] for row in rows] == [CLASSES[k] for k in committee.probabilities.argmax(dim=1).tolist()]
    assert [row["label"] for row in rows] == [CLASSES[k] for k in committee.labels.tolist()]
    votes = make_scores("", 0, 2).logits.argmax(dim=1).tolist()
    assert [row["cnn_space2"] for row in rows] == [CLASSES[k] for k in votes]
    assert all(float(row["total"]) >= float(row["mutual_information"]) >= 0 for row in rows)
