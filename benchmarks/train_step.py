"""A step of retraining: train.py's by plain modules, by compiled kernels and by torch.compile, and a textbook loop's.

    python -m benchmarks.train_step                           # DARTS_V2, 16 channels, 6 cells, batches of 96
    python -m benchmarks.train_step --device cuda --init_channels 36 --layers 20 --steps 100

The textbook loop augments image by image in a DataLoader, has images in NCHW and plain modules, and computes in
float32. `plain`, `kernels` and `compiled` are train.py's loop by its three ways to compute a step; `bare` is forward
and backward of the network that train.py has by default, on one batch that lies on the device. All train the same cells
with auxiliary head, Cutout and drop path on random images of 32x32 pixels, and keep freed memory. They take turns in
one process, by --steps steps, and each round gives one ratio.

Before, `compiled` compiles, with an empty cache and one process: for each of the first epochs, in which drop path has
other probabilities, what its first step takes more than the next is what compiling takes. The break-even is after how
many steps that is won back. With one thread, figures are processor seconds too, those of the C++ compiler included.
Writes benchmarks/results/train_step-DEVICE.json.
"""
import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.machine import machine, several, spread, write
from conas.cli import find_device
from conas.commands.train import train_step
from conas.darts.batchnorm import use_exact_sums
from conas.darts.derived import NetworkCIFAR
from conas.darts.published import GENOTYPES
from conas.data.batches import Stream
from conas.data.images import DATASETS, DataInfo, ImageSet
from conas.engine.convolutions import accelerate_convolutions
from conas.engine.native.loader import kernels
from conas.engine.native.training import train_by_kernels
from conas.engine.precision import use_bf16
from conas.memory import keep_freed_memory
from conas.runs.options import RecipeOptions
from conas.runs.progress import EpochMeter

AUXILIARY_WEIGHT, DROP_PATH, CUTOUT = 0.4, 0.2, 16
EPOCHS = 3  # whose drop path `compiled` compiles for, one after the other, as a training of 600 epochs does
RECIPE = RecipeOptions(learning_rate=0.025, weight_decay=3e-4, label_smooth=0.0)
INFO: DataInfo = DATASETS["cifar10"]


def build(options: argparse.Namespace, device: torch.device) -> NetworkCIFAR:
    torch.manual_seed(0)
    network = NetworkCIFAR(options.init_channels, 10, options.layers, True, GENOTYPES[options.arch]).to(device).train()
    network.drop_path_prob = DROP_PATH
    return network


def sgd(network: nn.Module, **settings) -> torch.optim.SGD:
    return torch.optim.SGD(network.parameters(), lr=RECIPE.learning_rate, momentum=RECIPE.momentum,
                           weight_decay=RECIPE.weight_decay, **settings)


# the textbook

def cutout(image: torch.Tensor) -> torch.Tensor:
    row, column = (np.random.randint(32) for _ in range(2))
    image[:, max(row - CUTOUT // 2, 0):row + CUTOUT // 2, max(column - CUTOUT // 2, 0):column + CUTOUT // 2] = 0
    return image


class TextbookImages(Dataset):
    def __init__(self, images: ImageSet):
        self.pixels, self.labels = images.images.permute(0, 2, 3, 1).numpy(), images.labels.tolist()
        self.transform = transforms.Compose([
            transforms.ToPILImage(), transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
            transforms.ToTensor(), transforms.Normalize(INFO.mean, INFO.std), cutout])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.pixels[i]), self.labels[i]


def textbook(options: argparse.Namespace, images: ImageSet, device: torch.device) -> Iterator[None]:
    """One step for each next()."""
    network = build(options, device)
    optimizer = sgd(network, foreach=False)
    loader = DataLoader(TextbookImages(images), options.batch_size, shuffle=True, num_workers=options.workers,
                        pin_memory=device.type == "cuda", drop_last=True, persistent_workers=options.workers > 0)
    while True:
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            optimizer.zero_grad()
            logits, auxiliary = network(x)
            loss = cross_entropy(logits, y) + AUXILIARY_WEIGHT * cross_entropy(auxiliary, y)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), RECIPE.grad_clip)
            optimizer.step()
            loss.item(), (logits.argmax(1) == y).sum().item()  # for the averages that every textbook loop prints
            yield


# ours

def accelerated(options: argparse.Namespace, device: torch.device, by_kernels: bool) -> NetworkCIFAR:
    """As train.py has it."""
    network = build(options, device)
    if by_kernels and (library := kernels()) is not None:
        train_by_kernels(network, library)
    use_exact_sums(accelerate_convolutions(network))
    return network.to(memory_format=torch.channels_last)


def ours(options: argparse.Namespace, images: ImageSet, device: torch.device, amp: bool, network: NetworkCIFAR,
         forward: nn.Module) -> Iterator[None]:
    """One step of train.py for each next()."""
    optimizer = sgd(network, fused=True)
    stream = Stream(images, torch.arange(len(images)), options.batch_size, name="training", seed=0, device=device,
                    cutout_length=CUTOUT, drop_last=True)
    batches = stream.batches()
    while True:
        meter = EpochMeter("", 0, stream, 50)
        for _ in meter:
            batch = next(batches)
            meter.add(*train_step(forward, optimizer, batch, RECIPE, AUXILIARY_WEIGHT, amp), len(batch[1]))
            yield


