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
from conas.commands.search import SearchRun


def main() -> None:
    with SearchRun(HERE, Network, Architect, __doc__) as run:     # flags, data, network, optimizers, checkpoints

        def iterate(train, valid, lr):                            # a function, so that one CUDA graph can record it
            run.alpha_step(train, valid, lr)                      # architect.py: equations 6 to 8, then Adam
            return run.weight_step(train, lr)                     # SGD on the cross-entropy of `train`

        for epoch in run.epochs():                                # a run that was stopped goes on where it was
            for train, valid, lr in run.steps(epoch):             # batches of both halves of the training images
                run.do(iterate, train, valid, lr)
            run.end_epoch()                                       # validation, checkpoint, genotype


if __name__ == "__main__":
    sys.exit(cli.run(main))
