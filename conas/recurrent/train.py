"""Train a found recurrent cell from scratch: SGD, then averaged SGD, from the first batch to the best checkpoint."""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

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
from conas.recurrent.model import RecurrentNetwork
from conas.recurrent.options import (
    HINT,
    TRAIN_GROUPS,
    LanguageRunOptions,
    TextOptions,
    TrainDropoutOptions,
    TrainSgdOptions,
    TrainUnitOptions,
    check_units,
)
from conas.recurrent.steps import (
    Reader,
    Schedule,
    TextCourse,
    perplexity,
    validate,
    validation_text,
    weight_optimizer,
    weight_step,
)
from conas.recurrent.text import Text, load_corpus
from conas.runs import checkpoint as checkpoints
from conas.runs.best import best_epoch, mend_best, require_best
from conas.runs.folder import Run, best_checkpoint, folder_name
from conas.runs.options import KeepOptions
from conas.runs.preflight import check_outputs, check_space
from conas.runs.progress import announce, resumed, tell_skipped
from conas.runs.resume import Keeper, seed_generators

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
    """Whether the validation loss has stopped to improve: the last is worse than the best, not counting the `nonmono`
    before it (NT-ASGD, Merity et al., arXiv:1708.02182, algorithm 1). A loss that is not finite is worse than all
    others."""
    *earlier, last = (loss if math.isfinite(loss) else math.inf for loss in losses)
    return len(earlier) > nonmono and last > min(earlier[:-nonmono])


