"""The loop that the scripts train_search.py and train.py show, for images and for text, and what stands behind it.

    with SearchRun(HERE, Network, Architect, __doc__) as run:
        for epoch in run.epochs():
            for train, valid, lr in run.steps(epoch):
                run.do(iterate, train, valid, lr)
            run.end_epoch()

Inside `with`, no other process can open the run's folder, and a signal waits for the end of the step. `epochs` and
`steps` begin where the run's last state ends. The state is written after a step when it is time to, and at the end of
an epoch, so that a run that was killed anywhere ends with the same bits as one that was left alone.
"""
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Self

import torch
from torch import nn

from conas import distributed
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import Run
from conas.runs.options import KeepOptions
from conas.runs.progress import SHORTER, EpochMeter, log_eta, resumed
from conas.runs.resume import Checkpointer
from conas.runs.scores import Validation


class Skipped(Exception):
    """A step that is not taken, since its gradient is not finite and --on_nan skip was given."""


class Loop(ABC):
    """One search or training. A subclass makes network and optimizer, and defines the abstract methods.

    `groups` are its options, dataclasses; `flags` has all their values by name. `dataset_info` describes the training
    data, as checkpoints do. `metrics` has a row for each epoch that is done, `meter` the sums of the present one.
    Several processes run the same loop; the first one writes.
    """

    kind = "search"          # what it is called in messages
    compared = "weights"     # what processes compare
    unit = "images"          # what a speed counts
    shorter = SHORTER        # advice if it will take long
    tells_time = True        # whether the first steps show how long it will take

    network: nn.Module
    optimizer: torch.optim.Optimizer
    dataset_info: dict
    code: dict[str, str]                            # digests of the space's own code
    primitives: Sequence[str] | None = None         # of the space, where the network does not know them

    @abstractmethod
    def __init__(self, name: str, folder: Path, groups: Sequence[object], keep: KeepOptions, **more: object):
        self.name, self.folder, self.keep, self.skip = name, folder, keep, keep.on_nan == "skip"
        self.arguments = {name: value for group in groups for name, value in asdict(group).items()} | more
        self.flags = SimpleNamespace(**self.arguments)
        self.run: Run | None = None  # the folder, open for writing
        self.meter: EpochMeter | None = None
        self.metrics: list[dict] = []

    # What a subclass defines.

    @abstractmethod
    def restore(self, state: dict) -> None:
        """Put a state of resume.pt into network and optimizers. Raises InputError if it is of another network."""

    @abstractmethod
    def introduce(self, goes_on: str) -> None:
        """Log what is about to be computed, and prepare to compute it; `goes_on` says where."""

    @abstractmethod
    def new_epoch(self, epoch: int, state: dict | None) -> EpochMeter:
        """Set the learning rate and all else of an epoch; `state` is the one to go on from within it."""

    @abstractmethod
    def inputs(self, step: int) -> tuple:
        """What `steps` hands to the script for a step: batches, and the learning rate."""

    @abstractmethod
    def count(self, result: object, inputs: tuple) -> None:
        """Add what `iterate` returned for these inputs to `meter`."""

    @abstractmethod
    def validate(self) -> Validation:
        """How good the network is now."""

    @abstractmethod
    def figures(self, found: Validation) -> tuple[dict, str]:
        """The epoch's numbers for metrics.jsonl, by name, and as text for the log."""

    @abstractmethod
    def write_epoch(self) -> None:
        """Write the end of the epoch to disk, resume.pt last."""

    @abstractmethod
    def finish(self) -> None:
        """Log what the run has found."""

    def checkpoint(self, epoch: int) -> dict:
        """The network as it is now, after `epoch`."""
        return checkpoints.describe(self.network, space=self.name, epoch=epoch, dataset=self.dataset_info,
                                    arguments=self.arguments, primitives=self.primitives, code=self.code)

    def state(self) -> dict:
        """All that the next step depends on: a checkpoint, and what `restore` and `new_epoch` need besides."""
        return self.checkpoint(self.meter.epoch) | {"optimizer": self.optimizer.state_dict(), "metrics": self.metrics,
                                                    "course": self.meter.state()}

    def resume(self) -> None:
        """Go on from the run's last state, if there is one."""
        self.metrics, self.unfinished = self.checkpointer.resume(self.dataset_info, self.restore)

    def finished_before(self) -> None:
        """Say that there is nothing left to do, at the start of a run that is finished."""
        self.log(f"{self.folder}: this {self.kind} is finished; --save NAME starts another, --extend goes on to more "
                 "--epochs")

    def is_finished(self) -> bool:
        """Return True if no epoch is left to do."""
        return len(self.metrics) >= self.flags.epochs

    def recorded(self, iterate: Callable) -> Callable:
        """`iterate`, or what computes the same faster."""
        return iterate

    # The loop.

    def __enter__(self) -> Self:
        if self.keep.check_only:
            print(f"{self.folder}: all checks passed; without --check_only, the {self.kind} begins")
            return self
        with ExitStack() as self.stack:
            self.run = self.stack.enter_context(Run(self.folder, self.arguments))
            self.checkpointer = self.stack.enter_context(Checkpointer(self.run, self.keep.checkpoint_minutes))
            self.resume()
            self.start = len(self.metrics)  # the first epoch of this process
            self.start_step = self.unfinished["course"]["step"] if self.unfinished else 0
            if self.is_finished():
                self.finished_before()
            else:
                self.introduce(resumed(self.start, self.start_step))
            self.stack = self.stack.pop_all()
        return self

    def __exit__(self, *error) -> None:
        if self.run is not None:
            self.stack.__exit__(*error)

    def log(self, text: str) -> None:
        """Print a line, and keep it in the run's log.txt."""
        if self.run is None:
            print(text)
        else:
            self.run.log(text)

    def epochs(self) -> Iterator[int]:
        """The epochs that are still to do, from 0; none with --check_only."""
        if self.run is None or self.is_finished():
            return
        while not self.is_finished():
            epoch = len(self.metrics)
            self.meter = self.new_epoch(epoch, self.unfinished)
            self.unfinished = None
            self.network.train()
            yield epoch
            if len(self.metrics) == epoch:
                raise RuntimeError(f"epoch {epoch} has no end: call end_epoch() after its steps")
        self.finish()

    def steps(self, epoch: int) -> Iterator[tuple]:
        """What each step of the epoch that is still to do needs. The step itself is `do`."""
        for step in self.meter:
            yield self.inputs(step)
            if self.meter.step == step:
                raise RuntimeError(f"step {step} of epoch {epoch} was not taken: call do() once for every step")
            if self.tells_time and epoch == self.start and step == 4:
                seconds = self.meter.seconds / 5 * self.meter.stream.steps * (self.flags.epochs - self.start)
                log_eta(self.run, seconds, self.shorter)
            if (step + 1) % self.flags.report_freq == 0:
                distributed.check_network(self.compared, self.network)
            self.checkpointer.maybe_save(self.state)

    def do(self, iterate: Callable, *inputs: object) -> None:
        """Take a step: `iterate(*inputs)`, a function that returns what a `weight_step` does."""
        try:
            result = self.recorded(iterate)(*inputs)
        except Skipped:
            self.meter.skip_step()
            return
        if result is None:
            raise TypeError(f"{iterate.__name__}: must return what weight_step returns")
        self.count(result, inputs)

    def end_epoch(self) -> None:
        """Validate, log, and write the epoch to disk. To be called when its steps are done."""
        epoch, meter = len(self.metrics), self.meter
        if meter.step < meter.stream.steps:
            raise RuntimeError(f"epoch {epoch} ends after {meter.step} of {meter.stream.steps} steps: leave the loop "
                               "over steps() only at its end")
        with self.checkpointer.interruptible(self.state):
            found = self.validate()
        row, text = self.figures(found)
        self.metrics.append({"epoch": epoch} | row | meter.extra_metrics() | found.extra_metrics()
                            | self.run.stretches.extra_metrics(epoch))
        self.log(f"epoch {epoch:3d}  {text}{found.remark}  {meter.rate:.0f} {self.unit}/s")
        distributed.check_network(self.compared, self.network)
        self.write_epoch()
