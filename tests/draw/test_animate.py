"""The animated cells: a frame an epoch, that shows the cell of that epoch."""
import numpy as np
import pytest
from PIL import Image, ImageSequence

from conas.darts import genotype
from conas.darts.published import GENOTYPES
from conas.draw import animate
from conas.errors import InputError


def test_a_frame_an_epoch(tmp_path):
    cells = [GENOTYPES[name] for name in ("DARTS_V1", "DARTS_V2", "DARTS_V1")]
    for epoch, cell in enumerate(cells):
        genotype.save(tmp_path / "genotypes" / f"epoch_{epoch:03d}.json", cell)
    (tmp_path / "genotypes" / "epoch_x.json").write_text("no epoch")
    animate.main([str(tmp_path), "--seconds", "0.5"])
    for kind in ("normal", "reduce"):
        with Image.open(tmp_path / "cells" / f"{kind}.gif") as file:
            frames = [(frame.info["duration"], np.asarray(frame.convert("L"), float)[60:])  # below the title
                      for frame in ImageSequence.Iterator(file)]
        assert [duration for duration, _ in frames] == [500, 500, 2000]
        pixels = [frame for _, frame in frames]
        assert abs(pixels[0] - pixels[2]).mean() < 0.5 < abs(pixels[0] - pixels[1]).mean()
        assert (pixels[0] < 128).mean() > 0.002  # something is drawn


def test_without_a_search(tmp_path):
    with pytest.raises(InputError, match="holds no genotypes"):
        animate.main([str(tmp_path)])
    with pytest.raises(InputError, match="--seconds nan"):
        animate.main([str(tmp_path), "--seconds", "nan"])
