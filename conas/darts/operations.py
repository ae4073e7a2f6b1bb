"""The candidate operations of DARTS by name, and the two preprocessing blocks of a cell.

Every operation maps (N, C, H, W) to (N, C, ceil(H/stride), ceil(W/stride)). Submodule names are those of the
published DARTS code, so that its `state_dict` files load. `affine` is False throughout a supernet.
"""
import torch
from torch import Tensor, nn

from conas.engine.depthwise import blockwise, convolve_back, goes_by_phases
from conas.engine.manual_grad import Tape, by_hand
from conas.engine.pooling import AveragePool


class DepthwiseConv2d(nn.Conv2d):
    """One k x k kernel for each of C channels, k odd, "same" padding: (N, C, H, W) to (N, C, ceil(H/stride), ...)."""

    def __init__(self, C: int, kernel_size: int, stride: int, padding: int, dilation: int):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.permute(0, 2, 3, 1)[None]
        if goes_by_phases(maps, self.stride[0], self.dilation[0]):
            (out,) = blockwise(maps, self.weight, 1, 2)
            return out[0].permute(0, 3, 1, 2)
        # other devices and autocast's dtypes have kernels that are good as they are
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if plain and self.stride == (1, 1) and torch.is_grad_enabled():
            return by_hand(self._run, x, self.weight)
        return super().forward(x)

    def _run(self, tape: Tape, x: Tensor, weight: Tensor):
        x_wanted, weight_wanted = tape.wanted
        out, shape = super().forward(x), x.permute(0, 2, 3, 1)[None].shape
        kept, kept_weight, dilation = tape.keep(x if weight_wanted else None), tape.keep(weight), self.dilation[0]

        def back(grad):
            states = kept().permute(0, 2, 3, 1)[None] if weight_wanted else None
            weight = kept_weight()
            d_x, d_weight = convolve_back(grad.permute(0, 2, 3, 1)[None], shape, states, [weight], [weight.flip(2, 3)],
                                          1, dilation, x_wanted)
            return d_x[0].permute(0, 3, 1, 2) if x_wanted else None, d_weight[0] if weight_wanted else None

        return out, back


class ReLUConvBN(nn.Module):
    """ReLU, convolution, BatchNorm."""

    def __init__(self, C_in: int, C_out: int, kernel_size: int, stride: int, padding: int, affine: bool = True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(C_in, C_out, kernel_size, stride, padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def _separable(C: int, kernel_size: int, stride: int, padding: int, dilation: int, affine: bool) -> list[nn.Module]:
    """ReLU, depthwise convolution, pointwise convolution, BatchNorm."""
    return [
        nn.ReLU(),
        DepthwiseConv2d(C, kernel_size, stride, padding, dilation),
        nn.Conv2d(C, C, 1, bias=False),
        nn.BatchNorm2d(C, affine=affine),
    ]


class SepConv(nn.Module):
    """Depthwise-separable convolution, applied twice; the first application carries the stride."""

    def __init__(self, C: int, kernel_size: int, stride: int, affine: bool = True):
        super().__init__()
        padding = kernel_size // 2
        self.op = nn.Sequential(*_separable(C, kernel_size, stride, padding, 1, affine),
                                *_separable(C, kernel_size, 1, padding, 1, affine))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class DilConv(nn.Module):
    """Depthwise-separable convolution with dilation 2: a 3x3 kernel sees 5x5 pixels, a 5x5 kernel 9x9."""

    def __init__(self, C: int, kernel_size: int, stride: int, affine: bool = True):
        super().__init__()
        self.op = nn.Sequential(*_separable(C, kernel_size, stride, kernel_size - 1, 2, affine))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halve height and width without losing pixels: two strided 1x1 convolutions, the second shifted by one pixel.

    Odd sizes are padded at the lower right, so that both halves have ceil(size/2) pixels.
    """

    def __init__(self, C_in: int, C_out: int, affine: bool = True):
        super().__init__()
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out - C_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        shifted = nn.functional.pad(x[:, :, 1:, 1:], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(shifted)], dim=1))


class Zero(nn.Module):
    """The operation `none`: zeros of the output's shape."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :, ::self.stride, ::self.stride])


def _conv_7x1_1x7(C: int, stride: int, affine: bool) -> nn.Module:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(C, C, (1, 7), (1, stride), (0, 3), bias=False),
        nn.Conv2d(C, C, (7, 1), (stride, 1), (3, 0), bias=False),
        nn.BatchNorm2d(C, affine=affine),
    )


OPERATIONS = {
    "none": lambda C, stride, affine: Zero(stride),
    "max_pool_3x3": lambda C, stride, affine: nn.MaxPool2d(3, stride, padding=1),
    "avg_pool_3x3": lambda C, stride, affine: AveragePool(stride),
    "skip_connect": lambda C, stride, affine: nn.Identity() if stride == 1 else FactorizedReduce(C, C, affine),
    "sep_conv_3x3": lambda C, stride, affine: SepConv(C, 3, stride, affine),
    "sep_conv_5x5": lambda C, stride, affine: SepConv(C, 5, stride, affine),
    "sep_conv_7x7": lambda C, stride, affine: SepConv(C, 7, stride, affine),
    "dil_conv_3x3": lambda C, stride, affine: DilConv(C, 3, stride, affine),
    "dil_conv_5x5": lambda C, stride, affine: DilConv(C, 5, stride, affine),
    "conv_7x1_1x7": _conv_7x1_1x7,
}
