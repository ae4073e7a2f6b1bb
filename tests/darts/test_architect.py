"""The second-order update of every space against exact double backward, and what it must leave alone."""
from importlib import import_module

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks import textbook
from conas.commands.search import weight_step
from tests.helpers.parity import fill

SPACES = ["cnn_space1", "cnn_space2", "cnn_space3"]
XI, MOMENTUM, DECAY = 0.1, 0.9, 0.03
TOLERANCE = 1e-4  # the central difference is of second order in eps


class Smooth(nn.Module):
    """Two layers of a mixture of tanh and sine: smooth, so that the difference quotient converges."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 3)
        self.alphas_normal = nn.Parameter(torch.randn(2))
        self.alphas_reduce = nn.Parameter(torch.randn(2))

    def forward(self, x, w=None):
        if w is not None:
            return self.with_weights(x, w)
        normal, reduce = self.alphas_normal.softmax(0), self.alphas_reduce.softmax(0)
        x = self.first(x)
        x = normal[0] * x.tanh() + normal[1] * x.sin()
        x = self.second(x)
        return reduce[0] * x.tanh() + reduce[1] * x.sin()

    def alphas(self):
        return {"alphas_normal": self.alphas_normal, "alphas_reduce": self.alphas_reduce}

    def weights(self):
        return {name: p for name, p in self.named_parameters() if not name.startswith("alphas")}

    def packing(self):
        return list(self.weights().values())

    def flat(self):
        return torch.cat([p.reshape(-1) for p in self.packing()])

    def with_weights(self, x, w):
        parts = w.split([p.numel() for p in self.packing()])
        ahead = {name: part.view_as(p) for (name, p), part in zip(self.weights().items(), parts)}
        return torch.func.functional_call(self, ahead, (x,))


def exact(network, train, valid, velocity, xi, momentum, decay):
    """The hypergradient by differentiating through the virtual step."""
    weights = list(network.weights().values())
    inner = torch.autograd.grad(cross_entropy(network(train[0]), train[1]), weights, create_graph=True)
    ahead = {name: w - xi * (momentum * v + g + decay * w)
             for (name, w), g, v in zip(network.weights().items(), inner, velocity)}
    outer = cross_entropy(torch.func.functional_call(network, ahead, (valid[0],)), valid[1])
    return torch.cat(torch.autograd.grad(outer, list(network.alphas().values())))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    network = Smooth().double()
    batches = [(torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))) for _ in range(3)]
    optimizer = torch.optim.SGD(network.weights().values(), lr=XI, momentum=MOMENTUM, weight_decay=DECAY)
    weight_step(network, optimizer, batches.pop(), 5.0)  # from here on there is a velocity
    velocity = [optimizer.state[w]["momentum_buffer"].clone() for w in network.weights().values()]
    return network, optimizer, *batches, velocity


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("space", SPACES)
def test_hypergradient_is_exact_on_a_smooth_network(space, problem):
    network, optimizer, train, valid, velocity = problem
    architect = import_module(f"{space}.architect").Architect(network, optimizer)
    ours = architect.hypergradient(train, valid, XI)
    assert distance(ours, exact(network, train, valid, velocity, XI, MOMENTUM, DECAY)) < TOLERANCE
    # The test can see each ingredient: without it the exact answer is far outside the tolerance.
    for wrong in [(0.5 * XI, MOMENTUM, DECAY), (XI, 0, DECAY), (XI, MOMENTUM, 0), (-XI, MOMENTUM, DECAY)]:
        assert distance(ours, exact(network, train, valid, velocity, *wrong)) > 10 * TOLERANCE


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("hvp, tolerance", [("difference", 10 * TOLERANCE), ("exact", 1e-12)])
def test_the_second_term_matters(space, hvp, tolerance, problem):
    """Sign and factor of the Hessian term: the update minus its first term is the exact Hessian-vector product."""
    network, optimizer, train, valid, _ = problem
    architect = import_module(f"{space}.architect").Architect(network, optimizer, hvp=hvp)
    w, v = architect.weights(), architect.velocity()
    ahead = w - XI * (MOMENTUM * v + architect.grad_weights(train, w) + DECAY * w)
    first, d = architect.grad_alpha_and_weights(valid, ahead)
    second = architect.hypergradient(train, valid, XI) - first
    weights, alphas = list(network.weights().values()), list(network.alphas().values())
    inner = torch.autograd.grad(cross_entropy(network(train[0]), train[1]), weights, create_graph=True)
    inner = torch.cat([g.reshape(-1) for g in inner])
    hessian_d = torch.cat(torch.autograd.grad(inner @ d, alphas))
    assert distance(second, -XI * hessian_d) < tolerance  # relative to a term much smaller than the whole


@pytest.mark.parametrize("space", SPACES)
def test_exact_product_is_double_backward_through_the_textbook(space):
    network = import_module(f"{space}.model_search").Network(C=2, layers=3).double()
    fill(network, 0)
    oracle = textbook.Network(network.primitives, 2, 10, 3).double()
    oracle.load_state_dict(network.state_dict())
    torch.manual_seed(0)
    batch = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(10, (4,))
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.025, momentum=0.9)
    architect = import_module(f"{space}.architect").Architect(network, optimizer, hvp="exact")
    w = architect.weights()
    d = torch.randn_like(w)
    names = {p: name for name, p in network.named_parameters()}
    weights = [oracle.weights()[names[p]] for p in network.packing()]
    inner = torch.autograd.grad(oracle.loss(batch), weights, create_graph=True)
    expected = torch.autograd.grad(torch.cat([g.reshape(-1) for g in inner]) @ d, list(oracle.alphas().values()))
    ours = architect.hessian_vector(batch, w, d)
    assert distance(ours, torch.cat([g.reshape(-1) for g in expected])) < 1e-12


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("settings", [{}, {"hvp": "exact"}, {"unrolled": False}])
def test_step_changes_nothing_but_the_alphas(space, settings):
    torch.manual_seed(0)
    network = import_module(f"{space}.model_search").Network(C=4, layers=3)
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.025, momentum=0.9, weight_decay=3e-4)
    batch = torch.randn(6, 3, 8, 8), torch.randint(10, (6,))
    weight_step(network, optimizer, batch, 5.0)
    before = {name: entry.clone() for name, entry in network.state_dict().items()}
    velocity = [optimizer.state[w]["momentum_buffer"].clone() for w in network.weights().values()]
    architect = import_module(f"{space}.architect").Architect(network, optimizer, **settings)
    architect.step(batch, batch, 0.025)
    for name, entry in network.state_dict().items():
        assert torch.equal(entry, before[name]) != name.startswith("alphas_"), name
    after = [optimizer.state[w]["momentum_buffer"] for w in network.weights().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, velocity))
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.track_running_stats for norm in norms)


def test_first_order_is_the_plain_validation_gradient():
    torch.manual_seed(0)
    network = import_module("cnn_space2.model_search").Network(C=4, layers=3).double()
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.025, momentum=0.9)
    train, valid = [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(10, (4,))) for _ in range(2)]
    expected = torch.autograd.grad(cross_entropy(network(valid[0]), valid[1]), list(network.alphas().values()))
    architect = import_module("cnn_space2.architect").Architect(network, optimizer, unrolled=False)
    architect.step(train, valid, 0.025)
    for alpha, gradient in zip(network.alphas().values(), expected):
        torch.testing.assert_close(alpha.grad, gradient, rtol=1e-10, atol=1e-14)


def test_difference_quotient_asks_for_no_weight_gradient():
    """Equation 8 needs gradients of the alphas only: no convolution may compute one of its kernel."""
    network = import_module("cnn_space1.model_search").Network(C=4, layers=3)
    fill(network, 0)
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.025, momentum=0.9)
    architect = import_module("cnn_space1.architect").Architect(network, optimizer)
    batch = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    w = architect.weights()
    masks = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function == torch.ops.aten.convolution_backward.default:
                masks.append(args[-1])
            return function(*args, **(kwargs or {}))

    with Record():
        architect.hessian_vector(batch, w, torch.randn_like(w))
    assert masks and not any(mask[1] for mask in masks)
    masks.clear()
    with Record():
        architect.grad_weights(batch, w)
    assert any(mask[1] for mask in masks)
