"""Short searches on digits: first order, second order by the central difference, and second order by exact products.

    OMP_NUM_THREADS=1 python -m benchmarks.orders                # 9 searches

Each order searches the same space from the same seeds. What is compared is the supernet after the last epoch: accuracy
on the images of the alphas, and on the test images, which no choice has seen. Results are written after every search to
benchmarks/results/orders.json, and a run that was stopped goes on from there.
"""
import argparse
import json
import tempfile
import time
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev

import torch

from benchmarks.machine import RESULTS, machine, write
from conas.commands import search
from conas.commands.scoring import scores_for
from conas.darts.space import Space
from conas.runs.options import ROOT, TestOptions

ORDERS = {"first": ["--no-unrolled"], "difference": [], "exact": ["--hvp", "exact"]}
FLAGS = "--dataset digits --init_channels 4 --layers 3 --batch_size 64 --device cpu --arch_learning_rate 0.003"


def one_search(space: str, epochs: int, order: str, seed: int) -> dict:
    """Accuracies in percent after the last epoch, and the seconds of the processor."""
    module, architect = import_module(f"{space}.model_search"), import_module(f"{space}.architect")
    flags = [*FLAGS.split(), "--epochs", str(epochs), "--seed", str(seed), *ORDERS[order]]
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        space = Space(space, Path(folder) / space, module.Network)
        search.main(space.folder, module.Network, architect.Architect, "", flags)
        run = space.search_folder("EXP")
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        scores = scores_for(space, run / "checkpoints" / f"epoch_{epochs - 1:03d}.pt", TestOptions(device="cpu"))
    return {"order": order, "seed": seed, "valid_top1": last["valid_top1"], "test_top1": scores.top(1),
            "test_loss": scores.loss(), "seconds": time.process_time() - began}


def table(rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds of each order."""
    lines = ["| order | validation top-1 % | test top-1 % | test loss | seconds |", "| --- | --- | --- | --- | --- |"]
    for order in ORDERS:
        own = [row for row in rows if row["order"] == order]
        if len(own) < 2:
            continue
        cells = [f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" for name, digits in
                 (("valid_top1", 2), ("test_top1", 2), ("test_loss", 3), ("seconds", 0))
                 if (values := [row[name] for row in own])]
        lines.append(f"| {order}, n = {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="cnn_space2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    about = {"space": options.space, "epochs": options.epochs, "flags": FLAGS}
    path, rows = RESULTS / "orders.json", []
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        rows = before["rows"] if before["about"] == about else []
    for seed in range(1, options.seeds + 1):
        for order in ORDERS:
            if not any((row["order"], row["seed"]) == (order, seed) for row in rows):
                rows.append(one_search(options.space, options.epochs, order, seed))
                write("orders", {"about": about, "rows": rows} | machine(torch.device("cpu")))
    print(table(rows))
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
