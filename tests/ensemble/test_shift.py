"""Members and committee on corrupted images, with real networks."""
import pytest
import torch

from conas.commands.scoring import predict, scores_for
from conas.darts.space import discover
from conas.data.images import load
from conas.runs import checkpoint as checkpoints
from conas.runs.options import TestOptions
from ensemble.combine.committee import Committee, mean_softmax
from ensemble.measure import metrics
from ensemble.measure.corruptions import corrupt
from ensemble.measure.shift import OwnCorruptions, measure_shift
from tests.conftest import ROOT
from tests.helpers.untrained import write_runs

OPTIONS = TestOptions(device="cpu", batch_size=64)


@pytest.fixture
def pool(tmp_path, monkeypatch):
    """Checkpoints of three spaces; two corruptions are enough."""
    monkeypatch.setattr(OwnCorruptions, "names", ("gaussian_noise", "contrast"))
    write_runs(tmp_path, "digits", str(ROOT / "data"), None, 100, 1)
    return {space.name: (space, tmp_path / space.name / "search-EXP/checkpoints/epoch_000.pt")
            for space in discover(ROOT)}


def test_shift_is_what_networks_say_of_corrupted_images(pool):
    committee = Committee({name: scores_for(space, path, OPTIONS) for name, (space, path) in pool.items()})
    found = measure_shift(pool, committee, OPTIONS)
    images = load("digits", ROOT / "data", "test", None, 100)
    for severity in (1, 4):
        logits = []
        for name, (space, path) in pool.items():
            network = checkpoints.restore(path, checkpoints.load(path), name, space.network)
            block = type(images)(images.info, corrupt(images.images, "contrast", severity), images.labels)
            logits.append(predict(network, block, 64, torch.device("cpu")))
            expected = 100 * metrics.topk_accuracy(logits[-1], images.labels)
            assert found["curves"][name]["contrast"]["top1"][severity - 1] == pytest.approx(expected)
        ours = mean_softmax(torch.stack(logits))
        curve = found["curves"]["committee"]["contrast"]
        assert curve["top1"][severity - 1] == pytest.approx(100 * metrics.topk_accuracy(ours, images.labels))
        assert curve["loss"][severity - 1] == pytest.approx(metrics.nll(ours, images.labels), rel=1e-5)
        assert curve["ece"][severity - 1] == pytest.approx(metrics.ece(ours, images.labels), abs=1e-5)
    errors = [100 - top1 for curve in found["curves"]["committee"].values() for top1 in curve["top1"]]
    assert found["mce"]["committee"] == pytest.approx(sum(errors) / 10)


def test_stored_logits_are_used_again_for_the_same_checkpoint_only(pool):
    committee = Committee({name: scores_for(space, path, OPTIONS) for name, (space, path) in pool.items()})
    first = measure_shift(pool, committee, OPTIONS)
    files = {path: path.stat().st_mtime_ns for _, run in pool.values()
             for path in (run.parent.parent / "probabilities").glob("*.gaussian_noise.npz")}
    assert len(files) == 3
    again = Committee(committee.members, temperature=2.0)
    assert measure_shift(pool, again, OPTIONS)["curves"]["cnn_space1"] == first["curves"]["cnn_space1"]
    assert {path: path.stat().st_mtime_ns for path in files} == files

    path = pool["cnn_space1"][1]
    checkpoint = checkpoints.load(path)
    checkpoint["state"]["classifier.bias"] += torch.arange(10.0)
    checkpoints.save(path, checkpoint)
    changed = Committee(committee.members | {"cnn_space1": scores_for(*pool["cnn_space1"], OPTIONS)})
    assert measure_shift(pool, changed, OPTIONS)["curves"]["cnn_space1"] != first["curves"]["cnn_space1"]
