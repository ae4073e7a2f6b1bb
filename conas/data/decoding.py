"""Many image files become pixels: small files on one thread, others in chunks on every core, JPEG by torchvision.

A small file takes longer in Pillow's Python code, which threads run in turn, than in its decoder, which they run side
by side: two threads decode images of 32 pixels more slowly than one. Of larger images a task is a chunk, since a task
costs time itself. torchvision decodes with the same library as Pillow, libjpeg-turbo, and without most of that Python
code. But its import takes longer than Pillow takes for thousands of small images, its decoders are to leave it one day,
and a build with another library gives other pixels. So it is asked for many images only, for plain JPEG files of just
the size that is wanted, and only after it gave Pillow's very pixels for some of them; Pillow decodes all else and
judges whatever torchvision refuses.
"""
import io
import os
import struct
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice, product

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from conas import distributed
from conas.data.imagefiles import ImageFiles
from conas.errors import InputError
from conas.files import check_regular

MANY = 15_000          # images from which on torchvision's import is won back, which takes as long as some 12,000 save
MANY_IF_IMPORTED = 1_000  # and what it takes to check its pixels, once it is imported
SMALL = 4096           # bytes of a file, on average, up to which one thread is faster: JPEG files of some 140 pixels
CHUNK = 64             # images in a task, at most
CHUNK_BYTES = 2**22    # of their pixels, at most
SAMPLE = 32            # files that are decoded both ways, or whose sizes are read, first
AHEAD = 4              # chunks for each thread that may wait to be taken
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")

START_OF_SCAN, FRAMES = 0xDA, (0xC0, 0xC2)  # baseline and progressive
HARMLESS = (0xDB, 0xC4, 0xDD, 0xE0, 0xFE)   # tables, restart interval, JFIF and comments: they leave pixels upright RGB

DecodeJpeg = Callable[[bytes], Tensor]


def decode_all(decode: Callable[[int], Tensor], count: int, image_size: int, files: ImageFiles | None = None,
               title: str | None = None) -> Iterator[Tensor | InputError]:
    """decode(0), decode(1) ... uint8 (C, image_size, image_size), or the InputError that one raises, in order.

    `files` are what is decoded, where that is files. Few images are in memory at a time. Work of more than two seconds
    shows its progress, if there is a `title` for it.
    """
    threads = 1 if files is not None and _are_small(files) else _cores()
    size = max(1, min(CHUNK, CHUNK_BYTES // (3 * image_size**2), count // (AHEAD * threads)))
    bar = tqdm(total=count, desc=title, leave=False, delay=2, unit="image",
               disable=True if title is None else distributed.tqdm_disable())
    with quiet_decoders(), bar:
        fast = _same_as_pillow(files, image_size, decode) if files is not None and _are_many(count) else None

        def work(start: int) -> list[Tensor | InputError]:
            return [_decode(i, decode, fast) for i in range(start, min(start + size, count))]

        if threads == 1:
            for start in range(0, count, size):
                images = work(start)
                yield from images
                bar.update(len(images))
            return
        pool, waiting, starts = ThreadPoolExecutor(threads), deque(), iter(range(0, count, size))
        try:
            waiting.extend(pool.submit(work, start) for start in islice(starts, AHEAD * threads))
            while waiting:
                images = waiting.popleft().result()
                waiting.extend(pool.submit(work, start) for start in islice(starts, 1))
                yield from images
                bar.update(len(images))
        finally:
            pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _are_many(count: int) -> bool:
    return count >= (MANY_IF_IMPORTED if "torchvision.io" in sys.modules else MANY)


def _are_small(files: ImageFiles) -> bool:
    sizes = []
    for name in _sample(files.names):
        try:
            sizes.append((files.root / name).stat().st_size)
        except OSError:  # said by name when it is decoded
            continue
    return bool(sizes) and sum(sizes) / len(sizes) <= SMALL


def _sample(items: Sequence) -> Sequence:
    """At most twice SAMPLE of the items, evenly spread."""
    return items[::max(1, len(items) // SAMPLE)]


def _decode(i: int, decode: Callable[[int], Tensor], fast: Callable[[int], Tensor | None] | None
            ) -> Tensor | InputError:
    try:
        image = fast(i) if fast else None
        return decode(i) if image is None else image
    except InputError as error:
        return error


def _by_torchvision(files: ImageFiles, i: int, image_size: int, decode_jpeg: DecodeJpeg) -> Tensor | None:
    """Image i, or None if it is not a plain JPEG file of `image_size`, or not whole."""
    if not files.names[i].lower().endswith(JPEG):
        return None
    try:
        path = files.root / files.names[i]
        check_regular(path)
        content = path.read_bytes()
        return decode_jpeg(content) if is_plain(content, image_size) else None
    except (OSError, RuntimeError):  # Pillow may read it nevertheless, or says what is wrong
        return None


def is_plain(content: bytes, side: int) -> bool:
    """Return True if these are a JPEG file of side x side pixels that Pillow's decoder passes on as libjpeg decodes it.

    That is: 8 bits, grey or three colours, baseline or progressive Huffman coding, and nothing that may hold an
    orientation, a colour profile, or further pictures.
    """
    if content[:3] != b"\xff\xd8\xff":
        return False
    at, framed = 2, False
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2:at + 4], "big")
        if marker == START_OF_SCAN:
            return framed
        if marker in FRAMES and not framed:
            frame = content[at + 4:at + 10]
            if len(frame) < 6:
                return False
            bits, height, width, colours = struct.unpack(">BHHB", frame)
            if bits != 8 or colours not in (1, 3) or length != 8 + 3 * colours or (height, width) != (side, side):
                return False
            framed = True
        elif marker not in HARMLESS or length < 2:
            return False
        at += 2 + length
    return False


def _same_as_pillow(files: ImageFiles, image_size: int, decode: Callable[[int], Tensor]
                    ) -> Callable[[int], Tensor | None] | None:
    """Decodes image i by torchvision, or not at all, if that is worth its import and gives the pixels of `decode`."""
    sample = _sample(range(len(files)))
    plain = [i for i in sample if _by_torchvision(files, i, image_size, lambda _: torch.empty(0)) is not None]
    decode_jpeg = torchvision_decoder() if len(plain) > len(sample) / 2 else None
    if decode_jpeg is None:
        return None
    fast = partial(_by_torchvision, files, image_size=image_size, decode_jpeg=decode_jpeg)
    for i in plain:
        image, expected = fast(i), _decode(i, decode, None)
        if image is not None and not (isinstance(expected, Tensor) and torch.equal(image, expected)):
            return None
    return fast


def torchvision_decoder() -> DecodeJpeg | None:
    """bytes to uint8 (3, H, W), if this torchvision has it and it agrees with Pillow on JPEG files of every kind."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, AttributeError, OSError):
        return None

    def decode(content: bytes) -> Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)

    pixels = np.random.default_rng(0).integers(0, 256, (19, 21, 3), dtype=np.uint8)
    for mode, sampling, progressive, quality in product(("RGB", "L"), (0, 1, 2), (False, True), (30, 95)):
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, "JPEG", subsampling=sampling, progressive=progressive,
                                                   quality=quality)
        with Image.open(file) as image:
            expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        try:
            if not torch.equal(decode(file.getvalue()), expected):
                return None
        except (RuntimeError, AttributeError):  # built without its decoders
            return None
    return decode


@contextmanager
def quiet_decoders() -> Iterator[None]:
    """Without Pillow's remarks about oddities of files that it can read, and torchvision's about its later versions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
        yield
