"""What is kept of runs as results: no path of a machine, and nothing of what is no run."""
import json
import subprocess

import pytest

from benchmarks import keep
from conas.errors import InputError
from tests.conftest import ROOT


def test_arguments_metrics_and_committees_are_kept_without_paths(tmp_path):
    run, target = tmp_path / "cnn_space1" / "train-a", tmp_path / "kept"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "epoch_000.pt").touch()
    arguments = {"dataset": "folder", "data": str(tmp_path), "epochs": 2, "arch": None}
    (run / "args.json").write_text(json.dumps({"arguments": arguments, "folders": [str(run)]}))
    (run / "metrics.jsonl").write_text('{"epoch": 0}\n')
    assert keep.keep(run, target) == ["args.json", "metrics.jsonl"]
    assert (target / "metrics.jsonl").read_text() == '{"epoch": 0}\n'
    assert json.loads((target / "args.json").read_text())["epochs"] == 2
    assert str(tmp_path) not in (target / "args.json").read_text()
    assert sorted(path.name for path in target.iterdir()) == ["args.json", "metrics.jsonl"]


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="is neither a run nor a committee"):
        keep.keep(tmp_path, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
@pytest.mark.parametrize("path, ignored", [
    ("cnn_space1/train-a/metrics.jsonl", True), ("rnn/search-a/args.json", True), ("committee-a/committee.json", True),
    ("benchmarks/results/a/cnn_space1/train-a/metrics.jsonl", False), ("kept/cnn_space1/search-a/run.json", False),
    ("benchmarks/results/a/committee-a/committee.json", False)])
def test_git_ignores_runs_and_not_what_is_kept_of_them(path, ignored):
    done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, check=False)
    assert done.returncode == (0 if ignored else 1)
