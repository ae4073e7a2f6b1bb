"""Common corruptions: what noise, blur, weather and digital loss do to members and committee.

The fifteen kinds follow Hendrycks and Dietterich, 2019, in spirit; ours need only torch and Pillow, fit images of any
size and channels, and are no substitute for CIFAR-10-C in comparisons with published figures. A corrupted image is a
function of the image, its position in its data set, the corruption, the severity and the seed.
"""
import io
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import conv2d, grid_sample, interpolate, pad

from conas.data.splits import generator

SEVERITIES = 1, 2, 3, 4, 5
BLOCK = 500  # images that share a generator
CORRUPTIONS: dict[str, Callable[[Tensor, int, Generator], Tensor]] = {}


def corrupt(images: Tensor, name: str, severity: int, seed: int = 0, first: int = 0) -> Tensor:
    """Images uint8 (B, C, H, W), corrupted, on the CPU; `first`, a multiple of BLOCK, is the position of the first."""
    assert first % BLOCK == 0 and severity in SEVERITIES, (first, severity)
    blocks = []
    for start, block in enumerate(images.cpu().split(BLOCK), first // BLOCK):
        x = CORRUPTIONS[name](block.float() / 255, severity - 1, generator(seed, name, severity, start))
        blocks.append((255 * x).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(blocks)


def _corruption(function):
    CORRUPTIONS[function.__name__] = function
    return function


# Every function: x (B, C, H, W) in 0..1, level 0..4, generator. Results may leave 0..1.


@_corruption
def gaussian_noise(x: Tensor, level: int, g: Generator) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * _normal(x.shape, g)


@_corruption
def shot_noise(x: Tensor, level: int, g: Generator) -> Tensor:
    photons = (500, 250, 100, 75, 50)[level]
    return torch.poisson(x * photons, generator=g) / photons


@_corruption
def impulse_noise(x: Tensor, level: int, g: Generator) -> Tensor:
    chance = torch.rand(x.shape, generator=g) / (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    return torch.where(chance < 0.5, 0, torch.where(chance < 1, 1, x))


@_corruption
def speckle_noise(x: Tensor, level: int, g: Generator) -> Tensor:
    return x + x * (0.06, 0.10, 0.12, 0.16, 0.20)[level] * _normal(x.shape, g)


@_corruption
def gaussian_blur(x: Tensor, level: int, g: Generator) -> Tensor:
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[level] * _scale(x)
    weights = (-_offsets(3 * sigma) ** 2 / (2 * sigma ** 2)).exp()
    return _filter(_filter(x, weights[None, :]), weights[:, None])


@_corruption
def defocus_blur(x: Tensor, level: int, g: Generator) -> Tensor:
    radius = (0.6, 0.9, 1.2, 1.5, 2.0)[level] * _scale(x)
    at = _offsets(radius)
    return _filter(x, (radius + 0.5 - (at[:, None] ** 2 + at ** 2).sqrt()).clamp(0, 1))


@_corruption
def motion_blur(x: Tensor, level: int, g: Generator) -> Tensor:
    """The mean along a line of one direction for each image."""
    length, steps = (1.5, 2.5, 3.5, 4.5, 6.0)[level] * _scale(x), 9
    angle = math.pi * torch.rand(len(x), generator=g)
    shift = torch.stack([angle.cos() / x.shape[3], angle.sin() / x.shape[2]], dim=1) * 2
    return sum(_sample(x, _grid(x) + k * length * shift[:, None, None])
               for k in torch.linspace(-0.5, 0.5, steps).tolist()) / steps


@_corruption
def zoom_blur(x: Tensor, level: int, g: Generator) -> Tensor:
    zooms = torch.linspace(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level], 7).tolist()
    return sum(_sample(x, _grid(x) / zoom) for zoom in zooms) / len(zooms)


@_corruption
def snow(x: Tensor, level: int, g: Generator) -> Tensor:
    """Paler, and with flakes that fall along one slope."""
    density, whiten = ((0.02, 0.1), (0.04, 0.15), (0.06, 0.2), (0.08, 0.25), (0.12, 0.3))[level]
    flakes = (torch.rand(len(x), 1, *x.shape[2:], generator=g) < density).float()
    streaks = _filter(flakes, torch.eye(1 + 2 * round(_scale(x)))) * 2
    return x * (1 - whiten) + whiten * x.mean(dim=1, keepdim=True).clamp_min(0.6) + streaks


@_corruption
def fog(x: Tensor, level: int, g: Generator) -> Tensor:
    """A haze with clouds of all sizes, each half as strong as those of twice its size."""
    size, haze, strength = max(x.shape[2:]), 0, (0.2, 0.35, 0.5, 0.75, 1.0)[level]
    for octave in range(1, max(2, size.bit_length())):
        cells = torch.rand(len(x), 1, 2 ** octave, 2 ** octave, generator=g)
        haze = haze + interpolate(cells, x.shape[2:], mode="bilinear", align_corners=False) / 2 ** octave
    haze = haze / haze.amax(dim=(2, 3), keepdim=True)
    return (x + strength * haze) / (1 + strength)


@_corruption
def brightness(x: Tensor, level: int, g: Generator) -> Tensor:
    return x + (0.05, 0.1, 0.15, 0.2, 0.3)[level]


@_corruption
def contrast(x: Tensor, level: int, g: Generator) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean + (0.75, 0.5, 0.4, 0.3, 0.15)[level] * (x - mean)


@_corruption
def elastic(x: Tensor, level: int, g: Generator) -> Tensor:
    """Every point moves a little, and its neighbours with it."""
    coarse = 2 * torch.rand(len(x), 2, 4, 4, generator=g) - 1
    move = interpolate(coarse, x.shape[2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return _sample(x, _grid(x) + (0.05, 0.08, 0.11, 0.14, 0.18)[level] * move)


@_corruption
def pixelate(x: Tensor, level: int, g: Generator) -> Tensor:
    part = (0.9, 0.7, 0.6, 0.45, 0.35)[level]
    small = interpolate(x, [max(1, round(part * side)) for side in x.shape[2:]], mode="bilinear", antialias=True)
    return interpolate(small, x.shape[2:], mode="nearest-exact")


@_corruption
def jpeg(x: Tensor, level: int, g: Generator) -> Tensor:
    """Compressed and decoded by Pillow."""
    quality, pictures = (80, 65, 50, 35, 20)[level], []
    for array in (255 * x).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "JPEG", quality=quality)
        pictures.append(torch.frombuffer(bytearray(Image.open(file).tobytes()), dtype=torch.uint8).view(array.shape))
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def mean_corruption_error(errors: Mapping[str, Sequence[float]], reference: Mapping[str, Sequence[float]] | None = None
                          ) -> float:
    """The mean over corruptions of the error, in percent, summed over severities and divided by the reference's sum.

    Without `reference` by the number of severities, as is usual on CIFAR-10-C. Hendrycks and Dietterich, 2019,
    section 3.2. A reference without errors in a corruption raises ZeroDivisionError.
    """
    sums = [sum(by_severity) / (len(by_severity) if reference is None else sum(reference[name]) / 100)
            for name, by_severity in errors.items()]
    return sum(sums) / len(sums)


def _normal(shape: torch.Size, g: Generator) -> Tensor:
    return torch.randn(shape, generator=g)


def _scale(x: Tensor) -> float:
    """Lengths are in pixels of a 32-pixel image, and on smaller images no less than half of that."""
    return max(0.5, max(x.shape[2:]) / 32)


def _offsets(reach: float) -> Tensor:
    side = max(1, math.ceil(reach))
    return torch.arange(-side, side + 1).float()


def _filter(x: Tensor, weights: Tensor) -> Tensor:
    """Convolve each channel with weights scaled to a sum of 1; borders are repeated."""
    h, w = weights.shape
    channels = x.flatten(0, 1)[:, None]
    padded = pad(channels, (w // 2, w // 2, h // 2, h // 2), mode="replicate")
    return conv2d(padded, (weights / weights.sum())[None, None]).view(x.shape)


def _grid(x: Tensor) -> Tensor:
    """(1, H, W, 2): where each pixel is, from -1 to 1."""
    down, right = ((2 * torch.arange(side) + 1) / side - 1 for side in x.shape[2:])
    return torch.stack(torch.meshgrid(right, down, indexing="xy"), dim=-1)[None]


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return grid_sample(x, grid.expand(len(x), -1, -1, -1), padding_mode="border", align_corners=False)
