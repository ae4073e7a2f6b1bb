"""What searching and retraining show and watch while they go: the course of an epoch, a loss that fails, time left."""
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from conas import distributed
from conas.data.batches import Stream
from conas.errors import InputError
from conas.runs.folder import Run


def cosine(epoch: int, epochs: int, highest: float, lowest: float) -> float:
    """The learning rate of an epoch: `highest` in epoch 0, falling to near `lowest` in the last."""
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * epoch / epochs)) / 2


class Course:
    """The steps of one epoch, to iterate over, with `loss` (nats), `top1` (percent) and `rate` (images a second).

    These are means up to the last look. Loss and right answers are summed on the device and looked at every
    `report_freq` steps, since every look waits for the device; on the CPU, which waits for nothing, at every step.
    A look raises InputError, naming the batch, at a loss that is NaN or infinite, unless such steps are `skip`ped.

    `state` of an earlier Course lets this one go on after the steps of that one.
    """

    def __init__(self, title: str, epoch: int, stream: Stream, report_freq: int, *, skip: bool = False,
                 state: dict | None = None):
        self.title, self.epoch, self.stream, self.skip = title, epoch, stream, skip
        self.report_freq = 1 if stream.device.type == "cpu" else report_freq
        state = state or {"step": 0, "seen": 0, "skipped": 0, "seconds": 0.0, "sums": torch.zeros(3)}
        self.step, self.seen, self.skipped = state["step"], state["seen"], state["skipped"]
        # of losses, of right answers, and of steps with finite losses: a sum that is not finite will never be again
        self._sums = state["sums"].to(stream.device, copy=True)
        self.loss, self.top1, self.rate = math.nan, math.nan, math.nan
        self._began = time.perf_counter() - state["seconds"]

    def __iter__(self) -> Iterator[int]:
        self._bar = tqdm(initial=self.step, total=self.stream.steps, desc=self.title, leave=False,
                         disable=distributed.tqdm_disable())
        with self._bar:
            while self.step < self.stream.steps:
                yield self.step
                self._bar.update()
        if not self.seen:
            raise InputError(f"every step of epoch {self.epoch} was skipped, since no loss was finite; a lower "
                             "--learning_rate under another --save name may help")
        self._look()

    def add(self, loss: Tensor, hits: Tensor, size: int) -> None:
        """Count a batch: its mean loss and its number of right answers, both on the device. Ends the step."""
        if self.skip and not loss.isfinite():
            return self.skip_step()
        self.step += 1
        self.seen += size
        self._sums += torch.stack([loss * size, hits, (self._sums[0] + loss).isfinite()])
        if self.step % self.report_freq == 0:
            self._look()

    def skip_step(self) -> None:
        """Count a step that was not taken."""
        self.step, self.skipped = self.step + 1, self.skipped + 1

    def _look(self) -> None:
        loss, hits, finite = self._sums.tolist()
        self.loss, self.top1, self.rate = loss / self.seen, 100 * hits / self.seen, self.seen / self.seconds
        if not math.isfinite(loss):
            images = self.stream.shown(self.epoch, int(finite)).tolist()
            raise InputError(
                f"the training loss became {loss} in epoch {self.epoch} at batch {int(finite)}, counted from 0, of the "
                f"training images {', '.join(map(str, images[:8]))}{', ...' if len(images) > 8 else ''}; what was kept "
                "before it is intact. --on_nan skip goes on without such batches; a lower --learning_rate or "
                "--grad_clip under another --save name may help")
        self._bar.set_postfix_str(f"loss {self.loss:.3f}, top-1 {self.top1:.1f} %, {self.rate:.0f} images/s",
                                  refresh=False)

    def state(self) -> dict:
        """What a later Course needs to go on after the steps that were added. Raises as a look does."""
        if self.seen:
            self._look()
        return {"step": self.step, "seen": self.seen, "skipped": self.skipped, "seconds": self.seconds,
                "sums": self._sums.cpu()}

    def remarks(self) -> dict:
        """For the epoch's line of metrics: the number of skipped steps, where they are skipped."""
        return {"skipped": self.skipped} if self.skip else {}

    @property
    def seconds(self) -> float:
        """Since the epoch began, without the time between two starts."""
        return time.perf_counter() - self._began


def snapshot(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers of a network, which hold running statistics, each with a copy of its values."""
    return [(buffer, buffer.clone()) for buffer in network.buffers()]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float,
            before: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Clip the gradients to a 2-norm of `grad_clip`, and let the optimizer step. Returns the loss, detached.

    It is NaN if the loss was finite but the gradient is not. Given a `snapshot` of `before` the forward pass, there is
    no step if it is not finite, and buffers get their earlier values back; to know it, this waits for the device.
    """
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], grad_clip)
    loss = torch.where(norm.isfinite(), loss.detach(), math.nan)
    if before is None or loss.isfinite():
        optimizer.step()
    else:
        for buffer, value in before:
            buffer.copy_(value)
    return loss


def resumed(epoch: int, steps: int) -> str:
    """Where a run goes on, for its first lines; nothing if it begins."""
    return f"; goes on in epoch {epoch} after {steps} steps" if epoch or steps else ""


def tell_skipped(run: Run, metrics: list[dict]) -> None:
    """Say at the end of a run how many steps it went without, if it did."""
    if skipped := sum(row.get("skipped", 0) for row in metrics):
        run.log(f"{skipped} steps were skipped, since their losses or gradients were not finite")


def tell_not_finite(run: Run, metrics: list[dict], on: str = "the images for alphas", flag: str = "--learning_rate"
                    ) -> None:
    """Say at the end of a search that its last network computes predictions that are not finite, if it does."""
    if metrics and metrics[-1].get("not_finite"):
        run.log(f"warning: the last network's predictions on {on} are not all finite, and cells that it found may be "
                f"as bad; search again with a lower {flag} under another --save name")


SHORTER = "--dataset digits with few --epochs, --layers and --init_channels is a matter of minutes"


def announce(run: Run, seconds: float, shorter: str = SHORTER) -> None:
    """Say how long a run will take, if that is long, and what would be shorter."""
    if seconds > 600:
        text = f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.0f} minutes"
        run.log(f"at this speed the run takes about {text}; {shorter}")
