"""How long a committee takes, from random logits to its figures, selection and intervals: under 10 s is the target.

One thread is enough for that; more threads than there are free cores take longer than one.

    python -m benchmarks.committee                            # 50 epochs x 3 spaces x 10,000 images x 10 classes
    python -m benchmarks.committee --epochs 600
"""
import argparse
import os
import time

import torch

from conas.runs.scores import Scores
from ensemble.combine.committee import Committee
from ensemble.combine.fit import fit
from ensemble.measure.metrics import softmax
from ensemble.measure.significance import SAMPLES, compare
from ensemble.report import report

SPACES = "cnn_space1", "cnn_space2", "cnn_space3"


def random_scores(space: int, epoch: int, split: str, images: int, classes: int) -> Scores:
    """Scores of a network that is right on about two images of three."""
    labels = torch.arange(images) % classes
    logits = 2 * torch.randn(images, classes, generator=torch.Generator().manual_seed(1000 * epoch + 10 * space))
    logits[torch.arange(images), labels] += 3.5
    return Scores(logits, labels, SPACES[space], "search", epoch, 0, split, f"{space} {epoch}", "random", split,
                  [str(k) for k in range(classes)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("epochs", 50), ("images", 10_000), ("classes", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = options.images, options.classes
    test, valid = ([{f"{name} {epoch:03d}": random_scores(space, epoch, split, *size)
                     for space, name in enumerate(SPACES)} for epoch in range(options.epochs)]
                   for split in ("test", "valid"))
    pool, tested = ({name: scores for members in epochs for name, scores in members.items()}
                    for epochs in (valid, test))
    paths, total = dict.fromkeys(pool, ""), 0.0

    def timed(title, function, *arguments, **settings):
        nonlocal total
        began = time.perf_counter()
        result = function(*arguments, **settings)
        seconds = time.perf_counter() - began
        total += seconds
        print(f"{seconds:7.2f} s  {title}", flush=True)
        return result

    print(f"{options.epochs} epochs x 3 spaces x {options.images} images x {options.classes} classes, "
          f"{options.threads} threads on {os.cpu_count()} cores, torch {torch.__version__}")
    entries = timed("figures of all members and committees", lambda: [
        report.evaluate(Committee(members), paths) for members in test])
    fitted = timed(f"greedy selection of 10 members from {len(pool)}, and temperatures", fit, pool, "greedy")
    committee = timed("the committee's figures on the test images", lambda: fitted.committee(tested))
    entries.append(report.evaluate(committee, paths, fitted))
    best = softmax(tested[fitted.best_member].logits)
    timed(f"intervals of {SAMPLES} resamples and McNemar test", compare, committee.probabilities, best,
          committee.labels)
    print(f"{total:7.2f} s  in all")


if __name__ == "__main__":
    main()
