"""Augmentation of photographs, for whole batches: random resized crop, mirror image and colour jitter.

What torchvision's RandomResizedCrop, RandomHorizontalFlip and ColorJitter do to one image, with draws of its own for
every image. Draws are made on the CPU and applied on the device of the images; nothing here waits for the device.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MARGIN = 8 / 7                       # images are held this much larger than the network's input: 256 pixels for 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ATTEMPTS = 10                        # at a box that fits into the image; then the whole image is taken
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
STRENGTH = (0.4, 0.4, 0.4, 0.2)      # of DARTS: factors within 1 +- 0.4, hue within +- 0.2 of a full turn
GREY = (0.2989, 0.587, 0.114)        # ITU-R BT.601, as torchvision has it


def canvas(image_size: int) -> int:
    """The side of the images that crops of `image_size` pixels are taken from."""
    return round(image_size * MARGIN)


@dataclass(frozen=True)
class Draws:
    """Random numbers for N images."""

    box: Tensor       # int64 (N, 4): top, left, height and width of the crop
    mirrored: Tensor  # bool (N,)
    factors: Tensor   # float32 (N, 4): of brightness, contrast and saturation; shift of the hue, in turns
    order: Tensor     # int64 (N, 4), on the CPU: a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE

    def to(self, device: torch.device) -> "Draws":
        """Copies on the device of all that is computed with there."""
        moved = (t.to(device, non_blocking=True) for t in (self.box, self.mirrored, self.factors))
        return Draws(*moved, self.order)

    def of(self, part: slice) -> "Draws":
        """The draws for some of the images."""
        return Draws(self.box[part], self.mirrored[part], self.factors[part], self.order[part])


def draw(count: int, side: int, flip: bool, generator: torch.Generator) -> Draws:
    """Draws for `count` square images of `side` pixels, distributed as torchvision's; `flip` permits to mirror."""
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, dtype=torch.float64)

    area, ratio = side**2 * uniform(*AREA, ATTEMPTS), uniform(*map(math.log, RATIO), ATTEMPTS).exp()
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height <= side) & (width <= side)
    first = fits.int().argmax(dim=1, keepdim=True)
    size = torch.stack([torch.where(fits.any(dim=1), length.gather(1, first)[:, 0], side)
                        for length in (height, width)], dim=1)
    offset = (uniform(0, 1, 2) * (side - size + 1)).floor()
    jitter = torch.tensor(STRENGTH, dtype=torch.float64) * uniform(-1, 1, 4)
    jitter[:, :HUE] += 1
    return Draws(torch.cat([offset, size], dim=1).long(), uniform(0, 1) < flip / 2, jitter.float(),
                 uniform(0, 1, 4).argsort(dim=1))


def crop_and_resize(images: Tensor, draws: Draws, size: int) -> Tensor:
    """Cut each image's box out of `images` (N, C, S, S), resize it to `size` and mirror those drawn.

    Returns float32 (N, C, size, size). Resizing is bilinear with antialiasing, as two products of matrices.
    """
    top, left, height, width = draws.box.unbind(1)
    rows = _resampling(top, height, size, images.shape[2])
    columns = _resampling(left, width, size, images.shape[3])
    columns = torch.where(draws.mirrored[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]


def _resampling(begin: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """Matrices (N, size, side) that resize the `length` pixels from `begin`, (N,) each, of a line to `size` pixels.

    A pixel of the result is the mean of the pixels around its centre, weighted by a triangle that is as wide as one
    pixel of the result or of the source, whichever is larger.
    """
    begin, length = begin[:, None, None].float(), length[:, None, None].float()
    target, source = (torch.arange(n, device=begin.device) + 0.5 for n in (size, side))
    scale = length / size
    centre = begin + scale * target[:, None]
    weights = (1 - (source - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((source > begin) & (source < begin + length))
    return weights / weights.sum(dim=2, keepdim=True)


def jitter(x: Tensor, draws: Draws) -> Tensor:
    """Change brightness, contrast, saturation and hue of RGB images `x` (N, 3, H, W) of 0..255, in each one's order."""
    turns = draws.order.T  # (4, N): what is done to the images first, second, ...
    sorted_images = turns.argsort(dim=1).to(x.device, non_blocking=True)
    for turn, images in zip(turns, sorted_images):
        groups = images.split(torch.bincount(turn, minlength=len(CHANGES)).tolist())
        changed = [change(x[group], draws.factors[group, kind, None, None, None])
                   for kind, (change, group) in enumerate(zip(CHANGES, groups))]
        x = x.index_copy(0, images, torch.cat(changed))
    return x


def _grey(x: Tensor) -> Tensor:
    red, green, blue = x.unbind(1)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue)[:, None]


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp(0, 255)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, 0.0, factor)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x).mean(dim=(2, 3), keepdim=True), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _grey(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue at constant value and chroma (the largest of red, green, blue, and its distance to the least)."""
    red, green, blue = x.unbind(1)
    value = x.amax(dim=1)
    chroma = value - x.amin(dim=1)
    divisor = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == red, (green - blue) / divisor,
                      torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor))  # of 6
    hue = hue + 6 * shift[:, 0]
    falls = ((n + hue) % 6 for n in (5, 3, 1))  # how far red, green and blue are from the hue, around the circle
    return torch.stack([value - chroma * torch.minimum(f, 4 - f).clamp(0, 1) for f in falls], dim=1)


CHANGES = (_brightness, _contrast, _saturation, _hue)
