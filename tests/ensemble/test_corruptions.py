"""Corruptions, on real images; and CIFAR-10-C as published."""
import numpy as np
import pytest
import torch

from conas.data.images import DATASETS, ImageSet, load
from conas.errors import InputError
from ensemble.measure.corruptions import BLOCK, CORRUPTIONS, SEVERITIES, corrupt, mean_corruption_error
from ensemble.measure.shift import BENCHMARK, OwnCorruptions, PublishedCorruptions, find_source


def pictures(channels=3, side=32, count=12):
    """Smooth colour pictures, from the digits enlarged."""
    digits = load("digits", "data", "test").images[:count].float()
    grey = torch.nn.functional.interpolate(digits, (side, side), mode="bilinear")
    return torch.cat([grey * part for part in (1.0, 0.8, 0.6)[:channels]], dim=1).round().byte()


def damage(images, name, severity):
    return (corrupt(images, name, severity).float() - images.float()).square().mean().item()


def test_there_are_enough_kinds():
    assert len(CORRUPTIONS) >= 10
    assert {"gaussian_noise", "defocus_blur", "snow", "jpeg"} <= CORRUPTIONS.keys()


@pytest.mark.parametrize("channels, side", [(3, 32), (1, 8), (1, 28), (3, 64)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_takes_every_shape_and_changes_the_images(name, channels, side):
    images = pictures(channels, side)
    before = images.clone()
    for severity in (1, 5):
        corrupted = corrupt(images, name, severity)
        assert corrupted.shape == images.shape
        assert corrupted.dtype == torch.uint8
    assert torch.equal(images, before)
    assert not torch.equal(corrupted, images)
    assert (corrupted != images).flatten(1).any(dim=1).all()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_grows(name):
    images = pictures()
    steps = [damage(images, name, severity) for severity in SEVERITIES]
    assert steps[0] > 0
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("name", ["gaussian_noise", "fog", "jpeg"])
def test_a_corruption_is_a_function_of_seed_and_position(name):
    images = pictures(count=4).repeat(BLOCK // 4 + 2, 1, 1, 1)  # more than a block
    whole = corrupt(images, name, 3, seed=1)
    assert torch.equal(whole, corrupt(images, name, 3, seed=1))
    assert torch.equal(whole[BLOCK:], corrupt(images[BLOCK:], name, 3, seed=1, first=BLOCK))
    assert torch.equal(whole, corrupt(images, name, 3, seed=2)) == (name == "jpeg")  # jpeg has no chance in it
    assert torch.equal(whole[:4], whole[4:8]) == (name == "jpeg")


def test_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    for name in CORRUPTIONS:
        corrupt(pictures(count=2), name, 1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_single_corruptions_mean():
    images = pictures()
    assert torch.equal(corrupt(images, "brightness", 1), (images.int() + 13).clamp(max=255).byte())
    grey = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    for name in ("gaussian_blur", "defocus_blur", "motion_blur", "zoom_blur", "elastic", "pixelate", "contrast"):
        assert torch.equal(corrupt(grey, name, 5), grey), name  # they move pixels or pull to the mean
    noise = corrupt(grey.repeat(20, 1, 1, 1), "gaussian_noise", 3).float() - 128
    assert noise.std().item() == pytest.approx(255 * 0.08, rel=0.02)
    changed = (corrupt(grey.repeat(20, 1, 1, 1), "impulse_noise", 5) != 128).double().mean().item()
    assert changed == pytest.approx(0.07, rel=0.1)


def test_mean_corruption_error_by_hand():
    errors, reference = {"a": [10, 30], "b": [50, 70]}, {"a": [40, 40], "b": [60, 60]}
    assert mean_corruption_error(errors) == pytest.approx((20 + 60) / 2)
    assert mean_corruption_error(errors, reference) == pytest.approx((50 + 100) / 2)
    assert mean_corruption_error(reference, reference) == pytest.approx(100)


def test_own_corruptions_give_all_images_in_order():
    images = load("digits", "data", "test")
    blocks = list(OwnCorruptions(images).blocks("jpeg", 2))
    assert torch.equal(torch.cat(blocks), corrupt(images.images, "jpeg", 2))


@pytest.fixture
def cifar(tmp_path):
    """A CIFAR-10 test set and its CIFAR-10-C folder, in the published format, of numbered images."""
    labels = torch.arange(10_000) % 10
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(labels.numpy(), 5).astype(np.uint8))
    pixels = np.zeros((50_000, 32, 32, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(50_000) // 10_000, np.arange(50_000) % 250
    np.save(folder / "fog.npy", pixels)
    return ImageSet(DATASETS["cifar10"], torch.zeros(10_000, 3, 32, 32, dtype=torch.uint8), labels), tmp_path


def test_cifar_10_c_is_used_where_it_exists(cifar):
    images, root = cifar
    source = find_source(images, root)
    assert isinstance(source, PublishedCorruptions) and source.names == ("fog",)
    for severity in SEVERITIES:
        x = torch.cat(list(source.blocks("fog", severity)))
        assert x.shape == (10_000, 3, 32, 32)
        assert (x[:, 0, 0, 0] == severity - 1).all()
        assert torch.equal(x[:, 1, 0, 0].long(), ((severity - 1) * 10_000 + torch.arange(10_000)) % 250)
    assert isinstance(find_source(load("digits", "data", "test"), root), OwnCorruptions)
    subset = ImageSet(images.info, images.images[:100], images.labels[:100])
    assert isinstance(find_source(subset, root), OwnCorruptions)


def test_the_mean_is_over_the_fifteen_corruptions_that_published_means_are_over(cifar):
    images, root = cifar
    folder = root / "CIFAR-10-C"
    (folder / "speckle_noise.npy").hardlink_to(folder / "fog.npy")  # one of the archive's four others
    source = find_source(images, root)
    assert source.names == ("fog",) and source.title == "CIFAR-10-C, 1 of its 15 corruptions"
    for name in BENCHMARK:
        if name != "fog":
            (folder / f"{name}.npy").hardlink_to(folder / "fog.npy")
    whole = find_source(images, root)
    assert len(set(whole.names)) == 15 and "speckle_noise" not in whole.names and whole.title == "CIFAR-10-C"


def test_another_cifar_10_c_is_refused(cifar):
    images, root = cifar
    with pytest.raises(InputError, match="labels are not those"):
        PublishedCorruptions(root / "CIFAR-10-C", images.labels.flip(0))
    (root / "CIFAR-10-C" / "fog.npy").write_bytes(b"damaged")
    source = find_source(images, root)
    with pytest.raises(InputError, match=r"fog\.npy"):
        next(source.blocks("fog", 1))
