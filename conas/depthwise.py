"""Depthwise convolution with a fast backward pass on CPUs.

oneDNN has a fast kernel for every depthwise forward convolution of channels-last images, but takes five to twenty times
as long for some gradients. The gradient of the input is a forward convolution too: that of the output's gradient with
the flipped kernel. The arithmetic is the same up to the order of the sums.
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d


class DepthwiseConv2d(nn.Conv2d):
    """One k x k kernel for each of C channels, k odd, "same" padding: (N, C, H, W) to (N, C, ceil(H/stride), ...)."""

    def __init__(self, C: int, kernel_size: int, stride: int, padding: int, dilation: int):
        super().__init__(C, C, kernel_size, stride, padding, dilation, groups=C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # other devices and autocast's dtypes have kernels that are good as they are
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if plain and self.stride == (1, 1) and torch.is_grad_enabled():
            return _Depthwise.apply(x, self.weight, self.padding[0], self.dilation[0])
        return super().forward(x)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, padding: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.dilation = padding, dilation
        return conv2d(x, weight, None, 1, padding, dilation, len(weight))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        padding, dilation = ctx.padding, ctx.dilation
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d(grad, weight.flip(2, 3), None, 1, padding, dilation, len(weight))
        if ctx.needs_input_grad[1]:
            _, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, [1, 1], [padding] * 2, [dilation] * 2, False, [0, 0], len(weight),
                [False, True, False])
        return grad_x, grad_weight, None, None
