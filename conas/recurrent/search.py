"""Search a recurrent cell: DARTS' alternation of alpha steps and weight steps over a text, to the last checkpoint."""
from pathlib import Path

import torch
from torch import Tensor

from conas import distributed
from conas.cli import find_device, parse
from conas.darts.space import Space
from conas.draw.cell import check_pictures
from conas.recurrent.draw import draw_recurrent
from conas.recurrent.files import restore
from conas.recurrent.model import RecurrentSupernet, TextBatch
from conas.recurrent.options import (
    HINT,
    SEARCH_GROUPS,
    check_units,
)
from conas.recurrent.steps import (
    LanguageBilevel,
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
from conas.runs import code
from conas.runs.folder import folder_name
from conas.runs.loop import Loop, Skipped
from conas.runs.preflight import check_outputs, check_space
from conas.runs.progress import log_not_finite, log_skipped
from conas.runs.resume import seed_generators, write_epoch
from conas.runs.scores import Validation


class SearchRun(Loop):
    """The search of a recurrent cell in `folder`, by its flags: what its script train_search.py shows the loop of.

    `network` is the supernet, `architect` the update of its alphas; `argv` are the flags, those of the command line by
    default. Raises InputError for what could not be computed or written.
    """

    unit, shorter = "words", HINT
    network: RecurrentSupernet
    optimizer: torch.optim.SGD

    def __init__(self, folder: Path, network: type[RecurrentSupernet], architect: type[LanguageBilevel],
                 description: str = "", argv: list[str] | None = None):
        distributed.require_single_process("rnn/train_search.py")
        text, units, rates, sgd, alphas, options, keep = parse(description, SEARCH_GROUPS, argv)
        check_units(units)
        self.space = Space(folder.name, folder, network)
        run_folder, self.code = self.space.search_folder(folder_name(options.save)), code.digests(folder, "search")
        check_outputs(run_folder)
        check_pictures()
        self.device = device = find_device(options.device, keep.deterministic)
        super().__init__(self.space.name, run_folder, (text, units, rates, sgd, alphas, options, keep), keep)
        self.corpus = corpus = load_corpus(text.dataset, text.data)
        self.texts = {name: Text(corpus, split, sgd.batch_size, device)
                      for name, split in (("weights", "train"), ("alphas", "valid"))}
        self.valid = validation_text(corpus, device)
        self.schedule = Schedule(self.texts["weights"], text.bptt, 0.0, rates, options.seed)

        seed_generators(options.seed)
        self.network = network(len(corpus.words), units.nhid).to(device)
        self.optimizer = weight_optimizer(self.network, sgd.lr, sgd.wdecay)
        self.architect = architect(self.network, self.optimizer, arch_learning_rate=alphas.arch_lr,
                                   arch_weight_decay=alphas.arch_wdecay, unrolled=alphas.unrolled, grad_clip=sgd.clip)
        self.dataset_info = corpus.dataset_info()
        check_space(run_folder, self.network, sgd.epochs)

    # What `iterate` calls.

    def alpha_step(self, train: TextBatch, valid: TextBatch, lr: float) -> None:
        """One step of the alphas, by architect.py."""
        if not self.architect.step(train, valid, lr, self.skip):
            raise Skipped

    def weight_step(self, train: TextBatch, lr: float) -> Tensor:
        """One step of the weights at the rate `lr`. Returns the loss in nats a word, on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        return weight_step(self.network, self.optimizer, train, grad_clip=self.flags.clip, slowness=self.flags.beta,
                           activity=self.flags.alpha, skip=self.skip)

    # What the loop does with it.

    def restore(self, state: dict) -> None:
        self.network.load_state_dict(restore(self.checkpointer.path, state, type(self.network)).state_dict())
        self.optimizer.load_state_dict(state["optimizer"])
        self.architect.alpha_optimizer.load_state_dict(state["alpha_optimizer"])

    def state(self) -> dict:
        return super().state() | {
            "alpha_optimizer": self.architect.alpha_optimizer.state_dict(),
            "readers": {name: reader.state() for name, reader in self.readers.items()}}

    def finished_before(self) -> None:
        if not (self.folder / "cells" / "recurrent.png").exists():  # it was killed before its last picture
            self.finish()
        super().finished_before()

    def introduce(self, goes_on: str) -> None:
        train, for_alphas = (text.columns.numel() for text in self.texts.values())
        for note in self.corpus.notes:
            self.log(note)
        self.log(f"{self.name}: {', '.join(self.space.primitives)}; {'second' if self.flags.unrolled else 'first'} "
                 "order")
        self.log(f"{self.corpus.name}: {len(self.corpus.words)} words of vocabulary, {train} of text for weights, "
                 f"{for_alphas} for alphas; epochs {self.start} to {self.flags.epochs - 1} on {self.device}{goes_on}")

    def new_epoch(self, epoch: int, state: dict | None) -> TextMeter:
        self.readers = {name: Reader(text, self.network, state and state["readers"][name])
                        for name, text in self.texts.items()}
        return TextMeter(f"{self.name} epoch {epoch} of {self.flags.epochs}", epoch, self.schedule,
                          self.flags.report_freq, skip=self.skip, state=state and state["course"])

    def inputs(self, step: int) -> tuple[TextBatch, TextBatch, float]:
        length = self.meter.lengths[step]
        train, valid = (reader.next(length, self.schedule.masks(name, self.network, self.meter.epoch, step))
                        for name, reader in self.readers.items())
        return train, valid, self.flags.lr * length / self.flags.bptt

    def count(self, result: Tensor, inputs: tuple) -> None:
        self.meter.add(result, inputs[0])

    def validate(self) -> Validation:
        return validate(self.network, self.valid, self.flags.bptt)

    def figures(self, found: Validation) -> tuple[dict, str]:
        loss = self.meter.loss
        return ({"learning_rate": self.flags.lr, "train_loss": loss, "valid_loss": found.loss},
                f"train {loss:.4f} perplexity {perplexity(loss):.2f}  "
                f"valid {found.loss:.4f} perplexity {perplexity(found.loss):.2f}")

    def write_epoch(self) -> None:
        write_epoch(self.checkpointer, self.state() | {"course": None})

    def finish(self) -> None:
        """Print the cell that the search ends with, ready for `genotypes.py`, and draw it."""
        log_skipped(self.run, self.metrics)
        log_not_finite(self.run, self.metrics, "the validation text", "--lr")
        genotype = self.network.genotype()
        pictures = draw_recurrent(genotype, self.folder / "cells")
        self.log(str(genotype))
        self.log(f"pictures of the cell: {', '.join(str(path) for path in pictures)}")


def main(folder: Path, network: type[RecurrentSupernet], architect: type[LanguageBilevel], description: str,
         argv: list[str] | None = None) -> None:
    """The command `python train_search.py` of `folder`, for scripts that do not show the loop."""
    with SearchRun(folder, network, architect, description, argv) as run:

        def iterate(train: TextBatch, valid: TextBatch, lr: float) -> Tensor:
            run.alpha_step(train, valid, lr)
            return run.weight_step(train, lr)

        for epoch in run.epochs():
            for train, valid, lr in run.steps(epoch):
                run.do(iterate, train, valid, lr)
            run.end_epoch()
