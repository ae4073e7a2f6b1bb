"""Thumbnails for a web page: many images in one picture, given as a data URI."""
import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conas.data.augment import resized

LARGEST = 48        # pixels; larger images are made smaller
LOSSLESS = 400_000  # bytes up to which a picture is kept as PNG
SHOWN = 64          # pixels on the page


def choose(fields: Tensor, confidence: Tensor, first: list[int], count: int, each: int) -> list[int]:
    """At most `count` images: `first`, then of every value in `fields` (N,) its surest, then its second, to `each`."""
    rank, seen = [], {}
    for i in confidence.argsort(descending=True, stable=True).tolist():
        place = seen[fields[i].item()] = seen.get(fields[i].item(), -1) + 1
        rank.append((place, i))
    ordered = [i for place, i in sorted(rank) if place < each]
    return list(dict.fromkeys([*first, *ordered]))[:count]


def sprite(images: Tensor) -> dict:
    """One picture of uint8 images (N, C, S, S): its `uri`, its `columns`, the `side` of an image and the pitch of its
    places, `tile`, in pixels, and the `scale` at which to show it.

    Places are whole blocks of JPEG, so that no image bleeds into the next.
    """
    if images.shape[-1] > LARGEST:
        images = resized(images, LARGEST)
    N, C, side, _ = images.shape
    tile, columns = -(-side // 8) * 8, 32
    rows = -(-N // columns)
    padded = torch.nn.functional.pad(images.float(), (0, tile - side, 0, tile - side), mode="replicate").byte()
    sheet = padded.new_zeros(rows * columns, C, tile, tile)
    sheet[:N] = padded
    sheet = sheet.view(rows, columns, C, tile, tile).permute(0, 3, 1, 4, 2).reshape(rows * tile, columns * tile, C)
    picture = Image.fromarray(np.ascontiguousarray(sheet.numpy() if C == 3 else sheet[..., 0].numpy()))
    kind, data = "png", _encode(picture, "PNG", optimize=True)
    if len(data) > LOSSLESS:
        kind, data = "jpeg", _encode(picture, "JPEG", quality=85, subsampling=0)
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(data).decode()}", "columns": columns, "side": side,
            "tile": tile, "scale": max(1, round(SHOWN / side))}


def _encode(picture: Image.Image, kind: str, **settings) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **settings)
    return file.getvalue()
