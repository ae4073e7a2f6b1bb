"""Average the members of all spaces into one committee, and compare it with each of them.

    python test_ensemble.py                                   # search-EXP of every cnn_space* folder, epoch by epoch
    python test_ensemble.py --save NAME                       # search-NAME of every cnn_space* folder
    python test_ensemble.py --combination logit_sum           # as the original CoNAS combines
    python test_ensemble.py --combination greedy              # the best of all epochs, chosen on held-out images
    python test_ensemble.py --members 'cnn_space*/train-*/checkpoints/best.pt' --combination weighted
    python test_ensemble.py --task language                   # language models: rnn/train-* that share a text

Prints a table, and writes it and its pictures to the folder committee-NAME, or committee-NAME-train for retrained
networks. All that is fitted is fitted on the held-out part of the training images; docs/committee.md explains the
rules and the figures.
"""
import glob
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from conas import cli, distributed
from conas.cli import option
from conas.commands.scoring import NothingHeldOut, run_folder, scores_for_all
from conas.darts.space import Space, discover, of_members
from conas.draw.cell import check_pictures
from conas.errors import InputError
from conas.files import check_writable
from conas.runs.folder import list_checkpoints
from conas.runs.options import STAGES, TestOptions
from conas.runs.scores import Scores
from ensemble import language
from ensemble.combine.committee import Committee, check_finite, check_same_images, common_epochs
from ensemble.combine.fit import FITTED, RULES, SELECTING, Fit, fit
from ensemble.combine.selection import OBJECTIVES
from ensemble.measure.metrics import confusion_matrix, softmax
from ensemble.measure.shift import measure_shift
from ensemble.measure.significance import compare
from ensemble.report import html, pictures, reference, report

ROOT = Path(__file__).resolve().parent
Pool = dict[str, tuple[Space, Path]]  # checkpoints by the name that reports give them


@dataclass
class CommitteeOptions:
    """the committee"""

    spaces: tuple[str, ...] | None = option(None, "members by folder name (default: every space that has such a run)")
    members: tuple[str, ...] | None = option(
        None, "members by checkpoint instead of --save's runs: files or quoted patterns, of any space, run and epoch")
    stage: str | None = option(None, "supernets of the searches, or retrained networks (default: what is there, the "
                               "retrained first)", choices=list(STAGES))
    combination: str = option("mean_softmax", "how the members' logits become one answer; weighted, greedy and beam "
                              "are fitted on held-out images, the last two over all epochs", choices=list(RULES))
    size: int = option(10, "most members that greedy and beam choose, repeats counted", low=1, high=1000)
    width: int = option(8, "committees of each size that beam goes on with", low=1)
    objective: str = option("nll", "of greedy and beam, on held-out images", choices=list(OBJECTIVES))
    temperatures: tuple[str, ...] | None = option(
        None, "whose probabilities are calibrated on held-out images before use", choices=["members", "committee"])
    against: tuple[str, ...] | None = option(
        None, "another committee, or one network, given as for --members and combined alike, to test the gain over")
    task: str = option("images", "what the members do; language averages next-word probabilities of the best networks "
                       "of rnn's train.py, all of them unless --members names some", choices=["images", "language"])
    reference: bool | None = option(None, "the authors' curve beside ours, in pictures, table and report (default: for "
                                    "supernets on CIFAR-10)")
    report: bool = option(False, "write report.html too: all of this in one page")
    shift: bool = option(False, "test members and committee on corrupted test images too: 75 times as many")


def main() -> None:
    ours, options = cli.parse(__doc__, [CommitteeOptions, TestOptions])
    if ours.task == "language":
        return language_committee(ours, options)
    spaces = choose(discover(ROOT), ours.spaces)
    retrained = [space for space in spaces if (run_folder(space, "train", options) / "checkpoints").is_dir()]
    stages = [ours.stage] if ours.stage else ["search"] if ours.members or len(retrained) < 2 else ["train", "search"]
    for stage in stages:
        if len(stages) > 1:
            print(f"{'' if stage == stages[0] else chr(10)}{STAGES[stage]}\n")
        one_committee(replace(ours, stage=stage), options, spaces)


