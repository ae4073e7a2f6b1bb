"""Too little memory is one line that says what would need less, and the next try may have other flags."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conas import cli
from conas.errors import InputError
from conas.memory import is_out_of_memory, needs_less
from conas.runs.folder import Run
from tests.conftest import ROOT

# Runs a script in a process that may have so much more memory than torch's import took.
LIMITED = """
import resource, runpy, sys
import torch, torchvision.datasets, matplotlib.pyplot, tqdm, PIL.Image
torch.set_num_threads(1)
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[1]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.argv = sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
DIGITS = ["--dataset", "digits", "--subset", "40", "--layers", "3", "--epochs", "1"]


def limited(script: Path, *flags: object, more: int = 700) -> subprocess.CompletedProcess:
    """`python SCRIPT FLAGS` with `more` MiB of memory than after its imports."""
    return subprocess.run([sys.executable, "-c", LIMITED, str(more), str(script), *map(str, flags)], text=True,
                          capture_output=True, timeout=300)


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: out of memory; "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_a_search_that_needs_too_much_says_so_and_starts_again_with_less(bare_clone, tmp_path):
    shutil.copytree(bare_clone.root, tmp_path / "CoNAS")
    space = tmp_path / "CoNAS" / "cnn_space2"
    flags = [*DIGITS, "--init_channels", "16", "--stem", "cifar"]
    done = limited(space / "train_search.py", *flags, "--image_size", "256", "--batch_size", "16")
    one_line(done, "--batch_size (16 now)", "--image_size (256 now)", "--checkpoint_cells", "--init_channels (16 now)")
    done = limited(space / "train_search.py", *flags, "--image_size", "8", "--batch_size", "4")
    assert done.returncode == 0, done.stderr
    assert "nothing of the run with --batch_size 16 (now 4), --image_size 256 (now 8) was saved" in done.stdout
    arguments = json.loads((space / "search-EXP" / "args.json").read_text())["arguments"]
    assert (arguments["batch_size"], arguments["image_size"]) == (4, 8)
    done = limited(space / "train_search.py", *flags, "--image_size", "8", "--batch_size", "8")
    assert done.returncode == 2 and "holds a run with --batch_size 4 (now 8)" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as Linux does")
def test_other_scripts_alike():
    done = limited(ROOT / "rnn" / "train_search.py", "--dataset", "gospels", "--nhid", "9000", "--save", "none",
                   more=500)
    one_line(done, "--batch_size (256 now)", "--nhid (9000 now)", "--bptt (35 now)")
    assert "--image_size" not in done.stderr
    for file in sorted((ROOT / "rnn").glob("search-none/*")):
        file.unlink()


@pytest.mark.parametrize("error", [
    MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB"), RuntimeError("can't start new thread"),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nDefaultCPUAllocator: can't allocate memory"),
], ids=str)
def test_every_allocator_is_known(capsys, error):
    def fail():
        raise error
    assert cli.run(fail) == 2
    assert capsys.readouterr().err.startswith("error: out of memory; ")


def test_other_errors_keep_their_tracebacks_and_lines(capsys):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        cli.run(lambda: _raise(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))

    def unreadable():
        raise InputError("a.pt: is damaged") from MemoryError()
    assert cli.run(unreadable) == 2
    assert capsys.readouterr().err == "error: a.pt: is damaged (or there was too little memory to read it)\n"
    assert not is_out_of_memory(None)
    assert needs_less({"batch_size": 8, "checkpoint_cells": True}).startswith(
        "out of memory; a smaller --batch_size (8 now) would need less")


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kept", ["resume.pt", "resume.before.pt", "checkpoints/epoch_000.pt", "metrics.jsonl"])
def test_what_has_saved_anything_keeps_its_flags(tmp_path, kept):
    with Run(tmp_path / "search-EXP", {"seed": 1}):
        pass
    with Run(tmp_path / "search-EXP", {"seed": 2}) as run:
        assert "nothing of the run with --seed 1 (now 2) was saved" in (run.folder / "log.txt").read_text()
    (run.folder / kept).parent.mkdir(exist_ok=True)
    (run.folder / kept).touch()
    with pytest.raises(InputError, match=r"holds a run with --seed 2 \(now 3\)"), Run(run.folder, {"seed": 3}):
        pass
    assert json.loads((run.folder / "args.json").read_text())["arguments"] == {"seed": 2}
