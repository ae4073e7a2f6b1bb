"""The dominant eigenvalue by Lanczos' iteration against whole Hessians by autograd, and what it must leave alone."""
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from conas.darts.architect import Bilevel
from conas.darts.supernet import Supernet
from conas.engine.door import accelerate
from conas.health.curvature import MOST_PRODUCTS, Curvature, default_interval, dominant_eigenvalue
from tests.darts.test_architect import Smooth


class Small(Supernet):
    """The space S2 of RobustDARTS: 56 alphas."""

    primitives = ("skip_connect", "sep_conv_3x3")


def whole_hessian(network, batch) -> torch.Tensor:
    """Of the loss of a network w.r.t. its flat alphas, by autograd."""
    names, alphas = zip(*network.alphas().items())

    def loss(flat):
        parts = flat.split([alpha.numel() for alpha in alphas])
        moved = {name: part.view_as(alpha) for name, alpha, part in zip(names, alphas, parts)}
        return cross_entropy(torch.func.functional_call(network, moved, (batch[0],)), batch[1])

    return torch.autograd.functional.hessian(loss, torch.cat([alpha.detach().reshape(-1) for alpha in alphas]))


def dominant(matrix: torch.Tensor) -> float:
    values = np.linalg.eigvalsh(matrix.double().numpy())
    return float(values[np.abs(values).argmax()])


def architect(network) -> Bilevel:
    return Bilevel(network, torch.optim.SGD(network.weights().values(), lr=0.1, momentum=0.9))


@pytest.fixture
def real():
    """A supernet in float64 whose alphas have moved apart, and a batch."""
    torch.manual_seed(3)
    network = Small(2, 4, 3, 1).double()
    with torch.no_grad():
        for alpha in network.alphas().values():
            alpha.normal_()
    return network, (torch.randn(8, 1, 8, 8, dtype=torch.float64), torch.randint(4, (8,)))


@pytest.mark.parametrize("spectrum", [[3.0, 1.0, -2.0], [-5.0, 4.9, 0.0], [0.0, 0.0], [7.0]])
def test_a_matrix_of_known_eigenvalues(spectrum):
    torch.manual_seed(0)
    values = torch.tensor(spectrum * 20, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    matrix = rotation @ values.diag() @ rotation.T
    value, products = dominant_eigenvalue(lambda v: matrix @ v, len(values))
    assert value == pytest.approx(max(spectrum, key=abs), rel=0.01, abs=1e-9) and products <= MOST_PRODUCTS


def test_a_smooth_network_has_the_eigenvalue_of_its_whole_hessian():
    torch.manual_seed(1)
    network = Smooth().double()
    batch = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    assert Curvature(architect(network), batch).measure() == pytest.approx(
        dominant(whole_hessian(network, batch)), rel=0.01)


def test_a_real_network_has_the_eigenvalue_of_its_whole_hessian(real):
    network, batch = real
    expected = dominant(whole_hessian(network, batch))
    assert Curvature(architect(network), batch).measure() == pytest.approx(expected, rel=0.01)
    network.float().to(memory_format=torch.channels_last)
    assert accelerate(network) is not None
    assert Curvature(architect(network), (batch[0].float(), batch[1])).measure() == pytest.approx(expected, rel=0.01)


def test_nothing_else_changes_and_equal_states_give_equal_values(real):
    network, batch = real
    network.eval()
    curvature = Curvature(architect(network), batch, seed=5)
    torch.manual_seed(7)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    first = curvature.measure()
    assert torch.equal(torch.get_rng_state(), random) and not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.manual_seed(8)
    assert curvature.measure() == first
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_gradient_that_is_not_finite_gives_nan_and_puts_the_alphas_back(real):
    network, batch = real
    before = [alpha.clone() for alpha in network.alphas().values()]
    batch[0][0] = torch.nan
    assert np.isnan(Curvature(architect(network), batch).measure())
    assert all(torch.equal(alpha, old) for alpha, old in zip(network.alphas().values(), before))


def test_the_default_interval_takes_three_percent_of_the_passes():
    assert default_interval(steps=390, epochs=50, unrolled=True) == 1  # CIFAR-10: 42 of 1950
    assert default_interval(steps=280, epochs=50, unrolled=True) == 1  # 42 / (5 * 280) = 3 %
    assert default_interval(steps=279, epochs=50, unrolled=True) == 2
    assert default_interval(steps=390, epochs=50, unrolled=False) == 2
    assert default_interval(steps=390, epochs=15, unrolled=True) == 1
    assert default_interval(steps=390, epochs=14, unrolled=True) == 0
    assert default_interval(steps=20, epochs=50, unrolled=True) == 0
