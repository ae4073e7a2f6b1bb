"""Average pooling of 3x3 pixels and its gradient: on GPUs not by the library's.

The gradient of PyTorch's avg_pool2d on CUDA is wrong for padded images with channels last, seen with version 2.11
(pytorch/pytorch#188344), and nothing says so. The mean of those pixels of a window that are inside of the image is the
mean of the bordered window, taken 9 / n times; so all it takes is pooling without padding, and pooling forward.
"""
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

RIGHT = ("cpu",)  # devices whose library has the right gradient


class AveragePool(nn.AvgPool2d):
    """`average_pool` as a module."""

    def __init__(self, stride: int):
        super().__init__(3, stride, padding=1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        return average_pool(x, self.stride)


def average_pool(x: Tensor, stride: int) -> Tensor:
    """The mean of the pixels around each that are inside of the image: (N, C, H, W) to (N, C, ceil(H/stride), ...)."""
    if x.device.type in RIGHT or not (x.requires_grad and torch.is_grad_enabled()):
        return avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    shares = avg_pool2d(pad(x, (1, 1, 1, 1)), 3, stride)
    return torch.addcmul(shares, shares, _fewer(*x.shape[2:], stride, x.dtype, x.device))


def average_pool_back(grad: Tensor, x: Tensor, stride: int, out: Tensor) -> None:
    """Into `out`, from the gradient by `average_pool` to that by x (N, C, H, W), of which only the shape is read."""
    H, W = out.shape[2:]
    if out.device.type in RIGHT:
        torch.ops.aten.avg_pool2d_backward.grad_input(grad, x, [3, 3], [stride] * 2, [1, 1], False, False, None,
                                                      grad_input=out)
        return
    shares = torch.addcmul(grad, grad, _fewer(H, W, stride, grad.dtype, grad.device))
    if stride == 2:
        apart = shares.new_zeros(len(out), H, W, out.shape[1]).permute(0, 3, 1, 2)
        apart[:, :, ::2, ::2] = shares
        shares = apart
    torch.ops.aten.avg_pool2d.out(shares, [3, 3], [1, 1], [1, 1], False, True, None, out=out)


@lru_cache
def _fewer(H: int, W: int, stride: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(H', W'): 9 / n - 1 for windows that have n pixels inside of the image."""
    share = avg_pool2d(torch.ones(1, H, W, dtype=torch.float64, device="cpu"), 3, stride, 1)  # n / 9
    return (1 / share[0] - 1).to(device, dtype)
