"""Supernets prepared for evaluation: the same logits for images of any number and size, in fewer operations."""
from functools import partial
from importlib import import_module

import pytest
import torch

from benchmarks.counts import operator_calls
from conas.darts.derived import NetworkCIFAR
from conas.darts.published import GENOTYPES
from conas.darts.supernet import Supernet
from conas.engine import inference
from conas.engine.door import accelerate
from conas.engine.inference import Prepared, prepared
from conas.engine.native.evaluation import EvaluatedSupernet
from conas.engine.native.loader import kernels, why_no_kernels
from tests.helpers.parity import fill
from tests.helpers.ranks import Everything

needs_kernels = pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {why_no_kernels()}")


def supernet(space: str) -> Supernet:
    of_space = Everything if space == "everything" else import_module(f"{space}.model_search").Network
    network = of_space(C=2, layers=3)
    fill(network, 0)
    return network.eval()


@pytest.fixture(params=[pytest.param(True, marks=needs_kernels), False], ids=["kernels", "packed"])
def engine(request, monkeypatch):
    """Makes `prepared` use kernels, or packed edges. The class of what it returns."""
    if not request.param:
        monkeypatch.setattr(inference, "kernels", lambda: None)
    return EvaluatedSupernet if request.param else Prepared


@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3", "everything"])
@torch.inference_mode()
def test_logits_are_the_same(space, engine):
    network = supernet(space).double()
    ours = prepared(network)
    assert type(ours) is engine
    for shape in (1, 3, 8, 8), (5, 3, 9, 9), (2, 3, 32, 32):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x), network(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3", "everything"])
@torch.inference_mode()
def test_no_images(space, engine):
    network = supernet(space)
    for module in network, prepared(network):
        assert module(torch.zeros(0, 3, 16, 16)).shape == (0, 10)


@torch.no_grad()
def test_what_was_prepared_outlives_the_network():
    network, x = supernet("cnn_space2"), torch.randn(3, 3, 8, 8)
    expected, ours = network(x), Prepared(network)
    for entry in network.state_dict().values():
        entry.zero_()
    torch.testing.assert_close(ours(x), expected)
    assert not any(p is q for p in network.parameters() for q in ours.buffers()) and not list(ours.parameters())


@torch.no_grad()
def test_in_bfloat16_as_the_network():
    network, x = supernet("cnn_space1"), torch.randn(3, 3, 8, 8)
    assert accelerate(network)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = network.with_weights(x, network.flat()), Prepared(network)(x)
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).norm() < 0.1 * (found - network(x)).norm()


@torch.no_grad()
def test_fewer_operations():
    network, x = supernet("cnn_space3"), torch.randn(1, 3, 8, 8)
    counts = [operator_calls(partial(module, x)) for module in (Prepared(network), network)]
    assert counts[0] < 0.7 * counts[1], counts


def test_other_networks_stay_and_nothing_is_prepared_twice():
    class Own(Supernet):
        primitives = "none", "skip_connect"

        def forward(self, x, w=None):
            return 2 * super().forward(x, w)

    for network in NetworkCIFAR(4, 10, 3, False, GENOTYPES["DARTS"]), Own(C=2, layers=3):
        assert prepared(network) is network and not network.training
    ours = prepared(supernet("cnn_space2"))
    assert prepared(ours) is ours
