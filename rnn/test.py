"""Test a language model: perplexity of the test text, size and speed.

    python test.py                                            # the best network of train-EXP
    python test.py --model_path ptb_model.pt                  # the published file, on data/penn
    python test.py --model_path ptb_model.pt --export ptb.pt  # and write it to a file that is safe to load
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

import genotypes
from model_search import Network

from conas import cli
from conas.recurrent import test as language_test

if __name__ == "__main__":
    sys.exit(cli.run(lambda: language_test.main(HERE, Network, genotypes, __doc__)))
