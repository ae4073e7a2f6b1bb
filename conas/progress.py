"""What searching and retraining show and watch while they go: the course of an epoch, a loss that fails, time left."""
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from conas.errors import InputError
from conas.run import Run


def cosine(epoch: int, epochs: int, highest: float, lowest: float) -> float:
    """The learning rate of an epoch: `highest` in epoch 0, falling to near `lowest` in the last."""
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2


class Course:
    """The steps of one epoch, to iterate over, with `loss` (nats), `top1` (percent) and `rate` (images a second).

    These are means up to the last look. Loss and right answers are summed on the device and looked at every
    `report_freq` steps, since every look waits for the device. Raises InputError when the loss has become NaN or
    infinite.
    """

    def __init__(self, title: str, epoch: int, steps: int, report_freq: int, device: torch.device):
        self.title, self.epoch, self.steps, self.report_freq = title, epoch, steps, report_freq
        self._loss, self._hits = torch.zeros((), device=device), torch.zeros((), device=device)
        self._seen, self.loss, self.top1, self.rate = 0, math.nan, math.nan, math.nan
        self._began = time.perf_counter()

    def __iter__(self) -> Iterator[int]:
        # disable=None: a bar on a terminal, silence in a file
        self._bar = tqdm(range(self.steps), desc=self.title, leave=False, disable=None)
        for step in self._bar:
            self._step = step
            yield step

    def add(self, loss: Tensor, hits: Tensor, size: int) -> None:
        """Count a batch: its mean loss and its number of right answers, both on the device."""
        self._loss, self._hits, self._seen = self._loss + loss * size, self._hits + hits, self._seen + size
        if self._step % self.report_freq == 0 or self._step == self.steps - 1:
            self.loss, self.top1 = self._loss.item() / self._seen, 100 * self._hits.item() / self._seen
            self.rate = self._seen / self.seconds
            check_finite(self.loss, self.epoch, self._step)
            self._bar.set_postfix_str(f"loss {self.loss:.3f}, top-1 {self.top1:.1f} %, {self.rate:.0f} images/s")

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return time.perf_counter() - self._began


def check_finite(loss: float, epoch: int, step: int) -> None:
    """Raise InputError if the loss is NaN or infinite: the last epoch's checkpoint stays the last."""
    if not math.isfinite(loss):
        raise InputError(f"the training loss became {loss} in epoch {epoch} by step {step}; the checkpoints before it "
                         "are intact. A lower --learning_rate or --grad_clip may help, under another --save name")


def announce(run: Run, seconds: float) -> None:
    """Say how long a run will take, if that is long."""
    if seconds > 600:
        text = f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.0f} minutes"
        run.log(f"at this speed the run takes about {text}; --dataset digits with few --epochs, --layers and "
                "--init_channels is a matter of minutes")
