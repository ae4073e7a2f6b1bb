"""The results of a study's runs: from their folders here, or from what was kept of them beside the plan.

    FOLDER/study.json                       the plan, without the paths of the machine that ran it
    FOLDER/SPACE/STAGE-SAVE/run.json        seconds, cost, arguments, versions, and a note on machine and commit
    FOLDER/SPACE/STAGE-SAVE/metrics.jsonl   the run's own
    FOLDER/SPACE/STAGE-SAVE/scores.npz      what its last epoch says of the test images, logits rounded to float16
"""
import dataclasses
import os
import platform
from pathlib import Path

import torch
from tqdm import tqdm

from conas import cli
from conas.commands import search, train
from conas.commands.scoring import scores_for
from conas.darts.derived import count_parameters, flops
from conas.darts.space import Space, discover
from conas.data.images import DATASETS
from conas.errors import InputError
from conas.files import read_json, write_json, write_text
from conas.runs.checkpoint import load, restore
from conas.runs.folder import FREE, list_checkpoints, portable, read_arguments
from conas.runs.options import TestOptions
from conas.runs.scores import Scores, load_scores, save_scores
from ensemble.combine.committee import check_finite
from ensemble.study_runs import ROOT, command_folder, finished, read_seconds

GROUPS = {"search": search.GROUPS, "train": train.GROUPS}
COSTS = "parameters", "flops", "seconds"


@dataclasses.dataclass
class Result:
    """What a report needs of a run: the scores of its last epoch, its cost, and where both come from."""

    scores: Scores
    cost: dict[str, float | None]  # COSTS: parameters, flops of an image, seconds of the run if known
    folder: Path
    arguments: dict


def kept_folder(plan: Path, run: dict) -> Path:
    """Where the results of a run are kept beside the plan."""
    return plan.parent / run["space"] / last_folder(run).name


def last_folder(run: dict) -> Path:
    """The folder of the last command of a run: its training, if it has one."""
    return command_folder(run, run["commands"][-1])


def is_here(plan: Path, run: dict) -> bool:
    """Return True if the results of a run can be had: it is finished, or was kept."""
    return finished(last_folder(run)) or (kept_folder(plan, run) / "run.json").is_file()


def gather(plan: Path, content: dict, options: TestOptions, partial: bool = False) -> dict[tuple[str, int], Result]:
    """The results of the last epoch of every run by (space, seed).

    The last epoch, and not the best: nothing is chosen, so nothing can be chosen in favour of a committee. For the same
    reason a network is refused if some of its predictions are not finite. `partial` leaves out the seeds of which a run
    is missing, and says how many; at least --size seeds must be left. Raises InputError naming a run that is missing.
    """
    spaces = {space.name: space for space in discover(ROOT)}
    runs, missing = content["runs"], [run for run in content["runs"] if not is_here(plan, run)]
    if missing and partial:
        incomplete = {run["seed"] for run in missing}
        runs = [run for run in runs if run["seed"] not in incomplete]
        print(f"{len(missing)} of {len(content['runs'])} runs are missing: {len(incomplete)} of "
              f"{len(content['seeds'])} seeds are left out ({', '.join(map(str, sorted(incomplete)))})")
    if len({run["seed"] for run in runs}) < content["size"] or (missing and not partial):
        raise InputError(f"{len(missing)} of {len(content['runs'])} runs are not finished, first "
                         f"{last_folder(missing[0])}; start `python -m ensemble.study run` with this plan, copy "
                         f"their folders here, or report --partial once {content['size']} seeds are complete")
    found = {}
    for run in tqdm(runs, desc="test images", leave=False, disable=None):
        result = (of_run(spaces[run["space"]], last_folder(run), options) if finished(last_folder(run)) else
                  read_kept(kept_folder(plan, run)))
        if result.scores.seed != run["seed"]:
            raise InputError(f"{result.folder}: was run with --seed {result.scores.seed} and not {run['seed']}, as the "
                             "plan says; move it away and run the plan again")
        check_finite({"": result.scores}, {"": result.folder}, "a plan with a lower --learning_rate in its --flags "
                     "may help")
        found[run["space"], run["seed"]] = result
    check_alike(list(found.values()), content["stage"])
    return found


def of_run(space: Space, folder: Path, options: TestOptions) -> Result:
    """The result of the finished run in `folder`, tested if it was not yet."""
    checkpoints = list_checkpoints(folder)
    path = checkpoints[max(checkpoints)]
    return Result(scores_for(space, path, options), network_cost(space, path) | {"seconds": read_seconds(folder)},
                  folder, read_arguments(folder))


