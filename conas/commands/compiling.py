"""Whether a training is computed by torch.compile: --compile on, off or auto of train.py."""
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conas import distributed
from conas.errors import InputError
from conas.files import write_json
from conas.runs.folder import begun_with, read_record
from conas.runs.progress import snapshot

if TYPE_CHECKING:
    from conas.commands.train import TrainRun

# Measured with DARTS_V2 in float32, one thread (docs/retraining.md)
SPEED = {"kernels": 1.92, "torch.compile": 1.45}  # of a step, over that of plain modules
SECONDS = (196 + 100) / 6  # that compiling takes for each cell: in epoch 0, and in the next, the first with drop path
CLEARLY = 3    # times the steps in which that is won back must be left
RECORD = "compiled"  # in args.json: what auto has chosen


def asked(flag: str, folder: Path) -> bool | None:
    """Whether --compile asks for it; for auto what the run in `folder` did before, or None if that is still open.

    Raises InputError for a damaged args.json.
    """
    if flag != "auto":
        return flag == "on"

    def find() -> bool | None:
        path = folder / "args.json"
        if not path.exists():
            return None
        found = read_record(folder).get(RECORD)
        if type(found) not in (bool, type(None)):
            raise InputError(f"{path}: damaged; its {RECORD!r} is neither true nor false")
        return found

    found = distributed.from_rank0(find)
    return True if found is None and begun_with(folder).get("compile") in (True, "on") else found


def settled(run: "TrainRun", left: int) -> bool:
    """Whether to compile a run of which `left` steps are left. What auto chooses is logged, and kept in args.json."""
    if run.flags.compile != "auto":
        return run.compiled
    compiled, why = run.compiled, f"{'yes' if run.compiled else 'no'}, as before in this run"
    if run.flags.sync_bn and distributed.size() > 1:
        compiled, why = False, "no: what --sync_bn sends between processes cannot be compiled"
    elif compiled is None:
        compiled, why = choose(run, left)
    run.log(f"--compile auto: {why}")
    path = run.folder / "args.json"
    if distributed.rank() == 0 and (content := read_record(run.folder)).get(RECORD) is not compiled:
        write_json(path, content | {RECORD: compiled})
    return compiled


def choose(run: "TrainRun", left: int) -> tuple[bool, str]:
    """Whether compiling is won back, and why, in words. Processes of one run get what the first of them finds."""
    if run.by_kernels:
        return False, (f"no, by kernels: where it was measured, a step was {SPEED['kernels']:.2f} times as fast by "
                       f"them as by plain modules, and {SPEED['torch.compile']:.2f} times by torch.compile")
    if run.device.type != "cpu" or run.amp:
        return False, (f"no: what it gains on {run.device.type}{' in bfloat16' if run.amp else ''} was not measured; "
                       "--compile on compiles all the same")
    flags, size = run.flags, -(-run.flags.batch_size // distributed.size())
    x = torch.zeros(size, run.network.arguments["in_channels"], flags.image_size, flags.image_size)
    step = distributed.from_rank0(lambda: pass_seconds(run.network, x.contiguous(memory_format=torch.channels_last)))
    return decide(SECONDS * flags.layers, step, left)


def decide(compiling: float, step: float, left: int) -> tuple[bool, str]:
    """Whether `compiling` seconds are won back in `left` steps, which take `step` seconds each without, in words."""
    even = math.ceil(compiling / (step * (1 - 1 / SPEED["torch.compile"])))
    why = f"about {compiling:.0f} s of compiling are won back after {even} steps of {step:.2g} s, and {left} are left"
    if left > CLEARLY * even:
        return True, f"yes: {why}"
    return False, f"no: {why}; it is used from {CLEARLY} times as many on"


def pass_seconds(network: nn.Module, x: Tensor) -> float:
    """Seconds of a pass in training, forwards and backwards, which leaves no trace in network or random generators."""
    before, training = snapshot(network), network.training
    network.train()
    with torch.random.fork_rng(devices=[]):
        for _ in range(2):  # the first chooses kernels
            began = time.perf_counter()
            outputs = network(x)
            sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
            seconds = time.perf_counter() - began
    for parameter in network.parameters():
        parameter.grad = None
    for buffer, value in before:
        buffer.copy_(value)
    network.train(training)
    return seconds
