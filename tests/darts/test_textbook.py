"""The textbook DARTS of the benchmarks against the parity fixtures: an oracle is as good as its checks."""
import ast
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import textbook
from tests.helpers.parity import (
    HYPERGRADIENT,
    LOGITS,
    draw_alphas,
    draw_batch,
    fill,
    read_fixture,
    relative_error,
    set_alphas,
)

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures").glob("space*_seed0.npz"))
COMMON = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect")
PRIMITIVES = {
    1: COMMON + ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
    2: COMMON + ("sep_conv_3x3", "dil_conv_3x3"),
    3: COMMON + ("sep_conv_5x5", "dil_conv_5x5"),
}


def quantities(fixture: dict):
    """Steps 1 to 5 of the recipe in tests/helpers/parity.py, on the textbook code: (name, value, tolerance)."""
    seed, primitives = int(fixture["seed"]), PRIMITIVES[int(fixture["space"])]
    sizes = (int(fixture[name]) for name in ("C", "num_classes", "layers"))
    network = textbook.Network(primitives, *sizes).double()
    fill(network, seed)
    rng = np.random.default_rng(seed + 1)
    set_alphas(network, draw_alphas(rng, len(primitives), torch.float64))
    draw = partial(draw_batch, rng, fixture, torch.float64)
    batches = [(draw(), draw()) for _ in range(3)]
    with torch.no_grad():
        yield "logits_eval", network.eval()(batches[0][0][0]), LOGITS
    network.train()
    alphas = network.alphas()
    first_order = torch.autograd.grad(network.loss(batches[0][1]), list(alphas.values()))
    for name, gradient in zip(alphas, first_order):
        yield name.replace("alphas", "first_order"), gradient, HYPERGRADIENT

    optimizer = textbook.weight_optimizer(network)
    architect = textbook.Architect(network)
    for i, ((train, valid), lr) in enumerate(zip(batches, fixture["lrs"].tolist())):
        architect.step(train, valid, lr, optimizer)
        for name, alpha in alphas.items():
            yield f"step{i}/{name.replace('alphas', 'hypergradient')}", alpha.grad, HYPERGRADIENT
            yield f"step{i}/{name}", alpha, LOGITS
        optimizer.param_groups[0]["lr"] = lr
        logits, loss = textbook.weight_step(network, optimizer, train)
        yield f"step{i}/logits", logits, LOGITS
        yield f"step{i}/loss", loss, LOGITS
        norm = torch.cat([w.detach().reshape(-1) for w in network.weights().values()]).norm()
        yield f"step{i}/weight_norm", norm, LOGITS


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_textbook_reproduces_the_fixture(path):
    fixture = read_fixture(path)
    errors = {name: (relative_error(ours, fixture[name]), tolerance)
              for name, ours, tolerance in quantities(fixture)}
    # all that the fixture says of the supernet, but the genotypes: the textbook code derives none
    assert set(errors) == {name for name in fixture if name.startswith(("logits", "first_order", "step"))}
    assert not {name: error for name, (error, tolerance) in errors.items() if not error <= tolerance}


def test_central_difference_meets_the_exact_hessian_where_the_network_is_smooth(monkeypatch):
    """Without ReLU and max pooling the quotient of equation 8 converges to double backward's value."""
    monkeypatch.setattr(textbook.nn, "ReLU", torch.nn.SiLU)
    monkeypatch.setattr(textbook.torch, "relu", torch.nn.functional.silu)
    torch.manual_seed(0)
    network = textbook.Network(("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3"), 2, 5, 3).double()
    batch = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (4,))
    weights, alphas = list(network.weights().values()), list(network.alphas().values())
    direction = [torch.randn_like(w) for w in weights]
    gradients = torch.autograd.grad(cross_entropy(network(batch[0]), batch[1]), weights, create_graph=True)
    exact = torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradients, direction)), alphas)
    quotient = textbook.Architect(network).hessian_vector(batch, direction, r=1e-4)
    for ours, expected in zip(quotient, exact):
        assert (ours - expected).norm() <= 1e-4 * expected.norm()


def test_textbook_imports_nothing_but_torch():
    tree = ast.parse(Path(textbook.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"torch"}
