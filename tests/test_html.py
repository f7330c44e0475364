"""The report as one HTML file: its numbers, that it is complete in itself, and how a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

import torchalign as ta
from torchalign import html
from torchalign.datasets import simulate_stack
from torchalign.report import load_report

VOID = {"meta", "img", "input", "br", "link", "hr"}


@pytest.fixture(scope="module")
def stack():
    """What ta.align took and gave; frame 2 is empty and hence flagged; one label wants escaping."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scene = torch.nn.functional.avg_pool2d(torch.rand(1, 4, 240, 240, generator=generator), 9, 1, 4)[0]
    simulated = simulate_stack(
        scene, frames=6, size=(72, 64), factor=2, noise=0.002, gain=(0.97, 1.03), offset=0
    )
    values = simulated.cube.numpy().copy()
    values[2] = 0.5
    time = np.datetime64("2020-01-01", "ns") + np.arange(6) * np.timedelta64(5, "D")
    coords = {"time": time, "band": ["B02", "B03", "B04", "B08"]}
    coords["y"] = ("y", 5000.0 - 10 * np.arange(72), {"units": "m"})
    coords["x"] = ("x", 300.0 + 10 * np.arange(64), {"units": "m"})
    cube = xr.DataArray(values, coords, ("time", "band", "y", "x"), name="reflectance")
    reference = xr.DataArray(simulated.reference.numpy(), dims=("band", "y", "x"))
    aligned, report = ta.align(cube, reference)
    report.attrs["note"] = "<script>alert(1)</script> & more"
    return cube, aligned, report


@pytest.fixture(scope="module")
def page(stack) -> str:
    cube, aligned, report = stack
    return html.to_html(report, cube, aligned, title="Lots & <lots>", split="2020-01-11")


