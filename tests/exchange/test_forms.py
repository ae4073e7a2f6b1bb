"""Forms of other projects: real cells of each, whose edges are written out here, and round trips of any cell."""
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conas.darts import genotype as genotypes
from conas.darts.derived import NetworkCIFAR, count_parameters
from conas.darts.genotype import Genotype
from conas.darts.published import GENOTYPES, SOURCES
from conas.errors import InputError
from conas.exchange.cells import FORMS, find_cell
from tests.conftest import ROOT

FACTS = json.loads((ROOT / "tests" / "fixtures" / "cells.json").read_text())
OPERATIONS = ("none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
              "dil_conv_5x5")
ALL_NODES = range(2, 6)

# The edges of the real examples, read by eye: (operation, state) in the order of DARTS.
SEP, MAX, SKIP = "sep_conv_3x3", "max_pool_3x3", "skip_connect"
BY_EYE = {
    "nni3": Genotype([(SEP, 0), (SEP, 1), (SEP, 1), (SKIP, 0), (SEP, 0), (MAX, 1), (SEP, 0), (SEP, 1)], ALL_NODES,
                     [(MAX, 0), ("sep_conv_5x5", 1), ("dil_conv_5x5", 2), (MAX, 0), (MAX, 0), (SEP, 2), (MAX, 0),
                      (SKIP, 2)], ALL_NODES),
    "nni2": Genotype([(SEP, 0), (SEP, 1), (SEP, 0), (SEP, 1), (SEP, 1), (SEP, 2), (SEP, 1), (SEP, 2)], ALL_NODES,
                     [(MAX, 0), (SEP, 1), (MAX, 0), (SKIP, 2), (MAX, 0), (SKIP, 2), (SKIP, 2), (SKIP, 3)], ALL_NODES),
    "nasbench301": Genotype(
        [(SKIP, 0), (SEP, 1), ("dil_conv_5x5", 1), ("avg_pool_3x3", 2), ("dil_conv_5x5", 2), (SEP, 3),
         ("dil_conv_3x3", 0), ("dil_conv_3x3", 1)], ALL_NODES,
        [("dil_conv_3x3", 0), (SKIP, 1), (MAX, 0), ("dil_conv_5x5", 1), ("dil_conv_3x3", 1), ("avg_pool_3x3", 2),
         (SEP, 0), (SEP, 2)], ALL_NODES),
    "compact": GENOTYPES["DARTS_V2"],
    "autodl": GENOTYPES["GDAS_V1"],
}


@pytest.mark.parametrize("form", BY_EYE)
def test_the_real_example_of_a_form(form):
    cell = find_cell(json.dumps(FACTS["forms"][form]), {})
    assert cell.genotype == BY_EYE[form] and cell.origin == f"text: {FORMS[form].title}"


def test_gdas_v1_by_eye():  # of its six fields, as AutoDL-Projects prints them
    text = ("Genotype(normal=[(('skip_connect', 0), ('skip_connect', 1)), (('skip_connect', 0), ('sep_conv_5x5', 2)), "
            "(('sep_conv_3x3', 3), ('skip_connect', 0)), (('sep_conv_5x5', 4), ('sep_conv_3x3', 3))], "
            "normal_concat=[2, 3, 4, 5], reduce=[(('sep_conv_5x5', 0), ('sep_conv_3x3', 1)), (('sep_conv_5x5', 2), "
            "('sep_conv_5x5', 1)), (('dil_conv_5x5', 2), ('sep_conv_3x3', 1)), (('sep_conv_5x5', 0), "
            "('sep_conv_5x5', 1))], reduce_concat=[2, 3, 4, 5], connectN=None, connects=None)")
    assert find_cell(text, {}).genotype == GENOTYPES["GDAS_V1"]
    assert GENOTYPES["GDAS_V1"].normal[2:6] == [(SKIP, 0), ("sep_conv_5x5", 2), (SEP, 3), (SKIP, 0)]
    with pytest.raises(InputError, match="its connectN is 3"):
        find_cell(text.replace("connectN=None", "connectN=3"), {})


