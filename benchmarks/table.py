"""Tables of docs/ as Markdown, out of benchmarks/results/*.json.

    python -m benchmarks.table                        # what python -m benchmarks.search_step measured by the wall clock
    python -m benchmarks.table --of baselines         # the same by processor time, over both baselines
    python -m benchmarks.table --of study             # what python -m ensemble.study report found, on digits
    python -m benchmarks.table --of study-cifar10     # and on CIFAR-10
    python -m benchmarks.table --of against           # what python -m benchmarks.against 662cc92 measured
    python -m benchmarks.table --of collapse          # the searches of space S2 in docs/health.md

A test holds that the tables of docs/ are what this prints.
"""
import argparse
import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean

from conas.health.series import Series

RESULTS = Path(__file__).resolve().parent / "results"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def search_step() -> str:
    """Speed, memory and operator calls of the search step, a row for each setting: medians (quartiles)."""
    settings = json.loads((RESULTS / "search_step-cpu.json").read_text(encoding="utf-8"))["settings"]
    settings = {title: of for title, of in settings.items() if of.get("clock", "wall") == "wall"}
    rows = []
    for of in sorted(settings.values(), key=lambda of: (of["batch_size"], of["space"])):
        ratios = {name: f"{value['median']:.2f} ({value['quartiles'][0]:.2f} to {value['quartiles'][1]:.2f})"
                  for name, value in of["textbook_over_ours"].items()}
        seconds = [f"{of['seconds'][who]['iteration']['median']:.1f}" for who in ("textbook", "ours")]
        memory, calls = of["peak_bytes"], {who: works["architect"] for who, works in of["operator_calls"].items()}
        rows.append([of["space"].removeprefix("cnn_space"), str(of["batch_size"]), str(of["rounds"]),
                     *(ratios[name] for name in ("iteration", "architect", "weights", "evaluation")),
                     " / ".join(seconds),
                     f"{memory['ours'] / 1e9:.2f} ({memory['ours'] / memory['textbook']:.2f})",
                     f"{calls['ours']:,} ({calls['ours'] / calls['textbook']:.2f})"])
    machines = {f"{of['machine']['cores']} cores of an {of['machine']['device']}, {of['machine']['threads']} threads; "
                f"Python {of['versions']['python']}, torch {of['versions']['torch']}; {of['channels']} channels, "
                f"{of['layers']} cells, evaluation of {of['eval_batch']} images" for of in settings.values()}
    head = ["space", "batch", "n", "iteration", "alpha step", "weight step", "evaluation",
            "seconds, textbook / ours", "peak GB (share)", "operator calls of an alpha step (share)"]
    return "\n".join([*sorted(machines), "", markdown(head, rows)])


def baselines() -> str:
    """How many times as fast as either baseline, by processor time, a row for each setting: medians (quartiles)."""
    settings = json.loads((RESULTS / "search_step-cpu.json").read_text(encoding="utf-8"))["settings"]
    rows = []
    for of in settings.values():
        if "channels_last_over_ours" in of and of["clock"] == "processor":
            ratios = [f"{value['median']:.2f} ({value['quartiles'][0]:.2f} to {value['quartiles'][1]:.2f})"
                      for work in ("iteration", "evaluation")
                      for value in (of[f"{name}_over_ours"][work] for name in ("channels_last", "textbook"))]
            peak, share = of["peak_bytes"], of.get("share_of_matmul_peak", {}).get("ours")
            rows.append([of["space"].removeprefix("cnn_space"), str(of["channels"]), str(of["layers"]),
                         str(of["batch_size"]), of["machine"]["vectors"], str(of["rounds"]), *ratios,
                         f"{of['seconds']['ours']['iteration']['median']:.2f}",
                         f"{peak['ours'] / 1e9:.2f} ({peak['ours'] / peak['textbook']:.2f})",
                         "" if share is None else f"{share:.0%}"])
    head = ["space", "channels", "cells", "batch", "vectors", "n", "iteration over channels_last",
            "over the textbook as it is", "evaluation over channels_last", "over the textbook as it is",
            "seconds an iteration", "peak GB (share of the textbook's)", "share of the matmul peak"]
    return markdown(head, sorted(rows, key=lambda row: (int(row[1]), int(row[3]), row[0])))


