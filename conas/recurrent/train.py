"""Train a found recurrent cell from scratch: SGD, then averaged SGD, from the first batch to the best checkpoint."""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from conas import distributed
from conas.cli import find_device, parse
from conas.darts import genotype as genotypes
from conas.darts.derived import count_parameters
from conas.darts.space import Space
from conas.errors import InputError
from conas.recurrent.files import choose_cell, named_genotypes, restore
from conas.recurrent.genotype import ACTIVATIONS
from conas.recurrent.model import RecurrentNetwork, TextBatch
from conas.recurrent.options import (
    HINT,
    TRAIN_GROUPS,
    check_units,
)
from conas.recurrent.steps import (
    Reader,
    Schedule,
    TextMeter,
    perplexity,
    validate,
    validation_text,
    weight_optimizer,
    weight_step,
)
from conas.recurrent.text import Text, load_corpus
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.best import best_epoch, repair_best, require_best
from conas.runs.folder import best_checkpoint, folder_name
from conas.runs.loop import Loop
from conas.runs.preflight import check_outputs, check_space
from conas.runs.progress import log_skipped
from conas.runs.resume import seed_generators
from conas.runs.scores import Validation

LOWER = "a lower --lr or --clip under another --save name may help"
SPREAD = 5.0  # words: standard deviation of the pieces' lengths


class Average:
    """The mean of a network's weights over the steps since it began: ASGD (Polyak and Juditsky, 1992)."""

    def __init__(self, network: RecurrentNetwork, state: dict | None = None):
        self.weights = network.packing()
        self.steps = state["steps"] if state else 0
        self.values = [torch.zeros_like(w) for w in self.weights]
        if state:
            torch._foreach_copy_(self.values, state["values"])

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights as they are now."""
        self.steps += 1
        torch._foreach_lerp_(self.values, [w.detach() for w in self.weights], 1 / self.steps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the mean weights."""
        own = [w.detach().clone() for w in self.weights]
        self._put(self.values)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(self.weights, values)

    def state(self) -> dict:
        return {"steps": self.steps, "values": self.values}


def should_average(losses: list[float], nonmono: int) -> bool:
    """Return True if the validation loss has stopped improving: the last is worse than the best, not counting the
    `nonmono` before it (NT-ASGD, Merity et al., arXiv:1708.02182, algorithm 1). A loss that is not finite is worse than
    all others."""
    *earlier, last = (loss if math.isfinite(loss) else math.inf for loss in losses)
    return len(earlier) > nonmono and last > min(earlier[:-nonmono])


