"""Paths that runs record: absolute, whichever way they were spelt, and what has moved is found again."""
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from cnn_space1 import genotypes as space1
from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas.cli import parse
from conas.commands import search, train
from conas.darts import genotype as genotypes
from conas.darts.published import GENOTYPES
from conas.errors import InputError
from conas.files import write_json
from conas.places import absolute, find_data, read_moved, remember_data
from conas.recurrent.text import load_corpus
from conas.runs import checkpoint as checkpoints
from conas.runs.options import DataOptions, ModelOptions, NetworkOptions, TestOptions
from ensemble import study
from tests.conftest import Clone
from tests.data.test_imagefolders import fill

FITTED = "16 held-out training images"
TINY = ["--init_channels", "2", "--layers", "3", "--epochs", "1"]
PHOTOS = ["--dataset", "folder", "--data", "../mydata", "--image_size", "8", "--batch_size", "4", *TINY]


@pytest.fixture(scope="module")
def searched(bare_clone, tmp_path_factory) -> Clone:
    """Two spaces searched over a folder that is named as it is seen from theirs."""
    root = tmp_path_factory.mktemp("places") / "CoNAS"
    shutil.copytree(bare_clone.root, root)
    fill(root / "mydata", {"a": 20, "b": 20})
    clone = Clone(root)
    for space in ("cnn_space2", "cnn_space3"):
        done = clone.run(f"{space}/train_search.py", *PHOTOS)
        assert done.returncode == 0, done.stderr
    return clone


