"""Language models whose predictions are NaN or infinite: never best, never a perplexity, never a member."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import test_ensemble
from conas.errors import InputError
from conas.recurrent import search as language_search
from conas.recurrent import steps
from conas.recurrent import test as language_test
from conas.recurrent import train as language_train
from conas.recurrent.model import RecurrentNetwork
from conas.recurrent.text import Text, load_corpus
from conas.recurrent.train import should_average
from conas.runs import checkpoint as checkpoints
from conas.runs.best import best_epoch
from ensemble import language
from rnn import genotypes
from rnn.architect import Architect
from rnn.model_search import Network

VALUES = [math.nan, math.inf, -math.inf]
WORDS = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with a small text, whose validation and test texts lack some words of the training text."""
    folder = tmp_path_factory.mktemp("text") / "small"
    folder.mkdir()
    for split, count, words in (("train", 240, WORDS), ("valid", 90, WORDS - 3), ("test", 90, WORDS - 3)):
        lines = [" ".join(f"w{(i * i + k) % words}" for k in range(9)) for i in range(count)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


def flags(text: Path, *more: object) -> list[str]:
    return [*map(str, ("--data", text, "--arch", "DARTS_V2", "--nhid", 8, "--batch_size", 64, "--bptt", 9, *more))]


def train(root: Path, text: Path, *more: object) -> Path:
    """A training in `root`/rnn, which is returned as its folder."""
    (root / "rnn").mkdir(exist_ok=True)
    language_train.main(root / "rnn", genotypes, "", flags(text, *more))
    return root / "rnn" / "train-EXP"


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained"), text, "--epochs", 3)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the run of three epochs."""
    return Path(shutil.copytree(trained.parent, tmp_path / "rnn")) / trained.name


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def spoil(path: Path, value: float, name: str = "decoder.bias") -> None:
    checkpoint = checkpoints.load(path)
    checkpoint["state"][name][-1] = value
    checkpoints.save(path, checkpoint)


# counting

@pytest.mark.parametrize("value", [*VALUES, 3e38, -3e38, 1.0])
@pytest.mark.parametrize("name", ["decoder.bias", "encoder.weight"])
def test_words_without_a_finite_prediction_are_counted(text, value, name):
    """Against log-probabilities of all words at once. The spoilt word is in no validation text."""
    corpus = load_corpus("small", text)
    torch.manual_seed(1)
    network = RecurrentNetwork(len(corpus.words), 8, genotypes.DARTS_V2)
    torch.nn.init.normal_(network.encoder.weight)
    word = corpus.words.index(f"w{WORDS - 1}")
    with torch.no_grad():
        network.get_parameter(name)[word] = value
    valid = Text(corpus, "valid", 4)
    every = network.eval()(valid.columns[:-1], network.initial(4))[0]
    expected = int((~every.isfinite().all(dim=2)).sum())
    assert expected == 0 if value == 1.0 else expected > 0 or name == "decoder.bias"
    for bptt in (5, 1000):
        found = steps.validate(network, valid, bptt)
        assert (found.not_finite, found.count) == (expected, every.shape[0] * every.shape[1])
        assert math.isnan(found.loss) == (expected > 0)
        assert found.remark == (f"  ({expected} of {found.count} predictions are not finite)" if expected else "")
    own = language.score([network], valid, 7)[0]
    assert int(own.isnan().sum()) == expected


def test_some_of_the_words_may_be_finite(text):
    """A logit that overflows for some hidden states only, to minus infinity for some, with a finite loss or not."""
    corpus = load_corpus("small", text)
    torch.manual_seed(1)
    network, counts = RecurrentNetwork(len(corpus.words), 8, genotypes.DARTS_V2), set()
    for large in (3e37, 1e38, 3e38):
        with torch.no_grad():
            network.encoder.weight[corpus.words.index(f"w{WORDS - 1}")] = large
        found = steps.validate(network, Text(corpus, "valid", 4), 9)
        counts.add(found.not_finite)
    assert len(counts) > 1 and all(0 <= count <= found.count for count in counts)


def test_perplexity_of_nan_is_nan():
    assert math.isnan(steps.perplexity(math.nan))
    assert steps.perplexity(math.inf) == steps.perplexity(1e6) == math.inf
    assert steps.perplexity(2.0) == math.exp(2)


LOSSES = st.sampled_from([*VALUES, 1.0, 2.0, 3.0, 4.0])


@given(st.lists(LOSSES, min_size=1, max_size=8))
def test_the_best_epoch_is_the_first_of_lowest_finite_loss(losses):
    finite = [(loss, i) for i, loss in enumerate(losses) if math.isfinite(loss)]
    assert best_epoch([{"valid_loss": loss} for loss in losses]) == (min(finite)[1] if finite else None)


@given(st.lists(LOSSES, min_size=1, max_size=8), st.integers(1, 3))
def test_averaging_begins_as_if_such_losses_were_very_high(losses, nonmono):
    high = [loss if math.isfinite(loss) else 1e9 for loss in losses]
    assert should_average(losses, nonmono) is should_average(high, nonmono)


def test_averaging_begins_at_a_loss_of_nan_and_after_one():
    assert should_average([3.0, 2.0, 2.0, math.nan], 2)
    assert should_average([math.nan, 2.0, 2.0, 2.0, 2.0, 2.5], 2)
    assert not should_average([math.nan] * 6, 2)
    assert not should_average([math.nan, math.nan, math.nan, 2.0], 2)


# training

def test_a_training_without_a_finite_epoch_has_no_best_network(text, tmp_path):
    """One step of a very high rate: the loss before it is finite, and no prediction after it."""
    for _ in range(2):  # started again, it says so again
        with pytest.raises(InputError, match="train-EXP: no best network, since in no epoch were all predictions finite"
                                             "; a lower --lr or --clip"):
            train(tmp_path, text, "--epochs", 1, "--lr", "1e39", "--batch_size", 239, "--bptt", 1000)
    folder = tmp_path / "rnn" / "train-EXP"
    (row,) = rows(folder)
    assert math.isfinite(row["train_loss"]) and math.isnan(row["valid_loss"]) and row["not_finite"] > 0
    assert not (folder / "checkpoints" / "best.pt").exists()
    assert (f"valid nan perplexity nan  ({row['not_finite']} of {row['not_finite']} predictions are not finite)"
            in (folder / "log.txt").read_text())
    with pytest.raises(InputError, match=r"best\.pt: no such checkpoint; if log\.txt says"):
        language_test.main(tmp_path / "rnn", Network, genotypes, "", [])


@pytest.mark.parametrize("spoilt, expected", [({0}, 2), ({0, 2}, 1), ({1, 2}, 0)])
@pytest.mark.parametrize("value", VALUES)
def test_an_epoch_of_nan_is_not_the_best(text, tmp_path, monkeypatch, spoilt, expected, value):
    """In some epochs the network that is validated has a weight that is not finite."""
    epoch, validate = iter(range(3)), steps.validate

    def spoil_and_validate(network, *rest):
        own = network.decoder.bias.detach().clone()
        if next(epoch) in spoilt:
            network.decoder.bias.data[0] = value
        found = validate(network, *rest)
        network.decoder.bias.data.copy_(own)
        return found

    monkeypatch.setattr(language_train, "validate", spoil_and_validate)
    folder = train(tmp_path, text, "--epochs", 3)
    assert {row["epoch"] for row in rows(folder) if "not_finite" in row} == spoilt
    assert checkpoints.load(folder / "checkpoints" / "best.pt")["epoch"] == expected
    assert f"best network: epoch {expected}, " in (folder / "log.txt").read_text()


def as_written_before(folder: Path, nan: set[int], best: int, losses: tuple[float, ...] = (3.0, 2.0, 1.0)) -> None:
    """Make the run one of version 0.1.0, to which the first epoch of NaN was the best for ever."""
    state, path = checkpoints.load(folder / "resume.pt"), folder / "checkpoints" / "best.pt"
    for row, loss in zip(state["metrics"], losses):
        row["valid_loss"] = math.nan if row["epoch"] in nan else loss
    checkpoints.save(folder / "resume.pt", state)
    checkpoints.save(path, checkpoints.load(path) | {"epoch": best})


@pytest.mark.parametrize("nan, losses, expected", [
    ({0}, (3.0, 2.0, 1.0), 2), ({0}, (3.0, 1.0, 2.0), 2), ({0, 2}, (3.0, 2.0, 1.0), None), ({0, 1, 2}, (), None)])
def test_a_best_network_of_an_earlier_version_is_put_right(copy, text, nan, losses, expected):
    """The weights of its last epoch are in resume.pt, those of others nowhere."""
    as_written_before(copy, nan, 0, losses or (3.0, 2.0, 1.0))
    path = copy / "checkpoints" / "best.pt"
    for _ in range(2):
        if expected is None:
            with pytest.raises(InputError, match="no best network"):
                train(copy.parents[1], text, "--epochs", 3)
            assert not path.exists()
        else:
            train(copy.parents[1], text, "--epochs", 3)
            assert checkpoints.load(path)["epoch"] == expected
            last = checkpoints.load(copy / "resume.pt")["state"]
            assert all(torch.equal(last[name], values) for name, values in checkpoints.load(path)["state"].items())
    assert (copy / "checkpoints" / "epoch_000.pt").exists()  # nothing is lost
    assert (copy / "log.txt").read_text().count("whose predictions are not all finite") == 1


def test_a_finite_run_is_left_alone(copy, text):
    before = {path: path.read_bytes() for path in copy.rglob("*.pt")}
    train(copy.parents[1], text, "--epochs", 3)
    assert {path: path.read_bytes() for path in copy.rglob("*.pt")} == before


def test_a_search_says_that_its_network_is_not_finite(text, tmp_path, monkeypatch):
    validate = steps.validate

    def spoil_and_validate(network, *rest):
        network.decoder.bias.data[0] = math.inf
        return validate(network, *rest)

    monkeypatch.setattr(language_search, "validate", spoil_and_validate)
    (tmp_path / "rnn").mkdir()
    language_search.main(tmp_path / "rnn", Network, Architect, "", [
        "--data", str(text), "--nhid", "8", "--batch_size", "64", "--bptt", "9", "--epochs", "1"])
    (row,) = rows(tmp_path / "rnn" / "search-EXP")
    log = (tmp_path / "rnn" / "search-EXP" / "log.txt").read_text()
    assert math.isnan(row["valid_loss"]) and row["not_finite"] > 0
    assert f"valid nan perplexity nan  ({row['not_finite']} of " in log
    assert "warning: the last network's predictions on the validation text are not all finite" in log
    assert "a lower --lr under" in log


# tests and committees

@pytest.mark.parametrize("value", VALUES)
def test_a_tested_network_has_no_perplexity(copy, value, tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    spoil(copy / "checkpoints" / "best.pt", value)
    language_test.main(copy.parent, Network, genotypes, "", [])
    lines = capsys.readouterr().out.splitlines()
    count = int(lines[2].split()[0])
    assert lines[2] == f"{count} of {count} predictions are not finite, so there is no loss"
    assert [line.rstrip() for line in lines if "loss" in line][1:] == ["loss nan nats a word"]
    assert lines[3].rstrip() == "perplexity nan"
    with pytest.raises(InputError, match=rf"w\.safetensors: not written, since {count} of {count} predictions are not"):
        language_test.main(copy.parent, Network, genotypes, "", ["--export", str(path)])
    assert not path.exists()


@pytest.mark.parametrize("value", VALUES)
def test_a_committee_refuses_such_a_member_by_its_file(copy, value, tmp_path, monkeypatch):
    other = Path(shutil.copytree(copy, copy.with_name("train-two")))
    monkeypatch.setattr(test_ensemble, "ROOT", tmp_path)
    members = [str(folder / "checkpoints" / "best.pt") for folder in (copy, other)]
    command = ["--task", "language", "--device", "cpu", "--members", *members]
    monkeypatch.setattr("sys.argv", ["test_ensemble.py", *command])
    test_ensemble.main()
    report = tmp_path / "committee-EXP-language" / "committee.json"
    before = report.read_bytes()
    spoil(Path(members[1]), value)
    with pytest.raises(InputError) as caught:
        test_ensemble.main()
    assert str(caught.value).startswith(f"{members[1]}: ") and "predictions are not finite on the test text" in str(
        caught.value)
    assert report.read_bytes() == before
