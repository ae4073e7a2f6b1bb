"""The search's iteration against that of an earlier commit, by turns: how much faster this state is.

    python -m benchmarks.against 662cc92
    python -m benchmarks.against 662cc92 --spaces cnn_space2 --channels 8 --layers 5 --batch_size 64 --rounds 9
    python -m benchmarks.against 662cc92 --evaluation --batch_size 256       # a batch of test_all.py

Each side runs in a process of its own, on its own code: the commit is unpacked into a temporary folder. An iteration is
an architect step and a weight step of second-order search on random images of 32x32 pixels in float32. With one thread
(the default) the figures are processor seconds, which other work on the machine disturbs less than wall-clock seconds;
both are written. Each round gives one ratio; printed are the median and the quartiles. Peak memory is resident memory
above what imports take. Writes benchmarks/results/against-COMMIT.json, which keeps the last result of every setting.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve()


def play(settings: dict) -> None:
    """One side: takes an iteration, or evaluates a batch, for every line that comes in, and answers what it took."""
    sys.path.insert(0, os.getcwd())
    import torch

    from benchmarks.contestant import Contestant
    from conas.memory import keep_freed_memory

    torch.set_num_threads(settings.pop("threads"))
    keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if settings.pop("evaluation"):
        contestant = Contestant("ours", **settings | {"batch_size": 2, "eval_batch": settings["batch_size"]})
        work = contestant.works["evaluation"]
    else:
        contestant = Contestant("ours", **settings, eval_batch=2)
        work = contestant.iteration
    for _ in range(2):
        work()
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        work()
        took = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        print(json.dumps(took | {"peak_bytes": peak}), flush=True)


class Side:
    """The process of one side, whose code lies in `root`."""

    def __init__(self, root: Path, settings: dict):
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "PYTHONPATH": str(root)}
        self._process = subprocess.Popen([sys.executable, str(HERE), "--play", json.dumps(settings)], cwd=root,
                                         env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def work(self) -> dict:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side's process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def compare(earlier: Path, settings: dict, rounds: int) -> dict:
    """Seconds of both sides, by turns, and the ratios."""
    from benchmarks.machine import spread

    sides = {"earlier": Side(earlier, settings), "now": Side(HERE.parent.parent, settings)}
    taken = {name: [] for name in sides}
    try:
        for turn in range(rounds):
            for name in list(sides)[::1 if turn % 2 else -1]:
                taken[name].append(sides[name].work())
    finally:
        for side in sides.values():
            side.close()
    result = {"peak_bytes": {name: of[-1]["peak_bytes"] for name, of in taken.items()}}
    for clock in "processor", "wall":
        result[clock] = {name: spread([one[clock] for one in of]) for name, of in taken.items()}
        result[f"{clock}_ratio"] = spread([a[clock] / b[clock] for a, b in zip(taken["earlier"], taken["now"])])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--spaces", nargs="+", default=["cnn_space1", "cnn_space2", "cnn_space3"])
    for name, default in (("channels", 16), ("layers", 8), ("batch_size", 16), ("threads", 1), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--evaluation", action="store_true", help="time a batch of test_all.py, not an iteration")
    options = parser.parse_args()
    import torch

    from benchmarks.machine import RESULTS, machine, stored, write

    root = HERE.parent.parent
    path = RESULTS / f"against-{options.commit}.json"
    results = stored(path)
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", options.commit], cwd=root, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        for space in options.spaces:
            settings = {"space": space, "channels": options.channels, "layers": options.layers,
                        "batch_size": options.batch_size, "threads": options.threads, "evaluation": options.evaluation}
            title = (f"{space}, {options.channels} channels, {options.layers} cells, batch {options.batch_size}, "
                     f"{options.threads} thread{'s' * (options.threads > 1)}{', evaluation' * options.evaluation}")
            busy = os.getloadavg()[0]
            found = compare(Path(folder), settings, options.rounds)
            results[title] = machine(torch.device("cpu")) | settings | {"rounds": options.rounds, "load": busy} | found
            write(path.stem, results)
            ratio, peak = found["processor_ratio"], found["peak_bytes"]
            print(f"{title}: {ratio['median']:.2f} times the speed of {options.commit} in processor time (quartiles "
                  f"{ratio['quartiles'][0]:.2f} to {ratio['quartiles'][1]:.2f}), wall clock "
                  f"{found['wall_ratio']['median']:.2f}; {found['processor']['now']['median']:.2f} s a batch, "
                  f"peak {peak['now'] / 1e9:.2f} against {peak['earlier'] / 1e9:.2f} GB; load {busy:.1f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--play"]:
        play(json.loads(sys.argv[2]))
    else:
        main()
