"""Splits, streams and augmentation against plain loops over images, fed the same draws."""
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import conas.data.images
from conas.data.augment import crop_and_flip, cutout, draw, padding
from conas.data.batches import Stream, stratified_split
from conas.data.images import DataInfo, ImageSet, load
from conas.data.splits import generator
from conas.errors import InputError


def image_set(n=50, channels=3, size=32, flip=True) -> ImageSet:
    """Image i has pixels of its own, and label i mod 5."""
    info = DataInfo("random", tuple("abcde"), channels, size, (0.5,) * channels, (0.25,) * channels, flip)
    images = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator(0))
    return ImageSet(info, images, torch.arange(n) % 5)


def stream(images=None, batch_size=16, **settings) -> Stream:
    images = images or image_set()
    settings = {"name": "weights", "seed": 3, "device": "cpu", "cutout_length": 8} | settings
    return Stream(images, torch.arange(len(images)), batch_size, **settings)


def same(ours, theirs) -> bool:
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(ours, theirs, strict=True))


# splits

@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(0, 100), st.integers(0, 2**31), st.booleans())
def test_a_split_in_two_has_the_nearest_sizes_in_total_and_in_every_class(labels, percent, seed, by_class):
    labels = torch.tensor(sorted(labels) if by_class else labels)
    fraction = percent / 100
    parts = stratified_split(labels, [fraction, 1 - fraction], seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)
    assert abs(len(parts[0]) - fraction * len(labels)) <= 0.5 + 1e-9
    for c in set(labels.tolist()):
        members = [i for i in range(len(labels)) if labels[i] == c]
        taken = len(set(members) & set(parts[0].tolist()))
        assert abs(taken - fraction * len(members)) < 1


def test_a_class_sorted_set_is_divided_in_three_at_random():
    labels = torch.arange(10).repeat_interleave(30)
    parts = stratified_split(labels, [0.5, 0.3, 0.2], seed=1)
    assert [torch.bincount(labels[p]).tolist() for p in parts] == [[15] * 10, [9] * 10, [6] * 10]
    again, other = stratified_split(labels, [0.5, 0.3, 0.2], 1), stratified_split(labels, [0.5, 0.3, 0.2], 2)
    assert torch.equal(parts[0], again[0]) and not torch.equal(parts[0], other[0])
    assert set(parts[0].tolist()) != {i for i in range(300) if i % 30 < 15}


# augmentation

@pytest.mark.parametrize("size,flip,length", [(32, True, 16), (8, False, 3), (28, True, 0), (9, True, 20)])
def test_augmentation_equals_a_loop_over_images(size, flip, length):
    images, margin = image_set(40, 2, size).images, padding(size)
    draws = draw(40, size, generator("draws"))
    ours = crop_and_flip(images, draws, flip)
    holes = cutout(torch.ones(40, 2, size, size), draws, length)
    for i, (top, left, mirrored, row, column) in enumerate(draws.tolist()):
        padded = np.pad(images[i].numpy(), ((0, 0), (margin, margin), (margin, margin)))
        expected = padded[:, top:top + size, left:left + size]
        if flip and mirrored:
            expected = expected[:, :, ::-1]
        assert np.array_equal(ours[i], expected)
        mask = np.ones((2, size, size))
        first_row, first_column = row - length // 2, column - length // 2
        mask[:, max(first_row, 0):max(first_row + length, 0), max(first_column, 0):max(first_column + length, 0)] = 0
        assert np.array_equal(holes[i], mask)


def test_every_value_is_drawn_and_draws_differ_within_a_batch():
    draws = draw(2000, 32, generator("draws"))
    for column, limit in zip(draws.T, (9, 9, 2, 32, 32)):
        values, counts = column.unique(return_counts=True)
        assert values.tolist() == list(range(limit))
        # six standard deviations of a binomial count
        assert (counts - 2000 / limit).abs().max() < 6 * (2000 / limit) ** 0.5
    same_image = image_set(1).images.expand(64, -1, -1, -1)
    assert len({x.numpy().tobytes() for x in crop_and_flip(same_image, draws[:64], True)}) > 40
    assert len({x.numpy().tobytes() for x in cutout(torch.ones(64, 1, 32, 32), draws[:64], 16)}) > 55


def test_padding_is_4_but_for_small_images():
    assert [padding(size) for size in (8, 16, 28, 32, 224)] == [1, 2, 4, 4, 4]


def test_cutout_removes_less_than_a_quarter_because_squares_reach_over_the_border():
    every_centre = torch.cartesian_prod(*[torch.tensor([0])] * 3, torch.arange(32), torch.arange(32))
    removed = (cutout(torch.ones(1024, 1, 32, 32), every_centre, 16) == 0).double().mean().item()
    visible = [min(c + 8, 32) - max(c - 8, 0) for c in range(32)]  # of the 16 rows or columns around a centre
    assert removed == pytest.approx((sum(visible) / 32 / 32) ** 2) and 0.15 < removed < 0.25
    drawn = (cutout(torch.ones(4000, 1, 32, 32), draw(4000, 32, generator("c")), 16) == 0).double().mean().item()
    assert drawn == pytest.approx(removed, rel=0.03)


