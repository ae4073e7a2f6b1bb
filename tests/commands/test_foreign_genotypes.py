"""Files of genotypes as other projects write them, put in the place of ours."""
import collections
import dataclasses
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from conas.commands import cells as arch
from conas.darts import genotype as genotypes
from conas.darts.genotype import Genotype
from conas.darts.published import GENOTYPES
from conas.errors import InputError
from conas.recurrent import files as language_files
from conas.recurrent import genotype as recurrent
from conas.recurrent import train as language_train
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import best_checkpoint
from tests.conftest import Clone

# the head and two lines of PC-DARTS' genotypes.py; P-DARTS has the same head
PC_DARTS = """
from collections import namedtuple

Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')
STEPS = 4
PRIMITIVES = ['none', 'max_pool_3x3', 'avg_pool_3x3', 'skip_connect', 'sep_conv_3x3', 'sep_conv_5x5', 'dil_conv_3x3',
              'dil_conv_5x5']
PC_DARTS_cifar = Genotype(normal=[('sep_conv_3x3', 1), ('skip_connect', 0), ('sep_conv_3x3', 0), ('dil_conv_3x3', 1),
    ('sep_conv_5x5', 0), ('sep_conv_3x3', 1), ('avg_pool_3x3', 0), ('dil_conv_3x3', 1)], normal_concat=range(2, 6),
    reduce=[('sep_conv_5x5', 1), ('max_pool_3x3', 0), ('sep_conv_5x5', 1), ('sep_conv_5x5', 2), ('sep_conv_3x3', 0),
    ('sep_conv_3x3', 3), ('sep_conv_3x3', 1), ('sep_conv_3x3', 2)], reduce_concat=range(2, 6))
PCDARTS = PC_DARTS_cifar
"""
EIGHT = [("sep_conv_3x3", 0), ("sep_conv_3x3", 1)] * 4
TINY = ["--dataset", "digits", "--subset", "100", "--init_channels", "2", "--layers", "3", "--epochs", "1",
        "--batch_size", "30"]


def module(text: str = "", **values) -> types.ModuleType:
    """A module of this text, with these names besides."""
    made = types.ModuleType("genotypes")
    exec(text, vars(made))
    vars(made).update(values)
    return made


def test_the_file_of_another_project_serves_training_and_test(bare_clone, tmp_path):
    shutil.copytree(bare_clone.root, tmp_path / "CoNAS")
    clone = Clone(tmp_path / "CoNAS")
    (clone.root / "cnn" / "genotypes.py").write_text(PC_DARTS)
    done = clone.run("cnn/train.py", "--arch", "PC_DARTS_cifar", *TINY)
    assert done.returncode == 0, done.stderr
    weights = tmp_path / "weights.pt"
    torch.save(torch.load(clone.root / "cnn" / "train-EXP" / "checkpoints" / "best.pt", weights_only=True)["state"],
               weights)
    done = clone.run("cnn/test.py", "--arch", "PCDARTS", "--model_path", weights, *TINY[:2], *TINY[4:8])
    assert done.returncode == 0 and "top-1" in done.stdout, done.stderr


@dataclasses.dataclass
class Cells:
    normal: list
    normal_concat: list
    reduce: list
    reduce_concat: list


class Constants:
    normal = reduce = EIGHT
    normal_concat = reduce_concat = range(2, 6)


FOUR = {"normal": EIGHT, "normal_concat": range(2, 6), "reduce": EIGHT, "reduce_concat": range(2, 6)}
WANTED = Genotype(**FOUR)


@pytest.mark.parametrize("value", [
    collections.namedtuple("Genotype", list(FOUR))(**FOUR),
    collections.namedtuple("Other", reversed(list(FOUR)))(**FOUR),
    types.SimpleNamespace(**FOUR), Cells(**FOUR), Constants, FOUR, WANTED,
    FOUR | {"normal": tuple(map(list, EIGHT)), "normal_concat": np.arange(2, 6).tolist()},
    FOUR | {"reduce": [(name, np.int64(source)) for name, source in EIGHT], "reduce_concat": [np.int64(2), 3, 4, 5]},
    Genotype(**FOUR, connectN=None, connects=None), FOUR | {"normal": [EIGHT[:2]] * 4}, list(FOUR.values()),
    collections.namedtuple("Genotype", [*FOUR, "connectN", "connects"])(*FOUR.values(), None, None),
], ids=lambda value: type(value).__name__)
def test_any_object_with_the_four_fields_is_a_genotype(value):
    named = arch.named_genotypes(module(MINE=value))
    assert arch.find_genotype("MINE", named) == WANTED
    assert genotypes.to_json(arch.find_genotype("MINE", named)) == genotypes.to_json(WANTED)


