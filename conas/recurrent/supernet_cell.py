"""The supernet's recurrent cell over a whole sequence of words, forward and backward, as one autograd function.

With gate c, activation inputs h and probabilities p_k of an edge from state s, whose sum is P (without `none`, P < 1),
a step adds over its edges

    sum_k p_k (s + c (f_k(h) - s))  =  P s + c (sum_k p_k f_k(h) - P s)

so that c and s are combined with the mixture of activations once instead of once for each of them. The factors by
which the backward pass multiplies the gradient of a new state are computed in the forward pass, while their parts are
in cache: three tensors per edge are kept, and the backward pass is little more than its matrix products. If the alphas
need a gradient, the terms of the left side are kept too: the gradient w.r.t. p_k is their product with that of the new
state.

See `found_cell` for shapes and for what the two have in common. There are E = 36 edges and K activations.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from conas.recurrent.edges import Piece, Shared
from conas.recurrent.found_cell import add_through, masked, once, slopes
from conas.recurrent.workspace import Workspace

PIECE = 2 ** 16  # numbers (n, B, H) of the edges that are computed together, if that is more than one edge


def run_supernet(x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None,
                 probabilities: Tensor, activations: Sequence[str], statistics: tuple[Tensor, Tensor] | None,
                 eps: float, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (T, B, H) of the supernet's cell, and the means and variances (9 T, H) of what was normalised, in order.

    `probabilities` (E, K) are those of the alphas' softmax; `activations` are identity, relu if it is there, others.
    Every state is normalised: by the batch, or by `statistics`, mean and variance (H,) each.
    """
    outputs, means, scales = _Supernet.apply(x, hidden, W_hidden, mask, probabilities, tuple(activations), statistics,
                                             eps, workspace.loan(x), torch.is_grad_enabled(), *Ws)
    return outputs, means, scales ** -2 - eps


