"""Scores of many checkpoints: those of each alone, from images that are read once."""
from collections import Counter
from pathlib import Path

import pytest
import torch

from cnn_space1.model_search import Network
from conas.commands import scoring as evaluate
from conas.commands.test_all import ScoredRun
from conas.darts.space import Space, discover
from conas.data import images as data
from conas.runs.options import TestOptions
from tests.conftest import ROOT
from tests.helpers.untrained import write_runs

OPTIONS = TestOptions(batch_size=13, workers=0, device="cpu")


@pytest.fixture
def members(tmp_path) -> list[tuple]:
    """Two epochs of each space, and none of their scores stored."""
    write_runs(tmp_path, "digits", str(ROOT / "data"), None, 60, 2)
    return [(space, path) for space in discover(ROOT)
            for path in sorted((tmp_path / space.name / "search-EXP" / "checkpoints").iterdir())]


def stored(members) -> list[Path]:
    return sorted({file for _, path in members for file in (path.parent.parent / "probabilities").glob("*")})


@pytest.mark.parametrize("split", ["test", "valid"])
def test_together_as_alone_and_every_image_is_read_once(members, split, monkeypatch):
    alone = []
    for space, path in members:
        alone.append(evaluate.scores_for(space, path, OPTIONS, split))
    for file in stored(members):
        file.unlink()
    evaluate._load.cache_clear()
    monkeypatch.setattr(data, "MEMORY_LIMIT", 0)
    reads, get = Counter(), data.LazyImages.__getitem__

    def counted(self, i):
        reads[i] += 1
        return get(self, i)
    monkeypatch.setattr(data.LazyImages, "__getitem__", counted)
    together = evaluate.scores_for_all(members, OPTIONS, split)
    evaluate._load.cache_clear()
    assert set(reads.values()) == {1} and len(reads) == len(together[0].labels)
    for one, other in zip(alone, together):
        assert (one.space, one.epoch, one.checkpoint_sha256) == (other.space, other.epoch, other.checkpoint_sha256)
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=0)
        assert torch.equal(one.labels, other.labels)
    assert len(stored(members)) == len(members)


def test_only_what_is_missing_is_computed(members, monkeypatch):
    evaluate.scores_for_all(members[:4], OPTIONS)
    sizes, predict_all = [], evaluate.predict_all

    def counted(networks, *arguments):
        sizes.append(len(networks))
        return predict_all(networks, *arguments)
    monkeypatch.setattr(evaluate, "predict_all", counted)
    monkeypatch.setattr(evaluate, "NETWORKS_PER_PASS", 1)
    scores = evaluate.scores_for_all(members, OPTIONS)
    assert sizes == [1, 1] and [s.space for s in scores] == [space.name for space, _ in members]
    evaluate.scores_for_all(members, OPTIONS)
    assert len(sizes) == 2


def test_a_loop_may_add_figures_of_its_own(tmp_path):
    space = Space("cnn_space1", tmp_path / "cnn_space1", Network)
    write_runs(tmp_path, "digits", str(ROOT / "data"), None, 100, 2, [space])
    lines = []
    run = ScoredRun(space, "search", OPTIONS, lines.append)
    for epoch, checkpoint in run.checkpoints():
        scores = run.scores(checkpoint)
        run.add(epoch, scores, top1=scores.top(1), surest=scores.logits.softmax(-1).max().item())
    run.finish()
    table = (run.folder / "test_all.csv").read_text().splitlines()
    assert table[0] == "epoch,top1,surest" and len(table) == 3 == len(lines)
    assert f"surest {run.rows[0]['surest']:.4f}" in lines[0]


def test_a_script_from_before_the_packages_tests_its_run(tmp_path, capsys):
    space = Space("cnn_space1", tmp_path / "cnn_space1", Network)
    write_runs(tmp_path, "digits", str(ROOT / "data"), None, 100, 1, [space])
    from conas import evaluate
    evaluate.main(tmp_path / "cnn_space1", Network, "", ["--device", "cpu"])
    assert "1 checkpoints" in capsys.readouterr().out
    assert (tmp_path / "cnn_space1" / "search-EXP" / "test_all.csv").exists()
