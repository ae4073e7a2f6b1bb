"""What keeps a run: damaged states, signals, locks, losses that are not finite."""
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas import cli
from conas.commands import search, train
from conas.data.batches import Stream
from conas.errors import InputError, Stopped
from conas.runs.checkpoint import load
from conas.runs.folder import Run
from conas.runs.progress import EpochMeter
from tests.conftest import ROOT
from tests.helpers.crash import SMALL, differences, everything, in_child, run_search, run_training

STEPS = 2  # of an epoch of SMALL


def run(folder: Path, *flags: str) -> Path:
    search.main(folder, Network, Architect, "", [*SMALL, *flags])
    return folder / "search-EXP"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A search that nothing happened to."""
    return run(tmp_path_factory.mktemp("whole") / "cnn_space2")


@pytest.fixture
def cut(tmp_path, monkeypatch) -> Path:
    """The folder of a search that was stopped by SIGTERM within its second epoch."""
    with pytest.raises(Stopped) as stop:
        signal_at(monkeypatch, signal.SIGTERM, STEPS + 1)
        run(tmp_path / "cnn_space2")
    monkeypatch.undo()
    assert stop.value.code == 143
    return tmp_path / "cnn_space2" / "search-EXP"


def signal_at(monkeypatch, number: int, step: int) -> None:
    """Send this process a signal in the middle of the step with this number."""
    step_of_weights, calls = search.weight_step, iter(range(1000))

    def interrupted(*arguments):
        if next(calls) + 1 == step:
            os.kill(os.getpid(), number)
        return step_of_weights(*arguments)
    monkeypatch.setattr(search, "weight_step", interrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("step", [1, 3])
def test_a_signal_waits_for_the_end_of_the_step(tmp_path, monkeypatch, capsys, whole, number, code, step):
    signal_at(monkeypatch, number, step)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert cli.run(lambda: run(tmp_path / "cnn_space2", "--checkpoint_minutes", "10")) == code
    line = capsys.readouterr().err.strip()
    epoch, done = divmod(step, STEPS)
    assert f"epoch {epoch} after {done} steps" in line and "start the same command again" in line
    assert "\n" not in line
    folder = tmp_path / "cnn_space2" / "search-EXP"
    assert load(folder / "resume.pt")["course"]["step"] == done
    signal.signal(signal.SIGTERM, handlers[0])
    assert signal.getsignal(signal.SIGINT) == handlers[1]
    monkeypatch.undo()
    run(tmp_path / "cnn_space2")
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert f"goes on in epoch {epoch} after {done} steps" in (folder / "log.txt").read_text()


def test_a_signal_in_validation_stops_at_once(tmp_path, monkeypatch, whole):
    validate = search.validate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("validation went on")
    monkeypatch.setattr(search, "validate", interrupted)
    with pytest.raises(Stopped):
        run(tmp_path / "cnn_space2")
    folder = tmp_path / "cnn_space2" / "search-EXP"
    assert load(folder / "resume.pt")["course"]["step"] == STEPS and not (folder / "metrics.jsonl").exists()
    monkeypatch.setattr(search, "validate", validate)
    run(tmp_path / "cnn_space2")
    assert not differences(everything(folder)["metrics.jsonl"], everything(whole)["metrics.jsonl"])


@pytest.mark.parametrize("spoil", ["truncate", "empty", "flip", "remove"])
def test_a_damaged_state_falls_back_to_the_one_before(cut, whole, spoil):
    newest, before = cut / "resume.pt", cut / "resume.before.pt"
    assert load(newest)["course"]["step"] == 1 and load(before)["course"] is None  # the end of the first epoch
    content = bytearray(newest.read_bytes())
    if spoil == "flip":  # the end of a zip file is its directory
        content[-30] ^= 4
    newest.write_bytes({"truncate": content[:-500], "empty": b"", "flip": content, "remove": b""}[spoil])
    if spoil == "remove":
        newest.unlink()
    run(cut.parent)
    log = (cut / "log.txt").read_text()
    assert "warning" in log and str(newest) in log and str(before) in log
    assert not differences(everything(cut), everything(whole))


def test_if_both_states_are_damaged_the_run_says_so_and_changes_nothing(cut):
    for name in ("resume.pt", "resume.before.pt"):
        (cut / name).write_bytes(b"PK")
    before = {path: path.read_bytes() for path in cut.rglob("*.*")if path.is_file() and path.name != "log.txt"}
    with pytest.raises(InputError, match=r"resume\.pt"):
        run(cut.parent)
    assert {path: path.read_bytes() for path in before} == before


def test_a_checkpoint_is_no_state_of_a_run(cut):
    shutil.copy(cut / "checkpoints" / "epoch_000.pt", cut / "resume.pt")
    (cut / "resume.before.pt").unlink()
    with pytest.raises(InputError, match="not the state of a run"):
        run(cut.parent)


@pytest.mark.parametrize("change", [
    {"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"alpha_optimizer": []}, {"metrics": [{}]},
    {"metrics": []}, {"metrics": "none"}, {"course": {"step": -1}}, {"course": 3}, {"random": {}},
    {"random": {"torch": torch.zeros(3)}}, {"epoch": 7}])
def test_a_state_that_is_whole_but_wrong_is_refused(cut, change):
    torch.save(load(cut / "resume.pt") | change, cut / "resume.pt")
    metrics = (cut / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"resume\.pt: is whole, but does not fit this run"):
        run(cut.parent)
    assert (cut / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("value", [False, True])
def test_a_search_from_before_its_compiler_was_removed_goes_on(cut, whole, value):
    stored = json.loads((cut / "args.json").read_text())
    stored["arguments"]["compile"] = value
    (cut / "args.json").write_text(json.dumps(stored))
    run(cut.parent)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_one_process_at_a_time(cut):
    with Run(cut, json.loads((cut / "args.json").read_text())["arguments"]):
        done = subprocess.run([sys.executable, "-c", "import sys; from conas import cli; from pathlib import Path; "
                               "from tests.runs.test_resume import run; "
                               f"sys.exit(cli.run(lambda: run(Path({str(cut.parent)!r}))))"],
                              cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 2 and "another process is at work on this run" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    # a process that is killed leaves its lock file but not its lock
    assert os.WIFSIGNALED(in_child(lambda: run(cut.parent), fatal=3)[0]) and (cut / ".lock").exists()
    run(cut.parent)


def test_the_clock_writes_states(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("conas.runs.resume.Checkpointer.save", lambda self, state: written.append(state["course"]))
    run(tmp_path / "cnn_space2")
    assert [course and course["step"] for course in written] == [1, 2, 2, None, 1, 2, 2, None]
    written.clear()
    run(tmp_path / "other", "--checkpoint_minutes", "10")
    assert written == [None, None]


# losses that are not finite

def spoil_batch(monkeypatch, stream: str, number: int) -> None:
    """Make the images of a stream's batch NaN."""
    batches = Stream.batches

    def spoiled(self, start=0):
        for i, (x, y) in enumerate(batches(self, start), start):
            yield (x * torch.nan if self.name == stream and i == number else x), y
    monkeypatch.setattr(Stream, "batches", spoiled)


