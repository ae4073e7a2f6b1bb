"""The supernet's recurrent cell over a whole sequence of words, forward and backward, as one autograd function.

With gate c, activation inputs h and probabilities p_k of an edge from state s, whose sum is P (without `none`, P < 1),
a step adds over its edges

    sum_k p_k (s + c (f_k(h) - s))  =  P s + c (sum_k p_k f_k(h) - P s)

so that c and s meet the mixture of activations once instead of once for each of them. What the backward pass can know
of all edges of a time step before it has any gradient is computed for all of them at once. See `conas.sequence` for
shapes and for what the two have in common.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from conas.sequence import add_through, masked, once

INTO = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": lambda x, out: torch.clamp_min(x, 0, out=out)}


def run_supernet(x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None,
                 probabilities: Tensor, activations: Sequence[str], statistics: tuple[Tensor, Tensor] | None, eps: float
                 ) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, B, H) of the supernet's cell, and the means and variances (9 T, H) of what was normalised, in order.

    `probabilities` (36, len(activations)) are those of the alphas' softmax; the first of `activations` is identity.
    Every state is normalised: by the batch, or by `statistics`, mean and variance (H,) each.
    """
    outputs, means, scales = _Supernet.apply(x, hidden, W_hidden, torch.stack(list(Ws)), mask, probabilities,
                                             tuple(activations), statistics, eps)
    return outputs, means, scales ** -2 - eps


def gate(a: Tensor, state: Tensor) -> Tensor:
    """state + c (h - state), from (B, 2H) before sigmoid and tanh; `a` then holds c and h."""
    c, h = a.chunk(2, dim=-1)
    return torch.lerp(state, h.tanh_(), c.sigmoid_())


def _gate_backward(d: Tensor, a: Tensor, state: Tensor) -> Tensor:
    """The gradient by `state` but for the part through `a`; `a` then holds its own gradient."""
    c, h = a.chunk(2, dim=-1)
    dh = d * c
    d_state = d - dh
    d_gate = dh.mul(h - state).mul_(1 - c)
    h.copy_(dh.mul_(1 - h * h))
    c.copy_(d_gate)
    return d_state