def one_committee(ours: CommitteeOptions, options: TestOptions, spaces: list[Space]) -> None:
    """Combine, compare, print and write one committee of the stage `ours.stage`."""
    folder = ROOT / f"committee-{options.save}{'-train' if ours.stage == 'train' else ''}"
    for name in ("committee.json", "report.html"):
        check_writable(folder / name)
    check_pictures()
    sources = spaces if ours.spaces else of_members(ROOT)
    rivals = find_members(ours.against, sources, "--against", 1) if ours.against else {}
    epochs, left_out, not_finite = [], {}, []
    if ours.members:
        pool = find_members(ours.members, sources, "--members", 2)
    elif ours.combination in SELECTING:
        runs = find_runs(spaces, options, ours.stage)
        pool = {f"{space.name} {epoch:03d}": (space, path)
                for space, run in runs.items() for epoch, path in run.items()}
    else:
        runs = find_runs(spaces, options, ours.stage)
        common, left_out = common_epochs({space.name: run for space, run in runs.items()})
        *earlier, pool = ({space.name: (space, run[epoch]) for space, run in runs.items()} for epoch in common)
        if ours.combination not in FITTED and not ours.temperatures:
            for members in progress(earlier, "epochs"):
                scores = score(members, options)
                if bad := report.not_finite(scores):
                    not_finite += bad
                else:
                    epochs.append(evaluated(Committee(scores, ours.combination), members, ours))

    fitted = try_fit(pool, ours, options)
    committee, best = build(pool, fitted, ours, options)
    epochs.append(evaluated(committee, pool, ours, fitted))
    significance = {"over_best_member": None, "over_other": None}
    if fitted:
        not_finite += report.not_finite(fitted.left_out)
        significance["over_best_member"] = {"name": fitted.best_member, **compare(
            committee.probabilities, softmax(best.logits), committee.labels)}
    if rivals:
        fitted_rival = try_fit(rivals, ours, options)
        for line in report.not_finite_lines(report.not_finite(fitted_rival.left_out)) if fitted_rival else ():
            print(f"--against: {line}")
        rival, _ = build(rivals, fitted_rival, ours, options)
        if rival.fingerprint != committee.fingerprint:
            raise InputError("--against: its members were tested on other images; choose runs with the same data flags")
        significance["over_other"] = {"name": " ".join(ours.against), **compare(
            committee.probabilities, rival.probabilities, committee.labels)}
    shift = measure_shift({name: pool[name] for name in committee.members}, committee, options) if ours.shift else None

    if distributed.rank():
        return  # the first process has all that the others have computed
    summary = report.assemble(epochs, committee, left_out, fitted, significance, shift, not_finite)
    print(report.as_text(summary))
    paths = report.write(folder, summary, committee)
    paths += pictures.draw(folder, summary, confusion_matrix(committee.probabilities, committee.labels))
    if ours.report:
        paths.append(html.write(folder, ROOT, summary, committee, options.data))
    print(f"\nwritten to {folder}: {', '.join(path.name for path in paths)}")


def evaluated(committee: Committee, pool: Pool, ours: CommitteeOptions, fitted: Fit | None = None) -> dict:
    """An entry of the report's epochs, with what the published curve is compared with where it belongs beside it."""
    entry = report.evaluate(committee, paths_of(pool), fitted)
    return entry | {"rules": reference.accuracies(committee)} if reference.applies(ours.reference, committee) else entry


def language_committee(ours: CommitteeOptions, options: TestOptions) -> None:
    """Combine language models, print the table and write it."""
    patterns = ours.members or ("rnn/train-*/checkpoints/best.pt",)
    paths = sorted({path for pattern in patterns for path in files_of(pattern)})
    if ours.members and not paths:
        raise InputError(f"--members {' '.join(patterns)}: no file has such a path")
    names = {f"{path.parents[1].name} {path.stem}": path for path in paths}
    summary = language.evaluate(names, options.data, 35, cli.find_device(options.device))
    print(language.as_text(summary))
    print(f"\nwritten: {language.write(ROOT / f'committee-{options.save}-language', summary)}")


def files_of(pattern: str) -> list[Path]:
    """The files that a pattern names, seen from here or from the root."""
    found = glob.glob(pattern, recursive=True) or glob.glob(pattern, root_dir=ROOT, recursive=True)
    return sorted({(Path(name) if Path(name).exists() else ROOT / name).resolve() for name in found})


