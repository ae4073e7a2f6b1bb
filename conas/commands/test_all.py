"""Test every checkpoint of a run, epoch by epoch: what the script test_all.py of a space shows the loop of."""
import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from conas import distributed
from conas.cli import parse
from conas.commands.scoring import (  # noqa: F401  what conas.evaluate, this module's former name, offers besides
    load_images,
    predict,
    predict_all,
    run_folder,
    scores_for,
    scores_for_all,
    validate,
)
from conas.darts.space import Space
from conas.data.images import full_name
from conas.errors import InputError
from conas.files import write_text
from conas.runs.folder import best_checkpoint, list_checkpoints
from conas.runs.options import STAGES, StageOptions, TestOptions
from conas.runs.scores import Scores

SHOWN = {"loss": "loss {:.4f}", "top1": "top-1 {:6.2f} %", "top5": "top-5 {:6.2f} %"}  # other figures: name and value


class ScoredRun:
    """The checkpoints of one run, and the table of their figures on the test images.

    Rows go to `show` as they come, and to test_all.csv in the run's folder at the end. Of several processes, which
    call it alike, the first one writes.
    """

    def __init__(self, space: Space, stage: str, options: TestOptions, show: Callable[[str], None] = tqdm.write):
        self.space, self.stage, self.options, self.show = space, stage, options, show
        self.folder = run_folder(space, stage, options)
        self.rows: list[dict] = []

    def checkpoints(self) -> Iterator[tuple[int, Path]]:
        """Epochs and checkpoints, in order. Raises InputError if the run has none."""
        yield from tqdm(list_checkpoints(self.folder).items(), desc=self.folder.name, unit="checkpoint",
                        disable=distributed.tqdm_disable())

    def scores(self, path: Path) -> Scores:
        """Logits and labels of all test images: computed and stored, or read if stored for this very checkpoint."""
        return scores_for(self.space, path, self.options)

    def add(self, epoch: int, scores: Scores, **figures: float) -> None:
        """Add a row of the table: `figures` by column. Says how many predictions are not finite, if some are not."""
        shown = "  ".join(SHOWN.get(name, f"{name} {{:.4f}}").format(value) for name, value in figures.items())
        self.show(f"{self.space.name}  epoch {epoch:3d}  {shown}{_counted(scores)}")
        self.rows.append({"epoch": epoch, **figures})
        self._last = scores

    def finish(self) -> None:
        """Write the table, and show how the best network of a training does."""
        path, text = self.folder / "test_all.csv", io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        if distributed.rank() == 0:
            write_text(path, text.getvalue())
        self.show(f"{STAGES[self.stage]}: {len(self.rows)} checkpoints, {len(self._last.labels)} test images of "
                  f"{full_name(self._last.dataset)}: {path}")
        if self.stage == "train":
            self._show_best()

    def _show_best(self) -> None:
        try:
            path = best_checkpoint(self.folder)
        except InputError as error:  # no epoch was fit to be the best
            self.show(str(error))
            return
        best = self.scores(path)
        self.show(f"{self.space.name}  best on held-out images, of epoch {best.epoch}: loss {best.loss():.4f}, "
                  f"top-1 {best.top(1):.2f} %, top-5 {best.top(5):.2f} %{_counted(best)}")


def _counted(scores: Scores) -> str:
    return f"  {scores.remark}, and count as wrong" if scores.not_finite else ""


def score_checkpoints(run: ScoredRun) -> list[dict]:
    """The loop of the script test_all.py over one run. Returns its rows: epoch, loss (nats), top1, top5 (percent).

    Predictions that are not finite are wrong, make the loss NaN, and are counted in the row that is shown.
    """
    for epoch, checkpoint in run.checkpoints():
        scores = run.scores(checkpoint)
        run.add(epoch, scores, loss=scores.loss(), top1=scores.top(1), top5=scores.top(5))
    run.finish()
    return run.rows


def existing_stages(space: Space, stage: str | None, options: TestOptions) -> list[str]:
    """The stages to test: `stage`, or those of which the space has a run, or "search" if it has none."""
    if stage is not None:
        return [stage]
    return [name for name in STAGES if run_folder(space, name, options).is_dir()] or ["search"]


def runs_to_test(folder: Path, network: type, description: str, argv: list[str] | None = None) -> list[ScoredRun]:
    """The runs that the command line of `folder`'s script test_all.py names: search-NAME and train-NAME."""
    which, options = parse(description, [StageOptions, TestOptions], argv)
    space = Space(folder.name, folder, network)
    return [ScoredRun(space, stage, options) for stage in existing_stages(space, which.stage, options)]


def main(folder: Path, network: type, description: str, argv: list[str] | None = None) -> None:
    """The command `python test_all.py` of the space in `folder`, for scripts that do not show the loop themselves."""
    for run in runs_to_test(folder, network, description, argv):
        score_checkpoints(run)
