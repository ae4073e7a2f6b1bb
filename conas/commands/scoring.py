"""Score checkpoints: logits of every test or held-out image, stored beside the checkpoint that gave them."""
import hashlib
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from conas import distributed
from conas.cli import find_device
from conas.darts.space import Space
from conas.data.images import ImageSet, load, survey
from conas.data.listing import EARLIER
from conas.data.sources import is_split_here
from conas.data.splits import stratified_split
from conas.engine.cuda_graph import ReplayedForward, capture
from conas.engine.inference import prepared
from conas.errors import InputError
from conas.places import find_data, remember_data
from conas.runs import checkpoint as checkpoints
from conas.runs.code import changes
from conas.runs.folder import folder_name
from conas.runs.options import TestOptions
from conas.runs.scores import Scores, Validation, finite_rows, load_scores, mean_loss, save_scores, topk_accuracy

NETWORKS_PER_PASS = 8
MIN_BATCHES_FOR_GRAPH = 8  # with fewer, recording costs more than it saves


def predict(network: nn.Module, images: ImageSet, batch_size: int, device: torch.device,
            indices: Tensor | None = None, workers: int = 0, crop: int | None = None) -> Tensor:
    """Logits (N, K), float32 on the CPU, of a network in evaluation mode, for all images or those of `indices`.

    `crop` is the side of the central square that the network looks at (default: all of the image). Several processes
    call it alike: each computes the logits of its part of the images, and all get all of them.
    """
    return predict_all([network], images, batch_size, device, indices, workers, crop)[0]


