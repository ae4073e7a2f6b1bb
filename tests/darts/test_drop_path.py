"""Drop path in a search: which edges images lose, that a step's passes lose the same, and what goes without."""
import pytest
import torch

from conas import distributed
from conas.commands.weights import weight_step
from conas.darts.drop_path import DropPath, without_drop_path
from conas.engine.door import why_not
from tests.health.test_curvature import Small, architect


@pytest.fixture
def problem():
    torch.manual_seed(0)
    network = Small(2, 4, 3, 1).double()
    return network, DropPath(network), (torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(4, (6,)))


def test_images_lose_whole_edges_and_the_rest_is_scaled(problem, monkeypatch):
    network, drop_path, (images, _) = problem
    seen = []
    edge = network.cells[0]._ops[0]
    edge.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(images)
        drop_path.prob = 0.5
        network(images)
    before, after = seen  # of the first cell's first edge, whose input no edge has touched
    factors = [(after[i] / before[i]).nanmean().item() for i in range(6)]
    assert set(factors) == {0.0, 2.0} and all(torch.allclose(after[i], factors[i] * before[i]) for i in range(6))
    assert "hook" in why_not(network)
    drop_path.images = {6: 12}  # the second six of twelve, as one process alone would draw
    monkeypatch.setattr(distributed, "rank_slice", lambda images: slice(images // 2, images))
    torch.manual_seed(1)
    with torch.no_grad():
        network(images)
    torch.manual_seed(1)
    torch.testing.assert_close(seen[-1], before * ((torch.rand(12) < 0.5)[6:, None, None, None] * 2.0))


def test_evaluation_and_passes_without_lose_nothing(problem):
    network, drop_path, (images, _) = problem
    with torch.no_grad():
        expected = network(images), network.eval()(images)
        drop_path.prob = 0.9
        assert torch.equal(network(images), expected[1])
        network.train()
        with without_drop_path(network):
            assert torch.equal(network(images), expected[0])
        assert not torch.equal(network(images), expected[0]) and drop_path.prob == 0.9


def test_the_passes_of_a_step_lose_the_same_edges(problem, monkeypatch):
    network, drop_path, batch = problem
    drop_path.prob, draws, drawn = 0.3, [], torch.rand

    def rand(*shape, **settings):
        draws.append(drawn(*shape, **settings))
        return draws[-1]

    monkeypatch.setattr(torch, "rand", rand)
    bilevel = architect(network)
    bilevel.step(batch, batch, 0.1)
    edges = 3 * 14
    assert len(draws) == 4 * edges  # equations 6 and 7, and twice equation 8
    for i, draw in enumerate(draws):
        assert torch.equal(draw, draws[i % edges])
    weight_step(network, bilevel.optimizer, batch, 5.0)
    assert not torch.equal(draws[-1], draws[edges - 1])
