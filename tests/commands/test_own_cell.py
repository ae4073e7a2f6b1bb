"""The cell of docs/extending.md, partial channels with edge normalisation, from its gradients to the committee."""
import re
import runpy
import shutil
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from conas.darts.architect import Bilevel
from conas.engine.door import why_not
from conas.runs.checkpoint import load
from tests.conftest import ROOT, Clone

SMALL = ["--dataset", "digits", "--subset", "120", "--init_channels", "8", "--layers", "3", "--batch_size", "30",
         "--epochs", "1"]


@pytest.fixture(scope="module")
def code() -> str:
    """The page's model_search.py."""
    page = (ROOT / "docs" / "extending.md").read_text()
    return next(block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "class Network" in block)


@pytest.fixture
def network(code, tmp_path, monkeypatch):
    (tmp_path / "model_search.py").write_text(code)
    (tmp_path / "genotypes.py").write_text('PRIMITIVES = ("none", "skip_connect", "dil_conv_3x3")\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "genotypes", raising=False)
    try:
        torch.manual_seed(0)
        return runpy.run_path(str(tmp_path / "model_search.py"), run_name="model_search")["Network"](8, 3, 3).double()
    finally:
        sys.modules.pop("genotypes", None)


def test_it_is_forty_lines_and_no_engine_takes_it(code, network):
    assert len([line for line in code[code.index("class"):].splitlines() if line.strip()]) <= 40
    assert "PartialOp" in why_not(network) or "Network" in why_not(network)
    assert set(network.alphas()) == {f"alphas_{kind}" for kind in ("normal", "reduce", "edges_normal", "edges_reduce")}


def test_hypergradient_is_that_of_autograd_through_the_virtual_step(network):
    """Cells with alphas of their own: the exact product, against one graph through step and validation loss."""
    train, valid = ((torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(2))
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.1, momentum=0.9, weight_decay=0.03)
    ours = Bilevel(network, optimizer, hvp="exact").hypergradient(train, valid, 0.1)
    w = network.flat().detach().requires_grad_()
    (inner,) = torch.autograd.grad(cross_entropy(network(train[0], w), train[1]), [w], create_graph=True)
    loss = cross_entropy(network(valid[0], w - 0.1 * (inner + 0.03 * w)), valid[1])
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.alphas().values()))])
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert theirs[-28:].abs().min() > 0  # the edges' own


def test_a_strong_edge_is_chosen(network):
    with torch.no_grad():
        network.alphas_edges_normal.zero_()[[9, 10]] = 3.0  # sources 0 and 1 of the last node
    assert {source for _, source in network.genotype().normal[-2:]} == {0, 1}


def test_from_search_to_committee(bare_clone, code, tmp_path):
    shutil.copytree(bare_clone.root, tmp_path / "CoNAS")
    clone = Clone(tmp_path / "CoNAS")
    shutil.copytree(clone.root / "cnn_space3", clone.root / "cnn_space4")
    (clone.root / "cnn_space4" / "model_search.py").write_text(code)
    for command in (["cnn_space4/train_search.py", *SMALL], ["cnn_space1/train_search.py", *SMALL],
                    ["cnn_space4/test_all.py"], ["test_ensemble.py", "--spaces", "cnn_space1", "cnn_space4"]):
        done = clone.run(*command)
        assert done.returncode == 0, done.stderr
    assert "cnn_space4" in done.stdout
    state = load(clone.root / "cnn_space4" / "search-EXP" / "checkpoints" / "epoch_000.pt")["state"]
    assert state["alphas_edges_normal"].shape == (14,) and state["alphas_edges_normal"].std() > 0
