"""Train published cells from scratch, by default DARTS' second-order cells.

    python train.py --auxiliary --cutout                      # CIFAR-10, the settings of DARTS
    python train.py --auxiliary --dataset imagenet            # ImageNet, the settings of DARTS
    python train.py --arch AmoebaNet                          # or NASNet, DARTS_V1, FILE.json
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

import genotypes

from conas import cli
from conas.commands import train

if __name__ == "__main__":
    sys.exit(cli.run(lambda: train.main(HERE, genotypes, __doc__, default="DARTS")))
