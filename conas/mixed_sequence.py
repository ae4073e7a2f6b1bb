"""The supernet's recurrent cell over a whole sequence of words, forward and backward, as one autograd function.

With gate c, activation inputs h and probabilities p_k of an edge from state s, whose sum is P (without `none`, P < 1),
a step adds over its edges

    sum_k p_k (s + c (f_k(h) - s))  =  P s + c (sum_k p_k f_k(h) - P s)

so that c and s meet the mixture of activations once instead of once for each of them. What the gradient of a new state
is multiplied by on its way back through an edge is made in the forward pass, as long as its parts are in a cache: three
tensors an edge are kept, and the backward pass is little more than its matrix products. Where the alphas have a gradient,
the terms of the left side are kept too: by p_k it is their product with the gradient of the new state.

See `conas.sequence` for shapes and for what the two have in common. There are E = 36 edges and K activations.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from conas.sequence import add_through, masked, once, slopes
from conas.workspace import Workspace

PIECE = 2 ** 16  # numbers of one kind in the part of a step whose 2 K kinds of numbers are to stay in a cache


def run_supernet(x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None,
                 probabilities: Tensor, activations: Sequence[str], statistics: tuple[Tensor, Tensor] | None, eps: float,
                 workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, B, H) of the supernet's cell, and the means and variances (9 T, H) of what was normalised, in order.

    `probabilities` (E, K) are those of the alphas' softmax; `activations` are identity, relu if there is one, and others.
    Every state is normalised: by the batch, or by `statistics`, mean and variance (H,) each.
    """
    outputs, means, scales = _Supernet.apply(x, hidden, W_hidden, mask, probabilities, tuple(activations), statistics,
                                             eps, workspace.loan(x), torch.is_grad_enabled(), *Ws)
    return outputs, means, scales ** -2 - eps


class _Mixtures:
    """The mixtures of activations and their slopes, as products of the probabilities with rows of numbers.

    Rows are the K activations' outputs, squares of those of sigmoid and tanh, derivatives of relu, ones.
    """

    def __init__(self, p: Tensor, activations: Sequence[str], edges: int, B: int, H: int):
        self.K, self.first = len(activations), 1 + activations.count("relu")
        self.names = activations[1:]
        curved, tanh = p[:, self.first:], torch.tensor([name == "tanh" for name in activations[self.first:]])
        tanh = tanh.to(p.device)
        self.p, self.total = p[:, None], p.sum(dim=1)
        #   p (f - f^2) for sigmoid, p (1 - f^2) for tanh
        self.p_slope = torch.cat([curved * ~tanh, -curved, p[:, 1:self.first],
                                  p[:, :1] + (curved * tanh).sum(dim=1, keepdim=True)], dim=1)[:, None]
        self.rows = p.new_empty(2 * self.K, edges, B, H)
        self.rows[-1] = 1
        self.product, self.c, self.mix, self.slope = (p.new_empty(edges, B, *shape) for shape in ((2, H), *[(H,)] * 3))
        self.ones = p.new_ones(edges)


class _Piece:
    """Some edges of one step. Views of what all time steps share are made once."""

    def __init__(self, shared: _Mixtures, edges: slice, W: Tensor):
        n, K, first, rows = edges.stop - edges.start, shared.K, shared.first, shared.rows
        product, self.W = shared.product[:n], W
        B, _, H = product.shape[1:]
        self.product, (self.gate, self.input) = product.view(n * B, 2 * H), product.unbind(2)
        self.c, self.mix, self.slope = shared.c[:n], shared.mix[:n], shared.slope[:n]
        self.h, self.values = rows[0, :n], rows[:K, :n]
        self.apply = [(INTO[name], row) for name, row in zip(shared.names, rows[1:K, :n])]
        self.curved, self.squares = rows[first:K, :n], rows[K:2 * K - first, :n]
        self.relus, self.steps = rows[1:first, :n], rows[2 * K - first:-1, :n]
        self.flat_values, self.flat_slopes = (part.flatten(2).transpose(0, 1) for part in (self.values, rows[first:, :n]))
        self.p, self.p_slope, self.P = shared.p[edges], shared.p_slope[edges], shared.total[edges, None, None]
        self.flat_mix, self.flat_slope = (part.view(n, 1, B * H) for part in (self.mix, self.slope))
        self.by_unit, self.ones = self.mix.view(n, B * H).t(), shared.ones[:n]

    def add(self, total: Tensor, state: Tensor, heard: Tensor) -> None:
        """total (B H,) += c (sum_k p_k f_k(h) - P s), over the edges, from states (n, B, H) and (n B, H), masked."""
        torch.mm(heard, self.W, out=self.product)
        torch.sigmoid(self.gate, out=self.c)
        self.h.copy_(self.input)
        for activation, row in self.apply:
            activation(self.h, out=row)
        torch.bmm(self.p, self.flat_values, out=self.flat_mix)
        self.mix.addcmul_(state, self.P, value=-1).mul_(self.c)
        total.addmv_(self.by_unit, self.ones)

    def keep(self, state: Tensor, d_gate: Tensor, d_input: Tensor, stays: Tensor, terms: Tensor | None) -> None:
        """What the backward pass needs of the edges that were just added, (n, B, H) each; `terms` (K, n, B, H)."""
        torch.addcmul(self.mix, self.mix, self.c, value=-1, out=d_gate)
        torch.addcmul(self.P, self.P, self.c, value=-1, out=stays)
        torch.mul(self.curved, self.curved, out=self.squares)
        torch.sign(self.relus, out=self.steps)
        torch.bmm(self.p_slope, self.flat_slopes, out=self.flat_slope)
        torch.mul(self.slope, self.c, out=d_input)
        if terms is not None:
            torch.lerp(state, self.values, self.c, out=terms)