# streams

@pytest.mark.parametrize("drop_last,steps,last", [(False, 4, 2), (True, 3, 16)])
def test_an_epoch_shows_every_image_once(drop_last, steps, last):
    images = image_set()
    plain = stream(images, augment=False, drop_last=drop_last)
    assert plain.steps == steps
    batches = list(islice(plain.batches(), 2 * steps))
    assert [len(y) for _, y in batches] == ([16] * (steps - 1) + [last]) * 2
    for epoch in range(2):
        x = torch.cat([x for x, _ in batches[epoch * steps:(epoch + 1) * steps]])
        y = torch.cat([y for _, y in batches[epoch * steps:(epoch + 1) * steps]])
        pixels = ((x * 0.25 + 0.5) * 255).round().to(torch.uint8)
        shown = [next(i for i in range(50) if torch.equal(images.images[i], p)) for p in pixels]
        assert len(set(shown)) == len(shown) and torch.equal(images.labels[shown], y)
        assert shown == plain.order(epoch).tolist()[:len(shown)] != sorted(shown)
    assert sorted(plain.order(0).tolist()) == sorted(plain.order(1).tolist()) == list(range(50))
    assert plain.order(0).tolist() != plain.order(1).tolist()


def test_a_batch_is_the_augmented_normalised_images_of_its_indices():
    images = image_set()
    x, y = next(stream(images).batches(5))
    numbers = stream(images).order(1)[16:32]
    draws = draw(16, 32, generator(3, "weights", "augmentation", 5))
    expected = (crop_and_flip(images.images[numbers], draws, True) / 255 - 0.5) / 0.25
    assert torch.allclose(x, cutout(expected, draws, 8), atol=1e-5) and torch.equal(y, images.labels[numbers])
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(x, next(stream(images, cutout_length=0).batches(5))[0])


@pytest.mark.parametrize("drop_last", [False, True])
def test_starting_at_a_step_equals_arriving_there(drop_last):
    arrived = list(islice(stream(drop_last=drop_last).batches(), 12))
    for start in range(10):
        assert same(islice(stream(drop_last=drop_last).batches(start), 2), arrived[start:start + 2])


def test_seed_name_and_epoch_change_the_order_and_the_draws():
    orders = [stream(**change).order(epoch).tolist() for change, epoch in (
        ({}, 0), ({"seed": 4}, 0), ({"name": "alphas"}, 0), ({}, 1))]
    assert len({str(order) for order in orders}) == 4
    one = image_set(1)
    crops = {next(stream(one, 1, cutout_length=0, **change).batches(start))[0].numpy().tobytes()
             for change in ({}, {"seed": 4}, {"name": "alphas"}) for start in range(4)}
    assert len(crops) > 9  # of 12; the order of one image cannot differ, its draws do


def test_the_number_of_workers_changes_nothing(monkeypatch):
    halves = stratified_split(load("digits", "/", "train").labels, [0.9, 0.1], 0)
    settings = {"name": "weights", "seed": 0, "device": "cpu", "cutout_length": 2}
    expected = list(islice(Stream(load("digits", "/", "train"), halves[1], 32, **settings).batches(3), 7))
    monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    lazy = load("digits", "/", "train")
    assert not isinstance(lazy.images, torch.Tensor)
    for workers in (0, 1, 2):
        assert same(islice(Stream(lazy, halves[1], 32, **settings, workers=workers).batches(3), 7), expected)


@pytest.mark.parametrize("limit", [conas.data.images.MEMORY_LIMIT, 0])
def test_the_global_random_numbers_are_left_alone(monkeypatch, limit):
    monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", limit)
    images = load("digits", "/", "test")
    before = torch.get_rng_state()
    list(islice(stream(images, cutout_length=4).batches(), 3))
    list(islice(images.batches(100, "cpu"), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_impossible_parts_are_refused_by_flag():
    images = image_set()
    with pytest.raises(InputError, match="--train_portion"):
        Stream(images, torch.arange(0), 1, name="alphas", seed=0, device="cpu")
    with pytest.raises(InputError, match=r"--batch_size 51.*50 images"):
        stream(images, 51)
    assert stream(images, 50, drop_last=True).steps == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_sees_the_same_bits_without_waiting():
    ours = stream(device="cuda").batches()
    first = next(ours)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [first, *islice(ours, 7)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same([(x.cpu(), y.cpu()) for x, y in batches], islice(stream().batches(), 8))
