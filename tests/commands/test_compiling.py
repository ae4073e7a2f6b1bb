"""--compile of train.py: its values, what auto chooses, and that a run stays with it."""
import json

import pytest
import torch

from cnn_space1 import genotypes as space1
from conas.cli import parse
from conas.commands import compiling, train
from conas.darts.derived import NetworkCIFAR
from conas.darts.published import GENOTYPES
from conas.engine.native.loader import kernels, why_no_kernels
from conas.errors import InputError
from conas.runs.options import TrainRunOptions

SMALL = ["--dataset", "digits", "--subset", "300", "--init_channels", "2", "--layers", "3", "--batch_size", "50",
         "--epochs", "2", "--arch", "DARTS"]


def run(folder, *flags):
    train.main(folder / "cnn_space1", space1, "", argv=[*SMALL, *flags])
    return folder / "cnn_space1" / "train-EXP"


def records(folder):
    return json.loads((folder / "args.json").read_text()).get("compiled"), (folder / "log.txt").read_text()


@pytest.fixture
def compilations(monkeypatch):
    """The networks that torch.compile gets, which it leaves as they are."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function: seen.append(function) or function)
    return seen


@pytest.mark.parametrize("words, value", [
    ([], "off"), (["--compile"], "on"), (["--no-compile"], "off"), (["--compile", "auto"], "auto"),
    (["--compile", "off"], "off"), (["--compile", "--save", "A"], "on"), (["--compile=on"], "on")])
def test_values(words, value):
    assert parse("", [TrainRunOptions], words)[0].compile == value


def test_another_value_is_refused():
    with pytest.raises(InputError, match=r"--compile.*'maybe'.*auto"):
        parse("", [TrainRunOptions], ["--compile", "maybe"])


@pytest.mark.parametrize("step, seconds", [(2.0, 100.0), (0.01, 31.3)])
def test_at_the_break_even_both_ways_take_as_long(step, seconds):
    def gain(steps):
        return steps * step - (seconds + steps * step / compiling.SPEED["torch.compile"])

    even = next(n for n in range(10**6) if gain(n) >= 0)
    for left, yes in (1, False), (3 * even, False), (3 * even + 1, True):
        compiled, why = compiling.decide(seconds, step, left)
        assert compiled is yes and f"after {even} steps" in why and f"{left} are left" in why


@pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {why_no_kernels()}")
def test_kernels_are_faster_than_the_compiler(tmp_path, compilations):
    auto, plain = run(tmp_path / "auto", "--compile", "auto"), run(tmp_path / "plain")
    compiled, log = records(auto)
    assert compiled is False and "--compile auto: no, by kernels" in log and not compilations
    assert (auto / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()


def test_without_kernels_a_short_run_is_not_compiled_and_is_as_without_the_flag(tmp_path, compilations, monkeypatch):
    monkeypatch.setattr(train, "kernels", lambda: None)
    auto, plain = run(tmp_path / "auto", "--compile", "auto"), run(tmp_path / "plain")
    compiled, log = records(auto)
    assert compiled is False and "are won back after" in log and "10 are left" in log and not compilations
    assert (auto / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()


def test_a_long_one_is_and_goes_on_so_however_few_steps_are_left(tmp_path, compilations, monkeypatch):
    monkeypatch.setattr(train, "kernels", lambda: None)
    monkeypatch.setattr(compiling, "SECONDS", 1e-9)
    folder = run(tmp_path, "--compile", "auto", "--epochs", "1")
    compiled, log = records(folder)
    assert compiled is True and "--compile auto: yes: " in log
    networks = [each for each in compilations if isinstance(each, NetworkCIFAR)]
    assert len(networks) == 1
    monkeypatch.undo()  # kernels are there again, and would be faster
    monkeypatch.setattr(torch, "compile", lambda function: compilations.append(function) or function)
    run(tmp_path, "--compile", "auto", "--extend")
    compiled, log = records(folder)
    assert compiled is True and "--compile auto: yes, as before in this run" in log
    assert len([each for each in compilations if isinstance(each, NetworkCIFAR)]) == 2
    run(tmp_path, "--no-compile", "--extend", "--epochs", "3")
    assert len([each for each in compilations if isinstance(each, NetworkCIFAR)]) == 2


@pytest.mark.parametrize("stored", [True, "on"])
def test_a_run_that_was_compiled_before_there_was_auto_stays_so(tmp_path, stored):
    (tmp_path / "args.json").write_text(json.dumps({"arguments": {"compile": stored}}))
    assert compiling.asked("auto", tmp_path) is True
    (tmp_path / "args.json").write_text(json.dumps({"arguments": {"compile": False}}))
    assert compiling.asked("auto", tmp_path) is None


def test_a_damaged_record_is_refused(tmp_path):
    for text in '{"arguments": {}, "compiled": "yes"}', "[]", "{":
        (tmp_path / "args.json").write_text(text)
        with pytest.raises(InputError, match=r"args\.json: damaged"):
            compiling.asked("auto", tmp_path)


def test_timing_a_pass_leaves_no_trace():
    torch.manual_seed(0)
    network = NetworkCIFAR(2, 10, 3, True, GENOTYPES["DARTS"]).eval()
    network.drop_path_prob = 0.5
    before, numbers = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert compiling.pass_seconds(network, torch.ones(2, 3, 32, 32)) > 0
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), numbers) and not network.training
    assert all(p.grad is None for p in network.parameters())
