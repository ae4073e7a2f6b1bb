"""Keep what is small of runs and committees as results: arguments, metrics by epoch, a committee's figures.

    python -m benchmarks.keep cifar10 cnn_space1/train-conas cnn_space2/train-conas committee-conas-train

Checkpoints, logits and paths of this machine are left out.
"""
import argparse
import sys
from pathlib import Path

from benchmarks.machine import RESULTS
from conas import cli
from conas.errors import InputError
from conas.files import read_json, write_json, write_text
from conas.runs.folder import portable, read_arguments


def keep(folder: Path, target: Path) -> list[str]:
    """Write the results of the run or committee in `folder` into `target`. Returns the names of the files.

    Raises InputError if there is neither, or if what is there is damaged.
    """
    names = []
    try:
        if (folder / "args.json").is_file():
            arguments = portable(read_arguments(folder))
            arguments.pop("suffixes", None)
            write_json(target / "args.json", arguments)
            names.append("args.json")
        if (folder / "metrics.jsonl").is_file():
            write_text(target / "metrics.jsonl", (folder / "metrics.jsonl").read_text(encoding="utf-8"))
            names.append("metrics.jsonl")
        if (folder / "committee.json").is_file():
            write_json(target / "committee.json", read_json(folder / "committee.json"))
            names.append("committee.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read ({error})") from error
    if not names:
        raise InputError(f"{folder}: is neither a run nor a committee; name folders such as cnn_space1/search-EXP and "
                         "committee-EXP")
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="the folder below benchmarks/results")
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args(argv)
    for folder in options.folders:
        place = folder.resolve()
        own = place.name if place.name.startswith("committee") else f"{place.parent.name}/{place.name}"
        print(f"{own}: {', '.join(keep(folder, RESULTS / options.name / own))}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
