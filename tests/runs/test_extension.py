"""More epochs for a run that has an end: one learning rate for every epoch, and exact after any interruption."""
import json
import math
import shutil
import signal
from pathlib import Path

import pytest

from cnn_space1 import genotypes as space1
from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas import cli
from conas.commands import search, train
from conas.errors import InputError
from conas.files import write_json
from conas.runs.extension import Stretches
from tests.helpers.crash import differences, everything
from tests.runs.test_resume import signal_at

TINY = ["--dataset", "digits", "--subset", "64", "--init_channels", "2", "--layers", "3", "--batch_size", "16"]
STEPS = 2  # of an epoch


def run(folder: Path, epochs: int, *flags: str) -> Path:
    search.main(folder, Network, Architect, "", [*TINY, "--epochs", str(epochs), *flags])
    return folder / "search-EXP"


def rates(folder: Path) -> list[float]:
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def cosine(place: int, length: int, lowest: float = 0.001) -> float:
    return lowest + (0.025 - lowest) * (1 + math.cos(math.pi * place / length)) / 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A search of two epochs."""
    return run(tmp_path_factory.mktemp("finished") / "cnn_space2", 2)


@pytest.fixture(scope="module")
def extended(finished, tmp_path_factory) -> Path:
    """The same, extended to four."""
    folder = tmp_path_factory.mktemp("extended") / "cnn_space2"
    shutil.copytree(finished.parent, folder)
    return run(folder, 4, "--extend")


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished.parent, tmp_path / "cnn_space2")
    return tmp_path / "cnn_space2"


def test_a_new_cosine_from_the_end_is_recorded(finished, extended, copy):
    assert rates(extended) == pytest.approx([cosine(0, 2), cosine(1, 2), cosine(0, 2), cosine(1, 2)])
    rows = [json.loads(line) for line in (extended / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("extension") for row in rows] == [None, None, 1, 1]
    record = json.loads((extended / "args.json").read_text())
    assert record["arguments"]["epochs"] == 4 and record["stretches"] == [[0, 2], [2, 4]]
    assert "extended from 2 to 4 epochs" in (extended / "log.txt").read_text()
    assert (extended / "cells" / "reduce.png").exists()
    before = everything(finished)
    for epoch in (0, 1):
        name = f"checkpoints/epoch_{epoch:03d}.pt"
        assert not differences(everything(extended)[name], before[name])
    with pytest.raises(InputError, match=r"--epochs 2 \(now 4\).*or --extend to add epochs"):
        run(copy, 4)
    with pytest.raises(InputError, match=r"--epochs 2 \(now 1\); start it with those arguments"):
        run(copy, 1, "--extend")
    run(copy, 2, "--extend")  # nothing to add
    assert "stretches" not in json.loads((copy / "search-EXP" / "args.json").read_text())


@pytest.mark.parametrize("step", [1, STEPS + 1])
def test_an_extension_that_is_stopped_goes_on_with_the_same_bits(copy, extended, monkeypatch, step):
    signal_at(monkeypatch, signal.SIGTERM, step)
    assert cli.run(lambda: run(copy, 4, "--extend")) == 143
    monkeypatch.undo()
    folder = run(copy, 4, "--extend")
    assert not differences(everything(folder), everything(extended))


def test_a_search_that_is_not_finished_is_extended_from_the_next_epoch(tmp_path, monkeypatch):
    signal_at(monkeypatch, signal.SIGTERM, STEPS + 1)
    assert cli.run(lambda: run(tmp_path / "cnn_space2", 3)) == 143
    monkeypatch.undo()
    folder = run(tmp_path / "cnn_space2", 4, "--extend")
    assert rates(folder) == pytest.approx([cosine(0, 3), cosine(1, 3), cosine(0, 2), cosine(1, 2)])
    run(tmp_path / "cnn_space2", 5, "--extend")  # and once more
    assert rates(folder)[4:] == pytest.approx([cosine(0, 1)])
    assert json.loads((folder / "args.json").read_text())["stretches"] == [[0, 3], [2, 4], [4, 5]]


def test_a_run_of_an_earlier_version_is_extended(copy):
    record = json.loads((copy / "search-EXP" / "args.json").read_text())
    arguments = {name: value for name, value in record["arguments"].items() if name != "extend"}
    write_json(copy / "search-EXP" / "args.json", {"version": record["version"], "arguments": arguments})
    folder = run(copy, 3, "--extend")
    assert rates(folder)[2:] == pytest.approx([cosine(0, 1)])
    write_json(folder / "args.json", json.loads((folder / "args.json").read_text()) | {"stretches": [[0, 9], [1, 2]]})
    with pytest.raises(InputError, match=r"args\.json: damaged; its stretches"):
        run(copy, 3)


def test_a_training_is_extended_alike(tmp_path):
    flags = [*TINY, "--arch", "DARTS", "--drop_path_prob", "0.2"]
    space = tmp_path / "cnn_space1"
    train.main(space, space1, "", argv=[*flags, "--epochs", "1"])
    train.main(space, space1, "", argv=[*flags, "--epochs", "3", "--extend"])
    rows = [json.loads(line) for line in (space / "train-EXP" / "metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.025, 0.025, 0.0125])
    assert [row["drop_path_prob"] for row in rows] == [0, 0.2, 0.2]


def test_what_rises_goes_on_from_where_it_was():
    once = Stretches(((0, 7),))
    assert [once.risen(epoch, 0.3) for epoch in range(7)] == [0.3 * epoch / 7 for epoch in range(7)]
    twice = Stretches(((0, 10), (5, 9)))
    found = [twice.risen(epoch, 1.0) for epoch in range(10)]
    assert found == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.625, 0.75, 0.875, 1.0])
