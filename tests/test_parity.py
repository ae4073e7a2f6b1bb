"""The fixtures, through the command that users run."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import FLOAT32, read_fixture, relative_error, search_quantities

FIXTURES = sorted(Path(__file__).parent.glob("space*_seed0.npz"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_command_passes_and_notices_a_wrong_number(path, tmp_path):
    fixture = read_fixture(path)
    fixture["step1/hypergradient_reduce"] = fixture["step1/hypergradient_reduce"] * (1 + 3e-6)
    np.savez(tmp_path / "wrong.npz", **fixture)
    for name, code in ((path, 0), (tmp_path / "wrong.npz", 1)):
        done = subprocess.run([sys.executable, "-m", "tests.parity", name], capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        above = [line.split()[1] for line in done.stdout.splitlines() if "ABOVE" in line]
        assert above == ([] if code == 0 else ["step1/hypergradient_reduce"])


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_float32_logits(path):
    fixture = read_fixture(path)
    name, logits, _ = next(iter(search_quantities(fixture, torch.float32)))
    assert relative_error(logits, fixture[name]) < FLOAT32
