"""Predictions that are NaN or infinite are never right, and their epoch is never the best: measures, runs, tests."""
import csv
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_space1 import genotypes as space1
from cnn_space1.model_search import Network
from conas.commands import test as measure
from conas.commands import train
from conas.commands.test_all import ScoredRun, score_checkpoints
from conas.darts import genotype as genotypes
from conas.darts.space import Space
from conas.errors import InputError
from conas.runs import best
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import Run, best_checkpoint
from conas.runs.options import TestOptions
from conas.runs.scores import Scores, is_right, load_scores, mean_loss, save_scores, topk_accuracy
from ensemble.measure import metrics
from tests.helpers.untrained import write_runs

NUMBERS = [math.nan, math.inf, -math.inf, -1.5, 0.0, 0.25, 2.0]
DIVERGING = ["--arch", "DARTS", "--dataset", "digits", "--init_channels", "4", "--layers", "3", "--any_ops",
             "--batch_size", "1024", "--learning_rate", "1e5"]
SMALL = ["--arch", "DARTS", "--dataset", "digits", "--subset", "200", "--init_channels", "2", "--layers", "3",
         "--batch_size", "50"]


@st.composite
def cases(draw):
    """Scores of some images, of which any may be NaN or infinite, and labels."""
    N, K = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    scores = draw(st.lists(st.lists(st.sampled_from(NUMBERS), min_size=K, max_size=K), min_size=N, max_size=N))
    return scores, draw(st.lists(st.integers(0, K - 1), min_size=N, max_size=N))


def right_by_hand(row: list[float], label: int, k: int) -> bool:
    """Whether the label is among the first k classes, sorted by score; never if a score is not finite."""
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    return all(map(math.isfinite, row)) and label in order[:k]


@given(cases(), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_accuracies_are_those_of_a_loop_over_images(case, k):
    rows, labels = case
    scores, y = torch.tensor(rows), torch.tensor(labels)
    hits = [right_by_hand(row, label, k) for row, label in zip(rows, labels)]
    assert topk_accuracy(scores, y, k) == sum(hits) / len(hits)
    firsts = [right_by_hand(row, label, 1) for row, label in zip(rows, labels)]
    assert is_right(scores, y).tolist() == firsts


@given(cases())
@settings(max_examples=200, deadline=None)
def test_other_measures_are_nan_or_leave_such_images_out(case):
    rows, labels = case
    scores, y = torch.tensor(rows), torch.tensor(labels)
    finite = [all(map(math.isfinite, row)) for row in rows]
    for value in (mean_loss(scores, y), metrics.nll(scores, y), metrics.brier(scores, y), metrics.ece(scores, y),
                  metrics.adaptive_ece(scores, y)):
        assert math.isnan(value) == (not all(finite))
    K = len(rows[0])
    matrix = [[0] * K for _ in range(K)]
    for row, label, fine in zip(rows, labels, finite):
        if fine:
            matrix[label][row.index(max(row))] += 1
    assert metrics.confusion_matrix(scores, y).tolist() == matrix
    for c, recall in enumerate(metrics.per_class_accuracy(scores, y).tolist()):
        mine = [right_by_hand(row, label, 1) for row, label in zip(rows, labels) if label == c]
        assert recall == sum(mine) / len(mine) if mine else math.isnan(recall)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [[3], range(6)])
def test_stored_scores_say_how_many_are_not_finite(tmp_path, value, rows):
    """Also files that version 0.1.0 wrote, which is the same format."""
    logits, labels = torch.eye(6), torch.arange(6)
    logits[list(rows), 0] = value
    scores = Scores(logits, labels, "cnn_space1", "search", 0, 0, "test", "0" * 64, "digits", "f", list("abcdef"))
    save_scores(tmp_path / "s.npz", scores)
    again = load_scores(tmp_path / "s.npz")
    assert again.remark == f"{len(rows)} of 6 predictions are not finite"
    assert [again.top(1), again.top(5), again.top(6)] == pytest.approx([100 * (6 - len(rows)) / 6] * 3)
    assert math.isnan(again.loss())
    assert again.probabilities.isnan().all(dim=1).tolist() == [i in rows for i in range(6)]
    assert replace(again, logits=torch.eye(6)).remark == ""


