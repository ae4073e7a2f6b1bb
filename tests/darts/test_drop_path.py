"""Drop path in a search: which edges images lose, that a step's passes lose the same, and what goes without."""
from copy import deepcopy
from importlib import import_module

import pytest
import torch

from conas import distributed
from conas.commands.weights import weight_step
from conas.darts.drop_path import DropPath
from conas.darts.passes import by_definition
from conas.darts.stems import stem_outputs
from conas.engine.door import accelerate, why_not
from tests.health.test_curvature import Small, architect

EDGES = 3 * 14


@pytest.fixture
def problem():
    torch.manual_seed(0)
    network = Small(2, 4, 3, 1).double()
    return network, DropPath(network), (torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(4, (6,)))


def by_hand(network, images, kept, keep):
    """The logits of `images`, each computed as the definition says, with lost edges left out of the sums."""
    s0, s1 = stem_outputs(network, images)
    for number, cell in enumerate(network.cells):
        weights = network.shares("reduce" if cell.reduction else "normal")
        states, edge = [cell.preprocess0(s0), cell.preprocess1(s1)], 0
        for _ in range(4):
            outputs = [(cell._ops[edge + j](state, weights[edge + j]), kept[14 * number + edge + j])
                       for j, state in enumerate(states)]
            states.append(sum(torch.where(lost[:, None, None, None], out / keep, 0) for out, lost in outputs))
            edge += len(outputs)
        s0, s1 = s1, torch.cat(states[2:], dim=1)
    return network.classifier(s1.mean(dim=(2, 3)))


@pytest.mark.parametrize("native", [None, True, False])
def test_images_lose_edges_and_the_rest_is_scaled(problem, native):
    network, drop_path, (images, _) = problem
    twin = deepcopy(network)
    if native is not None:
        accelerate(network, native=native)
    assert "has a hook" in why_not(network)
    drop_path.prob = 0.4
    torch.manual_seed(3)
    logits = network.with_weights(images, network.flat())
    torch.manual_seed(3)
    kept = torch.rand(EDGES, 6) < 0.6
    drop_path.scales = None
    expected = by_hand(network, images, kept, 0.6)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(logits, twin(images))


def test_processes_lose_what_one_process_would(problem, monkeypatch):
    network, drop_path, (images, _) = problem
    drop_path.prob = 0.5
    torch.manual_seed(1)
    network(images)
    alone = drop_path.scales
    monkeypatch.setattr(distributed, "total", lambda count: 2 * count)
    monkeypatch.setattr(distributed, "rank_slice", lambda count: slice(count // 2, count))
    torch.manual_seed(1)
    network(images[3:])  # the second half of the images is this process's part
    assert torch.equal(drop_path.scales, alone[:, 3:])


def test_evaluation_loses_nothing(problem):
    network, drop_path, (images, _) = problem
    expected = network.eval()(images)
    drop_path.prob = 0.9
    assert torch.equal(network(images), expected)
    assert not torch.equal(network.train()(images), network.train()(images))


def test_the_passes_of_a_step_lose_the_same_edges(problem, monkeypatch):
    network, drop_path, batch = problem
    drop_path.prob, draws, drawn = 0.3, [], torch.rand

    def rand(*shape, **settings):
        draws.append(drawn(*shape, **settings))
        return draws[-1]

    monkeypatch.setattr(torch, "rand", rand)
    bilevel = architect(network)
    bilevel.step(batch, batch, 0.1)
    assert len(draws) == 4  # equations 6 and 7, and twice equation 8
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    weight_step(network, bilevel.optimizer, batch, 5.0)
    assert len(draws) == 5 and not torch.equal(draws[4], draws[0])


def test_the_hypergradient_is_that_of_the_thinned_network(problem):
    """On a fixed draw, against equation 7 by autograd through the virtual step."""
    network, drop_path, batch = problem
    drop_path.prob = 0.3
    space = import_module("cnn_space1.architect")
    bilevel = space.Architect(network, torch.optim.SGD(network.weights().values(), 0.1, momentum=0.9,
                                                       weight_decay=3e-4), hvp="exact")
    torch.manual_seed(5)
    with bilevel.replayed():
        found = bilevel.hypergradient(batch, batch, 0.1)
    alphas = list(network.alphas().values())
    w = network.flat().detach().requires_grad_()
    with by_definition(network):
        torch.manual_seed(5)
        first = torch.nn.functional.cross_entropy(network.with_weights(batch[0], w), batch[1])
        (gradient,) = torch.autograd.grad(first, [w], create_graph=True)
        torch.manual_seed(5)
        w_next = w - 0.1 * (gradient + 3e-4 * w)
        second = torch.nn.functional.cross_entropy(network.with_weights(batch[0], w_next), batch[1])
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(second, alphas)])
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
