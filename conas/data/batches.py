"""Endless streams of training batches that can start at any step: a batch is a function of the seed and its number."""
from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor

from conas import distributed
from conas.data import imagenet_augment
from conas.data.augment import crop_and_flip, cutout, draw, least_visible, mirrored_classes, normalise
from conas.data.images import ImageSet
from conas.data.splits import generator, stratified_split
from conas.errors import InputError

__all__ = ["Stream", "stratified_split"]


class Stream:
    """Shuffled, augmented batches of one part of an image set, for a whole run.

    `indices` (n,) select the part and `name` tells its random numbers from those of other streams with the same
    `seed`. Every epoch shows each image once; its last batch may be short, unless `drop_last`. `workers` processes
    decode images that are too many for memory; they change nothing in the batches. Images are shifted and mirrored
    as small images are; with a `crop`, they are cut to that many pixels and coloured as photographs are. `flip` decides
    whether they are mirrored (default: as suits the data set), `cutout_length` is the side of Cutout's square, 0 for
    none. Raises InputError for an empty part, a batch larger than the part, and a square that can hide all of an image.

    Each of several processes gets its part of every batch: batches are the same for any number of processes. Raises
    InputError if a batch has not two images for each.
    """

    def __init__(self, images: ImageSet, indices: Tensor, batch_size: int, *, name: str, seed: int,
                 device: torch.device | str, augment: bool = True, cutout_length: int = 0, crop: int | None = None,
                 flip: bool | None = None, drop_last: bool = False, workers: int = 0):
        if len(indices) == 0:
            raise InputError(f"--train_portion: leaves no images for the {name}; choose one further from 0 and 1")
        if batch_size > len(indices):
            raise InputError(f"--batch_size {batch_size}: there are only {len(indices)} images for the {name}; "
                             "choose a smaller batch")
        size = crop or images.info.image_size
        self.least_visible = least_visible(size, cutout_length, shifted=not crop) if augment else 1.0
        if not self.least_visible:
            most = next(n for n in reversed(range(size)) if least_visible(size, n, shifted=not crop))
            raise InputError(f"--cutout_length {cutout_length}: hides all of some images of {size} pixels; give at "
                             f"most {most}, and a run that began with it another --save")
        self.images, self.indices, self.batch_size = images, indices.cpu(), batch_size
        self.name, self.seed, self.device = name, seed, torch.device(device)
        self.augment, self.cutout_length, self.crop, self.workers = augment, cutout_length, crop, workers
        self.flip = images.info.flip if flip is None else flip
        self.steps = len(indices) // batch_size if drop_last else -(-len(indices) // batch_size)
        for size in (self.size(0), self.size(self.steps - 1)):
            if distributed.size() > 1 and size < 2 * distributed.size():  # BatchNorm may need two
                raise InputError(f"--batch_size {batch_size}: leaves a batch of {size} of the {len(indices)} images "
                                 f"for the {name}, and {distributed.size()} processes need two images each; choose "
                                 "another batch, or fewer processes")

    def warnings(self) -> list[str]:
        """Where the augmentation may harm, a line each."""
        lines, pair = [], mirrored_classes(self.images.info.classes)
        if self.augment and self.flip and pair:
            lines.append(f"warning: images are mirrored, though some are called {pair[0]} and others {pair[1]}; "
                         "--no-flip leaves them as they are")
        if self.least_visible < 0.25:
            lines.append(f"warning: --cutout_length {self.cutout_length}: leaves {100 * self.least_visible:.0f} % of "
                         "some images; a shorter one leaves more")
        return lines

    def size(self, step: int) -> int:
        """The number of images in batch `step`, over all processes."""
        return min(self.batch_size, len(self.indices) - step % self.steps * self.batch_size)

    def batches(self, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... without end: float32 images (B, C, H, W), channels_last, and labels (B,).

        B is `size(step)`, of several processes the part of it that is this one's. Each call starts its own workers:
        call it once and take from it as long as the run lasts.
        """
        mean, std = self.images.info.moments(self.device)
        own = (batch[distributed.rank_slice(len(batch))] for batch in self._index_batches(start))
        images = self.images.gather(own, self.device, self.workers)
        for step, (x, y) in zip(count(start), images):
            if self.augment:
                size = self.size(step)
                draws = draw(size, self.crop or x.shape[-1], generator(self.seed, self.name, "augmentation", step))
                draws = draws[distributed.rank_slice(size)].to(self.device, non_blocking=True)
                x = self._photographs(x, step) if self.crop else crop_and_flip(x, draws, self.flip)
            x = normalise(x, mean, std)
            if self.augment and self.cutout_length:
                x = cutout(x, draws, self.cutout_length)
            yield x, y

    def _photographs(self, x: Tensor, step: int) -> Tensor:
        numbers = generator(self.seed, self.name, "photographs", step)
        size = self.size(step)
        draws = imagenet_augment.draw(size, x.shape[-1], self.flip, numbers)
        draws = draws.of(distributed.rank_slice(size)).to(self.device)
        return imagenet_augment.jitter(imagenet_augment.crop_and_resize(x, draws, self.crop), draws)

    def order(self, epoch: int) -> Tensor:
        """The part's indices (n,) as they are shown in `epoch`."""
        numbers = generator(self.seed, self.name, "order", epoch)
        return self.indices[torch.randperm(len(self.indices), generator=numbers)]

    def shown(self, epoch: int, step: int) -> Tensor:
        """The indices of the images in batch `step` of `epoch`."""
        return self.order(epoch)[step * self.batch_size:][:self.batch_size]

    def _index_batches(self, start: int) -> Iterator[Tensor]:
        first_epoch, done = divmod(start, self.steps)
        for epoch in count(first_epoch):
            yield from self.order(epoch).split(self.batch_size)[done:self.steps]
            done = 0
