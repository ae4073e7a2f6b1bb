"""Fit a committee on held-out images: which members, with what weights, at what temperatures.

The held-out images are the part of the training split that no member's weights have seen
(`conas.commands.scoring.scores_for` with split="valid"). In a search they train the alphas, 2 x 14 x P numbers of each
member, and nothing else.
"""
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from conas.errors import InputError
from conas.runs.scores import Scores
from ensemble.combine.calibration import fit_temperature, fit_temperatures
from ensemble.combine.committee import COMBINATIONS, Committee, check_same_images, stack_logits
from ensemble.combine.selection import TOLERANCE, beam, convex_weights, weights_gap
from ensemble.measure.metrics import nll, softmax

SELECTING = "greedy", "beam"
FITTED = "weighted", *SELECTING
RULES = (*COMBINATIONS, *FITTED)


@dataclass
class Fit:
    """What held-out images decided. `members` are names of the pool, `temperatures` are of the members in that order.

    `weights` (M,) is None for rules without; `own_temperatures` (M,) and `own_temperature` are those that members and
    committee would have alone, for reports, `temperatures` and `temperature` those that the committee applies.
    """

    combination: str
    members: list[str]
    weights: Tensor | None
    temperatures: Tensor | None
    temperature: float
    own_temperatures: Tensor
    own_temperature: float
    best_member: str
    about: dict  # images, fingerprint, pool, used_for, path: ready for the report
    left_out: dict[str, Scores]  # candidates of the pool that are not in it, since some predictions are not finite

    def committee(self, members: Mapping[str, Scores]) -> Committee:
        """The committee on other images; `members` may hold more than its own."""
        return Committee({name: members[name] for name in self.members}, rule(self.combination), weights=self.weights,
                         temperatures=self.temperatures, temperature=self.temperature)


def rule(combination: str) -> str:
    """The rule in COMBINATIONS that a combination ends in: all fitted ones are means of softmaxes by weights."""
    return "mean_softmax" if combination in FITTED else combination


def fit(pool: Mapping[str, Scores], combination: str, *, size: int = 10, width: int = 8, objective: str = "nll",
        temperatures: Collection[str] = ()) -> Fit:
    """Fit `combination`, one of RULES, on the held-out scores of a pool of candidates.

    greedy and beam choose at most `size` members, with repeats that become weights; the other rules take the whole
    pool. `temperatures` may hold "members", whose logits are then divided by theirs before anything else is fitted, and
    "committee". A candidate some of whose predictions are not finite is left out by greedy and beam, and named in the
    result. Raises InputError for such a member of the other rules, if all candidates are such, and for scores of other
    images than held-out ones, or of different ones.
    """
    check_same_images(pool)
    left_out = {}
    if combination in SELECTING and not all(scores.not_finite for scores in pool.values()):
        left_out = {name: scores for name, scores in pool.items() if scores.not_finite}
        pool = {name: scores for name, scores in pool.items() if name not in left_out}
    names, first = list(pool), next(iter(pool.values()))
    if first.split != "valid":
        raise InputError(f"{names[0]}: scores of the split {first.split!r} fit nothing; held-out images do")
    logits, labels = stack_logits(pool), first.labels
    scaled = None
    if "members" in temperatures:
        scaled = fit_temperatures(logits, labels)
        logits = logits / scaled[:, None, None]
    used_for, path, weights = ["the choice of the best member"], [], None
    if combination in FITTED:
        by_name = sorted(range(len(names)), key=names.__getitem__)  # so that the order of the pool decides nothing
        probabilities = softmax(logits[by_name]).float()
        if combination == "weighted":
            weights = convex_weights(probabilities, labels)
            gap = weights_gap(weights, probabilities, labels)
            used_for.append(f"{len(names)} weights" + (f" (at most {gap:.1g} nats above the lowest loss; their fit "
                                                       "converges slowly)" if gap >= TOLERANCE else ""))
        else:
            selection = beam(probabilities, labels, size, width if combination == "beam" else 1, objective)
            weights, path = selection.weights(len(names)), selection.path
            used_for.append(f"the selection of {len(selection.members)} members, {len(set(selection.members))} of them "
                            f"different, from {len(names)}")
        weights = weights[torch.tensor(by_name).argsort()]
    kept = torch.arange(len(names)) if combination not in SELECTING else weights.nonzero()[:, 0]
    chosen = [names[i] for i in kept]
    weights, scaled = (values if values is None else values[kept] for values in (weights, scaled))
    committee = Committee({name: pool[name] for name in chosen}, rule(combination), weights=weights,
                          temperatures=scaled)
    own_temperature = fit_temperature(committee.probabilities, labels)
    if scaled is not None:
        used_for.append(f"{len(names)} temperatures of members")
    if "committee" in temperatures:
        used_for.append("the committee's temperature")
    return Fit(combination, chosen, weights, scaled, own_temperature if "committee" in temperatures else 1.0,
               fit_temperatures(committee.logits, labels) if scaled is None else scaled, own_temperature,
               best_member(pool),
               {"split": first.split, "images": len(labels), "fingerprint": first.fingerprint, "pool": len(names),
                "used_for": used_for, "path": path}, left_out)


def best_member(pool: Mapping[str, Scores]) -> str:
    """The candidate that is most often right; of equals the one of lowest NLL, and then the first by name."""
    return min(pool, key=lambda name: (-pool[name].top(1), nll(softmax(pool[name].logits), pool[name].labels), name))
