"""Language models of one recurrent cell: a found cell, or the supernet of a search (arXiv:1806.09055, section 3.1.2).

Words are embedded, run through the cell, and predicted by a decoder that shares the embedding's matrix. `state_dict()`
names and shapes are those of the published code: encoder.weight, rnns.0._W0, rnns.0._Ws.0 ..., rnns.0.bn.running_*
(supernet only), decoder.weight (the same tensor as encoder.weight), decoder.bias.

Dropout is not part of a network: a batch brings its masks, drawn once for a whole sequence (Gal and Ghahramani,
arXiv:1512.05287), so that every pass of a search step over that batch sees the same function.

Shapes: T time steps, B sequences, H units (embedding and hidden alike), V words.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from conas.darts.batchnorm import Statistics
from conas.recurrent.found_cell import Plan, run_cell
from conas.recurrent.genotype import EDGES, STEPS, Genotype, check, derive
from conas.recurrent.loss import decoded_loss
from conas.recurrent.supernet_cell import run_supernet
from conas.recurrent.workspace import Workspace

INIT_RANGE = 0.04


class Masks(NamedTuple):
    """Dropout of one sequence: factors, 0 or 1 / (1 - p), the same at all time steps; None drops nothing."""

    words: Tensor | None = None    # (V, 1): whole words of the embedding
    inputs: Tensor | None = None   # (B, H): what the cell reads of a word
    hidden: Tensor | None = None   # (B, H): what a step reads of a state
    outputs: Tensor | None = None  # (B, H): what the decoder reads


NOTHING_DROPPED = Masks()


@dataclass
class TextBatch:
    """B pieces of text of T words, and the state of the network at their beginning."""

    tokens: Tensor         # (T, B) int64
    targets: Tensor        # (T, B) int64: the next word of each
    hidden: Tensor         # (B, H), without gradient
    masks: Masks = NOTHING_DROPPED
    after: Tensor | None = None  # (B, H), without gradient: the state that the last pass over this batch ended in


class RecurrentCell(nn.Module):
    """The weights of a cell, under their published names."""

    def __init__(self, units: int, steps: int, normalised: bool):
        super().__init__()

        def matrix(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, 2 * units).uniform_(-INIT_RANGE, INIT_RANGE))

        self._W0 = matrix(2 * units)  # rows of the word, then rows of the hidden state
        self._Ws = nn.ParameterList(matrix(units) for _ in range(steps))
        if normalised:
            self.bn = nn.BatchNorm1d(units, affine=False)


class LanguageModel(nn.Module):
    """What found cells and the supernet share. A subclass says how its cell runs over a sequence, in `run`."""

    def __init__(self, words: int, units: int, cell: RecurrentCell):
        super().__init__()
        self.arguments = {"words": words, "units": units}
        self.encoder = nn.Embedding(words, units)
        self.rnns = nn.ModuleList([cell])
        self.decoder = nn.Linear(units, words)
        self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -INIT_RANGE, INIT_RANGE)
        nn.init.zeros_(self.decoder.bias)
        self._workspace = Workspace()

    def run(self, x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Outputs (T, B, H), from what the words add to state 0: x (T, B, 2H)."""
        raise NotImplementedError

    def initial(self, size: int) -> Tensor:
        """The hidden state (size, H) before the first word."""
        return self.decoder.bias.new_zeros(size, self.arguments["units"])

    def weights(self) -> dict[str, nn.Parameter]:
        """All parameters but the alphas, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith("alphas_")}

    def packing(self) -> list[nn.Parameter]:
        """The weights in the order of the flat vector that `loss` takes."""
        return list(self.weights().values())

    def loss(self, batch: TextBatch, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy of a batch's targets in nats, and the cell's outputs (T, B, H). Sets `batch.after`.

        With `w`, a flat vector in the order of `packing`, its values are in place of the network's own weights.
        """
        weights = self.weights()
        if w is not None:
            parts = w.split([p.numel() for p in weights.values()])
            weights = {name: part.view_as(p) for part, (name, p) in zip(parts, weights.items())}
        dropped, outputs = self._outputs(batch, weights)
        return decoded_loss(dropped, weights["encoder.weight"], weights["decoder.bias"], batch.targets), outputs

    def predict(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Logits (T, B, V) of the next words, and the cell's outputs (T, B, H). Sets `batch.after`."""
        weights = self.weights()
        dropped, outputs = self._outputs(batch, weights)
        return linear(dropped, weights["encoder.weight"], weights["decoder.bias"]), outputs

    def forward(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (T, B, V) of the next words, and the hidden state (B, H) after them; nothing is dropped."""
        logits, outputs = self.predict(TextBatch(tokens, tokens, hidden))
        return logits.log_softmax(dim=2), outputs[-1]

    def _outputs(self, batch: TextBatch, weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The cell's outputs, as the decoder reads them and as they are."""
        words, W0 = weights["encoder.weight"], weights["rnns.0._W0"]
        Ws = [weights[f"rnns.0._Ws.{i}"] for i in range(len(self.rnns[0]._Ws))]
        masks, units = batch.masks, words.shape[1]
        x = embedding(batch.tokens, words)
        if masks.words is not None:
            x = x * embedding(batch.tokens, masks.words)
        if masks.inputs is not None:
            x = x * masks.inputs
        outputs = self.run(x @ W0[:units], batch.hidden, W0[units:], Ws, masks.hidden)
        batch.after = outputs[-1].detach()
        return outputs if masks.outputs is None else outputs * masks.outputs, outputs


class RecurrentNetwork(LanguageModel):
    """The language model of a found cell. Raises InputError for a genotype that is none."""

    kind = "recurrent"

    def __init__(self, words: int, units: int, genotype: Genotype):
        check(genotype, "genotype")
        super().__init__(words, units, RecurrentCell(units, len(genotype.recurrent), normalised=False))
        self._genotype, self._plan = genotype, Plan(genotype)

    def run(self, x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        return run_cell(x, hidden, W_hidden, Ws, mask, self._plan, self._workspace)

    def genotype(self) -> Genotype:
        return self._genotype


class RecurrentSupernet(LanguageModel):
    """The search network: every step mixes all activations on the edges from all earlier states, and every state is
    normalised by one BatchNorm without weights.

    A folder's Network is a subclass that sets `primitives`. `alphas_recurrent` is (EDGES, len(primitives)), a Parameter
    and part of the `state_dict`, as in `conas.darts.supernet`; `none` takes its share of the softmax and adds nothing.
    """

    primitives: Sequence[str] = ()

    def __init__(self, words: int, units: int):
        super().__init__(words, units, RecurrentCell(units, STEPS, normalised=True))
        self.alphas_recurrent = nn.Parameter(1e-3 * torch.randn(EDGES, len(self.primitives)))
        self.statistics = Statistics()  # see `conas.darts.passes.frozen_statistics`
        self._active = sorted((k for k, name in enumerate(self.primitives) if name not in ("none", "identity")),
                              key=lambda k: self.primitives[k] != "relu")  # as `run_supernet` needs them

    def run(self, x: Tensor, hidden: Tensor, W_hidden: Tensor, Ws: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        bn = self.rnns[0].bn
        softmax = self.alphas_recurrent.softmax(dim=1)
        identity = [softmax[:, k] for k, name in enumerate(self.primitives) if name == "identity"]
        first = sum(identity, torch.zeros_like(softmax[:, 0]))
        probabilities = torch.cat([first[:, None], softmax[:, self._active]], dim=1)
        statistics = None if self.training else (bn.running_mean, bn.running_var)
        activations = ["identity", *(self.primitives[k] for k in self._active)]
        outputs, means, variances = run_supernet(x, hidden, W_hidden, Ws, mask, probabilities, activations, statistics,
                                                 bn.eps, self._workspace)
        if self.training and not self.statistics.frozen:
            self._follow(means, variances * (len(hidden) / (len(hidden) - 1)))
        return outputs

    @torch.no_grad()
    def _follow(self, means: Tensor, variances: Tensor) -> None:
        """Let the running statistics follow those of a pass, in their order, as BatchNorm does call by call."""
        bn, calls = self.rnns[0].bn, len(means)
        fade = (1 - bn.momentum) ** torch.arange(calls - 1, -1, -1, dtype=means.dtype, device=means.device)
        for running, seen in (bn.running_mean, means), (bn.running_var, variances):
            running.mul_((1 - bn.momentum) ** calls).add_(bn.momentum * (fade @ seen))
        bn.num_batches_tracked += calls

    def alphas(self) -> dict[str, nn.Parameter]:
        """The architecture parameters by name."""
        return {"alphas_recurrent": self.alphas_recurrent}

    def genotype(self) -> Genotype:
        """The discrete cell that the alphas stand for now."""
        return derive(self.alphas_recurrent, self.primitives)
