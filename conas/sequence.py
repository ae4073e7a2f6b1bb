"""A recurrent cell over a whole sequence of words, forward and backward, as one autograd function each for found cells
and for the supernet.

Autograd through a loop over time steps records some hundred small operations a step and adds a gradient to every weight
matrix at every step. Here

* one product serves all steps of a cell that follow the same state, and the input words' part of state 0 is computed
  for all time steps before the loop (by the caller);
* only what the backward pass cannot do without is kept, and it is overwritten in place by its own gradient;
* the gradient of a found cell's matrix is one product over all time steps, after the loop.

Shapes: T time steps, B sequences, H units. Gate and activation lie side by side in 2H columns, as in the published
weights. A dropout mask (B, H) is None where nothing is dropped. First derivatives only, once for each forward pass.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from conas.recurrent_genotype import ACTIVATIONS, Genotype

SLOPES = {  # derivative of an activation, from its output
    "tanh": lambda f: 1 - f * f,
    "relu": lambda f: (f > 0).to(f.dtype),
    "sigmoid": lambda f: f - f * f,
    "identity": torch.ones_like,
}


class Plan:
    """In which order a cell's states are computed: steps that follow the same state are neighbours.

    `steps` are the genotype's steps in that order; slot 0 is state 0, and slot r + 1 holds what `steps[r]` makes.
    `groups` are (slot of the source, first step, last step + 1); `outputs` are the slots that the output averages.
    """

    def __init__(self, genotype: Genotype):
        slots, self.steps, self.groups = [0], [], []
        for slot, state in enumerate(slots):  # grows while it is walked through
            followers = [i for i, (_, source) in enumerate(genotype.recurrent) if source == state]
            if followers:
                self.groups.append((slot, len(self.steps), len(self.steps) + len(followers)))
            self.steps += followers
            slots += [i + 1 for i in followers]
        self.activations = [genotype.recurrent[i][0] for i in self.steps]
        self.outputs = [slots.index(state) for state in genotype.concat]

    def weights(self, Ws: Sequence[Tensor]) -> list[Tensor]:
        """For each group, the matrices (H, 2H) of its steps side by side."""
        return [torch.cat([Ws[i] for i in self.steps[a:b]], dim=1) for _, a, b in self.groups]


def run_cell(x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None, plan: Plan
             ) -> Tensor:
    """Outputs (T, B, H) of a found cell; x (T, B, 2H) is what the words add to state 0, `hidden` (B, H) goes before."""
    return _Cell.apply(x, hidden, W_hidden, mask, plan, *plan.weights(Ws))


def run_supernet(x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None,
                 probabilities: Tensor, activations: Sequence[str], statistics: tuple[Tensor, Tensor] | None, eps: float
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, B, H) of the supernet's cell, and the means and variances (9 T, H) of what was normalised, in order.

    `probabilities` (36, len(activations)) are those of the alphas' softmax, without `none`. Every state is normalised:
    by the batch, or by `statistics`, mean and variance (H,) each.
    """
    return _Supernet.apply(x, hidden, W_hidden, torch.stack(list(Ws)), mask, probabilities, tuple(activations),
                           statistics, eps)


