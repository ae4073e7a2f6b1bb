"""The engine's one door: what computes a network's logits faster, or why nothing does.

On a CPU with a C compiler, kernels take what they know of a network, operation by operation, and the rest runs as it is
(conas/engine/native/). Elsewhere packed edges take a network that they know whole. All or nothing: what they compute is
right only where all that is summed is known to them, down to the class and the `forward` of every operation. Whatever
else runs by the definition in conas/darts/supernet.py.
"""
from torch import nn

from conas import distributed
from conas.darts.operations import FactorizedReduce, ReLUConvBN
from conas.darts.stems import is_stem
from conas.darts.supernet import MixedOp, SearchCell, Supernet
from conas.engine.batchnorm import convert
from conas.engine.edges import is_computed
from conas.engine.native.loader import kernels, why_no_kernels
from conas.engine.native.parts import has_hooks
from conas.engine.native.swap import NativePass, knows_any
from conas.engine.packed import PackedPass

Engine = PackedPass | NativePass

# What packed edges compute in place of: any other class, or a method that an instance or a class replaced, is unknown.
METHODS = {Supernet: ("forward", "shares", "with_weights", "packing", "flat", "flat_order", "alphas", "weights"),
           SearchCell: ("forward",), MixedOp: ("forward",)}


def why_not(network: nn.Module) -> str | None:
    """Say in words what packed edges do not know of a network, or return None if they know all of it."""
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
    hooked = [name for name, module in network.named_modules() if has_hooks(module)]
    return f"{hooked[0] or 'the network'} has a hook" if hooked else None


def accelerate(network: Supernet, synced: bool = False, wanted: bool = True, native: bool = True) -> Engine | None:
    """Let an engine compute `network.with_weights`, if it is wanted and knows the network; else return None.

    `synced` lets BatchNorm in training be by the images of all processes, with or without an engine; kernels have none
    of that. Without `native` there are no kernels. To be called before an architect or an optimizer of flat weights is
    made, since the order of `network.flat()` changes.
    """
    return engine_or_reason(network, synced, wanted, native)[0]


def engine_or_reason(network: Supernet, synced: bool, wanted: bool, native: bool = True
                     ) -> tuple[Engine | None, str | None]:
    """What `accelerate` returns, and in words why packed edges do not take the network, or None if they do."""
    reason = why_not(network) if wanted else "--no-engine"
    engine = packed = PackedPass(network) if reason is None else None
    if wanted and native and why_no_kernels_for(network, synced) is None:
        engine = NativePass(network, kernels(), packed)
    if engine is None:
        if synced:
            convert(network)
        return None, reason
    engine.synced = synced
    network.with_weights = engine.logits
    network.flat_order(engine.order)
    return engine, reason


def why_no_kernels_for(network: nn.Module, synced: bool = False) -> str | None:
    """Say in words why kernels take nothing of a network, or return None if they do."""
    if not isinstance(network, Supernet):
        return f"a {type(network).__name__} is no Supernet"
    device = next(network.parameters()).device.type
    if device != "cpu":
        return f"they are for CPUs, not for {device}"
    if synced and distributed.size() > 1:
        return "--sync_bn: they have no BatchNorm by the images of all processes"
    for name in METHODS[Supernet][2:]:  # `forward` and `shares` run as they are
        if (name in vars(network) and name != "with_weights") or getattr(type(network), name) is not getattr(
                Supernet, name):
            return f"{type(network).__name__} has a {name} of its own"
    if not knows_any(network):
        return "they know none of its operations"
    return why_no_kernels()


def describe(network: Supernet, engine: Engine | None, reason: str | None, synced: bool = False) -> list[str]:
    """Lines for the log of a run: what computes the network, and why nothing faster does."""
    definition = "conas/darts/supernet.py"
    if engine is None:
        return [f"the engine is off ({reason}): the whole network runs by its definition, {definition}"]
    if isinstance(engine, NativePass):
        return [] if reason is None else [f"packed edges are off ({reason}): kernels compute what they know, and the "
                                          f"rest runs by its definition, {definition}"]
    why = why_no_kernels_for(network, synced)
    on_cpu = next(network.parameters()).device.type == "cpu"
    return [f"no kernels in C ({why}): torch's operators compute the network"] if on_cpu and why else []
