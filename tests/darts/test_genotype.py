"""The genotype rule against brute force, the JSON form, and what is refused."""
import itertools
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conas.darts.genotype import EDGES, NODES, Genotype, check, derive, from_json, load, save, to_json
from conas.darts.operations import OPERATIONS
from conas.errors import InputError

PRIMITIVES = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


def best_by_brute_force(alphas):
    """Of all choices of two sources and two operations for a node, the one of largest summed probability."""
    probability = alphas.softmax(1)
    cell, start = [], 0
    for node in range(NODES):
        choices = []
        for pair in itertools.combinations(range(2 + node), 2):
            for operations in itertools.product(range(1, len(PRIMITIVES)), repeat=2):
                total = sum(probability[start + s, o].item() for s, o in zip(pair, operations))
                choices.append((total, {(PRIMITIVES[o], s) for s, o in zip(pair, operations)}))
        cell.append(max(choices, key=lambda choice: choice[0])[1])
        start += 2 + node
    return cell


@pytest.mark.parametrize("seed", range(10))
def test_derive_picks_the_two_strongest_edges(seed):
    torch.manual_seed(seed)
    normal, reduce = torch.randn(2, EDGES, len(PRIMITIVES), dtype=torch.float64)
    genotype = derive(normal, reduce, PRIMITIVES)
    for edges, alphas in ((genotype.normal, normal), (genotype.reduce, reduce)):
        assert [set(edges[2 * n:2 * n + 2]) for n in range(NODES)] == best_by_brute_force(alphas)
    assert list(genotype.normal_concat) == list(genotype.reduce_concat) == [2, 3, 4, 5]


def test_none_is_never_chosen_but_does_weaken_its_edge():
    alphas = torch.zeros(EDGES, len(PRIMITIVES))
    alphas[:, 4] = 1.0
    alphas[2, 0] = 50.0  # edge from state 0 to node 1: almost all of it is `none`
    genotype = derive(alphas, alphas, PRIMITIVES)
    assert genotype.normal[2:4] == [("sep_conv_3x3", 1), ("sep_conv_3x3", 2)]


def test_the_printed_line_can_be_pasted():
    torch.manual_seed(0)
    genotype = derive(torch.randn(14, 6), torch.randn(14, 6), PRIMITIVES)
    assert eval(str(genotype), {"Genotype": Genotype, "range": range, "__builtins__": {}}) == genotype
    assert str(genotype).startswith("Genotype(normal=[('")


def test_json_round_trip(tmp_path):
    torch.manual_seed(1)
    genotype = derive(torch.randn(14, 6), torch.randn(14, 6), PRIMITIVES)
    save(tmp_path / "genotype.json", genotype)
    assert load(tmp_path / "genotype.json", OPERATIONS) == genotype


def valid():
    return to_json(derive(torch.randn(14, 6), torch.randn(14, 6), PRIMITIVES))


def changed(**changes):
    return valid() | changes


EDGE = ["skip_connect", 0]


@pytest.mark.parametrize("obj, word", [
    ([], "JSON object"),
    ({"normal": []}, "exactly the keys"),
    (changed(normal=[["warp_drive", 0], *valid()["normal"][1:]]), "warp_drive"),
    (changed(normal=[["skip_connect", 2], *valid()["normal"][1:]]), "state 2"),
    (changed(normal=[["skip_connect", -1], *valid()["normal"][1:]]), "pairs"),
    (changed(normal=[["skip_connect", True], *valid()["normal"][1:]]), "pairs"),
    (changed(normal=[["skip_connect", 1e400], *valid()["normal"][1:]]), "pairs"),
    (changed(reduce=[EDGE] * 7), "7 edges"),
    (changed(reduce=[]), "0 edges"),
    (changed(reduce_concat=[2, 3, 4, 9]), "reduce_concat"),
    (changed(reduce_concat=[2, 2]), "reduce_concat"),
    (changed(reduce_concat=[1, 2, 3]), "reduce_concat"),
    (changed(reduce_concat="2345"), "state numbers"),
])
def test_a_bad_genotype_is_refused_by_name(obj, word):
    with pytest.raises(InputError, match=word) as error:
        from_json(obj, "cell.json", OPERATIONS)
    assert str(error.value).startswith("cell.json: ")


json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                           lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)


@given(st.fixed_dictionaries({name: json_values for name in Genotype._fields}) | json_values)
def test_any_json_gives_a_genotype_or_an_input_error(obj):
    with suppress(InputError):
        check(from_json(obj, "x", OPERATIONS), "x", OPERATIONS)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "genotype.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"genotype\.json"):
        load(path, OPERATIONS)
