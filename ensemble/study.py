"""The control: is a committee of three restricted spaces better than one of three seeds of the same space?

    python -m ensemble.study plan study.json                  # 5 seeds of every space, on the digits of the project
    python -m ensemble.study plan study.json --stage train --flags "--dataset cifar10 --epochs 25"
    python -m ensemble.study run study.json                   # what is missing, run after run; start it again to go on
    python -m ensemble.study run study.json --jobs 8          # eight runs at a time, one thread each
    python -m ensemble.study run study.json --part 2/3        # the second of three machines
    python -m ensemble.study plan study.json --slurm study.sh # and a script for a cluster: sbatch study.sh
    python -m ensemble.study report study.json                # study-report.json, and a table
    python -m ensemble.study keep study.json --to FOLDER      # predictions and costs without networks, for a repository

The plan lists every run with its commands, which are those of the README: run them wherever you like, and copy the
folders cnn_spaceN/search-STUDY-SEED (and train-...) together before the report. `run` and `report` also take the plan
in a folder that `keep` has written: what was kept there is not run again.
"""
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conas import cli
from conas.cli import option
from conas.commands import search, train
from conas.darts.space import discover
from conas.errors import InputError
from conas.files import read_json, write_json
from conas.places import absolute_words
from conas.runs.folder import folder_name
from conas.runs.options import TestOptions
from ensemble.study_results import gather, is_here, keep, last_folder, mean_costs
from ensemble.study_runs import SCRIPTS, execute, finished, write_slurm
from ensemble.study_statistics import as_text, compare_groups

ROOT = Path(__file__).resolve().parent.parent
OWN_FLAGS = "--save", "--seed", "--search", "--patience", "--check_only", "-h", "--help"
DIGITS = "--dataset digits --init_channels 8 --layers 3 --epochs 12 --batch_size 32"
DIGITS_TRAIN = "--dataset digits --init_channels 8 --layers 3 --epochs 30 --batch_size 32"


@dataclass
class PlanOptions:
    """the plan"""

    seeds: int = option(5, "runs of every space, with the seeds 1, 2, ...; more than --size for intervals", low=2,
                        high=1000)
    spaces: tuple[str, ...] | None = option(None, "by folder name (default: all)")
    stage: str = option("search", "which networks are compared: supernets, or retrained networks of the found cells",
                        choices=list(SCRIPTS))
    size: int = option(3, "members of every committee", low=2, high=100)
    save: str = option("study", "name of the runs: their folders are search-NAME-SEED and train-NAME-SEED")
    flags: str = option(DIGITS, "of train_search.py, in quotes and with '=': --flags='--dataset digits'")
    train_flags: str = option(DIGITS_TRAIN, "of train.py, alike")
    slurm: str | None = option(None, "write a Slurm script to this file too: an array with a task for each run")


@dataclass
class ExecuteOptions:
    """which runs"""

    part: str = option("1/1", "the Ith of N equal parts of the plan, to spread it over machines")
    jobs: int = option(1, "runs at a time; more than one have a thread each", low=1, high=1024)
    data: str | None = option(None, "where the images are, for all runs; the plan says it otherwise", path="")


@dataclass
class ReportOptions:
    """what is reported"""

    partial: bool = option(False, "leave out the seeds of which a run is missing, and say how many")


@dataclass
class KeepOptions:
    """what is kept"""

    to: str = option("kept", "the folder for plan, predictions, metrics and costs of every finished run")
    note: str = option("", "a note that is stored with every run: machine, commit")


def plan(options: PlanOptions) -> dict:
    """A plan: which runs, by which commands, and what is to be compared. Raises InputError for unknown spaces."""
    names = [space.name for space in discover(ROOT)]
    for name in options.spaces or ():
        if name not in names:
            raise InputError(f"--spaces {name}: no such folder; there are {', '.join(names)}")
    spaces = [name for name in names if not options.spaces or name in options.spaces]
    if options.size > options.seeds:
        raise InputError(f"--size {options.size}: committees of one space need as many --seeds at least")
    if options.size % len(spaces):
        raise InputError(f"--size {options.size}: must be a multiple of the {len(spaces)} spaces, so that a mixed "
                         "committee has equally many members of each")
    given = {"search": check_flags("--flags", options.flags, search.GROUPS)}
    if options.stage == "train":
        given["train"] = check_flags("--train_flags", options.train_flags, train.GROUPS)
    save, runs = folder_name(options.save), []
    # the commands run in the folders of the spaces, and not where the plan is written
    folders = [ROOT / name for name in spaces]
    flags, train_flags = (absolute_words(given.get(stage, []), cli.path_flags(groups), *folders)
                          for stage, groups in (("search", search.GROUPS), ("train", train.GROUPS)))
    for seed in range(1, options.seeds + 1):  # seed by seed: a study that is cut short still has every space
        for space in spaces:
            own = ["--save", f"{save}-{seed}", "--seed", str(seed)]
            commands = [[SCRIPTS["search"], *flags, *own]]
            if options.stage == "train":
                commands.append([SCRIPTS["train"], *train_flags, "--search", own[1], *own])
            runs.append({"space": space, "seed": seed, "save": own[1], "commands": commands})
    return {"format": "conas-study", "stage": options.stage, "size": options.size, "spaces": spaces,
            "seeds": list(range(1, options.seeds + 1)), "runs": runs}


