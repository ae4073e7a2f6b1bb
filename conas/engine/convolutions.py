"""Depthwise convolutions of derived networks on a CPU.

The library there takes fifty times as long for the gradient w.r.t. the weights as for the output.
"""
import torch
from torch import Tensor, nn

from conas.engine.depthwise import blockwise, convolve_back, goes_by_phases
from conas.engine.manual_grad import Tape, with_manual_grad


class FastDepthwiseConv2d(nn.Conv2d):
    """A depthwise nn.Conv2d of odd k and "same" padding: (N, C, H, W) to (N, C, ceil(H/stride), ...)."""

    def forward(self, x: Tensor) -> Tensor:
        maps = x.permute(0, 2, 3, 1)[None]
        if torch.compiler.is_compiling():  # a compiler finds gradients itself
            return super().forward(x)
        if goes_by_phases(maps, self.stride[0], self.dilation[0]):
            (out,) = blockwise(maps, self.weight, 1, 2)
            return out[0].permute(0, 3, 1, 2)
        # other devices and autocast's dtypes have kernels that are good as they are
        plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if plain and self.stride == (1, 1) and torch.is_grad_enabled():
            return with_manual_grad(self._run, x, self.weight)
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


def is_depthwise(module: nn.Module) -> bool:
    """Return True for a plain nn.Conv2d that `FastDepthwiseConv2d` computes."""
    if type(module) is not nn.Conv2d or module.bias is not None or module.padding_mode != "zeros":
        return False
    (k, width), dilation = module.kernel_size, module.dilation[0]
    same = (dilation * (k // 2),) * 2
    return (module.groups == module.in_channels == module.out_channels and k == width and k % 2 == 1
            and module.dilation == (dilation, dilation) and dilation in (1, 2) and module.padding == same
            and module.stride in ((1, 1), (2, 2)) and "forward" not in vars(module))


def accelerate_convolutions(network: nn.Module) -> nn.Module:
    """Make every depthwise convolution of a network a `FastDepthwiseConv2d`, in place. Returns the network."""
    for module in network.modules():
        if is_depthwise(module):
            module.__class__ = FastDepthwiseConv2d
    return network
