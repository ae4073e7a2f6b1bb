"""The fixtures, through the command that users run."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import FLOAT32, main, read_fixture, recurrent_quantities, relative_error, search_quantities

FIXTURES = sorted(Path(__file__).parent.glob("*_seed0.npz"))


def parity(path, code):
    """The quantities that the command finds wrong, and all."""
    done = subprocess.run([sys.executable, "-m", "tests.parity", path], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return [line.split()[1] for line in lines if "ABOVE" in line], [line.split()[1] for line in lines]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_command_notices_a_wrong_number_and_finds_all_others_right(path, tmp_path):
    fixture = read_fixture(path)
    changed = "search/hypergradient" if "nhid" in fixture else "step1/hypergradient_reduce"
    fixture[changed] = fixture[changed] * (1 + 3e-6)
    np.savez(tmp_path / "wrong.npz", **fixture)
    above, all_ = parity(tmp_path / "wrong.npz", 1)
    assert above == [changed] and len(all_) >= (7 if "nhid" in fixture else 25)


def test_command_passes():
    assert parity(FIXTURES[0], 0)[0] == []


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_float32_logits(path):
    fixture = read_fixture(path)
    quantities = recurrent_quantities if "nhid" in fixture else search_quantities
    name, logits, _ = next(iter(quantities(fixture, torch.float32)))
    assert relative_error(logits, fixture[name]) < FLOAT32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_float64_on_a_gpu(path):
    assert main(["--device", "cuda", str(path)]) == 0