@torch.inference_mode()
def predict_all(networks: Sequence[nn.Module], images: ImageSet, batch_size: int, device: torch.device,
                indices: Tensor | None = None, workers: int = 0, crop: int | None = None) -> list[Tensor]:
    """The logits of several networks, each as of `predict`, from one pass over the images."""
    networks = [prepared(network.to(device)) for network in networks]
    indices = torch.arange(len(images)) if indices is None else indices
    own = indices[distributed.rank_slice(len(indices))]
    batches = tqdm(images.batches(batch_size, device, own, workers, crop) if len(own) else (), desc="images",
                   unit="batch", delay=3, total=-(-len(own) // batch_size), leave=False,
                   disable=distributed.tqdm_disable())
    if device.type == "cuda" and len(own) >= MIN_BATCHES_FOR_GRAPH * batch_size:
        memory = torch.cuda.graph_pool_handle()  # one for all: they take turns
        networks = [ReplayedForward(network, device, partial(capture, pool=memory)) for network in networks]
    logits = [[network(x).float() for network in networks] for x, _ in batches]
    parts = distributed.gather([torch.cat(of_one).cpu() for of_one in zip(*logits)])
    return [torch.cat(of_one) for of_one in zip(*filter(None, parts))]


def validate(network: nn.Module, images: ImageSet, indices: Tensor, device: torch.device, workers: int = 0,
             crop: int | None = None) -> Validation:
    """Loss and accuracy on the images of `indices`, which the weights have not seen."""
    logits, labels = predict(network, images, 256, device, indices, workers, crop), images.labels[indices]
    return Validation(mean_loss(logits, labels), int((~finite_rows(logits)).sum()), len(labels),
                      100 * topk_accuracy(logits, labels))


_load = lru_cache(maxsize=2)(load)  # all checkpoints of a run are tested on the same images


def load_images(path: Path, dataset_info: dict, data: str | None, split: str, skip_bad_images: bool = False
                ) -> ImageSet:
    """A split of the data set that the checkpoint at `path` describes; `data` is where it is now, if it was moved.

    If they are found no longer where the run had them, its folder then says where `data` is. Raises InputError if it
    has other classes than the network knows, or if its training images have changed since, where that matters: for the
    training split, and for test images that were set aside from the same folder.
    """
    alone = dataset_info["name"] == "digits"
    root = Path(data or dataset_info["root"]) if alone else find_data(path, dataset_info["root"], data)
    skip = skip_bad_images or dataset_info.get("skip_bad_images", False)
    load_part = partial(_load, dataset_info["name"], root, image_size=dataset_info["image_size"], skip_bad_images=skip,
                        suffixes=_suffixes(dataset_info), resize=dataset_info.get("resize", "crop"),
                        follow_links=dataset_info.get("follow_links", False))
    images = load_part(split, subset=_subset(dataset_info, root, split))
    if list(images.info.classes) != dataset_info["classes"]:
        raise InputError(f"{root}: has the classes {', '.join(images.info.classes)}, but {path} was trained on "
                         f"{', '.join(dataset_info['classes'])}; name the right folder with --data")
    if split == "train" or is_split_here(dataset_info["name"], root, dataset_info.get("follow_links", False)):
        trained = images if split == "train" else load_part("train", subset=_subset(dataset_info, root, "train"))
        if trained.fingerprint != dataset_info["fingerprint"]:
            raise InputError(f"{root}: its training images have changed since {path} was trained on them (or another "
                             "version of Pillow decodes them), so nobody knows which images it has not seen; restore "
                             "them, or name their folder with --data")
    if data and not alone:
        remember_data(path.absolute().parent.parent, dataset_info["root"], root)
    return images


def _suffixes(dataset_info: dict) -> tuple[str, ...]:
    """Of the files that were images when the checkpoint was made, so that no image changes its split."""
    return tuple(dataset_info.get("suffixes", EARLIER))


def _subset(dataset_info: dict, root: Path, split: str) -> int | None:
    """How many images of a split a checkpoint means; None is all.

    Before there was --test_subset, --subset held for both splits.
    """
    subset, test_subset = dataset_info["subset"], dataset_info.get("test_subset", dataset_info["subset"])
    if split == "train" or test_subset is None:
        return subset if split == "train" else None
    if test_subset != subset:
        return test_subset
    return _common_subset(dataset_info["name"], root, subset, _suffixes(dataset_info),
                          dataset_info.get("follow_links", False))


@lru_cache(maxsize=2)
def _common_subset(name: str, root: Path, subset: int, suffixes: tuple[str, ...], follow_links: bool) -> int | None:
    """`subset`, or None, said once, if the test split is smaller: such a run began before there was --test_subset, and
    could not be tested."""
    count = survey(name, root, "test", suffixes, follow_links)[1]
    if subset <= count:
        return subset
    if distributed.rank() == 0:
        print(f"--subset {subset}, of a run from before there was --test_subset: there are {count} test images, all of "
              "which are used", file=sys.stderr)
    return None


def scores_for(space: Space, path: Path, options: TestOptions, split: str = "test") -> Scores:
    """The scores of the checkpoint at `path` on a split, from the stored file if that is of this checkpoint.

    Computes and stores them otherwise. `split` is "test", or "valid": the part of the training images that its
    weights have not seen. Checkpoints of searches and of retraining are alike. Raises InputError for a checkpoint
    that is damaged or of another space, and for "valid" if its weights have seen all training images.
    """
    return scores_for_all([(space, path)], options, split)[0]


def scores_for_all(members: Iterable[tuple[Space, Path]], options: TestOptions, split: str = "test") -> list[Scores]:
    """The scores of several checkpoints, each as of `scores_for`; NETWORKS_PER_PASS at a time share a pass."""
    jobs = [ScoringJob(space, path, split) for space, path in members]
    scores = [job.stored() for job in jobs]
    missing = [i for i, found in enumerate(scores) if found is None]
    for start in range(0, len(missing), NETWORKS_PER_PASS):
        alike: dict[tuple, list[int]] = {}  # checkpoints that look at the same images in the same way
        for i in missing[start:start + NETWORKS_PER_PASS]:
            alike.setdefault(jobs[i].load(options), []).append(i)
        for group in alike.values():
            first = jobs[group[0]]
            logits = predict_all([jobs[i].network for i in group], first.images, options.batch_size,
                                 find_device(options.device), first.indices, options.workers, first.crop)
            for i, logits_of_one in zip(group, logits):
                scores[i] = jobs[i].store(logits_of_one)
    return scores


class NothingHeldOut(InputError):
    """There are no images that a checkpoint's weights have certainly not seen."""


class ScoringJob:
    """The scores of the checkpoint at `path` on a split: read, or computed and stored."""

    def __init__(self, space: Space, path: Path, split: str):
        self.space, self.path, self.split, self.digest = space, path, split, checkpoints.sha256(path)
        suffix = "" if split == "test" else f".{split}"
        self.file = path.parent.parent / "probabilities" / f"{path.stem}{suffix}.npz"

    def stored(self) -> Scores | None:
        """The stored scores, if they are of this checkpoint, and computed by the code that it was written with."""
        def kept() -> dict | None:
            scores = load_scores(self.file) if self.file.exists() else None
            fits = scores and not scores.changed and (
                scores.checkpoint_sha256, scores.space) == (self.digest, self.space.name)
            return vars(scores) if fits else None

        fields = distributed.from_rank0(kept)
        return Scores(**fields) if fields else None

    def load(self, options: TestOptions) -> tuple:
        """Load network and images. Jobs for which this returns the same key share one pass over the images."""
        self.checkpoint = checkpoints.load(self.path)
        self.network = checkpoints.restore(self.path, self.checkpoint, self.space.name, self.space.network,
                                           folder=self.space.folder)
        dataset_info = self.checkpoint["dataset"]
        if self.split == "valid" and not {"train_portion", "split_seed"} <= dataset_info.keys():
            raise NothingHeldOut(f"{self.path}: does not say which training images were held out; train again")
        self.images = distributed.local_rank0_first(
            lambda: load_images(self.path, dataset_info, options.data, "test" if self.split == "test" else "train",
                                options.skip_bad_images))
        self.indices, self.crop, self.fingerprint = None, dataset_info.get("crop"), self.images.fingerprint
        if self.split == "valid":
            portions = [dataset_info["train_portion"], 1 - dataset_info["train_portion"]]
            self.indices = stratified_split(self.images.labels, portions, dataset_info["split_seed"])[1]
            if len(self.indices) == 0:
                raise NothingHeldOut(f"{self.path}: its weights have seen all training images; train with "
                                     "--valid_portion above 0")
            digest = hashlib.sha256(self.fingerprint.encode() + self.indices.numpy().tobytes())
            self.fingerprint = digest.hexdigest()
        return id(self.images), self.crop, self.fingerprint

    def store(self, logits: Tensor) -> Scores:
        """Write the scores to disk, and release the network."""
        checkpoint, images, indices = self.checkpoint, self.images, self.indices
        scores = Scores(
            logits=logits, labels=images.labels if indices is None else images.labels[indices], space=self.space.name,
            stage=checkpoint["stage"], epoch=checkpoint["epoch"], seed=checkpoint["seed"], split=self.split,
            checkpoint_sha256=self.digest, dataset=checkpoint["dataset"]["name"], fingerprint=self.fingerprint,
            classes=list(images.info.classes), changed=changes(self.space.folder, checkpoint))
        if distributed.rank() == 0:
            save_scores(self.file, scores)
        del self.network, self.checkpoint
        return scores


def run_folder(space: Space, stage: str, options: TestOptions) -> Path:
    """The folder of the run that the options name, in a stage of STAGES."""
    save = folder_name(options.save)
    return space.train_folder(save) if stage == "train" else space.search_folder(save)
