"""The steps of a language model: its batches and their dropout, the step of its weights and that of its alphas."""
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from conas.darts.architect import Bilevel
from conas.data.splits import generator
from conas.errors import InputError
from conas.recurrent.model import LanguageModel, Masks, RecurrentSupernet, TextBatch
from conas.recurrent.options import DropoutOptions
from conas.recurrent.text import Corpus, Text, random_lengths
from conas.runs.progress import EpochMeter, clip_and_step, snapshot
from conas.runs.scores import Validation, finite_rows

LARGE = 1e15  # sums of products of smaller numbers are within the range of float32


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
        return self.network.loss(batch, w)[0]

    def grad_weights(self, batch: TextBatch, w: Tensor) -> Tensor:
        with without_alphas(self.network):
            return super().grad_weights(batch, w)

    def count(self, batch: TextBatch) -> int:
        """The words of `batch`."""
        return batch.targets.numel()

    def clip(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient, shortened to a 2-norm of at most `grad_clip`, and the factor that does it."""
        k = (self.grad_clip / (gradient.norm() + 1e-6)).clamp(max=1)
        return k * gradient, k


@contextmanager
def without_alphas(network: LanguageModel) -> Iterator[None]:
    """Inside, passes do not prepare for a gradient w.r.t. the alphas, which costs as much as that of the weights."""
    alphas = [p for name, p in network.named_parameters() if name.startswith("alphas_")]
    try:
        for alpha in alphas:
            alpha.requires_grad_(False)
        yield
    finally:
        for alpha in alphas:
            alpha.requires_grad_(True)


def weight_optimizer(network: LanguageModel, lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD without momentum of all weights but the alphas; each is read and written once, in one pass over memory."""
    return torch.optim.SGD(network.packing(), lr=lr, weight_decay=weight_decay, fused=True)


def weight_step(network: LanguageModel, optimizer: torch.optim.SGD, batch: TextBatch, *, grad_clip: float,
                slowness: float, activity: float = 0.0, skip: bool = False) -> Tensor:
    """One SGD step of the weights on the loss with its regularisers (Merity et al., arXiv:1708.02182, section 4.7).

    `slowness` weighs the mean squared change of the outputs from word to word, `activity` the mean square of the
    dropped outputs. Returns the loss without them, on the device. With `skip`, a loss or gradient that is not finite
    leaves weights and running statistics as they were.
    """
    before = snapshot(network) if skip else None
    optimizer.zero_grad(set_to_none=True)
    with without_alphas(network):
        loss, outputs = network.loss(batch)
    total = loss
    if slowness and len(outputs) > 1:
        total = total + slowness * (outputs[1:] - outputs[:-1]).pow(2).mean()
    if activity:
        dropped = outputs if batch.masks.outputs is None else outputs * batch.masks.outputs
        total = total + activity * dropped.pow(2).mean()
    total.backward(inputs=optimizer.param_groups[0]["params"])  # the alphas' gradients are not wanted here
    return clip_and_step(optimizer, loss, grad_clip, before)


@torch.no_grad()
def evaluate(network: LanguageModel, text: Text, bptt: int) -> float:
    """The mean cross-entropy in nats of a text's words after the first of each column, in evaluation mode.

    The hidden state is carried over from piece to piece, so `bptt` changes memory and not the result.
    """
    network.eval()
    hidden, total = network.initial(text.columns.shape[1]), torch.zeros((), dtype=torch.float64)
    for tokens, targets in text.pieces(bptt):
        batch = TextBatch(tokens, targets, hidden)
        total += network.loss(batch)[0].double().cpu() * len(tokens)
        hidden = batch.after
    return total.item() / text.steps


def validate(network: LanguageModel, text: Text, bptt: int) -> Validation:
    """`evaluate`, with the number of words whose prediction is not finite; the loss is NaN if there are any.

    The count takes another pass over the text, which is left out where the loss and all weights are moderate.
    """
    loss = evaluate(network, text, bptt)
    moderate = abs(loss) < LARGE and all(values.abs().amax() < LARGE for values in network.state_dict().values())
    not_finite = 0 if moderate else _count_not_finite(network, text, bptt)
    return Validation(math.nan if not_finite else loss, not_finite, text.steps * text.columns.shape[1])


@torch.no_grad()
def _count_not_finite(network: LanguageModel, text: Text, bptt: int) -> int:
    hidden, count = network.initial(text.columns.shape[1]), 0
    for tokens, targets in text.pieces(bptt):
        batch = TextBatch(tokens, targets, hidden)
        count += int(right_word_log_probabilities(network, batch).isnan().sum())
        hidden = batch.after
    return count


def right_word_log_probabilities(network: LanguageModel, batch: TextBatch) -> Tensor:
    """(T, B): of each target, NaN where the log-probabilities of all words are not finite. Sets `batch.after`."""
    log_probabilities = network.predict(batch)[0].log_softmax(dim=2)
    right = log_probabilities.gather(2, batch.targets[:, :, None])[:, :, 0]
    return right.masked_fill(~finite_rows(log_probabilities), math.nan)


class Reader:
    """Reads a text from top to bottom, again and again, in batches that begin where the one before ended.

    At the top, the hidden state is zero. `state` of an earlier Reader lets this one go on after that one's last batch.
    """

    def __init__(self, text: Text, network: LanguageModel, state: dict | None = None):
        self.text, self.network, self.row, self.last = text, network, 0, None
        if state is not None:
            self.row, hidden = state["row"], state["hidden"].to(text.columns.device)
            self.last = TextBatch(text.columns[:0], text.columns[:0], hidden, after=hidden)

    def next(self, length: int, masks: Masks) -> TextBatch:
        """The next `length` rows, or fewer at the text's end."""
        columns = self.text.columns.shape[1]
        hidden = self.last.after if self.row else self.network.initial(columns)
        tokens, targets = self.text.piece(self.row, length)
        self.row = (self.row + len(tokens)) % self.text.steps
        self.last = TextBatch(tokens, targets, hidden, masks)
        return self.last

    def state(self) -> dict:
        """What a later Reader needs to go on after the last batch, whose passes are done."""
        columns = self.text.columns.shape[1]
        hidden = self.last.after if self.last is not None else self.network.initial(columns)
        return {"row": self.row, "hidden": hidden.cpu()}


class Schedule:
    """The steps of every epoch: how many rows of the text each has, and its dropout; functions of seed and step."""

    def __init__(self, text: Text, bptt: int, spread: float, rates: DropoutOptions, seed: int):
        self.text, self.bptt, self.spread, self.rates, self.seed = text, bptt, spread, rates, seed
        self.device = text.columns.device

    def lengths(self, epoch: int) -> list[int]:
        return random_lengths(self.text.steps, self.bptt, self.spread, generator(self.seed, "lengths", epoch))

    def masks(self, name: str, network: LanguageModel, epoch: int, step: int) -> Masks:
        """Of the batch `name` of a step, one column of masks for each column of the text."""
        seed = generator(self.seed, f"masks of {name}", epoch, step).initial_seed()
        return draw_masks(self.rates, self.text.columns.shape[1], network,
                          torch.Generator(self.device).manual_seed(seed))


class TextMeter(EpochMeter):
    """The steps of one epoch of text: `loss` in nats a word, `rate` in words a second."""

    def __init__(self, title: str, epoch: int, schedule: Schedule, report_freq: int, **settings):
        self.lengths = schedule.lengths(epoch)
        self.steps, self.device = len(self.lengths), schedule.device
        super().__init__(title, epoch, self, report_freq, **settings)

    def add(self, loss: Tensor, batch: TextBatch) -> None:
        super().add(loss, torch.zeros_like(loss), batch.tokens.numel())

    def _sync_metrics(self) -> None:
        loss, _, finite = self._sums.tolist()
        self.loss, self.rate = loss / self.seen, self.seen / self.seconds
        if not math.isfinite(loss):
            first = sum(self.lengths[:int(finite)])
            raise InputError(
                f"the training loss became {loss} in epoch {self.epoch} at batch {int(finite)}, counted from 0, of "
                f"the text's rows from {first}; what was kept before it is intact. --on_nan skip goes on without such "
                "batches; a lower --lr or --clip under another --save name may help")
        self._bar.set_postfix_str(f"perplexity {perplexity(self.loss):.1f}, {self.rate:.0f} words/s")


def validation_text(corpus: Corpus, device: torch.device) -> Text:
    """The validation text in ten columns, as DARTS has it, or in fewer if it is shorter than that."""
    return Text(corpus, "valid", min(10, max(1, len(corpus.ids["valid"]) // 2)), device)


def perplexity(loss: float) -> float:
    """exp of nats a word: NaN for NaN, and infinite rather than an error above the range of a float."""
    return math.inf if loss > 700 else math.exp(loss)
