"""Drawn cells: every edge is there, nothing covers anything else, equal input gives equal bytes."""
import itertools
import json
import random
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Circle, PathPatch
from PIL import Image

from conas.darts.genotype import Genotype, save
from conas.darts.operations import OPERATIONS
from conas.draw.cell import cell_picture, committee_picture, draw_cell, draw_committee, draw_genotype, main
from conas.draw.layout import arrange, spread
from conas.errors import InputError
from tests.conftest import ROOT
from tests.helpers import launch

NAMES = sorted(OPERATIONS)
CONCAT = range(2, 6)


def random_cell(seed: int) -> list[tuple[str, int]]:
    """Any operations, any earlier sources, sometimes the same source twice."""
    generator = random.Random(seed)
    return [(generator.choice(NAMES), generator.randrange(2 + node)) for node in range(4) for _ in range(2)]


def random_genotype(seed: int) -> Genotype:
    return Genotype(random_cell(seed), CONCAT, random_cell(seed + 1000), CONCAT)


CELLS = [random_cell(seed) for seed in range(6)] + [
    [("sep_conv_3x3", 0), ("conv_7x1_1x7", 1)] * 4,  # the lowest: all nodes hear both inputs
    [("dil_conv_3x3", 0), ("dil_conv_5x5", 1)] + [("skip_connect", n) for n in (2, 0, 3, 0, 4, 0)],  # the longest
    [("max_pool_3x3", source) for source in (0, 0, 2, 2, 3, 3, 4, 4)],  # doubled arrows, an input without any
    [("skip_connect", 0), ("skip_connect", 1)],  # one node
]


def ids(path: Path) -> list[str]:
    return [element.get("id") for element in ET.parse(path).iter() if element.get("id")]


@pytest.mark.parametrize("edges", CELLS)
def test_svg_has_every_edge_and_output_once(edges, tmp_path):
    nodes = len(edges) // 2
    concat = [1, *range(3, 2 + nodes)]  # an input may be concatenated, a node may be left out
    found = ids(draw_cell(edges, concat, tmp_path / "cell.svg"))
    assert len(found) == len(set(found))
    expected = [f"edge-{i}-{source}-{2 + i // 2}-{operation}" for i, (operation, source) in enumerate(edges)]
    assert [i for i in found if i.startswith("edge-")] == expected
    assert [i for i in found if i.startswith("output-")] == [f"output-{state}" for state in concat]