def _edges(steps: int) -> list[slice]:
    """For each step, its edges among all."""
    return [slice(i * (i + 1) // 2, (i + 1) * (i + 2) // 2) for i in range(steps)]


def _by_slot(whole: Tensor) -> list[tuple[Tensor, ...]]:
    """Of (T, slots, ...), for each slot the views of all time steps."""
    return [part.unbind() for part in whole.unbind(1)]


def _views(whole: Tensor, *shape: int) -> list[Tensor]:
    """Of (T, ...), for each time step a view of that shape."""
    return [part.view(shape) for part in whole.unbind()]


class _Supernet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, W_hidden, mask, probabilities, activations, statistics, eps, loan, learning, *Ws):
        T, B, H, steps, E = len(x), *hidden.shape, len(Ws), len(probabilities)
        a = torch.empty_like(x)
        before = loan.empty("before", T + 1, B, H)  # hidden states; before[t + 1] is the output of time step t
        before[0] = hidden
        heard = loan.empty("heard", T, B, H)        # hidden states and, below, states as products hear them: masked
        raw, states, states_heard = (loan.empty(f"states {n}", T, steps + 1, B, H) for n in range(3))
        means, scales = (x.new_empty(T, steps + 1, H) for _ in range(2))  # of `raw`, the states before normalising
        if statistics is not None:
            means[:], scales[:] = statistics[0], (statistics[1] + eps).rsqrt()
        d_products, d_states, terms = None, None, None  # see `Piece.keep`
        if learning:
            d_products, d_states = loan.empty("d_products", T, E, B, 2, H), loan.empty("d_states", T, E, B, H)
            if ctx.needs_input_grad[4]:
                terms = loan.empty("terms", T, E, len(activations), B, H)

        together = max(1, min(steps, PIECE // (B * H)))
        shared = Shared(probabilities, activations, together, B, H)
        by_unit = states.view(T, steps + 1, B * H).transpose(1, 2)
        plan = []  # for each step its pieces, and of all time steps the views of what they read and write
        for i, edges in enumerate(_edges(steps), start=1):
            pieces = []
            for begin in range(0, i, together):
                end = min(begin + together, i)
                part = slice(edges.start + begin, edges.start + end)
                kept = [*d_products[:, part].unbind(3), d_states[:, part]] if learning else []
                kept += [] if terms is None else [terms[:, part].transpose(1, 2)]
                pieces.append((Piece(shared, part, Ws[i - 1]), states[:, begin:end].unbind(),
                               _views(states_heard[:, begin:end], -1, H), list(zip(*(each.unbind() for each in kept)))))
            plan.append((pieces, by_unit[:, :, :i].unbind(), shared.total[edges]))
        slots = list(zip(*map(_by_slot, (raw, states, states_heard, means, scales))))
        sums = [_views(part, -1) for part in raw.unbind(1)]

        def normalise(t: int, i: int) -> None:
            x, y, y_heard, mean, scale = (views[t] for views in slots[i])
            if statistics is None:
                torch.native_batch_norm(x, None, None, None, None, True, 0.0, eps, out=(y, mean, scale))
            else:
                torch.sub(x, mean, out=y).mul_(scale)
            masked(y, mask, y_heard)

        c0, h0 = (part.unbind() for part in a.chunk(2, dim=2))
        share, averaged, outputs = x.new_full((steps,), 1 / steps), by_unit[:, :, 1:].unbind(), _views(before, -1)
        each = zip(x.unbind(), before.unbind(), heard.unbind(), a.unbind())
        for t, (words, state, hears, product) in enumerate(each):
            torch.addmm(words, masked(state, mask, hears), W_hidden, out=product)
            torch.lerp(state, h0[t].tanh_(), c0[t].sigmoid_(), out=slots[0][0][t])
            normalise(t, 0)
            for i, (pieces, sources, total) in enumerate(plan, start=1):
                torch.mv(sources[t], total, out=sums[i][t])
                for piece, source, source_heard, kept in pieces:
                    piece.add(sums[i][t], source[t], source_heard[t])
                    if learning:
                        piece.keep(source[t], *kept[t])
                normalise(t, i)
            torch.mv(averaged[t], share, out=outputs[t + 1])
        ctx.save_for_backward(a, before, heard, raw, states_heard, means, scales, d_products, d_states, terms, W_hidden,
                              *Ws)
        ctx.mask, ctx.batch, ctx.eps, ctx.loan, ctx.used = mask, statistics is None, eps, loan, False
        means, scales, result = means.view(-1, H), scales.view(-1, H), before[1:].clone()
        ctx.mark_non_differentiable(means, scales)
        if not learning:
            loan.give_back()
        return result, means, scales

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs, *_):
        once(ctx)
        a, before, heard, raw, states_heard, means, scales, *kept, W_hidden = ctx.saved_tensors[:11]
        d_products, d_states, terms = kept
        Ws = ctx.saved_tensors[11:]
        mask, needed, (T, B, H), steps = ctx.mask, ctx.needs_input_grad, d_outputs.shape, len(Ws)
        d, d_hidden = raw.new_empty(steps + 1, B, H), torch.zeros_like(before[0])
        d_slots, d_output, d_heard = d.unbind(), torch.empty_like(d_hidden), torch.empty_like(d_hidden)
        d_Ws = [torch.zeros_like(W) if wanted else None for W, wanted in zip(Ws, needed[10:])]
        d_terms = None if terms is None else terms.new_zeros(terms.shape[1:3])
        plan = []  # as in the forward pass
        for i, (edges, W, d_W) in enumerate(zip(_edges(steps), Ws, d_Ws), start=1):
            into_p = None if terms is None else (d_terms[edges].view(-1), _views(terms[:, edges], -1, B * H))
            plan.append((i, d[:i], d_products[:, edges].unbind(), _views(d_products[:, edges], -1, 2 * H),
                         d_states[:, edges].unbind(), W.t().contiguous(), raw.new_empty(i * B, H),
                         None if d_W is None else (d_W, _views(states_heard[:, :i], -1, H)), into_p))
        plan.reverse()
        slots = list(zip(*map(_by_slot, (raw, means, scales))))

        def normalise_backward(t: int, i: int) -> Tensor:
            x, mean, scale = (views[t] for views in slots[i])
            if not ctx.batch:
                return d_slots[i] * scale
            return torch.ops.aten.native_batch_norm_backward(d_slots[i], x, None, None, None, mean, scale, True,
                                                             ctx.eps, [True, False, False])[0]

        halves, stays, to_hidden = a.view(T, B, 2, H), torch.empty_like(heard), W_hidden.t().contiguous()
        slopes(*halves[None].permute(3, 0, 1, 2, 4), before[:-1], [("tanh", slice(None))], stays[None])
        each = zip(d_outputs.unbind(), a.unbind(), halves.unbind(), stays.unbind())
        for t, (d_out, product, half, stay) in reversed(list(enumerate(each))):
            d_slots[0].zero_()
            d[1:] = torch.add(d_out, d_hidden, out=d_output).div_(steps)
            for i, into, d_product, d_flat, d_state, W, through, into_W, into_p in plan:
                d_new = normalise_backward(t, i)
                d_product[t].mul_(d_new[:, None])
                into.addcmul_(d_state[t], d_new)
                add_through(into, torch.mm(d_flat[t], W, out=through).view(i, B, H), mask)
                if into_W is not None:
                    d_W, source = into_W
                    d_W.addmm_(source[t].t(), d_flat[t])
                if into_p is not None:
                    d_p, term = into_p
                    d_p.addmv_(term[t], d_new.view(-1))
            d_new = normalise_backward(t, 0)
            half.mul_(d_new[:, None])
            torch.mul(stay, d_new, out=d_hidden)
            add_through(d_hidden, torch.mm(product, to_hidden, out=d_heard), mask)
        d_W_hidden = heard.view(-1, H).t() @ a.view(-1, 2 * H) if needed[2] else None
        ctx.loan.give_back()
        return a, d_hidden, d_W_hidden, None, d_terms, *[None] * 5, *d_Ws
