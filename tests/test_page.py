"""The page: its HTML, what it embeds, and how it behaves in a browser where one is installed."""
import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import browser
import data
import leaves
import page
from evaluate import Row

NAMES = ['one & "two" <b>.png', "plain"]
RED, BLUE = (200, 30, 20), (20, 40, 210)
DENSE = dict(first=16, attention=12)
KEPT = dict(first=8, attention=6)
ORDERS = dict(first=[15, 0, 3, 1, 2, 4, 7, 5], attention=[5, 2, 0])    # two heads of 6
FACTS = dict(command="python train.py --arch <x>", machine="a machine", versions="Python 3",
             date="2025-01-31")
EMPTY = {"meta", "link", "img", "input", "br", "path"}                 # elements without an end


def picture(colour: tuple, seed: int, height: int = 90, width: int = 120) -> np.ndarray:
    """A plain picture with a little noise."""
    noise = np.random.default_rng(seed).integers(-9, 10, (height, width, 3))
    return (np.array(colour) + noise).astype(np.uint8)


def results(colour: tuple, seed: int) -> list[Row]:
    return [Row(name, 30.0 + i, 0.9, 1.0, picture(colour, seed + i))
            for i, name in enumerate(NAMES)]


ROWS = dict(bicubic=results(RED, 0), dense=results((90, 90, 90), 2), pruned=results(BLUE, 4))
ORIGINALS = [picture((30, 200, 60), 6 + i) for i in range(2)]
PICTURES = data.Pictures(NAMES, lambda i: data.Picture({1: ORIGINALS[i][::4, ::4],
                                                        4: ORIGINALS[i]}), (1, 4))
TABLE = dict(bicubic=dict(psnr=30.0, ssim=0.8, seconds=0.01))
for k, network in enumerate(("dense", "cut", "pruned")):
    TABLE[network] = dict(psnr=31.0 - k / 8, ssim=0.9, seconds=2.0 - k, params=4_000_000 - k,
                          madds=8e9, madds_720p=9e9)
TABLE["pruned"]["seconds"] = 0.5
LOG = [dict(stage="start", **FACTS), dict(stage="train", step=1, loss=3.0),
       dict(stage="train", step=2, loss=2.0), dict(stage="train", seconds=12.3)]


def story(**changes) -> page.Story:
    return page.Story("a_run", LOG, dict(arch="x", seed=3), 255.0, DENSE, KEPT,
                      ORDERS)._replace(**changes)


def build(*stories: page.Story) -> str:
    return page.build("A <title>", TABLE, ROWS, PICTURES, list(stories), FACTS)


@pytest.fixture(scope="module")
def html() -> str:
    return build(story())


class Reader(HTMLParser):
    """Collects the elements as (tag, attributes), and the text; fails where an end is missing."""
    def __init__(self, text: str):
        super().__init__()
        self.elements = []
        self.open = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text

    def having(self, name: str) -> list[dict]:
        """The attributes of all elements that have this one."""
        return [attributes for _, attributes in self.elements if name in attributes]

    def of_class(self, name: str) -> list[dict]:
        return [a for a in self.having("class") if name in a["class"].split()]


def decoded(source: str) -> np.ndarray:
    file = base64.b64decode(source.partition("base64,")[2])
    return np.array(Image.open(io.BytesIO(file)))


# ---- the file -----------------------------------------------------------------------------------
def test_the_page_is_one_file(html):
    """Nothing is loaded from anywhere, every element ends, no id stands twice."""
    read = Reader(html)
    assert html.startswith("<!DOCTYPE html>")
    assert page.MARK in html[:1000]
    for attributes in read.having("src"):
        assert attributes["src"].startswith("data:image/")
    for name in ("href", "xlink:href"):
        for attributes in read.having(name):
            assert attributes[name].startswith(("#", "data:"))
    assert not any(tag == "script" and attributes for tag, attributes in read.elements)
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html.partition("<body>")[0])) == set()
    ids = [attributes["id"] for attributes in read.having("id")]
    assert len(set(ids)) == len(ids)


