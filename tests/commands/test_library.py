"""CoNAS as a library: the same step as a space's scripts, and an installation without the repository."""
import subprocess
import sys

import pytest
import torch

import conas
from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas.commands.search import weight_step
from tests.conftest import clone


def batches(images: int = 4):
    numbers = torch.Generator().manual_seed(0)
    return [(torch.randn(images, 3, 8, 8, generator=numbers), torch.arange(images)) for _ in range(2)]


def test_a_step_is_that_of_a_space():
    torch.manual_seed(0)
    search = conas.Search(Network.primitives, C=2, layers=3)
    torch.manual_seed(0)
    network = Network(C=2, layers=3)
    conas.accelerate(network)
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    architect = Architect(network, optimizer)
    for _ in range(2):
        architect.step(*batches(), 0.025)
        loss, _ = weight_step(network, optimizer, batches()[0], 5.0)
        assert torch.equal(search.step(*batches()), loss)
    for name, tensor in search.network.state_dict().items():
        torch.testing.assert_close(tensor, network.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert search.genotype() == network.genotype()


def test_an_operation_of_ones_own_runs_by_the_definition():
    own = {"conv_3x3": lambda C, stride, affine: torch.nn.Conv2d(C, C, 3, stride, 1)}
    search = conas.Search(["none", "conv_3x3"], operations=own, C=2, layers=3)
    assert search.engine is None and search.step(*batches()).isfinite()


def test_what_is_public_is_there_and_nothing_else():
    assert all(getattr(conas, name) is not None for name in conas.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        conas.nothing  # noqa: B018


def test_an_installed_copy_searches_a_step(tmp_path):
    """In an environment of its own, which sees this one's libraries, away from the repository."""
    source = clone(tmp_path / "source").root
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
                    str(tmp_path / "site"), str(source)], check=True, cwd=tmp_path)
    code = ("import conas, torch; from conas import Search; assert 'site' in conas.__file__;"
            "import ensemble.report.html; s = Search(['none', 'skip_connect', 'sep_conv_3x3'], C=2, layers=3);"
            "b = (torch.randn(4, 3, 8, 8), torch.arange(4)); print(s.step(b, b).item(), s.genotype())")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Genotype(normal=" in done.stdout, done.stderr
