"""Members and committee under shift: the test images corrupted in every way at every severity."""
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import conas
from conas import distributed
from conas.cli import find_device
from conas.commands.scoring import load_images, predict
from conas.darts.space import Space
from conas.data.images import ImageSet
from conas.engine.inference import prepared
from conas.errors import InputError
from conas.files import check_regular
from conas.places import find_data
from conas.runs import checkpoint as checkpoints
from conas.runs.code import changes
from conas.runs.options import TestOptions
from conas.runs.scores import Scores, load_scores, save_scores
from ensemble.combine.committee import Committee
from ensemble.measure import metrics
from ensemble.measure.corruptions import BLOCK, CORRUPTIONS, SEVERITIES, corrupt, mean_corruption_error


class OwnCorruptions:
    """The test images, corrupted as `corruptions.py` says."""

    title, names = "conas", tuple(CORRUPTIONS)

    def __init__(self, images: ImageSet, seed: int = 0):
        self.images, self.seed = images, seed
        self.version = f"{conas.__version__} {seed} {images.fingerprint}"

    def blocks(self, name: str, severity: int) -> Iterator[Tensor]:
        """uint8 (B, C, H, W), together all test images in order."""
        indices = torch.arange(len(self.images)).split(4 * BLOCK)
        for chosen, (x, _) in zip(indices, self.images.gather(indices, "cpu")):
            yield corrupt(x, name, severity, self.seed, chosen[0].item())


BENCHMARK = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
             "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression")


class PublishedCorruptions:
    """CIFAR-10-C: NAME.npy of uint8 (50000, 32, 32, 3), 10,000 for each severity, and labels.npy.

    Published means are over the fifteen corruptions of BENCHMARK, so the archive's four others are left out; `title`
    says so if some of the fifteen are missing. Hendrycks and Dietterich, 2019.

    Raises InputError for files that are damaged, of other shapes, or not of these labels.
    """

    def __init__(self, folder: Path, labels: Tensor):
        self.folder, self.count = folder, len(labels)
        self.names = tuple(name for name in BENCHMARK if (folder / f"{name}.npy").exists())
        self.title = "CIFAR-10-C" + (f", {len(self.names)} of its {len(BENCHMARK)} corruptions"
                                     if len(self.names) < len(BENCHMARK) else "")
        if not self.names or not np.array_equal(self._read("labels").reshape(-1), np.tile(labels, len(SEVERITIES))):
            raise InputError(f"{folder}: is not CIFAR-10-C, or its labels are not those of the test images; download "
                             "it again or move it away")
        self.version = str([(name, (folder / f"{name}.npy").stat().st_size) for name in self.names])

    def blocks(self, name: str, severity: int) -> Iterator[Tensor]:
        pixels = self._read(name)
        if pixels.shape != (len(SEVERITIES) * self.count, 32, 32, 3) or pixels.dtype != np.uint8:
            raise InputError(f"{self.folder / name}.npy: is not uint8 (50000, 32, 32, 3); download it again")
        first = (severity - 1) * self.count
        for start in range(first, first + self.count, 4 * BLOCK):
            stop = min(start + 4 * BLOCK, first + self.count)
            yield torch.from_numpy(pixels[start:stop].copy()).permute(0, 3, 1, 2)

    def _read(self, name: str) -> np.ndarray:
        try:
            check_regular(self.folder / f"{name}.npy")
            return np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="r")  # objects cannot be mapped
        except Exception as error:  # damaged bytes can make NumPy raise anything
            raise InputError(f"{self.folder / name}.npy: cannot be read ({error}); download it again") from error


