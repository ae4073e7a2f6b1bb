"""Checkpoints know the code of their space: an edit that may change numbers is told, one that cannot is not."""
import shutil
from pathlib import Path

import pytest

from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas.commands import search
from conas.commands.test_all import ScoredRun, score_checkpoints
from conas.darts.space import Space
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs import code
from conas.runs.options import TestOptions
from conas.runs.scores import load_scores
from tests.conftest import ROOT
from tests.helpers.searches import SMALL, no_pictures  # noqa: F401

TINY = [*SMALL, "--subset", "40", "--test_subset", "40", "--batch_size", "20"]
OWN = '''"""A space."""
import torch

PRIMITIVES = ("none", "own")


def own(C, stride, affine):
    """One."""
    return torch.nn.AvgPool2d(3, stride, 1)


OPERATIONS = {"own": own}
'''
HARMLESS = {
    "comment": lambda text: text + "# and this\n",
    "docstrings": lambda text: text.replace("A space.", "Another.").replace('    """One."""\n', ""),
    "layout": lambda text: text.replace('("none", "own")', '(\n    "none",\n    "own",\n)'),
    "a genotype": lambda text: "from conas.darts.genotype import Genotype\n" + text +
                               "BEST = Genotype(normal=[], normal_concat=[], reduce=[], reduce_concat=[])\n"}
HARMFUL = {
    "a number": lambda text: text.replace("stride, 1", "stride, 2"),
    "a name": lambda text: text.replace("AvgPool2d", "MaxPool2d"),
    "an order": lambda text: text.replace('("none", "own")', '("own", "none")'),
    "what is left": lambda text: text.replace("PRIMITIVES =", "pass\nPRIMITIVES ="),
    "a cell of data": lambda text: text + "WEIGHTS = dict(normal=[1])\n"}


@pytest.fixture(autouse=True)
def forget():
    """What a process has read and told it does not read and tell again."""
    def clear():
        code.digests.cache_clear()
        code._told.clear()
    clear()
    yield clear
    clear()


def write(folder: Path, genotypes: str, **files: str) -> dict[str, str]:
    folder.mkdir(parents=True)
    for name, text in (files | {"genotypes": genotypes}).items():
        (folder / f"{name}.py").write_text(text)
    return code.digests(folder, "search")


@pytest.mark.parametrize("edit", [*HARMLESS, *HARMFUL])
def test_only_an_edit_that_may_change_numbers_counts(tmp_path, edit):
    change = (HARMLESS | HARMFUL)[edit]
    assert change(OWN) != OWN
    same = write(tmp_path / "before", OWN) == write(tmp_path / "after", change(OWN))
    assert same == (edit in HARMLESS)


def test_files_of_the_folder_that_are_imported_count_too(tmp_path):
    importing = "if True:\n    from .blocks import own\n"
    one, other = (write(tmp_path / name, importing, blocks=OWN + more, unused=name, torch="") for name, more in
                  (("one", ""), ("other", "more = 1\n")))
    assert one.keys() == {"genotypes.py", "blocks.py", "torch.py"} and one["blocks.py"] != other["blocks.py"]
    assert {"genotypes.py", "model_search.py", "architect.py", "train_search.py"} == code.digests(
        ROOT / "cnn_space1", "search").keys()
    assert {"genotypes.py", "train.py"} == code.digests(ROOT / "cnn_space1", "train").keys()
    assert code.digests(tmp_path, "search") == {}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A search of two epochs in a folder that has the code of space 2."""
    folder = tmp_path_factory.mktemp("whole") / "cnn_space2"
    folder.mkdir()
    for name in ("genotypes.py", "model_search.py", "architect.py"):
        shutil.copy(ROOT / "cnn_space2" / name, folder)
    search.main(folder, Network, Architect, "", [*TINY, "--epochs", "2"])
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of that run that a test may spoil."""
    return Path(shutil.copytree(whole, tmp_path / "cnn_space2")) / "search-EXP"


def edit(run: Path, name: str, text: str) -> None:
    with open(run.parent / name, "a", encoding="utf-8") as file:
        file.write(text)


def test_all(run: Path) -> list[dict]:
    return score_checkpoints(ScoredRun(Space("cnn_space2", run.parent, Network), "search", TestOptions(device="cpu"),
                                       show=lambda text: None))


test_all.__test__ = False


def test_changed_code_is_told_once_and_its_scores_are_not_used_again(run, forget, capsys):
    assert checkpoints.load(run / "checkpoints" / "epoch_001.pt")["code"].keys() == {
        "genotypes.py", "model_search.py", "architect.py"}
    rows = test_all(run)
    assert "changed" not in capsys.readouterr().err
    shutil.rmtree(run / "probabilities")
    before = (run.parent / "genotypes.py").read_text()
    for text in ("# a comment\n", "OPERATIONS = {}\n", "OPERATIONS = {}\n"):
        edit(run, "genotypes.py", text)
        edit(run, "architect.py", "x = 1\n")  # is not what a checkpoint computes with
        forget()
        assert test_all(run) == rows
        told = [line for line in capsys.readouterr().err.splitlines() if "changed" in line]
        assert len(told) == ("#" not in text)
        if told:
            assert told[0].startswith("note: genotypes.py of cnn_space2 changed") and "epoch_000.pt" in told[0]
            assert load_scores(run / "probabilities" / "epoch_001.npz").changed == "genotypes.py"
        else:
            shutil.rmtree(run / "probabilities")
    (run.parent / "genotypes.py").write_text(before)
    forget()
    test_all(run)
    assert not load_scores(run / "probabilities" / "epoch_001.npz").changed


def test_a_search_that_goes_on_with_changed_code_logs_it(run, forget, capsys):
    edit(run, "architect.py", "x = 1\n")
    edit(run, "model_search.py", "x = 1\n")
    forget()
    search.main(run.parent, Network, Architect, "", [*TINY, "--epochs", "3", "--extend"])
    line, = [line for line in (run / "log.txt").read_text().splitlines() if "changed" in line]
    assert line.startswith("note: architect.py, model_search.py of cnn_space2 changed after") and "resume.pt" in line
    assert capsys.readouterr().err.count("changed") == 0
    first, last = (checkpoints.load(run / "checkpoints" / f"epoch_00{i}.pt")["code"] for i in (0, 2))
    assert first != last == code.digests(run.parent, "search")


def test_an_old_checkpoint_says_nothing_and_a_wrong_one_is_refused(run, capsys):
    path = run / "checkpoints" / "epoch_001.pt"
    whole = checkpoints.load(path)
    for changed in ({"genotypes.py": "0"}, {}, None):
        checkpoint = whole | {"code": changed}
        if changed is None:
            del checkpoint["code"]
        checkpoints.save(path, checkpoint)
        checkpoints.restore(path, checkpoints.load(path), "cnn_space2", Network, folder=run.parent)
        assert ("changed" in capsys.readouterr().err) == bool(changed)
        code._told.clear()
    for wrong in (["genotypes.py"], {"genotypes.py": 3}, {"a\nb.py": "0"}, {"../a.py": "0"}, "x"):
        checkpoints.save(path, whole | {"code": wrong})
        with pytest.raises(InputError, match=r"epoch_001\.pt: its field 'code'"):
            checkpoints.load(path)