# training

LOSSES = st.sampled_from([math.nan, math.inf, -math.inf, 0.5, 1.0, 2.0])


@given(st.lists(st.tuples(st.sampled_from([0.0, 50.0, 100.0]), LOSSES), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_the_best_epoch_is_the_best_of_the_finite_ones(rows):
    metrics_of_run = [{"epoch": i, "valid_top1": top1, "valid_loss": loss} for i, (top1, loss) in enumerate(rows)]
    fit = [(-top1, loss, i) for i, (top1, loss) in enumerate(rows) if math.isfinite(loss)]
    expected = min(fit)[2] if fit else None
    assert best.best_epoch(metrics_of_run) == expected
    waited = len(rows) - 1 - expected if fit else len(rows)
    for patience in (1, 2, 3):
        assert train.is_finished(metrics_of_run, 99, patience) == (waited >= patience)


def run(folder, *flags):
    train.main(folder, space1, "", argv=[*map(str, flags)])


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_epoch_of_nan_is_not_the_best(tmp_path):
    """The command of a report: its first epochs predict NaN, its last ones do not."""
    run(tmp_path, *DIVERGING, "--epochs", 6)
    folder = tmp_path / "train-EXP"
    rows = rows_of(folder)
    bad = [row["epoch"] for row in rows if math.isnan(row["valid_loss"])]
    assert bad and [row["epoch"] for row in rows if row.get("not_finite")] == bad
    assert all(row["valid_top1"] == 100 * (135 - row["not_finite"]) / 135 or row["valid_top1"] < 30
               for row in rows if row["epoch"] in bad)
    fine = [row for row in rows if row["epoch"] not in bad]
    expected = max(fine, key=lambda row: (row["valid_top1"], -row["valid_loss"]))["epoch"]
    assert checkpoints.load(folder / "checkpoints" / "best.pt")["epoch"] == expected
    log = (folder / "log.txt").read_text()
    assert log.count("of 135 predictions are not finite") == len(bad) and f"best network: epoch {expected}" in log


@pytest.mark.parametrize("flags", [[], ["--patience", "1"], ["--valid_portion", "0"]])
def test_without_a_finite_epoch_there_is_no_best_network(tmp_path, flags):
    for _ in range(2):  # started again, it says so again
        with pytest.raises(InputError, match="train-EXP: no best network, since in no epoch were all predictions fin"):
            run(tmp_path, *DIVERGING, "--epochs", 1 if "--patience" not in flags else 4, *flags)
    folder = tmp_path / "train-EXP"
    assert len(rows_of(folder)) == 1 and not (folder / "checkpoints" / "best.pt").exists()
    with pytest.raises(InputError, match=r"best\.pt: no such checkpoint; if log\.txt says"):
        best_checkpoint(folder)
    shown = []
    score_checkpoints(ScoredRun(Space(tmp_path.name, tmp_path), "train", TestOptions(), shown.append))
    assert "450 of 450 predictions are not finite, and count as wrong" in shown[0] and "best.pt: no such" in shown[-1]
    (row,) = csv.DictReader((folder / "test_all.csv").open())
    assert (row["loss"], row["top1"], row["top5"]) == ("nan", "0.0", "0.0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three epochs, in a folder of its own."""
    folder = tmp_path_factory.mktemp("trained") / "cnn_space1"
    run(folder, *SMALL, "--epochs", 3)
    return folder


def as_written_before(folder, **changes):
    """Make the run one of version 0.1.0: some epochs had NaN and were thought to be right on every image."""
    state = checkpoints.load(folder / "resume.pt")
    for row in state["metrics"]:
        row |= {"valid_loss": 1.0, "valid_top1": 90.0 - row["epoch"]}
        row |= {"valid_loss": math.nan, "valid_top1": 100.0} if row["epoch"] in changes["nan"] else {}
    checkpoints.save(folder / "resume.pt", state)
    first = changes["nan"][0]
    shutil.copy(folder / "checkpoints" / f"epoch_{first:03d}.pt", folder / "checkpoints" / "best.pt")


@pytest.mark.parametrize("nan, gone, expected", [
    ([1], [], 0), ([0], [], 1), ([0, 1], [], 2), ([1], [0], 2), ([1], [0, 1], 2), ([0, 1, 2], [], None),
    ([1], [0, 2], None)])
def test_a_best_network_of_an_earlier_version_is_put_right(tmp_path, trained, nan, gone, expected):
    """`gone` are epochs without a checkpoint of their own, as --checkpoint_freq leaves them."""
    shutil.copytree(trained, tmp_path / "cnn_space1")
    folder = tmp_path / "cnn_space1" / "train-EXP"
    as_written_before(folder, nan=nan)
    for epoch in gone:
        (folder / "checkpoints" / f"epoch_{epoch:03d}.pt").unlink()
    path = folder / "checkpoints" / "best.pt"
    if expected is None:
        with pytest.raises(InputError, match="no best network"):
            run(folder.parent, *SMALL, "--epochs", 3)
        assert not path.exists()
    else:
        run(folder.parent, *SMALL, "--epochs", 3)
        assert checkpoints.load(path)["epoch"] == expected
    assert (folder / "checkpoints" / f"epoch_{nan[0]:03d}.pt").exists()  # nothing is lost
    log = (folder / "log.txt").read_text()
    assert log.count("warning: ") == 1 and "whose predictions are not all finite" in log
    if expected is not None:
        before = path.read_bytes()
        run(folder.parent, *SMALL, "--epochs", 3)
        assert path.read_bytes() == before and log.count("warning: ") == 1


def test_a_finite_run_is_left_alone(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "cnn_space1")
    folder = tmp_path / "cnn_space1" / "train-EXP"
    before = {path: path.read_bytes() for path in folder.rglob("*.pt")}
    run(folder.parent, *SMALL, "--epochs", 3)
    assert {path: path.read_bytes() for path in folder.rglob("*.pt")} == before
    rows = rows_of(folder)
    assert all("not_finite" not in row and "lost" not in row for row in rows)
    best.repair_best(Run(folder, {}), rows)
    assert {path: path.read_bytes() for path in folder.rglob("*.pt")} == before


# tests of checkpoints

def spoil(path, value=math.nan):
    """Give the network in a checkpoint a classifier that makes every logit of the last class `value`."""
    checkpoint = checkpoints.load(path)
    checkpoint["state"]["classifier.bias"][-1] = value
    checkpoints.save(path, checkpoint)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_tested_network_is_wrong_where_its_predictions_are_not_finite(tmp_path, trained, value, capsys):
    shutil.copytree(trained, tmp_path / "cnn_space1")
    spoil(tmp_path / "cnn_space1" / "train-EXP" / "checkpoints" / "best.pt", value)
    measure.main(tmp_path / "cnn_space1", Network, "", argv=[])
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[2:6] == ["450 of 450 predictions are not finite, and count as wrong", "top-1 0.00 % error 100.00 %",
                          "top-5 0.00 % error 100.00 %", "loss nan"]
    with pytest.raises(InputError, match=r"w\.safetensors: not written, since 450 of 450 predictions are not finite"):
        measure.main(tmp_path / "cnn_space1", Network, "", argv=["--export", str(tmp_path / "w.safetensors")])
    assert not (tmp_path / "w.safetensors").exists()


def test_supernets_are_tested_alike(tmp_path):
    write_runs(tmp_path, "digits", "data", None, 60, 2, [Space("cnn_space1", tmp_path, Network)])
    space, shown = Space("cnn_space1", tmp_path / "cnn_space1", Network), []
    spoil(space.search_folder("EXP") / "checkpoints" / "epoch_001.pt")
    rows = score_checkpoints(ScoredRun(space, "search", TestOptions(device="cpu"), shown.append))
    assert rows[0]["top1"] > 0 and "finite" not in shown[0]
    assert (rows[1]["top1"], rows[1]["top5"]) == (0, 0) and "60 of 60 predictions are not finite" in shown[1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_cell_follows_from_alphas_that_are_not_finite(value):
    alphas = torch.zeros(genotypes.EDGES, len(space1.PRIMITIVES))
    genotypes.derive(alphas, alphas, space1.PRIMITIVES)
    alphas[3, 2] = value
    with pytest.raises(InputError, match="no cell follows from these alphas"):
        genotypes.derive(alphas, torch.zeros_like(alphas), space1.PRIMITIVES)
