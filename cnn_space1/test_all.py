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
from conas.commands.test_all import runs_to_test


def main() -> None:
    for run in runs_to_test(HERE, Network, __doc__):          # search-NAME and train-NAME, as far as they exist
        for epoch, checkpoint in run.checkpoints():
            scores = run.scores(checkpoint)                   # logits of all test images, stored beside the checkpoint
            run.add(epoch, scores, loss=scores.loss(), top1=scores.top(1), top5=scores.top(5))
        run.finish()                                          # test_all.csv, and the best network of a training


if __name__ == "__main__":
    sys.exit(cli.run(main))