class Tree(HTMLParser):
    """Checks that tags are closed in order, and keeps what was seen."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.rows, self.text = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if not {"style", "script"} & set(self.open):
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


def test_the_table_is_the_report(stack, page):
    _, _, report = stack
    header, *rows = Tree(page).rows
    assert header[:4] == ["frame", "number", "time", "status"]
    assert len(rows) == 6
    for number, row in enumerate(rows):
        cells = dict(zip(header, row, strict=True))
        assert cells["number"] == str(number)
        assert cells["time"] == str(report.time.values[number])[:10]
        status = ta.Status(int(report.status[number]))
        assert cells["status"] == status.name
        given = {
            "shift x": "shift_x",
            "x metres": "shift_x_metres",
            "y metres": "shift_y_metres",
            "σ": "sigma",
        }
        for heading, name in given.items():
            if status != ta.Status.OK:
                assert cells[heading] == "–"
            else:
                digits = 2 if "metres" in heading else 3
                assert "-" not in cells[heading]  # a minus is typed as one
                shown = float(cells[heading].replace("−", "-"))
                assert shown == pytest.approx(float(report[name][number]), abs=0.51 * 10**-digits)
        assert float(cells["score after"]) == pytest.approx(float(report.score[number]), abs=6e-4)
    assert rows[2][3] == "NO_TEXTURE"


def test_the_numbers_on_top(stack, page):
    _, _, report = stack
    text = " ".join(" ".join(Tree(page).text).split())
    ok = report.status.values == 0
    length = np.hypot(report.shift_x.values, report.shift_y.values)[ok]
    assert "frames aligned 5 of 6 83%" in text
    assert f"median shift {np.median(length):.3f} px {10 * np.median(length):.3g} m" in text
    assert f"95 % of the shifts are below {np.percentile(length, 95):.3f} px" in text
    assert "NO_TEXTURE 1: flat, empty or wholly masked" in text


def test_complete_in_itself_and_safe(page):
    tree = Tree(page)
    # nothing that a browser would fetch: every source is data, every link is data or inside
    for tag, attributes in tree.seen:
        assert tag not in ("link", "iframe", "object", "base")
        assert attributes.get("src", "data:").startswith("data:"), tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"https?://|url\(|@import", page)
    (policy,) = (m["content"] for m in tree.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert len(tree.all("script")) == 1
    text = "".join(tree.text)
    assert "<script>alert(1)</script> & more" in text  # shown, not run
    assert "Lots & <lots>" in text


def test_accessible_by_construction(page):
    tree = Tree(page)
    assert tree.all("html")[0]["lang"] == "en"
    assert tree.all("meta")[2]["name"] == "viewport"
    assert len(tree.all("h1")) == 1
    assert all(len(image["alt"]) > 5 for image in tree.all("img"))
    ids = [attributes["id"] for _, attributes in tree.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in (attributes for _, attributes in tree.seen):
        assert attributes.get("aria-labelledby", ids[0]) in ids
        if attributes.get("role") == "region":  # what scrolls is reached by keyboard and has a name
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
    headers = [(tag, attributes) for tag, attributes in tree.seen if tag == "th"]
    assert all(attributes["scope"] in ("col", "row") for _, attributes in headers)


def test_the_csv_inside_is_the_report(stack, page, tmp_path):
    _, _, report = stack
    (link,) = (a for a in Tree(page).all("a") if "download" in a)
    (tmp_path / "report.csv").write_bytes(base64.b64decode(link["href"].partition("base64,")[2]))
    again = load_report(tmp_path / "report.csv")
    for name in ("warp", "shift_x", "sigma", "status"):
        assert np.array_equal(again[name], report[name])


def pictures(page: str) -> list[Image.Image]:
    sources = [image["src"] for image in Tree(page).all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


def test_pictures(stack, page):
    cube, aligned, report = stack
    before, after, scatter, scores, shifts, profile, *frames = pictures(page)
    assert before.size == after.size == (64, 72)
    assert len(frames) == 6
    assert all(image.width > 600 for image in (scatter, scores, shifts, profile))
    kept = report.status.values == 0
    for image, values in ((before, cube), (after, aligned)):
        median = np.median(values.values[kept], 0)[2]  # red
        assert np.corrcoef(np.asarray(image)[..., 0].ravel(), median.ravel())[0, 1] > 0.97
    assert np.asarray(frames[2]).std((0, 1)).max() < 1  # the empty one
    assert len(pictures(html.to_html(report))) == 3  # without a cube the charts alone
    assert len(pictures(html.to_html(report, cube))) == 3 + 6


def test_noise_fits_the_encoder():
    # with optimisation, Pillow's JPEG gives up on what does not compress
    noise = np.random.default_rng(0).random((512, 512, 3))
    assert html._jpeg(noise).startswith("data:image/jpeg;base64,")


def test_a_dataset_is_shown_as_its_bands_are(stack):
    cube, aligned, report = stack
    pair = [array.to_dataset("band") for array in (cube, aligned)]
    assert html.to_html(report, *pair) == html.to_html(report, cube, aligned)


def test_large_cubes_are_shown_in_part(stack, monkeypatch):
    dask = pytest.importorskip("dask.array")
    cube, aligned, report = stack
    monkeypatch.setattr(html, "_WINDOW", 40)
    monkeypatch.setattr(html, "_PICTURED", 0)
    monkeypatch.setattr(html, "_FEWEST", 3)
    monkeypatch.setattr(html, "_THUMBNAIL", 20)
    lazy = [
        array.copy(data=dask.from_array(array.values, chunks=(1, 4, 72, 64))) for array in (cube, aligned)
    ]
    page = html.to_html(report, *lazy)
    before, after, *_, thumbnail = pictures(page)
    assert before.size == after.size == (40, 40)
    assert max(thumbnail.size) <= 20
    assert "median over time of 3 frames (bands B04, B03, B02), the 40 × 40 pixels in the middle" in page
    middle = np.median(cube.values[[0, 3, 5]], 0)[2, 16:56, 12:52]
    assert np.corrcoef(np.asarray(before)[..., 0].ravel(), middle.ravel())[0, 1] > 0.97
    monkeypatch.setattr(html, "_THUMBNAILS", 5)
    page = html.to_html(report, *lazy)
    assert "No pictures of single frames" in page
    assert Tree(page).rows[0][0] == "number"


def test_reports_of_nothing_good_and_of_nothing(stack):
    cube, _, report = stack
    bad = report.copy()
    bad["status"] = xr.full_like(report.status, 3)
    bad["sigma"] = xr.full_like(report.sigma, np.inf)
    page = html.to_html(bad, cube, cube)
    assert "0 of 6 frames aligned" in page
    assert not re.search(r"\b(nan|inf)\b", " ".join(Tree(page).text).lower().replace("infinity", ""))
    nothing = cube.isel(time=[])
    assert "0 of 0 frames aligned" in html.to_html(report.isel(time=[]), nothing, nothing)
    empty = html.to_html(report.isel(time=[]), nothing)
    assert "0 of 0 frames aligned" in empty
    assert len(Tree(empty).rows) == 1


def test_save(stack, tmp_path):
    _, _, report = stack
    path = html.save_html(report, tmp_path / "new" / "report.html")
    assert path.read_text("utf-8") == html.to_html(report)  # the same every time
    with pytest.raises(FileExistsError):
        html.save_html(report, path)
    html.save_html(report, path, overwrite=True, title="Again")
    assert "<h1>Again</h1>" in path.read_text("utf-8")
    assert [item.name for item in path.parent.iterdir()] == ["report.html"]


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda cube, report, path: html.to_html(cube), TypeError),
        (lambda cube, report, path: html.to_html(report.drop_vars("sigma")), ValueError),
        (lambda cube, report, path: html.to_html(report, cube.values), TypeError),
        (lambda cube, report, path: html.to_html(report, cube.isel(time=slice(3))), ValueError),
        (lambda cube, report, path: html.to_html(report, None, cube), ValueError),
        (lambda cube, report, path: html.to_html(report, cube, cube.isel(x=slice(9))), ValueError),
        (lambda cube, report, path: html.save_html(report, path / "report.pdf"), ValueError),
    ],
)
def test_bad_input(stack, call, error, tmp_path):
    cube, _, report = stack
    with pytest.raises(error, match=r"expected .*got .*; "):
        call(cube, report, tmp_path)
    assert not list(tmp_path.iterdir())


# --- in a real browser ---

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome on this machine")
    return found


def browse(chromium, path, tmp_path, *options) -> str:
    profile = tmp_path / "profile"
    command = [chromium, *FLAGS.split(), f"--user-data-dir={profile}", *options, path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    shutil.rmtree(profile, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr  # an error of the script, or what the policy forbade
    return done.stdout


@pytest.mark.slow
def test_rendered(chromium, page, tmp_path):
    path, shot = tmp_path / "report.html", tmp_path / "report.png"
    path.write_text(page, encoding="utf-8")
    browse(chromium, path, tmp_path, "--window-size=1000,1400", f"--screenshot={shot}")
    with Image.open(shot) as image:
        seen = np.asarray(image.convert("RGB"))
    assert seen.shape == (1400, 1000, 3)
    assert len(np.unique(seen.reshape(-1, 3), axis=0)) > 2000  # text, bars and pictures
    blue, grey = (np.array(colour) for colour in ((0, 114, 178), (140, 140, 140)))
    bar = next(row for row in seen if (row == blue).all(-1).mean() > 0.6)  # five in six are aligned
    assert 0.1 < (bar == grey).all(-1).mean() < 0.2  # and one is not


DRIVER = """
const seen = {};
const numbers = () => Array.from(document.querySelectorAll("#frames tbody tr"))
  .filter((row) => !row.hidden).map((row) => +row.cells[1].textContent);
