"""What every result says of where it was measured, how measurements are summed up, and where results are written."""
import argparse
import json
import os
import platform
import statistics
from pathlib import Path

import torch

from conas.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def several(text: str) -> int:
    """The type of a flag for how many measurements `spread` is of. Fewer than 2 are refused."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text}: a spread needs 2 or more")
    return number


def spread(values: list[float]) -> dict[str, float]:
    """The median and the quartiles of 2 or more measurements."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartiles": [low, high]}


def processor() -> str:
    """The name of the CPU, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine(device: torch.device) -> dict:
    """The device, cores, threads, vectors and load of this machine, and the versions of what computes."""
    cuda = device.type == "cuda"
    return {"machine": {"device": torch.cuda.get_device_name(device) if cuda else processor(), "cores": os.cpu_count(),
                        "threads": torch.get_num_threads(), "vectors": torch.backends.cpu.get_cpu_capability(),
                        "load": round(os.getloadavg()[0], 1)},
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "cuda": torch.version.cuda if cuda else None}}


def stored(path: Path) -> dict:
    """The results that a file has so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(name: str, result: dict) -> Path:
    """Write benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    write_json(path, result)
    return path
