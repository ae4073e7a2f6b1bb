"""Train the cells that this space's search found, from scratch and at full size.

    python train.py --auxiliary --cutout                      # the cells of search-EXP, CIFAR-10, the settings of DARTS
    python train.py --arch NAME                               # other cells, or --arch FILE.json
    python train.py --auxiliary --dataset imagenet            # 224 pixels, the settings of DARTS for ImageNet
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

import genotypes

from conas import cli
from conas.commands import train

if __name__ == "__main__":
    sys.exit(cli.run(lambda: train.main(HERE, genotypes, __doc__)))
