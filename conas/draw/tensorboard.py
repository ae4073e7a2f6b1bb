"""A search in TensorBoard: scalars, alphas and pictures of the cells, by epoch. Needs the package tensorboard.

    tensorboard --logdir cnn_space1
"""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conas.darts.genotype import NODES, Genotype
from conas.darts.primitives import KINDS, Primitives
from conas.draw.cell import cell_picture, defaults
from conas.errors import InputError

EDGES = [f"{source}_to_{2 + node}" for node in range(NODES) for source in range(2 + node)]  # states, as in DARTS


HEALTH = "skips", "cell_parameters", "curvature"


class Board:
    """The folder `tensorboard` of a run. Raises InputError without the package."""

    def __init__(self, folder: Path):
        self.writer = summary_writer()(str(folder / "tensorboard"))
        self.drawn: Genotype | None = None

    def epoch(self, row: Mapping[str, float], alphas: Mapping[str, Tensor], primitives: Sequence[str],
              genotype: Genotype) -> None:
        """Write the end of an epoch: a line of metrics.jsonl, the alphas (EDGES, P) by name, and the cells, if new."""
        epoch = int(row["epoch"])
        for name, value in row.items():
            if name == "margins":
                for kind, values in value.items():
                    for edge, margin in zip(EDGES, values):
                        self.writer.add_scalar(f"margin/{kind}/{edge}", margin, epoch)
            elif name != "epoch" and not name.startswith("entropy_"):  # which follows below, from the alphas
                self.writer.add_scalar(f"health/{name}" if name in HEALTH else name.replace("_", "/", 1), value, epoch)
        for name, values in alphas.items():
            if name.removeprefix("alphas_") not in KINDS:  # of a space's own cell
                self.writer.add_histogram(name, values.detach().flatten(), epoch)
                continue
            probabilities = Primitives(primitives).shares(name.removeprefix("alphas_"), values.detach().double().cpu())
            entropy = torch.special.entr(probabilities).sum(dim=-1).mean().item()
            self.writer.add_scalar(f"entropy/{name}", entropy, epoch)
            self.writer.add_histogram(name, probabilities.flatten(), epoch)
            for edge, of_edge in zip(EDGES, probabilities.tolist()):
                for primitive, value in zip(primitives, of_edge):
                    self.writer.add_scalar(f"{name}/{edge}/{primitive}", value, epoch)
        if genotype != self.drawn:
            self.drawn = genotype
            for kind, cell in (("normal", genotype[:2]), ("reduce", genotype[2:])):
                self.writer.add_image(f"cell/{kind}", _pixels(*cell), epoch, dataformats="HWC")
        self.writer.flush()


def summary_writer() -> type:
    """torch's SummaryWriter. Raises InputError without the package that it needs."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package that is not installed; pip install tensorboard") from error
    return SummaryWriter


def _pixels(edges, concat) -> np.ndarray:
    """A drawn cell, uint8 (H, W, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    with defaults():
        canvas = FigureCanvasAgg(cell_picture(edges, concat).figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