def test_names_are_text_and_no_elements(html):
    read = Reader(html)
    assert not any(tag in ("b", "x", "title") and "class" in a for tag, a in read.elements)
    assert "A <title>" in read.text
    assert 'one & "two" <b>.png, 120×90 pixels' in read.text
    assert "python train.py --arch <x>" in read.text


def test_every_picture_stands_there_in_all_versions_without_loss(html):
    read = Reader(html)
    images = iter([decoded(a["src"]) for tag, a in read.elements if tag == "img"])
    layers = iter(read.of_class("layer"))
    for i, name in enumerate(NAMES):
        for version, rows in dict(ROWS, original=None).items():
            layer = next(layers)
            assert layer["data-version"] == version
            assert layer["data-says"] == (f"{version} 3{i}.00 dB" if rows else "original")
            assert np.array_equal(next(images), rows[i].image if rows else ORIGINALS[i]), name
    assert next(images, None) is None
    assert [a["class"] for a in read.of_class("layer")] == 2 * [
        "layer left", "layer", "layer right", "layer"]


def test_the_menus_offer_all_versions(html):
    for side, chosen in (("left", "bicubic"), ("right", "pruned")):
        [menu] = re.findall(rf'<select id="{side}">(.*?)</select>', html)
        assert re.findall(r">(\w+)</option>", menu) == ["bicubic", "dense", "pruned", "original"]
        assert f"<option selected>{chosen}<" in menu


def test_the_numbers(html):
    text = Reader(html).text
    for shown in ("3,999,998", "8.00 G", "30.750 dB", "−0.250 dB against dense", "25 % of dense",
                  "14 of 28 hidden channels stay (50 %)", "a_run", "train 12", 'arch = "x"',
                  "a machine; Python 3; 2025-01-31"):
        assert shown in text


def test_bars_know_the_order_of_selection(html):
    bars = Reader(html).of_class("bar")
    assert [json.loads(bar["data-order"]) for bar in bars] == list(ORDERS.values())
    assert [bar["data-dense"] for bar in bars] == ["16", "6"]
    assert bars[0]["data-says"].startswith("first: 8 of 16 channels kept. ")
    assert "6 of 12 channels kept, the same 3 of 6 in each of 2 heads" in bars[1]["data-says"]


def test_what_is_not_there_is_left_out_with_a_sentence(html):
    assert "does not hold the chances softmax(α)" in html
    alpha = [dict(stage="search", step=1, loss=1.0, alpha=[[1 / 6] * 6] * 2)]
    complete = build(story(log=LOG + alpha))
    assert "does not hold" not in complete
    assert complete.count("<svg") == html.count("<svg") + 4          # three, and the search's loss
    assert "does not say by which command" not in html
    assert "does not say by which command" in build(story(log=[]))
    dense = build(story(dense={}, kept={}, orders={}))
    assert "Widths" not in dense
    assert "softmax" not in dense


def test_several_runs_share_a_page():
    text = build(story(name="runs/a"), story(name="runs/b"))
    read = Reader(text)
    ids = [attributes["id"] for attributes in read.having("id")]
    assert len(set(ids)) == len(ids)
    for heading in ("Widths: runs/a", "Widths: runs/b", "Search: runs/b"):
        assert heading in read.text


# ---- how pictures are stored --------------------------------------------------------------------
def whole(side: int) -> tuple[slice, slice]:
    return slice(0, side), slice(0, side)


def test_what_is_too_large_is_stored_as_jpeg_and_then_in_part():
    images = [leaves.dead_leaves((seed, 0), 400)[:300] for seed in range(3)]
    shown, files, how = page.stored(images, 5_000_000, whole)
    assert how == ""
    assert all(file[8:12] == b"WEBP" for file in files)
    lossless = sum(map(len, files))

    shown, files, how = page.stored(images, lossless - 1, whole)
    assert how.startswith(": JPEG of quality 95")
    assert shown is images
    for image, file in zip(images, files):
        error = np.array(Image.open(io.BytesIO(file))).astype(int) - image
        assert np.abs(error).mean() < 2.5
    share = sum(map(len, files)) // 2

    shown, files, how = page.stored(images, share, whole)
    assert how.startswith(", a part of 400×300: JPEG")
    assert 0.8 * share < sum(map(len, files)) < 1.2 * share
    assert shown[0].shape == np.array(Image.open(io.BytesIO(files[0]))).shape