def check_flags(flag: str, text: str, groups: Sequence[type]) -> list[str]:
    """The words of `text`, if a script with these groups of flags takes them and a plan may give them; else InputError.

    With --patience, runs would end at different epochs.
    """
    try:
        words = shlex.split(text)
        cli.parse("", groups, [word for word in words if word not in ("-h", "--help")])
    except (ValueError, InputError) as error:
        raise InputError(f"{flag}: {error}") from error
    for word in words:
        if word.split("=")[0] in OWN_FLAGS:
            raise InputError(f"{flag}: {word} is not for a plan, which gives every run a name and a seed and lets all "
                             "of them end at the same epoch; leave it out")
    return words


def read_plan(path: Path) -> dict:
    """The plan in a file. Raises InputError if it is missing or is no plan: one that starts anything but this project's
    scripts in this project's spaces is none."""
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such plan; python -m ensemble.study plan {path} writes one") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no plan of a study ({error}); python -m ensemble.study plan writes one"
                         ) from error
    if not _is_plan(content):
        raise InputError(f"{path}: is no plan of a study; python -m ensemble.study plan writes one")
    return content


def _is_plan(content: object) -> bool:
    there = {space.name for space in discover(ROOT)}
    if not (isinstance(content, dict) and content.get("format") == "conas-study" and content.get("stage") in
            list(SCRIPTS) and all(isinstance(content.get(name), list) for name in ("spaces", "seeds", "runs"))):
        return False
    spaces, seeds, size = content["spaces"], content["seeds"], content.get("size")
    return (all(isinstance(space, str) and space in there for space in spaces) and 0 < len(spaces) == len(set(spaces))
            and all(type(seed) is int and 0 <= seed < 2**31 for seed in seeds) and len(seeds) == len(set(seeds))
            and type(size) is int and 1 < size <= len(seeds) and size % len(spaces) == 0
            and all(_is_run(run, spaces, seeds) for run in content["runs"])
            and len({(run["space"], run["seed"]) for run in content["runs"]}) == len(spaces) * len(seeds) ==
            len(content["runs"]))


def _is_run(run: object, spaces: list[str], seeds: list[int]) -> bool:
    if not (isinstance(run, dict) and run.get("space") in spaces and run.get("seed") in seeds
            and isinstance(run.get("save"), str) and isinstance(run.get("commands"), list)
            and run["commands"]):
        return False
    try:
        folder_name(run["save"])
    except InputError:
        return False
    return all(isinstance(command, list) and all(isinstance(word, str) and "\0" not in word for word in command)
               and command[:1] in [[script] for script in SCRIPTS.values()] for command in run["commands"])


def report(path: Path, options: TestOptions, partial: bool) -> None:
    """Write PLAN-report.json beside the plan, and print it as a table."""
    content = read_plan(path)
    results = gather(path, content, options, partial)
    summary = compare_groups({member: result.scores for member, result in results.items()}, content["size"],
                             mean_costs(results)) | {"stage": content["stage"]}
    target = path.with_name(f"{path.stem}-report.json")
    write_json(target, summary)
    print(f"{as_text(summary)}\n\nwritten to {target}")


def main(argv: list[str] | None = None) -> None:
    """The command `python -m ensemble.study`."""
    words = sys.argv[1:] if argv is None else argv
    actions = {"plan": [PlanOptions], "run": [ExecuteOptions], "report": [TestOptions, ReportOptions],
               "keep": [TestOptions, KeepOptions]}
    if words[:1] == ["--help"]:
        return print(__doc__)
    if len(words) < 2 or words[0] not in actions or (words[1].startswith("-") and words[1] != "--help"):
        raise InputError("write `python -m ensemble.study plan FILE`, `run FILE`, `report FILE` or `keep FILE`; "
                         "--help says more")
    action, file, *flags = words
    options, *more = cli.parse(__doc__, actions[action], [file] if file == "--help" else flags)
    if action == "plan":
        write_plan(Path(file), plan(options))
        if options.slurm is not None:
            write_slurm(Path(options.slurm), Path(file), read_plan(Path(file)))
    elif action == "run":
        content = read_plan(Path(file))
        kept = [run for run in content["runs"] if is_here(Path(file), run) and not finished(last_folder(run))]
        if kept:
            print(f"{len(kept)} of {len(content['runs'])} runs were kept in {Path(file).parent}, and are not run again")
        execute(content | {"runs": [run for run in content["runs"] if run not in kept]}, options.part, options.jobs,
                options.data)
    elif action == "report":
        report(Path(file), options, more[0].partial)
    else:
        keep(Path(file), read_plan(Path(file)), Path(more[0].to), options, more[0].note)


def _with_absolute_paths(content: dict) -> dict:
    """A plan as `plan` writes it; those of earlier versions have relative paths, seen from the folders of spaces."""
    flags = cli.path_flags((*search.GROUPS, *train.GROUPS))
    return content | {"runs": [run | {"commands": [absolute_words(command, flags, ROOT / run["space"])
                                                   for command in run["commands"]]} for run in content["runs"]]}


def write_plan(path: Path, content: dict) -> None:
    """Raise InputError instead of overwriting another plan."""
    if path.exists() and _with_absolute_paths(read_plan(path)) != content:
        raise InputError(f"{path}: is another plan; give this one another name, or delete that")
    write_json(path, content)
    print(f"{len(content['runs'])} runs in {path}: python -m ensemble.study run {path}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
