"""The cells over a search, as an animated picture.

    python -m conas.draw.animate cnn_space1/search-EXP             # writes cells/normal.gif and cells/reduce.gif there
    python -m conas.draw.animate cnn_space1/search-EXP --seconds 1 --out img

One frame an epoch; the last one stays for four times as long.
"""
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from conas.cli import Parser, run
from conas.darts.genotype import Genotype, load
from conas.draw.cell import Picture, cell_picture, defaults
from conas.errors import InputError
from conas.files import atomic_path

DPI, MARGIN = 110, 0.3  # inches above the cell, for the epoch


def genotypes_by_epoch(folder: Path) -> dict[int, Genotype]:
    """The cells of a search in `folder` after each epoch. Raises InputError if there are none."""
    found = {int(match[1]): load(path, None) for path in sorted((folder / "genotypes").glob("epoch_*.json"))
             if (match := re.fullmatch(r"epoch_(\d+)\.json", path.name))}
    if not found:
        raise InputError(f"{folder}: holds no genotypes of a search; name a folder cnn_spaceN/search-EXP")
    return dict(sorted(found.items()))


def animate(genotypes: dict[int, Genotype], folder: Path, seconds: float) -> list[Path]:
    """Write normal.gif and reduce.gif into `folder`; returns their paths."""
    written = []
    for kind, part in (("normal", slice(0, 2)), ("reduce", slice(2, 4))):
        with defaults():
            pictures = {epoch: cell_picture(*genotype[part]) for epoch, genotype in genotypes.items()}
            width, height = (max(picture.figure.get_size_inches()[i] for picture in pictures.values()) for i in (0, 1))
            frames = [_frame(picture, f"{kind} cell, epoch {epoch}", width, height + MARGIN)
                      for epoch, picture in pictures.items()]
        path = folder / f"{kind}.gif"
        pause = round(1000 * seconds)
        with atomic_path(path) as temporary:
            # disposal 1 and no optimising: frames stay whole, and equal searches are equal files
            frames[0].save(temporary, save_all=True, append_images=frames[1:], loop=0, disposal=1, optimize=False,
                           duration=[pause] * (len(frames) - 1) + [4 * pause])
        written.append(path)
    return written


def _frame(picture: Picture, title: str, width: float, height: float) -> Image.Image:
    """A cell from the lower left corner of a canvas of that many inches, in 64 colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    picture.figure.set_size_inches(width, height)
    picture.text(width / 2, height - MARGIN / 2, title, 9)
    picture.figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(picture.figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return Image.fromarray(np.ascontiguousarray(pixels)).quantize(64)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError for a folder without genotypes."""
    parser = Parser(prog="python -m conas.draw.animate", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a search, such as cnn_space1/search-EXP")
    parser.add_argument("--seconds", type=float, default=0.4, help="for which a frame is shown (default: 0.4)")
    parser.add_argument("--out", type=Path, help="folder for the pictures (default: cells, in the search's folder)")
    values = parser.parse_args(argv)
    if not 0.02 <= values.seconds <= 60:
        raise InputError(f"--seconds {values.seconds}: must be between 0.02 and 60")
    print(*animate(genotypes_by_epoch(values.folder), values.out or values.folder / "cells", values.seconds), sep="\n")


if __name__ == "__main__":
    sys.exit(run(main))
