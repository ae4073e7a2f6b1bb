"""What a long run checks before its first epoch: whatever would stop it, or its tests, later and is known by then."""
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from conas import distributed
from conas.data.images import survey
from conas.errors import InputError
from conas.files import check_writable
from conas.runs.folder import predates, read_arguments
from conas.runs.options import DataOptions

PARTS = "checkpoints", "genotypes", "cells", "probabilities"  # folders that a run and its tests write into
# What runs that form a committee must have in common: for the same test images, and for the same held-out images.
UNEVEN = "folder", "imagenet", "imagenette"  # data sets whose images need not be square
TESTED = "dataset", "image_size", "test_subset"
HELD_OUT = "subset", "train_portion", "valid_portion", "split_seed"


def check_data(folder: Path, data: DataOptions, suffixes: Sequence[str] | None = None) -> DataOptions:
    """The data options of the run in `folder`, if the network that it ends with can be tested on that data set.

    `suffixes` are those of files that are images. --data becomes absolute, since tests may start in another folder.
    In a run that began before there was --test_subset, --subset holds for both splits. Raises InputError for a test
    split that is missing or damaged, or smaller than --test_subset.
    """
    _, images = distributed.from_rank0(lambda: survey(data.dataset, data.data, "test", suffixes, data.follow_links))
    if data.test_subset is not None and data.test_subset > images:
        raise InputError(f"--test_subset {data.test_subset}: the test split of {data.dataset} has {images} images; "
                         "choose at most as many")
    old = distributed.from_rank0(lambda: predates(folder, "test_subset"))
    return replace(data, data=str(Path(data.data).expanduser().absolute()),
                   test_subset=data.subset if old and data.test_subset is None else data.test_subset)


def check_outputs(folder: Path) -> None:
    """Raise InputError for what the run in `folder`, or a test of it, could not write."""
    def check() -> None:
        for part in PARTS:
            check_writable(folder / part / "file")

    distributed.from_rank0(check)


def check_space(folder: Path, network: nn.Module, checkpoints: int) -> None:
    """Raise InputError if the disk has no room for so many `checkpoints` of the network in the run's folder.

    Those that are there already are counted as written. The run's state holds weights and momentum, is kept in two
    generations, and a third is written before one of them goes.
    """
    def check() -> None:
        size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        left = max(0, checkpoints - len(list(folder.glob("checkpoints/*.pt"))))
        state = folder / "resume.pt"
        needed = left * size + (0 if left == 0 else 2 * size if state.exists() else 6 * size)
        free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
        if free < needed:
            raise InputError(f"{folder}: {left} checkpoints of {_amount(size)} and the state of the run need "
                             f"{_amount(needed)}, but the disk has {_amount(free)} left; free some, or link the folder "
                             "to another disk")

    distributed.from_rank0(check)


def _amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def committee_notes(folder: Path, arguments: Mapping) -> Iterator[str]:
    """A line for every run of the same name in another space that could form no committee with the run in `folder`.

    Such runs are no error, since they may be meant for something else.
    """
    for other in sorted(folder.parent.parent.glob(f"cnn_space*/{folder.name}")):
        if other.parent == folder.parent or not (other / "args.json").exists():
            continue
        theirs = read_arguments(other)
        tested = (*TESTED, "resize") if arguments.get("dataset") in UNEVEN else TESTED
        for names, result in ((tested, "could form no committee with this run"),
                              (HELD_OUT, "has other held-out images, so that a committee of both can be neither fitted "
                                         "nor calibrated")):
            differ = [f"--{name} {theirs.get(name)} (here {arguments.get(name)})" for name in names
                      if theirs.get(name) != arguments.get(name)]
            if differ:
                yield f"note: {other.parent.name}/{other.name}, with {', '.join(differ)}, {result}"
                break
