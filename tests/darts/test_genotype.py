"""The genotype rule against brute force, the JSON form, and what is refused."""
import itertools
import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conas.darts.genotype import (
    EDGES,
    NODES,
    Genotype,
    check,
    derive,
    derive_cell,
    from_json,
    load,
    rule_in_words,
    save,
    to_json,
)
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


@pytest.mark.parametrize("seed", range(20))
def test_of_too_many_skips_the_strongest_stay_and_the_next_operations_take_the_place_of_others(seed):
    """Against brute force: of all choices of at most K skips to keep, the one whose kept shares add up to most."""
    torch.manual_seed(seed)
    primitives = ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"]
    alphas = torch.randn(EDGES, 4, dtype=torch.float64)
    alphas[:, 2] += 1.5
    shares = alphas.exp() / alphas.exp().sum(1, keepdim=True)
    free = derive_cell(alphas, primitives)
    edges = [sum(2 + n for n in range(i // 2)) + source for i, (_, source) in enumerate(free)]
    skips = [i for i, (name, _) in enumerate(free) if name == "skip_connect"]
    assert len(skips) > 2
    for K in range(9):
        keep = max((set(kept) for n in range(min(K, len(skips)) + 1) for kept in itertools.combinations(skips, n)),
                   key=lambda kept: sum(shares[edges[i], 2] for i in kept))
        expected = [(name, source) if i not in skips or i in keep else
                    (max(("max_pool_3x3", "sep_conv_3x3"), key=lambda n: shares[edges[i], primitives.index(n)]), source)
                    for i, (name, source) in enumerate(free)]
        assert derive_cell(alphas, primitives, max_skips=K) == expected
        genotype = derive(alphas, alphas, primitives, max_skips=K)
        assert (genotype.normal, genotype.reduce) == (expected, free)


def test_a_limit_of_skips_needs_another_operation_on_each_edge():
    with pytest.raises(InputError, match="--max_skips 2: edge 0 of normal"):
        derive_cell(torch.randn(EDGES, 2), ["none", "skip_connect"], max_skips=2)
    by_edge = [("skip_connect", "sep_conv_3x3"), ("skip_connect", "dil_conv_3x3")] * 7
    alphas = torch.tensor([[2.0, 1, 3]] * 14)  # the last is not there on every second edge
    cell = derive_cell(alphas, by_edge, max_skips=0)
    assert {name for name, _ in cell} == {"sep_conv_3x3", "dil_conv_3x3"}
    with pytest.raises(InputError, match="edge 13"):
        derive_cell(alphas, [*by_edge[:13], ("skip_connect",)], max_skips=0)


def test_a_file_says_by_which_rule_it_was_derived_and_is_read_without(tmp_path):
    (tmp_path / "cell.json").write_text(json.dumps(valid() | {"rule": rule_in_words(2)}))
    assert set(to_json(load(tmp_path / "cell.json", OPERATIONS))) == set(Genotype._fields)
    with pytest.raises(InputError, match="exactly the keys"):
        from_json(valid() | {"rules": ""}, "cell.json", OPERATIONS)
