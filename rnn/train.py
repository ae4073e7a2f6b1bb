"""Train a recurrent cell from scratch.

    python train.py                                           # Penn Treebank, the settings of DARTS
    python train.py --arch DARTS_V1                           # another cell, or --arch FILE.json
    python train.py --data ../data/wikitext-2 --dropouth 0.15 --nhid 700 --wdecay 5e-7    # as DARTS for WikiText-2
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

import genotypes

from conas import cli
from conas.recurrent import train as language_train

if __name__ == "__main__":
    sys.exit(cli.run(lambda: language_train.main(HERE, genotypes, __doc__)))