def _masked(x: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    return out.copy_(x) if mask is None else torch.mul(x, mask, out=out)


def _gate(a: Tensor, state: Tensor) -> Tensor:
    """state + c (h - state), from (B, 2H) before sigmoid and tanh; `a` then holds c and h."""
    c, h = a.chunk(2, dim=-1)
    return torch.lerp(state, h.tanh_(), c.sigmoid_())


def _gate_backward(d: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """The gradient by `state` but for the part through `a`; `a` then holds its own gradient."""
    c, h = a.chunk(2, dim=-1)
    dh = d * c
    d_state = d - dh
    d_gate = dh.mul(h - state).mul_(1 - c)
    h.copy_(dh.mul_(SLOPES["tanh"](h)))
    c.copy_(d_gate)
    return d_state


def _once(ctx) -> None:
    if ctx.used:
        raise RuntimeError("the backward pass of a recurrent sequence overwrites what it needs: it can be run once")
    ctx.used = True


def _add_through(total: Tensor, d: Tensor, mask: Tensor | None) -> None:
    """total += d, through the mask."""
    if mask is None:
        total.add_(d)
    else:
        total.addcmul_(d, mask)


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, W_hidden, mask, plan, *weights):
        T, B, H = len(x), *hidden.shape
        a = torch.empty_like(x)
        before = x.new_empty(T + 1, B, H)      # hidden states; before[t + 1] is the output of time step t
        before[0] = hidden
        masked = x.new_empty(T, B, 1 + len(plan.groups), H)  # what is multiplied: hidden state, sources of groups
        states = x.new_empty(T, B, 1 + len(plan.steps), H)
        gates = [x.new_empty(T, B, b - i, 2, H) for _, i, b in plan.groups]
        whole = plan.outputs == list(range(plan.outputs[0], plan.outputs[-1] + 1))
        for t in range(T):
            h_masked = _masked(before[t], mask, masked[t, :, 0])
            torch.addmm(x[t], h_masked, W_hidden, out=a[t])
            states[t, :, 0] = _gate(a[t], before[t])
            for n, ((source, i, b), W) in enumerate(zip(plan.groups, weights)):
                state = states[t, :, source]
                torch.mm(_masked(state, mask, masked[t, :, 1 + n]), W, out=gates[n][t].view(B, -1))
                c, f = gates[n][t].unbind(2)
                c.sigmoid_()
                for step, name in enumerate(plan.activations[i:b]):
                    if name != "identity":
                        f[:, step] = ACTIVATIONS[name](f[:, step])
                torch.lerp(state[:, None], f, c, out=states[t, :, 1 + i:1 + b])
            chosen = states[t, :, plan.outputs[0]:plan.outputs[-1] + 1] if whole else states[t][:, plan.outputs]
            torch.mean(chosen, dim=1, out=before[t + 1])
        ctx.save_for_backward(a, before, masked, states, *gates, W_hidden, *weights)
        ctx.mask, ctx.plan, ctx.used = mask, plan, False
        return before[1:].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs):
        _once(ctx)
        mask, plan, n = ctx.mask, ctx.plan, len(ctx.plan.groups)
        a, before, masked, states = ctx.saved_tensors[:4]
        gates, W_hidden, weights = ctx.saved_tensors[4:4 + n], ctx.saved_tensors[4 + n], ctx.saved_tensors[5 + n:]
        T, B, H = d_outputs.shape
        d = states.new_empty(states.shape[1:])
        d_hidden = torch.zeros_like(before[0])
        for t in reversed(range(T)):
            d_output = (d_outputs[t] + d_hidden).div_(len(plan.outputs))
            d.zero_()
            for slot in plan.outputs:
                d[:, slot] = d_output
            for (source, i, b), gate, W in reversed(list(zip(plan.groups, gates, weights))):
                state, d_targets, (c, f) = states[t, :, source], d[:, 1 + i:1 + b], gate[t].unbind(2)
                df = d_targets * c
                d[:, source] += (d_targets - df).sum(dim=1)
                d_gate = (f - state[:, None]).mul_(df).mul_(1 - c)  # df (f - s) (1 - c) = d (f - s) c (1 - c)
                for step, name in enumerate(plan.activations[i:b]):
                    if name != "identity":
                        df[:, step] *= SLOPES[name](f[:, step])
                c.copy_(d_gate)
                f.copy_(df)
                _add_through(d[:, source], gate[t].view(B, -1) @ W.t(), mask)
            d_hidden = _gate_backward(d[:, 0], a[t], before[t])
            _add_through(d_hidden, a[t] @ W_hidden.t(), mask)

        def gradient(part: int, values: Tensor) -> Tensor:
            return masked[:, :, part].reshape(T * B, H).t() @ values.view(T * B, -1)

        needed = ctx.needs_input_grad
        return (a, d_hidden, gradient(0, a) if needed[2] else None, None, None,
                *(gradient(1 + n, gate) if needed[5 + n] else None for n, gate in enumerate(gates)))


