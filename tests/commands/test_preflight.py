"""What fails at a run's end if nobody looks at its start: the sizes of splits, and runs from before a flag."""
import json

import pytest

from cnn_space1 import genotypes as space1
from cnn_space1.architect import Architect
from cnn_space1.model_search import Network
from conas.commands import scoring as evaluate
from conas.commands import search, train
from conas.darts.space import Space
from conas.data import sources
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import list_checkpoints
from conas.runs.options import TestOptions
from tests.conftest import ROOT
from tests.helpers.untrained import write_runs

SMALL = ["--dataset", "digits", "--init_channels", "2", "--layers", "3", "--batch_size", "30", "--epochs", "1"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(search, "draw_genotype", lambda *_: [])


def start(tmp_path, *flags):
    """`python train_search.py FLAGS` of space 1 in a folder of its own, here. Returns the run's folder."""
    search.main(tmp_path / "cnn_space1", Network, Architect, "", [*SMALL, "--no-unrolled", *map(str, flags)])
    return tmp_path / "cnn_space1" / "search-EXP"


def test_images(tmp_path, folder, epoch=0, split="test"):
    """How many images the scores of a checkpoint are of."""
    space = Space("cnn_space1", tmp_path / "cnn_space1", Network)
    return len(evaluate.scores_for(space, list_checkpoints(folder)[epoch], TestOptions(device="cpu"), split).labels)


test_images.__test__ = False


def without_flag(folder):
    """Make a run one of the code from before there was --test_subset."""
    arguments = json.loads((folder / "args.json").read_text())
    del arguments["arguments"]["test_subset"]
    (folder / "args.json").write_text(json.dumps(arguments))
    for path in [*list_checkpoints(folder).values(), folder / "resume.pt", folder / "resume.before.pt"]:
        content = checkpoints.read(path)
        del content["dataset"]["test_subset"], content["arguments"]["test_subset"]
        checkpoints.save(path, content)


def test_a_subset_is_of_the_training_images_and_the_test_split_stays_whole(tmp_path):
    # more than the 450 test images: such a search could not be tested
    folder = start(tmp_path, "--subset", 500, "--train_portion", 0.2)
    assert (test_images(tmp_path, folder), test_images(tmp_path, folder, split="valid")) == (450, 400)
    folder = tmp_path / "cnn_space1" / "train-EXP"
    train.main(tmp_path / "cnn_space1", space1, "", argv=[*SMALL, "--subset", "100", "--test_subset", "60", "--arch",
                                                        "DARTS_V2"])
    assert (test_images(tmp_path, folder), test_images(tmp_path, folder, split="valid")) == (60, 10)


@pytest.mark.parametrize("command", ["search", "train"])
def test_a_test_subset_larger_than_the_test_split_is_refused_before_the_run_has_a_folder(tmp_path, command):
    with pytest.raises(InputError, match="--test_subset 451: the test split of digits has 450 images"):
        if command == "search":
            start(tmp_path, "--test_subset", 451)
        else:
            train.main(tmp_path / "cnn_space1", space1, "", argv=[*SMALL, "--test_subset", "451", "--arch", "DARTS_V2"])
    assert not list(tmp_path.rglob("args.json"))


def test_a_run_from_before_the_flag_goes_on_with_its_subset_of_both_splits(tmp_path):
    flags = "--subset", 60, "--epochs", 2
    folder = start(tmp_path, *flags)
    without_flag(folder)
    for path in (folder / "checkpoints" / "epoch_001.pt", folder / "resume.pt"):
        path.unlink()  # as if killed before the second epoch was kept
    start(tmp_path, *flags)
    assert sorted(list_checkpoints(folder)) == [0, 1]
    assert [test_images(tmp_path, folder, epoch) for epoch in (0, 1)] == [60, 60]
    with pytest.raises(InputError, match=r"--test_subset 60 \(now 200\)"):
        start(tmp_path, *flags, "--test_subset", 200)


def test_an_old_subset_that_no_test_split_has_means_all_test_images(tmp_path, capsys):
    space = Space("cnn_space1", tmp_path / "cnn_space1", Network)
    write_runs(tmp_path, "digits", str(ROOT / "data"), None, 600, 1, [space])  # says nothing of --test_subset
    assert test_images(tmp_path, space.search_folder("EXP")) == 450
    assert "--subset 600, of a run from before there was --test_subset: there are 450 test images" in \
        capsys.readouterr().err


def test_a_missing_test_split_is_named_before_training_images_are_read(tmp_path, monkeypatch):
    reader = sources.READERS["digits"]

    def broken(root, split, listing):
        if split == "test":
            raise InputError("no test images here")
        return reader(root, split, listing)

    monkeypatch.setitem(sources.READERS, "digits", broken)
    with pytest.raises(InputError, match="no test images here"):
        start(tmp_path)
    assert not (tmp_path / "cnn_space1").exists()
