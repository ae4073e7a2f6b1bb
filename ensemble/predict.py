"""Classify your own images with the committee that test_ensemble.py wrote.

    python -m ensemble.predict photo.jpg more_photos/
    python -m ensemble.predict photos/ --save NAME --top_k 3 --csv answers.csv --json answers.json

Images of any format and size are prepared as the training images were: made square and resized. Uncertainties are in
nats: the entropy of the committee's answer, and the part of it that is disagreement among members.
"""
import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conas.cli import Parser, find_device, run
from conas.data.decoding import decode_all
from conas.data.imagefiles import ImageFiles
from conas.data.listing import IRREGULAR, LINKS, Listing
from conas.errors import InputError, one_line
from conas.files import check_writable, write_json, write_text
from conas.runs.folder import folder_name
from ensemble.combine.network import CommitteeNetwork, load_committee
from ensemble.measure.diversity import entropy, uncertainty

ROOT = Path(__file__).resolve().parent.parent


def find_images(paths: Sequence[str], follow_links: bool = False) -> list[str]:
    """The files among `paths`, and the images in the folders among them, at any depth, as training finds them.

    What is left out of a folder is counted on stderr. Raises InputError for a folder without images.
    """
    found = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(str(path))
            continue
        listing, inside = Listing(), []
        for parent, folders, files in os.walk(path, followlinks=follow_links):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if follow_links and not listing.enter(parent):  # links may lead in a circle
                folders.clear()
                continue
            for name in folders:
                if not follow_links and os.path.islink(os.path.join(parent, name)):
                    listing.leave_out(LINKS, name)
            for name in files:
                if name.startswith(".") or not listing.takes(name):
                    continue
                if os.path.isfile(os.path.join(parent, name)):
                    inside.append(os.path.join(parent, name))
                else:
                    listing.leave_out(IRREGULAR, name)
        if not inside:
            only = f"only {listing}" if listing.left_out else "which are files with the suffixes " \
                f"{' '.join(listing.suffixes)}"
            raise InputError(f"{path}: no images in this folder, {only}")
        if listing.left_out:
            print(one_line(f"{path}: left out {listing}"), file=sys.stderr)
        found += sorted(inside)
    return found


def read_image(path: str, image_size: int, channels: int, resize: str = "crop") -> Tensor | InputError:
    """uint8 (channels, image_size, image_size), prepared as for training; or what is wrong with the file."""
    try:
        return _in_channels(ImageFiles(Path(), [path], resize).decode(0, image_size), channels)
    except InputError as error:
        return error


def _in_channels(pixels: Tensor, channels: int) -> Tensor:
    """RGB images (3, H, W), or grey ones (1, H, W), as Pillow converts them."""
    if channels == 3:
        return pixels
    return torch.from_numpy(np.array(Image.fromarray(pixels.permute(1, 2, 0).numpy()).convert("L")))[None]


@torch.inference_mode()
def predict(network: CommitteeNetwork, paths: Sequence[str], top_k: int = 1, batch_size: int = 64,
            complain: Callable[[InputError], None] = print) -> Iterator[dict]:
    """One row for each readable image, in order: image, class, probability, entropy, mutual_information (nats), top
    (`top_k` pairs of class and probability, best first) and votes (by member: class and probability).

    Images are decoded a few batches ahead, so memory does not grow with their number. Others go to `complain`.
    """
    device, size = network.pixel_mean.device, network.dataset["image_size"]
    files = ImageFiles(Path(), list(paths), network.dataset.get("resize", "crop"))
    title = None if sys.stdout.isatty() else "decoding"  # on a terminal the rows themselves show how far it is
    with closing(decode_all(partial(files.decode, image_size=size), len(paths), size, files, title)) as images:
        for start in range(0, len(paths), batch_size):
            good = []
            for path, image in zip(paths[start:start + batch_size], images):
                if isinstance(image, InputError):
                    complain(image)
                else:
                    good.append((path, _in_channels(image, network.channels)))
            if good:
                logits = network.logits(torch.stack([image for _, image in good]).to(device)).cpu()
                yield from _rows(network, [path for path, _ in good], logits, top_k)


