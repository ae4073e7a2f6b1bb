"""Other operations on other edges: space S1 of arXiv:1909.09656, against a textbook, brute force and autograd."""
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import textbook
from conas.commands.cells import check_operations
from conas.darts.architect import Bilevel
from conas.darts.genotype import derive
from conas.darts.primitives import Primitives
from conas.darts.supernet import Supernet
from conas.engine.door import why_not
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from ensemble.report.search_history import read_searches
from tests.conftest import Clone
from tests.helpers.parity import fill
from tests.runs.test_checkpoint import ABOUT

SKIP, MAX, AVG, SEP, DIL3, DIL5 = PRIMITIVES = (
    "skip_connect", "max_pool_3x3", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5")
S1 = {
    "normal": [(SKIP, DIL3), (SKIP, DIL5), (SKIP, DIL5), (SKIP, SEP), (SKIP, DIL3), (MAX, SKIP), (SKIP, SEP),
               (SKIP, SEP), (SKIP, DIL3), (SKIP, SEP), (MAX, SKIP), (SKIP, DIL3), (DIL3, DIL5), (DIL3, DIL5)],
    "reduce": [(MAX, AVG), (MAX, DIL3), (MAX, AVG), (MAX, AVG), (SKIP, DIL5), (MAX, AVG), (MAX, SEP), (SKIP, DIL3),
               (SKIP, DIL5), (MAX, AVG), (MAX, AVG), (SKIP, DIL5), (SKIP, DIL5), (SKIP, DIL5)],
}
Robust = type("Robust", (Supernet,), {"primitives": S1})
KINDS = "normal", "reduce"


def absent(network, kind):
    """(EDGES, P) bool, by what S1 says."""
    return torch.tensor([[name not in edge for name in network.primitives] for edge in S1[kind]])


@pytest.fixture
def network():
    network = Robust(C=2, num_classes=3, layers=3).double()
    fill(network, 0)
    with torch.no_grad():
        for alpha in network.alphas().values():
            alpha.normal_()
    return network


def batches():
    torch.manual_seed(0)
    return [(torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.randint(3, (4,))) for _ in range(2)]


def test_an_edge_has_its_own_operations_and_no_others(network):
    for cell in network.cells:
        for names, mixed in zip(S1["reduce" if cell.reduction else "normal"], cell._ops):
            assert {n for n, op in zip(network.primitives, mixed._ops) if op is not None} == set(names)
    assert "operations" in why_not(network)
    everywhere = type("Everywhere", (Supernet,), {"primitives": {"normal": PRIMITIVES, "reduce": [PRIMITIVES] * 14}})
    assert tuple(everywhere(C=2, layers=3).primitives) == PRIMITIVES and why_not(everywhere(C=2, layers=3)) is None


def test_logits_and_gradients_are_those_of_a_textbook_without_the_others(network):
    """The textbook has all operations on all edges, and alphas that leave those of other edges a share of 0."""
    oracle = textbook.Network(tuple(network.primitives), 2, 3, 3).double()
    oracle.load_state_dict(network.state_dict(), strict=False)
    with torch.no_grad():
        for kind in KINDS:
            oracle.alphas()[f"alphas_{kind}"][absent(network, kind)] = -1e5
    images, labels = batches()[0]
    found, expected = network(images), oracle(images)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    cross_entropy(found, labels).backward()
    cross_entropy(expected, labels).backward()
    theirs = dict(oracle.named_parameters())
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-12)
    for kind in KINDS:
        gradient = network.alphas()[f"alphas_{kind}"].grad
        assert torch.equal(gradient == 0, absent(network, kind))