def _rows(steps: int) -> list[slice]:
    """For each step, the rows of its edges."""
    return [slice(i * (i + 1) // 2, (i + 1) * (i + 2) // 2) for i in range(steps)]


class _Supernet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, W_hidden, Ws, mask, probabilities, activations, statistics, eps):
        T, B, H, steps, edges = len(x), *hidden.shape, len(Ws), len(probabilities)
        rows, p, total = _rows(steps), probabilities[:, None], probabilities.sum(dim=1)
        a = torch.empty_like(x)
        before = x.new_empty(T + 1, B, H)      # hidden states; before[t + 1] is the output of time step t
        before[0] = hidden
        heard = x.new_empty(T, B, H)           # hidden states and, below, states as products hear them: masked
        raw, states, states_heard = (x.new_empty(T, steps + 1, B, H) for _ in range(3))  # raw: before normalising
        means, scales = (x.new_empty(T, steps + 1, H) for _ in range(2))
        gates, gains = (x.new_empty(T, edges, B, H) for _ in range(2))
        values = x.new_empty(T, len(activations), edges, B, H)  # f_k(h); the first is h
        if statistics is not None:
            means[:], scales[:] = statistics[0], (statistics[1] + eps).rsqrt()
        W_gate, W_value = Ws.chunk(2, dim=2)

        def normalise(t: int, i: int) -> None:
            if statistics is None:
                y, means[t, i], scales[t, i] = torch.native_batch_norm(
                    raw[t, i], None, None, None, None, True, 0.0, eps)
                states[t, i] = y
            else:
                torch.sub(raw[t, i], means[t, i], out=states[t, i]).mul_(scales[t, i])
            masked(states[t, i], mask, states_heard[t, i])

        for t in range(T):
            torch.addmm(x[t], masked(before[t], mask, heard[t]), W_hidden, out=a[t])
            raw[t, 0] = gate(a[t], before[t])
            normalise(t, 0)
            for i, row in enumerate(rows):
                state, source = states[t, :i + 1], states_heard[t, :i + 1].view(-1, H)
                c, value, gain = gates[t, row], values[t, :, row], gains[t, row]
                torch.mm(source, W_gate[i], out=c.view(-1, H))
                torch.mm(source, W_value[i], out=value[0].view(-1, H))
                c.sigmoid_()
                for k, name in enumerate(activations[1:], start=1):
                    INTO[name](value[0], out=value[k])
                torch.bmm(p[row], value.flatten(2).transpose(0, 1), out=gain.view(i + 1, 1, -1))
                gain.addcmul_(state, total[row, None, None], value=-1)
                torch.mv(state.view(i + 1, -1).t(), total[row], out=raw[t, i + 1].view(-1))
                raw[t, i + 1] += (gain * c).sum(dim=0)
                normalise(t, i + 1)
            torch.mean(states[t, 1:], dim=0, out=before[t + 1])
        ctx.save_for_backward(a, before, heard, raw, states, states_heard, means, scales, gates, gains, values,
                              W_hidden, Ws, probabilities)
        ctx.mask, ctx.activations, ctx.batch, ctx.eps, ctx.used = mask, activations, statistics is None, eps, False
        means, scales = means.view(-1, H), scales.view(-1, H)
        ctx.mark_non_differentiable(means, scales)
        return before[1:].clone(), means, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs, *_):
        once(ctx)
        (a, before, heard, raw, states, states_heard, means, scales, gates, gains, values, W_hidden, Ws,
         probabilities) = ctx.saved_tensors
        mask, needed = ctx.mask, ctx.needs_input_grad
        (T, B, H), steps = d_outputs.shape, len(Ws)
        rows, p, total = _rows(steps), probabilities[:, :, None, None], probabilities.sum(dim=1)[:, None, None]
        sources = torch.cat([torch.arange(i + 1) for i in range(steps)]).to(p.device)
        followers = torch.arange(steps).repeat_interleave(torch.arange(1, steps + 1)).to(p.device)
        d_hidden, d = torch.zeros_like(before[0]), torch.empty_like(states[0])
        d_new = torch.empty_like(states[0, 1:])  # of states before normalising, but for state 0
        d_probabilities = torch.zeros_like(probabilities)
        d_Ws = torch.zeros_like(Ws) if needed[3] else None
        to_gate, to_value = (part.transpose(1, 2) for part in Ws.chunk(2, dim=2))

        def normalise_backward(t: int, i: int) -> Tensor:
            if not ctx.batch:
                return d[i] * scales[t, i]
            return torch.ops.aten.native_batch_norm_backward(
                d[i], raw[t, i], None, None, None, means[t, i], scales[t, i], True, ctx.eps, [True, False, False])[0]

        for t in reversed(range(T)):
            d_gate, dm = gains[t], gates[t]
            d_gate.addcmul_(d_gate, dm, value=-1)  # gain (1 - c): what dm is multiplied by
            d_value = _slope(values[t], p, ctx.activations)
            d[0].zero_()
            d[1:] = (d_outputs[t] + d_hidden).div_(steps)
            for i, row in reversed(list(enumerate(rows))):
                d_new[i] = normalise_backward(t, i + 1)
                into, source = d[:i + 1], states_heard[t, :i + 1].view(-1, H)
                dm[row] *= d_new[i]
                into.addcmul_(d_new[i] - dm[row], total[row])
                left, right = ((part[row].mul_(dm[row])).view(-1, H) for part in (d_gate, d_value))
                through = torch.mm(left, to_gate[i]).addmm_(right, to_value[i])
                add_through(into, through.view(i + 1, B, H), mask)
                if d_Ws is not None:
                    d_Ws[i, :, :H].addmm_(source.t(), left)
                    d_Ws[i, :, H:].addmm_(source.t(), right)
            if needed[5]:
                flat = states[t].view(steps + 1, -1)
                kept = (flat @ d_new.view(steps, -1).t())[sources, followers]  # of s and the new state's gradient
                kept -= (states[t, sources] * dm).sum(dim=(1, 2))
                d_probabilities += kept[:, None] + values[t].mul_(dm).sum(dim=(2, 3)).t()
            d_hidden = _gate_backward(normalise_backward(t, 0), a[t], before[t])
            add_through(d_hidden, a[t] @ W_hidden.t(), mask)
        d_W_hidden = heard.view(-1, H).t() @ a.view(-1, 2 * H) if needed[2] else None
        return a, d_hidden, d_W_hidden, d_Ws, None, d_probabilities, None, None, None


def _slope(values: Tensor, p: Tensor, activations: Sequence[str]) -> Tensor:
    """(E, B, H): the derivative of the mixture by h, from values (K, E, B, H) and p (E, K, 1, 1)."""
    constant, slope = p[:, 0], torch.zeros_like(values[0])
    for k, name in enumerate(activations[1:], start=1):
        f = values[k]
        if name == "tanh":
            slope.addcmul_(f * f, p[:, k], value=-1)
            constant = constant + p[:, k]
        elif name == "sigmoid":
            slope.addcmul_(torch.addcmul(f, f, f, value=-1), p[:, k])
        elif name == "relu":
            slope.addcmul_(f.sign(), p[:, k])
    return slope.add_(constant)
