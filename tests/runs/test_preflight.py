"""What would fail at a run's end if nobody looked at its start: splits, disks, packages, and the steps after it."""
import json
import sys

import pytest

import test_ensemble
from cnn_space1 import genotypes as space1
from cnn_space1.architect import Architect
from cnn_space1.model_search import Network
from conas.commands import scoring as evaluate
from conas.commands import search, train
from conas.commands import test as measure
from conas.darts.space import Space, discover
from conas.data import sources
from conas.errors import InputError
from conas.recurrent import search as language_search
from conas.recurrent import train as language_train
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import list_checkpoints
from conas.runs.options import DataOptions, TestOptions
from conas.runs.preflight import check_data, committee_notes
from ensemble import export, predict, study
from rnn import genotypes as recurrent
from rnn.architect import Architect as RecurrentArchitect
from rnn.model_search import Network as RecurrentNetwork
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


@pytest.mark.parametrize("command", ["search", "train"])
def test_check_only_makes_all_checks_and_leaves_nothing(tmp_path, command, capsys):
    if command == "search":
        start(tmp_path, "--check_only")
    else:
        train.main(tmp_path / "cnn_space1", space1, "", argv=[*SMALL, "--arch", "DARTS_V2", "--check_only"])
    assert "all checks passed" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_check_only_of_language_models(tmp_path, capsys):
    small = ["--dataset", "gospels", "--nhid", "8", "--epochs", "1", "--check_only"]
    language_search.main(tmp_path / "rnn", RecurrentNetwork, RecurrentArchitect, "", small)
    language_train.main(tmp_path / "rnn", recurrent, "", small)
    assert capsys.readouterr().out.count("all checks passed") == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, module, message", [
    ((), "matplotlib.figure", "matplotlib: cannot draw pictures"),
    (("--tensorboard",), "torch.utils.tensorboard", "pip install tensorboard")])
def test_packages_that_the_end_needs_are_missed_at_the_start(tmp_path, monkeypatch, flags, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=message):
        start(tmp_path, *flags)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_no_disk_holds_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"search-EXP: 1000000000 checkpoints .* GB left"):
        start(tmp_path, "--epochs", 10**9)
    with pytest.raises(InputError, match=r"train-EXP: 500000001 checkpoints of .* need"):
        train.main(tmp_path / "cnn_space1", space1, "", argv=[*SMALL, "--arch", "DARTS_V2", "--epochs", str(10**9),
                                                            "--checkpoint_freq", "2"])
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_run_writes_a_folder_is_named(tmp_path):
    folder = tmp_path / "cnn_space1" / "search-EXP"
    folder.mkdir(parents=True)
    (folder / "cells").touch()
    with pytest.raises(InputError, match="cells is a file; move it away"):
        start(tmp_path)


def test_a_relative_data_folder_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_data(tmp_path, DataOptions(dataset="digits", data="mine")).data == str(tmp_path / "mine")


def test_runs_that_could_form_no_committee_are_noted(tmp_path):
    here = {"dataset": "digits", "subset": None, "split_seed": 0}
    for space, arguments in (("cnn_space2", here), ("cnn_space3", here | {"dataset": "svhn"}),
                             ("cnn_space4", here | {"split_seed": 1}), ("cnn_space1", here | {"dataset": "svhn"})):
        folder = tmp_path / space / "search-EXP"
        folder.mkdir(parents=True)
        (folder / "args.json").write_text(json.dumps({"arguments": arguments}))
    notes = list(committee_notes(tmp_path / "cnn_space1" / "search-EXP", here))
    assert len(notes) == 2
    assert "cnn_space3/search-EXP, with --dataset svhn (here digits), could form no committee" in notes[0]
    assert "cnn_space4/search-EXP, with --split_seed 1 (here 0), has other held-out images" in notes[1]
    here = {"dataset": "folder", "resize": "pad"}
    (tmp_path / "cnn_space3" / "search-EXP" / "args.json").write_text(json.dumps(
        {"arguments": here | {"resize": "crop"}}))
    notes = list(committee_notes(tmp_path / "cnn_space1" / "search-EXP", here))
    assert "with --resize crop (here pad), could form no committee" in "".join(notes)


def test_files_that_cannot_be_written_are_named_before_the_work(tmp_path, monkeypatch):
    for path in ("weights.pt", tmp_path):
        with pytest.raises(InputError, match="must end in .safetensors" if path == "weights.pt" else str(tmp_path)):
            measure.main(tmp_path / "cnn_space1", Network, "", argv=["--export", str(path)])
    with pytest.raises(InputError, match=f"{tmp_path}: is a folder"):
        predict.main(["photo.jpg", "--save", "none", "--csv", str(tmp_path)])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file"):
        export.main([str(tmp_path / "file" / "committee.pt2"), "--save", "none"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match="pip install onnx"):
        export.main(["committee.pt2", "--onnx", "committee.onnx", "--save", "none"])


@pytest.mark.parametrize("flags", ["--datase digits", "--dataset digit", "--epochs 0", "--seed 3", "--save=x", "'"])
def test_a_plan_refuses_flags_that_its_runs_would_refuse(flags):
    with pytest.raises(InputError, match=r"^--flags: "):
        study.plan(study.PlanOptions(flags=flags))


@pytest.mark.parametrize("flags", ["--layers 2", "--patience 3", "--unrolled"])
def test_a_plan_refuses_flags_of_a_training_that_would_fail_after_the_search(flags):
    with pytest.raises(InputError, match=r"^--train_flags: "):
        study.plan(study.PlanOptions(stage="train", train_flags=flags))
    study.plan(study.PlanOptions(train_flags=flags))


def test_members_with_other_held_out_images_are_a_committee_without_calibration(tmp_path, capsys):
    spaces = discover(ROOT)[1:]
    write_runs(tmp_path, "digits", str(ROOT / "data"), None, 60, 1, spaces)
    pool = {space.name: (space, tmp_path / space.name / "search-EXP" / "checkpoints" / "epoch_000.pt")
            for space in spaces}
    path = pool["cnn_space3"][1]
    content = checkpoints.read(path)
    content["dataset"]["split_seed"] = 1
    checkpoints.save(path, content)
    options = TestOptions(device="cpu")
    assert test_ensemble.try_fit(pool, test_ensemble.CommitteeOptions(stage="search"), options) is None
    assert "no held-out images in common" in capsys.readouterr().out
    with pytest.raises(InputError, match="cnn_space3"):
        test_ensemble.try_fit(pool, test_ensemble.CommitteeOptions(combination="weighted"), options)