def test_hypergradient_is_that_of_autograd_through_the_virtual_step(network):
    train, valid = batches()
    optimizer = torch.optim.SGD(network.weights().values(), lr=0.1, momentum=0.9, weight_decay=0.03)
    exact, difference = (Bilevel(network, optimizer, hvp=hvp) for hvp in ("exact", "difference"))
    w = network.flat().detach().requires_grad_()
    (inner,) = torch.autograd.grad(cross_entropy(network(train[0], w), train[1]), [w], create_graph=True)
    loss = cross_entropy(network(valid[0], w - 0.1 * (inner + 0.03 * w)), valid[1])
    theirs = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.alphas().values()))])
    ours = exact.hypergradient(train, valid, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    missing = torch.cat([absent(network, kind).flatten() for kind in KINDS])
    assert torch.equal(ours == 0, missing)
    assert (difference.hypergradient(train, valid, 0.1)[missing] == 0).all()
    d = torch.ones_like(w) / len(w)**0.5
    smooth = difference.difference_quotient(train, w.detach(), d, r=1e-6)  # no kink lies so near
    torch.testing.assert_close(smooth, exact.exact_product(train, w.detach(), d), rtol=1e-4, atol=1e-8)


def test_entries_of_absent_operations_matter_to_nothing(network):
    """Whatever they are, and though Adam's weight decay moves them."""
    train, valid = batches()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ends = []
    for value in (0.0, 50.0):
        network.load_state_dict(state)
        with torch.no_grad():
            for kind in KINDS:
                network.alphas()[f"alphas_{kind}"][absent(network, kind)] = value
        optimizer = torch.optim.SGD(network.weights().values(), lr=0.1)
        architect = Bilevel(network, optimizer, arch_learning_rate=0.1, arch_weight_decay=0.1)
        for _ in range(3):
            architect.step(train, valid, 0.1)
        ends.append([network(train[0]).detach(), *(network.shares(kind).detach() for kind in KINDS),
                     *(network.alphas()[f"alphas_{kind}"].detach()[~absent(network, kind)] for kind in KINDS)])
        genotype = network.genotype()
        for kind in KINDS:
            for i, (operation, source) in enumerate(getattr(genotype, kind)):
                assert operation in S1[kind][[0, 2, 5, 9][i // 2] + source]
        check_operations(genotype, "the search's", S1)
    assert all(torch.equal(a, b) for a, b in zip(*ends))


@pytest.mark.parametrize("seed", range(20))
def test_cells_are_those_of_brute_force(seed):
    torch.manual_seed(seed)
    with_none = {kind: [("none", *edge) for edge in edges] for kind, edges in S1.items()}
    names = list(Primitives(with_none))
    alphas = {kind: 2 * torch.randn(14, len(names)) for kind in KINDS}
    found = derive(alphas["normal"], alphas["reduce"], Primitives(with_none))
    for kind in KINDS:
        edge = 0
        for node in range(4):
            strengths = []
            for source in range(2 + node):
                weights = {name: alphas[kind][edge, names.index(name)].double().exp().item()
                           for name in with_none[kind][edge]}
                best = max(S1[kind][edge], key=weights.get)
                strengths.append((weights[best] / sum(weights.values()), best, source))
                edge += 1
            expected = {(best, source) for _, best, source in sorted(strengths)[-2:]}
            assert set(getattr(found, kind)[2 * node:2 * node + 2]) == expected


def test_an_edge_that_is_all_none_still_has_its_own_operations():
    """Their shares underflow to 0, which is what operations of other edges have."""
    primitives = Primitives({kind: [("none", *edge) for edge in S1[kind]] for kind in KINDS})
    alphas = torch.zeros(14, len(primitives))
    alphas[:, primitives.index("none")] = 2000
    check_operations(derive(alphas, alphas, primitives), "the derived", primitives)


@pytest.mark.parametrize("given, words", [
    ([PRIMITIVES] * 13, ["13 edges", "14"]),
    ({"normal": PRIMITIVES}, ["dict of normal", "reduce"]),
    ({"normal": PRIMITIVES, "reduce": PRIMITIVES, "other": PRIMITIVES}, ["other"]),
    ({"normal": PRIMITIVES, "reduce": [PRIMITIVES, *[3] * 13]}, ["PRIMITIVES['reduce']", "list of 14"]),
    ("skip_connect", ["tuple of names"]),
    (3, ["tuple of names"]),
    ([*[PRIMITIVES] * 13, ("skip_conect",)], ["'skip_conect'", "skip_connect"]),
    ([*[PRIMITIVES] * 13, ()], ["edge 13 of normal cells", "empty"]),
    ({"normal": PRIMITIVES, "reduce": [*[PRIMITIVES] * 2, ("none",), *[PRIMITIVES] * 11]},
     ["edge 2 of reduce cells", "none", "other than none"]),
    ({"normal": [(SKIP, SEP, SKIP), *[PRIMITIVES] * 13], "reduce": PRIMITIVES}, ["edge 0 of normal", "skip", "twice"]),
])
def test_what_cannot_be_searched_is_refused_in_one_line(given, words):
    with pytest.raises(InputError) as error:
        type("Wrong", (Supernet,), {"primitives": given})(C=2, layers=3)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in ["PRIMITIVES", *words])


def test_a_cell_with_an_operation_on_another_edge_is_not_of_this_space(network):
    genotype = network.genotype()
    source = genotype.normal[0][1]
    other = genotype._replace(normal=[(MAX, source), *genotype.normal[1:]])  # on other edges, but not into node 0
    with pytest.raises(InputError, match=r"--arch X: uses max_pool_3x3, .* on those edges; give --any_ops"):
        check_operations(other, "--arch X", S1)
    check_operations(other, "--arch X", PRIMITIVES)


def test_a_checkpoint_is_of_its_own_edges(network, tmp_path):
    path = tmp_path / "a.pt"
    network = Robust(C=2, num_classes=10, layers=3, in_channels=1)
    described = checkpoints.describe(network, space="cnn_space7", epoch=0, dataset=ABOUT, arguments={"seed": 0})
    checkpoints.save(path, described)
    whole = checkpoints.load(path)
    again = checkpoints.restore(path, whole, "cnn_space7", Robust).eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), network.eval()(x)) and again.genotype() == network.genotype()
    for spaces in ({"normal": S1["normal"][::-1], "reduce": S1["reduce"]}, tuple(network.primitives)):
        with pytest.raises(InputError, match=r"a\.pt: searched over .* by edge.*now lists .*search again"):
            checkpoints.restore(path, whole, "cnn_space7", type("Other", (Supernet,), {"primitives": spaces}))
    for edges in ({"normal": S1["normal"]}, {"normal": [["x"]] * 14, "reduce": [["x"]] * 14}, {"normal": 3}, {}):
        checkpoints.save(path, whole | {"edges": edges})
        with pytest.raises(InputError, match=r"a\.pt: its field 'edges'"):
            checkpoints.load(path)
    every = type("All", (Supernet,), {"primitives": tuple(network.primitives)})(C=2, layers=3)
    assert "edges" not in checkpoints.describe(every, space="a", epoch=0, dataset=ABOUT, arguments={"seed": 0})


