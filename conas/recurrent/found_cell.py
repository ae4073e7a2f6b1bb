"""A found recurrent cell over a whole sequence of words, forward and backward, as one autograd function.

Autograd through a loop over time steps records some hundred small operations a step and adds a gradient to every weight
matrix at every step. Here

* one product serves all steps of a cell that follow the same state, and the input words' part of state 0 is computed
  for all time steps before the loop (by the caller);
* only what the backward pass cannot do without is kept, and it is overwritten in place by its own gradient;
* the gradient of a matrix is one product over all time steps, after the loop;
* the views of the kept tensors that a time step works on are made for all time steps at once, before the loop: made one
  by one in Python, they would take as long as the arithmetic of a small cell.

`conas.recurrent.supernet_cell` does the same for the supernet.

Shapes: T time steps, B sequences, H units. Gate and activation lie side by side in 2H columns, as in the published
weights. A dropout mask (B, H) is None where nothing is dropped. First derivatives only, once for each forward pass.
"""
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from conas.recurrent.genotype import Genotype
from conas.recurrent.workspace import Workspace

CACHED = 2 ** 18  # numbers of one kind that a cache holds along with some others of its size

IN_PLACE = {"tanh": Tensor.tanh_, "relu": Tensor.relu_, "sigmoid": Tensor.sigmoid_, "identity": lambda f: f}

SLOPES = {  # f = c f', the derivative f' of an activation from its output f, in place
    "tanh": lambda f, c: torch.addcmul(c, c, f.square_(), value=-1, out=f),
    "relu": lambda f, c: f.sign_().mul_(c),
    "sigmoid": lambda f, c: torch.addcmul(f, f, f, value=-1, out=f).mul_(c),
    "identity": lambda f, c: f.copy_(c),
}


class Plan:
    """In which order a cell's states are computed: steps that follow the same state are neighbours.

    `steps` are the genotype's steps in that order; slot 0 is state 0, and slot r + 1 holds what `steps[r]` makes.
    `groups` are (slot of the source, first step, last step + 1), in a group equal activations are neighbours;
    `outputs` are the slots that the output averages.
    """

    def __init__(self, genotype: Genotype):
        slots, self.steps, self.groups = [0], [], []
        for slot, state in enumerate(slots):  # grows while it is walked through
            followers = [i for i, (_, source) in enumerate(genotype.recurrent) if source == state]
            followers.sort(key=lambda i: genotype.recurrent[i][0])
            if followers:
                self.groups.append((slot, len(self.steps), len(self.steps) + len(followers)))
            self.steps += followers
            slots += [i + 1 for i in followers]
        self.activations = [genotype.recurrent[i][0] for i in self.steps]
        self.outputs = [slots.index(state) for state in genotype.concat]

    def runs(self, first: int, last: int) -> list[tuple[str, slice]]:
        """The steps from `first` to `last` by activation: its name, and where its steps are, counted from `first`."""
        found = groupby(range(first, last), key=lambda r: self.activations[r])
        return [(name, slice((rows := list(run))[0] - first, rows[-1] + 1 - first)) for name, run in found]

    def share(self, like: Tensor) -> Tensor:
        """By slot, its part of the output."""
        share = like.new_zeros(len(self.steps) + 1)
        share[self.outputs] = 1 / len(self.outputs)
        return share


def run_cell(x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None, plan: Plan,
             workspace: Workspace) -> Tensor:
    """Outputs (T, B, H) of a found cell; x (T, B, 2H) is what the words add to state 0, `hidden` (B, H) goes before."""
    return _Cell.apply(x, hidden, W_hidden, mask, plan, workspace.loan(x), torch.is_grad_enabled(), *Ws)


def masked(x: Tensor, mask: Tensor | None, out: Tensor) -> Tensor:
    return out.copy_(x) if mask is None else torch.mul(x, mask, out=out)


def add_through(total: Tensor, d: Tensor, mask: Tensor | None) -> None:
    """total += d, through the mask."""
    if mask is None:
        total.add_(d)
    else:
        total.addcmul_(d, mask)


def once(ctx) -> None:
    if ctx.used:
        raise RuntimeError("the backward pass of a recurrent sequence overwrites what it needs: it can be run once")
    ctx.used = True


