"""Kernels against torch in float64, by random shapes."""
from copy import deepcopy
from importlib import import_module
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn
from torch.func import functional_call

from conas.darts.batchnorm import use_exact_sums
from conas.darts.operations import AveragePool, DilConv, FactorizedReduce, ReLUConvBN, SepConv
from conas.darts.supernet import SearchCell
from conas.engine.door import accelerate, why_not
from conas.engine.native.cell import NativeCell
from conas.engine.native.functions import run_operation
from conas.engine.native.loader import kernels, why_no_kernels
from conas.engine.native.parts import read
from conas.engine.native.swap import NativePass
from tests.conftest import ROOT
from tests.helpers.parity import read_fixture, relative_error, search_quantities

needs_kernels = pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {why_no_kernels()}")
EXACT = dict(rtol=1e-9, atol=1e-11)


def pool(module, C):
    return nn.Sequential(module, nn.BatchNorm2d(C, affine=False))


MODULES = {
    "sep": lambda C, k, stride: SepConv(C, k, stride, False),
    "dil": lambda C, k, stride: DilConv(C, k, stride, False),
    "halves": lambda C, k, stride: FactorizedReduce(C, C + k - 2, False),
    "pointwise": lambda C, k, stride: ReLUConvBN(C, C + k, 1, 1, 0, False),
    "average": lambda C, k, stride: pool(AveragePool(stride), C),
    "maximum": lambda C, k, stride: pool(nn.MaxPool2d(3, stride, 1), C),
}


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
@settings(max_examples=12, deadline=None, database=None, derandomize=True)
@given(N=some.integers(1, 5), C=some.integers(1, 19), H=some.integers(2, 13), W=some.integers(2, 13),
       k=some.sampled_from([3, 5, 7]), stride=some.sampled_from([1, 2]), training=some.booleans(),
       equal=some.booleans())
def test_an_operation_and_its_gradients_are_torchs(kind, threads, N, C, H, W, k, stride, training, equal):
    torch.manual_seed(0)
    if kind == "halves":
        C += 1
    if N == 1 and max(H, W) <= stride:
        N = 2  # one value has no variance
    module = MODULES[kind](C, k, stride).double().train(training)
    use_exact_sums(module)
    for name, buffer in module.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    names = list(dict(module.named_parameters()))
    weights = [draw(*p.shape).requires_grad_() for p in module.parameters()]
    x = draw(N, C, H, W).contiguous(memory_format=torch.channels_last)
    x = (x.round() if equal else x).requires_grad_()  # several maxima in a window, and zeros for ReLU
    torch.set_num_threads(threads)
    try:
        ours = run_operation(kernels(), read(module), x, weights, training)
        expected = functional_call(module, dict(zip(names, weights)), (x,))
        grad = draw(*expected.shape)
        torch.testing.assert_close(ours, expected, **EXACT)
        for some_of in [x, *weights], [x], weights:  # what is not wanted is not computed
            if some_of:
                wanted = [torch.autograd.grad(y, some_of, grad, retain_graph=True) for y in (ours, expected)]
                torch.testing.assert_close(*wanted, **EXACT)
    finally:
        torch.set_num_threads(1)


def pair_of_cell(space, C, layer, own=None):
    """A cell, and its form by kernels; its weights, flat."""
    torch.manual_seed(0)
    of_space = import_module(f"{space}.model_search").Network
    network = of_space(C, 10, 3).double().to(memory_format=torch.channels_last)
    cell = network.cells[layer]
    if own is not None:
        for mixed in cell._ops:
            mixed._ops[-1] = own().double()
    named = dict(cell.named_parameters())
    offsets, count = {}, 0
    for name, p in named.items():
        offsets[name] = count
        count += p.numel()
    flat = torch.cat([p.detach().flatten() for p in named.values()]).requires_grad_()
    return cell, NativeCell(kernels(), cell, offsets), flat


def inputs_of(cell, sizes=(9, 7)):
    channels = [next(module.parameters()).shape[1] for module in (cell.preprocess0, cell.preprocess1)]
    large = isinstance(cell.preprocess0, FactorizedReduce)
    maps = [draw(3, channels[0], *(2 * size - 1 if large else size for size in sizes)), draw(3, channels[1], *sizes)]
    return [s.contiguous(memory_format=torch.channels_last).requires_grad_() for s in maps]


@needs_kernels
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("space", ["cnn_space1", "cnn_space2", "cnn_space3"])
def test_a_cell_and_its_gradients_are_the_definitions(space, layer):
    cell, native, w = pair_of_cell(space, 4, layer)
    s0, s1 = inputs_of(cell)
    shares = torch.rand(14, len(cell._ops[0]._ops), dtype=torch.float64, requires_grad=True)
    parameters = list(cell.parameters())
    for training in True, False:
        cell.train(training)
        expected, ours = cell(s0, s1, shares), native(s0, s1, shares, w, training)
        torch.testing.assert_close(ours, expected, **EXACT)
        grad = draw(*expected.shape)
        *wanted, of_w = torch.autograd.grad(ours, [s0, s1, shares, w], grad)
        *others, = torch.autograd.grad(expected, [s0, s1, shares, *parameters], grad)
        torch.testing.assert_close(wanted, others[:3], **EXACT)
        torch.testing.assert_close(of_w, torch.cat([d.flatten() for d in others[3:]]), **EXACT)
        alone = native(s0.detach(), s1.detach(), shares, w.detach(), training)  # equation 8 takes no other gradient
        torch.testing.assert_close(torch.autograd.grad(alone, shares, grad)[0], wanted[2], **EXACT)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_kernels), False])
