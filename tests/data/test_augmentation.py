"""Augmentation must not destroy what the label says: Cutout at every image size, mirroring of left and right."""
import json

import pytest
import torch
from PIL import Image, ImageDraw

from cnn_space1 import genotypes as space1
from cnn_space2.architect import Architect
from cnn_space2.model_search import Network
from conas import cli
from conas.commands import search, train
from conas.data import imagenet_augment
from conas.data.augment import crop_and_flip, cutout, least_visible, mirrored_classes, padding
from conas.data.batches import Stream
from conas.data.images import DATASETS, load
from conas.data.splits import generator
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import read_arguments
from conas.runs.options import AugmentOptions, DataOptions, RecipeOptions

TRAIN = ["--arch", "DARTS_V2", "--any_ops", "--init_channels", "4", "--layers", "3", "--batch_size", "16", "--device",
         "cpu"]
SEARCH = ["--dataset", "digits", "--subset", "80", "--init_channels", "2", "--layers", "3", "--batch_size", "40",
          "--epochs", "1", "--device", "cpu"]


def run_training(folder, *flags):
    train.main(folder / "cnn_space1", space1, "", argv=[*TRAIN, *map(str, flags)])
    return folder / "cnn_space1" / "train-EXP"


def run_search(folder, *flags):
    search.main(folder / "cnn_space2", Network, Architect, "", [*SEARCH, *map(str, flags)])
    return folder / "cnn_space2" / "search-EXP"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(search, "draw_genotype", lambda *_: [])


# Cutout

def seen(size: int, length: int, shifted: bool = True) -> float:
    """The least part of an image that any of all draws leaves, by drawing them all; crops at both ends and between."""
    offsets = torch.tensor([0, padding(size), 2 * padding(size)]) if shifted else torch.tensor([padding(size)])
    centres = torch.arange(size)
    draws = torch.cartesian_prod(offsets, offsets, torch.tensor([0, 1]), centres, centres)
    least = 1.0
    for some in draws.split(4096):
        white = torch.ones(len(some), 1, size, size)
        left = cutout(crop_and_flip(white, some, True), some, length)
        least = min(least, left.mean(dim=(1, 2, 3)).min().item())
    return least


