"""The cells that the authors of CoNAS published: each of its space's primitives, and usable by name."""
from importlib import import_module

import pytest

from conas.commands import train
from conas.darts.derived import NetworkCIFAR, count_parameters
from conas.darts.genotype import check
from conas.darts.published import GENOTYPES, named_genotypes
from conas.draw import cell

SPACES = ["cnn_space1", "cnn_space2", "cnn_space3"]


@pytest.mark.parametrize("space", SPACES)
def test_the_authors_cell_of_a_space_is_of_its_primitives(space, tmp_path, capsys):
    module = import_module(f"{space}.genotypes")
    check(module.CONAS, space, set(module.PRIMITIVES) - {"none"})
    assert [len(cell) for cell in module.CONAS] == [8, 4, 8, 4]
    train.main(tmp_path / space, module, "", argv=["--dataset", "digits", "--arch", "CONAS", "--check_only"])
    assert "all checks passed" in capsys.readouterr().out


def test_they_are_three_different_networks_of_the_size_of_darts():
    sizes = [count_parameters(NetworkCIFAR(36, 10, 20, False, import_module(f"{space}.genotypes").CONAS))
             for space in SPACES]
    assert len(set(sizes)) == 3 and all(3.3e6 < size < 4e6 for size in sizes), sizes  # DARTS_V2: 3.3 million


def test_they_are_drawn_by_name(tmp_path, capsys):
    names = [f"{space}/CONAS" for space in SPACES]
    cell.main(["--committee", *names, "--layers", "3", "--out", str(tmp_path / "committee.svg")])
    assert (tmp_path / "committee.svg").exists()
    cell.main(["own=cnn_space1/CONAS", "cnn_space2/CONAS", "DARTS_V2", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["DARTS_V2", "cnn_space2-CONAS", "own"]
    for label in ("sep_conv_3x3", "dil_conv_5x5"):
        assert label in (tmp_path / "own" / "normal.svg").read_text()


@pytest.mark.parametrize("folder", [*SPACES, "cnn"])
def test_a_spaces_tables_are_offered_as_no_cells(folder):
    """`--arch NOPE` lists what may be meant."""
    assert set(named_genotypes(import_module(f"{folder}.genotypes"))) - set(GENOTYPES) <= {"CONAS"}
