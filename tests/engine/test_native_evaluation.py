"""Supernets in evaluation by kernels against their definition."""
from copy import deepcopy
from importlib import import_module
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from conas.darts.operations import FactorizedReduce, ReLUConvBN
from conas.darts.supernet import MixedOp, SearchCell, Supernet
from conas.engine.inference import prepared
from conas.engine.native.evaluation import EvaluatedCell, EvaluatedSupernet, evaluate_operation
from conas.engine.native.loader import kernels, why_no_kernels
from conas.engine.precision import checkpoint_cells
from tests.engine.test_native import EXACT, MODULES, draw
from tests.helpers.parity import fill

pytestmark = pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {why_no_kernels()}")


def filled(network, seed=0):
    """In float64, with weights, running statistics and alphas that hide nothing."""
    fill(network, seed)
    for alphas in network.alphas().values():
        nn.init.normal_(alphas)
    return network.double().eval()


class Halves(nn.Module):
    """An operation that no kernel knows."""

    def __init__(self, C, stride):
        super().__init__()
        self.convolution = nn.Conv2d(C, C, 3, stride, 1)

    def forward(self, x):
        return self.convolution(x).tanh()


class Own(Supernet):
    primitives = "skip_connect", "halves", "again", "sep_conv_3x3", "pointwise", "avg_pool_3x3"
    operations = MappingProxyType({
        "halves": lambda C, stride, affine: Halves(C, stride),
        "again": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
        "pointwise": lambda C, stride, affine: (ReLUConvBN(C, C, 1, 1, 0, affine) if stride == 1 else
                                                FactorizedReduce(C, C, affine))})


class ByEdge(Supernet):
    primitives = (("none", "sep_conv_3x3"), ("max_pool_3x3", "dil_conv_5x5")) * 7


class Doubled(MixedOp):
    def forward(self, x, weights):
        return 2 * super().forward(x, weights)


class OwnMixing(Supernet):
    primitives = "none", "sep_conv_3x3"
    cell = type("DoubledCell", (SearchCell,), {"mixed_op": Doubled})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(N=some.integers(1, 4), C=some.integers(1, 19), H=some.integers(1, 13), W=some.integers(1, 40),
       k=some.sampled_from([3, 5, 7]), stride=some.sampled_from([1, 2]), single=some.booleans())
@torch.no_grad()
def test_an_operation_is_torchs(kind, threads, N, C, H, W, k, stride, single):
    torch.manual_seed(0)
    module = MODULES[kind](C + (kind == "halves"), k, stride).double().eval()
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    x = draw(N, C + (kind == "halves"), H, W)
    expected = 0.3 * module(x)
    torch.set_num_threads(threads)
    try:
        if single:
            ours = evaluate_operation(kernels(), module.float(), 0.3, x.float()).double()
            assert (ours - expected).norm() <= 1e-5 * expected.norm()
        else:
            torch.testing.assert_close(evaluate_operation(kernels(), module, 0.3, x), expected, **EXACT)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("C, dtype", [(16, torch.float32), (6, torch.float32), (16, torch.float64)])
@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3"])
@torch.inference_mode()
def test_a_network_is_its_definition_whatever_its_width_and_the_number_of_images(space, C, dtype):
    network = filled(import_module(f"{space}.model_search").Network(C, 10, 3))
    x = draw(11, 3, 12, 12)  # more than go through all cells together
    expected = network(x)
    ours = prepared(network.to(dtype))
    assert isinstance(ours, EvaluatedSupernet) and all(isinstance(cell, EvaluatedCell) for cell in ours.cells)
    error = (ours(x.to(dtype)) - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind, compiled", [(Own, True), (ByEdge, True), (OwnMixing, False)])
@torch.no_grad()
def test_what_kernels_do_not_know_runs_beside_them(kind, compiled):
    network, x = filled(kind(4, 10, 4)), draw(3, 3, 10, 10)
    ours = prepared(network)
    assert {isinstance(cell, EvaluatedCell) for cell in ours.cells} == {compiled}
    torch.testing.assert_close(ours(x), network(x), **EXACT)


@torch.inference_mode()
def test_a_network_with_another_forward_or_a_hook_runs_by_itself():
    class Other(Supernet):
        primitives = "none", "sep_conv_3x3"

        def shares(self, kind):
            return super().shares(kind).square()

    hooked, calls = Other.__base__, []
    assert prepared(network := Other(4, 10, 3)) is network
    hooked = filled(import_module("cnn_space2.model_search").Network(4, 10, 3))
    hooked.cells[1]._ops[3].register_forward_hook(lambda *_: calls.append(1))
    prepared(hooked)(draw(2, 3, 8, 8))
    assert calls


@torch.inference_mode()
def test_the_same_bits_by_any_number_of_threads_and_beside_an_image_that_is_not_finite():
    network = filled(import_module("cnn_space1.model_search").Network(8, 10, 3)).float()
    ours, x = prepared(network), torch.randn(19, 3, 16, 16)
    expected = ours(x)
    try:
        for threads in 2, 3:
            torch.set_num_threads(threads)
            assert torch.equal(ours(x), expected)
    finally:
        torch.set_num_threads(1)
    x[3] = float("nan")
    found = ours(x)
    assert found[3].isnan().all() and torch.equal(found[4:], expected[4:]) and torch.equal(found[:3], expected[:3])


@torch.no_grad()
def test_training_mode_and_repeated_cells_change_nothing():
    network, x = filled(import_module("cnn_space2.model_search").Network(4, 10, 3)), draw(3, 3, 8, 8)
    expected, buffers = network(x), deepcopy(network.state_dict())
    checkpoint_cells(network, None)
    ours = prepared(network)
    network.train()
    assert all(isinstance(cell, EvaluatedCell) for cell in ours.cells)
    torch.testing.assert_close(ours(x), expected, **EXACT)
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in network.state_dict().items())


def test_gradients_and_bfloat16_are_the_definitions():
    network, x = filled(import_module("cnn_space2.model_search").Network(4, 10, 3)), draw(2, 3, 8, 8)
    ours = prepared(network)
    wanted = [torch.autograd.grad(of(x.requires_grad_()).sum(), x)[0] for of in (ours, network)]
    assert torch.equal(*wanted)
    network.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x.float()), network(x.float()))