@pytest.mark.parametrize("stream", ["weights", "alphas"])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_what_was_good(tmp_path, monkeypatch, stream):
    spoil_batch(monkeypatch, stream, STEPS + 1)
    with pytest.raises(InputError, match=r"nan in epoch 1 at batch 1, .*images \d+, .*--on_nan skip"):
        run(tmp_path / "cnn_space2")
    state = load(tmp_path / "cnn_space2" / "search-EXP" / "resume.pt")
    assert state["course"]["step"] == 1 and all(t.isfinite().all() for t in state["state"].values())


@pytest.mark.parametrize("stream", ["weights", "alphas"])
def test_skipped_steps_are_counted_and_told(tmp_path, monkeypatch, stream):
    spoil_batch(monkeypatch, stream, STEPS + 1)
    folder = run(tmp_path / "cnn_space2", "--on_nan", "skip")
    assert [json.loads(line)["skipped"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1]
    assert "1 steps were skipped" in (folder / "log.txt").read_text()
    assert all(t.isfinite().all() for t in load(folder / "resume.pt")["state"].values())


def test_a_skipped_step_changes_nothing():
    torch.manual_seed(0)
    network = Network(2, 4, 3).train()
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.1, momentum=0.9)
    architect = Architect(network, optimizer)
    good = torch.randn(4, 3, 8, 8), torch.arange(4)
    bad = good[0] * torch.inf, good[1]
    assert architect.step(good, good, 0.1, skip=True)
    search.weight_step(network, optimizer, good, 5.0, skip=True)

    def state():
        return [{name: t.clone() for name, t in network.state_dict().items()},
                [{k: t.clone() for k, t in values.items()} for opt in (optimizer, architect.alpha_optimizer)
                 for values in opt.state.values()]]
    before = state()
    assert not architect.step(good, bad, 0.1, skip=True) and not architect.step(bad, good, 0.1, skip=True)
    loss, _ = search.weight_step(network, optimizer, bad, 5.0, skip=True)
    assert loss.isnan() and not differences(state(), before)
    search.weight_step(network, optimizer, bad, 5.0)
    assert differences(state(), before)


def test_the_gradient_may_be_what_is_not_finite():
    network = torch.nn.Linear(1, 2, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    x = torch.tensor([[1e30]])
    with torch.no_grad():
        network.weight.zero_()
    weight = network.weight.clone()
    loss, _ = train.train_step(lambda x: network(x) * 1e30 + 0, optimizer, (x, torch.zeros(1, dtype=torch.long)),
                               train.RecipeOptions(grad_clip=5.0, label_smooth=0.0), 0.4, False, network)
    assert loss.isnan() and torch.equal(network.weight, weight)


def test_a_course_of_skipped_steps_only():
    class Two:
        steps, device = 2, torch.device("cpu")
    meter = EpochMeter("", 0, Two(), 1, skip=True)
    with pytest.raises(InputError, match="every step of epoch 0 was skipped"):
        for _ in meter:
            meter.add(torch.tensor(torch.nan), torch.tensor(0), 4)


def test_training_goes_on_from_within_an_epoch(tmp_path, monkeypatch):
    whole = run_training(tmp_path / "whole" / "cnn_space2")
    step, calls = train.train_step, iter(range(100))

    def interrupted(*arguments):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)
    monkeypatch.setattr(train, "train_step", interrupted)
    with pytest.raises(Stopped, match="epoch 1 after 2 steps") as stop:
        run_training(tmp_path / "cut" / "cnn_space2")
    assert stop.value.code == 130
    monkeypatch.undo()
    assert not differences(everything(run_training(tmp_path / "cut" / "cnn_space2")), everything(whole))


def test_a_search_is_a_function_of_its_seed_alone(tmp_path, whole):
    torch.rand(7)
    assert not differences(everything(run_search(tmp_path / "cnn_space2")), everything(whole))
