"""What every result says of where it was measured, and where it is written."""
import os
import platform
from pathlib import Path

import torch

from benchmarks.train_step import RESULTS, processor
from conas.files import write_json


def machine(device: torch.device) -> dict:
    """The device, cores, threads and load of this machine, and the versions of what computes."""
    cuda = device.type == "cuda"
    return {"machine": {"device": torch.cuda.get_device_name(device) if cuda else processor(), "cores": os.cpu_count(),
                        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)},
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "cuda": torch.version.cuda if cuda else None}}


def write(name: str, result: dict) -> Path:
    """Write benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    write_json(path, result)
    return path
