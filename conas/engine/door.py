"""The engine's one door: it takes a network that it knows whole, or says why not and leaves it as it is.

All or nothing: what packed edges compute is right only where all that is summed is known to them, down to the class and
the `forward` of every operation. Whatever else runs by the definition in conas/darts/supernet.py.
"""
from torch import nn

from conas.darts.operations import FactorizedReduce, ReLUConvBN
from conas.darts.stems import is_stem
from conas.darts.supernet import MixedOp, SearchCell, Supernet
from conas.engine.batchnorm import convert
from conas.engine.edges import is_computed
from conas.engine.packed import PackedPass

# What packed edges compute in place of: any other class, or a method that an instance or a class replaced, is unknown.
METHODS = {Supernet: ("forward", "shares", "with_weights", "packing", "flat", "flat_order", "alphas", "weights"),
           SearchCell: ("forward",), MixedOp: ("forward",)}


def why_not(network: nn.Module) -> str | None:
    """Say in words what the engine does not know of a network, or return None if it knows all of it."""
    if not isinstance(network, Supernet):
        return f"a {type(network).__name__} is no Supernet"
    if network.primitives.restricted:
        return "not all edges have the same operations"
    parts = [(network, Supernet), *((cell, SearchCell) for cell in network.cells)]
    parts += [(mixed, MixedOp) for cell in network.cells for mixed in cell._ops]
    for module, known in parts:
        if not isinstance(module, known):
            return f"{type(module).__name__} is a class of its own"
        for name in METHODS[known]:
            replaced = name in vars(module) and not getattr(vars(module)[name], "same_numbers", False)
            if replaced or getattr(type(module), name) is not getattr(known, name):
                return f"{type(module).__name__} has a {name} of its own"
    if not is_stem(network):
        return "its stem is another"
    for cell in network.cells:
        if type(cell.preprocess0) not in (FactorizedReduce, ReLUConvBN) or type(cell.preprocess1) is not ReLUConvBN:
            return "a cell preprocesses its inputs in another way"
        for mixed in cell._ops:
            for name, operation in zip(network.primitives, mixed._ops):
                if not is_computed(name, operation):
                    return f"it does not know the operation {name} ({type(operation).__name__})"
    hooked = [name for name, module in network.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    return f"{hooked[0] or 'the network'} has a hook" if hooked else None


def accelerate(network: Supernet, synced: bool = False, wanted: bool = True) -> PackedPass | None:
    """Let the engine compute `network.with_weights`, if it is wanted and knows the network; else return None.

    `synced` lets BatchNorm in training be by the images of all processes, with or without the engine. To be called
    before an architect or an optimizer of flat weights is made, since the order of `network.flat()` changes.
    """
    return engine_or_reason(network, synced, wanted)[0]


def engine_or_reason(network: Supernet, synced: bool, wanted: bool) -> tuple[PackedPass | None, str | None]:
    """What `accelerate` returns, and, if that is None, the reason in words."""
    reason = why_not(network) if wanted else "--no-engine"
    if reason is not None:
        if synced:
            convert(network)
        return None, reason
    packed = PackedPass(network)
    packed.synced = synced
    network.with_weights = packed.logits
    network.flat_order(packed.order)
    return packed, None
