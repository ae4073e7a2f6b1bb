"""Image sets: sizes, subsets, evaluation batches, fingerprints."""
import numpy as np
import pytest
import torch
from PIL import Image

import conas.data.images
from conas.data.images import DATASETS, DataInfo, ImageSet, load
from conas.errors import InputError


def test_digits_have_the_moments_that_are_stated():
    images = load("digits", "/", "train").images / 255.0
    info = DATASETS["digits"]
    assert (images.mean().item(), images.std(correction=0).item()) == pytest.approx((*info.mean, *info.std), abs=1e-6)


def test_unknown_names_and_sizes_are_refused():
    for flags, message in (({"dataset": "mnist"}, "--dataset mnist"), ({"image_size": 7}, "--image_size 7"),
                           ({"subset": 451}, "--test_subset 451"), ({"subset": 0}, "--test_subset 0")):
        with pytest.raises(InputError, match=message):
            load(**({"dataset": "digits", "root": "/", "split": "test"} | flags))


def test_subset_is_stratified_and_image_size_resizes():
    part = load("digits", "/", "train", image_size=16, subset=200)
    assert part.images.shape == (200, 1, 16, 16) and part.info.image_size == 16
    whole = load("digits", "/", "train")
    assert (part.labels.bincount() - whole.labels.bincount() * 200 / len(whole)).abs().max() < 1
    same = load("digits", "/", "train", subset=200)
    assert torch.equal(same.labels, part.labels) and len(load("digits", "/", "test", subset=450)) == 450
    for small, large in zip(same.images[:20, 0].numpy(), part.images[:20, 0].numpy()):
        expected = np.array(Image.fromarray(small).resize((16, 16), Image.Resampling.BILINEAR))
        assert np.abs(expected.astype(int) - large.astype(int)).max() <= 1


def test_batches_are_in_order_complete_and_normalised():
    part = load("digits", "/", "test")
    batches = list(part.batches(64, "cpu"))
    assert [len(y) for _, y in batches] == [64] * 7 + [2]
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert torch.equal(y, part.labels) and x.dtype == torch.float32
    assert np.allclose(x, (part.images.numpy() / 255 - part.info.mean[0]) / part.info.std[0], atol=1e-5)
    chosen = torch.tensor([5, 3, 400])
    assert torch.equal(next(part.batches(64, "cpu", chosen))[0], x[chosen])


def test_fingerprint_changes_when_two_images_or_labels_swap():
    part = load("digits", "/", "test")
    swapped = torch.arange(len(part))
    swapped[[3, 17]] = swapped[[17, 3]]
    prints = {ImageSet(part.info, images, labels).fingerprint for images, labels in (
        (part.images, part.labels), (part.images[swapped], part.labels), (part.images, part.labels[swapped]),
        (part.images[swapped], part.labels[swapped]), (part.images[:-1], part.labels[:-1]))}
    assert len(prints) == 5 and load("digits", "/", "test").fingerprint == part.fingerprint


def test_moments_are_those_of_each_channel():
    info = DataInfo("x", ("a", "b"), 2, 8, (0.2, 0.4), (0.5, 0.1), False)
    images = torch.stack([torch.full((8, 8), 51), torch.full((8, 8), 204)])[None].to(torch.uint8)
    x, _ = next(ImageSet(info, images, torch.zeros(1, dtype=torch.int64)).batches(1, "cpu"))
    assert torch.allclose(x, torch.tensor([0.0, 4.0])[None, :, None, None].expand_as(x), atol=1e-5)


def test_a_lazy_folder_has_a_fingerprint_of_names_and_sizes(tmp_path, monkeypatch):
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name)
    (tmp_path / "test").symlink_to(tmp_path / "train")
    monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    first = load("folder", tmp_path, "train")
    before = first.fingerprint
    assert load("folder", tmp_path, "train").fingerprint == before
    path = tmp_path / first.images.source.names[0]
    path.write_bytes(path.read_bytes() + b"\0")
    assert load("folder", tmp_path, "train").fingerprint != before