def _rows(network: CommitteeNetwork, paths: Sequence[str], logits_MBC: Tensor, top_k: int) -> Iterator[dict]:
    classes, p_BC = network.classes, network.combine(logits_MBC)
    p_MBC = network.scaled(logits_MBC).softmax(dim=2)
    between = uncertainty(p_MBC, network.weights).mutual_information.tolist()
    order, total = p_BC.argsort(dim=1, descending=True, stable=True)[:, :top_k], entropy(p_BC).tolist()
    for i, path in enumerate(paths):
        top = [{"class": classes[c], "probability": p_BC[i, c].item()} for c in order[i].tolist()]
        votes = {name: {"class": classes[p.argmax()], "probability": p.max().item()}
                 for name, p in zip(network.names, p_MBC[:, i])}
        yield {"image": path, **top[0], "entropy": total[i], "mutual_information": between[i], "top": top,
               "votes": votes}


def as_csv(rows: Sequence[dict]) -> str:
    """A line for each image: the row's fields, the further classes of a top k, and every member's vote."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    ranks, members = range(2, 1 + len(rows[0]["top"])), list(rows[0]["votes"])
    writer.writerow(["image", "class", "probability", "entropy", "mutual_information",
                     *(name for k in ranks for name in (f"class_{k}", f"probability_{k}")),
                     *(name for member in members for name in (member, f"{member} probability"))])
    for row in rows:
        pairs = [*row["top"][1:], *row["votes"].values()]
        writer.writerow([row["image"], row["class"], f"{row['probability']:.6f}", f"{row['entropy']:.6f}",
                         f"{row['mutual_information']:.6f}",
                         *(value for p in pairs for value in (p["class"], f"{p['probability']:.6f}"))])
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line above. Raises InputError if no image can be read."""
    values = parse(argv)
    for path in filter(None, (values.csv, values.json)):
        check_writable(path)
    network = load_committee(ROOT, folder_name(values.save)).to(find_device(values.device))
    paths, bad, rows = find_images(values.images, values.follow_links), [], []

    def complain(error: InputError) -> None:
        bad.append(error)
        print(one_line(error), file=sys.stderr)

    width, longest = (max(map(len, names)) for names in (paths, network.classes))
    print(f"{'image':{width}}  {'class':{longest}}  probability  entropy  mutual information  votes of "
          f"{', '.join(network.names)}")
    began = time.perf_counter()
    for row in predict(network, paths, values.top_k, values.batch_size, complain):
        votes = ", ".join(vote["class"] for vote in row["votes"].values())
        others = "".join(f"; {p['class']} {100 * p['probability']:.1f} %" for p in row["top"][1:])
        print(f"{one_line(row['image']):{width}}  {row['class']:{longest}}  {100 * row['probability']:9.1f} %  "
              f"{row['entropy']:7.3f}  {row['mutual_information']:18.3f}  {votes}{others and '  then' + others[1:]}")
        rows.append(row)
    seconds = time.perf_counter() - began
    if not rows:
        raise InputError(f"none of {len(bad)} images could be read")
    failed = f", {len(bad)} could not be read" if bad else ""
    print(f"{len(rows)} image{'s' * (len(rows) > 1)}{failed}; {len(rows) / seconds:.0f} images per second")
    if values.csv:
        write_text(values.csv, as_csv(rows))
    if values.json:
        write_json(values.json, {"members": network.names, "classes": network.classes, "images": rows,
                                 "errors": [str(error) for error in bad]})


def parse(argv: Sequence[str] | None):
    parser = Parser(prog="python -m ensemble.predict", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders that hold some")
    parser.add_argument("--save", default="EXP", help="name of the committee: its folder is committee-NAME")
    parser.add_argument("--top_k", type=int, default=1, help="how many classes to show for each image (default: 1)")
    parser.add_argument("--follow_links", action="store_true", help="look into folders that are links, too")
    parser.add_argument("--csv", help="write the answers to this file too, as a table")
    parser.add_argument("--json", help="write the answers to this file too")
    parser.add_argument("--batch_size", type=int, default=64, help="images in a batch (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    values = parser.parse_args(argv)
    for flag in ("top_k", "batch_size"):
        if getattr(values, flag) < 1:
            raise InputError(f"--{flag} {getattr(values, flag)}: must be at least 1")
    return values


if __name__ == "__main__":
    sys.exit(run(main))