const click = (heading) => Array.from(document.querySelectorAll("thead button"))
  .find((button) => button.textContent === heading).click();
const type = (id, value, event) => {
  document.querySelector(id).value = value;
  document.querySelector(id).dispatchEvent(new Event(event));
};
seen.start = numbers();
click("shift x"); seen.up = numbers();
click("shift x"); seen.down = numbers();
seen.sorted = Array.from(document.querySelectorAll("th[aria-sort]")).map((th) => [th.textContent, th.ariaSort]);
click("time"); click("time"); seen.dates = numbers();
type("#status", "flagged", "change"); seen.flagged = numbers();
seen.count = document.querySelector("#count").textContent;
type("#status", "OK", "change"); type("#find", "2020-01-1 ok", "input"); seen.found = numbers();
document.querySelector("#reset").click(); seen.reset = numbers();
type(".slide", "25", "input");
seen.clip = getComputedStyle(document.querySelectorAll(".compare img")[1]).clipPath;
const boxes = Array.from(document.querySelectorAll(".compare img")).map((image) => image.getBoundingClientRect());
seen.laid = boxes[0].left === boxes[1].left && boxes[0].top === boxes[1].top && boxes[0].width === boxes[1].width;
seen.width = [document.documentElement.scrollWidth, innerWidth];
seen.small = Array.from(document.querySelectorAll("button, select, input")).filter((each) => !each.hidden)
  .filter((each) => each.getBoundingClientRect().height < 24).map((each) => each.outerHTML);
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen);
document.body.append(out);
"""


def test_the_table_sorts_and_filters_and_fits_a_phone(chromium, stack, page, tmp_path):
    _, _, report = stack
    path = tmp_path / "report.html"
    # the page's own script runs under the page's own policy
    path.write_text(page, encoding="utf-8")
    dump = browse(chromium, path, tmp_path, "--dump-dom")
    assert "6 of 6 frames shown" in dump
    # and is driven with the policy taken off, which allows no other
    driven = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    path.write_text(driven.replace("</body>", f"<script>{DRIVER}</script></body>"), encoding="utf-8")
    dump = browse(chromium, path, tmp_path, "--window-size=390,844", "--dump-dom")
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', dump, re.DOTALL).group(1))
    good = [0, 1, 3, 4, 5]
    by_shift = sorted(good, key=lambda number: float(report.shift_x[number]))
    assert seen["start"] == [0, 1, 2, 3, 4, 5]
    assert seen["up"] == [*by_shift, 2]  # what has no number is last, both ways
    assert seen["down"] == [*by_shift[::-1], 2]
    assert seen["sorted"] == [["shift x", "descending"]]
    assert seen["dates"] == [5, 4, 3, 2, 1, 0]
    assert seen["flagged"] == [2]
    assert seen["count"] == "1 of 6 frames shown"
    assert seen["found"] == [3]  # 2020-01-11 is flagged, 2020-01-16 is not
    assert sorted(seen["reset"]) == [0, 1, 2, 3, 4, 5]
    assert seen["clip"] == "inset(0px 0px 0px 25%)"
    assert seen["laid"]
    assert seen["width"][0] <= seen["width"][1] <= 500  # nothing sticks out sideways
    assert not seen["small"]  # to be hit with a finger
