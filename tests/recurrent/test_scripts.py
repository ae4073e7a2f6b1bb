"""The scripts of rnn/ on small text: search, training, test, committee, and going on exactly."""
import collections
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from conas.errors import InputError
from conas.recurrent import search as language_search
from conas.recurrent import train as language_train
from conas.recurrent.model import RecurrentNetwork
from conas.recurrent.text import load_corpus
from conas.recurrent.train import Average, should_average
from conas.runs import checkpoint as checkpoints
from conas.runs.resume import Checkpointer
from rnn import genotypes
from rnn.architect import Architect
from rnn.model_search import Network
from tests.conftest import Clone

DATA = Path(__file__).parents[2] / "data"
PLAIN = ("--dropout", "0.1", "--dropoutx", "0.1", "--dropouti", "0", "--dropouth", "0.1")
SHORT = ("--nhid", "24", "--batch_size", "16", "--epochs", "6", "--dropoute", "0", *PLAIN)  # a training


@pytest.fixture(scope="module")
def runs(bare_clone, tmp_path_factory) -> Clone:
    """A clone with a short text, a search on it, and two trainings of the cell that was found."""
    root = tmp_path_factory.mktemp("recurrent") / "CoNAS"
    shutil.copytree(bare_clone.root, root)
    text = root / "data" / "short"
    text.mkdir()
    for split, lines in (("train", 420), ("valid", 120), ("test", 120)):
        kept = (DATA / "gospels" / f"{split}.txt").read_text().splitlines()[:lines]
        (text / f"{split}.txt").write_text("\n".join(kept) + "\n")
    clone = Clone(root)
    done = clone.run("rnn/train_search.py", "--data", text, "--nhid", "12", "--batch_size", "32", "--epochs", "2",
                     "--bptt", "12", *PLAIN)
    assert done.returncode == 0, done.stderr
    for seed in "1", "2":
        done = clone.run("rnn/train.py", "--data", text, "--seed", seed, "--save", f"s{seed}", *SHORT)
        assert done.returncode == 0, done.stderr
    return clone


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def unigram_loss(folder: Path) -> float:
    """Of the test text, by the counts of the training text and one more of each word."""
    corpus = load_corpus("short", folder)
    counts = collections.Counter(corpus.ids["train"].tolist())
    total = len(corpus.ids["train"]) + len(corpus.words)
    test = corpus.ids["test"].tolist()[1:]
    return -sum(math.log((counts[word] + 1) / total) for word in test) / len(test)


def test_search_writes_its_folder_and_learns(runs):
    folder = runs.root / "rnn" / "search-EXP"
    for name in ("args.json", "log.txt", "genotypes/epoch_001.json", "checkpoints/epoch_000.pt", "cells/recurrent.svg",
                 "cells/recurrent.png"):
        assert (folder / name).exists(), name
    first, second = metrics(folder)
    assert second["train_loss"] < first["train_loss"]
    alphas = [checkpoints.load(folder / "checkpoints" / f"epoch_00{i}.pt")["state"]["alphas_recurrent"] for i in (0, 1)]
    assert not torch.equal(*alphas)


def test_training_takes_the_cell_that_was_found_and_improves(runs):
    losses = [row["valid_loss"] for row in metrics(runs.root / "rnn" / "train-s1")]
    assert losses[-1] < losses[0] - 0.1
    log = (runs.root / "rnn" / "train-s1" / "log.txt").read_text()
    assert "the cell of" in log and "search-EXP/genotype.json" in log


def test_training_beats_a_unigram_model(runs):
    """With a published cell: which one so short a search finds hangs on rounding, and in six epochs some cells, ENAS
    among them, learn hardly more than how frequent words are."""
    text = runs.root / "data" / "short"
    done = runs.run("rnn/train.py", "--data", text, "--arch", "DARTS_V2", "--save", "v2", *SHORT)
    assert done.returncode == 0, done.stderr
    done = runs.run("rnn/test.py", "--save", "v2")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(runs.root / "rnn" / "train-v2")  # the committee of all trainings is to have two members
    perplexity = float(done.stdout.split("perplexity ")[1].split()[0])
    assert perplexity < 0.8 * math.exp(unigram_loss(text))


def test_export_and_other_words(runs, tmp_path):
    path = tmp_path / "safe.safetensors"
    done = runs.run("rnn/test.py", "--save", "s1", "--export", path)
    again = runs.run("rnn/test.py", "--model_path", path)
    assert done.returncode == again.returncode == 0, done.stderr + again.stderr
    assert done.stdout.split("perplexity")[1].split()[0] == again.stdout.split("perplexity")[1].split()[0]
    done = runs.run("rnn/test.py", "--save", "s1", "--data", DATA / "gospels")
    assert done.returncode == 2 and "other words" in done.stderr and len(done.stderr.splitlines()) == 1


