"""Average the members of all spaces into one committee, epoch by epoch, and compare it with each of them.

    python test_ensemble.py                                   # search-EXP of every cnn_space* folder
    python test_ensemble.py --save NAME                       # search-NAME of every cnn_space* folder
    python test_ensemble.py --combination logit_sum           # as the original CoNAS combines

Prints a table, and writes it and its pictures to the folder committee-NAME.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from conas import cli
from conas.cli import option
from conas.config import TestOptions
from conas.errors import InputError
from conas.evaluate import scores_for
from conas.run import folder_name, list_checkpoints
from conas.spaces import Space, discover
from ensemble import pictures, report
from ensemble.committee import COMBINATIONS, Committee, common_epochs
from ensemble.metrics import confusion_matrix

ROOT = Path(__file__).resolve().parent


@dataclass
class CommitteeOptions:
    """the committee"""

    spaces: tuple[str, ...] | None = option(None, "members by folder name (default: every space that has such a run)")
    combination: str = option("mean_softmax", "how the members' logits become one answer", choices=list(COMBINATIONS))


def main() -> None:
    committee_options, options = cli.parse(__doc__, [CommitteeOptions, TestOptions])
    spaces = choose(discover(ROOT), committee_options.spaces)
    runs = find_runs(spaces, folder_name(options.save))
    epochs, left_out = common_epochs({space.name: run for space, run in runs.items()})

    results = []
    # disable=None: a bar on a terminal, silence in a file
    with tqdm(total=len(epochs) * len(runs), desc="members", unit="checkpoint", disable=None) as bar:
        for epoch in epochs:
            members, checkpoints = {}, {}
            for space, run in runs.items():
                members[space.name] = scores_for(space, run[epoch], options)
                checkpoints[space.name] = run[epoch].relative_to(ROOT).as_posix()
                bar.update()
            committee = Committee(members, committee_options.combination)
            results.append(report.evaluate(committee, checkpoints))

    summary, folder = report.assemble(results, committee, left_out), ROOT / f"committee-{options.save}"
    print(report.as_text(summary))
    paths = report.write(folder, summary, committee)
    paths += pictures.draw(folder, summary, confusion_matrix(committee.probabilities, committee.labels))
    print(f"\nwritten to {folder}: {', '.join(path.name for path in paths)}")


def choose(spaces: list[Space], names: tuple[str, ...] | None) -> list[Space]:
    """The spaces called `names`, or all. Raises InputError for a name that is not there."""
    for name in names or ():
        if name not in {space.name for space in spaces}:
            raise InputError(f"--spaces {name}: no such folder; there are {', '.join(s.name for s in spaces)}")
    return [space for space in spaces if not names or space.name in names]


def find_runs(spaces: list[Space], save: str) -> dict[Space, dict[int, Path]]:
    """The checkpoints by epoch of each space that has a run; says which have none. Raises InputError below two."""
    runs, without = {}, []
    for space in spaces:
        try:
            runs[space] = list_checkpoints(space.search_folder(save))
        except InputError:
            without.append(space)
    flag = "" if save == "EXP" else f" --save {save}"
    if len(runs) < 2:
        found = f"only {next(iter(runs)).name} has" if runs else "none of the chosen spaces has"
        mend = f"cd {without[0].name} && python train_search.py{flag}" if without else "name another with --spaces"
        raise InputError(f"{found} checkpoints in search-{save}, and a committee needs two members: {mend}")
    for space in without:
        print(f"{space.name}: no checkpoints in search-{save}, left out")
    return runs


if __name__ == "__main__":
    sys.exit(cli.run(main))