class TrainRun(Loop):
    """The training of a recurrent cell in `folder`, by its flags: what its script train.py shows the loop of.

    `module` is the folder's genotypes.py; `argv` are the flags, those of the command line by default. Raises InputError
    for what could not be computed or written.
    """

    kind, unit, shorter = "training", "words", HINT
    network: RecurrentNetwork
    optimizer: torch.optim.SGD

    def __init__(self, folder: Path, module: ModuleType, description: str = "", argv: list[str] | None = None):
        distributed.require_single_process("rnn/train.py")
        text, units, rates, sgd, options, keep = parse(description, TRAIN_GROUPS, argv)
        check_units(units)
        self.space = Space(folder.name, folder)
        run_folder, self.code = self.space.train_folder(folder_name(options.save)), code.digests(folder, "train")
        check_outputs(run_folder)
        self.device = device = find_device(options.device, keep.deterministic)
        genotype, self.where = choose_cell(self.space, named_genotypes(module), units)
        self.primitives = tuple(getattr(module, "PRIMITIVES", ACTIVATIONS))
        super().__init__(self.space.name, run_folder, (text, units, rates, sgd, options, keep), keep)
        self.corpus = corpus = load_corpus(text.dataset, text.data)
        self.text, self.valid = Text(corpus, "train", sgd.batch_size, device), validation_text(corpus, device)
        self.schedule = Schedule(self.text, text.bptt, SPREAD, rates, options.seed)

        seed_generators(options.seed)
        self.network = RecurrentNetwork(len(corpus.words), units.nhid, genotype).to(device)
        self.optimizer = weight_optimizer(self.network, sgd.lr, sgd.wdecay)
        self.average: Average | None = None  # of the weights, once ASGD has begun
        self.dataset_info = corpus.dataset_info()
        check_space(run_folder, self.network, 1)

    # What `iterate` calls.

    def weight_step(self, batch: TextBatch, lr: float) -> Tensor:
        """One step of the weights at the rate `lr`. Returns the loss in nats a word, on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        return weight_step(self.network, self.optimizer, batch, grad_clip=self.flags.clip, slowness=self.flags.beta,
                           activity=self.flags.alpha, skip=self.skip)

    def average_weights(self) -> None:
        """Count the weights as they are now, if they are averaged yet."""
        if self.average is not None:
            self.average.update()

    # What the loop does with it.

    def restore(self, state: dict) -> None:
        path = self.checkpointer.path
        if state["genotype"] != genotypes.to_json(self.network.genotype()):
            raise InputError(f"{path}: this run began with another cell than the one it would train now; restore that, "
                             "or give --save another name")
        self.network.load_state_dict(restore(path, state).state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = Average(self.network, state["average"]) if state["average"] else None

    def state(self) -> dict:
        return super().state() | {"average": self.average and self.average.state(), "reader": self.reader.state()}

    def resume(self) -> None:
        super().resume()
        with network_of(self.average):
            repair_best(self.run, self.metrics, None if self.unfinished else self.checkpoint(len(self.metrics) - 1))

    def finished_before(self) -> None:
        super().finished_before()
        require_best(self.run, self.metrics, LOWER)

    def introduce(self, goes_on: str) -> None:
        for note in self.corpus.notes:
            self.log(note)
        self.log(f"{self.name}: the cell of {self.where}, {self.flags.nhid} units, "
                 f"{count_parameters(self.network):,} parameters")
        self.log(f"{self.corpus.name}: {len(self.corpus.words)} words of vocabulary, {self.text.columns.numel()} of "
                 f"text; epochs {self.start} to {self.flags.epochs - 1} on {self.device}{goes_on}")

    def new_epoch(self, epoch: int, state: dict | None) -> TextMeter:
        self.reader = Reader(self.text, self.network, state and state["reader"])
        return TextMeter(f"{self.name} epoch {epoch} of {self.flags.epochs}", epoch, self.schedule,
                          self.flags.report_freq, skip=self.skip, state=state and state["course"])

    def inputs(self, step: int) -> tuple[TextBatch, float]:
        length = self.meter.lengths[step]
        batch = self.reader.next(length, self.schedule.masks("weights", self.network, self.meter.epoch, step))
        return batch, self.flags.lr * length / self.flags.bptt

    def count(self, result: Tensor, inputs: tuple) -> None:
        self.meter.add(result, inputs[0])

    def validate(self) -> Validation:
        with network_of(self.average):
            return validate(self.network, self.valid, self.flags.bptt)

    def figures(self, found: Validation) -> tuple[dict, str]:
        kind, loss = "SGD" if self.average is None else "ASGD", self.meter.loss
        return ({"learning_rate": self.flags.lr, "optimizer": kind, "train_loss": loss, "valid_loss": found.loss},
                f"{kind:4}  train {loss:.4f} perplexity {perplexity(loss):.2f}  "
                f"valid {found.loss:.4f} perplexity {perplexity(found.loss):.2f}")

    def write_epoch(self) -> None:
        epoch = self.meter.epoch
        if best_epoch(self.metrics) == epoch:
            with network_of(self.average):
                checkpoints.save(self.folder / "checkpoints" / "best.pt", self.checkpoint(epoch))
        losses = [row["valid_loss"] for row in self.metrics]
        if self.average is None and should_average(losses, self.flags.nonmono):
            self.log("the validation text improves no more: from here on the weights are averaged")
            self.average = Average(self.network)
        self.checkpointer.save(self.state() | {"course": None})
        self.run.write_metrics(self.metrics)

    def finish(self) -> None:
        log_skipped(self.run, self.metrics)
        best = require_best(self.run, self.metrics, LOWER)
        self.log(f"best network: epoch {best['epoch']}, validation perplexity {perplexity(best['valid_loss']):.2f}: "
                 f"{best_checkpoint(self.folder)}")


@contextmanager
def network_of(average: Average | None) -> Iterator[None]:
    """Inside, the network has its mean weights, if there are such."""
    if average is None or not average.steps:
        yield
    else:
        with average.in_place():
            yield


def main(folder: Path, module: ModuleType, description: str, argv: list[str] | None = None) -> None:
    """The command `python train.py` of `folder`, for scripts that do not show the loop."""
    with TrainRun(folder, module, description, argv) as run:

        def iterate(batch: TextBatch, lr: float) -> Tensor:
            loss = run.weight_step(batch, lr)
            run.average_weights()
            return loss

        for epoch in run.epochs():
            for batch, lr in run.steps(epoch):
                run.do(iterate, batch, lr)
            run.end_epoch()
