"""What checkpoints say of images: logits, where they come from, and files that hold both.

A prediction is finite if the scores of all its classes are. One that holds NaN or an infinity, also minus infinity, is
wrong by every measure here: it has no order of classes that could be compared with the label.
"""
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from conas.errors import InputError
from conas.files import atomic_path, check_regular, check_zip


def topk_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Fraction of images whose label is among the k classes of highest score; scores (N, K), labels (N,).

    Of equal scores the first counts as higher, as for argmax. A prediction that is not finite is wrong for every k.
    With k >= K all others are right: a top-5 of four classes says nothing.
    """
    own = scores.gather(1, labels[:, None])
    earlier = torch.arange(scores.shape[1], device=labels.device) < labels[:, None]
    before = (scores > own) | ((scores == own) & earlier)
    right = (before.sum(dim=1) < k) & finite_rows(scores)
    return right.double().mean().item()


def finite_rows(scores: Tensor) -> Tensor:
    """Which predictions are finite: (..., N) bool of scores (..., N, K)."""
    return scores.isfinite().all(dim=-1)


def is_right(scores: Tensor, labels: Tensor) -> Tensor:
    """Which images are recognised: (..., N) bool of scores (..., N, K) and labels (N,)."""
    return (scores.argmax(dim=-1) == labels) & finite_rows(scores)


def mean_loss(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy of logits (N, K) in nats, in float64; NaN if a prediction is not finite. Labels (N,)."""
    if not finite_rows(logits).all():
        return math.nan
    return cross_entropy(logits.double(), labels).item()


def remark(not_finite: int, count: int) -> str:
    """What is to be said of `count` predictions of which so many are not finite; nothing if all are."""
    return f"{not_finite} of {count} predictions are not finite" if not_finite else ""


class Validation(NamedTuple):
    """Loss in nats, NaN if a prediction is not finite; how many of `count` are not; for images, accuracy in percent."""

    loss: float
    not_finite: int
    count: int
    top1: float | None = None

    @property
    def remark(self) -> str:
        """For the line of an epoch: how many predictions are not finite, if some are not."""
        return f"  ({remark(self.not_finite, self.count)})" if self.not_finite else ""

    def extra_metrics(self) -> dict:
        """For the epoch's line of metrics: the number of predictions that are not finite, if some are not."""
        return {"not_finite": self.not_finite} if self.not_finite else {}


@dataclass
class Scores:
    """What one checkpoint says of every test image, and where that comes from."""

    logits: Tensor          # (N, K) float32
    labels: Tensor          # (N,) int64
    space: str
    stage: str              # search or train
    epoch: int
    seed: int
    split: str              # test, or valid: the training images that this network's weights have not seen
    checkpoint_sha256: str
    dataset: str
    fingerprint: str        # of the images and labels in their order
    classes: list[str]      # K names
    changed: str = ""       # files of the space that were others when this was computed than at the checkpoint's time

    @property
    def probabilities(self) -> Tensor:
        """(N, K) float32: the softmax of the logits; NaN for a prediction that is not finite."""
        return self.logits.softmax(dim=1).masked_fill(~finite_rows(self.logits)[:, None], math.nan)

    @property
    def not_finite(self) -> int:
        """The number of predictions that are not finite."""
        return len(self.logits) - int(finite_rows(self.logits).sum())

    @property
    def remark(self) -> str:
        """A line on the predictions that are not finite; empty if all are."""
        return remark(self.not_finite, len(self.logits))

    def top(self, k: int) -> float:
        """Accuracy in percent when the k best classes count; predictions that are not finite are wrong."""
        return 100 * topk_accuracy(self.logits, self.labels, k)

    def loss(self) -> float:
        """Mean cross-entropy in nats; NaN if a prediction is not finite."""
        return mean_loss(self.logits, self.labels)


def save_scores(path: Path, scores: Scores, compact: bool = False) -> None:
    """Write scores as .npz, atomically: logits, probabilities, labels and the other fields, no objects.

    `compact` takes a quarter of the place: without the probabilities, and with logits rounded to float16, as long as
    that can hold them.
    """
    fields = {k: v.numpy() if isinstance(v, Tensor) else np.asarray(v) for k, v in vars(scores).items()}
    if compact:
        if np.abs(fields["logits"]).max() < np.finfo(np.float16).max:  # not for NaN either
            fields["logits"] = fields["logits"].astype(np.float16)
    else:
        fields["probabilities"] = scores.probabilities.numpy()
    with atomic_path(path) as temporary:
        np.savez(temporary, **fields)


def load_scores(path: Path) -> Scores:
    """Read scores. Raises InputError naming the file if it is missing, damaged or incomplete."""
    try:
        check_regular(path)
        check_zip(path)
        with np.load(path, allow_pickle=False) as file:
            scores = Scores(
                logits=_single(file["logits"]), labels=torch.from_numpy(file["labels"]),
                space=str(file["space"]), stage=str(file["stage"]), epoch=int(file["epoch"]),
                seed=int(file["seed"]), split=str(file["split"]),
                checkpoint_sha256=str(file["checkpoint_sha256"]), dataset=str(file["dataset"]),
                fingerprint=str(file["fingerprint"]), classes=file["classes"].tolist(),
                changed=str(file["changed"]) if "changed" in file else "")
    except Exception as error:  # damaged bytes can make NumPy raise anything
        raise InputError(f"{path}: cannot be read as probabilities ({error}); delete it and start test_all.py again"
                         ) from error
    N = len(scores.labels) if scores.labels.ndim == 1 else 0
    K = len(scores.classes) if _are_names(scores.classes) else 0
    if (not N or not K or scores.logits.dtype != torch.float32 or scores.labels.dtype != torch.int64
            or scores.logits.shape != (N, K) or scores.labels.min() < 0 or scores.labels.max() >= K):
        raise InputError(f"{path}: its logits, labels and classes do not fit together; delete it and start "
                         "test_all.py again")
    return scores


def _single(logits: np.ndarray) -> Tensor:
    """Logits in float32, also if they were rounded to float16; others as they are, to be refused."""
    return torch.from_numpy(logits.astype(np.float32) if logits.dtype == np.float16 else logits)


def _are_names(classes: object) -> bool:
    return isinstance(classes, list) and all(isinstance(name, str) for name in classes)