@pytest.fixture
def moved(searched, tmp_path) -> Clone:
    """The clone in another place, data and all; the old place is gone."""
    shutil.copytree(searched.root, tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").glob("cnn_space*/search-EXP/probabilities/*.npz"):
        file.unlink()
    aside = searched.root.with_name("aside")
    searched.root.rename(aside)
    yield Clone(tmp_path / "elsewhere")
    aside.rename(searched.root)


def test_another_folder_reads_what_a_relative_path_named(searched, tmp_path):
    for space in ("cnn_space2", "cnn_space3"):
        run = searched.root / space / "search-EXP"
        recorded = json.loads((run / "args.json").read_text())["arguments"]["data"]
        assert recorded == str(searched.root / "mydata")
        assert checkpoints.load(run / "checkpoints" / "epoch_000.pt")["dataset"]["root"] == recorded
    done = searched.run("test_ensemble.py", cwd=searched.root)
    assert done.returncode == 0 and FITTED in done.stdout and not done.stderr, done.stdout + done.stderr
    done = searched.run("cnn_space2/train_search.py", *PHOTOS[:3], "CoNAS/cnn_space1/../mydata", *PHOTOS[4:],
                        cwd=searched.root.parent)
    assert done.returncode == 0 and "is finished" in done.stdout


def test_what_moves_together_is_found_and_data_alone_are_mended_once(moved):
    done = moved.run("test_ensemble.py", cwd=moved.root)
    assert done.returncode == 0 and FITTED in done.stdout, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2 and all(f"have moved with it to {moved.root / 'mydata'}" in line for line in lines)
    for file in moved.root.glob("cnn_space*/search-EXP/probabilities/*.npz"):
        file.unlink()

    (moved.root / "mydata").rename(moved.root / "gone")
    done = moved.run("cnn_space2/test_all.py")
    assert done.returncode == 2 and "there is no such folder; name theirs with --data" in done.stderr
    done = moved.run("cnn_space2/test_all.py", "--data", "../gone")
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert f"its data are in {moved.root / 'gone'} from now on" in line
    done = moved.run("cnn_space3/test_all.py", "--data", moved.root / "gone")
    assert done.returncode == 0, done.stderr
    done = moved.run("test_ensemble.py", cwd=moved.root)
    assert done.returncode == 0 and FITTED in done.stdout and not done.stderr, done.stdout + done.stderr

    for file in moved.root.glob("cnn_space*/search-EXP/probabilities/*.valid.npz"):
        file.unlink()
    (moved.root / "gone").rename(moved.root / "again")
    done = moved.run("test_ensemble.py", cwd=moved.root)  # the test images are scored already
    assert done.returncode == 0 and "no held-out images" not in done.stdout
    assert "held-out images were not scored" in done.stdout and "there is no such folder" in done.stdout


@pytest.fixture
def runs(tmp_path) -> Path:
    """A folder with a space's run in it, as far as `find_data` looks, whose data were elsewhere."""
    write_json(tmp_path / "a" / "cnn_space1" / "search-EXP" / "args.json",
               {"version": "0", "arguments": {}, "folders": [str(tmp_path / "a" / "cnn_space1" / "search-EXP")]})
    (tmp_path / "a" / "data").mkdir()
    return tmp_path


def test_data_are_where_they_were_before_anywhere_else(runs, capsys):
    recorded = str(runs / "a" / "data")
    (runs / "b").mkdir()
    shutil.copytree(runs / "a", runs / "b" / "a")
    old, new = (base / "a" / "cnn_space1" / "search-EXP" for base in (runs, runs / "b"))
    assert find_data(new / "checkpoints" / "epoch_000.pt", recorded) == runs / "a" / "data"
    remember_data(new, recorded, runs)  # found without it: another --data is for one command only
    assert not read_moved(new) and not capsys.readouterr().err
    (runs / "a" / "data").rmdir()
    assert find_data(new / "checkpoints" / "epoch_000.pt", recorded) == runs / "b" / "a" / "data"
    with pytest.raises(InputError, match="no such folder; name theirs with --data"):
        find_data(old / "checkpoints" / "epoch_000.pt", recorded)
    remember_data(old, recorded, runs / "b" / "a" / "data")
    assert find_data(old / "checkpoints" / "epoch_000.pt", recorded) == runs / "b" / "a" / "data"
    (old / "moved.json").write_text("[]")
    with pytest.raises(InputError, match=r"moved\.json: damaged"):
        find_data(old / "checkpoints" / "epoch_000.pt", recorded)


def test_a_relative_path_of_an_earlier_version_is_seen_from_the_space(runs, monkeypatch):
    monkeypatch.chdir(runs)  # above the project there may be folders called data
    run = runs / "a" / "cnn_space1" / "search-EXP"
    assert find_data(run / "checkpoints" / "epoch_000.pt", "../data") == runs / "a" / "data"


def test_a_run_goes_on_when_its_data_have_moved(tmp_path, capsys):
    fill(tmp_path / "one", {"a": 20, "b": 20})
    flags = ["--dataset", "folder", "--image_size", "8", "--batch_size", "4", *TINY[:-2]]
    space = tmp_path / "cnn_space2"
    search.main(space, Network, Architect, "", [*flags, "--epochs", "2", "--data", str(tmp_path / "one")])
    (tmp_path / "one").rename(tmp_path / "two")
    search.main(space, Network, Architect, "", [*flags, "--epochs", "2", "--data", str(tmp_path / "two")])
    assert "no later command needs --data" in capsys.readouterr().err
    checkpoint = space / "search-EXP" / "checkpoints" / "epoch_000.pt"
    assert find_data(checkpoint, checkpoints.load(checkpoint)["dataset"]["root"]) == tmp_path / "two"


def test_every_spelling_of_a_path_is_one_flag(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "here")
    for spelling in ("x.pt", "./x.pt", "../here/x.pt", str(tmp_path / "here" / "x.pt"), "~/here/x.pt"):
        data, shape, model = parse("", [DataOptions, NetworkOptions, ModelOptions], [
            word for flag in ("data", "init_from", "model_path", "export") for word in (f"--{flag}", spelling)])
        (test,) = parse("", [TestOptions], ["--data", spelling])
        found = {data.data, shape.init_from, model.model_path, model.export, test.data}
        assert found == {str(tmp_path / "here" / "x.pt")}
    assert absolute("../link/../link/x.pt") == str(tmp_path / "link" / "x.pt")
    (shape,) = parse("", [NetworkOptions], ["--arch", "DARTS"])
    assert shape.arch == "DARTS"
    (shape,) = parse("", [NetworkOptions], ["--arch", "ban.json"])
    assert shape.arch == str(tmp_path / "here" / "ban.json")


def test_an_earlier_run_with_a_relative_path_goes_on(tmp_path, monkeypatch):
    space = tmp_path / "cnn_space1"
    space.mkdir()
    genotypes.save(space / "ban.json", GENOTYPES["DARTS"])
    shutil.copy(space / "ban.json", tmp_path / "ban.json")
    monkeypatch.chdir(space)
    flags = ["--dataset", "digits", "--subset", "100", "--batch_size", "30", *TINY]
    train.main(space, space1, "", argv=[*flags, "--arch", "ban.json"])
    record = json.loads((space / "train-EXP" / "args.json").read_text())
    assert record["arguments"]["arch"] == str(space / "ban.json")
    record["arguments"]["arch"] = "ban.json"  # as commit 662cc92 wrote it, without `folders`
    write_json(space / "train-EXP" / "args.json", {"version": record["version"], "arguments": record["arguments"]})
    for cwd, spelling in ((space, "ban.json"), (space, "../cnn_space1/ban.json"), ("/", space / "ban.json")):
        monkeypatch.chdir(cwd)
        train.main(space, space1, "", argv=[*flags, "--arch", str(spelling)])
    genotypes.save(tmp_path / "other.json", GENOTYPES["DARTS"])
    with pytest.raises(InputError, match=r"holds a run with --arch ban\.json"):
        train.main(space, space1, "", argv=[*flags, "--arch", str(tmp_path / "other.json")])
    monkeypatch.chdir(space)
    record["arguments"]["arch"] = str(space / "ban.json")
    write_json(space / "train-EXP" / "args.json", record)
    space.rename(tmp_path / "cnn_space9")  # with the file of its cells in it
    train.main(tmp_path / "cnn_space9", space1, "", argv=[*flags, "--arch", str(tmp_path / "cnn_space9" / "ban.json")])


def test_a_plan_names_data_as_they_are_seen_from_where_it_is_written(tmp_path, monkeypatch, capsys):
    fill(tmp_path / "my data", {"a": 5})
    monkeypatch.chdir(tmp_path)
    flags = "--dataset folder --data 'my data' --epochs 1"
    made = study.plan(study.PlanOptions(flags=flags, train_flags="--arch=ban.json --init_from w.pt --recipe cifar",
                                        stage="train", seeds=3))
    words = made["runs"][0]["commands"]
    assert words[0][:5] == ["train_search.py", "--dataset", "folder", "--data", str(tmp_path / "my data")]
    assert words[1][1:5] == [f"--arch={tmp_path / 'ban.json'}", "--init_from", str(tmp_path / "w.pt"), "--recipe"]
    assert words[1][5] == "cifar"
    study.write_plan(Path("study.json"), made)
    old = study.plan(study.PlanOptions(flags="--dataset folder --data DATA", seeds=3))
    relative = os.path.relpath(tmp_path / "my data", study.ROOT / "cnn_space1")
    for run in old["runs"]:
        run["commands"][0][4] = relative  # as it had to be spelt: seen from the spaces' folders
    write_json("old.json", old)
    study.write_plan(Path("old.json"), study.plan(study.PlanOptions(
        flags=shlex.join(["--dataset", "folder", "--data", "my data"]), seeds=3)))  # the same plan, and no complaint


def test_a_corpus_records_an_absolute_folder(tmp_path, monkeypatch):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a b c\n")
    monkeypatch.chdir(tmp_path)
    assert load_corpus("penn", ".").dataset_info()["root"] == str(tmp_path)