@pytest.mark.parametrize("value, words", [
    (Genotype(**FOUR, steps=4), ("a genotype with 5 fields", "reduce_concat, steps")),
    (Genotype(EIGHT, range(2, 6)), ("2 fields",)),
    (collections.namedtuple("Genotype", "recurrent concat")([("relu", 0)], [1]), ("fields, recurrent, concat",)),
    (EIGHT, ("is a list",)), ({"cell": EIGHT}, ("a dict with 1 fields, cell",)),
], ids=range(5))
def test_another_kind_of_genotype_is_said_to_be_that(value, words):
    with pytest.raises(InputError) as error:
        arch.find_genotype("MINE", arch.named_genotypes(module(MINE=value)))
    assert "unknown" not in str(error.value) and str(error.value).startswith("--arch MINE: is a")
    assert "expected is one with the 4 fields normal, normal_concat, reduce, reduce_concat" in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("change, words", [
    ({"normal": [EIGHT[:3]]}, "normal has 3 edges at node 0; a node has two"),
    ({"reduce": [("sep_conv_3x3", 0, 0.5), *EIGHT]}, "item 0 is ['sep_conv_3x3', 0, 0.5]"),
    ({"reduce": None}, "and not None"), ({"normal": "sep_conv_3x3"}, "and not 'sep_conv_3x3'"),
    ({"reduce_concat": 4}, "and not 4"), ({"normal": [("conv_9x9", 0), *EIGHT[1:]]}, "'conv_9x9', not one of"),
])
def test_fields_of_another_form_are_one_line(change, words):
    value = types.SimpleNamespace(**FOUR | change)
    with pytest.raises(InputError) as error:
        arch.find_genotype("MINE", arch.named_genotypes(module(MINE=value)))
    assert words in str(error.value)


def test_other_names_in_a_file_are_no_cells():
    named = arch.named_genotypes(module(PC_DARTS, os=sys))
    assert set(named) == {*GENOTYPES, "PC_DARTS_cifar", "PCDARTS"}
    with pytest.raises(InputError, match="did you mean PC_DARTS_cifar"):
        arch.find_genotype("pc_darts_cifar10", named)


def test_recurrent_files_alike():
    foreign = collections.namedtuple("Genotype", "recurrent concat")
    mine = foreign([("relu", 0)], range(1, 2))
    named = language_files.named_genotypes(module(PRIMITIVES=["none", "tanh"], MINE=mine))
    assert language_files.find_cell("MINE", named) == recurrent.Genotype([("relu", 0)], range(1, 2))
    wrong = recurrent.Genotype(recurrent=[("relu", 0)], concat=[1], steps=8)
    with pytest.raises(InputError, match="--arch X: is a genotype with 3 fields, recurrent, concat, steps"):
        language_files.find_cell("X", {"X": wrong})
    with pytest.raises(InputError, match=r"--arch DARTS: unknown; genotypes\.py names no cells"):
        language_files.find_cell("DARTS", {})
    with pytest.raises(InputError, match="did you mean Mine"):
        language_files.find_cell("mien", {"Mine": foreign([("relu", 0)], [1])})


def test_a_language_model_is_trained_with_a_file_without_primitives(tmp_path):
    (tmp_path / "text").mkdir()
    lines = (Path(__file__).parents[2] / "data" / "gospels" / "train.txt").read_text().splitlines()[:60]
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    foreign = module(MINE={"recurrent": [("relu", 0)], "concat": [1]})
    language_train.main(tmp_path, foreign, "", ["--data", str(tmp_path / "text"), "--arch", "MINE", "--nhid", "8",
                                                "--batch_size", "64", "--epochs", "1", "--save", "mine"])
    assert checkpoints.load(best_checkpoint(tmp_path / "train-mine"))["primitives"] == [*recurrent.ACTIVATIONS]