class _Supernet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, W_hidden, Ws, mask, probabilities, activations, statistics, eps):
        T, B, H, steps = len(x), *hidden.shape, len(Ws)
        a = torch.empty_like(x)
        before = x.new_empty(T + 1, B, H)
        before[0] = hidden
        masked_hidden = x.new_empty(T, B, H)
        states = x.new_empty(T, steps + 1, B, H)
        masked = torch.empty_like(states)
        means, variances, scales = (x.new_empty(T, steps + 1, H) for _ in range(3))
        edges = x.new_empty(T, len(probabilities), B, 2 * H)

        def normalise(state: Tensor, t: int, i: int) -> None:
            if statistics is None:
                variance, mean = torch.var_mean(state, dim=0, correction=0)
            else:
                mean, variance = statistics
            means[t, i], variances[t, i], scales[t, i] = mean, variance, (variance + eps).rsqrt()
            torch.sub(state, mean, out=states[t, i]).mul_(scales[t, i])
            _masked(states[t, i], mask, masked[t, i])

        for t in range(T):
            torch.addmm(x[t], _masked(before[t], mask, masked_hidden[t]), W_hidden, out=a[t])
            normalise(_gate(a[t], before[t]), t, 0)
            for i in range(steps):
                rows = slice(i * (i + 1) // 2, (i + 1) * (i + 2) // 2)
                edge, p = edges[t, rows], probabilities[rows]
                torch.mm(masked[t, :i + 1].view(-1, H), Ws[i], out=edge.view(-1, 2 * H))
                c, h = edge.chunk(2, dim=-1)
                c.sigmoid_()
                total = p.sum(dim=1)
                gain = _mixture(h, p, activations)[0].sub_(total[:, None, None] * states[t, :i + 1])
                stay = (total @ states[t, :i + 1].view(i + 1, -1)).view(B, H)
                normalise(stay.add_(gain.mul_(c).sum(dim=0)), t, i + 1)
            torch.mean(states[t, 1:], dim=0, out=before[t + 1])
        ctx.save_for_backward(a, before, masked_hidden, states, masked, scales, edges, W_hidden, Ws, probabilities)
        ctx.mask, ctx.activations, ctx.batch, ctx.used = mask, activations, statistics is None, False
        means, variances = means.view(-1, H), variances.view(-1, H)
        ctx.mark_non_differentiable(means, variances)
        return before[1:].clone(), means, variances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs, *_):
        _once(ctx)
        a, before, masked_hidden, states, masked, scales, edges, W_hidden, Ws, probabilities = ctx.saved_tensors
        mask, activations, needed = ctx.mask, ctx.activations, ctx.needs_input_grad
        (T, B, H), steps = d_outputs.shape, len(Ws)
        d_hidden, d = torch.zeros_like(before[0]), torch.empty_like(states[0])
        d_probabilities = torch.zeros_like(probabilities)
        d_Ws = torch.zeros_like(Ws) if needed[3] else None

        def normalise_backward(t: int, i: int) -> Tensor:
            dy = d[i]
            if ctx.batch:
                y = states[t, i]
                dy = (dy - dy.mean(dim=0)).addcmul_(y, (dy * y).mean(dim=0), value=-1)
            return dy * scales[t, i]

        for t in reversed(range(T)):
            d[0].zero_()
            d[1:] = (d_outputs[t] + d_hidden).div_(steps)
            for i in reversed(range(steps)):
                rows = slice(i * (i + 1) // 2, (i + 1) * (i + 2) // 2)
                edge, p, state = edges[t, rows], probabilities[rows], states[t, :i + 1]
                c, h = edge.chunk(2, dim=-1)
                total = p.sum(dim=1)[:, None, None]
                d_new = normalise_backward(t, i + 1)
                mixture, slope, values = _mixture(h, p, activations, slopes=True)
                dm = d_new * c
                stay = d_new - dm
                if needed[5]:
                    d_probabilities[rows] += _dots(state, stay)[:, None]
                    for k, value in enumerate(values):
                        d_probabilities[rows, k] += _dots(dm, value)
                d[:i + 1] += stay.mul_(total)
                d_gate = mixture.sub_(total * state).mul_(dm).mul_(1 - c)
                c.copy_(d_gate)
                h.copy_(dm.mul_(slope))
                flat = edge.view(-1, 2 * H)
                _add_through(d[:i + 1], (flat @ Ws[i].t()).view(i + 1, B, H), mask)
                if d_Ws is not None:
                    d_Ws[i].addmm_(masked[t, :i + 1].view(-1, H).t(), flat)
            d_hidden = _gate_backward(normalise_backward(t, 0), a[t], before[t])
            _add_through(d_hidden, a[t] @ W_hidden.t(), mask)
        d_W_hidden = masked_hidden.view(-1, H).t() @ a.view(-1, 2 * H) if needed[2] else None
        return a, d_hidden, d_W_hidden, d_Ws, None, d_probabilities, None, None, None


def _mixture(h: Tensor, p: Tensor, activations: Sequence[str], slopes: bool = False
             ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Of h (E, B, H) with probabilities (E, K): the sum over k of p_k f_k(h), its derivative, and the f_k(h).

    The last two only if `slopes`.
    """
    p = p[:, :, None, None]
    values = [ACTIVATIONS[name](h) for name in activations]
    mixture = values[0] * p[:, 0]
    for k, value in enumerate(values[1:], start=1):
        mixture.addcmul_(value, p[:, k])
    if not slopes:
        return mixture, None, []
    slope = SLOPES[activations[0]](values[0]).mul_(p[:, 0])
    for k, value in enumerate(values[1:], start=1):
        slope.addcmul_(SLOPES[activations[k]](value), p[:, k])
    return mixture, slope, values


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """(E,): the inner products of a and b (E, B, H), edge by edge."""
    return torch.einsum("ebh,ebh->e", a, b)
