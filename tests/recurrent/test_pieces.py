"""Recurrent cells in pieces: sequences and logits computed part by part, and the memory that passes hand on."""
import copy

import pytest
import torch
from torch import nn

from conas.recurrent import found_cell as sequence
from conas.recurrent import loss as decoder
from conas.recurrent import supernet_cell as mixed_sequence
from conas.recurrent.loss import decoded_loss
from conas.recurrent.model import RecurrentNetwork
from conas.recurrent.options import DropoutOptions
from conas.recurrent.steps import weight_optimizer, weight_step
from conas.recurrent.workspace import Workspace
from rnn.model_search import Network
from tests.recurrent.test_model import CELLS, B, H, T, V, agree_with_textbook, float64, spread, text_batch

__all__ = ["float64"]  # a fixture, of every test here too
KINDS = {"supernet": Network, **{name: lambda *size, cell=cell: RecurrentNetwork(*size, cell)
                                 for name, cell in CELLS.items()}}


def gradients(network, batch) -> dict[str, torch.Tensor]:
    parameters = dict(network.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(network.loss(batch)[0], list(parameters.values()))))


@pytest.mark.parametrize("numbers", [1, 3 * B * H, 20 * B * H])  # one edge or time step at a time, and some at a time
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_in_pieces_is_that_of_the_textbook(kind, numbers, monkeypatch):
    monkeypatch.setattr(mixed_sequence, "PIECE", numbers)
    monkeypatch.setattr(sequence, "CACHED", numbers)
    monkeypatch.setattr(decoder, "ROWS", 3)
    monkeypatch.setattr(decoder, "ELEMENTS", {})
    network = spread(KINDS[kind](V, H))
    agree_with_textbook(network, text_batch(network, DropoutOptions(dropoute=0.3)))


@pytest.mark.parametrize("primitives", [
    ("none", "identity", "tanh"), ("sigmoid", "tanh", "relu", "none"), ("relu", "identity"), ("identity",),
    ("tanh", "none", "sigmoid"), ("none", "relu")], ids="-".join)
def test_any_primitives_in_any_order(primitives):
    network = spread(type("Some", (Network,), {"primitives": primitives})(V, H))
    agree_with_textbook(network, text_batch(network, DropoutOptions()))


@pytest.mark.parametrize("rows", [1, 3, 20, 1000])
def test_loss_in_pieces(rows, monkeypatch):
    monkeypatch.setattr(decoder, "ROWS", rows)
    monkeypatch.setattr(decoder, "ELEMENTS", {})
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((T, B, H), (V, H), (V,)))
    targets = torch.randint(V, (T, B))
    expected = nn.functional.cross_entropy(nn.functional.linear(x, weight, bias).flatten(0, 1), targets.flatten())
    loss = decoded_loss(x, weight, bias, targets)
    torch.testing.assert_close(loss, expected)
    for wanted in ([x, weight, bias], [x], [bias, weight]):
        others = [w.detach() if not any(w is each for each in wanted) else w for w in (x, weight, bias)]
        found = torch.autograd.grad(3 * decoded_loss(*others, targets), wanted)
        for ours, theirs in zip(found, torch.autograd.grad(3 * expected, wanted, retain_graph=True)):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(decoded_loss(x, weight, bias, targets), expected)


def test_loss_of_logits_far_apart():
    x, weight = torch.tensor([[[1000.0]], [[-1000.0]]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    loss = decoded_loss(x, weight, torch.zeros(2), torch.tensor([[0], [0]]))
    (d_x,) = torch.autograd.grad(loss, [x])
    assert loss.item() == 1000  # 0 nats and 2000
    assert d_x.flatten().tolist() == [0, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_do_not_disturb_each_other(kind):
    network = spread(KINDS[kind](V, H))
    batches = [text_batch(network, DropoutOptions(), seed) for seed in range(3)]
    alone = [gradients(copy.deepcopy(network), batch) for batch in batches]
    parameters = list(network.parameters())
    first, outputs = network.loss(batches[0])
    kept = outputs.clone()
    second, _ = network.loss(batches[1])
    with torch.no_grad():
        network.loss(batches[2])
    found = {1: torch.autograd.grad(second, parameters)}
    third, _ = network.loss(batches[2])
    found |= {0: torch.autograd.grad(first, parameters), 2: torch.autograd.grad(third, parameters)}
    assert torch.equal(outputs, kept)
    for i, values in found.items():
        for (name, expected), value in zip(alone[i].items(), values):
            torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("kind", ["supernet", "DARTS_V2"])
def test_memory_is_handed_on_and_not_hoarded(kind, monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr("conas.recurrent.workspace.torch.empty", lambda *a, **k: made.append(a) or empty(*a, **k))
    network = spread(KINDS[kind](V, H))
    batch = text_batch(network)
    gradients(network, batch)
    assert made
    made.clear()
    gradients(network, batch)
    batch.tokens, batch.targets = batch.tokens[:2], batch.targets[:2]  # a shorter piece of text fits
    gradients(network, batch)
    network.eval()
    with torch.no_grad():
        network.loss(batch)
    assert not [size for size in made if size != (0,)]


def test_a_workspace_lends_nothing_twice():
    workspace, like = Workspace(), torch.zeros(1)
    one, two = workspace.loan(like), workspace.loan(like)
    a, b = one.empty("a", 2, 3), two.empty("a", 2, 3)
    assert a.shape == (2, 3) and a.data_ptr() != b.data_ptr()
    one.give_back()
    again = workspace.loan(like).empty("a", 3)
    assert again.data_ptr() == a.data_ptr()
    two.give_back()
    assert workspace.loan(like.float()).empty("a", 6).dtype == torch.float32
    assert copy.deepcopy(workspace).loan(like).empty("a", 6).data_ptr() not in (a.data_ptr(), b.data_ptr())


def test_training_learns_with_the_optimizer_of_the_scripts():
    network = KINDS["DARTS_V2"](V, H)
    optimizer, batch = weight_optimizer(network, 5.0, 1e-6), text_batch(network)
    losses = [weight_step(network, optimizer, batch, grad_clip=1.0, slowness=0).item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in network.parameters()}
