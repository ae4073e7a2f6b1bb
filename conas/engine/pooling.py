"""The gradient of average pooling of 3x3 pixels, written into memory that is there."""
import torch
from torch import Tensor

from conas.darts import operations


def average_pool_back(grad: Tensor, x: Tensor, stride: int, out: Tensor) -> None:
    """Into `out`, from the gradient by `average_pool` to that by x (N, C, H, W), of which only the shape is read."""
    H, W = out.shape[2:]
    if out.device.type in operations.RIGHT_GRADIENT:
        torch.ops.aten.avg_pool2d_backward.grad_input(grad, x, [3, 3], [stride] * 2, [1, 1], False, False, None,
                                                      grad_input=out)
        return
    shares = torch.addcmul(grad, grad, operations.missing_pixels(H, W, stride, grad.dtype, grad.device))
    if stride == 2:
        apart = shares.new_zeros(len(out), H, W, out.shape[1]).permute(0, 3, 1, 2)
        apart[:, :, ::2, ::2] = shares
        shares = apart
    torch.ops.aten.avg_pool2d.out(shares, [3, 3], [1, 1], [1, 1], False, True, None, out=out)