@pytest.mark.parametrize("name, millions", [
    ("DARTS_V2", 3.3), ("PDARTS", 3.4), ("PC_DARTS_cifar", 3.6), ("GDAS_V1", 3.4)])
def test_published_cells_have_the_parameters_that_their_authors_state(name, millions):
    network = NetworkCIFAR(36, 10, 20, False, GENOTYPES[name])
    assert round(count_parameters(network) / 1e6, 1) == millions


def test_published_cells_are_the_facts_and_each_has_a_source():
    assert set(SOURCES) == set(GENOTYPES)
    for name, fact in FACTS["cells"].items():
        assert genotypes.to_json(GENOTYPES[name]) == {key: fact[key] for key in Genotype._fields}
        assert fact["source"] in SOURCES[name] and fact["paper"] in SOURCES[name]


@st.composite
def cells(draw, operations=OPERATIONS, distinct=False, any_size=False):
    """A genotype of four nodes, or of any size; with `distinct`, both edges of a node come from different states."""
    fields = []
    for _ in ("normal", "reduce"):
        edges, count = [], draw(st.integers(1, 7)) if any_size else 4
        for node in range(count):
            sources = draw(st.lists(st.integers(0, 1 + node), min_size=2, max_size=2, unique=distinct))
            edges += [(draw(st.sampled_from(operations)), source) for source in sources]
        states = st.lists(st.integers(2, 1 + count), min_size=1, unique=True)
        fields += [edges, draw(states) if any_size else list(range(2, 6))]
    return Genotype(*fields)


def canonical(genotype: Genotype, ordered: bool) -> list:
    """Fields as lists; without `ordered`, a node's two edges in the order of their states."""
    def edges(cell):
        pairs = [tuple(cell[i:i + 2]) for i in range(0, len(cell), 2)]
        return [pair if ordered else tuple(sorted(pair, key=lambda e: e[1])) for pair in pairs]
    return [edges(field) if i % 2 == 0 else list(field) for i, field in enumerate(genotype)]


SEVEN = OPERATIONS[1:]
ANY = {"any_size": True, "operations": (*OPERATIONS, "conv_9")}


@pytest.mark.parametrize("form, limits, ordered", [
    ("genotype", ANY, True), ("json", ANY, True), ("list", ANY, True), ("pt.darts", ANY, True), ("autodl", ANY, True),
    ("nni3", {}, True), ("nni2", {"distinct": True}, True), ("compact", {"operations": SEVEN}, True),
    ("nasbench301", {"operations": SEVEN, "distinct": True}, False)])
def test_round_trips(form, limits, ordered):
    @settings(max_examples=25, deadline=None)
    @given(cells(**limits))
    def check(genotype):
        text = FORMS[form].write(genotype)
        again = find_cell(text, {}, operations=None).genotype
        assert canonical(again, ordered) == canonical(genotype, ordered)
        assert FORMS[form].write(again) == text
    check()
    assert ordered == (not FORMS[form].note)


V2 = GENOTYPES["DARTS_V2"]


@pytest.mark.parametrize("genotype, forms, words", [
    (GENOTYPES["NASNet"], ("nni3", "nni2", "nasbench301", "compact"), "normal cell has 5 and concatenates"),
    (V2._replace(reduce_concat=[4, 5]), ("nni3", "nni2", "nasbench301", "compact"), r"reduce cell has 4.* \[4, 5\]"),
    (V2._replace(normal=[("sep_conv_7x7", 0), *V2.normal[1:]]), ("nni3", "nni2", "nasbench301", "compact"),
     "no name for sep_conv_7x7"),
    (V2._replace(normal=[("none", 0), *V2.normal[1:]]), ("nasbench301", "compact"), "no name for none"),
    (V2._replace(reduce=[(MAX, 0), (MAX, 0), *V2.reduce[2:]]), ("nni2", "nasbench301"), "both edges of node 0 of the "
     "reduce cell come from state 0"),
])
def test_what_a_form_cannot_say_is_not_written(genotype, forms, words):
    for form in forms:
        with pytest.raises(InputError, match=f"--to {form}: .*{words}.*write it --to json"):
            FORMS[form].write(genotype)