@pytest.mark.parametrize("size", [8, 9, 11, 12, 13, 14, 16, 20, 28, 32])
def test_half_an_images_length_never_hides_an_image(size):
    for length in {size // 2, size - padding(size) - 1, size - padding(size), size}:
        assert seen(size, length) == pytest.approx(least_visible(size, length))
    assert seen(size, size // 2) > 0.4 and seen(size, size - padding(size)) == 0
    assert seen(size, size // 2, shifted=False) >= 0.75  # of the paper's 16 of 32 pixels


def test_the_default_length_follows_the_image():
    for name, info in DATASETS.items():
        for size in (None, 8, 12, 15, 32, 96, 224, 1024):
            data = DataOptions(dataset=name, image_size=size)
            for options in (AugmentOptions(cutout=True), RecipeOptions(cutout=True)):
                length = options.decided(data, {}).cutout_length
                assert length == (size or info.image_size) // 2
                assert all(least_visible(size or info.image_size, length, shifted) > 0.4 for shifted in (True, False))
    assert AugmentOptions(cutout=True).decided(DataOptions(), {}).cutout_length == 16  # CIFAR-10's, as ever
    assert AugmentOptions(cutout=True, cutout_length=5).decided(DataOptions(), {"cutout_length": 7}).cutout_length == 5


@pytest.mark.parametrize("flags, most", [(["--cutout_length", 16], 6), (["--cutout_length", 7], 6),
                                         (["--image_size", 12, "--cutout_length", 16], 9)])
@pytest.mark.parametrize("script", [run_training, run_search])
def test_a_length_that_hides_images_is_refused_in_one_line(tmp_path, capsys, script, flags, most):
    more = ["--dataset", "digits", "--epochs", 1, "--cutout", *flags]
    assert cli.run(lambda: script(tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --cutout_length {flags[-1]}: hides all of some images") and "\n" not in error[:-1]
    assert f"give at most {most}," in error and not list(tmp_path.rglob("args.json"))


def test_the_longest_square_that_is_let_through_leaves_something_in_every_batch():
    images = load("digits", "/", "train")
    stream = Stream(images, torch.arange(512), 256, name="x", seed=0, device="cpu", cutout_length=6)
    assert "--cutout_length 6: leaves 20 % of some images" in stream.warnings()[0]
    batches = stream.batches()
    for x, _ in (next(batches) for _ in range(20)):
        assert ((x != 0).flatten(1).sum(1) > 0).all()


def test_boxes_of_photographs_are_never_empty():
    for size in (8, 9, 12, 33, 224):
        side = imagenet_augment.canvas(size)
        draws = imagenet_augment.draw(2000, side, True, generator("boxes", size))
        assert draws.box[:, 2:].min() >= 2 and (draws.box[:, 2:].prod(1) >= 0.05 * side**2).all()
        some = draws.of(slice(0, 50))
        white = imagenet_augment.crop_and_resize(torch.full((50, 3, side, side), 200.0), some, size)
        assert torch.allclose(white, torch.tensor(200.0), atol=0.01)


# mirror images

def arrows(root, names=("left", "right"), count=80):
    """Pictures of arrows in class folders; the first class points to the left."""
    numbers = torch.Generator().manual_seed(0)
    for side, name in enumerate(names):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(count):
            x, y, dark, light = torch.randint(0, 60, (4,), generator=numbers).tolist()
            image = Image.new("RGB", (24, 24), (dark, dark, dark))
            pen, colour, x, y = ImageDraw.Draw(image), (255 - light,) * 3, 12 + x % 5 - 2, 12 + y % 9 - 4
            tip = x - 7 if side == 0 else x + 7
            pen.line((x - 7, y, x + 7, y), colour, 2)
            pen.polygon([(tip, y), (x, y - 5), (x, y + 5)], colour)
            image.save(folder / f"{i:02}.png")
    return root


def last_top1(folder) -> float:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["valid_top1"]


def test_arrows_are_learned_without_mirroring_only(tmp_path):
    flags = ["--dataset", "folder", "--data", arrows(tmp_path / "arrows"), "--image_size", 12, "--epochs", 8,
             "--valid_portion", 0.5, "--drop_path_prob", 0]
    plain = run_training(tmp_path / "plain", *flags, "--no-flip")
    mirrored = run_training(tmp_path / "mirrored", *flags)
    assert last_top1(plain) == 100 and last_top1(mirrored) < 80
    warning = "warning: images are mirrored, though some are called left and others right; --no-flip leaves"
    logs = [(folder / "log.txt").read_text() for folder in (plain, mirrored)]
    assert warning not in logs[0] and logs[1].count(warning) == 1


@pytest.mark.parametrize("crop", [None, 28])
def test_the_flag_decides_whether_batches_are_mirrored(tmp_path, crop):
    """Images whose left half is darker: without mirroring no image of a batch has a darker right half."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(16):
            image = Image.new("RGB", (32, 32), (20, 20, 20))
            image.paste((200, 200, 200), (16, 0, 32, 32))
            image.save(tmp_path / name / f"{i}.png")
    images = load("folder", tmp_path, "train")

    def darker_right(flip) -> int:
        stream = Stream(images, torch.arange(24), 24, name="x", seed=0, device="cpu", crop=crop, flip=flip)
        means = next(stream.batches())[0].mean(dim=(1, 2))  # by column
        half = means.shape[1] // 2
        return int((means[:, :half].mean(1) > means[:, half:].mean(1) + 0.05).sum())

    assert darker_right(False) == 0 < 5 < darker_right(True) == darker_right(None)  # None: the data set's own


@pytest.mark.parametrize("names, pair", [
    (["left", "right"], True), (["Left", "RIGHT"], True), (["turn-right", "straight", "turn-left"], True),
    (["left_arrow", "right_arrow"], True), (["arrowLeft", "arrowRight"], True), (["hand right 2", "hand left 2"], True),
    (["left_to_right", "right_to_left"], True), (["cat", "dog"], False), (["left", "straight"], False),
    (["leftarrow", "rightarrow"], True), (["clockwise", "Counterclockwise"], True), (["links", "rechts"], True),
    (["hand_L", "hand_R"], True), (["b", "d"], True), (["lamp", "ramp"], False), (["bog", "dog"], False),
    (["cleft", "bright"], False), (["right_whale", "cat"], False), (["left_right", "none"], False)])
def test_classes_called_left_and_right_are_recognised(names, pair):
    found = mirrored_classes(names)
    assert bool(found) == pair and (not pair or set(found) <= set(names))


@pytest.mark.parametrize("script", [run_training, run_search])
def test_mirroring_is_recorded_and_a_run_goes_on_as_it_began(tmp_path, script):
    flags = ["--dataset", "digits", "--subset", 80, "--epochs", 1]
    folder = script(tmp_path, *flags, "--flip")
    checkpoint = checkpoints.load(folder / "checkpoints" / "epoch_000.pt")
    assert checkpoint["arguments"]["flip"] is read_arguments(folder)["flip"] is True
    with pytest.raises(InputError, match=r"holds a run with --flip True \(now False\); start it with those arguments"):
        script(tmp_path, *flags, "--no-flip")
    script(tmp_path, *flags)  # what is left open is as it began
    assert "finished" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("script", [run_training, run_search])
@pytest.mark.parametrize("image_size, length, flags", [(None, None, []), (20, 16, ["--cutout"])])
def test_runs_from_before_these_flags_go_on(tmp_path, script, image_size, length, flags):
    """As commit 662cc92 wrote args.json: no --flip, and a length of 16 whether it was used or not."""
    size = ["--image_size", image_size] if image_size else []
    flags = ["--dataset", "digits", "--subset", 80, "--epochs", 1, *size, *flags]
    folder = script(tmp_path, *flags, *(["--cutout_length", length] if length else []))
    content = json.loads((folder / "args.json").read_text())
    assert content["arguments"]["cutout_length"] == length and content["arguments"].pop("flip") is False
    (folder / "args.json").write_text(json.dumps(content | {"arguments": content["arguments"] | {"cutout_length": 16}}))
    script(tmp_path, *flags)
    assert "finished" in (folder / "log.txt").read_text()
    script(tmp_path, *flags, "--no-flip")
    with pytest.raises(InputError, match=r"--flip False \(now True\)"):
        script(tmp_path, *flags, "--flip")
    assert read_arguments(folder)["flip"] is False

