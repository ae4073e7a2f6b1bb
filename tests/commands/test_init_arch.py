"""--init_arch: what the first alphas are, that a run goes on without its file, and what is refused."""
import json
from importlib import import_module

import pytest
import torch

from conas.commands import search
from conas.commands.cells import choose_cells
from conas.commands.init_arch import initial_cell, lean
from conas.darts.genotype import Genotype, to_json
from conas.darts.published import GENOTYPES
from conas.darts.space import Space
from conas.errors import InputError
from conas.runs.checkpoint import load
from conas.runs.options import AlphaOptions, NetworkOptions
from tests.conftest import ROOT
from tests.helpers.searches import SMALL, no_pictures  # noqa: F401  a fixture

SKIP = "skip_connect"
CELL = Genotype([(SKIP, 1), ("sep_conv_5x5", 0), (SKIP, 2), ("dil_conv_5x5", 0), ("sep_conv_5x5", 3), (SKIP, 1),
                 ("dil_conv_5x5", 4), ("sep_conv_5x5", 2)], range(2, 6),
                [("dil_conv_5x5", 0), (SKIP, 1)] * 4, range(2, 6))


def network(space="cnn_space1"):
    torch.manual_seed(0)
    return import_module(f"{space}.model_search").Network(C=2, layers=3)


@pytest.mark.parametrize("space, name", [("cnn_space1", "PDARTS"), ("cnn_space1", "DrNAS_imagenet")])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_operations_of_the_cell_begin_with_the_share(space, name, share):
    cells, plain, leaning = GENOTYPES[name], network(space), network(space)
    lean(leaning, cells, share)
    assert all(torch.equal(p, q) for p, q in zip(plain.weights().values(), leaning.weights().values()))
    for kind in ("normal", "reduce"):
        shares, edges = getattr(leaning, f"alphas_{kind}").softmax(-1), getattr(cells, kind)
        rows = [sum(range(2, 2 + i // 2)) + source for i, (_, source) in enumerate(edges)]  # 2, 3, 4, 5 into each node
        found = shares[rows, [leaning.primitives.index(operation) for operation, _ in edges]]
        torch.testing.assert_close(found, torch.full((8,), share), atol=2e-3, rtol=0)
        others = [row for row in range(14) if row not in rows]
        assert torch.equal(getattr(leaning, f"alphas_{kind}")[others], getattr(plain, f"alphas_{kind}")[others])
        ordered = [sorted(getattr(leaning.genotype(), kind)[i:i + 2]) for i in range(0, 8, 2)]
        assert ordered == [sorted(edges[i:i + 2]) for i in range(0, 8, 2)]


def replaced(index, edge):
    edges = list(CELL.normal)
    edges[index] = edge
    return CELL._replace(normal=edges)


@pytest.mark.parametrize("cells, share, words", [
    (GENOTYPES["NASNet"], 0.5, "this normal cell has 5 and concatenates"),
    (replaced(1, (SKIP, 1)), 0.5, "normal cell has two edges from state 1 to node 0"),
    (replaced(1, ("sep_conv_7x7", 0)), 0.5, "normal cell has sep_conv_7x7 on the edge from state 0 to node 0"),
    (replaced(7, ("none", 2)), 0.5, "has none on the edge from state 2 to node 3"),
    (CELL, 0.05, "--init_share 0.05: too small"),
])
def test_cells_that_no_search_of_the_space_ends_with_are_refused(cells, share, words):
    lean(network("cnn_space3"), CELL, 0.5)
    with pytest.raises(InputError, match=words):
        lean(network("cnn_space3"), cells, share)


def run(folder, *flags):
    space = import_module("cnn_space3.model_search"), import_module("cnn_space3.architect")
    search.main(folder / "cnn_space3", space[0].Network, space[1].Architect, "", [*SMALL, *flags])
    return folder / "cnn_space3" / "search-EXP"


def test_a_run_goes_on_without_the_file(tmp_path, monkeypatch):
    file = tmp_path / "cells.py"
    file.write_text(f"mine = {CELL}\nother = {GENOTYPES['DARTS_V1']}\n")
    flags = ["--init_arch", f"{file}:mine", "--arch_learning_rate", "0.03", "--epochs", "2"]
    whole = run(tmp_path / "whole", *flags)
    assert f"share of 0.5 for each operation of {file}:mine (mine in cells.py: the four fields of DARTS)" in (
        whole / "log.txt").read_text()
    arguments = load(whole / "checkpoints" / "epoch_001.pt")["arguments"]
    assert (arguments["init_arch"], arguments["init_share"], arguments["init_cell"]) == (f"{file}:mine", 0.5, str(CELL))

    after_epoch = search.SearchRun.write_epoch

    def stop(self):
        after_epoch(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search.SearchRun, "write_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", *flags)
    with pytest.raises(InputError, match=rf"holds a run with --init_arch {file}:mine \(now CONAS\)"):
        run(tmp_path / "cut", "--init_arch", "CONAS", *flags[2:])
    with pytest.raises(InputError, match=r"--init_share 0\.5 \(now 0\.4\)"):
        run(tmp_path / "cut", "--init_share", "0.4", *flags[2:])
    file.unlink()
    cut = run(tmp_path / "cut", *flags[2:])  # without the flag
    assert f"of {file}:mine (as recorded when the run began)" in (cut / "log.txt").read_text()
    states = [load(folder / "checkpoints" / "epoch_001.pt")["state"] for folder in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert json.loads((cut / "args.json").read_text())["arguments"]["init_cell"] == str(CELL)
    run(tmp_path / "cut", *flags)  # with the flag, as it was


def test_the_text_of_a_cell_is_said_in_one_line():
    text = json.dumps(to_json(GENOTYPES["PDARTS"]), indent=1)
    space = Space("cnn_space1", ROOT / "cnn_space1", import_module("cnn_space1.model_search").Network)
    _, searched = initial_cell(space, AlphaOptions(init_arch=text), {})[1:]
    found, trained = choose_cells(space, space.primitives, GENOTYPES, NetworkOptions(arch=text), None)
    assert found == GENOTYPES["PDARTS"]
    for words in (searched, trained):
        assert "\n" not in words and len(words) < 300 and words.endswith(" (text: the four fields of DARTS)")


@pytest.mark.parametrize("flags, words", [
    (["--init_share", "0.4"], "--init_share 0.4: says how far the alphas of --init_arch lean"),
    (["--init_arch", "PDRATS"], "--init_arch PDRATS: unknown; did you mean PDARTS"),
    (["--init_arch", "none.yaml"], r"--init_arch .*none\.yaml: cannot be read as a genotype"),
    (["--init_arch", "PDARTS"], "where a search in this space can choose"),
])
def test_wrong_flags_leave_nothing_behind(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        run(tmp_path, *flags)
    assert not (tmp_path / "cnn_space3").exists()
