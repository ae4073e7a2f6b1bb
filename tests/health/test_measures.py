"""What a search says of itself by epoch: counts and shares by hand, and verdicts from its lines of metrics."""
import math

import pytest
import torch

from conas.darts.derived import Cell
from conas.darts.genotype import Genotype
from conas.darts.operations import OPERATIONS
from conas.health.measures import CellSize, count_skips, entropy, margins
from conas.health.observer import Observer
from tests.health.test_curvature import Small, architect

MIXED = [("skip_connect", 0), ("sep_conv_3x3", 1), ("dil_conv_5x5", 0), ("max_pool_3x3", 1)] * 2


def test_skips_and_parameters_of_a_cell():
    cell = Genotype(MIXED, range(2, 6), [("skip_connect", 0)] * 8, range(2, 6))
    assert count_skips(cell) == 2
    whole = Cell(cell, 12, 12, 6, False, False)
    before = torch.get_rng_state()
    assert CellSize(OPERATIONS, 6)(MIXED) == sum(p.numel() for p in whole._ops.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert CellSize(OPERATIONS, 6)([("skip_connect", 0), ("avg_pool_3x3", 1)]) == 0


def test_entropy_and_margins_of_edges():
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6], [0.0, 1.0, 0.0]], dtype=torch.float64)
    assert entropy(shares) == pytest.approx((1.5 * math.log(2) - 0.4 * math.log(0.2) - 0.6 * math.log(0.6)) / 3)
    assert margins(shares, ("none", "a", "b")) == pytest.approx([0, 0.4, 1])
    assert margins(shares, ("a", "none", "b")) == pytest.approx([0.25, 0.4, 0])
    assert margins(shares[:, :2], ("none", "a")) == pytest.approx([0.25, 0.2, 1])


def rows(skips, curvature=None):
    return [{"epoch": epoch, "skips": count} | ({"curvature": curvature[epoch]} if curvature else {})
            for epoch, count in enumerate(skips)]


@pytest.fixture
def observer():
    def make(epochs=20, stop_on="never", every=0):
        torch.manual_seed(0)
        batch = torch.randn(4, 1, 8, 8), torch.randint(4, (4,))
        return Observer(architect(Small(2, 4, 3, 1)), lambda: batch, every=every, seed=0, epochs=epochs,
                        stop_on=stop_on, operations=OPERATIONS, C=2)
    return make


def test_an_epoch_s_fields(observer):
    look = observer(every=2)
    first, second = look.look(0), look.look(1)
    assert first.pop("curvature") > 0 and first == second
    assert first["entropy_normal"] == pytest.approx(math.log(2), abs=1e-5)
    assert [len(first["margins"][kind]) for kind in ("normal", "reduce")] == [14, 14]
    cell = look.network.genotype()
    assert first["skips"] == count_skips(cell) and first["cell_parameters"] == CellSize(OPERATIONS, 2)(cell.normal)


def test_collapsing_is_said_once_with_the_last_sound_cell(observer):
    skips = [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8]
    said = [observer().news(rows(skips[:n])) for n in range(1, 13)]
    (line,) = filter(None, said)
    assert line.startswith("collapsing: from epoch 6 on") and "the cell of epoch 6 is still sound" in line
    assert said.index(line) == 6
    assert observer().news(rows([4] * 20)[:5]).endswith("no cell up to now has at most 3 (docs/health.md)")


def test_where_a_search_stops(observer):
    skips = [0, 0, 0, 1, 1, 2, 3, 4]
    assert observer().stop(rows(skips)) is None
    assert observer(stop_on="collapse").stop(rows(skips[:6])) is None
    assert observer(stop_on="collapse").stop(rows(skips))[0] == 6
    flat, rise = [0.2] * 12, [0.2] * 10 + [0.4] * 5
    assert observer(stop_on="curvature").stop(rows([8] * 12, flat)) is None
    epoch, reason = observer(stop_on="curvature").stop(rows([0] * 15, rise))  # 0.28 over 0.2 first in epoch 11
    assert epoch == 7 and "epoch 7" in reason


def test_the_last_line(observer, tmp_path):
    def last(skips, epoch, epochs=20):
        return observer(epochs).last_line(rows(skips), epoch, tmp_path)

    assert last([0, 0, 1, 3] * 5, 19) == ("this cell is not collapsed: 3 of the 8 edges of its normal cell are skip "
                                          "connections")
    collapsed = last([0, 0, 0, 1, 1, 2, 3, 4] + [7] * 12, 19)
    assert "collapsed: 7 of the 8" in collapsed and "that of epoch 6 is not" in collapsed
    assert collapsed.endswith(f"--arch {tmp_path / 'genotypes' / 'epoch_006.json'} trains it")
    assert last([5] * 20, 19).endswith("no earlier one has at most 3")
    assert "too short to say" in last([8] * 9, 8, epochs=9)
    assert "unknown" in observer().last_line([{"epoch": 0}, *rows([0])], 1, tmp_path)


def test_too_little_memory_for_the_curvature_ends_no_search(observer, monkeypatch):
    look = observer(every=1)
    monkeypatch.setattr(look.architect, "alpha_products", lambda *_: torch.empty(2**60))
    fields = look.look(0)
    assert "curvature" not in fields and "skips" in fields and look.network.training
    assert "too little memory" in look.news(rows([0])) and look.news(rows([0])) is None and not look.every