def check_alike(results: list[Result], stage: str) -> None:
    """Raise InputError naming two runs that differ in more than their seed and names.

    A flag that did not exist when a run was made has its default.
    """
    defaults = {field.name: getattr(options, field.name) for options in cli.parse("", GROUPS[stage], [])
                for field in dataclasses.fields(options)}
    first, *others = ({name: value for name, value in (defaults | result.arguments).items()
                       if name not in FREE | {"seed", "search"}} for result in results)
    for result, other in zip(results[1:], others):
        if differ := sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name)):
            raise InputError(f"{result.folder} and {results[0].folder}: differ in --{', --'.join(differ)}, and a study "
                             "compares runs that differ in space and seed only; move one away and run the plan again")


def network_cost(space: Space, path: Path) -> dict[str, int]:
    """Parameters of the network in a checkpoint, and flops (two for each multiplication and addition) of an image."""
    checkpoint = load(path)
    network = restore(path, checkpoint, space.name, space.network, folder=space.folder).eval()
    dataset_info = checkpoint["dataset"]
    channels = DATASETS[dataset_info["name"]].channels
    side = dataset_info.get("crop") or dataset_info["image_size"]
    return {"parameters": count_parameters(network), "flops": 2 * flops(network, (channels, side, side))}


def mean_costs(results: dict[tuple[str, int], Result]) -> dict[str, dict[str, float | None]]:
    """By space, means over its runs of what is known of all of them; None for the rest."""
    found: dict[str, list[dict]] = {}
    for (space, _), result in results.items():
        found.setdefault(space, []).append(result.cost)
    return {name: {key: None if None in (values := [cost[key] for cost in of_runs]) else sum(values) / len(values)
                   for key in COSTS} for name, of_runs in found.items()}


def keep(plan: Path, content: dict, folder: Path, options: TestOptions, note: str = "") -> None:
    """Write what `gather` needs of every finished run into `folder`, with the plan; what is kept there stays.

    Raises InputError if `folder` has another plan.
    """
    spaces = {space.name: space for space in discover(ROOT)}
    paths = cli.path_flags((*search.GROUPS, *train.GROUPS))
    shared = content | {"runs": [run | {"commands": [without_paths(command, paths) for command in run["commands"]]}
                                   for run in content["runs"]]}
    target, count = folder / plan.name, 0
    if target.exists() and read_json(target) != shared:
        raise InputError(f"{target}: is another plan; keep these runs in another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(target, shared)
    for run in tqdm(content["runs"], desc="runs", leave=False, disable=None):
        own, source = kept_folder(target, run), last_folder(run)
        if not finished(source) or (own / "run.json").is_file():
            continue
        result = of_run(spaces[run["space"]], source, options)
        own.mkdir(parents=True, exist_ok=True)
        save_scores(own / "scores.npz", result.scores, compact=True)
        if (source / "metrics.jsonl").is_file():
            write_text(own / "metrics.jsonl", (source / "metrics.jsonl").read_text(encoding="utf-8"))
        write_json(own / "run.json", {
            "format": "conas-kept-run", "note": note, "torch": torch.__version__, "python": platform.python_version(),
            "cost": result.cost, "arguments": portable(result.arguments)})
        count += 1
    here = sum(is_here(target, run) for run in content["runs"])
    print(f"{count} runs are new in {folder}, which has {here} of {len(content['runs'])} now; "
          f"python -m ensemble.study report {target}")


def without_paths(command: list[str], flags: dict[str, str]) -> list[str]:
    """The words of a command without the flags whose value is an absolute path, and without those values."""
    words: list[str] = []
    for word in command:
        flag, equals, value = word.partition("=")
        if equals and flag in flags and os.path.isabs(value):
            continue
        if words and words[-1] in flags and os.path.isabs(word):
            words.pop()
        else:
            words.append(word)
    return words


def read_kept(folder: Path) -> Result:
    """The result of a run as `keep` wrote it. Raises InputError if its files are damaged."""
    path = folder / "run.json"
    try:
        content = read_json(path)
        cost, arguments = content["cost"], content["arguments"]
        whole = (content["format"] == "conas-kept-run" and isinstance(arguments, dict) and cost.keys() == set(COSTS)
                 and all(value is None or type(value) in (int, float) for value in cost.values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete this folder, and run the plan again") from error
    if not whole:
        raise InputError(f"{path}: is not what a study keeps of a run; delete this folder, and run the plan again")
    return Result(load_scores(folder / "scores.npz"), cost, folder, arguments)
