"""The supernet against the textbook one of the benchmarks: what it shares between edges must change no number."""
import itertools
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import textbook
from conas.darts import operations
from conas.darts.genotype import NODES
from conas.darts.operations import SepConv, Zero
from conas.darts.passes import by_definition
from conas.darts.published import ROOT
from conas.darts.supernet import Supernet, constant_alphas, frozen_statistics
from conas.engine import depthwise
from conas.engine import forward_eval as running
from conas.engine import pointwise as folded
from conas.engine.convolutions import accelerate_convolutions, fast_depthwise
from conas.engine.door import accelerate, why_not
from conas.engine.manual_grad import with_manual_grad
from conas.errors import InputError
from tests.helpers.parity import fill

SPACES = ["cnn_space1", "cnn_space2", "cnn_space3"]


def pair(space):
    network = import_module(f"{space}.model_search").Network(C=4, num_classes=10, layers=4).double()
    oracle = textbook.Network(network.primitives, 4, 10, 4).double()
    fill(network, 0)
    oracle.load_state_dict(network.state_dict())  # names and shapes agree, or this fails
    return network, oracle


def one_by_one(monkeypatch, few=0):
    monkeypatch.setattr(depthwise, "SMALL", 0)
    monkeypatch.setattr(depthwise, "FEW", few)
    monkeypatch.setattr(running, "CONVOLVED", 0)


WAYS = ["definition", "side by side", "few side by side", "one by one", "as on a GPU", "kernels"]
FORMATS = [torch.contiguous_format, torch.channels_last]
# Space 1 has the operations of all others. The rest is for `make acceptance`.
QUICK = [*itertools.product(["cnn_space1"], FORMATS[:1], WAYS), ("cnn_space2", FORMATS[1], WAYS[0]),
         ("cnn_space3", FORMATS[1], WAYS[1])]


