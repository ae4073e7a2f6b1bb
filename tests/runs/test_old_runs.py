"""A search and a training that commit 662cc92 began and Ctrl-C stopped in their second epoch: read and gone on with.

tests/fixtures/run_662cc92.tar.xz holds both as that commit left them (the state before the last was taken out), their
tests, and in `expected` what it gave without the interruption. Losses are compared to four digits: sums are rounded in
other places today.
"""
import csv
import json
import shutil
import tarfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from conas.commands import search, train
from conas.commands.test_all import ScoredRun, score_checkpoints
from conas.darts.space import Space
from conas.errors import InputError
from conas.runs.checkpoint import load, sha256
from conas.runs.options import TestOptions
from conas.runs.scores import load_scores
from tests.conftest import ROOT, Clone
from tests.helpers.searches import no_pictures  # noqa: F401

DATA = ["--dataset", "digits", "--subset", "40", "--init_channels", "2", "--layers", "3", "--epochs", "2",
        "--batch_size", "10", "--device", "cpu", "--save", "old"]
SEARCH = [*DATA, "--arch_learning_rate", "0.1"]
TRAIN = [*DATA, "--search", "old", "--drop_path_prob", "0.3", "--valid_portion", "0.25", "--cutout",
         "--cutout_length", "4"]


@pytest.fixture
def space(tmp_path) -> Path:
    """The folder cnn_space2 with that commit's runs, `expected` beside it."""
    with tarfile.open(ROOT / "tests" / "fixtures" / "run_662cc92.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    (tmp_path / "cnn_space2").mkdir()
    for run in ("search-old", "train-old"):
        shutil.move(tmp_path / run, tmp_path / "cnn_space2")
    return tmp_path / "cnn_space2"


def go_on(space: Path, stage: str, *flags: str) -> Path:
    """Start the command of then again, with further flags."""
    if stage == "search":
        search.main(space, import_module("cnn_space2.model_search").Network,
                    import_module("cnn_space2.architect").Architect, "", [*SEARCH, *flags])
    else:
        train.main(space, import_module("cnn_space2.genotypes"), "", argv=[*TRAIN, *flags])
    return space / f"{stage}-old"


def test_all(space: Path, stage: str) -> list[dict]:
    network = import_module("cnn_space2.model_search").Network
    return score_checkpoints(ScoredRun(Space("cnn_space2", space, network), stage,
                                       TestOptions(save="old", device="cpu"), show=lambda text: None))


test_all.__test__ = False


def rows(path: Path) -> list[dict]:
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        return [{name: float(text) for name, text in row.items()} for row in csv.DictReader(lines)]
    return [json.loads(line) for line in lines]


def assert_as_expected(space: Path, stage: str) -> None:
    """The run's metrics and tests are those of one that was not interrupted."""
    run, expected = space / f"{stage}-old", space.parent / "expected"
    for found, wanted in ((rows(run / "metrics.jsonl"), rows(expected / f"{stage}-metrics.jsonl")),
                          (test_all(space, stage), rows(expected / f"{stage}-test_all.csv"))):
        assert len(found) == len(wanted) == 2
        for row, then in zip(found, wanted):
            assert {name: row[name] for name in then} == pytest.approx(then, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stage", ["search", "train"])
def test_checkpoints_are_tested_as_before(space, stage, capsys):
    run = space / f"{stage}-old"
    before, table = load_scores(run / "probabilities" / "epoch_000.npz"), rows(run / "test_all.csv")
    assert len(table) == 1
    for row, then in zip(test_all(space, stage), table, strict=True):  # from the stored logits
        assert row == pytest.approx(then, rel=1e-12)  # the last digit of a loss differs between processors
    shutil.rmtree(run / "probabilities")
    test_all(space, stage)
    again = load_scores(run / "probabilities" / "epoch_000.npz")
    torch.testing.assert_close(again.logits, before.logits, rtol=1e-4, atol=1e-5)
    assert again.logits.std() > 0.01 and torch.equal(again.labels, before.labels)
    assert (again.fingerprint, again.checkpoint_sha256) == (before.fingerprint, before.checkpoint_sha256)
    assert again.checkpoint_sha256 == sha256(run / "checkpoints" / "epoch_000.pt")
    assert "changed" not in capsys.readouterr().err  # nothing is known of the code of then


@pytest.mark.parametrize("flags", [(), ("--no-engine",)])
def test_the_search_goes_on_where_it_was(space, flags):
    run = go_on(space, "search", *flags)
    assert "goes on in epoch 1 after 1 steps" in (run / "log.txt").read_text()
    assert_as_expected(space, "search")
    found = json.loads((run / "genotype.json").read_text())
    expected = json.loads((space.parent / "expected" / "search-genotype.json").read_text())
    assert {name: found[name] for name in expected} == expected  # which did not name the rule yet


def test_the_training_goes_on_where_it_was(space):
    run = go_on(space, "train")
    assert "goes on in epoch 1 after 1 steps" in (run / "log.txt").read_text()
    assert_as_expected(space, "train")


@pytest.mark.parametrize("stage, flags, refused", [
    ("search", ["--flip"], "--flip"), ("search", ["--stem", "imagenet"], "--stem"),
    ("search", ["--resize", "pad"], "--resize"), ("search", ["--test_subset", "20"], "--test_subset"),
    ("train", ["--flip"], "--flip"), ("train", ["--resize", "stretch"], "--resize")])
def test_a_flag_that_did_not_exist_is_refused_only_if_it_changes_the_numbers(space, stage, flags, refused):
    before = {path: path.read_bytes() for path in space.rglob("*.*") if path.is_file()}
    with pytest.raises(InputError, match=f"holds a run with {refused} ") as error:
        go_on(space, stage, *flags)
    assert str(error.value).count("--save") == 1 and str(error.value).count(" (now ") == 1
    assert {path: path.read_bytes() for path in before} == before


def test_its_cells_are_trained_and_its_checkpoints_form_a_committee(space, bare_clone, tmp_path):
    train.main(space, import_module("cnn_space2.genotypes"), "", argv=[*DATA[:-2], "--search", "old", "--save", "new"])
    genotype = json.loads((space / "search-old" / "genotype.json").read_text())
    assert load(space / "train-new" / "checkpoints" / "best.pt")["genotype"] == genotype

    clone = Clone(shutil.copytree(bare_clone.root, tmp_path / "CoNAS"))
    shutil.copytree(space, clone.root / "cnn_space2", dirs_exist_ok=True)
    done = clone.run("test_ensemble.py", "--members", "cnn_space2/*-old/checkpoints/epoch_000.pt", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads((clone.root / "committee-EXP" / "committee.json").read_text())["epochs"][-1]["members"]
    stored = [np.load(space / f"{stage}-old" / "probabilities" / "epoch_000.npz") for stage in ("search", "train")]
    tops = [100 * (file["logits"].argmax(1) == file["labels"]).mean() for file in stored]
    assert sorted(member["top1"] for member in found) == pytest.approx(sorted(tops))
