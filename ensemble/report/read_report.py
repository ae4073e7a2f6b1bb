"""Read the committee.json that test_ensemble.py wrote, and check it: a file from elsewhere can claim anything."""
import math
from pathlib import Path

from conas.errors import InputError
from conas.files import read_json
from ensemble.combine.fit import RULES

FIGURES = "top1", "top5", "loss", "brier", "ece", "adaptive_ece"


def read_report(root: Path, save: str) -> tuple[Path, dict]:
    """The path of `root`/committee-SAVE/committee.json and the report in it, as `ensemble.report` describes it.

    Raises InputError if there is none, or if what it says of its members cannot be so.
    """
    path = root / f"committee-{save}" / "committee.json"
    script = f"python test_ensemble.py{'' if save == 'EXP' else f' --save {save}'}"
    try:
        report = read_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such committee; start {script} first, or name another with --save") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); start {script} again") from error
    if not _is_report(report):
        raise InputError(f"{path}: damaged; start {script} again")
    return path, report


def _is_report(report: object) -> bool:
    return (isinstance(report, dict) and report.get("format") == "conas-committee"
            and report.get("combination") in RULES and _are_texts(report, "dataset", "fingerprint")
            and _is_whole(report.get("images")) and _is_list(report.get("classes"), str)
            and _is_list(report.get("epochs"), dict) and all(map(_is_entry, report["epochs"])))


def _is_entry(entry: dict) -> bool:
    members, ours = entry.get("members"), entry.get("committee")
    return (_is_whole(entry.get("epoch")) and _are_texts(entry, "best_member") and _are_numbers(entry, "gain")
            and isinstance(ours, dict) and _are_numbers(ours, *FIGURES) and _is_temperature(ours.get("temperature"))
            and _is_list(members, dict) and all(map(_is_member, members))
            and len({member["name"] for member in members}) == len(members))


def _is_member(member: dict) -> bool:
    return (_are_texts(member, "name", "space", "stage", "checkpoint", "sha256") and "\0" not in member["checkpoint"]
            and all(_is_whole(member.get(key)) for key in ("epoch", "seed")) and _are_numbers(member, *FIGURES)
            and _are_numbers(member, "weight") and 0 <= member["weight"] <= 1
            and _is_temperature(member.get("temperature")))


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, kind) for item in value)


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_temperature(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _are_texts(values: dict, *names: str) -> bool:
    return all(isinstance(values.get(name), str) for name in names)


def _are_numbers(values: dict, *names: str) -> bool:
    return all(type(values.get(name)) in (int, float) and math.isfinite(values[name]) for name in names)
