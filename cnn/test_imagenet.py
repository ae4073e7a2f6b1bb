"""Test a network for photographs: the published ImageNet file of DARTS, or a checkpoint of train.py.

    python test_imagenet.py --auxiliary --model_path imagenet_model.pt   # the published file, data/imagenet/val
    python test_imagenet.py                                              # the best network of train-EXP
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the repository, so that a bare clone runs from any folder

from conas import cli
from conas.commands import test as measure

PAPER = measure.Published("imagenet", "imagenet", {"top1_error": 26.7, "top5_error": 8.7, "parameters": 4.7e6},
                          images=50_000, classes=1000)

if __name__ == "__main__":
    import genotypes  # of this folder; the figures above are read from elsewhere too

    sys.exit(cli.run(lambda: measure.main(HERE, None, __doc__, PAPER, module=genotypes)))
