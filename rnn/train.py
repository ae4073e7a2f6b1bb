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
from conas.recurrent.train import TrainRun


def main() -> None:
    with TrainRun(HERE, genotypes, __doc__) as run:               # flags, text, network, optimizer, checkpoints

        def iterate(batch, lr):                                   # what a step of training is
            loss = run.weight_step(batch, lr)                     # SGD on the cross-entropy with its regularisers
            run.average_weights()                                 # ASGD, once the validation text improves no more
            return loss

        for epoch in run.epochs():                                # a run that was stopped goes on where it was
            for batch, lr in run.steps(epoch):                    # pieces of the text, one after another
                run.do(iterate, batch, lr)
            run.end_epoch()                                       # validation, checkpoint


if __name__ == "__main__":
    sys.exit(cli.run(main))