def study(data: str) -> str:
    """Committees of three spaces against committees of three seeds of one: means and 95 % intervals over seeds."""
    results = json.loads((RESULTS / f"study-{data}.json").read_text(encoding="utf-8"))
    kinds = {"top1": 2, "loss": 3, "ece": 3, "disagreement": 2, "member_top1": 2}  # and decimals

    def shown(figures: dict, sign: str = "") -> list[str]:
        return [f"{round(figures[kind]['mean'], digits) + 0.0:{sign}.{digits}f} ± "
                f"{(figures[kind]['high'] - figures[kind]['low']) / 2:.{digits}f}" for kind, digits in kinds.items()]

    rows = [[name, *shown(group["figures"]), f"{group['compute']['parameters'] / 1e6:.2f} M",
             f"{group['compute']['seconds'] / 3600:.3f}"] for name, group in results["groups"].items()]
    against = "mean of the spaces alone"
    rows.append([f"mixed spaces minus the {against}", *shown(results["differences"][against], "+"), "", ""])
    head = ["committees of 3", "top-1 %", "loss", "ECE", "pairs disagree %", "members' top-1 %", "parameters",
            "hours"]
    of = f"{results['dataset']}, {results['images']} test images, {len(results['seeds'])} searches of each space"
    return "\n".join([of, "", markdown(head, rows)])


def against() -> str:
    """An iteration, or a batch of test_all.py, by kernels in C and by packed edges: medians (quartiles)."""
    settings = json.loads((RESULTS / "against-662cc92.json").read_text(encoding="utf-8"))
    rows = []
    for of in settings.values():
        ratios = [f"{of[name]['median']:.2f} ({of[name]['quartiles'][0]:.2f} to {of[name]['quartiles'][1]:.2f})"
                  for name in ("processor_ratio", "wall_ratio")]
        peak = " / ".join(f"{of['peak_bytes'][who] / 1e9:.2f}" for who in ("earlier", "now"))
        rows.append(["evaluation" if of.get("evaluation") else "iteration", of["space"].removeprefix("cnn_space"),
                     str(of["channels"]), str(of["layers"]), str(of["batch_size"]), str(of["rounds"]), *ratios,
                     f"{of['processor']['earlier']['median']:.2f} / {of['processor']['now']['median']:.2f}", peak,
                     f"{of['load']:.1f}"])
    rows.sort(key=lambda row: (row[0] != "iteration", -int(row[2]), int(row[4]), row[1]))
    head = ["what", "space", "channels", "cells", "batch", "n", "speed, processor time", "speed, wall clock",
            "processor seconds, earlier / now", "peak GB, earlier / now", "load of the machine"]
    return markdown(head, rows)


def collapse() -> str:
    """Searches of space S2 and the networks that were trained from their cells: a row for each."""
    folder = RESULTS / "collapse"
    tests = json.loads((folder / "committee-s2-train" / "committee.json").read_text(encoding="utf-8"))
    errors = {member["name"].split()[0].rpartition("train-")[2]: 100 - member["top1"]
              for member in tests["epochs"][-1]["members"]}
    rows = []
    for search in folder.glob("cnn_space4/search-*"):
        flags = json.loads((search / "args.json").read_text(encoding="utf-8"))
        epochs = [json.loads(line) for line in (search / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curvature = [fmean(epoch["curvature"] for epoch in part) for part in (epochs[:4], epochs[-4:])]
        rows.append([f"{flags['arch_learning_rate']:g}", f"{flags['weight_decay']:g}", str(flags["seed"]),
                     str(epochs[-1]["skips"]), str(max(epoch["skips"] for epoch in epochs)),
                     f"{curvature[0]:.2f}", f"{curvature[1]:.2f}", f"{curvature[1] / curvature[0]:.1f}",
                     f"{epochs[-1]['entropy_normal']:.3f}", f"{epochs[-1]['valid_top1']:.1f}",
                     f"{errors[search.name.removeprefix('search-')]:.2f}",
                     Series([epoch["skips"] for epoch in epochs],
                            {epoch["epoch"]: epoch["curvature"] for epoch in epochs}, len(epochs)).verdict()])
    head = ["rate of the alphas", "weight decay", "seed", "skips at the end", "most skips", "curvature, epochs 0 to 3",
            "curvature, last four", "growth", "entropy", "supernet's top-1 %", "retrained network's error %", "rule"]
    return markdown(head, sorted(rows))


TABLES = {"search_step": search_step, "baselines": baselines, "study": partial(study, "digits"),
          "study-cifar10": partial(study, "cifar10"), "against": against, "collapse": collapse}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=TABLES, default="search_step")
    print(TABLES[parser.parse_args().of]())


if __name__ == "__main__":
    main()
