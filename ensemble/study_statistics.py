"""Committees of equal size out of all runs of a study, in groups: mixed spaces, and every space by itself."""
import math
from collections.abc import Mapping, Sequence
from itertools import chain, combinations, product

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from conas.data.images import full_name
from conas.runs.scores import Scores
from ensemble.combine.committee import check_same_images, member_mean, stack_logits
from ensemble.measure import metrics
from ensemble.measure.diversity import diversity, uncertainty
from ensemble.measure.significance import jackknife
from ensemble.report.report import table

Member = tuple[str, int]  # space, seed
FIGURES = {"top1": "top-1 %", "loss": "loss", "brier": "Brier", "ece": "ECE", "adaptive_ece": "adaptive ECE",
           "disagreement": "disagree %", "q_statistic": "Q", "oracle": "oracle %", "mutual_information": "mutual inf.",
           "member_top1": "member top-1 %"}
SHOWN = "top1", "loss", "ece", "disagreement", "q_statistic", "oracle", "member_top1"
MIXED = "mixed spaces"


def members_of(spaces: Sequence[str], seeds: Sequence[int], size: int) -> list[tuple[Member, ...]]:
    """All committees that have equally many members, of different seeds, from each of the spaces."""
    by_space = [[tuple((space, seed) for seed in chosen) for chosen in combinations(seeds, size // len(spaces))]
                for space in spaces]
    return [tuple(chain(*parts)) for parts in product(*by_space)]


def measure(probabilities_MBC: Tensor, answers: Tensor, labels: Tensor) -> list[float]:
    """The FIGURES of the mean of the members' probabilities, in that order; Q is NaN where it is not defined.

    `answers` (M, B) are the members' classes, `labels` (B,).
    """
    probabilities = member_mean(probabilities_MBC)
    varied = diversity(answers, labels)
    doubt = uncertainty(probabilities_MBC).mutual_information.mean().item()
    q = math.nan if varied.q_statistic is None else varied.q_statistic
    return [100 * metrics.topk_accuracy(probabilities, labels), metrics.nll(probabilities, labels),
            metrics.brier(probabilities, labels), metrics.ece(probabilities, labels),
            metrics.adaptive_ece(probabilities, labels), 100 * varied.disagreement, q, 100 * varied.oracle, doubt,
            100 * (answers == labels).double().mean().item()]


def compare_groups(scores: Mapping[Member, Scores], size: int, costs: Mapping[str, Mapping]) -> dict:
    """Means over all committees of a group, with 95 % intervals over seeds, and differences between groups.

    A seed's runs in all spaces are left out together (`significance.jackknife`), since they share order and
    augmentation of the images; so differences are paired. The test images are the same throughout: intervals are about
    other seeds, not other images. Returns {dataset, fingerprint, images, size, spaces, seeds, groups, differences}:
    groups are {name: {committees, compute, figures}}, differences {name of what is subtracted from the mixed group:
    figures}, figures {name: {mean, low, high}} by FIGURES; None where seeds are too few. compute sums `costs`, by
    space, over a committee. Raises InputError if runs were tested on different images.
    """
    check_same_images({f"{space}, seed {seed}": s for (space, seed), s in scores.items()})
    stack_logits({f"{space}, seed {seed}": s for (space, seed), s in scores.items()})
    spaces, seeds = (list(dict.fromkeys(column)) for column in zip(*scores))
    labels, known = next(iter(scores.values())).labels, {}
    softmax = {member: metrics.softmax(of.logits) for member, of in scores.items()}  # each is in many committees
    answers = {member: of.logits.argmax(dim=1) for member, of in scores.items()}
    groups = {MIXED: spaces, **{f"{space} alone": [space] for space in spaces}}
    count = {name: len(members_of(members, seeds, size)) for name, members in groups.items()}
    bar = tqdm(total=sum(count.values()), desc="committees", leave=False, disable=None)

    def group_means(chosen: Sequence[int]) -> np.ndarray | None:
        """(G, F) means over the committees of each group that these seeds allow."""
        rows = []
        for members in groups.values():
            committees = members_of(members, chosen, size)
            if not committees:
                return None
            for committee in committees:
                if committee not in known:
                    known[committee] = measure(*(torch.stack([of[member] for member in committee])
                                                 for of in (softmax, answers)), labels)
                    bar.update()
            rows.append(np.mean([known[committee] for committee in committees], axis=0))
        return np.array(rows)

    def everything(chosen: Sequence[int]) -> np.ndarray | None:
        """Group means, then what the mixed group has more than the mean of the others and than each of them."""
        means = group_means(chosen)
        if means is None:
            return None
        return np.concatenate([means, means[:1] - means[1:].mean(axis=0), means[0] - means[1:]]).ravel()

    with bar:
        intervals = iter(jackknife(everything, seeds))

    def figures() -> dict:
        found = {name: next(intervals)._asdict() for name in FIGURES}
        return {name: {end: None if value is None or math.isnan(value) else value for end, value in ends.items()}
                for name, ends in found.items()}

    first = next(iter(scores.values()))
    return {"format": "conas-study-report", "dataset": first.dataset, "fingerprint": first.fingerprint,
            "images": len(labels), "size": size, "spaces": spaces, "seeds": seeds,
            "groups": {name: {"committees": count[name],
                              "compute": compute(members, size, costs), "figures": figures()}
                       for name, members in groups.items()},
            "differences": {name: figures() for name in ("mean of the spaces alone", *list(groups)[1:])}}


def compute(spaces: Sequence[str], size: int, costs: Mapping[str, Mapping]) -> dict:
    """What the members of a committee need together; None for what is not known of all."""
    return {key: None if any(costs[space][key] is None for space in spaces)
            else sum(costs[space][key] for space in spaces) * size / len(spaces) for key in costs[spaces[0]]}


def as_text(summary: dict) -> str:
    """Tables of groups and of differences, with half-widths of their intervals, and the answer in a sentence."""
    lines = [f"Committees of {summary['size']}, softmax mean, last epochs: {full_name(summary['dataset'])}, "
             f"{summary['images']} test images, {len(summary['seeds'])} seeds of each of {len(summary['spaces'])} "
             "spaces; mean ± half of the 95 % interval over seeds", ""]
    header = [FIGURES[name] for name in SHOWN]
    rows = [[name, str(group["committees"]), *(_cell(group["figures"][figure]) for figure in SHOWN),
             *(_amount(group["compute"][key], unit) for key, unit in
               (("parameters", 1e6), ("flops", 1e9), ("seconds", 3600)))]
            for name, group in summary["groups"].items()]
    lines += table(["group", "committees", *header, "10^6 parameters", "10^9 flops/image", "hours"], rows)
    rows = [[name, *(_cell(figures[figure], "+") for figure in SHOWN)]
            for name, figures in summary["differences"].items()]
    lines += ["", *table(["mixed spaces minus", *header], rows), ""]
    for figure, better in (("top1", 1), ("loss", -1), ("ece", -1)):
        lines.append(_answer(FIGURES[figure], summary["differences"]["mean of the spaces alone"][figure], better))
    return "\n".join(lines)


def _answer(title: str, ends: dict, better: int) -> str:
    if ends["low"] is None:
        return f"{title}: no interval, since there are too few seeds to leave one out"
    if ends["low"] <= 0 <= ends["high"]:
        verdict = "no difference can be told"
    else:
        verdict = "mixed spaces are better" if ends["mean"] * better > 0 else "mixed spaces are worse"
    return (f"{title}: {verdict}; mixed spaces minus the mean of the spaces alone {ends['mean']:+.4f}, 95 % interval "
            f"{ends['low']:+.4f} to {ends['high']:+.4f}")


def _cell(ends: dict, sign: str = "") -> str:
    if ends["mean"] is None:
        return "-"
    half = "" if ends["high"] is None else f" ± {ends['high'] - ends['mean']:.3f}"
    return f"{ends['mean']:{sign}.3f}{half}"


def _amount(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:.3g}"
