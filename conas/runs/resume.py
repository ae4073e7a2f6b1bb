"""What keeps a run from being lost: its state on disk, written at intervals, when asked to stop, and after every epoch.

The state is a checkpoint of the current network and everything else that the next step depends on: optimizers, sums of
the epoch, random generators. Batches are functions of seed and step. So a run that was killed at any instant goes on
from the last state that is intact, repeats what came after it, and ends with the same bits.

    resume.pt  resume.before.pt      the last two states: if the newer is damaged, the older one is used

Several processes have equal states. They stop after the same step, whichever of them got the signal; rank 0 writes, and
passes on what it reads.
"""
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import torch

from conas import distributed
from conas.darts.genotype import RULE
from conas.errors import InputError, Stopped
from conas.files import write_json
from conas.places import remember_data
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.folder import Run

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal's number, as shells have it


class Checkpointer:
    """Writes and reads the state of a run. Use it as a context: inside, Ctrl-C and SIGTERM wait for the step's end.

    Within an epoch, a state is written every `minutes`. A second Ctrl-C stops at once.
    """

    def __init__(self, run: Run, minutes: float):
        self.run, self.minutes = run, minutes
        self.path, self.before = run.folder / "resume.pt", run.folder / "resume.before.pt"
        self._signal: int | None = None  # the signal that has come
        self._interruptible = False
        self._saved = time.monotonic()
        self._handlers: dict = {}

    def __enter__(self) -> "Checkpointer":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in CODES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._interruptible:
            raise _Interrupted(number)
        if self._signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self._signal = number

    def load(self, dataset_info: dict) -> dict | None:
        """The last intact state of the run, or None before the first; `dataset_info` describes the images now.

        Logs it if the space's code has changed since. Raises InputError if neither generation can be read, or if the
        training images are not those of the run's earlier steps.
        """
        distributed.check_equal("training images", dataset_info["fingerprint"])
        state = distributed.from_rank0(self._read)
        if state is None:
            return None
        if state["dataset"]["fingerprint"] != dataset_info["fingerprint"]:
            raise InputError(f"{self.path}: the training images have changed since this run began; restore them, "
                             "or give --save another name")
        remember_data(self.run.folder, state["dataset"]["root"], dataset_info["root"])
        if names := code.changes(self.run.folder.parent, state, resumed=True):
            self.run.log(code.sentence(self.run.folder.parent, self.path, names))
        return state

    def _read(self) -> dict | None:
        if not self.path.exists() and not self.before.exists():
            return None
        try:
            return _with_fields(self.path, checkpoints.load(self.path))
        except InputError as error:
            if not self.before.exists():
                raise
            reason = "is missing" if not self.path.exists() else "is damaged"
            try:
                state = _with_fields(self.before, checkpoints.load(self.before))
            except InputError:
                raise error from None
            self.run.log(f"warning: {self.path} {reason}; the run goes on from the state before, {self.before}")
            return state

    def resume(self, dataset_info: dict, put: Callable[[dict], None]) -> tuple[list[dict], dict | None]:
        """Go on from the last intact state of the run: `put` puts it into networks and optimizers.

        Returns the metrics of the epochs that are done, and the state if it is within another one. Raises InputError as
        `load` does, and for a state that does not fit the run.
        """
        state = self.load(dataset_info)
        if state is None:
            self.run.extend(0)
            return [], None
        try:
            put(state)
            _set_generators(state["random"])  # last: building networks draws from them
            metrics, course = _check_progress(state)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise InputError(f"{self.path}: is whole, but does not fit this run; delete it to begin the run again, or "
                             "replace it with an intact copy") from error
        self.run.extend(len(metrics) + (course is not None))
        self.run.write_metrics(metrics)
        return metrics, state if course else None

    def save(self, state: dict) -> None:
        """Write a state; the one before is kept. Raises OSError, with both earlier ones intact, if it cannot."""
        if distributed.rank() == 0:
            checkpoints.save(self.path, state | {"random": _generators()}, keep=self.before)
        self._saved = time.monotonic()

    def maybe_save(self, state: Callable[[], dict]) -> None:
        """Write the state if it is time to. After a signal, write it and raise Stopped."""
        due = time.monotonic() - self._saved >= 60 * self.minutes
        number, due = distributed.all_reduce_max(self._signal or 0, due)
        if number:
            self._stop(number, state)
        if due:
            self.save(state())

    @contextmanager
    def interruptible(self, state: Callable[[], dict]) -> Iterator[None]:
        """For long work that leaves the state as it is, such as validation: inside, a signal stops at once.

        Several processes finish the work first, since each waits for the others in it.
        """
        self.maybe_save(state)
        try:
            self._interruptible = distributed.size() == 1
            yield
        except _Interrupted as interrupted:
            self._interruptible = False
            self._stop(interrupted.number, state)
        finally:
            self._interruptible = False

    def _stop(self, number: int, state: Callable[[], dict]) -> None:
        kept = state()
        self.save(kept)
        raise Stopped(f"stopped in epoch {kept['epoch']} after {kept['course']['step']} steps, which are kept in "
                      f"{self.path}; start the same command again to go on from there", CODES[number])


def write_epoch(checkpointer: Checkpointer, state: dict, rule: str | None = None) -> None:
    """Write the end of a search's epoch. resume.pt comes last: what it does not know of is repeated.

    `rule` says in the genotype's files how it was derived.
    """
    run, epoch = checkpointer.run, state["epoch"]
    if distributed.rank() == 0:
        checkpoints.save(run.path("checkpoints", epoch, ".pt"), checkpoints.without_progress(state))
        genotype = state["genotype"] | ({RULE: rule} if rule else {})
        write_json(run.path("genotypes", epoch, ".json"), genotype)
        write_json(run.folder / "genotype.json", genotype)
    checkpointer.save(state)
    run.write_metrics(state["metrics"])


class _Interrupted(Exception):
    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _with_fields(path, state: dict) -> dict:
    for name in ("metrics", "random", "optimizer", "course"):
        if name not in state:
            raise InputError(f"{path}: is a checkpoint, but not the state of a run (no {name}); delete it to begin "
                             "this run again, or replace it with an intact copy")
    return state


def _check_progress(state: dict) -> tuple[list[dict], dict | None]:
    """The metrics of a state, by epoch, and its EpochMeter's. Raises ValueError, or what wrong types lead to."""
    metrics, course = state["metrics"], state["course"]
    if [row["epoch"] for row in metrics] != list(range(len(metrics))):
        raise ValueError("metrics of other epochs")
    if course is not None and not (course["step"] >= 0 <= course["skipped"] and course["seen"] >= 0.0
                                   <= course["seconds"] and course["sums"].shape == (3,)):
        raise ValueError("no course of an epoch")
    if state["epoch"] != (len(metrics) if course else len(metrics) - 1):
        raise ValueError("metrics of other epochs")
    return metrics, course


def _generators() -> dict:
    """The states of all random generators, as tensors and plain values."""
    version, words, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": [version, torch.tensor(words), gauss],
              "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def seed_generators(seed: int) -> None:
    """Seed those of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _set_generators(states: dict) -> None:
    """Put all random generators where they were when a state's `random` was written."""
    torch.set_rng_state(states["torch"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in states and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])
