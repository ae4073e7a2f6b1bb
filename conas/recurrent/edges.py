"""The edges of a supernet's steps, some at a time, in memory that stays in a cache; see `supernet_cell`.

Rows of numbers (n, B, H) of n edges are, one after the other: the K activations' outputs, of identity, relu if it is
there, sigmoid and tanh; the squares of those of sigmoid and tanh; the derivatives of relu; ones. The mixture of
activations and its slope are products of the probabilities with rows.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

INTO = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": lambda x, out: torch.clamp_min(x, 0, out=out)}


class Shared:
    """What all pieces of up to n edges share: memory, and the probabilities (E, K) by row."""

    def __init__(self, probabilities: Tensor, activations: Sequence[str], n: int, B: int, H: int):
        p, curves = probabilities, 1 + activations.count("relu")  # the first row of sigmoid and tanh
        tanh = torch.tensor([name == "tanh" for name in activations[curves:]], dtype=torch.bool, device=p.device)
        curved = p[:, curves:]
        # slopes: p (f - f^2) of sigmoid, p (1 - f^2) of tanh, p of relu where it is not 0, p of identity
        slope = [curved * ~tanh, -curved, p[:, 1:curves], p[:, :1] + (curved * tanh).sum(dim=1, keepdim=True)]
        self.activations, self.curves = activations, curves
        self.p, self.p_slope, self.total = p[:, None], torch.cat(slope, dim=1)[:, None], p.sum(dim=1)
        self.rows, self.product = p.new_empty(2 * len(activations), n, B, H), p.new_empty(n, B, 2, H)
        self.c, self.mixture, self.slope = p.new_empty(3, n, B, H)
        self.rows[-1], self.ones = 1, p.new_ones(n)


class Piece:
    """Some edges of one step, whose matrix is W (H, 2H). Views of the shared memory are made once."""

    def __init__(self, shared: Shared, edges: slice, W: Tensor):
        n, K, curves = edges.stop - edges.start, len(shared.activations), shared.curves
        rows, product, self.W = shared.rows[:, :n], shared.product[:n], W
        self.product, (self.gate, self.input) = product.flatten(2).flatten(0, 1), product.unbind(2)
        self.c, self.mixture, self.slope = shared.c[:n], shared.mixture[:n], shared.slope[:n]
        self.values, (self.h, *outputs) = rows[:K], rows[:K].unbind()
        self.apply = [(INTO[name], row) for name, row in zip(shared.activations[1:], outputs)]
        self.curved, self.squares = rows[curves:K], rows[K:2 * K - curves]
        self.relus, self.steps = rows[1:curves], rows[2 * K - curves:-1]
        self.p, self.p_slope, self.P = shared.p[edges], shared.p_slope[edges], shared.total[edges, None, None]
        # as products have them: (n, 1, B H) is (n, 1, rows) times (n, rows, B H), and (B H,) is (B H, n) times (n,)
        self.mixture_1, self.slope_1 = self.mixture.view(n, 1, -1), self.slope.view(n, 1, -1)
        self.values_n, self.slopes_n = (part.flatten(2).transpose(0, 1) for part in (self.values, rows[curves:]))
        self.mixture_n, self.ones = self.mixture.view(n, -1).t(), shared.ones[:n]

    def add(self, total: Tensor, state: Tensor, heard: Tensor) -> None:
        """total (B H,) += the sum over the edges of c (sum_k p_k f_k(h) - P s).

        `state` are the states s (n, B, H) that the edges come from, `heard` (n B, H) the same, masked.
        """
        torch.mm(heard, self.W, out=self.product)
        torch.sigmoid(self.gate, out=self.c)
        self.h.copy_(self.input)
        for activation, row in self.apply:
            activation(self.h, out=row)
        torch.bmm(self.p, self.values_n, out=self.mixture_1)
        self.mixture.addcmul_(state, self.P, value=-1).mul_(self.c)
        total.addmv_(self.mixture_n, self.ones)

    def keep(self, state: Tensor, d_gate: Tensor, d_input: Tensor, d_state: Tensor, terms: Tensor | None = None
             ) -> None:
        """Of the edges that were just added, what a new state's gradient is multiplied by, (n, B, H) each.

        `d_gate` and `d_input` for the two halves of the product, `d_state` for s but for the part through these two.
        `terms` (K, n, B, H) become s + c (f_k(h) - s).
        """
        torch.addcmul(self.mixture, self.mixture, self.c, value=-1, out=d_gate)
        torch.addcmul(self.P, self.P, self.c, value=-1, out=d_state)
        torch.mul(self.curved, self.curved, out=self.squares)
        torch.sign(self.relus, out=self.steps)
        torch.bmm(self.p_slope, self.slopes_n, out=self.slope_1)
        torch.mul(self.slope, self.c, out=d_input)
        if terms is not None:
            torch.lerp(state, self.values, self.c, out=terms)
