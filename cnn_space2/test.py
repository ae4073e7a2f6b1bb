"""Test one network of this space: accuracy, size and speed.

    python test.py                                            # the best network of train-EXP
    python test.py --model_path FILE                          # any checkpoint of this space
    python test.py --export weights.safetensors               # and write it for others to use
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

from model_search import Network

from conas import cli
from conas.commands import test as measure

if __name__ == "__main__":
    sys.exit(cli.run(lambda: measure.main(HERE, Network, __doc__)))