def test_from_search_to_committee(bare_clone, tmp_path):
    clone = Clone(shutil.copytree(bare_clone.root, tmp_path / "CoNAS"))
    space = clone.root / "cnn_space4"
    shutil.copytree(clone.root / "cnn_space3", space)
    (space / "genotypes.py").write_text(f"PRIMITIVES = {S1!r}\n")
    data = ["--dataset", "digits", "--subset", "60", "--test_subset", "60", "--layers", "3", "--batch_size", "20",
            "--epochs", "1"]
    said = {}
    for script, *flags in (["cnn_space4/train_search.py", *data, "--init_channels", "2"],
                           ["cnn_space3/train_search.py", *data, "--init_channels", "2"], ["cnn_space4/test_all.py"],
                           ["test_ensemble.py", "--report"],
                           ["cnn_space4/train.py", *data, "--init_channels", "2"]):
        done = clone.run(script, *flags)
        assert done.returncode == 0, (script, done.stderr)
        said[script] = done.stdout
    assert "other ones by edge" in said["cnn_space4/train_search.py"]
    assert "not all edges have the same operations" in said["cnn_space4/train_search.py"]
    assert "cnn_space4" in said["test_ensemble.py"]
    search, = read_searches([space / "search-EXP"])
    for kind in KINDS:
        shares = search.alphas[kind][-1]
        assert torch.equal(shares == 0, torch.tensor([[n not in e for n in search.primitives] for e in S1[kind]]))
        torch.testing.assert_close(shares.sum(1), torch.ones(14, dtype=torch.float64))