@pytest.mark.parametrize("edges", CELLS)
def test_nothing_covers_anything_else(edges):
    """Labels, nodes and inputs are apart, and no arrow runs through a label or node that is not its own."""
    concat = range(2, 2 + len(edges) // 2)
    picture = cell_picture(edges, concat)
    renderer = FigureCanvasAgg(picture.figure).get_renderer()
    picture.figure.draw(renderer)
    labels = [text.get_bbox_patch().get_window_extent(renderer) for text in picture.figure.texts
              if text.get_bbox_patch()]
    circles = [artist.get_window_extent(renderer) for artist in picture.figure.artists if isinstance(artist, Circle)]
    squares = [artist.get_window_extent(renderer) for artist in picture.figure.artists
               if type(artist).__name__ == "FancyBboxPatch"]
    states = [*squares[:2], *circles]
    assert (len(labels), len(circles), len(squares)) == (len(edges), len(concat), 3)
    for a, b in itertools.combinations([*labels, *circles, *squares], 2):
        assert not a.overlaps(b)
    for box in [*labels, *circles, *squares]:
        assert picture.figure.bbox.x0 <= box.x0 < box.x1 <= picture.figure.bbox.x1
        assert picture.figure.bbox.y0 <= box.y0 < box.y1 <= picture.figure.bbox.y1

    arrows = {artist.get_gid(): artist for artist in picture.figure.artists
              if isinstance(artist, PathPatch) and artist.get_gid()}
    assert len(arrows) == len(edges) + len(concat)
    for gid, artist in arrows.items():
        kind, *numbers = gid.split("-")
        curve = artist.get_transform().transform_path(artist.get_path()).interpolated(1)
        points = curve.to_polygons(closed_only=False)[0]
        if kind == "edge":
            index, source, target = map(int, numbers[:3])
            assert crosses(points, labels[index])
            own = {id(labels[index]), id(states[source]), id(states[target])}
            last = states[target]
        else:
            own, last = {id(states[int(numbers[0])]), id(squares[2])}, squares[2]
        assert all(b[0] >= a[0] - 1e-6 for a, b in itertools.pairwise(points)), f"{gid} runs backwards"
        assert abs(points[-1][0] - last.x0) < last.width / 2 and last.y0 < points[-1][1] < last.y1
        for box in [*labels, *circles, *squares]:
            assert id(box) in own or not crosses(points, box), f"{gid} runs through something"


def crosses(points, box) -> bool:
    """Whether the polygonal line meets the box, by sampling each piece finely."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        for step in range(51):
            if box.contains(x0 + (x1 - x0) * step / 50, y0 + (y1 - y0) * step / 50):
                return True
    return False


def test_spread_is_the_nearest_arrangement():
    """Against a fine grid search over all arrangements of three."""
    generator = random.Random(1)
    grid = [step / 10 for step in range(-10, 11)]
    for _ in range(20):
        wanted = sorted(generator.choice(grid) for _ in range(3))
        halves = [generator.choice((0.1, 0.2, 0.3)) for _ in range(3)]
        allowed = [p for p in itertools.product(grid, repeat=3) if p[1] - p[0] >= halves[0] + halves[1] - 1e-9
                   and p[2] - p[1] >= halves[1] + halves[2] - 1e-9]

        def distance(positions, wanted=wanted):
            return sum((a - b) ** 2 for a, b in zip(positions, wanted))

        result = spread(wanted, halves, -1, 1)
        assert result[0] >= -1 - 1e-9 and result[2] <= 1 + 1e-9
        assert result[1] - result[0] >= halves[0] + halves[1] - 1e-9
        assert result[2] - result[1] >= halves[1] + halves[2] - 1e-9
        assert distance(result) <= min(map(distance, allowed)) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_arrange_keeps_all_half_heights_clear(seed):
    """Long items tie distant columns together, so that one pass over the columns does not do."""
    generator = random.Random(seed)
    spans = [range(0, 1), range(0, 1)]
    spans += [range(start, generator.randint(start + 1, 8)) for start in (generator.randrange(8) for _ in range(18))]
    columns = [{i: generator.choice((0.1, 0.3)) for i, span in enumerate(spans) if at in span} for at in range(8)]
    links = [(a, b) for a in range(20) for b in range(20) if spans[a].stop == spans[b].start]
    y = arrange(spans, columns, links)
    assert y[0] > y[1]
    for column in columns:
        for a, b in itertools.combinations(column, 2):
            assert abs(y[a] - y[b]) > column[a] + column[b] - 1e-6


def test_equal_genotypes_give_equal_bytes_whatever_the_users_settings(tmp_path):
    genotype = random_genotype(3)
    first = draw_genotype(genotype, tmp_path / "a")
    assert [path.name for path in first] == ["normal.svg", "normal.png", "reduce.svg", "reduce.png"]
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "savefig.facecolor": "red", "figure.dpi": 30,
                                "patch.linewidth": 9, "svg.hashsalt": None, "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        second = draw_genotype(genotype, tmp_path / "b")
        assert dict(matplotlib.rcParams) == before
    for one, two in zip(first, second):
        assert one.read_bytes() == two.read_bytes()
    assert b"<dc:date>" not in first[0].read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(path.name for path in first)
    with Image.open(first[1]) as image:
        assert image.width > 900 and image.convert("L").getextrema()[0] < 100


def test_picture_depends_on_operations_sources_and_concat(tmp_path):
    edges = random_cell(5)
    seen = {draw_cell(edges, CONCAT, tmp_path / "cell.svg").read_bytes()}
    changed = []
    for i in (0, 3, 6):
        operation, source = edges[i]
        other = NAMES[(NAMES.index(operation) + 1) % len(NAMES)]
        changed += [edges[:i] + [edge] + edges[i + 1:] for edge in ((other, source), (operation, 1 - min(source, 1)))]
    for cell in changed:
        seen.add(draw_cell(cell, CONCAT, tmp_path / "cell.svg").read_bytes())
    seen.add(draw_cell(edges, range(3, 6), tmp_path / "cell.svg").read_bytes())
    assert len(seen) == 2 + len(changed)


@pytest.mark.parametrize("layers", [1, 8, 20])
def test_committee_names_members_and_counts_cells(layers, tmp_path):
    members = [("space $1", random_genotype(1)), ("b & c", None)]
    texts = [text.get_text() for text in committee_picture(members, layers).figure.texts]
    assert texts.count("space $1") == texts.count("b & c") == 1
    assert texts.count("softmax") == texts.count("classifier") == 2 and texts.count("mean of\nsoftmax") == 1
    counts = [text.split(" × ") for text in texts if " × " in text]
    assert sum(int(count) for count, kind in counts) == 2 * layers
    assert sum(int(count) for count, kind in counts if kind == "reduction") == (2 if layers == 1 else 4)
    one, two = (draw_committee(members, tmp_path / name, layers) for name in ("a.svg", "b.svg"))
    assert one.read_bytes() == two.read_bytes()


def test_refusals_write_nothing(tmp_path):
    for name in ("cell.pdf", "cell"):
        with pytest.raises(InputError, match=r"\.svg or \.png"):
            draw_cell(random_cell(0), CONCAT, tmp_path / name)
        with pytest.raises(InputError, match=r"\.svg or \.png"):
            draw_committee([("a", None)], tmp_path / name)
    with pytest.raises(InputError, match="member"):
        draw_committee([], tmp_path / "a.svg")
    with pytest.raises(InputError, match="layers 0"):
        draw_committee([("a", None)], tmp_path / "a.svg", 0)
    assert not list(tmp_path.iterdir())


def command(*arguments) -> subprocess.CompletedProcess:
    return launch.start("-m", "conas.draw", *arguments, cwd=ROOT)


def test_command_line(tmp_path, capsys):
    for name in ("a", "b"):
        save(tmp_path / f"{name}.json", random_genotype(ord(name)))
    done = command(tmp_path / "a.json", "--out", tmp_path / "cells")
    assert (done.returncode, done.stderr) == (0, "a: a.json: the four fields of DARTS\n")
    written = [Path(line) for line in done.stdout.splitlines()]
    here = draw_genotype(random_genotype(ord("a")), tmp_path / "here")  # another process, the same bytes
    assert [path.name for path in written] == [path.name for path in here]
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in here]

    main([f"first={tmp_path}/a.json", f"{tmp_path}/b.json", "--out", f"{tmp_path}/two"])
    assert [Path(line).parent.name for line in capsys.readouterr().out.splitlines()] == ["first"] * 4 + ["b"] * 4
    main(["--committee", f"{tmp_path}/a.json", f"{tmp_path}/b.json", "--layers", "8", "--out", f"{tmp_path}/c.svg"])
    assert capsys.readouterr().out == f"{tmp_path}/c.svg\n" and (tmp_path / "c.svg").exists()


def test_command_line_refuses_in_one_line(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"normal": 3}))
    done = command(bad, "--out", tmp_path / "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {bad}: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [bad]


@pytest.mark.parametrize("arguments, named", [
    (["missing.json", "--out", "x"], "missing.json"),
    (["--committee", "a.json", "--out", "x.gif"], "x.gif"),
    (["a.json", "a.json", "--out", "x"], "NAME=FILE"),
    (["a.json", "--out", "a.json"], "a.json"),
    (["a.json"], "--out"),
])
def test_arguments_that_are_refused(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("a.json", random_genotype(0))
    before = Path("a.json").read_bytes()
    with pytest.raises(InputError, match=named):
        main(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and Path("a.json").read_bytes() == before


def test_a_narrow_committee_keeps_its_legend_inside():
    operations = ["sep_conv_3x3", "dil_conv_3x3", "max_pool_3x3", "skip_connect"] * 2
    edges = [(operation, n % 2) for n, operation in enumerate(operations)]
    picture = committee_picture([("a", Genotype(edges, CONCAT, edges, CONCAT))], 3)
    renderer = FigureCanvasAgg(picture.figure).get_renderer()
    picture.figure.draw(renderer)
    boxes = [text.get_window_extent(renderer) for text in picture.figure.texts[-4:]]
    assert all(picture.figure.bbox.x0 <= box.x0 < box.x1 <= picture.figure.bbox.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
