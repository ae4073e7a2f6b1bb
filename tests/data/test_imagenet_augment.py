"""Augmentation of photographs against torchvision's functions for one image, fed the same draws."""
from itertools import islice

import pytest
import torch
from PIL import Image
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as reference

from conas.data import imagenet_augment
from conas.data.batches import Stream
from conas.data.imagenet_augment import canvas, crop_and_resize, draw, jitter
from conas.data.images import load
from conas.data.splits import generator
from conas.errors import InputError
from tests.data.test_batches import image_set, same

ADJUST = (reference.adjust_brightness, reference.adjust_contrast, reference.adjust_saturation, reference.adjust_hue)


@pytest.mark.parametrize("side, size", [(64, 56), (40, 35), (256, 224), (96, 24)])
def test_crop_and_resize_is_torchvisions_resized_crop(side, size):
    images, draws = image_set(12, 3, side).images, draw(12, side, True, generator("draws"))
    assert draws.mirrored.any() and not draws.mirrored.all()
    ours = crop_and_resize(images, draws, size)
    for image, box, mirrored, result in zip(images, draws.box.tolist(), draws.mirrored, ours):
        expected = reference.resized_crop(image.float(), *box, [size, size], antialias=True)
        assert torch.allclose(result, reference.horizontal_flip(expected) if mirrored else expected, atol=0.01)


def test_jitter_is_torchvisions_adjustments_in_each_images_own_order():
    x, draws = image_set(48, 3, 12).images.float(), draw(48, 12, True, generator("draws"))
    x[0], x[1], x[2] = 0, 255, 100  # without hue
    x[3, 0] = x[3, 1]               # two equal largest or least values
    ours = jitter(x, draws)
    for image, factors, order, result in zip(x, draws.factors.tolist(), draws.order.tolist(), ours):
        expected = image / 255
        for kind in order:
            expected = ADJUST[kind](expected, factors[kind])
        assert torch.allclose(result, 255 * expected, atol=0.01)
    assert not torch.allclose(ours, x, atol=1)


def test_draws_are_distributed_as_torchvisions():
    """Quantiles of 4000 draws each; their standard error is below 0.008 of the range."""
    torch.manual_seed(0)
    ours, side = draw(4000, 100, True, generator("draws")), 100
    area, ratio = imagenet_augment.AREA, imagenet_augment.RATIO
    crops = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, side, side), area, ratio)
                          for _ in range(4000)])
    changes = [ColorJitter.get_params(*[(0.6, 1.4)] * 3, (-0.2, 0.2)) for _ in range(4000)]
    factors = torch.tensor([change[1:] for change in changes])

    def quantiles(values):
        return values.double().quantile(torch.linspace(0.05, 0.95, 19).double(), dim=0)

    assert (quantiles(ours.box) - quantiles(crops)).abs().max() < 0.05 * side
    areas, expected = (box[:, 2] * box[:, 3] / side**2 for box in (ours.box, crops))
    assert (quantiles(areas) - quantiles(expected)).abs().max() < 0.05
    assert (quantiles(ours.factors) - quantiles(factors)).abs().max() < 0.05
    assert abs(ours.mirrored.double().mean().item() - 0.5) < 0.04
    orders = ours.order.unique(dim=0, return_counts=True)
    assert len(orders[0]) == 24 and (orders[1] - 4000 / 24).abs().max() < 6 * (4000 / 24) ** 0.5
    assert not draw(100, side, False, generator("draws")).mirrored.any()


def test_boxes_lie_in_the_image_and_are_all_of_it_when_none_fits(monkeypatch):
    for side in (8, 57):
        top, left, height, width = draw(3000, side, True, generator(side)).box.unbind(1)
        assert top.min() == left.min() == 0 and height.min() > 0 and width.min() > 0
        for begin, length in ((top, height), (left, width)):
            ends = (begin + length)[length < side]
            assert (begin + length).max() == ends.max() == side
    monkeypatch.setattr(imagenet_augment, "AREA", (1.0, 1.0))  # no box of this area and another shape fits
    monkeypatch.setattr(imagenet_augment, "RATIO", (1.2, 1.3))
    assert draw(5, 57, True, generator(0)).box.tolist() == [[0, 0, 57, 57]] * 5


def test_images_of_a_batch_are_augmented_differently():
    draws = draw(32, 32, True, generator("draws"))
    one = image_set(1).images.expand(32, -1, -1, -1)
    assert len({x.numpy().tobytes() for x in crop_and_resize(one, draws, 28)}) == 32
    assert len({x.numpy().tobytes() for x in jitter(one.float(), draws)}) == 32


def test_a_stream_of_photographs_starts_at_any_step():
    images = image_set(50, 3, canvas(28))
    settings = {"name": "training", "seed": 3, "device": "cpu", "cutout_length": 8, "crop": 28}
    arrived = list(islice(Stream(images, torch.arange(50), 16, **settings).batches(), 9))
    assert arrived[0][0].shape == (16, 3, 28, 28)
    for start in (1, 4, 7):
        assert same(islice(Stream(images, torch.arange(50), 16, **settings).batches(start), 2),
                    arrived[start:start + 2])
    others = [next(Stream(images, torch.arange(50), 16, **settings | change).batches())[0]
              for change in ({"seed": 4}, {"name": "other"}, {"cutout_length": 0}, {"augment": False})]
    assert not any(x.shape == arrived[0][0].shape and torch.equal(x, arrived[0][0]) for x in others)


def test_evaluation_takes_the_centre():
    assert [canvas(size) for size in (224, 56, 35)] == [256, 64, 40]
    images = image_set(5, 3, 40)
    whole, centre = (torch.cat([x for x, _ in images.batches(2, "cpu", crop=crop)]) for crop in (None, 35))
    assert torch.equal(centre, reference.center_crop(whole, [35, 35]))


# ImageNet's folders

def test_imagenet_is_read_from_its_class_folders(tmp_path):
    with pytest.raises(InputError, match="holds no class folders of ImageNet"):
        load("imagenet", tmp_path, "train")
    for split, count in (("train", 3), ("val", 2)):
        for label, name in enumerate(("n01440764", "n01443537")):
            for i in range(count):
                path = tmp_path / "imagenet" / split / name / f"{name}_{i}.JPEG"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (50, 40), (100 * label, 0, 0)).save(path)
    for root in (tmp_path, tmp_path / "imagenet"):
        parts = [load("imagenet", root, split) for split in ("train", "test")]
        assert [part.labels.tolist() for part in parts] == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1]]
        assert parts[0].images.shape == (6, 3, 224, 224) and parts[0].info.classes == ("n01440764", "n01443537")
    (tmp_path / "imagenet" / "val" / "n01443537").rename(tmp_path / "imagenet" / "val" / "n2")
    with pytest.raises(InputError, match=r"n01443537, n2 not in both train/ and val/"):
        load("imagenet", tmp_path, "test")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_does_not_wait():
    images = image_set(50, 3, 64)
    batches = Stream(images, torch.arange(50), 16, name="training", seed=0, device="cuda", crop=56).batches()
    first = next(batches)[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(islice(batches, 5))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = next(Stream(images, torch.arange(50), 16, name="training", seed=0, device="cpu", crop=56).batches())[0]
    assert torch.allclose(first.cpu(), expected, atol=1e-3)
