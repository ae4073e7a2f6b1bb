"""What a user may name, and what of it is said: files with several cells, logs, texts; and nothing in a file runs."""
import json
import pickle

import pytest

from conas.darts.genotype import to_json
from conas.darts.published import GENOTYPES, SOURCES
from conas.draw import cell as draw
from conas.errors import InputError
from conas.exchange.__main__ import main
from conas.exchange.cells import FORMS, find_cell
from tests.conftest import ROOT
from tests.helpers.launch import start

V1, V2 = GENOTYPES["DARTS_V1"], GENOTYPES["DARTS_V2"]
GENOTYPES_PY = f"""
import os
from collections import namedtuple
import torch.nn as nn

Genotype = namedtuple('Genotype', 'normal normal_concat reduce reduce_concat')
Swapped = namedtuple('Swapped', ['reduce', 'reduce_concat', 'normal', 'normal_concat'])
PRIMITIVES = ['none', 'max_pool_3x3']
one = {V1}
two = Genotype({V2.normal}, list(range(2, 6)), {V2.reduce}, range(2, 6))
three = Swapped({V1.reduce}, range(2, 6), {V1.normal}, range(2, 6))
again = two
computed = os.system('touch ran')
class Other:
    pass
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "genotypes.py"
    path.write_text(GENOTYPES_PY)
    return path


def test_a_file_with_several_names(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_cell(f"{file}:one", {}) == (V1, "one in genotypes.py: the four fields of DARTS")
    assert find_cell("genotypes.py:two", {}).genotype == find_cell("genotypes.py:again", {}).genotype == V2
    assert find_cell("genotypes.py:three", {}).genotype == V1
    with pytest.raises(InputError, match=r"has 2 cells, one, two; name one, as genotypes\.py:two"):
        find_cell("genotypes.py", {})
    for name, words in (("on", "it has one"), ("x", "it has one, two, three, again"), ("nn", "has no cell called nn"),
                        ("computed", "cannot be read"), ("PRIMITIVES", "cannot be read")):
        with pytest.raises(InputError, match=words):
            find_cell(f"genotypes.py:{name}", {})
    file.write_text(f"cell = {V1}")
    assert find_cell("genotypes.py", {}) == (V1, "cell in genotypes.py: the four fields of DARTS")
    assert not (tmp_path / "ran").exists()


def test_names_come_first_and_an_own_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PDARTS").write_text(str(V1))
    assert find_cell("PDARTS", GENOTYPES) == (GENOTYPES["PDARTS"], SOURCES["PDARTS"])
    assert find_cell("./PDARTS", GENOTYPES).genotype == V1
    assert find_cell("PDARTS", GENOTYPES | {"PDARTS": V2}) == (V2, "genotypes.py: the four fields of DARTS")


def test_a_log_whose_lines_have_cells(tmp_path):
    log = tmp_path / "log.txt"
    line = "2019-04-20 08:10:13,1 genotype = {}\n"
    log.write_text("args = Namespace(x=1)\n" + line.format(V1) * 2)
    assert find_cell(str(log), {}).genotype == V1
    log.write_text(log.read_text() + "epoch 2 lr 1e-3\n" + line.format(V2))
    with pytest.raises(InputError, match=r"has 2 cells, 2, 5; name one, as log\.txt:5"):
        find_cell(str(log), {})
    assert find_cell(f"{log}:5", {}).genotype == V2


@pytest.mark.parametrize("text", [
    "__import__('os').system('touch ran')", "[].append(open('ran', 'w'))", "Genotype(normal=open('ran', 'w'))",
    "(lambda: open('ran', 'w'))()", "{'normal': [x for x in [open('ran', 'w')]]}", "f'{open(chr(114), chr(119))}'",
    "range(10**12)", "(" * 5000, "[" * 5000, "Genotype(*[1], **{'a': 1})", "{1: 2}", "{**{}}", "x = 1", "(1 +", "(\0)",
    "range(1, 2, 0)", "Genotype()", "[1]", "{}", "(1e999)", "[" + "9" * 5000 + "]", "x" * 3000 + "(",
])
def test_no_text_runs_and_what_is_no_cell_is_one_line(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        find_cell(text, GENOTYPES)
    assert len(str(error.value)) < 600
    (tmp_path / "cells.py").write_bytes(text.encode())
    with pytest.raises(InputError, match=r"--arch cells\.py: "):
        find_cell("cells.py", GENOTYPES)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "r").exists()


def test_pickles_and_unreadable_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cell.pkl").write_bytes(pickle.dumps(to_json(V1)))
    (tmp_path / "big.py").write_text("x = 1\n" * 200_000)
    (tmp_path / "twice.json").write_text('{"normal": 1, "normal": 2}')
    for name, words in (("cell.pkl", "never from pickles"), ("big.py", "1200000 characters"),
                        ("none.py", "No such file"), ("none.py:x", "No such file"), (".", "is a folder"),
                        ("./..:x", "is a folder"),
                        ("twice.json", "the same key twice"),
                        ("x" * 5000, "unknown; did you mean"), ("a\0b", "unknown")):
        with pytest.raises(InputError, match=words):
            find_cell(name, GENOTYPES)


def test_a_dict_of_cells_is_cells_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = {"one": to_json(V1), "two": to_json(V2), "year": 2019}
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    (tmp_path / "cells.py").write_text(f"CELLS = {cells}\nthree = {V1}")
    for file in ("cells.json", "cells.py"):
        assert find_cell(f"{file}:two", {}) == (V2, f"two in {file}: the four fields of DARTS")
        with pytest.raises(InputError, match=rf"has 2 cells, one, two; name one, as {file}:two"):
            find_cell(file, {})
    with pytest.raises(InputError, match="has no cell called year; it has one, two"):
        find_cell("cells.json:year", {})
    assert find_cell("cells.py:three", {}).genotype == V1


@pytest.mark.parametrize("text", [str(V1), json.dumps(to_json(V1)), f"cell = {V1}", f"2019 genotype = {V1}"])
def test_files_of_windows_begin_with_a_mark(text, tmp_path):
    path = tmp_path / "cell.txt"
    path.write_bytes(f"{text}\r\n".encode("utf-8-sig"))
    assert find_cell(str(path), {}).genotype == V1


def test_an_unknown_form_is_refused_with_where_the_known_ones_are_listed():
    for text in ('{"layers": [1, 2]}', "[1, 2]", "Net(cells=3)"):
        with pytest.raises(InputError, match=r"expected is one with the 4 fields .* or another form of those that "
                                             r"`python -m conas\.exchange --help` lists$"):
            find_cell(text, {})


def test_the_command(tmp_path, capsys):
    main(["DARTS_V1", "--to", "nni3", "--out", str(tmp_path / "cell.json")])
    assert "normal/op_2_0" in json.loads((tmp_path / "cell.json").read_text())
    assert capsys.readouterr().err == f"read: {SOURCES['DARTS_V1']}\n"
    main([str(tmp_path / "cell.json"), "--to", "genotype"])
    out, err = capsys.readouterr()
    assert out == f"{V1}\n" and err == "read: cell.json: JSON of NNI 3.0\n"
    done = start("-m", "conas.exchange", "NASNet", "--to", "compact", "--out", str(tmp_path / "no.json"), cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("error: --to compact: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".py", ".txt", ".log", ""])
@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.write])
def test_what_is_written_is_read_again_or_is_not_written(form, suffix, tmp_path):
    path = tmp_path / f"cell{suffix}"
    if suffix in (".json", ".yaml") and form in ("genotype", "pt.darts", "autodl"):
        with pytest.raises(InputError, match=rf"--out .*{suffix}: --to {form} is written as Python has it; name"):
            main(["PDARTS", "--to", form, "--out", str(path)])
        assert not path.exists()
    else:
        main(["PDARTS", "--to", form, "--out", str(path)])
        assert find_cell(str(path), {}).genotype == GENOTYPES["PDARTS"]


def test_drawing_takes_any_form(file, tmp_path, capsys):
    draw.main([f"{file}:one", "DARTS_V2", str(V1), "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["DARTS_V2", "cell", "one"]
    pictures = [(tmp_path / "out" / name / "normal.svg").read_bytes() for name in ("one", "cell", "DARTS_V2")]
    assert pictures[0] == pictures[1] != pictures[2]
    assert "one: one in genotypes.py: the four fields of DARTS\n" in capsys.readouterr().err
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match=r"folder\.json: is a folder, .* for its cells name its genotype\.json"):
        draw.main([str(tmp_path / "folder.json"), "--out", str(tmp_path / "out")])
