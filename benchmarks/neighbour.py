"""What a busy process on one core costs a search that has a thread on every core: wall-clock time over its quiet time.

    python -m benchmarks.neighbour
    OMP_WAIT_POLICY=passive python -m benchmarks.neighbour      # threads that wait for each other sleep at once
    python -m benchmarks.neighbour --spaces cnn_space2 --channels 8 --layers 5 --batch_size 64 --threads 4

An iteration of second-order search, as train_search.py takes it, on random images of 32x32 pixels, and by turns the
same beside a process that keeps the first core busy. Each round gives one ratio; printed are median and quartiles. With
--threads 2 on two cores, 2 is what a fair system takes: the thread on the first core has half of it. The machine should
be idle otherwise; its load is written. Linux only. Writes benchmarks/results/neighbour.json, which keeps the last
result of every setting.
"""
import argparse
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import torch

from benchmarks.machine import RESULTS, machine, several, spread, stored, write
from benchmarks.turns import Player

BUSY = """import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print("busy", flush=True)
while True:
    pass"""


@contextmanager
def busy_core():
    """A process that keeps the first core busy."""
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def iteration(player: Player) -> float:
    """Seconds by the wall clock."""
    return sum(player.ask("clocks", work)["wall"] for work in ("architect", "weights"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=["cnn_space1"])
    for name, default in (("channels", 16), ("layers", 8), ("batch_size", 16), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=several, default=9)
    options = parser.parse_args()
    path = RESULTS / "neighbour.json"
    results = stored(path)
    for space in options.spaces:
        about = machine(torch.device("cpu"))  # its load is that of the last minute, before this begins
        about["machine"]["threads"] = options.threads
        sizes = {"space": space, "channels": options.channels, "layers": options.layers,
                 "batch_size": options.batch_size, "eval_batch": 2}
        quiet, busy = [], []
        with Player("ours", sizes, torch.device("cpu"), options.threads, True) as player:
            iteration(player)
            for _ in range(options.rounds):
                quiet.append(iteration(player))
                with busy_core():
                    time.sleep(0.1)
                    busy.append(iteration(player))
        ratio = spread([b / q for b, q in zip(busy, quiet)])
        title = (f"{space}, {options.channels} channels, {options.layers} cells, batch {options.batch_size}, "
                 f"{options.threads} threads of {os.cpu_count()} cores")
        if policy := os.environ.get("OMP_WAIT_POLICY"):
            title += f", OMP_WAIT_POLICY={policy}"
        results[title] = about | {"rounds": options.rounds, "quiet": spread(quiet), "busy": spread(busy),
                                  "ratio": ratio}
        write(path.stem, results)
        print(f"{title}, n = {options.rounds}: {ratio['median']:.2f} times the quiet time (quartiles "
              f"{ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f}), {spread(quiet)['median']:.2f} s; load "
              f"{about['machine']['load']}", flush=True)


if __name__ == "__main__":
    main()
