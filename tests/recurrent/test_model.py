"""Recurrent cells: the fused sequences against a textbook loop, dropout, the bilevel step, the genotype rule."""
import json
import re

import pytest
import torch
from torch import nn

from benchmarks import textbook_rnn
from conas.errors import InputError
from conas.recurrent.draw import draw_recurrent
from conas.recurrent.found_cell import Plan
from conas.recurrent.genotype import EDGES, Genotype, derive, from_json
from conas.recurrent.model import Masks, RecurrentNetwork, TextBatch
from conas.recurrent.options import DropoutOptions
from conas.recurrent.steps import draw_masks, weight_optimizer, weight_step
from rnn import genotypes
from rnn.architect import Architect
from rnn.model_search import Network

T, B, H, V = 5, 4, 6, 11
CELLS = {name: getattr(genotypes, name) for name in ("ENAS", "DARTS_V1", "DARTS_V2")}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def spread(network: nn.Module) -> nn.Module:
    """Weights large enough for every activation to matter."""
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, 0.5)
    return network


def text_batch(network, rates=None, seed=0, hidden=None) -> TextBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(V, (2, T, B), generator=generator)
    masks = draw_masks(rates, B, network, generator) if rates else Masks()
    return TextBatch(tokens, targets, 0.3 * torch.randn(B, H, generator=generator) if hidden is None else hidden, masks)


def textbook_of(network, batch: TextBatch) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of the textbook loop, given the same weights and masks."""
    search = hasattr(network, "alphas")
    book = textbook_rnn.Network(V, H, **({"primitives": network.primitives} if search else
                                         {"recurrent": network.genotype().recurrent}))
    state = network.state_dict()
    if search:
        state["alphas"] = state.pop("alphas_recurrent")
    book.load_state_dict(state)
    book.train(network.training)
    if not search:
        concat = list(network.genotype().concat)
        book.step = lambda s, m: step_with_concat(book, s, m, concat)
    masks = batch.masks
    queue = [masks.words, masks.inputs, None, masks.hidden, masks.outputs]  # in the order in which they are drawn
    given = iter([1.0 if mask is None else mask for mask in queue])
    book.mask = lambda like, shape, p: next(given)
    logp, hidden, outputs = book(batch.tokens, batch.hidden)
    loss = nn.functional.nll_loss(logp.flatten(0, 1), batch.targets.flatten()) + outputs.pow(2).mean()
    loss.backward()
    gradients = {name.replace("alphas", "alphas_recurrent"): p.grad for name, p in book.named_parameters()}
    return loss, gradients, hidden, book


def step_with_concat(book, state, mask, concat):
    states = [state]
    for W, (name, source) in zip(book.rnns[0]._Ws, book.recurrent):
        c, h = ((states[source] * mask) @ W).chunk(2, dim=1)
        states.append(states[source] + c.sigmoid() * (textbook_rnn.ACTIVATIONS[name](h) - states[source]))
    return sum(states[i] for i in concat) / len(concat)


def agree_with_textbook(network, batch):
    """Loss, gradients and hidden state of both; returns the textbook's network."""
    expected, gradients, hidden, book = textbook_of(network, batch)
    loss, outputs = network.loss(batch)
    loss = loss + outputs.pow(2).mean()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(batch.after, hidden.detach())
    assert not batch.after.requires_grad
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], msg=name)
    return book


@pytest.mark.parametrize("rates", [None, DropoutOptions(dropoute=0.3)], ids=["plain", "dropout"])
@pytest.mark.parametrize("cell", [*CELLS, "supernet", "supernet in evaluation"])
def test_loss_and_gradients_are_those_of_the_textbook(cell, rates):
    network = spread(Network(V, H) if cell.startswith("supernet") else RecurrentNetwork(V, H, CELLS[cell]))
    if cell == "supernet in evaluation":
        network.eval()
        network.rnns[0].bn.running_mean.normal_()
        network.rnns[0].bn.running_var.uniform_(0.5, 2)
    book = agree_with_textbook(network, text_batch(network, rates))
    if cell.startswith("supernet"):
        torch.testing.assert_close(network.rnns[0].bn.running_mean, book.rnns[0].bn.running_mean)
        torch.testing.assert_close(network.rnns[0].bn.running_var, book.rnns[0].bn.running_var)


@pytest.mark.parametrize("kind", [Network, lambda *size: RecurrentNetwork(*size, CELLS["ENAS"])])
def test_loss_is_the_cross_entropy_of_the_logits(kind):
    network = spread(kind(V, H))
    batch = text_batch(network, DropoutOptions())
    logits, _ = network.predict(batch)
    torch.testing.assert_close(nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()),
                               network.loss(batch)[0])


