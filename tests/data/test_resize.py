"""Images that are not square: one way to make them so, the same in training, tests, predictions and exports."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import conas.data.images
from cnn_space1 import genotypes as space1
from conas.commands import scoring, train
from conas.data.imagefiles import RESIZES, ImageFiles
from conas.data.images import load
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import best_checkpoint
from ensemble import export
from ensemble.combine.network import CommitteeNetwork
from ensemble.predict import predict

RED, GREEN, BLUE, BLACK = (200, 0, 0), (0, 200, 0), (0, 0, 200), (0, 0, 0)


def banded(path, length=48, width=24, upright=False, band=RED):
    """A picture of three bands, a quarter, a half and a quarter of its length: `band`, green and blue."""
    pixels = np.zeros((width, length, 3), dtype=np.uint8)
    pixels[:, :length // 4], pixels[:, length // 4:-length // 4], pixels[:, -length // 4:] = band, GREEN, BLUE
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.transpose(1, 0, 2) if upright else pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes that differ at their ends only, which the central square does not show."""
    for name, band in (("a", RED), ("b", BLUE)):
        for i in range(20):
            banded(tmp_path / "images" / name / f"{i}.png", 48 + i, 24, band=band)
    return tmp_path / "images"


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("resize, expected", [("crop", [GREEN] * 3), ("stretch", [RED, GREEN, BLUE]),
                                              ("pad", [RED, GREEN, BLUE])])
def test_each_way_shows_what_it_says(tmp_path, upright, resize, expected):
    path = banded(tmp_path / "a.png", upright=upright)
    pixels = ImageFiles(tmp_path, [path.name], resize).decode(0, 24)
    pixels = (pixels.transpose(1, 2) if upright else pixels).permute(1, 2, 0)  # (width, length, 3)
    assert [tuple(pixels[12, at].tolist()) for at in (3, 12, 20)] == expected
    edges = [tuple(pixels[row, 12].tolist()) for row in (0, 4, 19, 23)]
    assert edges == [BLACK if resize == "pad" else GREEN] * 4
    rows = int((pixels.sum(2) > 0).any(dim=1).sum())
    assert rows == (12 if resize == "pad" else 24)


@pytest.mark.parametrize("resize", list(RESIZES))
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (16, 16)])
def test_any_shape_leaves_something(tmp_path, resize, size):
    Image.new("RGB", size, RED).save(tmp_path / "a.png")
    pixels = ImageFiles(tmp_path, ["a.png"], resize).decode(0, 16)
    assert pixels.shape == (3, 16, 16) and pixels[0].max() == 200
    assert size[0] != size[1] or pixels[0].min() == 200


def test_square_images_are_the_same_in_every_way(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ways = [ImageFiles(tmp_path, ["a.png"], resize).decode(0, side) for side in (20, 9) for resize in RESIZES]
    assert all(torch.equal(ways[3 * i], way) for i in range(2) for way in ways[3 * i:3 * i + 3])
    assert np.array_equal(ways[0].permute(1, 2, 0), pixels)


def test_images_decoded_in_batches_are_the_same_and_tell_ways_apart(monkeypatch, folder):
    held = {resize: load("folder", folder, "train", resize=resize) for resize in RESIZES}
    monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    lazy = {resize: load("folder", folder, "train", resize=resize) for resize in RESIZES}
    for resize in RESIZES:
        assert torch.equal(next(lazy[resize].gather([torch.arange(5)], "cpu"))[0], held[resize].images[:5])
    assert len({images.fingerprint for images in lazy.values()}) == 3
    assert lazy["crop"].fingerprint == load("folder", folder, "train").fingerprint


def run(root, *flags):
    train.main(root / "cnn_space1", space1, "", argv=[
        "--arch", "DARTS_V2", "--any_ops", "--init_channels", "2", "--layers", "3", "--batch_size", "8", "--dataset",
        "folder", "--image_size", "8", "--epochs", "1", "--valid_portion", "0.25", "--device", "cpu",
        *map(str, flags)])
    return root / "cnn_space1" / "train-EXP"


def test_tests_predictions_and_exports_do_as_training_did(tmp_path, folder):
    path = best_checkpoint(run(tmp_path, "--data", folder, "--resize", "pad"))
    checkpoint = checkpoints.load(path)
    dataset_info = checkpoint["dataset"]
    assert dataset_info["resize"] == checkpoint["arguments"]["resize"] == "pad"
    test = scoring.load_images(path, dataset_info, None, "test")
    assert torch.equal(test.images, load("folder", folder, "test", 8, resize="pad").images)
    assert not torch.equal(test.images, load("folder", folder, "test", 8).images)
    network = checkpoints.restore_derived(path, checkpoint).eval()
    committee = CommitteeNetwork([network], ["one"], dataset_info, "mean_softmax", weights=[1.0], temperatures=[1.0],
                                 temperature=1.0, crops=[None])
    rows = list(predict(committee, [str(folder / name) for name in test.names]))
    with torch.no_grad():
        expected = committee(test.images).max(dim=1).values.tolist()
    assert [row["probability"] for row in rows] == pytest.approx(expected, abs=1e-6)
    assert json.loads(export.about(committee))["resize"] == "pad"


def test_a_run_goes_on_in_its_own_way(tmp_path, folder):
    where = run(tmp_path, "--data", folder)
    content = json.loads((where / "args.json").read_text())
    del content["arguments"]["resize"]  # as commit 662cc92 wrote it
    (where / "args.json").write_text(json.dumps(content))
    run(tmp_path, "--data", folder)
    assert "finished" in (where / "log.txt").read_text()
    with pytest.raises(InputError, match=r"holds a run with --resize crop \(now pad\)"):
        run(tmp_path, "--data", folder, "--resize", "pad")
    dataset_info = checkpoints.load(best_checkpoint(where))["dataset"]
    old = {name: value for name, value in dataset_info.items() if name != "resize"}
    assert scoring.load_images(best_checkpoint(where), old, None, "train").fingerprint == dataset_info["fingerprint"]
