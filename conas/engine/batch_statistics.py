"""What BatchNorm normalises by in one pass through a supernet, and what the pass leaves behind."""
from collections.abc import Callable, Sequence
from itertools import chain
from operator import call

import torch
from torch import Tensor, nn

from conas.engine.batchnorm import BatchScope, batch_norm, normalise, normalise_back, unbiased_variance
from conas.engine.manual_grad import Tape


class Statistics:
    """Of one pass: those of the batch if `batch`, else the running ones of the modules.

    The batch is the images of `scope`, which other processes may share. What `add` takes is of all of them. `once`
    gives what a function makes that takes no images, see conas/engine/inference.py.
    Statistics of the batch enter the running ones at the end of the pass, in `update`, if they are to be kept: one
    call for all modules instead of three for each.
    """

    def __init__(self, batch: bool, keep: bool, scope: BatchScope | None = None, once: Callable = call):
        self.batch, self.keep, self.scope, self.once = batch, batch and keep, scope or BatchScope(), once
        self._seen: list[tuple[Sequence[nn.BatchNorm2d], Tensor, Tensor, int]] = []

    def add(self, norms: Sequence[nn.BatchNorm2d], mean: Tensor, rstd: Tensor, pixels: int) -> None:
        """Take note of the mean and 1/std of a batch, of K * C channels: K maps of C for as many norms, or each for
        several that share it, one after another; `pixels` are this process's.
        """
        if self.keep:
            self._seen.append((norms, mean.detach(), rstd.detach(), self.scope.count(pixels)))

    def add_folded(self, norms: Sequence[nn.BatchNorm2d], shifts: Sequence[Tensor], weight: Tensor, rstd: Tensor,
                   pixels: int) -> None:
        """`add` of W z with weight (K, C, C), for z of mean zero since `shifts`, together (K*C,), were added."""
        if self.keep:
            shift = torch.cat(list(shifts)).detach().view(len(weight), 1, -1)
            self.add(norms, -shift @ weight.detach().transpose(1, 2), rstd, pixels)

    @staticmethod
    def running(norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor, Tensor]:
        """The running mean and variance, (len(norms), 1, C) each."""
        return (torch.stack([norm.running_mean for norm in norms])[:, None],
                torch.stack([norm.running_var for norm in norms])[:, None])

    @staticmethod
    def running_scale(norms: Sequence[nn.BatchNorm2d], p: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`scale` and `shift`, (len(norms), 1, C) each, with p BatchNorm(x) = x scale + shift; p (len(norms),) or 1."""
        mean, variance = Statistics.running(norms)
        scale = (variance + norms[0].eps).rsqrt()
        scale = scale if p is None else scale * p[:, None, None]
        return scale, -scale * mean

    def normalise(self, x: Tensor, norms: Sequence[nn.BatchNorm2d], weight: Tensor | None = None,
                  bias: Tensor | None = None) -> Tensor:
        """BatchNorm of x (N, H, W, channels), whose channels are those of all norms one after another."""
        x, eps = x.permute(0, 3, 1, 2), norms[0].eps
        if self.batch:
            x, mean, rstd = batch_norm(x, weight, bias, eps, self.scope)
            self.add(norms, mean, rstd, x.numel() // x.shape[1])
        else:
            mean, variance = self.once(lambda: [of.view(-1).to(x.dtype) for of in self.running(norms)])
            x = nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
        return x.permute(0, 2, 3, 1)

    def normalise_by_running(self, x: Tensor, norms: Sequence[nn.BatchNorm2d]) -> Tensor:
        """BatchNorm of x (K, N, H, W, C), of which each map has its own of K norms, by the running statistics."""
        scale, shift = self.once(lambda: [t[:, None, None].to(x.dtype) for t in self.running_scale(norms)])
        return torch.addcmul(shift, x, scale)

    def normalise_by_batch(self, tape: Tape, x: Tensor, norms: Sequence[nn.BatchNorm2d]
                           ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The same by the batch, in x's own memory, and its backward: from the gradient w.r.t. the result to x's."""
        rows = x.view(len(x), -1, x.shape[-1])
        y, mean, rstd = normalise(rows, norms[0].eps, self.scope, True)
        self.add(norms, mean, rstd, rows.shape[1])
        kept, shape = tape.keep(y), x.shape

        def back(grad: Tensor) -> Tensor:
            y = kept()
            return normalise_back(grad.view(y.shape), y, rstd, self.scope)[0].view(shape)

        return y.view(shape), back

    @torch.no_grad()
    def update(self) -> None:
        """Let the running statistics follow those of the batch, as BatchNorm does in training."""
        if not self.keep:
            return
        alike, running, seen, counts = {}, [], [], []  # one conversion for all entries that are alike
        for norms, mean, rstd, pixels in self._seen:
            C = norms[0].num_features
            times = len(norms) * C // mean.numel()  # as many share each map
            alike.setdefault((C, pixels, times), []).append((norms, mean.view(-1, C), rstd.view(-1, C)))
        for (_, pixels, times), entries in alike.items():
            norms, mean, rstd = zip(*entries)
            norms = list(chain(*norms))
            variance = unbiased_variance(torch.cat(rstd), pixels, norms[0].eps)
            for name, value in ("running_mean", torch.cat(mean)), ("running_var", variance):
                running += [getattr(norm, name) for norm in norms]
                seen += value.to(running[-1].dtype).repeat_interleave(times, dim=0).unbind()
            counts += [norm.num_batches_tracked for norm in norms]
        torch._foreach_lerp_(running, seen, norms[0].momentum)
        torch._foreach_add_(counts, 1)
