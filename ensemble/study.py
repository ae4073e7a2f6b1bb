"""The control: is a committee of three restricted spaces better than one of three seeds of the same space?

    python -m ensemble.study plan study.json                  # 5 seeds of every space, on the digits of the project
    python -m ensemble.study plan study.json --stage train --flags "--dataset cifar10 --epochs 25"
    python -m ensemble.study run study.json                   # what is missing, run after run; start it again to go on
    python -m ensemble.study run study.json --part 2/3        # the second of three machines
    python -m ensemble.study report study.json                # study-report.json, and a table

The plan lists every run with its commands, which are those of the README: run them wherever you like, and copy the
folders cnn_spaceN/search-STUDY-SEED (and train-...) together before the report.
"""
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from conas import cli
from conas.cli import option
from conas.commands import search, train
from conas.commands.scoring import scores_for
from conas.darts.space import Space, discover
from conas.data.images import DATASETS
from conas.errors import InputError
from conas.files import read_json, write_json
from conas.runs.checkpoint import load, restore
from conas.runs.folder import FREE, folder_name, list_checkpoints, read_arguments
from conas.runs.options import TestOptions
from conas.runs.scores import Scores
from ensemble.study_statistics import as_text, compare_groups

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"search": "train_search.py", "train": "train.py"}
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


@dataclass
class ExecuteOptions:
    """which runs"""

    part: str = option("1/1", "the Ith of N equal parts of the plan, to spread it over machines")


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
    flags = {"search": check_flags("--flags", options.flags, search.GROUPS)}
    if options.stage == "train":
        flags["train"] = check_flags("--train_flags", options.train_flags, train.GROUPS)
    save, runs = folder_name(options.save), []
    for seed in range(1, options.seeds + 1):  # seed by seed: a study that is cut short still has every space
        for space in spaces:
            own = ["--save", f"{save}-{seed}", "--seed", str(seed)]
            commands = [[SCRIPTS["search"], *flags["search"], *own]]
            if options.stage == "train":
                commands.append([SCRIPTS["train"], *flags["train"], "--search", own[1], *own])
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
    """Raises InputError if the file is missing or is no plan: one that starts anything but this project's scripts in
    this project's spaces is none."""
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
            and isinstance(run.get("save"), str) and isinstance(run.get("commands"), list)):
        return False
    try:
        folder_name(run["save"])
    except InputError:
        return False
    return all(isinstance(command, list) and all(isinstance(word, str) and "\0" not in word for word in command)
               and command[:1] in [[script] for script in SCRIPTS.values()] for command in run["commands"])


def execute(content: dict, part: str) -> None:
    """Run what is missing. Raises InputError naming the command that failed, after all others had their turn."""
    try:
        i, n = map(int, part.split("/"))
        assert 1 <= i <= n
    except (ValueError, AssertionError) as error:
        raise InputError(f"--part {part}: write it as 2/3, the second of three parts") from error
    runs, failed = content["runs"][i - 1::n], []
    for number, run in enumerate(runs, 1):
        for command in run["commands"]:
            stage = next(stage for stage, script in SCRIPTS.items() if script == command[0])
            folder = ROOT / run["space"] / f"{stage}-{run['save']}"
            if finished(folder):
                continue
            print(f"[{number} of {len(runs)}] cd {run['space']} && python {shlex.join(command)}", flush=True)
            if start(command, folder):
                failed.append(f"cd {run['space']} && python {shlex.join(command)}")
                break
    if failed:
        raise InputError(f"{len(failed)} of {len(runs)} runs failed, first: {failed[0]}; the others are done, and the "
                         "same command tries these again")
    print(f"{len(runs)} runs are done")


def start(command: list[str], folder: Path) -> int:
    """The exit code of a run's command; the time it took is added to seconds.json in its folder."""
    began = time.monotonic()
    try:
        return subprocess.run([sys.executable, *command], cwd=folder.parent, stdout=subprocess.DEVNULL).returncode
    finally:
        if folder.is_dir():
            write_json(folder / "seconds.json", {"seconds": (read_seconds(folder) or 0) + time.monotonic() - began})


def finished(folder: Path) -> bool:
    """Whether a run's last epoch has its checkpoint."""
    try:
        return max(list_checkpoints(folder)) + 1 == read_arguments(folder).get("epochs")
    except InputError:
        return False


