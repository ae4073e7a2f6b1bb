"""An operation of a space's own: a few lines in the genotypes.py of a copied folder, and no other file touched."""
import json
import shutil

import pytest
import torch

from conas import cli
from conas.commands import search
from conas.darts.architect import Bilevel
from conas.darts.supernet import Supernet
from conas.runs.checkpoint import load
from tests.conftest import Clone

DATA = ["--dataset", "digits", "--subset", "120"]
SMALL = [*DATA, "--init_channels", "2", "--layers", "3", "--batch_size", "30"]
OWN = '''
from torch import nn

PRIMITIVES = ("none", "skip_connect", "conv_3x3")
OPERATIONS = {"conv_3x3": lambda C, stride, affine: nn.Sequential(
    nn.ReLU(), nn.Conv2d(C, C, 3, stride, 1, bias=False), nn.BatchNorm2d(C, affine=affine))}
'''
KNOWN = 'PRIMITIVES = ("none", "skip_connect", "max_pool_3x3")\n'


def one_line_error(done, *words):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stdout + done.stderr
    for word in words:
        assert word in lines[0], lines[0]


def right(done):
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def clone(bare_clone, tmp_path_factory) -> Clone:
    """A clone in which three known spaces and one with an operation of its own were searched."""
    root = tmp_path_factory.mktemp("own") / "CoNAS"
    shutil.copytree(bare_clone.root, root)
    shutil.copytree(root / "cnn_space3", root / "cnn_space4")
    (root / "cnn_space4" / "genotypes.py").write_text(OWN)
    clone = Clone(root)
    for space in ("cnn_space1", "cnn_space2", "cnn_space3", "cnn_space4"):
        out = right(clone.run(f"{space}/train_search.py", *SMALL, "--epochs", "1"))
        assert ("conv_3x3 (Sequential)" in out and "by its definition" in out) == (space == "cnn_space4")
    return clone


@pytest.fixture
def copy(clone, tmp_path) -> Clone:
    """A copy of it that a test may spoil."""
    shutil.copytree(clone.root, tmp_path / "CoNAS")
    return Clone(tmp_path / "CoNAS")


def choose_own(run) -> None:
    """Make every edge of what a run has found the operation of the space's own."""
    path = run / "genotype.json"
    cells = json.loads(path.read_text())
    for kind in ("normal", "reduce"):
        cells[kind] = [["conv_3x3", source] for _, source in cells[kind]]
    path.write_text(json.dumps(cells))


def test_the_whole_chain(copy, tmp_path):
    space, run = copy.root / "cnn_space4", copy.root / "cnn_space4" / "search-EXP"
    for name, *flags in (("first", "--no-unrolled"), ("exact", "--hvp", "exact")):
        right(copy.run("cnn_space4/train_search.py", *SMALL, "--epochs", "1", "--save", name, *flags))
    before, after = (load(space / f"search-{name}" / "checkpoints" / "epoch_000.pt")["state"]["alphas_normal"]
                     for name in ("first", "exact"))
    assert not torch.equal(before, after)
    right(copy.run("cnn_space4/test_all.py"))
    right(copy.run("test_ensemble.py", "--report"))
    choose_own(run)
    right(copy.run("cnn_space4/train.py", *DATA, "--init_channels", "4", "--layers", "3", "--batch_size", "30",
                   "--epochs", "2", "--auxiliary", "--drop_path_prob", "0.3", "--valid_portion", "0.2"))
    checkpoint = load(space / "train-EXP" / "checkpoints" / "best.pt")
    assert checkpoint["genotype"]["normal"][0][0] == "conv_3x3"
    assert "parameters" in right(copy.run("cnn_space4/test.py"))
    right(copy.run("cnn_space4/test_all.py", "--stage", "train"))
    right(copy.run("cnn_space4/train.py", *DATA, "--init_from", space / "train-EXP" / "checkpoints" / "best.pt",
                   "--batch_size", "30", "--epochs", "1", "--auxiliary", "--save", "fine"))
    right(copy.run("-m", "conas.draw", run / "genotype.json", "--out", tmp_path / "cells", cwd=copy.root))
    right(copy.run("-m", "conas.draw.animate", run, cwd=copy.root))
    assert (run / "cells" / "normal.gif").exists() and "conv 3" in (tmp_path / "cells" / "normal.svg").read_text()
    # The code is the space's: without it nothing of the checkpoint is guessed.
    (space / "genotypes.py").write_text(KNOWN)
    one_line_error(copy.run("cnn_space4/test.py"), "best.pt", "conv_3x3", "OPERATIONS", "genotypes.py")
    flags = [*DATA, "--init_channels", "4", "--layers", "3", "--batch_size", "30", "--epochs", "1", "--arch",
             run / "genotype.json"]
    one_line_error(copy.run("cnn/train.py", *flags), "conv_3x3", "OPERATIONS")


@pytest.mark.parametrize("genotypes, says", [
    (OWN.replace('"conv_3x3")', '"conv3x3")'), ["'conv3x3'", "conv_3x3"]),
    ("PRIMITIVES = ()\n", ["empty"]),
    ('PRIMITIVES = ("none",)\n', ["other than none"]),
    (OWN.replace('"skip_connect"', '"conv_3x3"'), ["conv_3x3 is there twice"]),
    (OWN.replace("3, stride, 1", "3, 1, 1"), ["conv_3x3", "(2, 2, 8, 8)", "(2, 2, 4, 4)", "stride 2"]),
    (OWN.replace("nn.ReLU()", "nn.ReLU(inplace=True)"), ["conv_3x3", "inplace=False"]),
    (OWN.replace("Conv2d(C, C", "Conv2d(C + 1, C"), ["conv_3x3", "fails", "C=2"]),
    ('PRIMITIVES = ("skip_connect",)\nOPERATIONS = ["conv_3x3"]\n', ["OPERATIONS", "dict"]),
])
def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path, capsys, genotypes, says):
    space = {}
    exec(genotypes, space)
    network = type("Network", (Supernet,), {"primitives": space["PRIMITIVES"],
                                            "operations": space.get("OPERATIONS", {})})
    assert cli.run(lambda: search.main(tmp_path / "cnn_space2", network, Bilevel, "", [*SMALL, "--epochs", "1"])) == 2
    line, = capsys.readouterr().err.splitlines()
    assert all(word in line for word in says), line
    assert not (tmp_path / "cnn_space2" / "search-EXP" / "checkpoints").exists()


def test_a_script_refuses_them_too(copy):
    (copy.root / "cnn_space2" / "genotypes.py").write_text("PRIMITIVES = ()\n")
    one_line_error(copy.run("cnn_space2/train_search.py", *SMALL, "--epochs", "1", "--save", "new"), "empty")
