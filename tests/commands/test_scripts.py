"""The commands of the README, as processes, in a bare clone: from any folder, with a copied space, with bad input."""
import csv
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from conas.darts.genotype import Genotype
from conas.runs.checkpoint import load
from tests.conftest import Clone
from tests.helpers.hostile import Payload

SMALL = ["--dataset", "digits", "--subset", "200", "--init_channels", "2", "--layers", "3", "--batch_size", "50"]
SPACES = ["cnn_space1", "cnn_space2", "cnn_space3"]


def one_line_error(done, *words):
    """Exit code 2, one line on stderr with all the words, no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def searched(bare_clone, tmp_path_factory) -> Clone:
    """A clone in which all three spaces were searched, each started from another folder."""
    root = tmp_path_factory.mktemp("searched") / "CoNAS"
    shutil.copytree(bare_clone.root, root)
    clone = Clone(root)
    for space, cwd in zip(SPACES, (None, root, "/")):
        done = clone.run(f"{space}/train_search.py", *SMALL, "--epochs", "2", cwd=cwd, fresh=cwd == "/")
        assert done.returncode == 0, done.stderr
    return clone


@pytest.fixture
def copy(searched, tmp_path) -> Clone:
    """A copy of the searched clone that a test may spoil."""
    shutil.copytree(searched.root, tmp_path / "CoNAS")
    return Clone(tmp_path / "CoNAS")


def test_a_search_leaves_what_it_promises(searched):
    folder = searched.root / "cnn_space1" / "search-EXP"
    log = (folder / "log.txt").read_text().splitlines()
    assert any("second order" in line for line in log[:3])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in metrics] == [0, 1] and metrics[0]["learning_rate"] == 0.025
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["epoch_000.pt", "epoch_001.pt"]
    checkpoint = load(folder / "checkpoints" / "epoch_001.pt")
    assert checkpoint["space"] == "cnn_space1" and checkpoint["dataset"]["name"] == "digits"
    genotype = json.loads((folder / "genotypes" / "epoch_001.json").read_text())
    assert genotype == json.loads((folder / "genotype.json").read_text())
    assert genotype == checkpoint["genotype"] | {"rule": genotype["rule"]} and genotype["rule"]
    line = next(line for line in log if line.startswith("Genotype("))
    printed = eval(line, {"Genotype": Genotype, "range": range, "__builtins__": {}})
    assert [list(edge) for edge in printed.normal] == genotype["normal"]
    for name in ("normal.svg", "normal.png", "reduce.svg", "reduce.png"):
        assert (folder / "cells" / name).stat().st_size > 1000


def test_first_order_says_so_and_differs(searched, copy):
    done = copy.run("cnn_space2/train_search.py", *SMALL, "--epochs", "2", "--no-unrolled", "--save", "first")
    assert "first order" in "".join(done.stdout.splitlines()[:3])
    first, second = (load(copy.root / "cnn_space2" / f"search-{name}" / "checkpoints" / "epoch_001.pt")
                     for name in ("first", "EXP"))
    assert not torch.equal(first["state"]["alphas_normal"], second["state"]["alphas_normal"])


def test_the_whole_pipeline(copy):
    for space, cwd in zip(SPACES, ("/", None, copy.root)):
        done = copy.run(f"{space}/test_all.py", cwd=cwd, fresh=True)
        assert done.returncode == 0, done.stderr
        assert [line.split()[2] for line in done.stdout.splitlines() if " epoch " in line] == ["0", "1"]
        rows = list(csv.DictReader((copy.root / space / "search-EXP" / "test_all.csv").open()))
        assert [row["epoch"] for row in rows] == ["0", "1"] and set(rows[0]) == {"epoch", "loss", "top1", "top5"}
    stored = {path: path.stat().st_mtime_ns for path in copy.root.glob("*/search-EXP/probabilities/*.npz")}
    assert len(stored) == 6
    done = copy.run("test_ensemble.py", cwd="/", fresh=True)
    assert done.returncode == 0, done.stderr
    for space in SPACES:
        assert space in done.stdout
    assert {path: path.stat().st_mtime_ns for path in stored} == stored  # used, not computed again
    folder = copy.root / "committee-EXP"
    assert list(folder.glob("*.csv")) and list(folder.glob("*.json")) and list(folder.glob("*.png"))


def test_committee_computes_what_is_missing_or_stale(copy):
    done = copy.run("test_ensemble.py")
    assert done.returncode == 0, done.stderr
    path = copy.root / "cnn_space1" / "search-EXP" / "probabilities" / "epoch_000.npz"
    shutil.copy(path.with_name("epoch_001.npz"), path)  # probabilities of another checkpoint
    stale = path.read_bytes()
    again = copy.run("test_ensemble.py")
    assert again.stdout == done.stdout
    assert path.read_bytes() != stale


def test_a_copied_space_is_a_space(copy):
    shutil.copytree(copy.root / "cnn_space3", copy.root / "cnn_space4")
    genotypes = copy.root / "cnn_space4" / "genotypes.py"
    genotypes.write_text(re.sub(r'    "sep_conv_5x5",\n', '    "dil_conv_3x3",\n', genotypes.read_text()))
    # The runs were copied too: they belong to space 3, and nobody may take them for results of space 4.
    one_line_error(copy.run("cnn_space4/test_all.py"), "epoch_000.pt", "cnn_space3", "cnn_space4")
    one_line_error(copy.run("test_ensemble.py"), "epoch_000.pt", "cnn_space3", "cnn_space4")
    shutil.rmtree(copy.root / "cnn_space4" / "search-EXP")
    done = copy.run("cnn_space4/train_search.py", *SMALL, "--epochs", "2", cwd="/")
    assert done.returncode == 0, done.stderr
    checkpoint = load(copy.root / "cnn_space4" / "search-EXP" / "checkpoints" / "epoch_001.pt")
    assert checkpoint["space"] == "cnn_space4"
    assert checkpoint["primitives"] == ["none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "dil_conv_3x3",
                                        "dil_conv_5x5"]
    done = copy.run("test_ensemble.py")
    assert done.returncode == 0 and "cnn_space4" in done.stdout, done.stderr


def test_the_same_command_goes_on_and_ends_alike(searched, copy):
    """Killed after its first epoch and started again, a search ends as the uninterrupted one, bit for bit."""
    folder = copy.root / "cnn_space2" / "search-EXP"
    shutil.rmtree(folder)
    command = [sys.executable, "train_search.py", *SMALL, "--epochs", "2"]
    process = subprocess.Popen(command, cwd=folder.parent, stdout=subprocess.DEVNULL)
    while not (folder / "resume.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = copy.run("cnn_space2/train_search.py", *SMALL, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    whole = searched.root / "cnn_space2" / "search-EXP"
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    ours, expected = (load(f / "checkpoints" / "epoch_001.pt")["state"] for f in (folder, whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_run_is_never_overwritten(copy):
    folder = copy.root / "cnn_space1" / "search-EXP"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}
    done = copy.run("cnn_space1/train_search.py", *SMALL, "--epochs", "2")
    assert done.returncode == 0 and "finished" in done.stdout
    one_line_error(copy.run("cnn_space1/train_search.py", *SMALL, "--epochs", "3"), "search-EXP", "--epochs", "--save")
    assert {path: path.read_bytes() for path in before} == before


def test_ctrl_c(copy):
    command = [sys.executable, "train_search.py", *SMALL, "--epochs", "500", "--save", "long"]
    process = subprocess.Popen(command, cwd=copy.root / "cnn_space3", stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not (copy.root / "cnn_space3" / "search-long" / "resume.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "start the same command again" in errors and "Traceback" not in errors


@pytest.mark.parametrize("flags, words", [
    (["--layer", "5"], ["--layer", "--layers"]),
    (["--layers", "2"], ["--layers 2", "at least 3"]),
    (["--init_channels", "5"], ["--init_channels 5", "even"]),
    (["--learning_rate", "nan"], ["--learning_rate nan"]),
    (["--weight_decay", "inf"], ["--weight_decay inf: must be a finite number"]),
    (["--dataset", "mnits"], ["--dataset", "mnits"]),
    (["--device", "gpu"], ["--device gpu", "cuda"]),
    (["--device", "cuda:99"], ["--device cuda:99"]),
    (["--dataset", "digits", "--batch_size", "5000"], ["--batch_size 5000"]),
    (["--dataset", "digits", "--train_portion", "1"], ["--train_portion"]),
    (["--dataset", "digits", "--save", "../x"], ["--save ../x"]),
    (["--dataset", "folder", "--data", "nowhere"], ["nowhere"]),
])
def test_wrong_flags(bare_clone, flags, words):
    one_line_error(bare_clone.run("cnn_space1/train_search.py", *flags), *words)
    assert not (bare_clone.root / "cnn_space1" / "search-EXP").exists()


def test_without_runs(bare_clone):
    one_line_error(bare_clone.run("cnn_space1/test_all.py"), "search-EXP", "train_search.py")
    one_line_error(bare_clone.run("test_ensemble.py"), "train_search.py")


@pytest.mark.parametrize("spoil", ["truncate", "payload", "foreign"])
def test_bad_checkpoints(copy, spoil):
    path = copy.root / "cnn_space2" / "search-EXP" / "checkpoints" / "epoch_001.pt"
    if spoil == "truncate":
        path.write_bytes(path.read_bytes()[:1000])
    elif spoil == "payload":
        path.write_bytes(pickle.dumps(Payload(copy.root / "ran")))
    else:
        shutil.copy(copy.root / "cnn_space3" / "search-EXP" / "checkpoints" / "epoch_001.pt", path)
    for script in ("cnn_space2/test_all.py", "test_ensemble.py"):
        one_line_error(copy.run(script), "epoch_001.pt")
    assert not (copy.root / "ran").exists()


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # as a full disk: the checkpoint does not fit


def test_a_disk_that_is_full(copy):
    folder = copy.root / "cnn_space1" / "search-full"
    one_line_error(copy.run("cnn_space1/train_search.py", *SMALL, "--epochs", "1", "--save", "full",
                            fresh=True, preexec_fn=limit_file_size), "epoch_000")
    assert not list(folder.rglob("*.pt")) and not list(folder.rglob("*.tmp*"))
    done = copy.run("cnn_space1/train_search.py", *SMALL, "--epochs", "1", "--save", "full")  # there is room again
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_folder_that_is_read_only(copy):
    (copy.root / "cnn_space1").chmod(0o555)
    one_line_error(copy.run("cnn_space1/train_search.py", *SMALL, "--epochs", "1", "--save", "new"), "cnn_space1")


def test_pytest_in_the_root_collects_no_scripts(bare_clone):
    done = subprocess.run([sys.executable, "-m", "pytest", "--collect-only", "-q"], cwd=bare_clone.root,
                          capture_output=True, text=True)
    assert "test_all" not in done.stdout and "test_ensemble" not in done.stdout
    assert done.returncode == 5  # the clone leaves tests/ out, and nothing else counts as a test


def test_spaces_differ_only_in_science(bare_clone):
    one, three = (bare_clone.root / name for name in ("cnn_space1", "cnn_space3"))
    assert {p.name for p in one.glob("*.py")} == {p.name for p in three.glob("*.py")}
    assert [p.name for p in one.glob("*.py") if p.read_text() != (three / p.name).read_text()] == ["genotypes.py"]
    for path in bare_clone.root.glob("cnn_space*/*.py"):
        assert "cnn_space" not in path.read_text(), path