def train(space: Space, module, text: TextOptions, units: TrainUnitOptions, rates: TrainDropoutOptions,
          sgd: TrainSgdOptions, options: LanguageRunOptions, keep: KeepOptions) -> Path:
    """Run or continue one training and return its folder. `module` is the folder's `genotypes.py`."""
    check_units(units)
    folder = space.train_folder(folder_name(options.save))
    check_outputs(folder)
    device = find_device(options.device, keep.deterministic)
    genotype, where = choose_cell(space, named_genotypes(module), units)
    primitives = tuple(getattr(module, "PRIMITIVES", ACTIVATIONS))
    groups = (text, units, rates, sgd, options, keep)
    arguments = {name: value for group in groups for name, value in asdict(group).items()}
    corpus = load_corpus(text.dataset, text.data)
    words, valid = Text(corpus, "train", sgd.batch_size, device), validation_text(corpus, device)
    schedule = Schedule(words, text.bptt, SPREAD, rates, options.seed)

    seed_generators(options.seed)
    network = RecurrentNetwork(len(corpus.words), units.nhid, genotype).to(device)
    optimizer = weight_optimizer(network, sgd.lr, sgd.wdecay)
    about, skip = corpus.about(), keep.on_nan == "skip"
    check_space(folder, network, 1)
    if keep.check_only:
        print(f"{folder}: all checks passed; without --check_only, the training begins")
        return folder
    with Run(folder, arguments) as run, Keeper(run, keep.checkpoint_minutes) as keeper:
        metrics, begun, average = resume(keeper, network, optimizer, about)
        start = len(metrics)
        with network_of(average):
            mend_best(run, metrics, None if begun else checkpoints.describe(
                network, space=space.name, epoch=start - 1, dataset=about, arguments=arguments,
                primitives=primitives))
        if start == sgd.epochs:
            run.log(f"{run.folder}: this training is finished; --save NAME starts another, --extend goes on to more "
                    "--epochs")
            require_best(run, metrics, LOWER)
            return run.folder
        for note in corpus.notes:
            run.log(note)
        run.log(f"{space.name}: the cell of {where}, {units.nhid} units, {count_parameters(network):,} parameters")
        run.log(f"{corpus.name}: {len(corpus.words)} words of vocabulary, {words.columns.numel()} of text; epochs "
                f"{start} to {sgd.epochs - 1} on {device}{resumed(start, begun and begun['course'])}")

        for epoch in range(start, sgd.epochs):
            reader = Reader(words, network, begun and begun["reader"])
            course = TextCourse(f"{space.name} epoch {epoch} of {sgd.epochs}", epoch, schedule, options.report_freq,
                                skip=skip, state=begun and begun["course"])
            begun = None
            network.train()

            def state(epoch=epoch, course=course, reader=reader, average=average) -> dict:
                return checkpoints.describe(network, space=space.name, epoch=epoch, dataset=about, arguments=arguments,
                                            primitives=primitives) | {
                    "optimizer": optimizer.state_dict(), "average": average and average.state(), "metrics": metrics,
                    "course": course.state(), "reader": reader.state()}

            for step in course:
                length = course.lengths[step]
                batch = reader.next(length, schedule.masks("weights", network, epoch, step))
                optimizer.param_groups[0]["lr"] = sgd.lr * length / text.bptt
                course.add(weight_step(network, optimizer, batch, grad_clip=sgd.clip, slowness=sgd.beta,
                                       activity=sgd.alpha, skip=skip), batch)
                if average is not None:
                    average.update()
                if epoch == start and step == 4:
                    announce(run, course.seconds / 5 * course.steps * (sgd.epochs - start), HINT)
                keeper.after_step(state)

            kind = "SGD" if average is None else "ASGD"
            with keeper.calm(state), network_of(average):
                found = validate(network, valid, text.bptt)
            metrics.append({"epoch": epoch, "learning_rate": sgd.lr, "optimizer": kind, "train_loss": course.loss,
                            "valid_loss": found.loss} | course.remarks() | found.remarks()
                           | run.stretches.remarks(epoch))
            run.log(f"epoch {epoch:3d}  {kind:4}  train {course.loss:.4f} perplexity {perplexity(course.loss):.2f}  "
                    f"valid {found.loss:.4f} perplexity {perplexity(found.loss):.2f}{found.remark}  "
                    f"{course.rate:.0f} words/s")
            if best_epoch(metrics) == epoch:
                with network_of(average):
                    best = state()
                    checkpoints.save(run.folder / "checkpoints" / "best.pt",
                                     checkpoints.without_progress(best))
            if average is None and should_average([row["valid_loss"] for row in metrics], sgd.nonmono):
                run.log("the validation text improves no more: from here on the weights are averaged")
                average = Average(network)
            keeper.save(state(average=average) | {"course": None})
            run.write_metrics(metrics)
        tell_skipped(run, metrics)
        best = require_best(run, metrics, LOWER)
        run.log(f"best network: epoch {best['epoch']}, validation perplexity {perplexity(best['valid_loss']):.2f}: "
                f"{best_checkpoint(run.folder)}")
        return run.folder


@contextmanager
def network_of(average: Average | None) -> Iterator[None]:
    """Inside, the network has its mean weights, if there are such."""
    if average is None or not average.steps:
        yield
    else:
        with average.in_place():
            yield


def resume(keeper: Keeper, network: RecurrentNetwork, optimizer: torch.optim.Optimizer, about: dict
           ) -> tuple[list[dict], dict | None, Average | None]:
    """Put the run's last state into network and optimizer.

    Returns what `Keeper.resume` does, and the average of the weights, if it has begun.
    """
    average = None

    def put(state: dict) -> None:
        nonlocal average
        if state["genotype"] != genotypes.to_json(network.genotype()):
            raise InputError(f"{keeper.path}: this run began with another cell than the one it would train now; "
                             "restore that, or give --save another name")
        network.load_state_dict(restore(keeper.path, state).state_dict())
        optimizer.load_state_dict(state["optimizer"])
        average = Average(network, state["average"]) if state["average"] else None

    metrics, unfinished = keeper.resume(about, put)
    return metrics, unfinished, average


def main(folder: Path, module, description: str, argv: list[str] | None = None) -> None:
    """The command `python train.py` of `folder`, whose `genotypes.py` is `module`."""
    distributed.refuse("rnn/train.py")
    train(Space(folder.name, folder), module, *parse(description, TRAIN_GROUPS, argv))
