"""Depthwise convolutions of derived networks on a CPU.

The library there takes fifty times as long for the gradient w.r.t. the weights as for the output.
"""
from functools import partial

import torch
from torch import Tensor, nn

from conas.engine.depthwise import blockwise, convolve_back, goes_by_phases
from conas.engine.manual_grad import Tape, with_manual_grad


def fast_depthwise(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The `forward` of a depthwise nn.Conv2d of odd k and "same" padding: (N, C, H, W) to (N, C, H', W')."""
    maps = x.permute(0, 2, 3, 1)[None]
    if torch.compiler.is_compiling():  # a compiler finds gradients itself
        return nn.Conv2d.forward(module, x)
    if goes_by_phases(maps, module.stride[0], module.dilation[0]):
        (out,) = blockwise(maps, module.weight, 1, 2)
        return out[0].permute(0, 3, 1, 2)
    # other devices and autocast's dtypes have kernels that are good as they are
    plain = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    if plain and module.stride == (1, 1) and torch.is_grad_enabled():
        return with_manual_grad(partial(_run, module), x, module.weight)
    return nn.Conv2d.forward(module, x)


def _run(module: nn.Conv2d, tape: Tape, x: Tensor, weight: Tensor):
    x_wanted, weight_wanted = tape.wanted
    out, shape = nn.Conv2d.forward(module, x), x.permute(0, 2, 3, 1)[None].shape
    kept, kept_weight, dilation = tape.keep(x if weight_wanted else None), tape.keep(weight), module.dilation[0]

    def back(grad):
        states = kept().permute(0, 2, 3, 1)[None] if weight_wanted else None
        weight = kept_weight()
        d_x, d_weight = convolve_back(grad.permute(0, 2, 3, 1)[None], shape, states, [weight], [weight.flip(2, 3)],
                                      1, dilation, x_wanted)
        return d_x[0].permute(0, 3, 1, 2) if x_wanted else None, d_weight[0] if weight_wanted else None

    return out, back


def is_depthwise(module: nn.Module) -> bool:
    """Return True for a plain nn.Conv2d that `fast_depthwise` computes."""
    if type(module) is not nn.Conv2d or module.bias is not None or module.padding_mode != "zeros":
        return False
    (k, width), dilation = module.kernel_size, module.dilation[0]
    same = (dilation * (k // 2),) * 2
    return (module.groups == module.in_channels == module.out_channels and k == width and k % 2 == 1
            and module.dilation == (dilation, dilation) and dilation in (1, 2) and module.padding == same
            and module.stride in ((1, 1), (2, 2)) and "forward" not in vars(module))


def accelerate_convolutions(network: nn.Module) -> nn.Module:
    """Let every depthwise convolution of a network compute by `fast_depthwise`, in place. Returns the network.

    The modules stay nn.Conv2d, since counters as thop and ptflops know exact classes and count 0 for a subclass.
    """
    for module in network.modules():
        if is_depthwise(module):
            module.forward = partial(fast_depthwise, module)
    return network