def measure_shift(pool: Mapping[str, tuple[Space, Path]], committee: Committee, options: TestOptions) -> dict:
    """Test a committee's members, by name in `pool`, on corrupted images; each corruption is made once for all of them.

    Returns {source, seed, names, severities, curves, mce}: curves are {name: {corruption: {top1, loss, ece}}}, each a
    list by severity, for all members and "committee"; mce the mean corruption errors in percent by the same names.
    Logits are stored beside those of the test images, and used again for the same checkpoint and corruptions.
    """
    device, members = find_device(options.device), {}
    for name, (space, path) in pool.items():
        checkpoint = checkpoints.load(path)
        network = checkpoints.restore(path, checkpoint, space.name, space.network, folder=space.folder)
        dataset_info = checkpoint["dataset"] | {"changed": changes(space.folder, checkpoint)}
        members[name] = prepared(network.to(device)), dataset_info  # once, for all blocks of all corruptions
    dataset_info = next(iter(members.values()))[1]
    images = load_images(path, dataset_info, options.data, "test", options.skip_bad_images)
    for name, (_, other) in members.items():
        if (other["image_size"], other.get("resize", "crop")) != (
                dataset_info["image_size"], dataset_info.get("resize", "crop")):
            raise InputError(f"--shift: {name} takes images of another size than the first member, or made square in "
                             "another way; leave it out")
    source = find_source(images, find_data(path, dataset_info["root"], options.data))

    curves = {name: {} for name in [*members, "committee"]}
    for corruption in tqdm(source.names, desc="corruptions", leave=False, disable=distributed.tqdm_disable()):
        scores = _scores(corruption, source, images, members, pool, committee, options, device)
        corrupted = Committee(scores, **committee.settings)
        for name, probabilities in [*((name, metrics.softmax(s.logits)) for name, s in scores.items()),
                                    ("committee", corrupted.probabilities)]:
            parts = list(zip(probabilities.chunk(len(SEVERITIES)), corrupted.labels.chunk(len(SEVERITIES))))
            curves[name][corruption] = {"top1": [100 * metrics.topk_accuracy(p, y) for p, y in parts],
                                        "loss": [metrics.nll(p, y) for p, y in parts],
                                        "ece": [metrics.ece(p, y) for p, y in parts]}
    mce = {name: mean_corruption_error({c: [100 - top1 for top1 in curve["top1"]] for c, curve in by_name.items()})
           for name, by_name in curves.items()}
    return {"source": source.title, "seed": 0, "names": list(source.names), "severities": list(SEVERITIES),
            "curves": curves, "mce": mce}


def find_source(images: ImageSet, root: Path) -> OwnCorruptions | PublishedCorruptions:
    """CIFAR-10-C where it lies in `root` and these are the whole of CIFAR-10's test images; else our own."""
    folder = root.expanduser() / "CIFAR-10-C"
    if images.info.name == "cifar10" and folder.is_dir() and len(images) == 10_000 and images.info.image_size == 32:
        return PublishedCorruptions(folder, images.labels)
    return OwnCorruptions(images)


def _scores(corruption: str, source, images: ImageSet, members: Mapping, pool: Mapping, committee: Committee,
            options: TestOptions, device: torch.device) -> dict[str, Scores]:
    """Every member's scores on one corruption, all severities one after another, stored ones where they fit."""
    fingerprint = hashlib.sha256(f"{corruption} {source.title} {source.version}".encode()).hexdigest()
    files = {name: path.parent.parent / "probabilities" / f"{path.stem}.{corruption}.npz"
             for name, (_, path) in pool.items()}

    def kept() -> dict[str, dict]:
        scores = {name: load_scores(file) for name, file in files.items() if file.exists()}
        return {name: vars(s) for name, s in scores.items() if not s.changed and (
            s.checkpoint_sha256, s.fingerprint) == (committee.members[name].checkpoint_sha256, fingerprint)}

    found = {name: Scores(**fields) for name, fields in distributed.from_rank0(kept).items()}
    missing = {name: [] for name in pool if name not in found}
    for severity in SEVERITIES if missing else ():
        for x in source.blocks(corruption, severity):
            block = ImageSet(images.info, x.contiguous(), torch.zeros(len(x), dtype=torch.int64))
            for name, logits in missing.items():
                network, dataset_info = members[name]
                logits.append(predict(network, block, options.batch_size, device, crop=dataset_info.get("crop")))
    for name, logits in missing.items():
        found[name] = replace(committee.members[name], logits=torch.cat(logits), split=corruption,
                              labels=committee.labels.repeat(len(SEVERITIES)), fingerprint=fingerprint,
                              changed=members[name][1]["changed"])
        if distributed.rank() == 0:
            save_scores(files[name], found[name])
    return {name: found[name] for name in pool}
