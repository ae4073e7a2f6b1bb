"""Runs of a study side by side: stopped by a signal that reaches the study alone, resumed, and as a Slurm array."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conas.errors import InputError
from conas.runs.folder import list_checkpoints
from ensemble import study, study_runs
from tests.conftest import Clone

FLAGS = "--dataset digits --subset 600 --init_channels 2 --layers 3 --batch_size 10 --no-unrolled --epochs 4"


@pytest.fixture
def planned(bare_clone, tmp_path) -> Clone:
    """A clone with a plan of two runs of space 3, and its Slurm script."""
    shutil.copytree(bare_clone.root, tmp_path / "CoNAS")
    clone = Clone(tmp_path / "CoNAS")
    done = clone.run("-m", "ensemble.study", "plan", "p.json", "--spaces", "cnn_space3", "--seeds", 2, "--size", 2,
                     f"--flags={FLAGS}", "--slurm", "p.sh", cwd=clone.root)
    assert done.returncode == 0, done.stderr
    return clone


def epochs(clone: Clone, seed: int) -> int:
    """How many epochs a run has kept."""
    try:
        return len(list_checkpoints(clone.root / "cnn_space3" / f"search-study-{seed}"))
    except InputError:
        return 0


def test_runs_side_by_side_stop_at_one_signal_and_go_on(planned):
    command = [sys.executable, "-m", "ensemble.study", "run", "p.json", "--jobs", "2"]
    process = subprocess.Popen(command, cwd=planned.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not (epochs(planned, 1) and epochs(planned, 2)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # to this process alone, as `kill` does and a terminal does not
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130 and "start the same command again" in err, out + err
    assert out.count("python train_search.py") == 2
    kept = [epochs(planned, seed) for seed in (1, 2)]
    assert all(0 < count < 4 for count in kept)
    for seed in (1, 2):
        assert (planned.root / "cnn_space3" / f"search-study-{seed}" / "resume.pt").exists()
    time.sleep(0.5)
    assert kept == [epochs(planned, seed) for seed in (1, 2)]  # nobody is at work any more

    script = planned.root / "p.sh"
    assert "#SBATCH --array=1-2\n" in script.read_text()
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "2", "PYTHON": sys.executable}
    done = subprocess.run(["bash", script], cwd=planned.root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "1 runs are done" in done.stdout, done.stdout + done.stderr
    assert [epochs(planned, seed) for seed in (1, 2)] == [kept[0], 4]

    process = subprocess.Popen(command, cwd=planned.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "python train_search.py" in process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 143 and "stopped; 1 of 2 runs are done" in err, out + err

    done = subprocess.run(command, cwd=planned.root, capture_output=True, text=True)
    assert done.returncode == 0 and "2 runs are done" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("python train_search.py") == 1 and epochs(planned, 1) == 4
    assert study_runs.read_seconds(planned.root / "cnn_space3" / "search-study-1") > 0


def test_side_by_side_a_run_that_fails_is_named_with_its_reason_and_the_others_go_on(planned):
    (planned.root / "cnn_space3" / "search-study-1").mkdir()
    (planned.root / "cnn_space3" / "search-study-1" / "notes").touch()
    plan = planned.root / "p.json"
    plan.write_text(plan.read_text().replace('"4"', '"1"'))
    done = planned.run("-m", "ensemble.study", "run", "p.json", "--jobs", 2, cwd=planned.root)
    assert done.returncode == 2 and "1 of 2 runs failed, first: cd cnn_space3" in done.stderr
    assert "[1 of 2] failed: " in done.stdout and "is not empty and holds no run" in done.stdout
    assert epochs(planned, 2) == 1


def test_flags_that_a_training_would_refuse_stop_a_study_before_its_searches(planned):
    grey = "--dataset digits --recipe imagenet --epochs 1"
    done = planned.run("-m", "ensemble.study", "plan", "t.json", "--spaces", "cnn_space3", "--seeds", 2, "--size", 2,
                       "--stage", "train", f"--flags={FLAGS}", f"--train_flags={grey}", cwd=planned.root)
    assert done.returncode == 0, done.stderr
    done = planned.run("-m", "ensemble.study", "run", "t.json", cwd=planned.root)
    assert done.returncode == 2 and "train.py would fail after the searches: --recipe imagenet: is for colour" in \
        done.stderr
    assert not list((planned.root / "cnn_space3").glob("search-*"))


def test_a_slurm_script_overwrites_nothing(tmp_path):
    content = study.plan(study.PlanOptions())
    script = tmp_path / "a b.sh"
    for _ in range(2):
        study_runs.write_slurm(script, tmp_path / "my plan's.json", content)
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "#SBATCH --array=1-15\n" in text and "#SBATCH --job-name=my_plan_s\n" in text
    script.write_text("echo mine")
    with pytest.raises(InputError, match="is another file"):
        study_runs.write_slurm(script, tmp_path / "plan.json", content)