def slopes(c: Tensor, f: Tensor, source: Tensor, runs: Sequence[tuple[str, slice]], stays: Tensor) -> None:
    """What the gradient of new states s + c (f - s) is multiplied by, from c, f (n, ..., B, H) and s = `source`.

    Afterwards c and f hold the derivatives by what sigmoid and activation were applied to, `stays` that by s but for
    the part through these two, 1 - c.
    """
    torch.sub(1, c, out=stays)
    d_gate = torch.sub(f, source).mul_(stays)
    for name, rows in runs:
        SLOPES[name](f[rows], c[rows])
    c.mul_(d_gate)


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, W_hidden, mask, plan, loan, learning, *Ws):
        T, B, H = len(x), *hidden.shape
        a = torch.empty_like(x)
        before = loan.empty("before", T + 1, B, H)  # hidden states; before[t + 1] is the output of time step t
        before[0] = hidden
        heard = loan.empty("heard", 1 + len(plan.groups), T, B, H)  # masked: hidden state, then groups' sources
        states = loan.empty("states", T, 1 + len(plan.steps), B, H)
        gates = [loan.empty(f"gates {first}", T, B, last - first, 2, H) for _, first, last in plan.groups]
        weights = [torch.cat([Ws[i] for i in plan.steps[first:last]], dim=1) for _, first, last in plan.groups]

        groups = []  # for each group its matrix, and of all time steps the views of what it reads and writes
        for (source, first, last), gate, W, hears in zip(plan.groups, gates, weights, heard[1:]):
            c, f = gate.permute(3, 0, 2, 1, 4)
            activations = [(IN_PLACE[name], f[:, rows].unbind()) for name, rows in plan.runs(first, last)]
            groups.append((W, states[:, source].unbind(), hears.unbind(), gate.view(T, B, -1).unbind(), c.unbind(),
                           f.unbind(), activations, states[:, first + 1:last + 1].unbind()))
        c0, h0 = (part.unbind() for part in a.chunk(2, dim=2))
        averaged, share = states.view(T, -1, B * H).transpose(1, 2).unbind(), plan.share(x)
        first_state, flat = states[:, 0].unbind(), before.view(T + 1, -1).unbind()
        each = zip(x.unbind(), before.unbind(), heard[0].unbind(), a.unbind())
        for t, (words, state, hears, product) in enumerate(each):
            torch.addmm(words, masked(state, mask, hears), W_hidden, out=product)
            torch.lerp(state, h0[t].tanh_(), c0[t].sigmoid_(), out=first_state[t])
            for W, source, hears, product, c, f, activations, target in groups:
                torch.mm(masked(source[t], mask, hears[t]), W, out=product[t])
                c[t].sigmoid_()
                for activation, rows in activations:
                    activation(rows[t])
                torch.lerp(source[t], f[t], c[t], out=target[t])
            torch.mv(averaged[t], share, out=flat[t + 1])
        ctx.save_for_backward(a, before, heard, states, *gates, W_hidden, *weights)
        ctx.mask, ctx.plan, ctx.loan, ctx.used = mask, plan, loan, False
        outputs = before[1:].clone()
        if not learning:
            loan.give_back()
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_outputs):
        once(ctx)
        mask, plan, n = ctx.mask, ctx.plan, len(ctx.plan.groups)
        a, before, heard, states = ctx.saved_tensors[:4]
        gates, W_hidden, weights = ctx.saved_tensors[4:4 + n], ctx.saved_tensors[4 + n], ctx.saved_tensors[5 + n:]
        T, B, H = d_outputs.shape
        slots = states.shape[1]
        share = plan.share(states)[:, None, None]
        d, d_hidden, d_output = states.new_empty(slots, B, H), torch.zeros_like(before[0]), torch.empty_like(before[0])
        d_slots, d_heard = d.unbind(), torch.empty_like(before[0])
        d_state = d_slots[0]
        back, to_hidden = [W.t().contiguous() for W in weights], W_hidden.t().contiguous()

        span = max(1, CACHED // (slots * B * H))  # time steps whose slopes are made at once
        stays = states.new_empty(slots, min(span, T), B, H)  # by slot of the new state; the first is the hidden state's
        for end in range(T, 0, -span):
            part = slice(max(0, end - span), end)
            kept, products = stays[:, :end - part.start], a[part]
            halves = products.view(-1, B, 2, H)
            slopes(*halves[:, None].permute(3, 1, 0, 2, 4), before[part], [("tanh", slice(None))], kept[:1])
            groups = []  # as in the forward pass
            for (source, first, last), gate, W in zip(plan.groups, gates, back):
                gate, targets = gate[part], slice(first + 1, last + 1)
                slopes(*gate.permute(3, 2, 0, 1, 4), states[part, source], plan.runs(first, last), kept[targets])
                through = [(d_new, stay.unbind()) for d_new, stay in zip(d_slots[targets], kept[targets])]
                groups.append((W, d_slots[source], d[targets], through, gate.permute(0, 3, 2, 1, 4).unbind(),
                               gate.view(len(gate), B, -1).unbind()))
            groups.reverse()
            each = zip(d_outputs[part].unbind(), products.unbind(), halves.unbind(), kept[0].unbind())
            for t, (d_out, product, half, stay) in reversed(list(enumerate(each))):
                torch.mul(torch.add(d_out, d_hidden, out=d_output), share, out=d)
                for W, d_source, d_targets, through, values, values_flat in groups:
                    values[t].mul_(d_targets)
                    for d_new, stays_of in through:
                        d_source.addcmul_(stays_of[t], d_new)
                    add_through(d_source, torch.mm(values_flat[t], W, out=d_heard), mask)
                half.mul_(d_state[:, None])
                torch.mul(stay, d_state, out=d_hidden)
                add_through(d_hidden, torch.mm(product, to_hidden, out=d_heard), mask)

        def gradient(part: int, values: Tensor) -> Tensor:
            return heard[part].view(T * B, H).t() @ values.reshape(T * B, -1)

        needed, d_Ws = ctx.needs_input_grad, [None] * len(plan.steps)
        for part, ((_, first, last), gate) in enumerate(zip(plan.groups, gates), start=1):
            for step, values in zip(plan.steps[first:last], gate.unbind(2)):
                d_Ws[step] = gradient(part, values) if needed[7 + step] else None
        d_W_hidden = gradient(0, a) if needed[2] else None
        ctx.loan.give_back()
        return a, d_hidden, d_W_hidden, None, None, None, None, *d_Ws