def gather(content: dict, options: TestOptions) -> dict[tuple[str, int], Scores]:
    """The test scores of the last epoch of every run by (space, seed). Raises InputError naming a run that is missing.

    The last epoch, and not the best: nothing is chosen, so nothing can be chosen in favour of a committee.
    """
    spaces, scores = {space.name: space for space in discover(ROOT)}, {}
    missing = [run for run in content["runs"] if not finished(_folder(content, run))]
    if missing:
        raise InputError(f"{len(missing)} of {len(content['runs'])} runs are not finished, first "
                         f"{_folder(content, missing[0])}; start `python -m ensemble.study run` with this plan, or "
                         "copy their folders here")
    check_alike([_folder(content, run) for run in content["runs"]])
    for run in tqdm(content["runs"], desc="test images", leave=False, disable=None):
        checkpoints = list_checkpoints(_folder(content, run))
        found = scores_for(spaces[run["space"]], checkpoints[max(checkpoints)], options)
        if found.seed != run["seed"]:
            raise InputError(f"{_folder(content, run)}: was run with --seed {found.seed} and not {run['seed']}, as the "
                             "plan says; move it away and run the plan again")
        scores[run["space"], run["seed"]] = found
    return scores


def check_alike(folders: list[Path]) -> None:
    """Raise InputError naming two runs that differ in more than their seed and names."""
    first, *others = ({name: value for name, value in read_arguments(folder).items()
                       if name not in FREE | {"seed", "search"}} for folder in folders)
    for folder, other in zip(folders[1:], others):
        if differ := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            raise InputError(f"{folder} and {folders[0]}: differ in --{', --'.join(differ)}, and a study compares runs "
                             "that differ in space and seed only; move one away and run the plan again")


def _folder(content: dict, run: dict) -> Path:
    return ROOT / run["space"] / f"{content['stage']}-{run['save']}"


def costs(content: dict) -> dict[str, dict]:
    """By space, means over its runs: parameters, flops of one image, and seconds of the runs where all are known."""
    spaces, found = {space.name: space for space in discover(ROOT)}, {name: [] for name in content["spaces"]}
    for run in content["runs"]:
        folder = _folder(content, run)
        checkpoints = list_checkpoints(folder)
        cost = network_cost(spaces[run["space"]], checkpoints[max(checkpoints)])
        found[run["space"]].append(cost | {"seconds": read_seconds(folder)})
    return {name: {key: None if None in values else sum(values) / len(values)
                   for key, values in ((key, [cost[key] for cost in by_run]) for key in by_run[0])}
            for name, by_run in found.items()}


def network_cost(space: Space, path: Path) -> dict[str, int]:
    """Parameters of the network in a checkpoint, and flops (two for each multiplication and addition) of an image."""
    checkpoint = load(path)
    network = restore(path, checkpoint, space.name, space.network).eval()
    about = checkpoint["dataset"]
    channels = DATASETS[about["name"]].channels
    side = about.get("crop") or about["image_size"]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, side, side))
    return {"parameters": sum(p.numel() for p in network.parameters()), "flops": counter.get_total_flops()}


def read_seconds(folder: Path) -> float | None:
    """What `execute` has measured of a run, all its starts together; None for runs that were started otherwise.

    Raises InputError if the file is damaged.
    """
    path = folder / "seconds.json"
    try:
        seconds = read_json(path)["seconds"]
        if type(seconds) in (int, float) and 0 <= seconds < 1e12:
            return seconds
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{path}: damaged; delete it, and the run counts as one of unknown duration")


def report(path: Path, options: TestOptions) -> None:
    """Write PLAN-report.json beside the plan, and print it as a table."""
    content = read_plan(path)
    summary = compare_groups(gather(content, options), content["size"], costs(content)) | {"stage": content["stage"]}
    target = path.with_name(f"{path.stem}-report.json")
    write_json(target, summary)
    print(f"{as_text(summary)}\n\nwritten to {target}")


def main(argv: list[str] | None = None) -> None:
    """The command `python -m ensemble.study`."""
    words = sys.argv[1:] if argv is None else argv
    actions = {"plan": PlanOptions, "run": ExecuteOptions, "report": TestOptions}
    if words[:1] == ["--help"]:
        return print(__doc__)
    if len(words) < 2 or words[0] not in actions or (words[1].startswith("-") and words[1] != "--help"):
        raise InputError("write `python -m ensemble.study plan FILE`, `run FILE` or `report FILE`; --help says more")
    action, file, *flags = words
    (options,) = cli.parse(__doc__, [actions[action]], [file] if file == "--help" else flags)
    if action == "plan":
        write_plan(Path(file), plan(options))
    elif action == "run":
        execute(read_plan(Path(file)), options.part)
    else:
        report(Path(file), options)


def write_plan(path: Path, content: dict) -> None:
    """Raises InputError instead of overwriting another plan."""
    if path.exists() and read_plan(path) != content:
        raise InputError(f"{path}: is another plan; give this one another name, or delete that")
    write_json(path, content)
    print(f"{len(content['runs'])} runs in {path}: python -m ensemble.study run {path}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
