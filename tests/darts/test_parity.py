"""The fixtures, through the command that users run."""
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT
from tests.helpers.launch import start
from tests.helpers.parity import FLOAT32, main, read_fixture, recurrent_quantities, relative_error, search_quantities

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("*_seed0.npz"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_command_passes_all_but_a_wrong_number(path, tmp_path):
    """Of one that is changed by three times its tolerance it tells how far off that is; so the right one passes too."""
    fixture = read_fixture(path)
    changed = "search/hypergradient" if "nhid" in fixture else "step1/hypergradient_reduce"
    fixture[changed] = fixture[changed] * (1 + 3e-6)
    np.savez(tmp_path / "wrong.npz", **fixture)
    done = start("-m", "tests.helpers.parity", tmp_path / "wrong.npz", cwd=ROOT)
    assert done.returncode == 1, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) >= (7 if "nhid" in fixture else 25)
    [above] = [line for line in lines if "ABOVE" in line]
    assert above[1] == changed and float(above[2]) == pytest.approx(3e-6, rel=0.02), above


def test_command_ends_well_if_all_is_right():
    done = start("-m", "tests.helpers.parity", FIXTURES[0], cwd=ROOT)
    assert done.returncode == 0 and "ABOVE" not in done.stdout, done.stdout + done.stderr


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
