"""Seconds to decode a folder of images: by Pillow on one thread, by threads in two ways, and by conas.data.decoding.

    python -m benchmarks.decode FOLDER --rounds 7

All take turns, in an order that rotates by rounds, on the same files, whose pixels must be equal. `chunks` are decoded
by Pillow on all cores; `ours` is what decode_all does with these files at first, and `ours, imported` what it does once
torchvision is imported, which takes the time that the last line says (a process of its own).
"""
import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.machine import machine, several, spread, write
from conas.data import decoding
from conas.data.decoding import decode_all
from conas.data.imagefiles import ImageFiles
from conas.data.listing import readable_suffixes

IMPORT = """import time, torch, conas.data.images
wall, cpu = time.perf_counter(), time.process_time()
import torchvision.io
print(time.perf_counter() - wall, time.process_time() - cpu)"""


def one_thread(files: ImageFiles, side: int) -> Iterator[Tensor]:
    return (files.decode(i, side) for i in range(len(files)))


def task_for_each(files: ImageFiles, side: int) -> Iterator[Tensor]:
    with ThreadPoolExecutor() as pool:
        yield from pool.map(partial(files.decode, image_size=side), range(len(files)))


def ours(files: ImageFiles, side: int, **settings: int) -> Iterator[Tensor]:
    with patch.multiple(decoding, **settings):
        yield from decode_all(partial(files.decode, image_size=side), len(files), side, files)


def measure(work: Callable[[], Iterator[Tensor]], out: Tensor) -> tuple[float, float]:
    """Seconds on the clock, and of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    for i, image in enumerate(work()):
        out[i] = image
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a folder of images, at any depth")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--rounds", type=several, default=7)
    values = parser.parse_args()
    files = ImageFiles(values.folder, sorted(str(path.relative_to(values.folder)) for path in values.folder.rglob("*")
                                             if path.suffix.lower() in readable_suffixes()))
    side, N = values.image_size, len(files)
    works = {"one thread": partial(one_thread, files, side), "a task for each": partial(task_for_each, files, side),
             "chunks": partial(ours, files, side, SMALL=0, MANY=N + 1, MANY_IF_IMPORTED=N + 1),
             "ours": partial(ours, files, side, MANY_IF_IMPORTED=decoding.MANY),
             "ours, imported": partial(ours, files, side, MANY=decoding.MANY_IF_IMPORTED)}
    out = {name: torch.zeros(N, 3, side, side, dtype=torch.uint8) for name in works}
    for name, work in works.items():  # warms up the files, and torchvision
        measure(work, out[name])
        assert torch.equal(out[name], out["one thread"]), name
    seconds = {name: [] for name in works}
    for turn in range(values.rounds):
        names = list(works)
        for name in names[turn % len(names):] + names[:turn % len(names)]:
            seconds[name].append(measure(works[name], out[name]))
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    result = {**machine(torch.device("cpu")), "images": N, "image_size": side, "rounds": values.rounds,
              "cores": len(os.sched_getaffinity(0)), "import_seconds": [float(text) for text in done.stdout.split()]}
    for name, pairs in seconds.items():
        wall, cpu = zip(*pairs)
        ratios = [first / own for (first, _), own in zip(seconds["one thread"], wall)]
        result[name] = {"seconds": spread(wall), "cpu_seconds": spread(cpu), "times_one_thread": spread(ratios)}
        low, high = result[name]["times_one_thread"]["quartiles"]
        print(f"{name:16} {N / result[name]['seconds']['median']:8.0f} images/s, "
              f"{1e6 * result[name]['cpu_seconds']['median'] / N:5.0f} us of a CPU each, "
              f"{result[name]['times_one_thread']['median']:.2f} times one thread ({low:.2f} to {high:.2f})")
    print("import of torchvision.io: {:.1f} s, {:.1f} s of a CPU".format(*result["import_seconds"]))
    write(f"decode-{N}", result)


if __name__ == "__main__":
    main()
