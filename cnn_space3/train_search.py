"""Search a cell in this space.

    python train_search.py                                    # CIFAR-10, second order, the settings of DARTS
    python train_search.py --dataset digits --epochs 10       # real images that come with the project
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

from architect import Architect
from model_search import Network

from conas import cli
from conas.commands import search

if __name__ == "__main__":
    sys.exit(cli.run(lambda: search.main(HERE, Network, Architect, __doc__)))
