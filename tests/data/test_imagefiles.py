"""Images from anywhere: every kind becomes the right pixels, or is refused by name."""
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from PIL import Image

from conas.data.imagefiles import ImageFiles
from conas.errors import InputError
from ensemble.predict import read_image
from tests.helpers.hostile import damaged, fuzz, refused


def decode(path: Path, side: int = 8) -> np.ndarray:
    """(side, side, 3)"""
    return ImageFiles(path.parent, [path.name]).decode(0, side).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_any_size(tmp_path, size, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", size, (200, 100, 0)).save(path)
    assert np.abs(decode(path).astype(int) - (200, 100, 0)).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_image_is_turned_as_its_exif_data_say(tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    back = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270,
            2: Image.Transpose.FLIP_LEFT_RIGHT}
    for orientation, transpose in back.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(transpose).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(decode(tmp_path / "a.png"), np.asarray(upright)), orientation
    upright.save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xffnonsense")
    assert np.array_equal(decode(tmp_path / "a.png"), np.asarray(upright))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_picture_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(decode(tmp_path / f"a.{suffix}").astype(int) - (200, 0, 0)).max() < 12


@pytest.mark.parametrize("mode, suffix, value, grey", [
    ("L", "png", 100, 100), ("LA", "png", (100, 0), 100), ("RGBA", "png", (100, 100, 100, 0), 100),
    ("CMYK", "jpg", (0, 0, 0, 155), 100), ("CMYK", "tiff", (0, 0, 0, 155), 100), ("1", "png", 1, 255),
    ("I;16", "png", 100 * 256 + 255, 100), ("I", "tiff", 100 * 256, 100), ("I", "tiff", 10**8, 255),
    ("I", "tiff", -5000, 0), ("F", "tiff", 100.0, 100), ("YCbCr", "jpg", (100, 128, 128), 100)])
def test_every_mode_becomes_rgb(tmp_path, mode, suffix, value, grey):
    Image.new(mode, (8, 8), value).save(tmp_path / f"a.{suffix}")
    assert np.abs(decode(tmp_path / f"a.{suffix}").astype(int) - grey).max() <= 2


@pytest.mark.filterwarnings("ignore:Palette")
def test_a_palette_with_transparency(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    for transparency in (1, bytes([0, 128])):
        image.save(tmp_path / "a.png", transparency=transparency)
        assert (decode(tmp_path / "a.png") == (10, 20, 30)).all()


def png(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that claims a size."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items())


@pytest.mark.parametrize("size, words", [
    ((12_000, 12_000), "12000 x 12000 pixels are too many"), ((60_000, 60_000), "exceeds limit"),
    ((2**31 - 1, 2**31 - 1), "exceeds limit"), ((10**9, 1), "exceeds limit"), ((0, 5), "")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_that_claims_an_enormous_size_is_refused_by_its_header(tmp_path, size, words):
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(InputError, match=rf"bomb\.png: cannot be read as an image .*{words}.*take it away"):
        decode(tmp_path / "bomb.png")


def test_fifty_megapixels(tmp_path):
    Image.new("L", (10_000, 5_000), 77).save(tmp_path / "a.png", compress_level=1)
    assert (decode(tmp_path / "a.png") == 77).all()


def test_a_file_that_would_start_ghostscript_is_no_image(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").close()  # Pillow looks at the contents, not at the name
    with pytest.raises(InputError, match=r"a\.png: cannot be read as an image \(cannot identify image file"):
        decode(tmp_path / "a.png")
    assert isinstance(read_image(str(tmp_path / "a.png"), 8, 3), InputError)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif", "ppm", "jp2", "avif"])
def test_a_damaged_image_is_read_or_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if path.suffix not in Image.registered_extensions():
        pytest.skip("this build of Pillow does not write it")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    assert decode(path).shape == (8, 8, 3)

    @fuzz
    @given(content=damaged(path.read_bytes()))
    def check(content):
        path.write_bytes(content)
        found = refused(path, lambda: decode(path), path.name)
        assert found is None or found.shape == (8, 8, 3)
    check()
