"""Runs without a search: supernets with random weights and alphas, saved as a search would save them."""
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from conas.darts.space import Space, discover
from conas.data.images import load
from conas.files import write_json
from conas.runs import checkpoint as checkpoints
from conas.runs.code import digests
from tests.conftest import ROOT, Clone


def write_runs(root: Path, dataset: str, data: str, image_size: int | None, subset: int | None, epochs: int,
               spaces: Sequence[Space] | None = None) -> None:
    """search-EXP of every space below `root`, or of these."""
    images = load(dataset, data, "train", image_size, subset)
    dataset_info = {"name": dataset, "root": data, "image_size": images.info.image_size, "subset": subset,
                    "classes": list(images.info.classes), "fingerprint": images.fingerprint, "train_portion": 0.5,
                    "split_seed": 0}
    torch.manual_seed(0)
    for space in discover(ROOT) if spaces is None else spaces:
        folder = root / space.name / "search-EXP"
        arguments = {"seed": 2, "dataset": dataset, "epochs": epochs}
        write_json(folder / "args.json", {"version": "0", "arguments": arguments})
        for epoch in range(epochs):
            network = space.network(2, images.info.num_classes, 3, images.info.channels)
            x, y = next(images.batches(50, "cpu"))
            network.train()(x)  # statistics of BatchNorm, else all images look alike
            with torch.no_grad():
                for alphas in network.alphas().values():
                    alphas.normal_()
                # least squares for the classifier makes answers that are better than chance; a ridge keeps its weights
                # small, since with some thousand they would amplify the rounding of the features
                D = network.classifier.in_features
                # the same network, but with its features for logits
                probe = space.network(2, D, 3, images.info.channels)
                probe.load_state_dict(network.state_dict() | {"classifier.weight": torch.eye(D),
                                                              "classifier.bias": torch.zeros(D)})
                features = probe.eval()(x)
                target = torch.nn.functional.one_hot(y, images.info.num_classes).float() * 4
                products = features.T @ features
                ridge = 1e-4 * products.diagonal().mean() * torch.eye(D)
                network.classifier.weight.copy_(torch.linalg.solve(products + ridge, features.T @ target).T)
                network.classifier.bias.zero_()
            checkpoint = checkpoints.describe(network, space=space.name, epoch=epoch, dataset=dataset_info,
                                              arguments=arguments, code=digests(space.folder, "search"))
            checkpoints.save(folder / "checkpoints" / f"epoch_{epoch:03d}.pt", checkpoint)


_tested: list[Path] = []  # once in a process


@pytest.fixture(scope="module")
def committee_clone(bare_clone, tmp_path_factory) -> Clone:
    """A clone with a committee of three members on digits, tested by test_ensemble.py."""
    root = tmp_path_factory.mktemp("committee") / "CoNAS"
    if _tested:
        shutil.copytree(_tested[0], root)
        return Clone(root)
    shutil.copytree(bare_clone.root, root)
    write_runs(root, "digits", "data", None, 200, 2)
    clone = Clone(root)
    done = clone.run("test_ensemble.py")
    assert done.returncode == 0, done.stderr
    _tested.append(tmp_path_factory.mktemp("tested") / "CoNAS")
    shutil.copytree(root, _tested[0])
    return clone
