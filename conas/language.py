"""One step of a language model: its loss, its dropout, the step of its weights and that of its alphas."""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from conas.architect import Bilevel
from conas.cli import option
from conas.recurrent import LanguageModel, Masks, RecurrentSupernet, TextBatch
from conas.text import Text


@dataclass
class DropoutOptions:
    """dropout: probabilities, with one mask for all time steps of a sequence"""

    dropout: float = option(0.75, "of the cell's output", low=0.0, high=0.99)
    dropouth: float = option(0.25, "of the states inside the cell", low=0.0, high=0.99)
    dropoutx: float = option(0.75, "of the words' vectors in the cell", low=0.0, high=0.99)
    dropouti: float = option(0.2, "of the words' vectors before the cell", low=0.0, high=0.99)
    dropoute: float = option(0.0, "of whole words in the embedding", low=0.0, high=0.99)


def draw_masks(rates: DropoutOptions, sequences: int, network: LanguageModel, generator: torch.Generator) -> Masks:
    """Masks for one batch, in the network's precision, on the generator's device."""
    words, units = network.arguments["words"], network.arguments["units"]

    def mask(shape: tuple[int, int], p: float) -> Tensor | None:
        if p == 0:
            return None
        kept = torch.empty(shape, device=generator.device, dtype=network.decoder.bias.dtype)
        return kept.bernoulli_(1 - p, generator=generator).div_(1 - p)

    size = sequences, units
    inputs = [m for m in (mask(size, rates.dropouti), mask(size, rates.dropoutx)) if m is not None]
    return Masks(words=mask((words, 1), rates.dropoute), inputs=math.prod(inputs) if inputs else None,
                 hidden=mask(size, rates.dropouth), outputs=mask(size, rates.dropout))


class LanguageBilevel(Bilevel):
    """The terms of the bilevel gradient for text. A batch's masks stay the same in all passes over it."""

    betas = (0.9, 0.999)
    network: RecurrentSupernet

    def __init__(self, network: RecurrentSupernet, optimizer: torch.optim.SGD, *, arch_learning_rate: float = 3e-3,
                 arch_weight_decay: float = 1e-3, unrolled: bool = True, grad_clip: float = 0.25):
        super().__init__(network, optimizer, arch_learning_rate=arch_learning_rate,
                         arch_weight_decay=arch_weight_decay, unrolled=unrolled)
        self.grad_clip = grad_clip
        self.moving = torch.cat([torch.full_like(p, p is not network.encoder.weight).detach().flatten()
                                 for p in network.packing()])

    def loss(self, batch: TextBatch, w: Tensor) -> Tensor:
        """L(w, a) on `batch`: nats a word, without the regularisers of the weights' own step."""
        return text_loss(self.network.with_weights(batch, w)[0], batch)

    def clip(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, shortened to a 2-norm of at most `grad_clip`, and the factor that does it."""
        k = (self.grad_clip / (gradient.norm() + 1e-6)).clamp(max=1)
        return k * gradient, k


def text_loss(logits: Tensor, batch: TextBatch) -> Tensor:
    """The mean cross-entropy of the next words, in nats."""
    return cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def weight_step(network: LanguageModel, optimizer: torch.optim.SGD, batch: TextBatch, *, grad_clip: float,
                slowness: float, activity: float = 0.0) -> Tensor:
    """One SGD step of the weights on the loss with its regularisers (Merity et al., arXiv:1708.02182, section 4.7).

    `slowness` weighs the mean squared change of the outputs from word to word, `activity` the mean square of the
    dropped outputs. Returns the loss without them, on the device.
    """
    optimizer.zero_grad(set_to_none=True)
    logits, outputs = network.predict(batch)
    loss = total = text_loss(logits, batch)
    if slowness and len(outputs) > 1:
        total = total + slowness * (outputs[1:] - outputs[:-1]).pow(2).mean()
    if activity:
        dropped = outputs if batch.masks.outputs is None else outputs * batch.masks.outputs
        total = total + activity * dropped.pow(2).mean()
    weights = optimizer.param_groups[0]["params"]
    total.backward(inputs=weights)  # the alphas' gradients are not wanted here
    nn.utils.clip_grad_norm_(weights, grad_clip)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(network: LanguageModel, text: Text, bptt: int) -> float:
    """The mean cross-entropy in nats of a text's words after the first of each column, in evaluation mode.

    The hidden state is carried over from piece to piece, so `bptt` changes memory and not the result.
    """
    network.eval()
    hidden, total = network.initial(text.columns.shape[1]), torch.zeros((), dtype=torch.float64)
    for tokens, targets in text.pieces(bptt):
        batch = TextBatch(tokens, targets, hidden)
        logits, _ = network.predict(batch)
        total += text_loss(logits, batch).double().cpu() * len(tokens)
        hidden = batch.after
    return total.item() / text.steps
