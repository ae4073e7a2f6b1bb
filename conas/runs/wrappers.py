"""Names of tensors as other programs save them: without the prefixes of wrappers, and compared with a network's own."""
from collections.abc import Mapping

from torch import Tensor

from conas.errors import InputError, one_line

# torch.compile, DataParallel and DistributedDataParallel, FSDP, checkpoint_wrapper: each may wrap any part of a network
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
OWNERS = {"model", "net", "network"}  # attributes of Lightning modules and the like that hold a whole network
HOLDERS = ("state_dict", "model_state_dict", "state", "model", "net", "network")  # keys of a file that holds more
COUNTER = "n_averaged"  # torch.optim.swa_utils.AveragedModel's own
LISTED = 3


def unwrapped(path: object, state: dict) -> dict:
    """A `state_dict` with the names that the network has by itself, whatever wrapped it or parts of it.

    Raises InputError if two different tensors then have one name.
    """
    if not state or not all(isinstance(name, str) for name in state):
        return state
    parts = {name: [part for part in name.split(".") if part not in WRAPPERS] for name in state}
    if any(name.split(".")[0] in WRAPPERS for name in state):
        parts.pop(COUNTER, None)
    while parts and all(len(own) > 1 and own[0] in OWNERS and own[0] == next(iter(parts.values()))[0]
                        for own in parts.values()):
        parts = {name: own[1:] for name, own in parts.items()}
    found = {}
    for name, own in parts.items():
        own = ".".join(own)
        if own in found:
            raise InputError(f"{path}: has {one_line(own, 200)} twice, once as {one_line(name, 200)}; "
                             "replace it with an intact copy")
        found[own] = state[name]
    return found


def differences(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """In what a `state_dict` is not one of the network that has `own`: the first names of each kind, in words.

    BatchNorm's counters do not count: old files have none.
    """
    kinds = {"missing": [name for name in own if name not in state and not name.endswith("num_batches_tracked")],
             "unexpected": [name for name in state if name not in own],
             "of another shape": [f"{name} ({_shape(state[name])} and not {_shape(own[name])})" for name in own
                                  if name in state and state[name].shape != own[name].shape]}
    return "; ".join(f"{kind}: {', '.join(one_line(name, 200) for name in names[:LISTED])}"
                     + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
                     for kind, names in kinds.items() if names)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"
