"""What the runs of a committee's members went through: alphas and cells by epoch, for the report."""
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from conas.commands.scoring import load_images
from conas.darts import genotype as genotypes
from conas.darts.genotype import NODES, Genotype
from conas.data.images import ImageSet
from conas.errors import InputError
from conas.runs import checkpoint as checkpoints
from conas.runs.folder import list_checkpoints
from ensemble.report import svg

KINDS = {"normal": "normal cell", "reduce": "reduction cell"}
SOURCES = "c_k−2", "c_k−1", *map(str, range(NODES))
EDGES = [(source, node) for node in range(NODES) for source in range(2 + node)]


@dataclass
class Search:
    """A run by epochs: the softmax of the alphas by kind of cell, (EDGES, P) for each epoch, and the genotypes."""

    name: str
    primitives: list[str]
    epochs: list[int]
    alphas: dict[str, list[Tensor]]
    genotypes: list[Genotype]

    def for_script(self, pool: dict[str, int]) -> dict:
        """By kind of cell, what the page's script needs. Pictures of cells are numbered in `pool`, which grows."""
        found = {}
        for kind in KINDS:
            cells = [svg.cell(tuple(getattr(g, kind)), tuple(getattr(g, f"{kind}_concat"))) for g in self.genotypes]
            found[kind] = {"epochs": self.epochs, "cells": [pool.setdefault(cell, len(pool)) for cell in cells],
                           "alphas": [(1000 * a).round().int().flatten().tolist() for a in self.alphas[kind]],
                           "chosen": [self.chosen(getattr(g, kind)) for g in self.genotypes]}
        self.script = found
        return found

    def chosen(self, edges: Sequence[genotypes.Edge]) -> list[int]:
        """Where the cell's operations stand in the flattened alphas."""
        return [EDGES.index((source, i // 2)) * len(self.primitives) + self.primitives.index(operation)
                for i, (operation, source) in enumerate(edges)]

    def html(self, index: int, pool: Sequence[str]) -> str:
        """The last cells and alphas; the page's script shows earlier ones."""
        parts = [f"<h3>{escape(self.name)}</h3><div class=pair>"]
        for kind, title in KINDS.items():
            state, values = self.script[kind], self.alphas[kind][-1].tolist()
            head = "".join(f"<th scope=col>{escape(name.replace('_', ' '))}</th>" for name in self.primitives)
            body = ""
            for e, (source, node) in enumerate(EDGES):
                first, chosen = e * len(self.primitives), state["chosen"][-1]
                cells = "".join(f'<td style="--v:{v:.3f}"{" class=chosen" if p in chosen else ""}>{v:.2f}</td>'
                                for p, v in enumerate(values[e], first))
                body += f"<tr><th scope=row>{SOURCES[source]} → {node}</th>{cells}</tr>"
            parts.append(
                f'<figure data-search={index} data-kind={kind}><figcaption>{title}</figcaption><div class=stage>'
                f'{pool[state["cells"][-1]]}</div><details><summary>Alphas of the {title}</summary><div class=scroll '
                f'tabindex=0 role=region aria-label="Alphas of the {title}"><table class=heat><thead><tr>'
                f"<th scope=col>edge</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details></figure>")
        return "".join(parts) + "</div>"


def read_searches(folders: Sequence[Path]) -> list[Search]:
    """The searches among the runs in `folders`; runs of retraining have no alphas and are left out."""
    paths = [(folder, list_checkpoints(folder)) for folder in folders if folder.name.startswith("search-")]
    searches = []
    with tqdm(total=sum(map(len, (found for _, found in paths))), desc="alphas", leave=False, disable=None) as bar:
        for folder, found in paths:
            alphas, cells = {kind: [] for kind in KINDS}, []
            for path in found.values():
                checkpoint = checkpoints.load(path)
                primitives = checkpoints.primitives_of(checkpoint)
                P = len(primitives)
                cells.append(genotypes.from_json(checkpoint["genotype"], str(path), checkpoint["primitives"]))
                for kind in KINDS:
                    shape = getattr(checkpoint["state"].get(f"alphas_{kind}"), "shape", None)
                    if (shape != (len(EDGES), P) or len(getattr(cells[-1], kind)) != 2 * NODES
                            or not checkpoint["state"][f"alphas_{kind}"].isfinite().all()):
                        raise InputError(f"{path}: has no finite alphas of {len(EDGES)} edges and {P} primitives, or "
                                         "another cell; replace it with an intact copy")
                    alphas[kind].append(primitives.shares(kind, checkpoint["state"][f"alphas_{kind}"].double()))
                bar.update()
            searches.append(Search(f"{folder.parent.name}/{folder.name}", checkpoint["primitives"], list(found), alphas,
                                   cells))
    return searches


def find_images(path: Path, fingerprint: str, data: str | None) -> tuple[ImageSet | None, list[str] | None]:
    """The test images of the member whose checkpoint is at `path`, and their files' names if they are whole files.

    None for images that are gone or have changed, and for names that there are none of.
    """
    dataset_info = checkpoints.load(path)["dataset"]
    try:
        # the fingerprint tells whether they have changed
        images = load_images(path, dataset_info, data, "test", skip_bad_images=True)
    except InputError as error:
        print(f"a report without images: {error}")
        return None, None
    if images.fingerprint != fingerprint:
        print(f"a report without images: those in {data or dataset_info['root']} have changed since the test")
        return None, None
    return images, images.names
