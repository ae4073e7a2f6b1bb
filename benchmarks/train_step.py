"""The retraining loop against a textbook loop of the same network, and against the network's bare passes.

    python -m benchmarks.train_step                           # small enough for a CPU
    python -m benchmarks.train_step --device cuda --init_channels 36 --layers 20 --batch_size 96 --steps 100

The textbook loop augments image by image in the workers of a DataLoader, has images in NCHW and plain modules, and
computes in float32. Ours is train.py's. Bare passes are forward and backward of our network on one batch that lies on
the device. All three train DARTS' cells with auxiliary head, Cutout and drop path on random images of 32x32 pixels;
they take turns in one process, and each round gives one ratio. Prints medians with the quartiles, and writes
benchmarks/results/train_step-DEVICE.json.
"""
import argparse
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
from conas.runs.options import RecipeOptions
from conas.runs.progress import EpochMeter

AUXILIARY_WEIGHT, DROP_PATH, CUTOUT = 0.4, 0.2, 16
RECIPE = RecipeOptions(learning_rate=0.025, weight_decay=3e-4, label_smooth=0.0)
INFO: DataInfo = DATASETS["cifar10"]


def build(options: argparse.Namespace, device: torch.device) -> NetworkCIFAR:
    torch.manual_seed(0)
    network = NetworkCIFAR(options.init_channels, 10, options.layers, True, GENOTYPES["DARTS"]).to(device).train()
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

def accelerated(options: argparse.Namespace, device: torch.device, amp: bool) -> NetworkCIFAR:
    """As train.py has it."""
    network = build(options, device)
    if device.type == "cpu" and not (amp or options.compile) and (library := kernels()) is not None:
        train_by_kernels(network, library)
    use_exact_sums(accelerate_convolutions(network))
    return network.to(memory_format=torch.channels_last)


def ours(options: argparse.Namespace, images: ImageSet, device: torch.device, amp: bool) -> Iterator[None]:
    """One step of train.py for each next()."""
    network = accelerated(options, device, amp)
    forward = torch.compile(network) if options.compile else network
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


def bare(options: argparse.Namespace, images: ImageSet, device: torch.device, amp: bool) -> Iterator[None]:
    """Forward and backward of our network for each next()."""
    network = accelerated(options, device, amp)
    forward = torch.compile(network) if options.compile else network
    x, y = next(images.batches(options.batch_size, device))
    y = y.to(device)
    while True:
        network.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits, auxiliary = forward(x)
            loss = cross_entropy(logits, y) + AUXILIARY_WEIGHT * cross_entropy(auxiliary, y)
        loss.backward()
        yield


def seconds(loop: Iterator[None], steps: int, wait: Callable[[], None]) -> float:
    """How long `steps` steps of a loop take."""
    wait()
    began = time.perf_counter()
    for _ in range(steps):
        next(loop)
    wait()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("init_channels", 8), ("layers", 8), ("batch_size", 96), ("steps", 12), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=several, default=9)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", default="auto", choices=["auto", "bf16", "off"])
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = find_device(options.device)
    amp = use_bf16(options.amp, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    rng = torch.Generator().manual_seed(0)
    N = options.batch_size * max(options.steps, 20)  # an epoch of the textbook loader, which waits at its end
    pixels = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=rng)
    images = ImageSet(INFO, pixels, torch.randint(0, 10, (N,), generator=rng))
    loops = {"ours": ours(options, images, device, amp), "textbook": textbook(options, images, device),
             "bare": bare(options, images, device, amp)}
    for loop in loops.values():
        seconds(loop, 2, wait)  # start workers, choose kernels
    taken = {name: [] for name in loops}
    for turn in range(options.rounds):
        for name in sorted(loops, reverse=turn % 2 == 1):
            taken[name].append(seconds(loops[name], options.steps, wait))

    size = options.batch_size * options.steps
    result = {
        "ours_over_textbook": spread([t / o for o, t in zip(taken["ours"], taken["textbook"])]),
        "ours_over_bare": spread([b / o for o, b in zip(taken["ours"], taken["bare"])]),
        "images_per_second": {name: spread([size / s for s in values]) for name, values in taken.items()},
        "n": options.rounds, "options": vars(options), "bfloat16": amp,
    } | machine(device)
    for name, of in (("ours_over_textbook", "speed of ours over the textbook loop"),
                     ("ours_over_bare", "speed of ours over bare passes")):
        low, high = result[name]["quartiles"]
        print(f"{of}: {result[name]['median']:.3f} (quartiles {low:.3f} to {high:.3f}, n = {options.rounds})")
    for name, value in result["images_per_second"].items():
        print(f"{name}: {value['median']:.1f} images per second")
    print(f"written: {write(f'train_step-{device.type}', result)}")


if __name__ == "__main__":
    main()
