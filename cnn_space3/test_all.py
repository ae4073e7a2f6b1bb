"""Test every checkpoint of this space's search, epoch by epoch.

    python test_all.py                                        # the run in search-EXP
    python test_all.py --save NAME                            # the run in search-NAME
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

from model_search import Network

from conas import cli, evaluate

if __name__ == "__main__":
    sys.exit(cli.run(lambda: evaluate.main(HERE, Network, __doc__)))
