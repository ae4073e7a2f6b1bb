"""What a search says of its health at the end of each epoch, and when it stops for it.

A line of metrics.jsonl gets these fields:

    skips               skip connections among the 8 edges of the normal cell
    cell_parameters     of the operations on these edges, at the channels of the first cells
    entropy_normal      mean entropy of the edges' shares in nats; entropy_reduce likewise
    margins             by kind of cell, of each edge: how far its operation is ahead of the next
    curvature           magnitude of the dominant eigenvalue, in the epochs in which it is measured

Verdicts are functions of these lines, so that a run that was continued comes to the same.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from conas import distributed
from conas.darts.architect import Batch, Bilevel
from conas.errors import InputError
from conas.health.collapse import FEWEST_EPOCHS, MOST_SKIPS, collapsing_from, published_stop, sound_epoch
from conas.health.curvature import Curvature
from conas.health.measures import CellSize, count_skips, entropy, margins, shares
from conas.memory import is_out_of_memory

EDGES = 8  # of a derived cell


class Observer:
    """Looks at the network of `architect` at the end of epochs.

    `every` epochs the curvature is measured on what `batch` returns; 0 is never. `epochs` are those of the whole
    search, and `C` the channels of its first cells. `stop_on` is "collapse", "curvature" or "never".
    """

    def __init__(self, architect: Bilevel, batch: Callable[[], Batch], *, every: int, seed: int, epochs: int,
                 stop_on: str, operations: Mapping[str, Callable], C: int):
        self.network, self.every, self.epochs, self.stop_on = architect.network, every, epochs, stop_on
        self.architect, self.batch, self.seed = architect, batch, seed
        self.curvature: Curvature | None = None  # before it is first measured
        self.size = CellSize(operations, C)
        self.no_memory = False  # for the curvature, seen in the last look

    def look(self, epoch: int) -> dict:
        """The fields of an epoch."""
        genotype, alphas = self.network.genotype(), {}
        row = {"skips": count_skips(genotype), "cell_parameters": self.size(genotype.normal)}
        for kind in ("normal", "reduce"):
            if (values := shares(self.network, kind)) is not None:
                row[f"entropy_{kind}"] = entropy(values)
                alphas[kind] = [round(value, 6) for value in margins(values, tuple(self.network.primitives))]
        if alphas:
            row["margins"] = alphas
        if self.every and epoch % self.every == 0:
            row |= self._measure()
        return row

    def _measure(self) -> dict:
        """The curvature's field. Too little memory for it ends no search, unless several processes share it."""
        try:
            self.curvature = self.curvature or Curvature(self.architect, self.batch(), self.seed)
            value = abs(self.curvature.measure())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if distributed.size() > 1:
                raise InputError("--curvature: too little memory to measure it; --curvature 0 goes on without"
                                 ) from error
            self.every, self.no_memory = 0, True
            return {}
        return {"curvature": value} if math.isfinite(value) else {"curvature_not_finite": 1}

    def news(self, metrics: Sequence[Mapping]) -> str | None:
        """The line for the log in the epoch from which on a search is collapsing."""
        if self.no_memory:
            self.no_memory = False
            return "the curvature is no longer measured: there is too little memory for it; --curvature 0 never tries"
        epoch = self.collapsing(metrics)
        if epoch is None or epoch != len(metrics) - 1:
            return None
        skips = [row["skips"] for row in metrics]
        sound = sound_epoch(skips, epoch)
        cell = (f"the cell of epoch {sound} is still sound" if sound is not None else
                f"no cell up to now has at most {MOST_SKIPS}")
        return (f"collapsing: from epoch {epoch} on, skip connections ({skips[-1]} of {EDGES} edges now) are about to "
                f"take over the normal cell; {cell} (docs/health.md)")

    def collapsing(self, metrics: Sequence[Mapping]) -> int | None:
        """The epoch from which on the search is collapsing; None if it is not, or if its skips were not counted."""
        if any("skips" not in row for row in metrics):
            return None
        return collapsing_from([row["skips"] for row in metrics], curvature_of(metrics), self.epochs)

    def stop(self, metrics: Sequence[Mapping]) -> tuple[int, str] | None:
        """Where --stop_on ends the search: the epoch whose cell it ends with, and the reason; None while it goes on.

        On "curvature", that is the rule of RobustDARTS, which takes the cell from before the rise.
        """
        if self.stop_on == "curvature":
            found = published_stop(curvature_of(metrics))
            return found and (found[1], f"the curvature has risen since epoch {found[1]} (--stop_on curvature)")
        if self.stop_on == "collapse" and (epoch := self.collapsing(metrics)) is not None:
            sound = sound_epoch([row["skips"] for row in metrics], epoch)
            return ((epoch if sound is None else sound),
                    f"the search is collapsing from epoch {epoch} on (--stop_on collapse)")
        return None

    def last_line(self, metrics: Sequence[Mapping], epoch: int, folder: Path) -> str:
        """Whether the cell of `epoch`, which the search ends with, is collapsed, and which earlier one is not."""
        if any("skips" not in row for row in metrics):
            return "whether this cell is collapsed is unknown: the search began before its skips were counted"
        skips = [row["skips"] for row in metrics]
        here = f"{skips[epoch]} of the {EDGES} edges of its normal cell are skip connections"
        if self.epochs < FEWEST_EPOCHS:
            return f"{here}; a search of fewer than {FEWEST_EPOCHS} epochs is too short to say if it has collapsed"
        if skips[epoch] <= MOST_SKIPS:
            return f"this cell is not collapsed: {here}"
        sound = sound_epoch(skips, self.collapsing(metrics) or epoch)
        path = folder / "genotypes" / f"epoch_{sound or 0:03d}.json"
        return (f"this cell is collapsed: {here}; " + (f"no earlier one has at most {MOST_SKIPS}" if sound is None else
                f"that of epoch {sound} is not, and --arch {path} trains it"))


def curvature_of(metrics: Sequence[Mapping]) -> dict[int, float]:
    """The curvature by epoch."""
    return {row["epoch"]: row["curvature"] for row in metrics if "curvature" in row}
