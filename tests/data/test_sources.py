"""Readers: small files in the published formats go in, and what comes out is compared with what was written."""
import gzip
import hashlib
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

import conas.data.images
import conas.data.sources
from conas.data.images import load
from conas.data.listing import Listing
from conas.errors import InputError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def save_image(path: Path, value, mode: str = "RGB", size=(10, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def save_classes(root: Path, counts: dict[str, int]) -> None:
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            save_image(root / name / f"{i}.png", (label, i, 7))


# digits

def test_digits_are_those_of_scikit_learn_and_no_image_is_in_both_splits():
    parts = [load("digits", "/does/not/matter", split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [1347, 450]
    ours = [(part.images[i].flatten().tolist(), part.labels[i].item()) for part in parts for i in range(len(part))]
    theirs = [([round(v * 255 / 16) for v in x], int(y)) for x, y in zip(*load_digits(return_X_y=True))]
    assert sorted(ours) == sorted(theirs)  # all are distinct, hence the splits are disjoint
    assert len({str(x) for x, _ in ours}) == 1797
    _, counts = np.unique(load_digits().target, return_counts=True)
    assert np.abs(np.bincount(parts[1].labels) - counts * 450 / 1797).max() < 1


def test_damaged_digits_are_named(tmp_path, monkeypatch):
    content = conas.data.sources.DIGITS.read_bytes()
    monkeypatch.setattr(conas.data.sources, "DIGITS", tmp_path / "digits.npz")
    for damaged in (None, b"", content[:20000], content[:9000] + bytes(9000) + content[18000:]):
        if damaged is not None:
            (tmp_path / "digits.npz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"digits\.npz"):
            load("digits", tmp_path, "train")


# torchvision's archives

@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """A CIFAR archive of 4 images a file in the published layout. Returns name, root, archive, {split: (x, y)}."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[request.param]
    key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    made, root = tmp_path / "made" / kind.base_folder, tmp_path / "data"
    made.mkdir(parents=True)
    root.mkdir()

    def dump(name, content):
        (made / name).write_bytes(pickle.dumps(content))
        return [name, md5(made / name)]

    truth = {}
    for split, attribute in (("train", "train_list"), ("test", "test_list")):
        files = [name for name, _ in getattr(kind, attribute)]
        x = RNG.integers(0, 256, (len(files), 4, 3072), dtype=np.uint8)
        y = RNG.integers(0, 10, (len(files), 4))
        truth[split] = x.reshape(-1, 3, 32, 32), y.flatten()
        sums = [dump(name, {"data": x[i], key: y[i].tolist()}) for i, name in enumerate(files)]
        monkeypatch.setattr(kind, attribute, sums)
    classes = [f"class {i}" for i in range(10)]
    _, total = dump(kind.meta["filename"], {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": total})
    archive = root / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", md5(archive))
    return request.param, root, archive, truth


def test_cifar(cifar):
    name, root, archive, truth = cifar
    for split, (x, y) in truth.items():
        part = load(name, root, split)
        assert np.array_equal(part.images, x) and np.array_equal(part.labels, y)
        assert part.info.classes[3] == "class 3" and part.info.num_classes == 10
        archive.unlink(missing_ok=True)  # the second split needs no archive
    assert len(list(root.iterdir())) == 1  # the unpacked folder, and nothing left over


def test_a_damaged_archive_is_named_and_a_good_one_mends_it(cifar):
    name, root, archive, truth = cifar
    content = archive.read_bytes()
    archive.write_bytes(content[:-100])
    with pytest.raises(InputError, match=f"{archive.name}: damaged.*put {archive.name} .*--dataset digits") as error:
        load(name, root, "train")
    assert "\n" not in str(error.value) and list(root.iterdir()) == [archive]
    archive.write_bytes(content)
    load(name, root, "train")
    batch = next(p for p in root.rglob("*") if p.name in ("data_batch_1", "train"))
    batch.write_bytes(batch.read_bytes()[:50])  # as a killed unpacking would leave it
    assert np.array_equal(load(name, root, "train").images, truth["train"][0])


@pytest.mark.parametrize("name,archive", [
    ("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz"), ("svhn", "train_32x32.mat"),
    ("fashionmnist", "FashionMNIST/raw/train-images-idx3-ubyte.gz"), ("imagenette", "imagenette2-160.tgz")])
def test_without_network_the_message_says_what_to_put_where(tmp_path, name, archive):
    with pytest.raises(InputError, match=f"{archive}: not found.*--dataset digits") as error:
        load(name, tmp_path / "new", "train")
    assert "\n" not in str(error.value) and list((tmp_path / "new").iterdir()) == []


def test_svhn(tmp_path, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    x = RNG.integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    scipy_io.savemat(tmp_path / "test_32x32.mat", {"X": x, "y": np.array([[10], [1], [2], [9], [10], [5]])})
    url, name, _ = datasets.SVHN.split_list["test"]
    monkeypatch.setitem(datasets.SVHN.split_list, "test", [url, name, md5(tmp_path / name)])
    part = load("svhn", tmp_path, "test")
    assert part.labels.tolist() == [0, 1, 2, 9, 0, 5] and not part.info.flip
    assert np.array_equal(part.images[4], x[..., 4].transpose(2, 0, 1))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install scipy"):
        load("svhn", tmp_path, "test")


def test_fashionmnist_survives_a_killed_unpacking(tmp_path, monkeypatch):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    x, y = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.array([9, 0, 3, 3, 1], dtype=np.uint8)
    resources = []
    for name, _ in datasets.FashionMNIST.resources:
        content = (struct.pack(">HBBIII", 0, 8, 3, *x.shape) + x.tobytes() if "images" in name else
                   struct.pack(">HBBI", 0, 8, 1, len(y)) + y.tobytes())
        (raw / name).write_bytes(gzip.compress(content))
        resources.append((name, md5(raw / name)))
    monkeypatch.setattr(datasets.FashionMNIST, "resources", resources)
    for _ in range(2):
        part = load("fashionmnist", tmp_path, "train")
        assert np.array_equal(part.images[:, 0], x) and np.array_equal(part.labels, y)
        assert part.info.channels == 1 and part.info.classes[9] == "Ankle boot"
        (raw / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0\0\x05")


def test_imagenette(tmp_path, monkeypatch):
    made = tmp_path / "imagenette2-160"
    for split in ("train", "val"):
        for label, wnid in enumerate(sorted(datasets.Imagenette._WNID_TO_CLASS)):
            save_image(made / split / wnid / f"{wnid}.JPEG", (20 * label, 0, 0), size=(50, 40))
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "imagenette2-160.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(made, made.name)
    url, _ = datasets.Imagenette._ARCHIVES["160px"]
    monkeypatch.setitem(datasets.Imagenette._ARCHIVES, "160px", (url, md5(archive)))
    part = load("imagenette", tmp_path / "data", "test")
    assert part.images.shape == (10, 3, 32, 32) and part.labels.tolist() == list(range(10))
    assert part.info.classes[:2] == ("tench", "English springer")
    assert (part.images[:, 0].float().mean((1, 2)) - 20 * torch.arange(10)).abs().max() < 4


def test_the_jpeg_copy_of_cifar10_is_whole_and_in_its_class_order_or_refused(tmp_path):
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    root = tmp_path / "CIFAR-10-images"
    for part, count in (("train", 5000), ("test", 1000)):
        for label, name in enumerate(reversed(names)):
            save_image(root / part / name / "0000.jpg", (label, 0, 0), size=(32, 32))
            for i in range(1, count):  # names are enough: nothing is decoded here
                os.link(root / part / name / "0000.jpg", root / part / name / f"{i:04}.jpg")
    for where in (tmp_path, root):
        for split, count in (("train", 5000), ("test", 1000)):
            classes, files, labels = conas.data.sources.READERS["cifar10_jpeg"](where, split, Listing())
            assert list(classes) == names and torch.bincount(labels).tolist() == [count] * 10
            assert all(Path(name).parent.name == classes[y] for name, y in zip(files.names, labels))
    copy, original = (conas.data.images.DATASETS[name] for name in ("cifar10_jpeg", "cifar10"))
    assert (copy.mean, copy.std) == (original.mean, original.std)
    (root / "test" / "dog" / "0999.jpg").unlink()
    with pytest.raises(InputError, match=r"test: not a whole copy .* dog \(999\)"):
        load("cifar10_jpeg", tmp_path, "train")
    (root / "test" / "dog").rename(root / "test" / "puppy")
    with pytest.raises(InputError, match=r"dog \(0\), puppy \(999\)"):
        load("cifar10_jpeg", tmp_path, "train")
    with pytest.raises(InputError, match="nowhere: holds no JPEG copy of CIFAR-10; clone"):
        load("cifar10_jpeg", tmp_path / "nowhere", "train")


# folders

@pytest.mark.parametrize("lazy", [False, True])
def test_a_folder_without_splits_sets_a_fifth_of_every_class_aside(tmp_path, monkeypatch, lazy):
    save_classes(tmp_path, {"bee": 10, "ant": 15, "cat": 5})  # class-sorted on disk, as folders always are
    if lazy:
        monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    seen = []
    for split, counts in (("train", [12, 8, 4]), ("test", [3, 2, 1])):
        part = load("folder", tmp_path, split)
        assert part.info.classes == ("ant", "bee", "cat") and part.info.image_size == 32
        assert torch.bincount(part.labels).tolist() == counts
        assert isinstance(part.images, torch.Tensor) != lazy
        for x, y in part.batches(7, "cpu"):
            mean, std = part.info.moments("cpu")
            pixels = (x * std + mean).round()[:, :, 0, 0].int().tolist()
            assert [["bee", "ant", "cat"][p[0]] for p in pixels] == [part.info.classes[i] for i in y]
            seen += [(p[0], p[1]) for p in pixels]
    assert sorted(seen) == sorted((label, i) for label, n in enumerate((10, 15, 5)) for i in range(n))


@pytest.mark.parametrize("held_out", [("test",), ("val",), ("test", "val")])
def test_a_folder_with_splits(tmp_path, held_out):
    save_classes(tmp_path / "train", {"a": 3, "b": 2})
    for i, name in enumerate(held_out):
        save_classes(tmp_path / name, {"a": 1, "b": 4 + i})
    assert load("folder", tmp_path, "train").labels.tolist() == [0, 0, 0, 1, 1]
    assert load("folder", tmp_path, "test").labels.tolist() == [0, 1, 1, 1, 1]
    save_classes(tmp_path / held_out[0], {"extra": 1})
    with pytest.raises(InputError, match=r"extra not in both"):
        load("folder", tmp_path, "train")


def test_wrong_folders_are_refused_by_name(tmp_path):
    root = tmp_path / "root"

    def refuses(pattern):
        with pytest.raises(InputError, match=pattern):
            load("folder", root, "train")
    refuses("root: no such folder")
    root.write_text("")
    refuses("root: not a folder")
    root.unlink()
    root.mkdir()
    refuses("root: holds 0 folders")
    save_classes(root, {"a": 5, "b": 4})
    refuses(r"fewer than 5 images in b \(4\)")
    save_image(root / "c" / ".hidden.png", 0)
    (root / "c" / "notes.txt").write_text("")
    refuses(r"root/c: no images")


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_an_unreadable_image_is_named_in_one_line(tmp_path, monkeypatch, workers):
    save_classes(tmp_path, {"a": 5, "b": 5})
    for i in range(5):
        (tmp_path / "b" / f"{i}.png").write_bytes((tmp_path / "b" / f"{i}.png").read_bytes()[:45])
    if workers is not None:
        monkeypatch.setattr(conas.data.images, "MEMORY_LIMIT", 0)
    with pytest.raises(InputError, match=r"b/\d\.png: cannot be read as an image") as error:
        list(load("folder", tmp_path, "train").batches(2, "cpu", workers=workers or 0))
    assert "\n" not in str(error.value)


def test_every_kind_of_image_becomes_rgb(tmp_path):
    for name, mode, value in (("x.png", "L", 100), ("x.jpg", "CMYK", (0, 255, 255, 0)), ("y.png", "I;16", 100 * 256),
                              ("x.gif", "P", 0), ("z.png", "RGBA", (100, 100, 100, 255))):
        for split in ("train", "test"):
            save_image(tmp_path / split / name.replace(".", "-") / name, value, mode, size=(40, 10))
    part = load("folder", tmp_path, "train", image_size=8)
    colours = dict(zip(part.info.classes, part.images[:, :, 4, 4].tolist()))
    assert colours["x-png"] == colours["y-png"] == colours["z-png"] == [100] * 3 and colours["x-gif"] == [0] * 3
    assert np.abs(np.array(colours["x-jpg"]) - (255, 0, 0)).max() < 5