def gallery_of(sizes: list[tuple], names: list[str]) -> tuple[str, int]:
    """(the gallery of such pictures, the bytes of all versions without loss)."""
    originals = [picture((90, 90, 90), i, *size) for i, size in enumerate(sizes)]
    pictures = data.Pictures(names, lambda i: data.Picture({1: originals[i], 4: originals[i]}),
                             (1, 4))
    rows = {name: [Row("", 30.0, 0.9, 1.0, image) for image in originals]
            for name in ("first", "last")}
    files = [page.encode(image, "WEBP", lossless=True, quality=0, method=0)
             for image in originals * 3]
    return page.gallery(rows, pictures), sum(map(len, files))


def test_what_a_small_picture_does_not_need_is_left_to_a_large_one(monkeypatch):
    sizes, names = [(600, 400), (40, 40)], ["large", "small"]
    _, needed = gallery_of(sizes, names)
    monkeypatch.setattr(page, "BYTES", needed)
    html, _ = gallery_of(sizes, names)
    assert "JPEG" not in html
    assert html.index("large, 400×600") < html.index("small, 40×40"), "in their own order"


def test_the_page_is_not_too_large(monkeypatch):
    """Each of the two could be stored without loss in all that is there for both."""
    sizes, names = [(300, 400), (400, 400)], ["a", "b"]
    html, needed = gallery_of(sizes, names)
    assert len(html) > 4 / 3 * needed, "base64 takes four letters for three bytes"
    monkeypatch.setattr(page, "BYTES", int(0.7 * needed))
    html, _ = gallery_of(sizes, names)
    assert "JPEG" in html
    assert len(html) < 4 / 3 * 0.7 * needed * 1.1


def test_a_close_up_does_not_go_beyond_the_picture():
    """100 pixels of 600, enlarged 3 times: 200 are seen, from 100 pixels before its middle."""
    assert page.shift(slice(250, 350), 600, 3) == pytest.approx(-100 * 3 * 200 / 600)
    assert page.shift(slice(0, 100), 600, 3) == 0
    assert page.shift(slice(500, 600), 600, 3) == pytest.approx(-100 * 3 * 400 / 600)


