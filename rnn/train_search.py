"""Search a recurrent cell.

    python train_search.py                                    # Penn Treebank in data/penn, second order, as DARTS
    python train_search.py --data ../data/wikitext-2          # any folder of train.txt, valid.txt and test.txt
    python train_search.py --dataset gospels --nhid 64 --batch_size 32 --epochs 3    # text that comes with the project
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

from architect import Architect
from model_search import Network

from conas import cli
from conas.recurrent import search as language_search

if __name__ == "__main__":
    sys.exit(cli.run(lambda: language_search.main(HERE, Network, Architect, __doc__)))
