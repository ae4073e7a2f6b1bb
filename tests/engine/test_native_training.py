"""Derived networks in training by kernels against torch's operators."""
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn
from torch.nn.functional import cross_entropy

from conas.darts.batchnorm import use_exact_sums
from conas.darts.derived import Cell, NetworkCIFAR
from conas.darts.genotype import Genotype
from conas.darts.operations import DilConv, FactorizedReduce, ReLUConvBN, SepConv
from conas.darts.published import GENOTYPES
from conas.engine.convolutions import accelerate_convolutions
from conas.engine.native.loader import kernels, why_no_kernels
from conas.engine.native.training import train_by_kernels

pytestmark = pytest.mark.skipif(kernels() is None, reason=f"no kernels here: {why_no_kernels()}")
EXACT = dict(rtol=1e-9, atol=1e-11)


def varied(module):
    """In float64, with BatchNorms whose weights and biases are no ones and zeros, but for a channel that is lost."""
    for p in module.parameters():
        if p.dim() == 1:
            nn.init.uniform_(p, -0.5, 1.5)
            p.data[0] = 0
    return module.double().to(memory_format=torch.channels_last).train()


@pytest.mark.parametrize("make", [lambda: SepConv(6, 3, 2), lambda: SepConv(5, 5, 1), lambda: DilConv(6, 5, 1),
                                  lambda: DilConv(6, 3, 2), lambda: FactorizedReduce(6, 9),
                                  lambda: ReLUConvBN(6, 4, 1, 1, 0)])
def test_an_operation_its_gradients_and_statistics_are_torchs(make):
    torch.manual_seed(0)
    plain = varied(make())
    ours = deepcopy(plain)
    assert train_by_kernels(ours, kernels()) == 1
    x = torch.randn(3, next(plain.parameters()).shape[1] if isinstance(plain, FactorizedReduce | ReLUConvBN) else
                    len(next(plain.parameters())), 9, 7, dtype=torch.float64)
    found = []
    for module in plain, ours:
        own = x.clone().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = module(own)
        gradients = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).cos()).sum(),
                                        [own, *module.parameters()])
        found.append([y, *gradients, *module.buffers()])
        module.eval()
        found[-1].append(module(own))
    torch.testing.assert_close(found[1], found[0], **EXACT)


OPERATIONS = "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "skip_connect", "max_pool_3x3"


@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(N=some.integers(1, 5), C=some.integers(1, 19), H=some.integers(3, 11), W=some.integers(3, 11),
       names=some.lists(some.sampled_from(OPERATIONS), min_size=8, max_size=8), reduction=some.booleans(),
       probability=some.sampled_from([0.0, 0.4]))
def test_a_cell_and_its_gradients_are_the_definitions(threads, N, C, H, W, names, reduction, probability):
    torch.manual_seed(0)
    edges = [(name, i // 2 + i % 2) for i, name in enumerate(names)]
    plain = varied(Cell(Genotype(edges, range(2, 6), edges, range(2, 6)), 3, 5, C + 1, reduction, False))
    ours = deepcopy(plain)
    train_by_kernels(ours, kernels())
    inputs, found = [torch.randn(N, channels, H, W, dtype=torch.float64) for channels in (3, 5)], []
    try:
        torch.set_num_threads(threads)
        for cell in plain, ours:
            own = [x.clone().contiguous(memory_format=torch.channels_last).requires_grad_() for x in inputs]
            torch.manual_seed(1)  # of drop path
            y = cell(*own, probability)
            gradients = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape).cos()).sum(),
                                            [*own, *cell.parameters()])
            found.append([y, *gradients, *cell.buffers()])
    finally:
        torch.set_num_threads(1)
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("cells, drop_path_prob", [("DARTS_V2", 0.3), ("AmoebaNet", 0.3), ("NASNet", 0.0)])
def test_steps_of_a_network_are_the_same_and_evaluation_runs_the_modules(cells, drop_path_prob):
    """With skips, pools and an operation that kernels do not know."""
    torch.manual_seed(0)
    plain = varied(NetworkCIFAR(4, 10, 3, True, GENOTYPES[cells]))
    ours = deepcopy(plain)
    assert train_by_kernels(ours, kernels()) > 10
    for network in plain, ours:
        use_exact_sums(accelerate_convolutions(network)).frozen = False
        network.drop_path_prob = drop_path_prob
        optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
        for step in range(2):
            torch.manual_seed(step)
            x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
            logits, auxiliary = network(x.contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            (cross_entropy(logits, torch.arange(4)) + cross_entropy(auxiliary, torch.arange(4))).backward()
            optimizer.step()
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), plain.eval()(x), rtol=1e-7, atol=1e-9)


def test_a_hook_sees_its_operation_and_changes_what_comes_out():
    torch.manual_seed(0)
    network = varied(NetworkCIFAR(4, 10, 2, False, GENOTYPES["DARTS_V2"]))
    train_by_kernels(network, kernels())
    x, operation = torch.randn(2, 3, 32, 32, dtype=torch.float64), network.cells[0]._ops[0]
    before, shapes = network(x), []
    hook = operation.register_forward_hook(lambda _module, _given, out: shapes.append(out.shape))
    torch.testing.assert_close(network(x), before, **EXACT)
    assert shapes == [(2, 8, 16, 16)]
    hook.remove()
    operation.register_forward_hook(lambda _module, _given, out: 2 * out)
    assert not torch.allclose(network(x), before)


def test_operations_that_do_not_fit_together_are_refused():
    network = NetworkCIFAR(4, 10, 2, False, GENOTYPES["DARTS_V2"])
    network.cells[0]._ops[1] = nn.MaxPool2d(3, 2)  # a pixel less in height and width than what it is added to
    train_by_kernels(network.to(memory_format=torch.channels_last).train(), kernels())
    with pytest.raises(ValueError, match=r"edges into a node differ: .*\(2, 8, 16, 16\).*\(2, 8, 15, 15\)"):
        network(torch.randn(2, 3, 32, 32))


def test_a_copy_trains_modules_of_its_own():
    torch.manual_seed(0)
    network = varied(NetworkCIFAR(4, 10, 2, False, GENOTYPES["DARTS_V2"]))
    train_by_kernels(network, kernels())
    copy, x, before = deepcopy(network), torch.randn(2, 3, 32, 32, dtype=torch.float64), deepcopy(network.state_dict())
    copy(x).sum().backward()
    assert all(p.grad is None for p in network.parameters()) and all(p.grad is not None for p in copy.parameters())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        for p in copy.parameters():
            p.zero_()
    assert not copy(x).any() and network(x).any()
