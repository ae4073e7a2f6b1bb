"""Test every checkpoint of this space, epoch by epoch: the supernets of its search, and its retrained networks.

    python test_all.py                                        # the runs in search-EXP and train-EXP
    python test_all.py --save NAME                            # the runs in search-NAME and train-NAME
    python test_all.py --stage train                          # the retrained networks only
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

from model_search import Network

from conas import cli
from conas.commands import scoring as evaluate

if __name__ == "__main__":
    sys.exit(cli.run(lambda: evaluate.main(HERE, Network, __doc__)))
