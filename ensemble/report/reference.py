"""The published curve: what the authors' supernets and their committee reached on CIFAR-10, epoch by epoch.

In the authors' code logits are summed. So beside it a committee is shown by both rules, that and the paper's mean of
softmaxes.
"""
from collections.abc import Sequence
from pathlib import Path

from conas.errors import InputError
from conas.files import read_json
from ensemble.combine.committee import COMBINATIONS, Committee
from ensemble.measure.metrics import topk_accuracy

FILE = Path(__file__).with_name("reference.json")
DATASETS = "cifar10", "cifar10_jpeg"
RULES = {"mean_softmax": "softmax averaged", "logit_sum": "logits summed"}
IMAGES = 10_000


def applies(wanted: bool | None, committee: Committee) -> bool:
    """Return True if the published curve belongs beside a committee. `wanted` is --reference; None: the members decide.

    Raises InputError if it is wanted beside something else than supernets on CIFAR-10.
    """
    stages = {scores.stage for scores in committee.members.values()}
    fits = committee.dataset in DATASETS and stages == {"search"}
    if wanted and not fits:
        raise InputError(f"--reference: the published curve is of supernets of a search on CIFAR-10, and these members "
                         f"are of the stage {' and '.join(sorted(stages))} on {committee.dataset}; leave it out")
    return fits and wanted is not False


def accuracies(committee: Committee) -> dict[str, float]:
    """Top-1 in percent by both RULES, of the members' plain logits without weights and temperatures."""
    return {rule: 100 * topk_accuracy(COMBINATIONS[rule](committee.logits), committee.labels) for rule in RULES}


def beside(entries: Sequence[dict]) -> dict | None:
    """The published curve for the report of `entries`, or None: `reference.json` and {epochs, ours by rule}.

    Entries that have their `accuracies` under "rules" are shown beside it.
    """
    shown = [entry for entry in entries if "rules" in entry]
    if not shown:
        return None
    return read_json(FILE) | {"epochs": [entry["epoch"] for entry in shown],
                              "ours": {rule: [entry["rules"][rule] for entry in shown] for rule in RULES}}


def table_rows(reference: dict, entries: Sequence[dict], most: int = 12) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the epochs that both have up to the last one, evenly spaced if there are more than `most`."""
    top1, by_epoch = reference["top1"], {entry["epoch"]: entry for entry in entries}
    last, members = len(top1["committee"]), [name for name in top1 if name != "committee"]
    common = [i for i, epoch in enumerate(reference["epochs"]) if epoch < last]
    rows, step = [], -(-len(common) // most)
    for i in [i for place, i in enumerate(common, 1) if (len(common) - place) % step == 0]:
        epoch = reference["epochs"][i]
        rows.append([str(epoch), *(f"{values[i]:.2f}" for values in reference["ours"].values()),
                     f"{top1['committee'][epoch]:.2f}", f"{max(m['top1'] for m in by_epoch[epoch]['members']):.2f}",
                     f"{max(top1[name][epoch] for name in members):.2f}"])
    header = ["epoch", *(f"committee, {rule}" for rule in RULES.values()), "published", "best member", "published"]
    return header, rows


def note(reference: dict, images: int) -> str:
    """What the published figures are, and what makes them another experiment than ours."""
    top1 = reference["top1"]
    last, members = len(top1["committee"]) - 1, [name for name in top1 if name != "committee"]
    fewer = "" if images == IMAGES else f"; they are of all {IMAGES:,} test images, ours of {images:,}"
    supernets = ", ".join(f"{name} {top1[name][last]:.2f}" for name in members)
    return (f"published: {reference['source']}; logits summed; at its last epoch, {last}, committee "
            f"{top1['committee'][last]:.2f} %, {supernets}{fewer}")
