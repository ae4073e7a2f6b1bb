"""Which files in a folder are images: one list of formats for training and prediction, and a count of what is left out.

A file's suffix decides, in any case of letters. Hidden files (.DS_Store, ._photo.jpg) and hidden folders never count.
"""
import os
from collections import Counter
from collections.abc import Collection
from functools import cache

from PIL import Image

# Pillow knows more, but starts Ghostscript for EPS and unpacks FITS without a limit, whatever the suffix says.
FORMATS = {"AVIF": (".avif", ".avifs"), "BMP": (".bmp",), "GIF": (".gif",),
           "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
           "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"), "PNG": (".apng", ".png"),
           "PPM": (".pbm", ".pfm", ".pgm", ".pnm", ".ppm"), "TIFF": (".tif", ".tiff"), "WEBP": (".webp",)}
OTHER_IMAGES = (".arw", ".cr2", ".cr3", ".cur", ".dcm", ".dds", ".dib", ".dng", ".emf", ".eps", ".exr", ".fit", ".fits",
                ".hdr", ".heic", ".heif", ".icns", ".ico", ".jls", ".jxl", ".jxr", ".nef", ".orf", ".pcx", ".psd",
                ".qoi", ".raf", ".raw", ".rw2", ".sgi", ".svg", ".tga", ".wmf", ".xbm", ".xcf", ".xpm")
# What runs read that do not say which suffixes they read.
EARLIER = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NAMED = 12  # suffixes in one message

NOT_IMAGES = "file{s} that {are} not {images}"
NOT_READ = "image{s} of formats that cannot be read here (convert {them} to .png or .jpg)"
NOT_BEGUN = "image{s} of formats that this run was begun without"
OUTSIDE = "image{s} outside the class folders"
IRREGULAR = "pipe{s}, device{s} or link{s} to nothing"
LINKS = "link{s} to folders (--follow_links reads them)"
KINDS = OUTSIDE, NOT_IMAGES, NOT_READ, NOT_BEGUN, IRREGULAR, LINKS


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def readable_suffixes() -> tuple[str, ...]:
    """Of the files that are read as images by this build of Pillow."""
    return tuple(sorted(suffix for name in formats() for suffix in FORMATS[name]))


class Listing:
    """Tells images from other files, and counts what it is told to leave out, by kind and suffix.

    `suffixes` are those of images (default: of all formats that can be read here). With `follow_links`, folders and
    images that are links count as what they link to; it is for those who list folders to see to it.
    """

    def __init__(self, suffixes: Collection[str] | None = None, follow_links: bool = False):
        self.suffixes = tuple(readable_suffixes() if suffixes is None else suffixes)
        self.follow_links, self.entered = follow_links, set()  # real paths of folders that were entered
        self.left_out: dict[str, Counter[str]] = {}
        self.notes: list[str] = []  # of folders that are not read

    def takes(self, name: str) -> bool:
        """Return True if the file of this name is an image that is read; else it is counted."""
        suffix = suffix_of(name)
        if suffix in self.suffixes:
            return True
        if suffix in readable_suffixes():
            self.leave_out(NOT_BEGUN, name)
        elif suffix in OTHER_IMAGES or any(suffix in of_one for of_one in FORMATS.values()):
            self.leave_out(NOT_READ, name)
        else:
            self.leave_out(NOT_IMAGES, name)
        return False

    def leave_out(self, kind: str, name: str) -> None:
        """Count a file that is not read, with `kind` for a reason."""
        self.left_out.setdefault(kind, Counter())[suffix_of(name) or "no suffix"] += 1

    def is_used(self, name: str) -> None:
        """Count a file that `takes` did not take as one that is not left out, after all."""
        self.left_out[NOT_IMAGES] -= Counter([suffix_of(name) or "no suffix"])
        if not self.left_out[NOT_IMAGES]:
            del self.left_out[NOT_IMAGES]

    def fresh(self) -> "Listing":
        """One of the same kind that has counted nothing yet, and knows which folders were entered."""
        listing = Listing(self.suffixes, self.follow_links)
        listing.entered = self.entered
        return listing

    def enter(self, folder: str) -> bool:
        """Return True if a folder is entered for the first time; links may lead to one again, or in a circle."""
        before = len(self.entered)
        self.entered.add(os.path.realpath(folder))
        return len(self.entered) > before

    def add(self, other: "Listing") -> None:
        """Count what another has left out, too."""
        for kind, counts in other.left_out.items():
            self.left_out.setdefault(kind, Counter()).update(counts)

    def __str__(self) -> str:
        """For example: 12 files that are not images: .txt (10), .csv (2)."""
        parts = []
        for kind, counts in sorted(self.left_out.items(), key=lambda item: KINDS.index(item[0])):
            n = counts.total()
            words = {"s": "s", "are": "are", "images": "images", "them": "them"} if n > 1 else \
                {"s": "", "are": "is", "images": "an image", "them": "it"}
            ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
            shown = [f"{suffix} ({count})" for suffix, count in ordered[:NAMED]]
            if rest := sum(count for _, count in ordered[NAMED:]):
                shown.append(f"others ({rest})")
            parts.append(f"{n:,} {kind.format(**words)}: {', '.join(shown)}")
        return "; ".join(parts)


def suffix_of(name: str) -> str:
    """In small letters, with its dot; nothing for a file without one, or if what follows the dot is no suffix."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix if 1 < len(suffix) <= 12 and suffix[1:].isalnum() else ""
