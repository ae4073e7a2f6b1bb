"""What searches and trainings show and watch while they run: the sums of an epoch, losses that fail, the time left."""
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


class EpochMeter:
    """The steps of one epoch, to iterate over, with `loss` (nats), `top1` (percent) and `rate` (images a second).

    These are means up to the last synchronisation. Loss and right answers are summed on the device and read every
    `report_freq` steps, since reading waits for the device; on the CPU, where nothing has to wait, at every step. If a
    loss was NaN or infinite, reading raises InputError that names the batch, unless such steps are `skip`ped.

    With the `state` of an earlier EpochMeter this one goes on after the steps of that one.
    """

    def __init__(self, title: str, epoch: int, stream: Stream, report_freq: int, *, skip: bool = False,
                 state: dict | None = None):
        self.title, self.epoch, self.stream, self.skip = title, epoch, stream, skip
        self.report_freq = 1 if stream.device.type == "cpu" else report_freq
        state = state or {"step": 0, "seen": 0, "skipped": 0, "seconds": 0.0, "sums": torch.zeros(3)}
        self.step, self.seen, self.skipped = state["step"], state["seen"], state["skipped"]
        # of losses, of right answers, and of steps with finite losses: a sum that is not finite stays so
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
        self._sync_metrics()

    def add(self, loss: Tensor, hits: Tensor, size: int) -> None:
        """Count a batch: its mean loss and its number of right answers, both on the device. Ends the step."""
        if self.skip and not loss.isfinite():
            return self.skip_step()
        self.step += 1
        self.seen += size
        self._sums += torch.stack([loss * size, hits, (self._sums[0] + loss).isfinite()])
        if self.step % self.report_freq == 0:
            self._sync_metrics()

    def skip_step(self) -> None:
        """Count a step that was not taken."""
        self.step, self.skipped = self.step + 1, self.skipped + 1

    def _sync_metrics(self) -> None:
        """Read the sums from the device, show them, and raise InputError if they are not finite."""
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
        """What a later EpochMeter needs to go on after the steps that were added. Raises as reading the sums does."""
        if self.seen:
            self._sync_metrics()
        return {"step": self.step, "seen": self.seen, "skipped": self.skipped, "seconds": self.seconds,
                "sums": self._sums.cpu()}

    def extra_metrics(self) -> dict:
        """For the epoch's row of metrics: the number of skipped steps, if such steps are skipped."""
        return {"skipped": self.skipped} if self.skip else {}

    @property
    def seconds(self) -> float:
        """Time since the epoch began, without that between two starts of the run."""
        return time.perf_counter() - self._began


def snapshot(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers of a network, which hold running statistics, each with a copy of its values."""
    return [(buffer, buffer.clone()) for buffer in network.buffers()]


def clip_and_step(optimizer: torch.optim.Optimizer, loss: Tensor, grad_clip: float,
                  before: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """Clip the gradients to a 2-norm of `grad_clip`, and let the optimizer step. Returns the loss, detached.

    The returned loss is NaN if the gradient is not finite. If `before` is a `snapshot` taken before the forward pass,
    no step is taken at a loss that is not finite, and buffers are restored; to know that, this waits for the device.
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
    """Where a run goes on, for its first lines; "" if it begins."""
    return f"; goes on in epoch {epoch} after {steps} steps" if epoch or steps else ""


def log_skipped(run: Run, metrics: list[dict]) -> None:
    """Say at the end of a run how many steps it went without, if it did."""
    if skipped := sum(row.get("skipped", 0) for row in metrics):
        run.log(f"{skipped} steps were skipped, since their losses or gradients were not finite")


def log_not_finite(run: Run, metrics: list[dict], on: str = "the images for alphas", flag: str = "--learning_rate"
                   ) -> None:
    """Say at the end of a search that its last network computes predictions that are not finite, if it does."""
    if metrics and metrics[-1].get("not_finite"):
        run.log(f"warning: the last network's predictions on {on} are not all finite, and cells that it found may be "
                f"as bad; search again with a lower {flag} under another --save name")


SHORTER = "--dataset digits with few --epochs, --layers and --init_channels is a matter of minutes"


def log_eta(run: Run, seconds: float, shorter: str = SHORTER) -> None:
    """Say how long a run will take, if that is long, and what would be shorter."""
    if seconds > 600:
        text = f"{seconds / 3600:.1f} hours" if seconds > 7200 else f"{seconds / 60:.0f} minutes"
        run.log(f"at this speed the run takes about {text}; {shorter}")