def test_another_named_text_is_sought_where_such_are_kept(runs):
    done = runs.run("rnn/test.py", "--save", "s1", "--dataset", "wikitext-2")
    assert done.returncode == 2 and f"{runs.root / 'data' / 'wikitext-2' / 'train.txt'}: no such file" in done.stderr


def test_committee(runs):
    done = runs.run("test_ensemble.py", "--task", "language", "--save", "words")
    assert done.returncode == 0, done.stderr
    summary = json.loads((runs.root / "committee-words-language" / "committee.json").read_text())
    assert set(summary["members"]) == {"train-s1 best", "train-s2 best"}
    losses = [member["loss"] for member in summary["members"].values()]
    assert summary["committee"]["loss"] < sum(losses) / 2  # Jensen
    alone = runs.run("rnn/test.py", "--save", "s1").stdout
    assert f"{summary['members']['train-s1 best']['perplexity']:.2f}" == alone.split("perplexity ")[1].split()[0]
    done = runs.run("test_ensemble.py", "--task", "language", "--members", "rnn/train-s1/checkpoints/best.pt")
    assert done.returncode == 2 and "two members" in done.stderr


class Killed(BaseException):
    """What ends a process in the middle of a step."""


@pytest.mark.parametrize("kind", ["search", "train"])
def test_a_killed_run_goes_on_with_the_same_bits(runs, kind, tmp_path, monkeypatch):
    folder = tmp_path / "rnn"
    folder.mkdir()
    flags = ["--data", str(runs.root / "data" / "short"), "--nhid", "8", "--batch_size", "128", "--epochs", "4",
             "--bptt", "9", "--checkpoint_minutes", "0"]
    # averaging begins after epoch 1, so that states before and after it are resumed
    monkeypatch.setattr(language_train, "should_average", lambda losses, nonmono: len(losses) == 2)

    def run(save: str, end: int | None = None) -> Path:
        steps = itertools.count(1)

        def maybe_save(self, state):
            if next(steps) == end:
                raise Killed
            original(self, state)

        monkeypatch.setattr(Checkpointer, "maybe_save", maybe_save)
        command = [*flags, "--save", save]
        if kind == "search":
            language_search.main(folder, Network, Architect, "", command)
        else:
            language_train.main(folder, genotypes, "", command)
        return folder / f"{kind}-{save}"

    original = Checkpointer.maybe_save
    whole = run("whole")
    for end in (1, 3, 2, 9, 14):
        with pytest.raises(Killed):
            run("broken", end)
    broken = run("broken")
    assert metrics(broken) == metrics(whole)
    one, two = (checkpoints.read(path / "resume.pt") for path in (whole, broken))
    for name, tensor in one["state"].items():
        assert torch.equal(tensor, two["state"][name]), name
    if kind == "train":
        assert [row["optimizer"] for row in metrics(whole)] == ["SGD", "SGD", "ASGD", "ASGD"]
        assert all(torch.equal(a, b) for a, b in zip(one["average"]["values"], two["average"]["values"]))


@pytest.mark.parametrize("script, flags, why", [
    ("train_search.py", ("--data", "nowhere"), "nowhere/penn/train.txt: no such file"),
    ("test.py", ("--model_path", "missing.pt"), "missing.pt: no such"),
])
def test_errors_are_one_line(runs, script, flags, why):
    done = runs.run(f"rnn/{script}", *flags, "--save", "errors")
    assert done.returncode == 2 and why in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("flags, why", [
    (("--emsize", "20"), "--emsize 20: must equal --nhid"), (("--arch", "DARTS_V3"), "did you mean DARTS_V"),
    (("--batch_size", "60000"), "give a smaller --batch_size"), (("--search", "none"), "start train_search.py"),
])
def test_flags_that_cannot_be(tmp_path, flags, why):
    with pytest.raises(InputError, match=why):
        language_train.main(tmp_path, genotypes, "", ["--dataset", "gospels", *flags])


def test_average_is_the_mean_since_it_began():
    network = RecurrentNetwork(4, 3, genotypes.DARTS_V1)
    average, seen = Average(network), []
    for _ in range(5):
        torch.nn.init.normal_(network.decoder.bias)
        seen.append(network.decoder.bias.detach().clone())
        average.update()
    kept = Average(network, average.state())
    with kept.in_place():
        torch.testing.assert_close(network.decoder.bias.detach(), torch.stack(seen).mean(dim=0))
    assert torch.equal(network.decoder.bias, seen[-1])


@pytest.mark.parametrize("losses, nonmono, now", [
    ([5, 4, 3], 2, False), ([5, 4, 3, 3.5], 2, False), ([3, 4, 4, 3.5], 2, True), ([3, 4, 4], 5, False),
    ([4, 3, 5, 5, 3.5], 2, True), ([4, 3.9, 3, 3, 3.5], 2, False)])
def test_when_averaging_begins(losses, nonmono, now):
    assert should_average(losses, nonmono) is now
