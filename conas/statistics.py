"""What BatchNorm normalises by in one pass through a supernet, and what the pass leaves behind."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from conas.fused import is_twice_differentiable
from conas.synced import Pool, batch_norm


def _is_rough(x: Tensor) -> bool:
    """Whether PyTorch's own BatchNorm loses digits: for channels last on CPUs it sums pixels one after another.

    That is six times the rounding of the logits, and twice the error of a float32 hypergradient.
    """
    return x.device.type == "cpu" and not is_twice_differentiable() and not torch.compiler.is_compiling()


class Statistics:
    """Of one pass: those of the batch if `batch`, else the running ones of the modules.

    The batch is the images of `pool`, which other processes may share. What `add` takes is of all of them.
    Statistics of the batch enter the running ones at the end of the pass, in `update`, if they are to be kept: one
    call for all modules instead of three for each.
    """

    def __init__(self, batch: bool, keep: bool, pool: Pool | None = None):
        self.batch, self.keep, self.pool = batch, batch and keep, pool or Pool()
        self.centred = self.pool if batch else None  # the images over which a mean is to be zero
        self._seen: list[tuple[Sequence[nn.BatchNorm2d], Tensor, Tensor, int]] = []

    def add(self, norms: Sequence[nn.BatchNorm2d], mean: Tensor, weight: Tensor | None, variance: Tensor, pixels: int
            ) -> None:
        """Take note of the mean and the biased variance of a batch, of len(norms) * C channels or of C that all norms
        share; `pixels` are this process's. With a weight (K, C, C) the mean is that of W z for `mean` (K, 1, C) of z.
        """
        if self.keep:
            mean, variance = mean.detach(), variance.detach()
            mean = mean if weight is None else mean @ weight.detach().transpose(1, 2)
            self._seen.append((norms, mean, variance, self.pool.count(pixels)))

    @staticmethod
    def running(norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
        """The running mean and variance, (len(norms), 1, C) each."""
        return (torch.stack([norm.running_mean for norm in norms])[:, None],
                torch.stack([norm.running_var for norm in norms])[:, None])

    def normalise(self, x: Tensor, norms: Sequence[nn.BatchNorm2d], weight: Tensor | None = None,
                  bias: Tensor | None = None) -> Tensor:
        """BatchNorm of x (N, H, W, channels), whose channels are those of all norms one after another, or, by the
        statistics of the batch only, of C channels that all norms share."""
        x, eps = x.permute(0, 3, 1, 2), norms[0].eps
        if self.batch and (self.pool.shared or _is_rough(x)):
            x, mean, variance = batch_norm(x, weight, bias, eps, self.pool)
            self.add(norms, mean, None, variance, x.numel() // x.shape[1])
        elif self.batch:
            x, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
            self.add(norms, mean, None, (rstd.detach() ** -2 - eps) if self.keep else rstd, x.numel() // x.shape[1])
        else:
            mean, variance = (statistic.view(-1).to(x.dtype) for statistic in self.running(norms))
            x = nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        return x.permute(0, 2, 3, 1)

    @torch.no_grad()
    def update(self) -> None:
        """Let the running statistics follow those of the batch, as BatchNorm does in training."""
        if not self.keep:
            return
        running, seen, counts = [], [], []
        for norms, mean, variance, pixels in self._seen:
            shape = len(norms), norms[0].num_features
            for name, value in ("running_mean", mean), ("running_var", variance * (pixels / (pixels - 1))):
                running += [getattr(norm, name) for norm in norms]
                seen += value.to(norms[0].running_mean.dtype).reshape(-1, shape[1]).expand(shape).unbind()
            counts += [norm.num_batches_tracked for norm in norms]
        torch._foreach_lerp_(running, seen, norms[0].momentum)
        torch._foreach_add_(counts, 1)
