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
from conas.recurrent.search import SearchRun


def main() -> None:
    with SearchRun(HERE, Network, Architect, __doc__) as run:     # flags, text, network, optimizers, checkpoints

        def iterate(train, valid, lr):                            # what a step of the search is
            run.alpha_step(train, valid, lr)                      # architect.py: equations 6 to 8, then Adam
            return run.weight_step(train, lr)                     # SGD on the cross-entropy of `train`

        for epoch in run.epochs():                                # a run that was stopped goes on where it was
            for train, valid, lr in run.steps(epoch):             # pieces of the training and the validation text
                run.do(iterate, train, valid, lr)
            run.end_epoch()                                       # validation, checkpoint, genotype


if __name__ == "__main__":
    sys.exit(cli.run(main))
