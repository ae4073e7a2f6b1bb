"""A found recurrent cell over a whole sequence of words, forward and backward, as one autograd function.

Autograd through a loop over time steps records some hundred small operations a step and adds a gradient to every weight
matrix at every step. Here

* one product serves all steps of a cell that follow the same state, and the input words' part of state 0 is computed
  for all time steps before the loop (by the caller);
* only what the backward pass cannot do without is kept, and it is overwritten in place by its own gradient;
* the gradient of a matrix is one product over all time steps, after the loop.

`conas.mixed_sequence` does the same for the supernet.

Shapes: T time steps, B sequences, H units. Gate and activation lie side by side in 2H columns, as in the published
weights. A dropout mask (B, H) is None where nothing is dropped. First derivatives only, once for each forward pass.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

from conas.recurrent_genotype import Genotype

SLOPES = {  # derivative of an activation, from its output
    "tanh": lambda f: 1 - f * f,
    "relu": lambda f: (f > 0).to(f.dtype),
    "sigmoid": lambda f: f - f * f,
}


IN_PLACE = {"tanh": Tensor.tanh_, "relu": Tensor.relu_, "sigmoid": Tensor.sigmoid_, "identity": lambda x: x}


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


def masked(x: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    return out.copy_(x) if mask is None else torch.mul(x, mask, out=out)


def gate(a: Tensor, state: Tensor) -> Tensor:
    """state + c (h - state), from (B, 2H) before sigmoid and tanh; `a` then holds c and h."""
    c, h = a.chunk(2, dim=-1)
    return torch.lerp(state, h.tanh_(), c.sigmoid_())


def once(ctx) -> None:
    if ctx.used:
        raise RuntimeError("the backward pass of a recurrent sequence overwrites what it needs: it can be run once")
    ctx.used = True


def add_through(total: Tensor, d: Tensor, mask: Tensor | None) -> None:
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
        heard = x.new_empty(1 + len(plan.groups), T, B, H)  # masked: hidden state, then groups' sources
        states = x.new_empty(T, B, 1 + len(plan.steps), H)
        gates = [x.new_empty(T, B, b - i, 2, H) for _, i, b in plan.groups]
        whole = plan.outputs == list(range(plan.outputs[0], plan.outputs[-1] + 1))
        for t, state in enumerate(states.unbind(0)):
            torch.addmm(x[t], masked(before[t], mask, heard[0, t]), W_hidden, out=a[t])
            state[:, 0] = gate(a[t], before[t])
            for n, ((source, i, b), W) in enumerate(zip(plan.groups, weights)):
                product, from_state = gates[n][t], state[:, source]
                torch.mm(masked(from_state, mask, heard[1 + n, t]), W, out=product.view(B, -1))
                c, f = product.unbind(2)
                c.sigmoid_()
                for step, name in enumerate(plan.activations[i:b]):
                    IN_PLACE[name](f[:, step])
                torch.lerp(from_state[:, None], f, c, out=state[:, 1 + i:1 + b])
            chosen = state[:, plan.outputs[0]:plan.outputs[-1] + 1] if whole else state[:, plan.outputs]
            torch.mean(chosen, dim=1, out=before[t + 1])
        ctx.save_for_backward(a, before, heard, states, *gates, W_hidden, *weights)
        ctx.mask, ctx.plan, ctx.used = mask, plan, False
        return before[1:].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs):
        once(ctx)
        mask, plan, n = ctx.mask, ctx.plan, len(ctx.plan.groups)
        a, before, heard, states = ctx.saved_tensors[:4]
        gates, W_hidden, weights = ctx.saved_tensors[4:4 + n], ctx.saved_tensors[4 + n], ctx.saved_tensors[5 + n:]
        T, B, H = d_outputs.shape
        kept_hidden = _slopes(a.view(T, B, 1, 2, H), before[:-1], ["tanh"])[:, :, 0]
        kept = [_slopes(product, states[:, :, source], plan.activations[i:b])
                for (source, i, b), product in zip(plan.groups, gates)]
        backwards = list(zip(plan.groups, gates, kept, [W.t() for W in weights]))[::-1]
        d = states.new_empty(states.shape[1:])
        share = d.new_zeros(d.shape[1], 1)  # of the output's gradient, by slot
        share[plan.outputs] = 1 / len(plan.outputs)
        d_hidden = torch.zeros_like(before[0])
        for t in reversed(range(T)):
            torch.mul((d_outputs[t] + d_hidden)[:, None], share, out=d)
            for (source, i, b), product, stays, W in backwards:
                into, d_targets, d_product = d[:, source], d[:, 1 + i:1 + b], product[t]
                d_product *= d_targets[:, :, None]
                if b - i == 1:
                    into.addcmul_(stays[t, :, 0], d_targets[:, 0])
                else:
                    into += (stays[t] * d_targets).sum(dim=1)
                add_through(into, d_product.view(B, -1) @ W, mask)
            d_state = d[:, 0]
            a[t].view(B, 2, H).mul_(d_state[:, None])
            d_hidden = kept_hidden[t] * d_state
            add_through(d_hidden, a[t] @ W_hidden.t(), mask)

        def gradient(part: int, values: Tensor) -> Tensor:
            return heard[part].view(T * B, H).t() @ values.view(T * B, -1)

        needed = ctx.needs_input_grad
        return (a, d_hidden, gradient(0, a) if needed[2] else None, None, None,
                *(gradient(1 + n, product) if needed[5 + n] else None for n, product in enumerate(gates)))


def _slopes(gates: Tensor, source: Tensor, activations: Sequence[str]) -> Tensor:
    """For all time steps at once, what the gradient of the new states is multiplied by.

    `gates` (T, B, n, 2, H) hold c and f of n steps that follow `source` (T, B, H). Afterwards they hold the derivatives
    of the new states by what c and f were made of; returned is the one by `source` (T, B, n, H) but for that, 1 - c.
    """
    c, f = gates.unbind(3)
    stays = 1 - c
    d_gate = (f - source[:, :, None]).mul_(c).mul_(stays)
    for step, name in enumerate(activations):
        if name == "identity":
            f[:, :, step] = c[:, :, step]
        else:
            torch.mul(SLOPES[name](f[:, :, step]), c[:, :, step], out=f[:, :, step])
    c.copy_(d_gate)
    return stays
