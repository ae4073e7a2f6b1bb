"""Small searches of space 2, and what tests of their options need: three cells, a few digits, no pictures."""
from importlib import import_module

import pytest
import torch

from conas.commands import search
from conas.engine.door import accelerate
from conas.runs.checkpoint import load

SMALL = ["--dataset", "digits", "--subset", "110", "--init_channels", "2", "--layers", "3", "--batch_size", "25",
         "--epochs", "1", "--device", "cpu"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Log:
    """What of a Run is needed here."""

    def __init__(self):
        self.lines = []

    def log(self, text):
        self.lines.append(text)


def problem(space="cnn_space2", fast=True, **settings):
    """A network, by the engine if `fast`, and an iteration of its search."""
    torch.manual_seed(0)
    network = import_module(f"{space}.model_search").Network(C=4, layers=3)
    assert not fast or accelerate(network)
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    architect = import_module(f"{space}.architect").Architect(network, optimizer, **settings)
    batches = [(torch.randn(6, 3, 8, 8), torch.randint(10, (6,))) for _ in range(2)]
    return network, optimizer, architect, batches


def run_search(folder, *flags):
    """The last checkpoint's state and the log of a short search."""
    space = import_module("cnn_space2.model_search"), import_module("cnn_space2.architect")
    search.main(folder / "cnn_space2", space[0].Network, space[1].Architect, "", [*SMALL, *flags])
    run = folder / "cnn_space2" / "search-EXP"
    return load(run / "checkpoints" / "epoch_000.pt")["state"], (run / "log.txt").read_text()


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "draw_genotype", lambda *_: [])  # they take longer than these searches
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_search(tmp_path_factory.mktemp("plain"))


def equal(state, other):
    return all(torch.equal(state[name], other[name]) for name in other)
