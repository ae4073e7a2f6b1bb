"""What a long run checks before its first epoch: whatever would stop it, or its tests, later and is known by then."""
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conas import distributed
from conas.data.images import survey
from conas.errors import InputError
from conas.runs.folder import predates
from conas.runs.options import DataOptions


def check_data(folder: Path, data: DataOptions, suffixes: Sequence[str] | None = None) -> DataOptions:
    """The data options of the run in `folder`, if the network that it ends with can be tested on that data set.

    `suffixes` are those of files that are images. In a run that began before there was --test_subset, --subset holds
    for both splits. Raises InputError for a test split that is missing or damaged, or smaller than --test_subset.
    """
    _, images = distributed.from_first(lambda: survey(data.dataset, data.data, "test", suffixes, data.follow_links))
    if data.test_subset is not None and data.test_subset > images:
        raise InputError(f"--test_subset {data.test_subset}: the test split of {data.dataset} has {images} images; "
                         "choose at most as many")
    old = distributed.from_first(lambda: predates(folder, "test_subset"))
    return replace(data, test_subset=data.subset) if old and data.test_subset is None else data
