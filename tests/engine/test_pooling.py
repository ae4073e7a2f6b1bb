"""Average pooling of our own, where a library's gradient is wrong, against the CPU's."""
import pytest
import torch

from conas.darts import operations
from conas.engine import pooling


def gradients(x, stride, grad):
    """The result, and the gradient twice: by autograd, and into memory that is there."""
    x = x.detach().requires_grad_()
    y = operations.average_pool(x, stride)
    grad = grad.to(x.device)
    out = torch.full_like(x, 7)
    pooling.average_pool_back(grad, x.detach(), stride, out)
    return y, *torch.autograd.grad(y, x, grad), out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device"))])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 8), (7, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_forward_and_gradient(device, stride, size, memory_format, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=memory_format)
    y = torch.nn.functional.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
    grad = torch.randn_like(y)
    expected = torch.ops.aten.avg_pool2d_backward(grad, x, [3, 3], [stride] * 2, [1, 1], False, False, None)
    for right in ("cpu",), ():
        monkeypatch.setattr(operations, "RIGHT_GRADIENT", right)
        found = gradients(x.to(device), stride, grad)
        for ours, of_torch in zip(found, (y, expected, expected)):
            torch.testing.assert_close(ours.cpu(), of_torch, rtol=1e-12, atol=1e-14)
