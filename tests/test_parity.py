"""The fixtures, through the command that users run."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity import FLOAT32, main, read_fixture, recurrent_quantities, relative_error, search_quantities

FIXTURES = sorted(Path(__file__).parent.glob("*_seed0.npz"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_command_passes_and_notices_a_wrong_number(path, tmp_path):
    fixture = read_fixture(path)
    changed = "search/hypergradient" if "nhid" in fixture else "step1/hypergradient_reduce"
    fixture[changed] = fixture[changed] * (1 + 3e-6)
    np.savez(tmp_path / "wrong.npz", **fixture)
    for name, code in ((path, 0), (tmp_path / "wrong.npz", 1)):
        done = subprocess.run([sys.executable, "-m", "tests.parity", name], capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        above = [line.split()[1] for line in done.stdout.splitlines() if "ABOVE" in line]
        assert above == ([] if code == 0 else [changed])


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