def bare(options: argparse.Namespace, images: ImageSet, device: torch.device, amp: bool, network: NetworkCIFAR
         ) -> Iterator[None]:
    """Forward and backward of our network for each next()."""
    x, y = next(images.batches(options.batch_size, device))
    y = y.to(device)
    while True:
        network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits, auxiliary = network(x)
            loss = cross_entropy(logits, y) + AUXILIARY_WEIGHT * cross_entropy(auxiliary, y)
        loss.backward()
        yield


def processor_seconds() -> float:
    """Of this process and of those that it has waited for, such as a C++ compiler."""
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def seconds(loop: Iterator[None], steps: int, wait: Callable[[], None]) -> dict[str, float]:
    """How long `steps` steps of a loop take, by both clocks."""
    wait()
    wall, processor = time.perf_counter(), processor_seconds()
    for _ in range(steps):
        next(loop)
    wait()
    return {"processor": processor_seconds() - processor, "wall": time.perf_counter() - wall}


def compiling(loop: Iterator[None], network: NetworkCIFAR, wait: Callable[[], None]) -> list[dict[str, float]]:
    """What compiling takes in each of the first epochs of a training."""
    taken = []
    for epoch in range(EPOCHS):
        network.drop_path_prob = DROP_PATH * epoch / 600
        first, _, after = (seconds(loop, 1, wait) for _ in range(3))
        taken.append({clock: max(0.0, first[clock] - after[clock]) for clock in first})
        print(f"epoch {epoch}: compiled for {taken[-1]['wall']:.1f} s, {taken[-1]['processor']:.1f} s of processors",
              flush=True)
    network.drop_path_prob = DROP_PATH
    seconds(loop, 2, wait)
    return taken


def compare(options: argparse.Namespace, images: ImageSet, device: torch.device, amp: bool) -> dict:
    """Seconds of a step of each, by turns, the ratios, and what compiling takes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    able = device.type == "cpu" and not amp and kernels() is not None
    given = options, images, device, amp
    plain, default, to_compile = (accelerated(options, device, able and i == 1) for i in range(3))
    loops = {"textbook": textbook(*given[:3]), "plain": ours(*given, plain, plain),
             "compiled": ours(*given, to_compile, torch.compile(to_compile)), "bare": bare(*given, default)}
    if able:
        loops["kernels"] = ours(*given, default, default)
    result = {"compiling": compiling(loops["compiled"], to_compile, wait)}
    for loop in loops.values():
        seconds(loop, 2, wait)  # start workers, choose kernels
    taken = {name: [] for name in loops}
    for turn in range(options.rounds):
        for name in sorted(loops, reverse=turn % 2 == 1):
            taken[name].append(seconds(loops[name], options.steps, wait))
    usual = "kernels" if able else "plain"
    pairs = [("textbook", usual), ("plain", usual), ("compiled", usual), ("plain", "compiled"), ("bare", usual)]
    for clock in "processor", "wall":
        result[f"{clock}_seconds"] = {name: spread([each[clock] / options.steps for each in of])
                                      for name, of in taken.items()}
        result[f"{clock}_ratio"] = {f"{slow} over {fast}": spread([a[clock] / b[clock] for a, b in zip(
            taken[slow], taken[fast])]) for slow, fast in pairs if slow != fast}
        compiled = result[f"{clock}_seconds"]["compiled"]["median"]
        result[f"{clock}_break_even"] = {name: break_even(sum(each[clock] for each in result["compiling"]), result[
            f"{clock}_seconds"][name]["median"], compiled) for name in {"plain", usual}}
    return result


def break_even(compiling: float, step: float, compiled: float) -> float | None:
    """After how many steps that would take `step` seconds compiling is won back; None if never."""
    return compiling / (step - compiled) if step > compiled else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("init_channels", 16), ("layers", 6), ("batch_size", 96), ("steps", 3), ("workers", 0),
                          ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arch", default="DARTS_V2", choices=sorted(GENOTYPES))
    parser.add_argument("--rounds", type=several, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = find_device(options.device)
    amp = use_bf16(options.amp, device)

    rng = torch.Generator().manual_seed(0)
    N = options.batch_size * max(options.steps, 20)  # an epoch of the textbook loader, which waits at its end
    pixels = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=rng)
    images = ImageSet(INFO, pixels, torch.randint(0, 10, (N,), generator=rng))
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, whose time counts
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        result = compare(options, images, device, amp)
    result |= {"n": options.rounds, "options": vars(options), "bfloat16": amp} | machine(device)
    clock = "wall" if device.type == "cuda" or options.threads > 1 else "processor"
    for name, of in result[f"{clock}_ratio"].items():
        print(f"seconds of {name}: {of['median']:.3f} (quartiles {of['quartiles'][0]:.3f} to {of['quartiles'][1]:.3f}, "
              f"n = {options.rounds}, {clock} time)")
    for name, steps in result[f"{clock}_break_even"].items():
        print(f"compiling is won back over {name} after " + ("no number of steps" if steps is None else f"{steps:.0f} "
              "steps"))
    for name, of in result["wall_seconds"].items():
        print(f"{name}: {options.batch_size / of['median']:.1f} images per second by the wall clock")
    print(f"written: {write(f'train_step-{device.type}', result)}")


if __name__ == "__main__":
    main()