INTO = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": lambda x, out: torch.clamp_min(x, 0, out=out)}


def _rows(steps: int) -> list[slice]:
    """For each step, the rows of its edges."""
    return [slice(i * (i + 1) // 2, (i + 1) * (i + 2) // 2) for i in range(steps)]


class _Supernet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, W_hidden, mask, probabilities, activations, statistics, eps, loan, learning, *Ws):
        T, B, H, steps, E, K = len(x), *hidden.shape, len(Ws), len(probabilities), len(activations)
        a = torch.empty_like(x)
        before = loan.empty("before", T + 1, B, H)  # hidden states; before[t + 1] is the output of time step t
        before[0] = hidden
        heard = loan.empty("heard", T, B, H)        # hidden states and, below, states as products hear them: masked
        raw, states, states_heard = (loan.empty(f"states {n}", T, steps + 1, B, H) for n in range(3))  # raw: before normalising
        means, scales = (x.new_empty(T, steps + 1, H) for _ in range(2))
        if statistics is not None:
            means[:], scales[:] = statistics[0], (statistics[1] + eps).rsqrt()
        d_edges = loan.empty("edges", T, E, B, 2, H) if learning else None  # multiply a new state's gradient, see _Piece.keep
        stays = loan.empty("stays", T, E, B, H) if learning else None
        terms = loan.empty("terms", T, E, K, B, H) if learning and ctx.needs_input_grad[4] else None

        most = max(1, min(steps, PIECE // (B * H)))
        shared = _Mixtures(probabilities, activations, most, B, H)
        flat = states.view(T, steps + 1, B * H).transpose(1, 2)
        plan = []  # for each step its pieces, and of all time steps the views of what they read and write
        for i, row in enumerate(_rows(steps)):
            parts = []
            for begin in range(0, i + 1, most):
                end = min(begin + most, i + 1)
                edges = slice(row.start + begin, row.start + end)
                kept = []
                if learning:
                    kept = [*(part.unbind() for part in d_edges[:, edges].unbind(3)), stays[:, edges].unbind(),
                            [None] * T if terms is None else terms[:, edges].transpose(1, 2).unbind()]
                parts.append((_Piece(shared, edges, Ws[i]), states[:, begin:end].unbind(),
                              states_heard[:, begin:end].reshape(T, -1, H).unbind() if False else
                              [part.view(-1, H) for part in states_heard[:, begin:end].unbind()], kept))
            plan.append((parts, flat[:, :, :i + 1].unbind(), shared.total[row]))
        slots = [[part.unbind() for part in whole.unbind(1)] for whole in (raw, states, states_heard, means, scales)]

        def normalise(t: int, i: int) -> None:
            x, y, heard, mean, scale = (views[i][t] for views in slots)
            if statistics is None:
                torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps, out=(y, mean, scale))
            else:
                torch.sub(x, mean, out=y).mul_(scale)
            masked(y, mask, heard)

        c0, h0 = (part.unbind() for part in a.chunk(2, dim=2))
        share = x.new_full((steps,), 1 / steps)
        outputs = before.view(T + 1, -1).unbind()
        averaged = flat[:, :, 1:].unbind()
        sums = [part.view(T, -1).unbind() if False else [v.view(-1) for v in part] for part in slots[0]]
        each = zip(x.unbind(), before.unbind(), heard.unbind(), a.unbind())
        for t, (words, state, hears, product) in enumerate(each):
            torch.addmm(words, masked(state, mask, hears), W_hidden, out=product)
            torch.lerp(state, h0[t].tanh_(), c0[t].sigmoid_(), out=slots[0][0][t])
            normalise(t, 0)
            for i, (parts, earlier, total) in enumerate(plan, start=1):
                torch.mv(earlier[t], total, out=sums[i][t])
                for piece, source, hears, kept in parts:
                    piece.add(sums[i][t], source[t], hears[t])
                    if learning:
                        piece.keep(source[t], *(part[t] for part in kept))
                normalise(t, i)
            torch.mv(averaged[t], share, out=outputs[t + 1])
        ctx.save_for_backward(a, before, heard, raw, states_heard, means, scales, d_edges, stays, terms, W_hidden, *Ws)
        ctx.mask, ctx.batch, ctx.eps, ctx.loan, ctx.used = mask, statistics is None, eps, loan, False
        means, scales = means.view(-1, H), scales.view(-1, H)
        ctx.mark_non_differentiable(means, scales)
        outputs = before[1:].clone()
        if not learning:
            loan.give_back()
        return outputs, means, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs, *_):
        once(ctx)
        a, before, heard, raw, states_heard, means, scales, d_edges, stays, terms, W_hidden, *Ws = ctx.saved_tensors
        mask, needed = ctx.mask, ctx.needs_input_grad
        (T, B, H), steps, E = d_outputs.shape, len(Ws), d_edges.shape[1]
        d_hidden, d_output = torch.zeros_like(before[0]), torch.empty_like(before[0])
        d = raw.new_empty(steps + 1, B, H)
        d_each = d.unbind()
        d_Ws = [torch.zeros_like(W) if wanted else None for W, wanted in zip(Ws, needed[10:])]
        d_terms = None if terms is None else raw.new_zeros(E, terms.shape[2])
        stays_hidden = torch.empty_like(heard)
        halves = a.view(T, B, 2, H)
        slopes(*halves[None].permute(3, 0, 1, 2, 4), before[:-1], [("tanh", slice(None))], stays_hidden[None])
        to_hidden = W_hidden.t().contiguous()
        plan = []
        for i, row in enumerate(_rows(steps)):
            part = d_edges[:, row]
            plan.append((i + 1, d[:i + 1], part.unbind(), [v.view(-1, 2 * H) for v in part.unbind()],
                         stays[:, row].unbind(), [v.view(-1, H).t() for v in states_heard[:, :i + 1].unbind()],
                         Ws[i].t().contiguous(), d_Ws[i],
                         None if terms is None else [v.view(-1, B * H) for v in terms[:, row].unbind()],
                         None if terms is None else d_terms[row].view(-1)))
        normalised = [[part.unbind() for part in whole.unbind(1)] for whole in (raw, means, scales)]

        def normalise_backward(t: int, i: int) -> Tensor:
            x, mean, scale = (views[i][t] for views in normalised)
            if not ctx.batch:
                return d_each[i] * scale
            return torch.ops.aten.native_batch_norm_backward(d_each[i], x, None, None, None, mean, scale, True, ctx.eps,
                                                             [True, False, False])[0]

        gate_halves, a_each, stays_hidden = halves.unbind(), a.unbind(), stays_hidden.unbind()
        for t in reversed(range(T)):
            d_each[0].zero_()
            torch.add(d_outputs[t], d_hidden, out=d_output)
            torch.div(d_output, steps, out=d[1:]) if False else d[1:].copy_(d_output.div_(steps))
            for i, into, edges, product, stay, source, W, d_W, term, d_p in reversed(plan):
                d_new = normalise_backward(t, i)
                edges[t].mul_(d_new[:, None])
                into.addcmul_(stay[t], d_new)
                add_through(into, torch.mm(product[t], W).view(i, B, H), mask)
                if d_W is not None:
                    d_W.addmm_(source[t], product[t])
                if term is not None:
                    d_p.addmv_(term[t], d_new.view(-1))
            d_new = normalise_backward(t, 0)
            gate_halves[t].mul_(d_new[:, None])
            torch.mul(stays_hidden[t], d_new, out=d_hidden)
            add_through(d_hidden, a_each[t] @ to_hidden, mask)
        d_W_hidden = heard.view(-1, H).t() @ a.view(-1, 2 * H) if needed[2] else None
        ctx.loan.give_back()
        return a, d_hidden, d_W_hidden, None, d_terms, *[None] * 5, *d_Ws
