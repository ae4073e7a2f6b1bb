"""The sections of the report: HTML for every part of a committee's result. Foreign texts are escaped here."""
import sys
from collections.abc import Iterable, Sequence
from html import escape

import torch
from torch import Tensor

import conas
from conas.data.images import ImageSet, full_name
from ensemble.combine.committee import Committee
from ensemble.measure.diversity import uncertainty
from ensemble.measure.metrics import bin_numbers, confusion_matrix
from ensemble.report import reference, search_health, svg
from ensemble.report.report import bounds_reached, left_out_lines
from ensemble.report.search_history import Search
from ensemble.report.sprites import choose, sprite

THUMBNAILS, EACH, DOUBTFUL = 1200, 12, 24  # in all; of one field of the confusion matrix; disagreed upon
BINS = 15


class Page:
    """The parts of the page. `data` is what its script works with."""

    def __init__(self, summary: dict, committee: Committee, searches: Sequence[Search], images: ImageSet | None,
                 names: Sequence[str] | None, health: dict[str, list[dict]] | None = None):
        self.summary, self.committee, self.searches, self.health = summary, committee, searches, health or {}
        self.last, self.classes = summary["epochs"][-1], committee.classes
        self.names = names or [f"image {i}" for i in range(len(committee.labels))]
        self.scaled = (committee.logits.double() / committee.temperatures[:, None, None]).softmax(dim=2)
        self.confidence, self.answers = committee.probabilities.max(dim=1)
        self.doubt = uncertainty(self.scaled, committee.weights).mutual_information
        self.doubtful = [i for i in self.doubt.argsort(descending=True, stable=True)[:DOUBTFUL].tolist()
                         if self.doubt[i] > 0]
        self.data = {"classes": self.classes, "images": {}, "sprite": None}
        if images is not None:
            self._keep_thumbnails(images)
        if searches:
            pool: dict[str, int] = {}
            self.data |= {"epochs": sorted({epoch for search in searches for epoch in search.epochs}),
                          "searches": [search.for_script(pool) for search in searches]}
            self.data["cells"] = list(pool)

    def _keep_thumbnails(self, images: ImageSet) -> None:
        labels, answers = self.committee.labels, self.answers
        kept = choose(labels * len(self.classes) + answers, self.confidence, self.doubtful, THUMBNAILS, EACH)
        self.data["sprite"] = sprite(next(images.gather([torch.tensor(kept)], "cpu"))[0])
        votes = self.scaled.argmax(dim=2).T.tolist()
        self.data["images"] = {i: {"place": place, "name": self.names[i], "field": f"{labels[i]},{answers[i]}", "votes":
                                   votes[i], "probability": round(self.confidence[i].item(), 4)}
                               for place, i in enumerate(kept)}

    def sections(self, arguments: dict[str, dict]) -> dict[str, tuple[str, str]]:
        """Titles and contents by id, in order, without those that have nothing to show; `arguments` are by run."""
        parts = {"result": ("Result", self.result()), "members": ("Members", self.members()),
                 "epochs": ("Accuracy by epoch", self.epochs()), "search": ("Cells over the search", self.cells()),
                 "health": ("Health of the searches", search_health.html(self.health)),
                 "confusion": ("Confusion matrix", self.confusion()), "calibration": ("Calibration", self.diagrams()),
                 "disagreement": ("Where the members disagree", self.disagreement()),
                 "shift": ("Corrupted images", self.shift()), "provenance": ("Provenance", self.provenance(arguments))}
        return {key: part for key, part in parts.items() if part[1]}

    def result(self) -> str:
        ours, images, gain = self.last["committee"], self.summary["images"], self.summary["significance"]
        over = gain["over_best_member"]
        low, high = wilson(ours["top1"] / 100, images)
        tiles = [("top-1 of the committee", f"{ours['top1']:.2f} %",
                  f"95 % interval {100 * low:.2f} to {100 * high:.2f}, on {images:,} test images")]
        if over:
            tiles.append(_gain(f"{over['name']}, the best member on held-out images", over))
        else:
            tiles.append((f"gain over {self.last['best_member']}, the best member on these test images",
                          f"{self.last['gain']:+.2f} points", "no interval: no common held-out images to choose it on"))
        if other := gain["over_other"]:
            tiles.append(_gain(f"the committee {other['name']}", other))
        varied = ours["diversity"]
        tiles.append(("one member at least is right", f"{varied['oracle']:.2f} %",
                      f"two members disagree on {varied['disagreement']:.2f} % of the images"))
        count = len(self.last["members"])
        inside = "".join(f"<div><dt>{escape(a)}</dt><dd><strong>{b}</strong><small>{escape(c)}</small></dd></div>"
                         for a, b, c in tiles)
        return (f"<p>{count} members, combined by {escape(self.summary['combination'])}, epoch {self.last['epoch']}, "
                f"{len(self.classes)} classes.</p><dl class=tiles>{inside}</dl>"
                + "".join(f"<p class=note>{escape(line)}.</p>" for line in left_out_lines(self.summary)))

    def members(self) -> str:
        columns = {"top-1 %": ("top1", ".2f"), "top-5 %": ("top5", ".2f"), "loss (nats)": ("loss", ".4f"),
                   "Brier": ("brier", ".4f"), "ECE": ("ece", ".4f"), "weight": ("weight", ".3f"),
                   "temperature": ("temperature", ".3f")}
        if len(self.classes) <= 5:
            del columns["top-5 %"]  # always right
        everyone = [*self.last["members"], self.last["committee"]]
        for name in ("weight", "temperature"):
            if len({figures.get(name) for figures in self.last["members"]}) == 1 and everyone[-1].get(name, 1) == 1:
                del columns[name]  # nothing was fitted
        if self.summary["held_out"]:
            columns |= {"calibrated loss": ("loss", ".4f"), "calibrated ECE": ("ece", ".4f")}
        rows = [(m["name"], m["stage"], m["epoch"], m["seed"], m) for m in self.last["members"]]
        rows.append(("committee", "", "", "", self.last["committee"]))
        head = "".join(f'<th scope=col class="text"><button>{name}</button></th>' for name in ("name", "stage"))
        head += "".join(f'<th scope=col data-kind=number><button>{name}</button></th>'
                        for name in ("epoch", "seed", *columns))
        body = ""
        for name, stage, epoch, seed, figures in rows:
            cells = "".join(f'<td data-value="{value if value != "" else -1}">{value}</td>' for value in (epoch, seed))
            for title, (key, form) in columns.items():
                value = (figures["calibrated"] if title.startswith("calibrated") else figures).get(key)
                cells += "<td data-value=-1></td>" if value is None else f"<td data-value={value}>{value:{form}}</td>"
            body += (f'<tr{" class=ours" if name == "committee" else ""}><th scope=row class=text>{escape(name)}</th>'
                     f'<td class=text>{escape(stage)}</td>{cells}</tr>')
        note = "ECE: expected calibration error, 15 bins. All figures are on the test images."
        if self.summary["held_out"]:
            note += " Calibrated: with the temperature that fits the held-out images best."
        note += "".join(f" {escape(sentence)}." for sentence in bounds_reached(self.last))
        table = f"<table id=members-table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"{_scroll('Table of members', table)}<p class=note>{note}</p>"

    def epochs(self) -> str:
        entries = self.summary["epochs"]
        published = self.summary.get("reference")
        if len(entries) < 2:
            return f"<p>{escape(reference.note(published, self.summary['images']))}</p>" if published else ""
        xs, names = [entry["epoch"] for entry in entries], [member["name"] for member in self.last["members"]]
        lines = {"committee": [entry["committee"]["top1"] for entry in entries]}
        for name in names:
            lines[name] = [next(m["top1"] for m in entry["members"] if m["name"] == name) for entry in entries]
        caption, muted = "Top-1 on the test images, %.", set()
        if published:
            lines |= {reference.RULES[rule]: line for rule, line in published["ours"].items()
                      if rule != self.summary["combination"]}
            theirs = {f"published: {name}": [line[x] for x in xs if x < len(line)]
                      for name, line in published["top1"].items()}
            muted, lines = set(theirs), lines | theirs
            caption += f" Grey, {reference.note(published, self.summary['images'])}."
        table = _table(["epoch", *lines], ([str(x), *(f"{line[i]:.2f}" if i < len(line) else "" for line in
                                                      lines.values())] for i, x in enumerate(xs)))
        picture = svg.curves(lines, xs, "epoch", "Top-1 accuracy by epoch; the numbers follow as a table", muted)
        return (f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure><details>"
                f"<summary>Numbers</summary>{_scroll('Accuracy by epoch', table)}</details>")

    def cells(self) -> str:
        if not self.searches:
            return ""
        last = len(self.data["epochs"]) - 1
        controls = (f'<div class=controls><button class=plain id=play type=button>Play</button><label for=epoch>epoch'
                    f'</label><input type=range id=epoch min=0 max={last} value={last}><output id=epoch-now for=epoch>'
                    f'epoch {self.data["epochs"][last]}</output></div>' if last else "")
        note = ("<p>The cell that the alphas stood for after each epoch, and below it their softmax: a row for each "
                "edge, framed where the cell has that operation.</p>")
        return note + controls + "".join(search.html(i, self.data["cells"]) for i, search in enumerate(self.searches))

    def confusion(self) -> str:
        matrix, names = confusion_matrix(self.committee.probabilities, self.committee.labels).tolist(), self.classes
        dense = len(names) > 30
        head = "".join(f'<th scope=col title="{escape(name)}"><span>{escape(svg.short(name))}</span></th>'
                       for name in names)
        body = ""
        for i, row in enumerate(matrix):
            cells, total = "", max(sum(row), 1)
            for j, count in enumerate(row):
                kind = "" if i == j else " class=off"
                say = f"{count} of {names[i]} answered {names[j]}"
                cells += (f'<td{kind} style="--v:{(count / total) ** 0.5:.3f}"><button data-field="{i},{j}" '
                          f'data-count={count} aria-pressed=false aria-label="{escape(say)}" title="{escape(say)}">'
                          f'{"" if dense else count}</button></td>' if count else f"<td{kind}></td>")
            body += f'<tr><th scope=row title="{escape(names[i])}">{escape(svg.short(names[i]))}</th>{cells}</tr>'
        wide = " wide" if max(map(len, names)) > 3 else ""
        table = (f'<table class="matrix{wide}{" dense" if dense else ""}"><thead><tr><td></td>{head}</tr></thead>'
                 f"<tbody>{body}</tbody></table>")
        return ("<p>Rows are true classes, columns the committee's answers. Choose a field (arrow keys walk over them) "
                f"to see its images.</p>{_scroll('Confusion matrix', table)}<div id=field aria-live=polite></div>")

    def diagrams(self) -> str:
        own, labels = self.committee.logits.double().softmax(dim=2), self.committee.labels
        named = [("committee", self.committee.probabilities, self.last["committee"]["ece"])]
        named += [(m["name"], p, m["ece"]) for m, p in zip(self.last["members"], own)]
        figures = "".join(
            f"<figure>{svg.reliability(bins(p, labels), f'{name}: reliability, expected calibration error {ece:.4f}')}"
            f"<figcaption><b>{escape(svg.short(name, 30))}</b><br>ECE {ece:.4f}</figcaption></figure>"
            for name, p, ece in named)
        return ("<p>How often answers of each confidence are right, %. On the dashed line a classifier is as sure as "
                "it is right; <span class=bad>red</span> is overconfidence, <span class=good>green</span> the reverse. "
                f"Fainter bars have fewer images.</p><div class=diagrams>{figures}</div>")

    def disagreement(self) -> str:
        if not self.doubtful:
            return ""
        labels, names = self.committee.labels.tolist(), [member["name"] for member in self.last["members"]]
        body = ""
        for i in self.doubtful:
            name, truth = escape(self.names[i]), labels[i]
            thumb = f'<td><span class=thumb data-image={i} role=img aria-label="{name}"></span></td>'
            votes = zip(self.scaled[:, i].argmax(dim=1).tolist(), self.scaled[:, i].amax(dim=1).tolist())
            cells = "".join(
                f'<td class="text {"good" if c == truth else "bad"}">{"✓" if c == truth else "✗"} '
                f"{escape(svg.short(self.classes[c]))} <small>{100 * p:.0f} %</small></td>"
                for c, p in [(self.answers[i].item(), self.confidence[i].item()), *votes])
            body += (f'<tr><th scope=row class=text title="{name}">{escape(svg.short(self.names[i], 30))}</th>'
                     f"{thumb if self.data['sprite'] else ''}<td class=text>{escape(self.classes[truth])}</td>{cells}"
                     f"<td>{self.doubt[i]:.3f}</td></tr>")
        head = ["image", *["picture"] * bool(self.data["sprite"]), "true class", "committee", *map(escape, names)]
        head = "".join(f"<th scope=col class=text>{name}</th>" for name in head)
        table = (f"<table><thead><tr>{head}<th scope=col>mutual information</th></tr></thead><tbody>{body}</tbody>"
                 "</table>")
        return ("<p>The test images with the most mutual information (nats): what the members' answers say beyond each "
                f"member's own doubt.</p>{_scroll('Images of disagreement', table)}")

    def shift(self) -> str:
        shift = self.summary["shift"]
        if not shift:
            return ""
        names = ["committee", *(name for name in shift["curves"] if name != "committee")]
        clean = {m["name"]: m["top1"] for m in self.last["members"]} | {"committee": self.last["committee"]["top1"]}
        means = {name: [clean[name], *(sum(values) / len(values) for values in zip(
            *(curve["top1"] for curve in shift["curves"][name].values())))] for name in names}
        picture = svg.curves(means, [0, *shift["severities"]], "severity (0: as they are)",
                             "Mean top-1 accuracy over all corruptions, by severity")
        rows = [[corruption.replace("_", " "), *(f"{sum(top1) / len(top1):.2f}" for top1 in (
            shift["curves"][name][corruption]["top1"] for name in names))] for corruption in shift["names"]]
        rows.append(["mean corruption error", *(f"{shift['mce'][name]:.2f}" for name in names)])
        table = _table(["top-1 %, mean of severities", *names], rows)
        return (f"<figure>{picture}<figcaption>Mean top-1 over {len(shift['names'])} corruptions "
                f"({escape(shift['source'])}), %.</figcaption></figure><details><summary>By corruption</summary>"
                f"{_scroll('Accuracy by corruption', table)}</details>")

    def provenance(self, arguments: dict[str, dict]) -> str:
        held_out = self.summary["held_out"]
        facts = [("data set", full_name(self.summary["dataset"])), ("test images", self.summary["images"]),
                 ("their SHA-256", self.summary["fingerprint"]),
                 ("held-out images decided", ", ".join(held_out["used_for"]) if held_out else "nothing"),
                 ("CoNAS", conas.__version__), ("PyTorch", torch.__version__), ("Python", sys.version.split()[0])]
        facts += [(f"{m['name']}, checkpoint", f"{m['checkpoint']}, SHA-256 {m['sha256']}")
                  for m in self.last["members"]]
        text = "".join(f"<dt>{escape(str(a))}</dt><dd>{escape(str(b))}</dd>" for a, b in facts)
        names = sorted({name for values in arguments.values() for name in values})
        table = _table(["argument", *arguments], ([f"--{name}", *(str(values.get(name, "")) for values in
                                                                 arguments.values())] for name in names))
        return (f"<dl class=facts>{text}</dl><details><summary>Arguments of the runs</summary>"
                f"{_scroll('Arguments', table)}</details>")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table of texts, which it escapes."""
    body = "".join(f"<tr><th scope=row>{escape(row[0])}</th>{''.join(f'<td>{escape(x)}</td>' for x in row[1:])}</tr>"
                   for row in rows)
    head = "".join(f"<th scope=col>{escape(x)}</th>" for x in head)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _scroll(label: str, table: str) -> str:
    """A place in which a wide table can be moved, by keyboard too."""
    return f'<div class=scroll tabindex=0 role=region aria-label="{label}">{table}</div>'


def _gain(over: str, test: dict) -> tuple[str, str, str]:
    """A tile for a gain of `ensemble.measure.significance.compare`."""
    top1 = test["top1"]
    return (f"gain over {over}", f"{top1['gain']:+.2f} points", f"95 % interval {top1['low']:+.2f} to "
            f"{top1['high']:+.2f}; McNemar p = {test['mcnemar']['p']:.2g}")


def bins(probabilities: Tensor, labels: Tensor, count: int = BINS) -> list[tuple[int, float, float]]:
    """Number of images, mean confidence and accuracy in each of `count` equally wide bins of confidence."""
    confidence, answers = probabilities.double().max(dim=1)
    where, right = bin_numbers(confidence, count), (answers == labels).double()
    sums = [torch.bincount(where, weights, count) for weights in (None, confidence, right)]
    return [(int(n), (c / max(n, 1)).item(), (r / max(n, 1)).item()) for n, c, r in zip(*sums)]


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % interval of a share of n independent images: Wilson, 1927."""
    middle, reach = share + z * z / (2 * n), z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    return (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)
