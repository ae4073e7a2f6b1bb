"""The best epoch of a training: which it is, and the checkpoint `best.pt` that holds it.

An epoch whose predictions are not all finite is never the best, however its accuracy may look.
"""
import math
from collections.abc import Sequence

from conas import distributed
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import Run

LOWER = "a lower --learning_rate or --grad_clip under another --save name may help"


def best_epoch(metrics: Sequence[dict]) -> int | None:
    """The first epoch with the most right answers on the held-out images, by loss if several; None if there is none.

    Language models have no right answers, and the lowest loss decides. Without held-out images it is the last epoch.
    Epochs with a loss or with predictions that are not finite do not count, nor do those whose weights are `lost`.
    """
    fit = [i for i, row in enumerate(metrics) if _is_fit(row)]
    if fit and metrics[-1].get("valid_loss") is None:
        return fit[-1]
    return max(fit, key=lambda i: (metrics[i].get("valid_top1", 0.0), -metrics[i]["valid_loss"]), default=None)


def _is_fit(row: dict) -> bool:
    loss = row.get("valid_loss")
    return not row.get("not_finite") and not row.get("lost") and (loss is None or math.isfinite(loss))


def require_best(run: Run, metrics: Sequence[dict], advice: str = LOWER) -> dict:
    """The metrics of the best epoch. Raises InputError if no epoch is fit to be it."""
    best = best_epoch(metrics)
    if best is None:
        raise InputError(f"{run.folder}: no best network, since in no epoch were all predictions finite"
                         f"{' and the weights were kept' if any(row.get('lost') for row in metrics) else ''}; {advice}")
    return metrics[best]


def repair_best(run: Run, metrics: list[dict], last: dict | None = None) -> None:
    """Correct a best.pt of an epoch whose predictions are NaN, as version 0.1.0 could write it.

    The best of those epochs whose checkpoints are on disk takes its place; better ones that are not on disk are marked
    as `lost` in the metrics. If none is left, best.pt goes. What was in it is kept as an ordinary checkpoint.
    `last` is the checkpoint of the last epoch, for runs that keep it nowhere but in their state.
    """
    if all(_is_fit(row) or "not_finite" in row for row in metrics):  # that version did not count them
        return

    def kept(epoch: int) -> dict | None:
        own = run.path("checkpoints", epoch, ".pt")
        if own.exists():
            return checkpoints.load(own)
        return last if epoch == len(metrics) - 1 else None

    def repair() -> list[int]:
        path, rows, lost = run.folder / "checkpoints" / "best.pt", [dict(row) for row in metrics], []
        wrong, best = checkpoints.load(path) if path.exists() else None, best_epoch(metrics)
        held, checkpoint = wrong and wrong["epoch"], None
        if held is not None and held >= len(metrics):  # that one is about to be done again
            return []
        while best is not None and best != held and (checkpoint := kept(best)) is None:
            rows[best]["lost"] = True
            lost.append(best)
            best = best_epoch(rows)
        if best is not None and best == held:
            return lost
        if wrong:
            checkpoints.save(run.path("checkpoints", held, ".pt"), wrong)
            run.log(f"warning: {path} was of an epoch whose predictions are not all finite; it is now "
                    f"{'gone, until an epoch has finite ones' if best is None else f'of epoch {best}'}")
        if best is None:
            path.unlink(missing_ok=True)
        else:
            checkpoints.save(path, checkpoint)
        return lost

    for epoch in distributed.from_rank0(repair):
        metrics[epoch]["lost"] = True