@pytest.mark.parametrize("space, memory_format, way", [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product(SPACES, FORMATS, WAYS)])
def test_outputs_gradients_and_statistics_are_the_textbooks(space, memory_format, way, monkeypatch):
    if way == "one by one":
        one_by_one(monkeypatch)
    elif way == "few side by side":  # those out of nodes, not those out of a cell's inputs
        one_by_one(monkeypatch, few=2**17)
    elif way == "as on a GPU":
        monkeypatch.setattr(depthwise, "FAST_DILATED", ())
        monkeypatch.setattr(operations, "RIGHT_GRADIENT", ())
        monkeypatch.setattr(folded, "PIECES", {})
    network, oracle = pair(space)
    assert way == "definition" or accelerate(network, native=way == "kernels")
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, 16, 16, dtype=torch.float64).to(memory_format=memory_format), torch.arange(5)

    def logits():
        return network(x) if way == "definition" else network.with_weights(x, network.flat())

    for _ in range(2):  # the second pass reads what the first left
        network.zero_grad()
        oracle.zero_grad()
        cross_entropy(logits(), y).backward()
        cross_entropy(oracle(x), y).backward()
        expected = dict(oracle.named_parameters())
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-8, atol=1e-11, msg=name)
    expected = oracle.state_dict()
    for name, entry in network.state_dict().items():
        torch.testing.assert_close(entry, expected[name], rtol=1e-9, atol=1e-12, msg=name)
    with torch.inference_mode():
        network.eval()
        torch.testing.assert_close(logits(), oracle.eval()(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [1, 3, 5, 7])
def test_gradients_of_depthwise_convolutions(k, stride, dilation, small, monkeypatch):
    if not small:
        one_by_one(monkeypatch)

    def run(tape, x, *kernels):
        def back(grad):
            flipped = [kernel.flip(2, 3) for kernel in kernels]
            d_x, d_kernels = depthwise.convolve_back(grad, x.shape, x, kernels, flipped, stride, dilation)
            return d_x, *d_kernels

        blocks = [depthwise.side_by_side(x, len(kernel) // 4 // len(x)) for kernel in kernels]
        return depthwise.apart(depthwise.convolve(blocks, kernels, [None] * 2, 4, stride, dilation)), back

    torch.manual_seed(0)
    for states, kinds, groups in (1, 1, 1), (2, 2, 8), (2, 1, 2), (1, 2, 3):
        x, *kernels = (torch.randn(shape, dtype=torch.float64, requires_grad=True)
                       for shape in [(states, 2, 6, 7, 4)] + kinds * [(groups * 4, 1, k, k)])
        assert torch.autograd.gradcheck(partial(with_manual_grad, run), (x, *kernels), fast_mode=True,
                                        check_undefined_grad=False)


@pytest.mark.parametrize("small", [True, False])
def test_gradients_of_depthwise_convolutions_of_maps_of_their_own(small, monkeypatch):
    """Maps as `rectify` leaves them, of kernels of two sizes; with ReLU's gradient."""
    if not small:
        one_by_one(monkeypatch)

    def run(tape, y, *kernels):
        parts = depthwise.rectify(y, 3, None, True)

        def back(grad):
            maps = [depthwise.bordered(y, 3, kernel) for kernel in kernels]
            parts = depthwise.rectify(y, 3, [depthwise.inside(*of) for of in zip(maps, kernels)], True)
            maps = [part if of is None else of for of, part in zip(maps, parts)]
            flipped = [kernel.flip(2, 3) for kernel in kernels]
            d_parts, d_kernels = depthwise.convolve_back(grad, y.shape, maps, kernels, flipped, own=True)
            return depthwise.rectify_back(d_parts, parts, torch.empty_like(y)), *d_kernels

        blocks = [depthwise.side_by_side(part) for part in parts]
        return depthwise.apart(depthwise.convolve(blocks, kernels, [None] * 2, 4)), back

    torch.manual_seed(0)
    y = torch.randn(6, 2, 6, 8, 4, dtype=torch.float64, requires_grad=True)
    kernels = [torch.randn(3 * 4, 1, k, k, dtype=torch.float64, requires_grad=True) for k in (3, 5)]
    assert torch.autograd.gradcheck(partial(with_manual_grad, run), (y, *kernels), fast_mode=True,
                                    check_undefined_grad=False)


@pytest.mark.parametrize("fast", [("cpu",), ()])  # as on a CPU, as on a GPU
@pytest.mark.parametrize("size", [(8, 6), (5, 8)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5])
def test_dilated_convolutions_of_derived_networks(k, stride, size, fast, monkeypatch):
    monkeypatch.setattr(depthwise, "FAST_DILATED", fast)
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, k, stride, k - 1, 2, groups=4, bias=False).double()
    assert accelerate_convolutions(module).forward.func is fast_depthwise and type(module) is nn.Conv2d
    x = torch.randn(3, 4, *size, dtype=torch.float64, requires_grad=True)
    found, expected = module(x), torch.nn.functional.conv2d(x, module.weight, None, stride, k - 1, 2, 4)
    grad = torch.randn_like(expected)
    for ours, of_torch in zip((found, *torch.autograd.grad(found, [x, module.weight], grad)),
                              (expected, *torch.autograd.grad(expected, [x, module.weight], grad))):
        torch.testing.assert_close(ours, of_torch, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("native", [False, True])
def test_constant_alphas_change_no_gradient_of_the_weights(native):
    network, _ = pair("cnn_space3")
    accelerate(network, native=native)
    x, y = torch.randn(5, 3, 16, 16, dtype=torch.float64), torch.arange(5)
    w = network.flat().detach().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(network(x, w), y), [w])
    with constant_alphas(network):
        logits = network(x, w)
    (found,) = torch.autograd.grad(cross_entropy(logits, y), [w])
    assert torch.equal(found, expected) and all(alpha.requires_grad for alpha in network.alphas().values())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("image_size", [8, 9])
@pytest.mark.parametrize("primitives", [
    ("none", "dil_conv_3x3"), ("none", "sep_conv_3x3"), ("none", "skip_connect"), ("none", "avg_pool_3x3"),
    ("skip_connect", "conv_7x1_1x7", "sep_conv_7x7", "dil_conv_5x5", "dil_conv_3x3", "none", "max_pool_3x3")])
def test_gradients_by_hand_are_those_of_the_definition(primitives, image_size, native):
    """For spaces that no folder has, too: of alphas and weights in one pass, and of alphas alone."""
    network = type("Odd", (Supernet,), {"primitives": primitives})(C=2, layers=3).double()
    fill(network, 0)
    assert accelerate(network, native=native)
    x, y = torch.randn(3, 3, image_size, image_size, dtype=torch.float64), torch.arange(3)
    w, alphas, found = network.flat().detach().requires_grad_(), list(network.alphas().values()), []
    for context in nullcontext(), by_definition(network):
        with context:
            found.append(torch.autograd.grad(cross_entropy(network.with_weights(x, w), y), [*alphas, w]))
    found.append((*torch.autograd.grad(cross_entropy(network.with_weights(x, w.detach()), y), alphas), found[1][2]))
    assert all(gradient.abs().max() > 1e-6 for gradient in found[1])
    for gradients in found[0], found[2]:
        torch.testing.assert_close(gradients, found[1], rtol=1e-9, atol=1e-13)


def test_frozen_statistics_change_no_output():
    network, _ = pair("cnn_space1")
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    before = {name: entry.clone() for name, entry in network.state_dict().items()}
    with frozen_statistics(network):
        frozen = network(x)
    assert all(torch.equal(entry, before[name]) for name, entry in network.state_dict().items())
    assert torch.equal(frozen, network(x))
    assert not torch.equal(network.stem[1].running_mean, before["stem.1.running_mean"])


@pytest.mark.parametrize("image_size", [8, 9, 28, 33])
@pytest.mark.parametrize("layers", [3, 5])
def test_any_image_size_gives_logits(image_size, layers):
    network = import_module("cnn_space1.model_search").Network(C=2, num_classes=7, layers=layers, in_channels=1)
    assert network(torch.randn(2, 1, image_size, image_size)).shape == (2, 7)


def test_reductions_stand_at_one_and_two_thirds():
    network = import_module("cnn_space1.model_search").Network(C=2, layers=8)
    assert [layer for layer, cell in enumerate(network.cells) if cell.reduction] == [2, 5]
    assert network.classifier.in_features == NODES * 2 * 4


def test_weights_and_alphas_divide_the_parameters():
    network = import_module("cnn_space2.model_search").Network(C=2, layers=3)
    assert set(network.weights()) | set(network.alphas()) == {name for name, _ in network.named_parameters()}
    assert not set(network.weights()) & set(network.alphas())
    assert set(network.alphas()) < set(network.state_dict())


def test_the_smallest_space_works():
    class Pools(Supernet):
        primitives = ("none", "max_pool_3x3")

    network = Pools(C=2, layers=3)
    network(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert network.alphas_normal.grad.abs().sum() > 0


class Flipped(SepConv):
    """What looks like an operation that packed edges compute, but is another."""

    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("name, operation", [
    ("conv_3x3", lambda C, stride, affine: nn.Conv2d(C, C, 3, stride, 1)),
    ("sep_conv_3x3_se", lambda C, stride, affine: SepConv(C, 3, stride, affine)),
    ("sep_conv_3x3", lambda C, stride, affine: Flipped(C, 3, stride, affine)),
    ("skip_connect", lambda C, stride, affine: nn.AvgPool2d(1, stride)),
    ("max_pool_3x3", lambda C, stride, affine: nn.AvgPool2d(3, stride, 1)),
    ("none", lambda C, stride, affine: nn.Identity() if stride == 1 else Zero(stride)),
])
def test_an_operation_that_the_engine_does_not_know_makes_the_network_run_by_its_definition(name, operation):
    space = type("Own", (Supernet,), {"primitives": tuple(dict.fromkeys(["none", "dil_conv_3x3", name])),
                                      "operations": {name: operation}})
    network = space(4, 10, 3)
    assert name in why_not(network) and accelerate(network, native=False) is None
    x, own = torch.randn(4, 3, 8, 8), [op._ops[network.primitives.index(name)] for op in network.cells[0]._ops]
    before = network.with_weights(x, network.flat())
    for parameter in (p for op in own for p in op.parameters()):
        parameter.data.add_(parameter.std() if parameter.numel() > 1 else 1)
    changed = not torch.equal(network.with_weights(x, network.flat()), before)
    assert changed == any(True for op in own for _ in op.parameters())


@pytest.mark.parametrize("primitives, says", [
    (("sep_conv_3x3", "noise"), "'noise' is no operation; did you mean none"),
    (("none", "sep_conv3x3"), "did you mean sep_conv_3x3"),
    ((), "empty"), (("none",), "none; an edge needs"),
    (("none", "skip_connect", "skip_connect"), "skip_connect is there twice"),
])
def test_primitives_of_which_no_cell_can_be_made_are_refused(primitives, says):
    with pytest.raises(InputError, match=f"PRIMITIVES: .*{says}"):
        type("Own", (Supernet,), {"primitives": primitives})(4, 10, 3)


STRIDED = """
import torch
from conas.darts.operations import FactorizedReduce

for C, size in (3, 224), (4, 48), (12, 64):
    torch.manual_seed(0)
    reduce = FactorizedReduce(C, 4, False).to(memory_format=torch.channels_last)
    x, to = (torch.randn(4, *shape).contiguous(memory_format=torch.channels_last)
             for shape in ((C, size, size), (4, size // 2, size // 2)))
    for _ in range(3):
        found = torch.autograd.grad((reduce(x) * to).sum(), reduce.parameters())
    exact = torch.autograd.grad((reduce.double()(x.double()) * to.double()).sum(), reduce.parameters())
    assert all((a - b).norm() < 1e-4 * b.norm() for a, b in zip(found, exact)), (C, size)
"""


def test_a_reduction_of_few_channels_writes_into_its_own_memory_only():
    """oneDNN's gradient of a strided pointwise convolution does not, and ends the process on a signal."""
    ended = subprocess.run([sys.executable, "-c", STRIDED], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
