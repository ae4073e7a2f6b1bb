"""A committee: the members' logits combined image by image, once all members are known to have seen the same images.

Shape suffixes: M members, B images, C classes.
"""
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from conas.errors import InputError
from conas.runs.scores import Scores
from ensemble.combine.calibration import apply_temperature
from ensemble.measure.diversity import ascending, weighted_sum
from ensemble.measure.metrics import softmax


def mean_softmax(logits_MBC: Tensor) -> Tensor:
    """(B, C) float64: softmax over the classes for each member, then the mean over the members."""
    return member_mean(softmax(logits_MBC))


def geometric_mean(logits_MBC: Tensor) -> Tensor:
    """(B, C) float64: the members' probabilities multiplied, to the power 1/M, then scaled to a sum of 1.

    This is `logit_mean` in other words: what a member's softmax divides by is the same for all classes of an image.
    """
    return softmax(member_mean(logits_MBC.double().log_softmax(dim=2)))


def logit_mean(logits_MBC: Tensor) -> Tensor:
    """(B, C) float64: the softmax of the mean of the members' logits."""
    return softmax(member_mean(logits_MBC.double()))


def logit_sum(logits_MBC: Tensor) -> Tensor:
    """(B, C) float64: the softmax of the sum of the members' logits, as in the original CoNAS.

    It picks the classes that `logit_mean` picks, but more sharply the more members there are, so only its loss differs.
    """
    return softmax(ascending(logits_MBC.double()).sum(dim=0))


def majority_vote(logits_MBC: Tensor) -> Tensor:
    """(B, C) float64: each member votes for its best class; `mean_softmax` joins as one more, divided vote.

    That vote decides between classes with equally many others, and orders those with none; it can overturn no majority.
    A member whose best classes are tied votes for the first of them.
    """
    votes_BC = torch.nn.functional.one_hot(logits_MBC.argmax(dim=2), logits_MBC.shape[2]).sum(dim=0)
    return (votes_BC + mean_softmax(logits_MBC)) / (len(logits_MBC) + 1)


def weighted_mean(logits_MBC: Tensor, weights_M: Tensor) -> Tensor:
    """(B, C) float64: softmax over the classes for each member, then the mean by weights that sum to 1."""
    return weighted_sum(softmax(logits_MBC), weights_M.double())


def member_mean(values_MBC: Tensor) -> Tensor:
    """The mean over members, to the last bit the same in any order of members, and the member's own if all agree."""
    ordered_MBC = ascending(values_MBC)
    return ordered_MBC[0] + (ordered_MBC - ordered_MBC[0]).mean(dim=0)


IMAGES = {"test": "the test images", "valid": "the held-out images"}  # by split; others are corruptions by name
LEAVE_OUT = ("leave it out (--spaces and --members choose the members), or train it again with a lower --learning_rate "
             "under another --save name")
COMBINATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    rule.__name__: rule for rule in (mean_softmax, geometric_mean, logit_mean, logit_sum, majority_vote)}


class Committee:
    """Members' scores on the same images, and their combination.

    `members` are the Scores by name, `combination` is a rule's name in COMBINATIONS, `weights` (M,) are those of the
    mean of softmaxes, the only rule that takes any. Logits are divided by `temperatures` (M,) before they are combined,
    and the log of the result by `temperature`. `labels` (B,) int64, `classes` the C names, `logits` (M, B, C) float32
    as the networks gave them, `probabilities` (B, C) float64, and `settings` the arguments besides the members, for the
    same committee on other images. Raises InputError if the members did not see the same images in the same order, or
    if the logits of one are not finite.
    """

    def __init__(self, members: Mapping[str, Scores], combination: str = "mean_softmax", *,
                 weights: Tensor | None = None, temperatures: Tensor | None = None, temperature: float = 1.0):
        check_same_images(members)
        self.members, self.combination, self.temperature = dict(members), combination, temperature
        first = next(iter(members.values()))
        self.labels, self.classes, self.dataset, self.fingerprint = (
            first.labels, first.classes, first.dataset, first.fingerprint)
        self.logits = stack_logits(members)
        M = len(members)
        self.weights = torch.full((M,), 1 / M, dtype=torch.float64) if weights is None else weights
        self.temperatures = torch.ones(M, dtype=torch.float64) if temperatures is None else temperatures
        self.settings = {"combination": combination, "weights": weights, "temperatures": temperatures,
                         "temperature": temperature}
        logits = self.logits if temperatures is None else self.logits / temperatures[:, None, None]
        combined = COMBINATIONS[combination](logits) if weights is None else weighted_mean(logits, weights)
        self.probabilities = apply_temperature(combined, temperature)


def stack_logits(members: Mapping[str, Scores]) -> Tensor:
    """(M, B, C) float32. Raises InputError naming a member whose logits are not all finite."""
    check_finite(members)
    return torch.stack([scores.logits for scores in members.values()])


def check_finite(members: Mapping[str, Scores], files: Mapping[str, object] | None = None, advice: str = LEAVE_OUT
                 ) -> None:
    """Raise InputError naming a member, by its file if that is given, some of whose predictions are not finite."""
    for name, scores in members.items():
        if scores.not_finite:
            where = files[name] if files else f"{name}, epoch {scores.epoch}"
            raise InputError(f"{where}: {scores.remark} on {IMAGES.get(scores.split, scores.split)}; {advice}")


def check_same_images(members: Mapping[str, Scores]) -> None:
    """Raise InputError naming two members whose scores are not of the same images in the same order."""
    (name, one), *others = members.items()
    saw, so = (("hold out", "so that nothing can be fitted to both") if one.split == "valid" else
               ("were tested on", "and cannot be combined"))
    for other_name, other in others:
        for what, same in (
                (f"data sets ({one.dataset} and {other.dataset})", one.dataset == other.dataset),
                ("classes", one.classes == other.classes),
                (f"numbers of images ({len(one.labels)} and {len(other.labels)})",
                 len(one.labels) == len(other.labels)),
                ("images, or the same in another order", one.fingerprint == other.fingerprint),
                ("labels", torch.equal(one.labels, other.labels))):
            if not same:
                raise InputError(f"{name} (epoch {one.epoch}) and {other_name} (epoch {other.epoch}) {saw} different "
                                 f"{what}, {so}; search and test both with the same data flags, or choose other "
                                 "members with --spaces or --members")


def common_epochs(members: Mapping[str, Collection[int]]) -> tuple[list[int], dict[str, list[int]]]:
    """The epochs that all members have, ascending; and by member the epochs that it has beyond those.

    Members without such are not in the second result. Raises InputError if no epoch is common to all.
    """
    shared = set.intersection(*map(set, members.values()))
    if not shared:
        spans = ", ".join(f"{name}: {span(epochs)}" for name, epochs in members.items())
        raise InputError(f"the members have no epoch in common ({spans}); search some of them for longer, or "
                         "choose other members with --spaces or --members")
    extra = {name: sorted(set(epochs) - shared) for name, epochs in members.items()}
    return sorted(shared), {name: epochs for name, epochs in extra.items() if epochs}


def span(epochs: Collection[int]) -> str:
    """Epochs in words: "4", "0 to 9", or "0 to 9, 7 of them" if some between are missing."""
    low, high = min(epochs), max(epochs)
    missing = "" if len(epochs) == high - low + 1 else f", {len(epochs)} of them"
    return str(low) if low == high else f"{low} to {high}{missing}"
