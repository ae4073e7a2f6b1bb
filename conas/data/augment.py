"""Augmentation of whole batches: random crop, horizontal flip and Cutout, drawn independently for every image.

Draws are made on the CPU and applied on the device of the images, so that every device sees the same batch; nothing
here waits for the device.
"""
import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def padding(image_size: int) -> int:
    """Pixels of padding for the crop: the usual 4, but no more than an eighth of a small image."""
    return min(4, (image_size + 4) // 8)


def central(x: Tensor, crop: int | None) -> Tensor:
    """The central square of `crop` pixels of images (N, C, H, H), or the images as they are."""
    margin = 0 if crop is None else (x.shape[-1] - crop) // 2
    return x if crop is None else x[:, :, margin:margin + crop, margin:margin + crop]


def resized(images: Tensor, side: int) -> Tensor:
    """uint8 images (..., C, H, W) as (..., C, side, side), antialiased."""
    from torchvision.transforms.functional import resize  # see conas/data/sources.py
    return resize(images, [side, side], antialias=True)


def draw(count: int, image_size: int, generator: torch.Generator) -> Tensor:
    """Draws for `count` images: int64 (count, 5), the columns top and left of the crop in the padded image, flip,
    and row and column of the centre of Cutout's square.

    All five are drawn whether they are used or not, so that a flag changes nothing but its own effect.
    """
    offsets = 2 * padding(image_size) + 1
    limits = (offsets, offsets, 2, image_size, image_size)
    return torch.stack([torch.randint(limit, (count,), generator=generator) for limit in limits], dim=1)


def crop_and_flip(images: Tensor, draws: Tensor, flip: bool) -> Tensor:
    """Crop each image (N, C, S, S) from itself padded with zeros, and mirror those drawn, if `flip`."""
    N, C, S, _ = images.shape
    margin = padding(S)
    top, left, mirrored = draws[:, :3].unsqueeze(-1).unbind(1)  # (N, 1) each
    line = torch.arange(S, device=images.device)
    rows, columns = top + line, left + (torch.where(mirrored == 1, S - 1 - line, line) if flip else line)
    pixels = rows[:, :, None] * (S + 2 * margin) + columns[:, None, :]  # (N, S, S), into the flat padded image
    padded = pad(images, (margin,) * 4).flatten(2)
    return padded.gather(2, pixels.view(N, 1, -1).expand(N, C, -1)).view_as(images)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, C, H, W) to float32, channels_last, with zero mean and unit variance; `mean`, `std` as of
    `DataInfo.moments`."""
    return images.to(torch.float32, memory_format=torch.channels_last).sub_(mean).div_(std)


def cutout(x: Tensor, draws: Tensor, length: int) -> Tensor:
    """Set a square of `length` pixels to zero in each image of `x` (N, C, S, S), in place; returns `x`.

    The square may reach over the border, as in the paper (arXiv:1708.04552), so that less of the image is lost.
    """
    begin = draws[:, 3:] - length // 2  # (N, 2), row and column
    line = torch.arange(x.shape[-1], device=x.device)
    inside = (line >= begin[..., None]) & (line < begin[..., None] + length)  # (N, 2, S)
    return x.masked_fill_((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0)


def least_visible(image_size: int, length: int, shifted: bool = True) -> float:
    """The part of an image's pixels that Cutout leaves in the worst of all draws, where they are hidden by a square of
    `length` pixels and, if `shifted`, moved out of the picture by the random crop."""
    left = image_size - padding(image_size) * shifted  # rows and columns that the crop leaves
    return (left**2 - min(length, left)**2) / image_size**2


# What a flip turns into each other, where classes are called by it; letters only as words of their own.
OPPOSITES = (("left", "right"), ("links", "rechts"), ("gauche", "droite"), ("izquierda", "derecha"),
             ("sinistra", "destra"), ("clockwise", "counterclockwise"), ("clockwise", "anticlockwise"), ("l", "r"),
             ("b", "d"), ("p", "q"))


def mirrored_classes(classes: Sequence[str]) -> tuple[str, str] | None:
    """The first two classes whose names say that a flip turns their images into each other, such as left and right."""
    words = {name: [word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)] for name in classes}

    def opposite(a: str, b: str, one: str, other: str) -> bool:
        if len(one) == 1:
            return [other if word == one else word for word in words[a]] == words[b]
        return (one in words[a] and other in words[b]) or a.lower().replace(one, other) == b.lower()

    def named(word: str) -> list[str]:
        return [name for name in classes if (word in words[name] if len(word) == 1 else word in name.lower())]

    pairs = ((a, b) for one, other in OPPOSITES for a in named(one) for b in named(other)
             if a != b and opposite(a, b, one, other))
    return next(pairs, None)
