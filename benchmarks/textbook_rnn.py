"""Recurrent DARTS (arXiv:1806.09055, sections 2.1 and 3.1) straight from the paper, time step by time step.

The baseline of `benchmarks/rnn_step.py` and the oracle of the tests: it imports nothing but torch and shares nothing
with `conas`. Dropout masks are drawn where they are used. `state_dict()` names are those of the published code.

    network = Network(50, 10, recurrent=(("relu", 0), ...))    # a found cell
    network = Network(50, 10, primitives=PRIMITIVES)           # the supernet: `alphas` is (36, 5)
    log_prob, hidden, outputs = network(tokens, hidden)        # (T, B, words), (B, units), (T, B, units)
"""
import torch
from torch import Tensor, nn

STEPS = 8
ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda x: x}


class Cell(nn.Module):
    def __init__(self, units: int, steps: int, search: bool):
        super().__init__()
        self._W0 = nn.Parameter(torch.empty(2 * units, 2 * units).uniform_(-0.04, 0.04))
        self._Ws = nn.ParameterList(torch.empty(units, 2 * units).uniform_(-0.04, 0.04) for _ in range(steps))
        if search:
            self.bn = nn.BatchNorm1d(units, affine=False)


class Network(nn.Module):
    def __init__(self, words: int, units: int, recurrent=None, primitives=None, dropout: float = 0.0,
                 dropouth: float = 0.0, dropoutx: float = 0.0, dropouti: float = 0.0, dropoute: float = 0.0):
        super().__init__()
        self.recurrent, self.primitives = recurrent, primitives
        self.dropout, self.dropouth, self.dropoutx, self.dropouti, self.dropoute = (
            dropout, dropouth, dropoutx, dropouti, dropoute)
        self.encoder = nn.Embedding(words, units)
        self.rnns = nn.ModuleList([Cell(units, STEPS if recurrent is None else len(recurrent), recurrent is None)])
        self.decoder = nn.Linear(units, words)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -0.04, 0.04)
        nn.init.zeros_(self.decoder.bias)
        if recurrent is None:
            self.alphas = nn.Parameter(1e-3 * torch.randn(STEPS * (STEPS + 1) // 2, len(primitives)))

    def mask(self, like: Tensor, shape: tuple, p: float) -> Tensor:
        if not self.training or p == 0:
            return like.new_ones(shape)
        return like.new_empty(shape).bernoulli_(1 - p) / (1 - p)

    def forward(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, cell = self.encoder.weight, self.rnns[0]
        x = nn.functional.embedding(tokens, weight * self.mask(weight, (len(weight), 1), self.dropoute))
        x = x * self.mask(x, (1, *x.shape[1:]), self.dropouti)
        x_mask = self.mask(x, x.shape[1:], self.dropoutx)
        h_mask = self.mask(x, x.shape[1:], self.dropouth)
        step = self.search_step if self.recurrent is None else self.step
        outputs = []
        for t in range(len(x)):
            joined = torch.cat([x[t] * x_mask, hidden * h_mask], dim=1)
            c, h = (joined @ cell._W0).chunk(2, dim=1)
            hidden = step(hidden + c.sigmoid() * (h.tanh() - hidden), h_mask)
            outputs.append(hidden)
        outputs = torch.stack(outputs)
        dropped = outputs * self.mask(x, (1, *x.shape[1:]), self.dropout)
        return self.decoder(dropped).log_softmax(dim=2), hidden, outputs

    def step(self, state: Tensor, h_mask: Tensor) -> Tensor:
        states = [state]
        for W, (name, source) in zip(self.rnns[0]._Ws, self.recurrent):
            s = states[source]
            c, h = ((s * h_mask) @ W).chunk(2, dim=1)
            states.append(s + c.sigmoid() * (ACTIVATIONS[name](h) - s))
        return torch.stack(states[1:]).mean(dim=0)

    def search_step(self, state: Tensor, h_mask: Tensor) -> Tensor:
        cell, probabilities, row = self.rnns[0], self.alphas.softmax(dim=1), 0
        states = cell.bn(state)[None]
        for i, W in enumerate(cell._Ws):
            c, h = ((states * h_mask) @ W).chunk(2, dim=2)
            c = c.sigmoid()
            total = torch.zeros_like(state)
            for k, name in enumerate(self.primitives):
                if name != "none":
                    mixed = states + c * (ACTIVATIONS[name](h) - states)
                    total = total + (probabilities[row:row + i + 1, k, None, None] * mixed).sum(dim=0)
            states = torch.cat([states, cell.bn(total)[None]])
            row += i + 1
        return states[1:].mean(dim=0)