def try_fit(pool: Pool, ours: CommitteeOptions, options: TestOptions) -> Fit | None:
    """Fit on the held-out images of all. Without such, None if nothing has to be fitted, else InputError."""
    without = "and so no calibration and no test of the gain over the best member"
    try:
        scores = score(pool, options, "valid")
    except InputError as error:
        if ours.combination in FITTED or ours.temperatures:
            raise
        reason = "no held-out images" if isinstance(error, NothingHeldOut) else "the held-out images were not scored"
        print(f"{reason}, {without}: {error}\n")
        return None
    try:
        check_same_images(scores)
    except InputError as error:
        if ours.combination in FITTED or ours.temperatures:
            raise
        check_same_images(score(pool, options))  # those with other test images are no committee at all
        print(f"no held-out images in common, {without}: {error}\n")
        return None
    if ours.combination not in SELECTING:
        check_finite(scores, files_by_name(pool))
    return fit(scores, ours.combination, size=ours.size, width=ours.width, objective=ours.objective,
               temperatures=ours.temperatures or ())


def build(pool: Pool, fitted: Fit | None, ours: CommitteeOptions, options: TestOptions
          ) -> tuple[Committee, Scores | None]:
    """The committee on the test images, and the best member of the pool on held-out images, which it need not have."""
    needed = pool if fitted is None else {name: pool[name] for name in [*fitted.members, fitted.best_member]}
    scores = score(needed, options)
    check_finite(scores, files_by_name(needed))
    if fitted is None:
        return Committee(scores, ours.combination), None
    return fitted.committee(scores), scores[fitted.best_member]


def score(pool: Pool, options: TestOptions, split: str = "test") -> dict[str, Scores]:
    """The scores of every member on a split, computed where they are not stored."""
    return dict(zip(pool, scores_for_all(pool.values(), options, split)))


def progress(things: Iterable, title: str) -> tqdm:
    return tqdm(things, desc=title, unit="checkpoint", leave=False, disable=distributed.tqdm_disable())


def files_by_name(pool: Pool) -> dict[str, Path]:
    return {name: path for name, (_, path) in pool.items()}


def paths_of(pool: Pool) -> dict[str, str]:
    """Paths by name, relative to the root where they are below it."""
    return {name: (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()
            for name, (_, path) in pool.items()}


def find_members(patterns: tuple[str, ...], spaces: list[Space], flag: str, fewest: int) -> Pool:
    """The checkpoints that patterns name, seen from here or from the root.

    Raises InputError for a pattern without any, and for fewer than `fewest` in all.
    """
    by_name, pool = {space.name: space for space in spaces}, {}
    for pattern in patterns:
        paths = [path for path in files_of(pattern) if path.is_file() and path.parent.name == "checkpoints"]
        if not paths:
            raise InputError(f"{flag} {pattern}: no checkpoint has such a path; one has "
                             "cnn_space1/search-EXP/checkpoints/epoch_000.pt")
        for path in paths:
            run, space = path.parent.parent, by_name.get(path.parents[2].name)
            if space is None:
                raise InputError(f"{flag} {path}: is in no folder of {', '.join(by_name)}, and so of no known space")
            pool[f"{space.name}/{run.name} {path.stem.removeprefix('epoch_')}"] = space, path
    if len(pool) < fewest:
        raise InputError(f"{flag} {' '.join(patterns)}: names one checkpoint, and a committee needs two members")
    return pool


def choose(spaces: list[Space], names: tuple[str, ...] | None) -> list[Space]:
    """The spaces called `names`, or all. Raises InputError for a name that is not there."""
    for name in names or ():
        if name not in {space.name for space in spaces}:
            raise InputError(f"--spaces {name}: no such folder; there are {', '.join(s.name for s in spaces)}")
    return [space for space in spaces if not names or space.name in names]


def find_runs(spaces: list[Space], options: TestOptions, stage: str) -> dict[Space, dict[int, Path]]:
    """The checkpoints by epoch of each space that has a run; says which have none. Raises InputError below two."""
    runs, without = {}, []
    for space in spaces:
        try:
            runs[space] = list_checkpoints(run_folder(space, stage, options))
        except InputError:
            without.append(space)
    save, script = options.save, "train_search.py" if stage == "search" else "train.py"
    flag = "" if save == "EXP" else f" --save {save}"
    if len(runs) < 2:
        found = f"only {next(iter(runs)).name} has" if runs else "none of the chosen spaces has"
        mend = f"cd {without[0].name} && python {script}{flag}" if without else "name another with --spaces"
        raise InputError(f"{found} checkpoints in {stage}-{save}, and a committee needs two members: {mend}")
    for space in without:
        print(f"{space.name}: no checkpoints in {stage}-{save}, left out")
    return runs


if __name__ == "__main__":
    sys.exit(cli.run(main))
