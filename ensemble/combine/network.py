"""The committee as one module, from uint8 images to probabilities: what predictions and exports run.

It is the committee of `committee-NAME/committee.json`, as test_ensemble.py chose, weighted and calibrated it.
Shape suffixes: M members, B images, C classes.
"""
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from conas.darts.space import discover
from conas.data.augment import central, normalise
from conas.data.images import DATASETS
from conas.engine.inference import prepared
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.scores import finite_rows
from ensemble.combine.calibration import apply_temperature
from ensemble.combine.committee import COMBINATIONS, weighted_mean
from ensemble.report.read_report import read_report


class CommitteeNetwork(nn.Module):
    """Networks, which may not change any more, and their combination: that of `ensemble.combine.committee.Committee`.

    `dataset` is what the members' checkpoints say of their images, `names` are the M names, `checkpoints` their paths
    if the committee was read from some; `crops` are the sides of
    the central squares that members look at, None for all of the image. The other arguments are those of Committee,
    but `combination` may also be the name of a fitted rule. `prepare` is what is done to each network first; by default
    the engine takes those that it knows.
    """

    def __init__(self, networks: Sequence[nn.Module], names: Sequence[str], dataset: dict, combination: str, *,
                 weights: Sequence[float], temperatures: Sequence[float], temperature: float,
                 crops: Sequence[int | None], prepare: Callable[[nn.Module], nn.Module] = prepared):
        super().__init__()
        self.networks, self.names, self.dataset = nn.ModuleList(map(prepare, networks)), list(names), dataset
        self.combination, self.temperature, self.crops = combination, temperature, list(crops)
        self.checkpoints: list[Path] = []
        self.weights = torch.tensor(weights, dtype=torch.float64)  # no buffers: not all devices have float64
        self.temperatures = torch.tensor(temperatures, dtype=torch.float64)
        for name, moments in zip(("mean", "std"), DATASETS[dataset["name"]].moments("cpu")):
            self.register_buffer(f"pixel_{name}", moments)  # `mean` alone is the name of an operator in ONNX
        self.eval()

    @property
    def classes(self) -> list[str]:
        return self.dataset["classes"]

    @property
    def channels(self) -> int:
        return len(self.pixel_mean)

    def forward(self, images: Tensor) -> Tensor:
        """Probabilities (B, C) float32 of uint8 images (B, channels, image_size, image_size)."""
        return self.combine(self.logits(images)).float()

    def logits(self, images: Tensor) -> Tensor:
        """(M, B, C) float32: every member's logits."""
        x = normalise(images, self.pixel_mean, self.pixel_std)
        return torch.stack([network(central(x, crop)) for network, crop in zip(self.networks, self.crops)])

    def scaled(self, logits_MBC: Tensor) -> Tensor:
        """The logits as they are combined: divided by the members' temperatures."""
        return logits_MBC.double() / self.temperatures[:, None, None]

    def combine(self, logits_MBC: Tensor) -> Tensor:
        """(B, C) float64: the committee's probabilities; NaN for an image if a member's logits are not all finite.

        Like `scaled`, for logits on the CPU.
        """
        rule = COMBINATIONS.get(self.combination)
        scaled_MBC = self.scaled(logits_MBC)
        combined = rule(scaled_MBC) if rule else weighted_mean(scaled_MBC, self.weights)
        answered_B = finite_rows(logits_MBC).all(dim=0)
        return apply_temperature(combined, self.temperature).masked_fill(~answered_B[:, None], math.nan)


def load_committee(root: Path, save: str, prepare: Callable[[nn.Module], nn.Module] = prepared) -> CommitteeNetwork:
    """The committee that `test_ensemble.py --save SAVE` wrote last, on the CPU, ready to answer.

    Raises InputError if there is none, or if a checkpoint of it is gone, changed, or does not fit the others.
    """
    path, report = read_report(root, save)
    entry, combination = report["epochs"][-1], report["combination"]
    members, temperature = entry["members"], entry["committee"]["temperature"]
    weights, temperatures = ([member[key] for member in members] for key in ("weight", "temperature"))
    files = [(member["name"], member["space"], root / member["checkpoint"], member["sha256"]) for member in members]
    flag = "" if save == "EXP" else f" --save {save}"
    spaces = {space.name: space for space in discover(root)}
    networks, datasets = [], []
    for name, space, file, digest in files:
        if space not in spaces:
            raise InputError(f"{path}: {name} is of {space}, and there is no such folder; restore it")
        checkpoint = checkpoints.load(file)
        if checkpoints.sha256(file) != digest:
            raise InputError(f"{file}: has changed since the committee was tested; start python test_ensemble.py{flag} "
                             "again")
        networks.append(checkpoints.restore(file, checkpoint, space, spaces[space].network,
                                           folder=spaces[space].folder))
        datasets.append(checkpoint["dataset"])
    for (name, *_), dataset in zip(files, datasets):
        for key, before in (("name", None), ("classes", None), ("image_size", None), ("resize", "crop")):
            if dataset.get(key, before) != datasets[0].get(key, before):  # what there was before the flag
                raise InputError(f"{path}: {name} and {files[0][0]} have different {key}; start test_ensemble.py again "
                                 "with members of one data set")
    network = CommitteeNetwork(networks, [name for name, *_ in files], datasets[0], combination, weights=weights,
                               temperatures=temperatures, temperature=temperature,
                               crops=[dataset.get("crop") for dataset in datasets], prepare=prepare)
    network.checkpoints = [file for _, _, file, _ in files]
    return network
