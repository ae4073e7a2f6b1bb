"""Test a network for small images: the published file of DARTS, or a checkpoint of train.py.

    python test.py --auxiliary --model_path cifar10_model.pt  # the published file
    python test.py                                            # the best network of train-EXP
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

from conas import cli
from conas.commands import test as measure

PAPER = measure.Published("cifar", "cifar10", {"top1_error": 2.63, "parameters": 3.3e6})

if __name__ == "__main__":
    import genotypes  # of this folder; the figures above are read from elsewhere too

    sys.exit(cli.run(lambda: measure.main(HERE, None, __doc__, PAPER, module=genotypes)))