def test_backward_runs_once():
    network = RecurrentNetwork(V, H, CELLS["DARTS_V1"])
    batch = text_batch(network)
    loss, _ = network.loss(batch)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


def test_plan_has_every_step_after_its_source():
    for genotype in CELLS.values():
        plan = Plan(genotype)
        slots = [0, *(step + 1 for step in plan.steps)]
        assert sorted(plan.steps) == list(range(len(genotype.recurrent)))
        for source, a, b in plan.groups:
            assert source <= a
            assert {genotype.recurrent[i][1] for i in plan.steps[a:b]} == {slots[source]}
        assert [slots[slot] for slot in plan.outputs] == list(genotype.concat)


def test_masks_hold_for_a_sequence_and_change_with_it():
    network = RecurrentNetwork(V, H, CELLS["DARTS_V2"])
    generator = torch.Generator().manual_seed(3)
    rates = DropoutOptions(dropoute=0.5)
    first, second = (draw_masks(rates, B, network, generator) for _ in range(2))
    for name in Masks._fields:
        one, two = getattr(first, name), getattr(second, name)
        assert one.shape in ((B, H), (V, 1)) and not torch.equal(one, two)  # no axis of time: one for all steps
    assert set(first.hidden.unique().tolist()) <= {0.0, 1 / 0.75}
    assert draw_masks(DropoutOptions(0, 0, 0, 0, 0), B, network, generator) == Masks()


def test_dropped_units_are_dropped_at_every_time_step():
    network = spread(RecurrentNetwork(V, H, CELLS["DARTS_V2"]))
    batch, mask = text_batch(network), torch.ones(B, H)
    mask[:, 1:] = 0
    batch.masks = Masks(outputs=mask)
    with torch.no_grad():
        network.decoder.bias.zero_()
        logits, outputs = network.predict(batch)
    torch.testing.assert_close(logits, outputs[:, :, :1] * network.encoder.weight[:, 0])


def test_rates_are_those_that_masks_have():
    network = RecurrentNetwork(4000, 300, CELLS["DARTS_V1"])
    rates = DropoutOptions(dropout=0.6, dropouth=0.25, dropoutx=0.5, dropouti=0.2, dropoute=0.1)
    masks = draw_masks(rates, 64, network, torch.Generator().manual_seed(0))
    zeros = {name: (getattr(masks, name) == 0).double().mean().item() for name in Masks._fields}
    assert zeros == pytest.approx({"words": 0.1, "inputs": 1 - 0.5 * 0.8, "hidden": 0.25, "outputs": 0.6}, abs=0.02)
    assert all(getattr(masks, name).mean().item() == pytest.approx(1, abs=0.05) for name in Masks._fields)


def test_hidden_state_is_carried():
    network = spread(RecurrentNetwork(V, H, CELLS["DARTS_V2"]))
    tokens = torch.randint(V, (2 * T, B))
    whole, last = network(tokens, network.initial(B))
    first, middle = network(tokens[:T], network.initial(B))
    second, end = network(tokens[T:], middle)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, last)


@pytest.fixture
def smooth_search():
    """A supernet without relu, and an exact hypergradient by double backward through the textbook."""
    class Smooth(Network):
        primitives = ("none", "tanh", "sigmoid", "identity")

    network = spread(Smooth(V, H))
    with torch.no_grad():
        for p in network.weights().values():
            p.mul_(0.5)
    return network