@pytest.mark.parametrize("space", [1, 2, 3])
def test_parity_with_and_without_kernels(space, native):
    fixture = read_fixture(ROOT / f"tests/fixtures/space{space}_seed0.npz")
    engines = []

    def engine(network):
        engines.append(accelerate(network, native=native))
        return engines[0]

    seen = set()
    for name, ours, tolerance in search_quantities(fixture, accelerate=engine):
        assert relative_error(ours, fixture[name]) <= tolerance, name
        seen.add(name)
    assert (type(engines[0]) is NativePass) == native and len(seen) >= 20


@needs_kernels
def test_an_operation_that_kernels_do_not_know_runs_beside_the_others():
    def own():
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())

    cell, native, w = pair_of_cell("cnn_space2", 4, 0, own)
    s0, s1 = inputs_of(cell)
    shares = torch.rand(14, 6, dtype=torch.float64, requires_grad=True)
    expected, ours = cell(s0, s1, shares), native(s0, s1, shares, w, True)
    torch.testing.assert_close(ours, expected, **EXACT)
    of_own = [p for mixed in cell._ops for p in mixed._ops[-1].parameters()]
    assert len(of_own) == 28
    grad = draw(*expected.shape)
    of_ours, of_expected = (torch.autograd.grad(y, [s0, s1, shares, *of_own], grad) for y in (ours, expected))
    torch.testing.assert_close(of_ours, of_expected, **EXACT)


@needs_kernels
def test_float32_is_near_and_the_same_bits_by_any_number_of_threads():
    cell, native, w = pair_of_cell("cnn_space1", 16, 0)
    s0, s1 = inputs_of(cell, (17, 16))
    shares = torch.rand(14, 8, dtype=torch.float64, requires_grad=True)
    grad = draw(3, 64, 17, 16)

    def results(tensors):
        out = native(*tensors, True)
        return [out.detach(), *torch.autograd.grad(out, [tensors[3], tensors[2]], grad.to(out.dtype))]

    exact, few, found = results((s0, s1, shares, w)), [t.detach().float() for t in (s0, s1, shares, w)], []
    for t in few:
        t.requires_grad_()
    try:
        for threads in 1, 2, 3:
            torch.set_num_threads(threads)
            found.append(results(few))
    finally:
        torch.set_num_threads(1)
    for ours, right, error in zip(found[0], exact, (1e-6, 1e-3, 1e-3)):  # a gradient jumps where a ReLU is at its kink
        assert (ours - right).norm() < error * right.norm()
    assert all(torch.equal(one, other) for result in found[1:] for one, other in zip(found[0], result))


class OwnCell(SearchCell):
    """A cell that does more than its class says, so that each edge is computed by itself."""

    def forward(self, s0, s1, weights):
        return 2 * super().forward(s0, s1, weights)


@needs_kernels
def test_edges_of_other_cells_are_one_pass_over_all_maps():
    class Rows(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).contiguous()  # another layout than that of other maps

    class Other(import_module("cnn_space2.model_search").Network):
        cell = OwnCell
        primitives = "none", "own", "skip_connect", "sep_conv_3x3", "max_pool_3x3"
        operations = MappingProxyType({"own": lambda C, stride, affine: Rows(C, C, 3, stride, 1)})

    torch.manual_seed(0)
    network = Other(3, 4, 3).double()
    w, x = network.flat().detach().requires_grad_(), draw(3, 3, 8, 8)
    for alpha in network.alphas().values():
        nn.init.normal_(alpha)
    inputs = [w, *network.alphas().values()]
    expected = network.with_weights(x, w)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    engine = accelerate(network)
    assert len(engine.mixed) == 42 and not engine.cells
    ours = network.with_weights(x, w)
    torch.testing.assert_close(ours, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), inputs), wanted, **EXACT)
    alone = network.with_weights(x, w.detach())  # equation 8
    torch.testing.assert_close(torch.autograd.grad(alone.square().sum(), inputs[1:]), wanted[1:], **EXACT)


def test_what_was_changed_is_not_taken_for_what_it_was():
    right = SepConv(4, 3, 1, False)
    assert read(right).kind == "units" and read(AveragePool(1)).kind == "own"
    for change in (lambda op: setattr(op, "forward", torch.relu), lambda op: op.register_forward_hook(lambda *_: None),
                   lambda op: setattr(op.op[1], "padding", (0, 0)),
                   lambda op: setattr(op.op[1], "padding_mode", "reflect"),
                   lambda op: op.op.__setitem__(0, nn.ReLU6()), lambda op: setattr(op.op[3], "momentum", None),
                   lambda op: op.op.append(nn.ReLU()), lambda op: op.op.__setitem__(3, nn.BatchNorm2d(4))):
        changed = deepcopy(right)
        change(changed)
        assert read(changed).kind == "own"


@needs_kernels
@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_hook"])
def test_a_hook_on_an_edge_is_called_with_and_without_kernels(register):
    for native in (True, False):
        network, calls = import_module("cnn_space2.model_search").Network(2, 3, 3), []
        edge = network.cells[0]._ops[0]
        getattr(edge, register)(lambda *_, calls=calls: calls.append(1))
        engine = accelerate(network, native=native)
        assert "has a hook" in why_not(network) and (engine is None or "cells.0." not in engine.cells)
        network.with_weights(torch.randn(2, 3, 8, 8), network.flat().detach().requires_grad_()).sum().backward()
        assert len(calls) == 1
