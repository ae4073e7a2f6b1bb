"""A contestant of benchmarks/search_step.py in a process of its own, which waits for its turns.

So each has its memory as its users have it: the textbook's is given back to the system as malloc sees fit, ours is
kept, as all scripts of this project keep it (conas/memory.py), which cannot be undone within a process. And the peak
of one is not the other's.
"""
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import torch

from benchmarks.contestant import Contestant, iterate
from benchmarks.counts import ROOT, flops, operator_calls, peak_memory
from conas.engine.precision import set_tf32
from conas.memory import keep_freed_memory


class Player:
    """`name`, that of a Contestant, of these sizes (those of Contestant), on this device.

    `works` are the names of what can be asked for. `peak_bytes` is how much some iterations took of memory above what
    all imports take: of the device, or resident on the CPU. Among these iterations is the recording of a graph.
    """

    def __init__(self, name: str, sizes: dict, device: torch.device, threads: int, kept: bool):
        settings = {"name": name, "sizes": sizes, "device": str(device), "threads": threads, "kept": kept}
        self.name = name
        self._process = subprocess.Popen([sys.executable, "-m", "benchmarks.turns", json.dumps(settings)], cwd=ROOT,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.works, self.peak_bytes = self._answer()

    def ask(self, measure: str, work: str):
        """Seconds, operator_calls or flops of a piece of work, which is done once; of clocks, seconds by each."""
        with suppress(BrokenPipeError):  # of a process that has ended since: there is no answer, which says so
            print(measure, work, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: its process ended with exit code {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Player":
        return self

    def __exit__(self, *_) -> None:
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that gives the seconds a work takes on the device."""
    def on_cpu(work):
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def on_cuda(work):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize(device)
        return began.elapsed_time(ended) / 1e3

    return on_cuda if device.type == "cuda" else on_cpu


def clocks(device: torch.device) -> Callable[[Callable[[], object]], dict[str, float]]:
    """A function that gives the seconds a work takes by the wall clock and, on a CPU, of processor time."""
    wall = stopwatch(device)

    def both(work):
        began = time.process_time()
        found = {"wall": wall(work)}
        return found if device.type == "cuda" else found | {"processor": time.process_time() - began}

    return both


def main() -> None:
    settings = json.loads(sys.argv[1])
    device = torch.device(settings["device"])
    torch.set_num_threads(settings["threads"])
    set_tf32(False)  # as train_search.py has it
    if settings["kept"]:
        keep_freed_memory()
    before = peak_memory(device)
    contestant = Contestant(settings["name"], **settings["sizes"], device=device)
    iterate(contestant)
    peak, works = peak_memory(device) - before, contestant.works
    if contestant.graph:
        works["graph"] = contestant.graph
        works["evaluation"]()  # the second of which records a graph
        works["evaluation"]()
    measures = {"seconds": stopwatch(device), "clocks": clocks(device), "operator_calls": operator_calls,
                "flops": flops}
    print(json.dumps([list(works), peak]), flush=True)
    for line in sys.stdin:
        measure, work = line.split()
        print(json.dumps(measures[measure](works[work])), flush=True)


if __name__ == "__main__":
    main()
