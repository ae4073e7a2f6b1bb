"""More epochs for a run, by --extend: where its stretches begin and end, and what follows from that for an epoch.

args.json lists them under `stretches`, [first epoch, end] each, once a run has been extended: [[0, 50], [50, 80]]. A
new stretch begins with the first epoch that had not begun, so that every epoch has one learning rate, whenever the
process was killed.
"""
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from conas import distributed
from conas.errors import InputError
from conas.files import read_json, write_json


@dataclass(frozen=True)
class Stretches:
    """The stretches of a run, one if it was never extended."""

    parts: tuple[tuple[int, int], ...]

    def _of(self, epoch: int) -> int:
        return max(i for i, (first, _) in enumerate(self.parts) if first <= epoch)

    def place(self, epoch: int) -> tuple[int, int]:
        """How many epochs of its stretch lie before an epoch, and how many the stretch has: a cosine's arguments."""
        first, end = self.parts[self._of(epoch)]
        return epoch - first, end - first

    def risen(self, epoch: int, highest: float) -> float:
        """What rises from 0 to `highest` along a line, and in every further stretch from where it was."""
        value = 0.0
        for (first, end), (following, _) in pairwise([*self.parts[:self._of(epoch) + 1], (epoch, 0)]):
            value += (highest - value) * (following - first) / (end - first)
        return value

    def extra_metrics(self, epoch: int) -> dict:
        """For the epoch's line of metrics: the number of its extension, from 1."""
        number = self._of(epoch)
        return {"extension": number} if number else {}


def stretches_of(folder: Path, arguments: dict, following: int) -> tuple[Stretches, str]:
    """The stretches of the run in `folder`, with a new one from the epoch `following` if `arguments` have more epochs.

    A new one is recorded, and said in the second result. Processes of one run get what the first of them finds. Raises
    InputError if args.json is damaged.
    """
    def find() -> tuple[tuple[tuple[int, int], ...], str]:
        content = read_json(folder / "args.json")
        before, now = content["arguments"].get("epochs"), arguments.get("epochs")
        parts = content.get("stretches", [[0, before]])
        if not _is_right(parts, before):
            raise InputError(f"{folder / 'args.json'}: damaged; its stretches are not of a run of {before} epochs")
        text = ""
        if now > before:
            parts = [*parts, [following, now]]
            write_json(folder / "args.json", content | {"arguments": arguments, "stretches": parts})
            for picture in (folder / "cells").glob("*.png"):
                picture.unlink()  # of the earlier end; without them, a process that is killed last draws them again
            text = f"extended from {before} to {now} epochs: from epoch {following} on in a new stretch"
        return tuple((first, end) for first, end in parts), text

    parts, text = distributed.from_rank0(find)
    return Stretches(parts), text


def _is_right(parts: object, epochs: object) -> bool:
    if not (isinstance(parts, list) and parts and all(
            isinstance(part, list) and len(part) == 2 and all(type(n) is int for n in part) and 0 <= part[0] < part[1]
            for part in parts)):
        return False
    return parts[0][0] == 0 and parts[-1][1] == epochs and all(
        one[0] <= other[0] and one[1] < other[1] for one, other in pairwise(parts))