def changed(form, **changes):
    """The real example of a form with changed entries, by the end of their names; None takes one away."""
    value = dict(FACTS["forms"][form])
    for end, new in changes.items():
        (key,) = [key for key in value if key.endswith(end)]
        value |= {key: new}
        if new is None:
            del value[key]
    return value


TRUTH = [False, False, False, True, False, False, False]


@pytest.mark.parametrize("value, words", [
    (changed("nni3", **{"normal/op_5_1": None}), "has no normal/op_5_1"),
    (changed("nni3") | {"normal/op_6_0": SEP}, "1 entries that are not known, normal/op_6_0 first"),
    (changed("nni3", **{"reduce/input_2_0": [0, 1]}), r"item 0 is \['max_pool_3x3', \[0, 1\]\]"),
    (changed("nni3", **{"normal/input_2_0": 5}), "node 0 reads only states 0 to 1"),
    (changed("nni2", normal_n3_p0=[]), r"normal_n3_p0: is \[\], and no operation of NNI 2"),
    (changed("nni2", normal_n3_p0=7), "is 7, and no operation"),
    (changed("nni2", normal_n3_p0=True), "is True, and no"),
    (changed("nni2", normal_n3_p0=[*TRUTH, True]), "no operation of NNI 2"),
    (changed("nni2", normal_n3_switch=["normal_n3_p0"]), "normal_n3_switch must list two of normal_n3_p0, normal_n3"),
    (changed("nni2", normal_n3_switch=[0, 3]), "normal_n3_switch must list two"),
    (changed("nni2", normal_n3_switch=None), "has no normal_n3_switch"),
    (changed("nasbench301", inputs_node_normal_3="1_3"), "inputs_node_normal_3 must be one of 0_1, 0_2, 1_2, and not"),
    (changed("nasbench301", inputs_node_normal_3=None), "and not None"),
    (changed("nasbench301", edge_normal_3="zero"), "edge_normal_3 must be one of max_pool_3x3"),
    (changed("nasbench301") | {"NetworkSelectorDatasetInfo:darts:edge_normal_2": SEP}, "1 edges that no node hears"),
    ([[[0, 7]] * 8, [[0, 0]] * 8], "has the operation 7, but NASLib's list ends with 6, dil_conv_5x5"),
    ([[[0, 1]] * 6, [[0, 0]] * 8], "normal cell has 6 pairs"),
    (changed("autodl", connectN=3), "its connectN is 3"),
    (changed("autodl", normal=[[[SEP, 0]]]), "normal has 1 edges at node 0"),
    (changed("autodl", normal=4), "and not 4"),
])
def test_what_does_not_fit_a_form_is_one_line(value, words):
    with pytest.raises(InputError, match=words) as error:
        find_cell(json.dumps(value), {})
    assert str(error.value).startswith("--arch ") and len(str(error.value)) < 500


@pytest.mark.parametrize("choice", [SEP, "sepconv3x3", TRUTH, 3])
def test_operations_of_nni_two_have_several_spellings(choice):
    value = changed("nni2", normal_n2_p0=choice)
    if choice == SEP:
        with pytest.raises(InputError, match="no operation"):
            find_cell(json.dumps(value), {})
    else:
        assert find_cell(json.dumps(value | {"normal_n2_switch": [0, 1]}), {}).genotype == BY_EYE["nni2"]


def test_the_forms_are_listed_in_the_docs():
    table = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE) == list(FORMS)