def test_hypergradient_against_double_backward(smooth_search):
    network, xi, clip, decay = smooth_search, 0.7, 0.25, 0.01
    optimizer = torch.optim.SGD(network.weights().values(), lr=xi, weight_decay=decay)
    architect = Architect(network, optimizer, grad_clip=clip)
    rates = DropoutOptions(dropout=0.3, dropouth=0.2, dropoutx=0.2, dropouti=0, dropoute=0)
    train, valid = (text_batch(network, rates, seed) for seed in (1, 2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    architect.step(train, valid, xi)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("alphas_"), name

    book = textbook_rnn.Network(V, H, primitives=network.primitives)
    values = {**before, "alphas": before["alphas_recurrent"]}
    alphas = values.pop("alphas_recurrent").requires_grad_()
    weights = {name: values[name].clone().requires_grad_() for name in network.weights()}

    def loss(weights, batch):
        given = iter([1.0, 1.0 if batch.masks.inputs is None else batch.masks.inputs, 1.0, batch.masks.hidden,
                      batch.masks.outputs])
        book.mask = lambda like, shape, p: next(given)
        buffers = {name: values[name].clone() for name in values if "bn" in name}
        logp, *_ = torch.func.functional_call(book, {
            **weights, **buffers, "decoder.weight": weights["encoder.weight"], "alphas": alphas},
            (batch.tokens, batch.hidden))
        return nn.functional.nll_loss(logp.flatten(0, 1), batch.targets.flatten())

    gradients = torch.autograd.grad(loss(weights, train), list(weights.values()), create_graph=True)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert norm > clip
    moved = {name: w if name == "encoder.weight" else w.detach() - xi * (clip / norm * g + decay * w.detach())
             for (name, w), g in zip(weights.items(), gradients)}
    virtual = {name: w.detach().requires_grad_() for name, w in moved.items()}
    first, *d = torch.autograd.grad(loss(virtual, valid), [alphas, *virtual.values()])
    length = torch.cat([part.flatten() for part in d]).norm().item()
    assert length > clip  # then the second gradient is clipped too
    d = [part * clip / length for part in d]
    product = sum((g * part).sum() for g, part in zip(gradients, d))
    (second,) = torch.autograd.grad(product, [alphas])
    exact = first - xi * clip / norm * second
    ours = network.alphas_recurrent.grad
    assert (ours - exact).norm() < 1e-3 * exact.norm()
    assert second.norm() * xi * clip / norm > 1e-2 * exact.norm()  # so that a wrong second term cannot hide


def test_weight_step_is_clipped_sgd_with_both_regularisers():
    network = spread(RecurrentNetwork(V, H, CELLS["DARTS_V1"]))
    batch = text_batch(network, DropoutOptions())
    optimizer = weight_optimizer(network, 2.0, 0.1)
    before = [p.detach().clone() for p in network.parameters()]
    expected, outputs = network.loss(batch)
    change, dropped = outputs[1:] - outputs[:-1], outputs * batch.masks.outputs
    total = expected + 0.5 * (change ** 2).mean() + 0.25 * (dropped ** 2).mean()
    gradients = torch.autograd.grad(total, list(network.parameters()))
    factor = min(1, 0.01 / torch.cat([g.flatten() for g in gradients]).norm().item())
    assert factor < 1
    loss = weight_step(network, optimizer, batch, grad_clip=0.01, slowness=0.5, activity=0.25)
    torch.testing.assert_close(loss, expected.detach())
    for p, old, g in zip(network.parameters(), before, gradients):
        torch.testing.assert_close(p.detach(), old - 2.0 * (factor * g + 0.1 * old), rtol=1e-5, atol=1e-7)


def test_genotype_is_the_strongest_edge_of_each_step():
    for seed in range(5):
        alphas = torch.randn(EDGES, len(genotypes.PRIMITIVES), generator=torch.Generator().manual_seed(seed))
        found, row = derive(alphas, genotypes.PRIMITIVES), 0
        for step, (activation, source) in enumerate(found.recurrent):
            rows = alphas.softmax(1)[row:row + step + 1, 1:]
            assert rows[source, genotypes.PRIMITIVES.index(activation) - 1] == rows.max()
            row += step + 1
        assert from_json(json.loads(json.dumps({"recurrent": [list(e) for e in found.recurrent],
                                                "concat": list(found.concat)})), "here") == found


@pytest.mark.parametrize("recurrent, concat, what", [
    ([["tanh", 1]], [1], "follows state 1"), ([["gelu", 0]], [1], "gelu"), ([["tanh", 0]], [2], "concat"),
    ([["tanh", 0]], [], "concat"), ([["tanh", -1]], [1], "pairs"), ("tanh", [1], "pairs"),
    ([["tanh", 0]], [0], "concat")])
def test_bad_genotypes_are_refused(recurrent, concat, what):
    with pytest.raises(InputError, match=what):
        from_json({"recurrent": recurrent, "concat": concat}, "cell.json")
    with pytest.raises(InputError, match="genotype"):
        RecurrentNetwork(V, H, Genotype([("none", 0)], [1]))


@pytest.mark.parametrize("name", CELLS)
def test_picture_has_every_edge_and_is_the_same_every_time(name, tmp_path):
    genotype = CELLS[name]
    first, second = (draw_recurrent(genotype, tmp_path / part) for part in ("a", "b"))
    assert [path.name for path in first] == ["recurrent.svg", "recurrent.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    svg = first[0].read_text()
    found = sorted(re.findall(r'id="((?:edge|output)-[^"]*)"', svg))
    edges = [f"edge-{i + 1}-{source}-{i + 1}-{activation}" for i, (activation, source) in enumerate(genotype.recurrent)]
    assert found == sorted([*edges, "edge-0--2-0-tanh", "edge-0--1-0-tanh",
                            *(f"output-{state}" for state in genotype.concat)])


def test_parameters_at_the_published_size():
    with torch.device("meta"):
        network = RecurrentNetwork(10_000, 850, genotypes.DARTS_V2)
    count = sum(p.numel() for p in network.parameters())
    assert count == 10_000 * 850 + 10_000 + 1700 * 1700 + 8 * 850 * 1700
    assert 22.5e6 < count < 23.5e6
