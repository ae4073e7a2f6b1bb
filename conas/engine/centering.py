"""What takes the mean out of depthwise convolutions' maps: a shift for each channel, known before they are made.

The mean of such a map over images and pixels is a sum over its kernel's taps, of the weight times the mean of all that
the tap reads; and that is a mean over some pixels of the mean image. So no pass over the maps is needed, and the shift
comes in as the convolution's bias.
"""
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from conas.engine.depthwise import row_dots


def shifts(x: Tensor, kernels: Tensor, stride: int, dilations: Sequence[int]) -> Tensor:
    """Less the mean over images and pixels of convolutions of the states x (S, N, H, W, C), from the mean image.

    `kernels` (F, k*k, K, S, E, C) are of K convolutions of each of F `dilations`, to E nodes, of size k or with a
    border of zeros. Returns (F, K, S, E, C).
    """
    S, _, H, W, C = x.shape
    F, area = kernels.shape[:2]
    taps = _taps(round(area ** 0.5), H, W, stride, tuple(dilations), x.dtype, x.device)
    taps = torch.bmm(taps.expand(S, -1, -1), x.mean(1).view(S, H * W, C))
    return (taps.view(S, F, area, C).permute(1, 2, 0, 3)[:, :, None, :, None] * kernels).sum(1)


def own_shift(x: Tensor, kernel: Tensor) -> Tensor:
    """The same for maps x (G, N, H, W, C) and a kernel (G*C, 1, k, k), of which each group has its own: (G*C,)."""
    G, _, H, W, C = x.shape
    taps = _taps(kernel.shape[-1], H, W, 1, (1,), x.dtype, x.device)
    means = x.permute(1, 2, 3, 0, 4).mean(0).view(H * W, G * C)
    return row_dots(means.t() @ taps.t(), kernel.flatten(1)).view(-1)


@lru_cache
def _taps(k: int, H: int, W: int, stride: int, dilations: tuple[int, ...], dtype: torch.dtype, device: torch.device
          ) -> Tensor:
    """(F*k*k, H*W): less the share of each pixel in the mean over all outputs of what each tap reads."""
    def along(size, dilation):
        at = torch.arange(0, size, stride)[None] + dilation * (torch.arange(k)[:, None] - k // 2)
        inside = (at >= 0) & (at < size)
        taps = torch.zeros(k, size, dtype=dtype).scatter_add_(1, at.clamp(0, size - 1), inside.to(dtype))
        return taps / at.shape[1]

    return torch.cat([torch.kron(along(H, d), along(W, d)) for d in dilations]).neg_().to(device)
