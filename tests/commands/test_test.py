"""test.py: figures against independent ones, files as DARTS' code wrote them, and the scripts in a bare clone."""
import io
import json
import pickle
import shutil
import struct
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from conas.commands import test as measure
from conas.darts import genotype as genotypes
from conas.darts.derived import NetworkCIFAR, NetworkImageNet, count_parameters
from conas.darts.published import GENOTYPES
from conas.data.images import DATASETS, ImageSet, load
from conas.errors import InputError
from conas.runs.options import TestOptions
from tests.commands.test_scripts import one_line_error
from tests.conftest import ROOT, Clone
from tests.helpers.parity import fill

DARTS = GENOTYPES["DARTS"]


def save_as_2018(path, state, wrap=False, prefix=""):
    """Write a state_dict as PyTorch 0.3 did on a GPU: plain pickles in a row, then the bytes of every storage.

    Its tensors are rebuilt by a function that is no longer written, and nothing counts batches.
    """
    storages = {}

    class Rebuilt:
        def __init__(self, tensor):
            self.storage = SimpleNamespace(tensor=tensor.contiguous())
            storages[str(id(self.storage))] = self.storage

        def __reduce__(self):
            tensor = self.storage.tensor
            return torch._utils._rebuild_tensor, (self.storage, 0, tuple(tensor.shape), tensor.stride())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, SimpleNamespace):
                return "storage", torch.cuda.FloatStorage, str(id(obj)), "cuda:0", obj.tensor.numel(), None
            return None

    content = OrderedDict((prefix + name, Rebuilt(tensor)) for name, tensor in state.items()
                          if "num_batches_tracked" not in name)
    file = io.BytesIO()
    for part in (0x1950a86a20f9469cfc6c, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}},
                 {"epoch": 250, "state_dict": content} if wrap else content, sorted(storages)):
        Pickler(file, protocol=2).dump(part)
    for key in sorted(storages):
        values = storages[key].tensor.numpy()
        file.write(struct.pack("<q", values.size) + values.astype("<f4").tobytes())
    path.write_bytes(file.getvalue())


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of 12 test images of 60x48 pixels in three classes."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 1), ("val", 4)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (48, 60, 3), dtype=np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def pixels(root, resize, crop):
    """The test images as torchvision's usual transforms prepare them, one by one."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = [reference.pil_to_tensor(reference.center_crop(reference.resize(Image.open(path), resize), crop))
              for path in sorted((root / "val").glob("*/*.png"))]
    return reference.normalize(torch.stack(images) / 255, mean, std)


@pytest.mark.parametrize("wrap, prefix", [(False, ""), (True, ""), (True, "module.")])
@pytest.mark.parametrize("build, recipe, size", [(NetworkCIFAR, "cifar", 32), (NetworkImageNet, "imagenet", 56)])
def test_published_files_give_the_right_logits(tmp_path, photographs, build, recipe, size, wrap, prefix):
    network = build(4, 3, 4, True, DARTS, image_size=size)
    fill(network, 0)
    save_as_2018(tmp_path / "old.pt", network.state_dict(), wrap, prefix)
    published = measure.Published(recipe, "folder", {})
    options = measure.PublishedOptions(auxiliary=True, init_channels=4, layers=4, image_size=size)
    content = measure.checkpoints.read(tmp_path / "old.pt")
    again, images, crop = measure.open_published("old.pt", content, published, options, str(photographs))
    assert again.genotype() == DARTS and (crop == size) == (recipe == "imagenet")
    ours = measure.predict(again, images, 5, torch.device("cpu"), crop=crop)
    with torch.no_grad():
        x = pixels(photographs, 64 if crop else size, size)  # 64: a seventh more than 56
        expected = network.eval()(x)
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    # our central square is resized by PIL in one step, theirs is resized and cut: single pixels differ by one
    assert (ours - expected).norm() < 0.02 * expected.norm()
    assert torch.equal(ours.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("change, words", [
    ({"arch": "DARTS_V1"}, "tensors do not fit --arch DARTS_V1 with 4 channels and 4 cells, with an auxiliary head"),
    ({"auxiliary": False}, "do not fit --arch DARTS with 4 channels and 4 cells, without an auxiliary head; change"),
    ({"init_channels": 6}, "with 6 channels"),
    ({"layers": 5}, "and 5 cells"),
    ({"arch": "DRATS"}, "--arch DRATS: unknown; did you mean DARTS"),
    ({"dataset": "digits", "image_size": 8}, "knows 3 classes, but digits has 10; give another --dataset"),
])
def test_published_files_of_other_networks_are_refused(photographs, change, words):
    state = NetworkCIFAR(4, 3, 4, True, DARTS).state_dict()
    options = measure.PublishedOptions(**{"auxiliary": True, "init_channels": 4, "layers": 4} | change)
    with pytest.raises(InputError, match=words) as error:
        measure.open_published("old.pt", state, measure.Published("cifar", "folder", {}), options, str(photographs))
    assert "\n" not in str(error.value)


def test_figures():
    """A network that looks up the answers, and gives the right one a rank of our choice, from which figures follow."""
    images = load("digits", "/", "test")
    ranks = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 3, 6]).repeat(45)  # among 10 classes with logits 9, 8, ... 0
    places = (images.labels[:, None] - ranks[:, None] + torch.arange(10)) % 10
    logits = torch.zeros(450, 10).scatter(1, places, torch.arange(9.0, -1, -1).expand(450, 10))

    class Known(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(7))

        def forward(self, x):
            return logits[:len(x)]  # all images are one batch; one image is for counting multiply-adds

    figures = measure.measure(Known(), images, TestOptions(batch_size=500, device="cpu"))
    assert (figures["top1_error"], figures["top5_error"]) == pytest.approx((20, 10))
    assert figures["loss"] == pytest.approx(np.log(np.exp(np.arange(10)).sum()) - (0.8 * 9 + 0.1 * 6 + 0.1 * 3))
    assert figures["parameters"] == 7 and figures["images_per_second"] > 0


def test_published_figures_stand_beside():
    figures = {"top1_error": 2.66, "top5_error": 0.1, "loss": 0.1, "parameters": 3_349_342, "multiply_adds": 5.299e8,
               "multiply_adds_thop": 5.465e8, "images_per_second": 1000.0}
    lines = measure.as_text(figures, {"top1_error": 2.63, "parameters": 3.3e6}).splitlines()
    assert " ".join(lines[0].split()) == "top-1 97.34 % error 2.66 % published: top-1 97.37 % error 2.63 %"
    assert " ".join(lines[3].split()) == "parameters 3.35 M published: parameters 3.30 M"
    assert lines[4] == "multiply-adds 529.9 M for an image; 546.5 M as thop counts"
    assert not any("published" in line for line in (lines[1], lines[2], *lines[4:]))


def whole(name, count=10_000, classes=10, **changes):
    """A test split that has all images of a data set, which look like nothing."""
    info = replace(DATASETS[name], classes=tuple(map(str, range(classes))), **changes)
    pixels = torch.zeros(1, info.channels, 1, 1, dtype=torch.uint8).expand(count, -1, -1, -1)
    return ImageSet(info, pixels, torch.zeros(count, dtype=torch.int64))


PAPER = measure.Published("cifar", "cifar10", {"top1_error": 2.63, "parameters": 3.3e6})
PUBLISHED = {"C": 36, "num_classes": 10, "layers": 20, "auxiliary": True, "genotype": DARTS}
SWAPPED = DARTS._replace(reduce=[*DARTS.reduce[:-1], ("avg_pool_3x3", 1)])


@pytest.mark.parametrize("change, images, words", [
    ({}, whole("cifar10"), None),
    ({"genotype": DARTS._replace(normal_concat=[2, 3, 4, 5])}, whole("cifar10"), None),  # the same, as a file has it
    ({"genotype": GENOTYPES["DARTS_V1"]}, whole("cifar10"), "cells DARTS"),
    ({"genotype": SWAPPED}, whole("cifar10"), "cells DARTS"),
    ({"C": 34}, whole("cifar10"), "36 channels, not 34"),
    ({"layers": 8}, whole("cifar10"), "20 cells, not 8"),
    ({"auxiliary": False}, whole("cifar10"), "auxiliary head"),
    ({}, whole("svhn"), "cifar10, not svhn"),
    ({}, whole("cifar10_jpeg"), "cifar10, not cifar10_jpeg"),
    ({"num_classes": 100}, whole("cifar100", classes=100), "10 classes, not 100"),
    ({}, whole("cifar10", 9_999), "10000 test images, not 9999"),
    ({"image_size": 40}, whole("cifar10", image_size=40), "32 pixels, not 40"),
])
def test_published_figures_are_of_one_network_on_one_test_split(change, images, words):
    with torch.device("meta"):
        network = NetworkCIFAR(**PUBLISHED | change)
    found = measure.differences(PAPER, network, images)
    assert bool(found) == bool(words) and (not words or words in "; ".join(found))


def test_published_figures_of_imagenet(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from cnn.test_imagenet import PAPER
    with torch.device("meta"):
        network = NetworkImageNet(48, 1000, 14, True, DARTS, image_size=224)
    assert not measure.differences(PAPER, network, whole("imagenet", 50_000, 1000))
    assert measure.differences(PAPER, network, whole("imagenet", 10_000, 1000))


# scripts

@pytest.fixture(scope="module")
def trained(bare_clone, tmp_path_factory) -> Clone:
    """A clone with a retrained network in space 1, trained from `/`."""
    clone = Clone(tmp_path_factory.mktemp("trained") / "CoNAS")
    shutil.copytree(bare_clone.root, clone.root)
    genotypes.save(clone.root / "cnn_space1" / "search-EXP" / "genotype.json", DARTS)
    done = clone.run("cnn_space1/train.py", "--dataset", "digits", "--subset", 200, "--init_channels", 2, "--layers", 3,
                     "--batch_size", 50, "--epochs", 1, "--auxiliary", cwd="/")
    assert done.returncode == 0, done.stderr
    return clone


def test_train_and_test_from_any_folder(trained):
    folder = trained.root / "cnn_space1" / "train-EXP"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    done = trained.run("cnn_space1/test.py", "--export", folder / "w.safetensors")
    assert done.returncode == 0, done.stderr
    for word in ("best.pt: cnn_space1, stage train, epoch 0", "450 test images, 10 classes", "top-1", "top-5", "loss",
                 "parameters", "multiply-adds", "images per second", "w.safetensors"):
        assert word in done.stdout
    again = trained.run("cnn_space1/test.py", "--model_path", folder / "w.safetensors", cwd="/")
    assert again.returncode == 0 and again.stdout.splitlines()[1:7] == done.stdout.splitlines()[1:7], again.stderr


def test_one_line_for_bad_input(trained):
    path = trained.root / "cnn_space1" / "train-EXP" / "checkpoints" / "best.pt"
    one_line_error(trained.run("cnn_space2/test.py", "--model_path", path), "best.pt", "written by cnn_space1")
    one_line_error(trained.run("cnn_space2/train.py", "--arch", "DARTS_V3"), "--arch DARTS_V3", "DARTS_V")


def test_the_baseline(trained, photographs, tmp_path):
    """The two commands for published files at their published sizes, and another training, in folder cnn."""
    for script, build, C, layers, size in (("test.py", NetworkCIFAR, 36, 20, 32),
                                           ("test_imagenet.py", NetworkImageNet, 48, 14, 224)):
        network = build(C, 3, layers, True, DARTS, image_size=size)
        save_as_2018(tmp_path / "old.pt", network.state_dict(), wrap=size == 224)
        done = trained.run(f"cnn/{script}", "--auxiliary", "--model_path", tmp_path / "old.pt", "--dataset", "folder",
                           "--data", photographs, "--image_size", size)
        assert done.returncode == 0, done.stderr
        assert f"parameters {count_parameters(network) / 1e6:.2f} M" in done.stdout
        assert "published" not in done.stdout
        of = {"test.py": "cifar10, not folder", "test_imagenet.py": "imagenet, not folder"}[script]
        assert f"the paper's figures are left out, since they are of {of}" in done.stdout
    done = trained.run("cnn/train.py", "--dataset", "digits", "--subset", 100, "--init_channels", 2, "--layers", 3,
                       "--batch_size", 50, "--epochs", 1)
    assert done.returncode == 0, done.stderr
    assert trained.run("cnn/test.py", "--arch", "DARTS_V2").returncode == 0
    one_line_error(trained.run("cnn/test.py", "--arch", "PDARTS"), "--arch PDARTS", "best.pt", "of other cells")
    checkpoint = measure.checkpoints.load(trained.root / "cnn" / "train-EXP" / "checkpoints" / "best.pt")
    assert checkpoint["genotype"] == json.loads(json.dumps(genotypes.to_json(DARTS)))
