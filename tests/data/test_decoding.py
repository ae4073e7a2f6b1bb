"""Many images at once are the pixels that they are one by one, whichever decoder was asked."""
import io
import subprocess
import sys
import threading
from contextlib import closing
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image

import conas.data.decoding
from conas.data.decoding import decode_all, is_plain, quiet_decoders, torchvision_decoder
from conas.data.imagefiles import ImageFiles
from conas.data.images import load
from conas.errors import InputError
from tests.conftest import ROOT
from tests.helpers.hostile import damaged, fuzz

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
RNG = np.random.default_rng(0)


def picture(height: int, width: int) -> Image.Image:
    """Smooth in its upper part and noise in the lower."""
    pixels = np.asarray(Image.fromarray(RNG.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((width, height))).copy()
    pixels[height // 2:] = RNG.integers(0, 256, (height - height // 2, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return file.getvalue()


def by_pillow(content: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(scope="module")
def decode_jpeg():
    decoder = torchvision_decoder()
    if decoder is None:
        pytest.skip("this torchvision does not decode JPEG files as Pillow does")
    return decoder


def test_torchvision_and_pillow_give_the_same_bits(decode_jpeg):
    """Over sizes that are no multiple of a block, samplings, qualities, progressive files, grey ones and restarts."""
    count = 0
    for side, quality, sampling in product((1, 2, 7, 8, 15, 16, 17, 32, 33, 64), (5, 75, 95, 100), (0, 1, 2)):
        image = picture(side, side)
        for settings in ({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 1}):
            for mode in ("RGB", "L"):
                content = encoded(image.convert(mode), quality=quality, subsampling=sampling, **settings)
                assert is_plain(content, side)
                assert torch.equal(decode_jpeg(content), by_pillow(content)), (side, quality, sampling, settings, mode)
                count += 1
    assert count == 960


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("settings", [{"exif": exif(6)}, {"xmp": b'<x tiff:Orientation="6"/>'}, {"icc_profile": b"x"},
                                      {"keep_rgb": True}])
def test_whatever_may_change_pixels_later_is_left_to_pillow(settings):
    assert not is_plain(encoded(picture(8, 8), **settings), 8)


def test_other_sizes_modes_and_files_are_left_to_pillow():
    plain = encoded(picture(8, 8))
    assert is_plain(plain, 8) and not is_plain(plain, 9) and not is_plain(encoded(picture(8, 9)), 8)
    assert not is_plain(encoded(picture(8, 8).convert("CMYK")), 8)
    for other in (b"", plain[:3], plain[:100], b"x" + plain, plain[2:], b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" * 50):
        assert not is_plain(other, 8)


def write(root: Path, count: int, usual: int = 32) -> ImageFiles:
    """JPEG files, most of them plain and of `usual` pixels on a side, with some of everything else among them."""
    for i in range(count):
        side, settings, suffix = usual, {}, "jpg"
        if i % 11 == 5:
            side = 40
        elif i % 11 == 6:
            settings = {"exif": exif(6)}
        elif i % 11 == 7:
            suffix = "png"
        picture(side, side).convert("L" if i % 11 == 3 else "RGB").save(root / f"{i:04}.{suffix}", **settings)
    return ImageFiles(root, sorted(path.name for path in root.iterdir()))


def decode_many(files: ImageFiles, side: int = 32) -> list:
    with closing(decode_all(partial(files.decode, image_size=side), len(files), side, files)) as images:
        return list(images)


@pytest.fixture(params=["small files", "large files"])
def size(request, monkeypatch):
    """The files of this test are taken for small ones, which one thread decodes, or for large ones."""
    monkeypatch.setattr(conas.data.decoding, "SMALL", 4096 if request.param == "small files" else 0)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_in_chunks_all_images_are_what_they_are_alone(tmp_path, monkeypatch, size, count, many):
    monkeypatch.setattr(conas.data.decoding, "_are_many", lambda count: many)
    files = write(tmp_path, count)
    images = decode_many(files)
    assert len(images) == count
    for i, image in enumerate(images):
        assert torch.equal(image, files.decode(i, 32)), files.names[i]


def test_small_jpeg_files_are_decoded_by_torchvision(tmp_path, monkeypatch, decode_jpeg):
    """And by nothing else: Pillow is asked for the sample and for the rest."""
    monkeypatch.setattr(conas.data.decoding, "_are_many", lambda count: True)
    files, asked = write(tmp_path, 330), []
    with closing(decode_all(lambda i: asked.append(i) or files.decode(i, 32), len(files), 32, files)) as images:
        assert all(torch.equal(image, files.decode(i, 32)) for i, image in enumerate(images))
    assert {i for i in range(330) if i % 11 in (5, 6, 7)} <= set(asked) and len(set(asked)) < 150


def test_a_decoder_with_other_pixels_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(conas.data.decoding, "_are_many", lambda count: True)
    monkeypatch.setattr(conas.data.decoding, "torchvision_decoder", lambda: lambda content: by_pillow(content) ^ 1)
    files = write(tmp_path, 60)
    assert all(torch.equal(image, files.decode(i, 32)) for i, image in enumerate(decode_many(files)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 1}])
def test_damaged_files_are_read_or_refused_just_as_by_pillow(tmp_path, decode_jpeg, settings):
    files, path = ImageFiles(tmp_path, ["a.jpg"]), tmp_path / "a.jpg"
    whole = encoded(picture(12, 12), **settings)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        image = conas.data.decoding._decode(0, partial(files.decode, image_size=12),
                                       partial(conas.data.decoding._by_torchvision, files, image_size=12,
                                               decode_jpeg=decode_jpeg))
        expected = conas.data.decoding._decode(0, partial(files.decode, image_size=12), None)
        assert type(image) is type(expected) and \
            (torch.equal(image, expected) if isinstance(image, torch.Tensor) else str(image) == str(expected))

    for length in range(len(whole)):  # torchvision refuses every one that is cut, or Pillow reads it
        check(whole[:length])
    with quiet_decoders():
        fuzz(given(content=damaged(whole))(check))()


def test_errors_come_in_order_and_images_before_them(tmp_path, monkeypatch, size):
    monkeypatch.setattr(conas.data.decoding, "_are_many", lambda count: True)
    files = write(tmp_path, 200)
    for name in (files.names[70], files.names[151]):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    images = decode_many(files)
    bad = {i: str(image) for i, image in enumerate(images) if isinstance(image, InputError)}
    assert list(bad) == [70, 151] and "0070.jpg: cannot be read as an image (image file is truncated" in bad[70]


@pytest.mark.parametrize("side, alone", [(32, True), (400, False)])
def test_small_files_are_decoded_on_one_thread(tmp_path, monkeypatch, side, alone):
    """Threads run Pillow's Python code in turn, and for a small file that is most of the work."""
    monkeypatch.setattr(conas.data.decoding, "_cores", lambda: 2)
    files, used = write(tmp_path, 40, side), set()
    with closing(decode_all(lambda i: used.add(threading.current_thread()) or files.decode(i, 32), len(files), 32,
                            files)) as images:
        assert len(list(images)) == 40
    assert (used == {threading.current_thread()}) == alone


def test_a_file_that_is_gone_is_named_when_it_is_decoded(tmp_path, size):
    files = write(tmp_path, 3)
    for name in files.names:
        (tmp_path / name).unlink()
    assert all(isinstance(image, InputError) and name in str(image)
               for name, image in zip(files.names, decode_many(files), strict=True))


def test_stopping_early_leaves_no_thread(tmp_path, size):
    files, before = write(tmp_path, 200), threading.active_count()
    with closing(decode_all(partial(files.decode, image_size=32), len(files), 32, files)) as images:
        next(images)
    assert threading.active_count() == before


def test_the_fingerprint_does_not_know_the_decoder(tmp_path, monkeypatch):
    for part, name in product(("train", "test"), "ab"):
        (tmp_path / part / name).mkdir(parents=True)
        write(tmp_path / part / name, 30)
    prints = []
    for many in (False, True):
        monkeypatch.setattr(conas.data.decoding, "_are_many", lambda count, many=many: many)
        prints.append(load("folder", tmp_path, "train").fingerprint)
    assert prints[0] == prints[1]


def test_few_images_do_not_import_torchvision(tmp_path):
    write(tmp_path, 20)
    code = ("import sys; from functools import partial; from pathlib import Path; "
            "from conas.data.decoding import decode_all; "
            "from conas.data.imagefiles import ImageFiles; root = Path(sys.argv[1]); "
            "files = ImageFiles(root, sorted(p.name for p in root.iterdir())); "
            "print(len(list(decode_all(partial(files.decode, image_size=32), 20, 32, files))), "
            "'torchvision' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["20", "False"], done.stderr
