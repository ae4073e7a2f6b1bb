"""What comes before a supernet's first cell: one convolution, or three that leave an eighth of a large image's side.

The stem "imagenet" is that of PC-DARTS' search on ImageNet (arXiv:1907.05737): at 224 pixels the cells then see 28.
"""
from torch import Tensor, nn

from conas.darts.batchnorm import has_own_forward

STEMS = "cifar", "imagenet"


def stems(kind: str, in_channels: int, C: int) -> dict[str, nn.Sequential]:
    """Modules with C output channels, by their names in a network; `kind` is of STEMS. C is even."""
    if kind == "cifar":
        return {"stem": nn.Sequential(*_convolution(in_channels, C, 1))}
    first = _convolution(in_channels, C // 2, 2)
    return {"stem0": nn.Sequential(*first, nn.ReLU(), *_convolution(C // 2, C, 2)),
            "stem1": nn.Sequential(nn.ReLU(), *_convolution(C, C, 2))}


def add_stem(network: nn.Module, kind: str, in_channels: int, C: int) -> None:
    """Give a network the modules of `stems`."""
    for name, module in stems(kind, in_channels, C).items():
        network.add_module(name, module)


def stem_outputs(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The two inputs of the first cell for images x (N, in_channels, H, W)."""
    if hasattr(network, "stem"):
        return (network.stem(x),) * 2
    s0 = network.stem0(x)
    return s0, network.stem1(s0)


def _convolution(C_in: int, C_out: int, stride: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(C_in, C_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(C_out)


def convolutions(network: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """A network's stem as convolutions with their BatchNorms, each followed by ReLU.

    The last two give the two inputs of the first cell; where there is only one, it gives both.
    """
    modules = [*network.stem] if hasattr(network, "stem") else [*network.stem0, *network.stem1]
    kept = [module for module in modules if not isinstance(module, nn.ReLU)]
    return list(zip(kept[::2], kept[1::2]))


def is_stem(network: nn.Module) -> bool:
    """Return True if a network's stem is one of STEMS, down to the class, size and padding of every part."""
    found = {name: part for name, part in network.named_children() if name.startswith("stem")}
    if list(found) not in (["stem"], ["stem0", "stem1"]) or {type(part) for part in found.values()} != {nn.Sequential}:
        return False
    parts = [part for stem in found.values() for part in stem]
    norm = nn.Conv2d, nn.BatchNorm2d
    known = norm if "stem" in found else (*norm, nn.ReLU, *norm, nn.ReLU, *norm)
    if tuple(map(type, parts)) != known or any(map(has_own_forward, (*found.values(), *parts))):
        return False
    stride = (1, 1) if "stem" in found else (2, 2)
    wanted = (3, 3), stride, (1, 1), (1, 1), 1, None, "zeros"
    return all((part.kernel_size, part.stride, part.padding, part.dilation, part.groups, part.bias, part.padding_mode)
               == wanted for part in parts if type(part) is nn.Conv2d)
