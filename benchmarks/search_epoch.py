"""One whole epoch of the search on as many random images as CIFAR-10 has: which share of its time is not the model's?

    python -m benchmarks.search_epoch --init_channels 4 --layers 3      # a small network: the share is an upper bound
    python -m benchmarks.search_epoch --steps 10                        # DARTS' size, the epoch cut short
    python -m benchmarks.search_epoch --device cuda                     # DARTS' size, the whole epoch

The search is that of train_search.py, with its batches, augmentation, validation, log, checkpoints and pictures. The
model's time is that of the alpha steps, the weight steps and the validation's forward passes; the rest is data and
bookkeeping. It is told for the steps, and for what comes once an epoch or once a search. On a GPU, every look at the
clock waits for it, which the search does not: there the share is an upper bound too.

With --steps, batches are drawn from all images, but only so many enter an epoch. Writes
benchmarks/results/search_epoch-DEVICE.json, an entry for each size.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import RESULTS, machine, write
from cnn_space1.architect import Architect
from cnn_space1.model_search import Network
from conas.cli import find_device
from conas.commands import search as searching
from conas.data.batches import Stream
from conas.data.listing import Listing
from conas.data.sources import READERS
from conas.engine.cuda_graph import Replayed
from conas.engine.native.evaluation import EvaluatedSupernet
from conas.engine.packed import PackedPass

IMAGES = {"train": 50_000, "test": 10_000}


class Clock:
    """Adds up the time inside of functions, and of intervals between `lap`s."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, name: str, function):
        def run(*arguments, **settings):
            began = self.now()
            result = function(*arguments, **settings)
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - began
            return result

        return run


def random_images(root: Path, split: str, listing: Listing) -> tuple:
    numbers = torch.Generator().manual_seed(0)
    N = IMAGES[split]
    pixels = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=numbers)
    return tuple("abcdefghij"), pixels, torch.randint(0, 10, (N,), generator=numbers)


def measure(flags: list[str], steps: int | None, device: torch.device) -> dict:
    """Seconds of the parts of one epoch."""
    clock = Clock(device)

    passing = PackedPass.run

    def timed_pass(packed: PackedPass, *arguments):
        of = passing if packed.network.training else clock.timed("validation", passing)
        return of(packed, *arguments)

    PackedPass.run = timed_pass
    EvaluatedSupernet.forward = clock.timed("validation", EvaluatedSupernet.forward)

    class TimedArchitect(Architect):
        def step(self, *arguments):
            step = super().step
            return step(*arguments) if device.type == "cuda" else clock.timed("alpha steps", step)(*arguments)

    class CutStream(Stream):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.steps = min(self.steps, steps or self.steps)

    READERS["cifar10"] = random_images
    searching.training_images = clock.timed("loading", searching.training_images)
    searching.Stream = CutStream
    if device.type == "cuda":  # nothing inside of a graph can be timed
        class TimedGraph(Replayed):
            def __call__(self, *arguments):
                return clock.timed("iterations", super().__call__)(*arguments)

        searching.Replayed = TimedGraph
    else:
        searching.weight_step = clock.timed("weight steps", searching.weight_step)
    searching.validate = clock.timed("whole validation", searching.validate)
    searching.SearchRun.finish = clock.timed("pictures", searching.SearchRun.finish)
    searching.write_epoch = clock.timed("checkpoint", searching.write_epoch)
    flags = [*flags, "--epochs", "1", "--device", str(device)]
    with tempfile.TemporaryDirectory() as folder:
        clock.timed("all", searching.main)(Path(folder) / "cnn_space1", Network, TimedArchitect, "", flags)
    return clock.seconds


def shares(seconds: dict, steps: int) -> dict:
    """In percent: of the steps alone, and of the whole epoch with its validation and checkpoint."""
    model_steps = sum(seconds.get(name, 0.0) for name in ("alpha steps", "weight steps", "iterations"))
    once = seconds["whole validation"] + seconds["checkpoint"]
    all_steps = seconds["all"] - seconds["loading"] - seconds["pictures"] - once
    return {"steps": steps, "seconds_per_step": all_steps / steps, "seconds": seconds,
            "outside_the_model_in_steps": 100 * (1 - model_steps / all_steps),
            "outside_the_model_in_epoch": 100 * (1 - (model_steps + seconds["validation"]) / (all_steps + once))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("init_channels", 16), ("layers", 8), ("batch_size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, help="of the epoch (default: all)")
    parser.add_argument("--images", type=int, default=IMAGES["train"], help="in the training split")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = find_device(options.device)
    IMAGES["train"] = options.images
    flags = [text for name in ("init_channels", "layers", "batch_size")
             for text in (f"--{name}", str(getattr(options, name)))]
    steps = -(-(options.images // 2) // options.batch_size)
    taken = min(steps, options.steps or steps)
    result = {"options": vars(options)} | shares(measure(flags, options.steps, device), taken) | machine(device)
    name, size = f"search_epoch-{device.type}", f"C={options.init_channels} layers={options.layers} steps={taken}"
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    print(f"{size} of {steps}: {result['seconds_per_step']:.3f} s a step; outside the model "
          f"{result['outside_the_model_in_steps']:.2f} % of the steps, {result['outside_the_model_in_epoch']:.2f} % of "
          "the epoch with validation and checkpoint")
    write(name, earlier | {size: result})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
