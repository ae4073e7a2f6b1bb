"""Model descriptions of archai: a real one, written by PyYAML with the tags of its classes, and what is refused."""
import enum
import json
import sys

import pytest

from conas.darts.genotype import Genotype
from conas.errors import InputError
from conas.exchange.__main__ import main
from conas.exchange.cells import FORMS, find_cell
from tests.conftest import ROOT

yaml = pytest.importorskip("yaml")
FACTS = json.loads((ROOT / "tests" / "fixtures" / "cells.json").read_text())["forms"]["archai"]
BY_EYE = Genotype(
    [("sep_conv_3x3", 0), ("sep_conv_5x5", 1), ("sep_conv_3x3", 0), ("sep_conv_5x5", 1), ("max_pool_3x3", 0),
     ("dil_conv_5x5", 2), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1)], range(2, 6),
    [("max_pool_3x3", 0), ("sep_conv_5x5", 1), ("dil_conv_5x5", 2), ("max_pool_3x3", 0), ("dil_conv_5x5", 3),
     ("max_pool_3x3", 0), ("avg_pool_3x3", 1), ("sep_conv_5x5", 2)], range(2, 6))

MODULE = "archai.nas.model_desc"


def of_archai(name, /, **fields):
    """An object whose class PyYAML calls by its name in archai."""
    made = type(name, (), {"__module__": MODULE})()
    vars(made).update(fields)
    return made


CellType = enum.Enum("CellType", {"Regular": "regular", "Reduction": "reduction"}, module=MODULE)


def operation(name, /, **params):
    shape = of_archai("ConvMacroParams", ch_in=16, ch_out=16)
    return of_archai("OpDesc", name=name, in_len=1, params={"conv": shape, **params}, trainables=None, children=None)


def description(facts=FACTS, out_states=4):
    """The text of a model description with these cells, as archai writes it."""
    cells = [of_archai("CellDesc", id=i, cell_type=CellType(kind), max_final_edges=2, s0_op=operation("prepr_normal"),
                       post_op=operation("concate_channels", out_states=out_states), _nodes=[
                           of_archai("NodeDesc", edges=[of_archai("EdgeDesc", input_ids=[source], op_desc=operation(
                               name, stride=1)) for name, source in node]) for node in facts[kind]])
             for i, kind in enumerate(facts["types"])]
    return yaml.dump(of_archai("ModelDesc", _cell_descs=cells, n_classes=10, ds_ch=3, aux_tower_descs=[None] * 8))


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        (tmp_path / "cell.yaml").write_text(text)
        return "cell.yaml"
    return write


def test_the_real_example(file, capsys):
    text = description()
    assert text.startswith("!!python/object:archai.nas.model_desc.ModelDesc") and "&id001 !!python/object" in text
    assert find_cell(file(text), {}) == (BY_EYE, "cell.yaml: YAML of a model description of archai")
    main(["cell.yaml", "--to", "genotype"])
    assert capsys.readouterr().out == f"{BY_EYE}\n"


def test_it_is_not_written(capsys):
    assert FORMS["archai"].write is None
    with pytest.raises((SystemExit, InputError)):
        main(["PDARTS", "--to", "archai"])


EDGES = FACTS["regular"]


@pytest.mark.parametrize("changes, words", [
    ({"types": ["regular"] * 8}, "has no cell of the cell_type reduction"),
    ({"types": []}, "has no cell of the cell_type regular"),
    ({"regular": EDGES[:3]}, "cell 0: cells of 4 nodes are read, and not of 3"),
    ({"regular": [*EDGES[:3], [*EDGES[3], ["none", 2]]]}, "cell 0: its node 3 has 3 edges"),
    ({"regular": [[["sep_conv_3x3", 0], ["sep_conv_3x3", 4]], *EDGES[1:]]}, "node 0 reads only states 0 to 1"),
    ({"regular": [[["sep_conv_3x3", 0], ["sep_conv_9x9", 1]], *EDGES[1:]]}, "'sep_conv_9x9', not one of"),
])
def test_what_is_no_genotype_is_refused(file, changes, words):
    with pytest.raises(InputError, match=words) as error:
        find_cell(file(description(FACTS | changes)), {})
    assert str(error.value).startswith("--arch cell.yaml: ") and len(str(error.value)) < 500


def test_cells_that_differ_have_no_genotype(file):
    first, second = description().split("sep_conv_5x5", 1)
    with pytest.raises(InputError, match="its normal cells 0 and 1 differ"):
        find_cell(file(f"{first}sep_conv_3x3{second}"), {})
    with pytest.raises(InputError, match="post_op must be concate_channels of 4 states"):
        find_cell(file(description(out_states=3)), {})


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefghi", "bcdefghij"))


@pytest.mark.parametrize("text, words", [
    ("!!python/object/apply:os.system ['touch ran']", "is a list, and cannot be read"),
    ("_cell_descs: !!python/object/apply:os.system ['touch ran']", "cell 0: has no cell_type"),
    (BOMB, "more than 100000 values"), ("&a [*a]", "recursion"), ("[" * 3000, "cannot be read as YAML"),
    ("", "it is empty"), ("a: 1\na: 2", "the same key twice"), ("? [1, 2]\n: 3", "a key that is no text"),
    ("a: [", "cannot be read as YAML"), ("--- 1\n--- 2", "cannot be read as YAML"), ("x" * 2**21, "characters"),
    ("_cell_descs: 3", "_cell_descs must be a list"), ("_cell_descs: [3]", "cell 0: has no cell_type"),
    ("_cell_descs: [{cell_type: [[regular]]}]", "its cell_type must be regular or reduction"),
    ("\x00", "cannot be read as YAML"),
])
def test_no_yaml_runs_or_grows(file, tmp_path, text, words):
    with pytest.raises(InputError, match=words) as error:
        find_cell(file(text), {})
    assert len(str(error.value)) < 500 and not (tmp_path / "ran").exists()


def test_any_form_may_be_written_as_yaml(file):
    text = yaml.safe_dump({"normal": [list(edge) for edge in BY_EYE.normal], "normal_concat": [2, 3, 4, 5],
                           "reduce": [list(edge) for edge in BY_EYE.reduce], "reduce_concat": [2, 3, 4, 5]})
    assert find_cell(file(text), {}) == (BY_EYE, "cell.yaml: the four fields of DARTS")


def test_the_package_is_missing(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InputError, match=r"--arch cell\.yaml: YAML needs .*; pip install pyyaml$"):
        find_cell(file(description()), {})