# ---- in a browser -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def file(html, tmp_path_factory):
    """The page as a file."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html)
    return path


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """A browser."""
    if browser.find() is None:
        pytest.skip("there is no Chromium or Chrome, so the page is not opened in a browser")
    with browser.Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def colours(window, *parts: float) -> list[np.ndarray]:
    """The colours that the first slider shows at these parts of its width, a fifth from its top."""
    window.value("document.querySelector('.frame').scrollIntoView({block: 'center'})")
    left, top, width, height = box(window)
    shown = np.array(Image.open(io.BytesIO(window.screenshot())).convert("RGB"), float)
    y = int(top + height / 5)
    return [shown[y - 3:y + 4, int(left + part * width) - 3:][:, :7].mean((0, 1))
            for part in parts]


def box(window) -> list[float]:
    """Left, top, width and height of the first slider."""
    return window.value("(r => [r.left, r.top, r.width, r.height])"
                        "(document.querySelector('.frame').getBoundingClientRect())")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_renders_without_errors(window, file, width, dark):
    window.open(file, width, dark=dark)
    assert window.errors() == []
    assert window.requests() == [file.resolve().as_uri()]
    assert window.value("document.documentElement.scrollWidth") <= width
    assert window.value("all('svg').every(svg => svg.getBoundingClientRect().height > 100)")
    brightness = []
    for selector, name in (("body", "background-color"), ("svg text", "fill")):
        colour = window.value(f"getComputedStyle(document.querySelector('{selector}'))"
                              f".getPropertyValue('{name}')")
        brightness.append(sum(map(int, re.findall(r"\d+", colour)[:3])) / 3)
    ground, ink = brightness
    assert (ground < 60 and ink > 200) if dark else (ground > 240 and ink < 60)
    left, right = colours(window, 0.25, 0.75)
    assert left == pytest.approx(RED, abs=8)
    assert right == pytest.approx(BLUE, abs=8)


def test_the_slider_moves_by_keyboard(window, file):
    window.open(file)
    window.value("document.querySelector('.frame input').focus()")
    position = "document.querySelector('.frame input').value"
    assert float(window.value(position)) == 50
    for _ in range(30):
        window.press("ArrowRight")
    assert float(window.value(position)) == 80
    left, right = colours(window, 0.75, 0.85)
    assert left == pytest.approx(RED, abs=8)
    assert right == pytest.approx(BLUE, abs=8)
    window.press("ArrowLeft")
    assert float(window.value(position)) == 79


def test_the_slider_follows_mouse_and_finger(window, file):
    window.open(file, 400)
    colours(window)                                # scrolls to it
    left, top, width, height = box(window)
    for kind in ("mousePressed", "mouseReleased"):
        window.mouse(kind, left + 0.2 * width, top + height / 2)
    position = "parseFloat(document.querySelector('.frame input').value)"
    assert window.value(position) == pytest.approx(20, abs=1)
    for kind, part in (("touchStart", 0.3), ("touchMove", 0.5), ("touchMove", 0.7)):
        window.send("Input.dispatchTouchEvent", type=kind,
                    touchPoints=[dict(x=left + part * width, y=top + height / 2)])
    window.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert window.value(position) == pytest.approx(70, abs=2)


def test_the_menus_choose_the_versions(window, file):
    window.open(file)
    for side, name in (("left", "pruned"), ("right", "bicubic")):
        window.value(f"menus.{side}.value = '{name}'")
        window.value(f"menus.{side}.dispatchEvent(new Event('change'))")
    left, right = colours(window, 0.25, 0.75)
    assert left == pytest.approx(BLUE, abs=8)
    assert right == pytest.approx(RED, abs=8)
    assert window.value("document.querySelector('.tag.left').textContent") == "pruned 30.00 dB"


def test_the_close_up_shows_where_the_gain_is(window, tmp_path):
    """A picture of 512×384 whose versions differ in one square of 128 pixels, or at an edge."""
    for top, left in ((160, 320), (0, 384)):
        original = np.full((384, 512, 3), 128, np.uint8)
        original[top:top + 128, left:left + 128] = BLUE
        before = np.full_like(original, 128)
        pictures = data.Pictures(["a"], lambda i, high=original: data.Picture({1: high, 4: high}),
                                 (1, 4))
        rows = {name: [Row("a", 30.0, 0.9, 1.0, image)]
                for name, image in (("bicubic", before), ("dense", original))}
        file = tmp_path / "near.html"
        file.write_text(page.build("x", TABLE, rows, pictures, [], FACTS))
        window.open(file)
        assert colours(window, 0.1)[0] == pytest.approx((128,) * 3, abs=3)
        window.value("near.click()")
        shown = colours(window, 0.1, 0.45, 0.55, 0.95)
        for colour, expected in zip(shown, ((128,) * 3, (128,) * 3, BLUE, BLUE)):
            assert colour == pytest.approx(expected, abs=3)


def test_a_bar_shows_its_order_where_the_mouse_is(window, file):
    window.open(file)
    window.value("document.querySelector('.broad').scrollIntoView({block: 'center'})")
    x, y = window.value("(r => [r.left + r.width / 2, r.bottom - 5])"
                        "(all('.bar')[1].getBoundingClientRect())")
    window.mouse("mouseMoved", x, y)
    panel = window.value("document.querySelector('.order').textContent")
    assert panel.startswith("attention: 6 of 12")
    places = window.value("all('.cells i').map(cell => cell.textContent)")
    assert places == ["3", "", "2", "", "", "1"]
