"""Kill a search and a training at every place that matters, start them again, and compare the ends, tensor for tensor.

    python -m tests.helpers.crash                  # every place, one after another: `make torture`
    python -m tests.helpers.crash --kills 20       # twenty of them, evenly spread

A run is instrumented: before, after and, for files, in the middle of every call in PLACES there is an event, and at
the event whose number is drawn the process kills itself with SIGKILL. The events of a run are counted first. So the
places are: within the virtual step, between the alphas' step and the weights', before and after a file is written,
flushed and renamed, between checkpoint and metrics, in validation, before the pictures, and so on.

Processes are forked from one that has imported everything, and die for real.
"""
import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import matplotlib.backends.backend_svg  # noqa: F401
import torch

from cnn_space2 import genotypes as module
from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas.commands import search, train
from conas.darts import genotype as genotypes
from conas.darts.architect import Bilevel
from conas.darts.published import GENOTYPES
from conas.runs.checkpoint import load
from conas.runs.folder import Run
from conas.runs.resume import Checkpointer
from tests.helpers.launch import LIBRARIES

SMALL = ["--dataset", "digits", "--subset", "64", "--init_channels", "2", "--layers", "3", "--batch_size", "16",
         "--epochs", "2", "--device", "cpu", "--checkpoint_minutes", "0"]  # a state after every step
PLACES = [(os, "replace"), (os, "fsync"), (Path, "write_bytes"), (Path, "write_text"), (Bilevel, "step"),
          (Bilevel, "grad_weights"), (Bilevel, "hessian_vector"), (torch.optim.Adam, "step"), (torch.optim.SGD, "step"),
          (search, "validate"), (train, "validate"), (search, "draw_genotype"), (Checkpointer, "load"),
          (Checkpointer, "save"), (Run, "write_metrics")]


def run_search(folder: Path) -> Path:
    """A small search in a space `folder`. Returns the run's folder."""
    search.main(folder, Network, Architect, "", SMALL)
    return folder / "search-EXP"


def run_training(folder: Path) -> Path:
    """A small training of published cells in a space `folder`. Returns the run's folder."""
    genotypes.save(folder / "search-EXP" / "genotype.json", GENOTYPES["DARTS_V2"])
    train.main(folder, module, "", argv=[*SMALL, "--any_ops", "--valid_portion", "0.2", "--drop_path_prob", "0.3",
                                         "--auxiliary"])
    return folder / "train-EXP"


RUNS = {"search": run_search, "training": run_training}


class Events:
    """Counts the events of this process, and kills it at number `fatal`."""

    def __init__(self, fatal: int | None):
        self.fatal, self.seen = fatal, []

    def happen(self, name: str) -> None:
        if len(self.seen) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(name)

    def instrument(self) -> None:
        for owner, name in PLACES:
            setattr(owner, name, self._watched(getattr(owner, name), name))

    def _watched(self, function: Callable, name: str) -> Callable:
        def watched(*arguments, **keywords):
            self.happen(f"before {name}")
            if name == "write_bytes":  # half of the file is there
                path, content = arguments
                with open(path, "wb") as file:
                    file.write(content[:len(content) // 2])
                    file.flush()
                    self.happen(f"within {name}")
            result = function(*arguments, **keywords)
            self.happen(f"after {name}")
            return result
        return watched


def in_child(work: Callable[[], object], fatal: int | None = None) -> tuple[int, list[str]]:
    """Do `work` in a forked process that dies at event `fatal`. Returns its wait status and its events, if it lives."""
    report = Path(tempfile.mkstemp(suffix=".json")[1])
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 1
        try:
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                events = Events(fatal)
                events.instrument()
                work()
            with open(report, "w") as file:  # not a watched call
                json.dump(events.seen, file)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    seen = json.loads(report.read_text() or "[]")
    report.unlink()
    return status, seen


def everything(folder: Path) -> dict[str, object]:
    """What a run has left, by file: tensors and texts. Logs say when a run was started again, and are left out.

    Its own folder, which args.json names, is FOLDER.
    """
    texts = {str(path.relative_to(folder)): path.read_text().replace(str(folder), "FOLDER")
             for pattern in ("*.json", "*.jsonl", "genotypes/*") for path in folder.glob(pattern)}
    tensors = {str(path.relative_to(folder)): load(path) for pattern in ("*.pt", "checkpoints/*")
               for path in folder.glob(pattern)}
    # the state before the last differs in the time that it took, and where the clock was when it was written
    tensors.pop("resume.before.pt")
    pictures = {path.name: None for path in folder.glob("cells/*")}
    return texts | tensors | pictures


def differences(one: object, other: object, name: str = "") -> list[str]:
    """Where two nested structures of tensors and plain values differ in any bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [text for key in one.keys() | other.keys()
                for text in differences(one.get(key), other.get(key), f"{name}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [text for i, (a, b) in enumerate(zip(one, other)) for text in differences(a, b, f"{name}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    return [] if type(one) is type(other) and one == other else [name]


def matrix(kind: str, root: Path, kills: int | None) -> tuple[list[tuple[int, str, list[str]]], int]:
    """Kill runs of a kind at `kills` events (all if None), start them again, and compare with one that was left alone.

    Returns for each kill the event's number and name and the differences, and the number of events of a run.
    """
    for library in LIBRARIES:  # of which runs import some when they need them
        import_module(library)
    run = RUNS[kind]
    whole = root / "whole" / "cnn_space2"
    status, events = in_child(lambda: run(whole))
    assert status == 0, f"the {kind} itself fails"
    folder = f"{'search' if kind == 'search' else 'train'}-EXP"
    expected = everything(whole / folder)
    count = len(events) if kills is None else min(kills, len(events))
    results = []
    for i in range(count):
        fatal = i * len(events) // count
        place = root / f"{fatal}" / "cnn_space2"
        status, _ = in_child(lambda place=place: run(place), fatal)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, events[fatal]
        status, _ = in_child(lambda place=place: run(place))
        found = differences(everything(place / folder), expected) if status == 0 else ["it does not start again"]
        results.append((fatal, events[fatal], found))
    return results, len(events)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="of each kind of run (default: one at every event)")
    kills, failed, total, began = parser.parse_args().kills, 0, 0, time.monotonic()
    torch.set_num_threads(1)
    for kind in RUNS:
        with tempfile.TemporaryDirectory() as root:
            results, events = matrix(kind, Path(root), kills)
        bad = [result for result in results if result[2]]
        for number, name, found in bad:
            print(f"{kind}: killed at event {number}, {name}: {', '.join(found[:5])}")
        print(f"{kind}: {len(results)} kills at {len({name for _, name, _ in results})} kinds of places among {events} "
              f"events; {len(results) - len(bad)} ended with the same bits")
        failed, total = failed + len(bad), total + len(results)
    print(f"{total - failed} of {total} kills survived in {time.monotonic() - began:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
