"""The report in a browser: nothing foreign runs, and slider, tables and confusion matrix work."""
import base64
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conas.data.images import load
from ensemble.measure.metrics import ece
from ensemble.report import html, sprites, svg
from ensemble.report import page as page_module
from tests.conftest import Clone
from tests.helpers.untrained import write_runs

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HOSTILE = ["<script>document.title='hacked'<", "a&amp;b\"'><svg onload=document.title='hacked'>", "plain"]
FILE = "<img src=x onerror=document.title='hacked'>.png"


def hostile_folder(root: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 20), ("test", 12)):
        for k, name in enumerate(HOSTILE):
            folder = root / part / name.replace("/", "")
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(60 * k, 60 * k + 130, (12, 12, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(folder / f"{i:02}{FILE}")


@pytest.fixture(scope="module")
def report(bare_clone, tmp_path_factory) -> Path:
    """report.html of a committee on images whose classes and files have names that are markup."""
    root = tmp_path_factory.mktemp("report") / "CoNAS"
    shutil.copytree(bare_clone.root, root)
    hostile_folder(root / "images")
    write_runs(root, "folder", str(root / "images"), 8, None, 4)
    done = Clone(root).run("test_ensemble.py")
    assert done.returncode == 0, done.stderr
    return html.write(root / "committee-EXP", root, *html.stored_committee(root, "EXP"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (BROWSER and DRIVER):
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--window-size=1200,900",
                 f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, report):
    """The report, opened anew; afterwards the console must have stayed silent and no foreign text have run."""
    browser.get(report.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    assert browser.title == "Committee on folder"
    foreign = "return document.querySelectorAll('main img, main script, [onload], [onerror]').length"
    assert browser.execute_script(foreign) == 0


def test_names_are_text(page):
    text = page.execute_script("return document.body.innerText")
    for name in HOSTILE:
        assert name[:12] in text
    assert f"test/{HOSTILE[0]}"[:15] in text  # files of the test
    heads = page.execute_script("return [...document.querySelectorAll('.matrix thead th')].map(th => th.title)")
    assert heads == sorted(HOSTILE)


def test_a_script_that_is_not_ours_is_refused(page):
    page.execute_script("const s = document.createElement('script'); s.textContent = \"document.title = 'hacked'\";"
                        "document.body.append(s); s.remove()")
    assert page.title == "Committee on folder"
    messages = page.get_log("browser")  # the refusal, and nothing else
    assert len(messages) == 1 and "Content Security Policy" in messages[0]["message"]


def test_the_slider_shows_the_cell_as_it_was(page, report):
    root = report.parent.parent

    def shown():
        return [(page.execute_script("return arguments[0].querySelector('svg').getAttribute('aria-label')", figure),
                 page.execute_script("return arguments[0].querySelectorAll('td.chosen').length", figure))
                for figure in page.find_elements("css selector", "[data-search]")]

    def expected(epoch):
        found = []
        for path in sorted(root.glob(f"cnn_space*/search-EXP/checkpoints/epoch_{epoch:03d}.pt")):
            genotype = torch.load(path, weights_only=True)["genotype"]
            for kind in ("normal", "reduce"):
                names = ["c_{k-2}", "c_{k-1}", "node 0", "node 1", "node 2"]
                terms = [f"{operation}({names[source]})" for operation, source in genotype[kind]]
                found.append("; ".join(f"node {n} = {terms[2 * n]} + {terms[2 * n + 1]}" for n in range(4)))
        return found

    assert [(label.rsplit("; ", 1)[0], chosen) for label, chosen in shown()] == [(text, 8) for text in expected(3)]
    slider = page.find_element("id", "epoch")
    slider.send_keys("\ue012")  # arrow to the left
    slider.send_keys("\ue012")
    assert page.find_element("id", "epoch-now").text == "epoch 1"
    assert [label.rsplit("; ", 1)[0] for label, _ in shown()] == expected(1) != expected(3)
    checkpoint = torch.load(root / "cnn_space2/search-EXP/checkpoints/epoch_001.pt", weights_only=True)
    alphas = checkpoint["state"]["alphas_reduce"].softmax(dim=1).flatten().tolist()
    cells = page.execute_script("return [...document.querySelectorAll('[data-search=\"1\"][data-kind=reduce] td')]"
                                ".map(td => td.textContent)")
    assert [float(cell) for cell in cells] == pytest.approx(alphas, abs=0.0056)


def test_play_runs_to_the_end_and_stops(page):
    page.find_element("id", "play").click()
    assert page.find_element("id", "epoch-now").text == "epoch 0"
    page.set_script_timeout(10)
    page.execute_async_script("const done = arguments[0], t = setInterval(() => { if (document.getElementById('play')"
                              ".textContent === 'Play') { clearInterval(t); done(); } }, 50)")
    assert page.find_element("id", "epoch-now").text == "epoch 3"


def test_the_members_table_sorts(page):
    def column(index):
        return page.execute_script("return [...document.querySelectorAll('#members-table tbody tr')]"
                                   f".map(row => row.cells[{index}].textContent)")

    heads = page.execute_script("return [...document.querySelectorAll('#members-table th[scope=col]')]"
                                ".map(th => th.textContent)")
    loss = heads.index("loss (nats)")
    for order in (True, False):
        page.find_elements("css selector", "#members-table th button")[loss].send_keys("\ue007")  # by keyboard
        values = [float(value) for value in column(loss)]
        assert values == sorted(values, reverse=order) and len(values) == 4
        assert page.execute_script("return document.querySelectorAll('#members-table th')"
                                   f"[{loss}].ariaSort") == ("descending" if order else "ascending")
    page.execute_script(f"[100, 9, 20.5, -1].forEach((x, i) => {{ document.querySelectorAll('#members-table tbody tr')"
                        f"[i].cells[{loss}].dataset.value = x }})")  # numbers, not texts
    page.find_elements("css selector", "#members-table th button")[loss].click()
    values = page.execute_script("return [...document.querySelectorAll('#members-table tbody tr')]"
                                 f".map(row => +row.cells[{loss}].dataset.value)")
    assert values == [100, 20.5, 9, -1]
    page.find_elements("css selector", "#members-table th button")[0].click()
    assert column(0) == ["cnn_space1", "cnn_space2", "cnn_space3", "committee"]


def test_a_field_of_the_matrix_shows_its_images(page, report):
    _, committee = html.stored_committee(report.parent.parent, "EXP")
    answers = committee.probabilities.argmax(dim=1)
    for button in page.find_elements("css selector", ".matrix button")[:5]:
        page.execute_script("arguments[0].click()", button)
        i, j = map(int, button.get_attribute("data-field").split(","))
        count = ((committee.labels == i) & (answers == j)).sum().item()
        assert int(button.get_attribute("data-count")) == count == int(button.text)
        items = page.find_elements("css selector", "#field li")
        assert len(items) == min(count, page_module.EACH)
        assert all(item.text.startswith(f"test/{sorted(HOSTILE)[i]}"[:15]) for item in items)
        assert button.get_attribute("aria-pressed") == "true"
    first = page.find_elements("css selector", ".matrix button")[0]
    first.send_keys("\ue015")  # arrow down: to the next field in this column, if there is one
    below = page.execute_script("return document.activeElement.dataset.field")
    assert below is not None


def test_the_page_is_whole_and_needs_no_network(page, report):
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text.split('<script type="application/json"')[0])
    loaded = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    assert page.execute_script(loaded) == 0
    assert page.execute_script("return [...document.querySelectorAll('[role=img]')].every(e => e.ariaLabel)")
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    levels = page.execute_script("return [...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page, scheme):
    """WCAG contrast of at least 4.5 between ink and paper, and of links and notes."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def luminance(colour):
        rgb = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        return sum(w * (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
                   for w, c in zip((0.2126, 0.7152, 0.0722), rgb))

    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    paper = luminance(page.execute_script(style, "body", "backgroundColor"))
    assert (paper > 0.5) == (scheme == "light")
    for selector in ("body", "a", ".note", ".good", ".bad", "figcaption"):
        ink = luminance(page.execute_script(style, selector, "color"))
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector


def test_the_data_block_is_json_and_cannot_end_early(report):
    text = report.read_text(encoding="utf-8")
    block = text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    data = json.loads(block)
    assert data["classes"] == sorted(HOSTILE) and "<" not in block


def test_whether_training_images_were_mirrored_is_said(report):
    assert f"<tr><th scope=row>--flip</th>{3 * '<td>True</td>'}</tr>" in report.read_text()


def test_predictions_that_are_not_finite_are_said(report):
    summary, committee = html.stored_committee(report.parent.parent, "EXP")
    summary["not_finite"] = [{"name": "cnn_space2", "epoch": 3, "split": "test", "not_finite": 2, "images": 36}]
    section = page_module.Page(summary, committee, [], None, None).result()
    assert ("cnn_space2, epoch 3: 2 of 36 predictions are not finite on the test images; the epoch is left out"
            in section)


def test_corruption_curves(report):
    summary, committee = html.stored_committee(report.parent.parent, "EXP")
    names = ["committee", "cnn_space1", "cnn_space2", "cnn_space3"]
    curve = {"fog": {"top1": [50.0, 40.0]}, "jpeg": {"top1": [30.0, 20.0]}}
    summary["shift"] = {"source": "<b>", "seed": 0, "names": ["fog", "jpeg"], "severities": [1, 2],
                        "curves": dict.fromkeys(names, curve), "mce": dict.fromkeys(names, 65.0)}
    section = page_module.Page(summary, committee, [], None, None).shift()
    assert section.count(">committee 30.00<") == 1 and "&lt;b&gt;" in section  # the mean at the highest severity
    assert "<th scope=row>fog</th><td>45.00</td>" in section and "<td>65.00</td>" in section


def test_bins_give_the_calibration_error():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(500, 7, generator=generator).double().softmax(1)
    labels = torch.randint(7, (500,), generator=generator)
    found = page_module.bins(p, labels)
    assert sum(n for n, _, _ in found) == 500
    assert sum(n / 500 * abs(c - a) for n, c, a in found) == pytest.approx(ece(p, labels), abs=1e-12)


def test_wilson():
    low, high = page_module.wilson(0.9, 10)  # Agresti and Coull's form gives the same
    assert (low, high) == pytest.approx((0.59585, 0.98213), abs=1e-5)
    assert page_module.wilson(1, 50)[1] == pytest.approx(1)


def test_a_sprite_keeps_its_images():
    images = load("digits", "data", "test", subset=40).images
    sheet = sprites.sprite(images)
    picture = _picture(sheet["uri"])
    for i, image in enumerate(images):
        x, y = i % sheet["columns"] * sheet["tile"], i // sheet["columns"] * sheet["tile"]
        assert torch.equal(torch.from_numpy(np.array(picture.crop((x, y, x + 8, y + 8)))), image[0])


def _picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def test_thumbnails_are_bounded_and_fair():
    generator = torch.Generator().manual_seed(0)
    fields, confidence = torch.randint(300, (10_000,), generator=generator), torch.rand(10_000, generator=generator)
    chosen = sprites.choose(fields, confidence, [5, 9999], 1200, 12)
    assert len(chosen) == len(set(chosen)) == 1200 and chosen[:2] == [5, 9999]
    counts = torch.bincount(fields[chosen], minlength=300)
    assert counts.min() >= 3 and counts.max() <= 6
    for field in range(5):
        ranked = [i for i in confidence.argsort(descending=True).tolist() if fields[i] == field][:3]
        assert set(ranked) <= set(chosen)


def test_a_large_page_stays_below_5_mb(tmp_path):
    """The parts that grow: 50 epochs x 3 spaces of different cells, 1200 thumbnails of noise."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (1200, 3, 32, 32), generator=generator, dtype=torch.uint8)
    pictures = len(sprites.sprite(noise)["uri"])  # photographs take a third of this
    edges = (("dil_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_5x5", 0), ("skip_connect", 2), ("max_pool_3x3", 1),
             ("avg_pool_3x3", 3), ("dil_conv_5x5", 2), ("sep_conv_3x3", 4))
    cells = 300 * len(json.dumps(svg.cell(edges, (2, 3, 4, 5)))) * 1.05
    alphas = 300 * 14 * 8 * 4
    assert pictures + cells + alphas < 4.5e6, (pictures, cells, alphas)
