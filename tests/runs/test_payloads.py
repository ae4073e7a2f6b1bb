"""A pickle with a payload under every file name that a script opens: it is refused, and does not run."""
import pickle
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import datasets

import conas.data.sources
from conas.commands import cells as arch
from conas.commands import test as measure
from conas.commands.scoring import scores_for
from conas.darts import genotype as genotypes
from conas.darts.operations import OPERATIONS
from conas.darts.space import Space
from conas.data.images import load
from conas.exchange.cells import find_genotype
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import Run, read_arguments
from conas.runs.options import TestOptions
from conas.runs.resume import Checkpointer
from conas.runs.scores import load_scores
from ensemble import study, study_runs
from ensemble.combine.network import load_committee
from ensemble.measure.shift import PublishedCorruptions
from ensemble.predict import read_image
from ensemble.report import html
from tests.helpers.hostile import payloads, refused
from tests.runs.test_checkpoint import ABOUT, Tiny, written

KINDS = sorted(payloads(Path("x")))
RUN = "cnn_space7/search-EXP"


def space(root: Path) -> Space:
    return Space("cnn_space7", root / "cnn_space7", Tiny)


def scores(root: Path, split: str):
    """Scores from the run's checkpoint, which is good, and the stored ones beside it, which are not."""
    path = written(root / RUN / "checkpoints" / "epoch_000.pt")
    return lambda: scores_for(space(root), path, TestOptions(), split)


def published(path: Path):
    return lambda: measure.main(path.parent, Tiny, "", measure.Published("cifar", "digits", {}),
                                ["--model_path", str(path)])


# by file name, what opens it; all are in-process, with the very calls of the scripts
OPENED = {
    f"{RUN}/checkpoints/epoch_000.pt": lambda root, path: lambda: scores_for(space(root), path, TestOptions()),
    "train-EXP/checkpoints/best.pt": lambda root, path: lambda: checkpoints.load(path),
    "run/resume.pt": lambda root, path: lambda: Checkpointer(Run(path.parent, {}), 1).load(ABOUT),
    "model_path.pt": lambda root, path: published(path),
    "model_path.safetensors": lambda root, path: published(path),
    "init_from.pt": lambda root, path: lambda: arch.load_pretrained(str(path)),
    "init_from.safetensors": lambda root, path: lambda: arch.load_pretrained(str(path)),
    "arch.json": lambda root, path: lambda: find_genotype(str(path), {}),
    "search-EXP/genotype.json": lambda root, path: lambda: genotypes.load(path, OPERATIONS),
    "search-EXP/args.json": lambda root, path: lambda: read_arguments(path.parent),
    "search-EXP/seconds.json": lambda root, path: lambda: study_runs.read_seconds(path.parent),
    "study.json": lambda root, path: lambda: study.read_plan(path),
    "committee-EXP/committee.json": lambda root, path: lambda: load_committee(root, "EXP"),
    "committee-HTML/committee.json": lambda root, path: lambda: html.stored_committee(root, "HTML"),
    f"{RUN}/probabilities/epoch_000.npz": lambda root, path: scores(root, "test"),
    f"{RUN}/probabilities/epoch_000.valid.npz": lambda root, path: scores(root, "valid"),
    f"{RUN}/probabilities/epoch_000.fog.npz": lambda root, path: lambda: load_scores(path),
    "CIFAR-10-C/labels.npy": lambda root, path: lambda: PublishedCorruptions(path.parent, torch.zeros(10)),
    "digits.npz": lambda root, path: lambda: load("digits", root, "test"),
    "photo.jpg": lambda root, path: lambda: raised(read_image(str(path), 8, 3)),
    **{f"cifar-10-batches-py/{name}": lambda root, path: lambda: load("cifar10", root, "train")
       for name, _ in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list, ["batches.meta", ""]]},
    "cifar-10-python.tar.gz": lambda root, path: lambda: load("cifar10", root, "train"),
    "cifar-100-python/train": lambda root, path: lambda: load("cifar100", root, "train"),
    "train_32x32.mat": lambda root, path: lambda: load("svhn", root, "train"),
    "FashionMNIST/raw/train-images-idx3-ubyte": lambda root, path: lambda: load("fashionmnist", root, "train"),
    "FashionMNIST/raw/train-images-idx3-ubyte.gz": lambda root, path: lambda: load("fashionmnist", root, "train"),
    "FashionMNIST/processed/training.pt": lambda root, path: lambda: load("fashionmnist", root, "train"),
    "imagenette2-160.tgz": lambda root, path: lambda: load("imagenette", root, "train"),
}


def raised(found):
    if isinstance(found, Exception):
        raise found
    return found


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in tests")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_the_payloads_would_run(tmp_path):
    for kind, read in (("pickle", lambda path: pickle.loads(path.read_bytes())),
                       ("old pickle", lambda path: pickle.loads(path.read_bytes())),
                       ("torch", lambda path: torch.load(path, weights_only=False)),
                       ("legacy torch", lambda path: torch.load(path, weights_only=False))):
        (tmp_path / "file").write_bytes(payloads(tmp_path / f"{kind} ran")[kind])
        read(tmp_path / "file")
        assert (tmp_path / f"{kind} ran").exists()


@pytest.mark.parametrize("name", OPENED)
def test_a_payload_does_not_run(tmp_path, monkeypatch, name):
    root = tmp_path / "root"
    path, ran = root / name, tmp_path / "ran"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(conas.data.sources, "DIGITS", root / "digits.npz")
    for content in payloads(ran).values():
        read = OPENED[name](root, path)
        path.write_bytes(content)
        if name.endswith("training.pt"):
            shutil.copy(path, path.with_name("test.pt"))
        if "cifar" in name and "tar" not in name:
            for other in [*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list, ["batches.meta", ""]]:
                (path.parent / other[0]).write_bytes(content)
        assert refused(path, read) is None
        assert not ran.exists()


def test_a_payload_as_an_image_of_a_data_folder_does_not_run(tmp_path):
    for kind, content in payloads(tmp_path / "ran").items():
        root = tmp_path / kind
        for name in [f"{label}/{i}.png" for label in "ab" for i in range(5)]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(root / name)
        (root / "b" / "4.png").write_bytes(content)
        reads = (lambda root=root: load("folder", root, "train"), lambda root=root: load("folder", root, "test"))
        assert sorted(refused(root / "x", read) is None for read in reads) == [False, True]  # it is in one split
        assert not (tmp_path / "ran").exists()
