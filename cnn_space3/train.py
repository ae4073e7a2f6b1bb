"""Train the cells that this space's search found, from scratch and at full size.

    python train.py --auxiliary --cutout                      # the cells of search-EXP, CIFAR-10, the settings of DARTS
    python train.py --arch NAME                               # other cells, or --arch FILE.json
    python train.py --auxiliary --dataset imagenet            # 224 pixels, the settings of DARTS for ImageNet
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

import genotypes

from conas import cli
from conas.commands.train import TrainRun


def main() -> None:
    with TrainRun(HERE, genotypes, __doc__) as run:               # flags, data, network, optimizer, checkpoints

        def iterate(batch, lr):                                   # what a step of training is
            return run.weight_step(batch, lr)                     # SGD on the cross-entropy; --auxiliary adds its own

        for epoch in run.epochs():                                # a run that was stopped goes on where it was
            for batch, lr in run.steps(epoch):                    # augmented batches; --patience may end the training
                run.do(iterate, batch, lr)
            run.end_epoch()                                       # validation on held-out images, checkpoint


if __name__ == "__main__":
    sys.exit(cli.run(main))
