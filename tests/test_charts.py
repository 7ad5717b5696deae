"""The charts: the numbers that they show, read from the SVG, and that they fit into a page."""
import re
from xml.etree import ElementTree

import numpy as np
import pytest

import charts

LOG = [dict(stage="train", step=k, loss=100.0 - k) for k in range(1, 21)]
LOG += [dict(stage="train", seconds=3.0), dict(stage="tune", step=1, loss=5.0)]
TABLE = dict(bicubic=dict(psnr=30.0, seconds=0.1),
             dense=dict(psnr=32.0, seconds=2.0, params=4_000_000),
             pruned=dict(psnr=31.0, seconds=1.0, params=2_000_000))


def parse(svg: str) -> ElementTree.Element:
    """The element; ParseError where it is not well-formed."""
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [element.text.strip() for element in parse(svg).iter() if element.tag.endswith("}text")]


def corners(svg: str, name: str) -> np.ndarray:
    """(n, 2): the corners of the path in the group of this id, y downwards."""
    [group] = [element for element in parse(svg).iter() if element.get("id") == name]
    [path] = [element for element in group.iter() if element.tag.endswith("}path")]
    return np.array(re.findall(r"([\d.]+) ([\d.]+)", path.get("d")), float)


# ---- the element --------------------------------------------------------------------------------
def test_a_chart_takes_the_colours_of_the_page():
    svg = charts.quality(TABLE, "params", 1e6, "parameters", "parameters (millions)")
    assert svg.startswith('<svg role="img" aria-label="PSNR-Y against parameters (millions)')
    assert "var(--ink)" in svg
    assert "var(--line)" in svg
    assert charts.INK not in svg
    assert charts.LINE not in svg
    assert "#000000" not in svg, "black letters or lines cannot be read on dark pages"
    assert "DejaVu" not in svg, "the font is the page's"


def test_charts_do_not_share_ids():
    first = charts.losses(dict(a=LOG), dict(a=255.0))
    ids = []
    for svg in [*first, charts.quality(TABLE, "params", 1e6, "x", "x")]:
        own = [element.get("id") for element in parse(svg).iter() if element.get("id")]
        used = re.findall(r"url\(#([^)]*)\)", svg) + re.findall(r'href="#([^"]*)"', svg)
        assert set(used) <= set(own)
        ids += own
    assert len(set(ids)) == len(ids)


def test_axes_say_their_units():
    for cost, unit, label in (("params", 1e6, "parameters (millions)"),
                              ("seconds", 1, "time per picture (s)")):
        shown = texts(charts.quality(TABLE, cost, unit, cost, label))
        assert {label, "PSNR-Y (dB)", "bicubic", "dense", "pruned"} <= set(shown)
    [shown, _] = charts.losses(dict(a=LOG), dict(a=255.0))
    assert {"step", "loss (pixels 0 to 255)"} <= set(texts(shown))
    [shown, _] = charts.losses(dict(a=LOG, b=LOG), dict(a=255.0, b=1.0))
    assert {"loss (each network's own pixels)", "a", "b"} <= set(texts(shown))


# ---- losses -------------------------------------------------------------------------------------
def test_stages_without_a_loss_have_no_chart():
    assert len(charts.losses(dict(a=LOG), dict(a=1.0))) == 2
    assert charts.losses(dict(a=LOG[20:21]), dict(a=1.0)) == []


def test_a_repeated_step_counts_once():
    """After kill -9 some steps are taken again: the later line is the one that led on."""
    log = [*LOG[:3], dict(stage="train", step=2, loss=7.0), dict(stage="search", step=9, loss=1.0)]
    assert charts.curve(log, "train") == ([1, 2, 3], [99.0, 7.0, 97.0])


def test_the_running_mean():
    values = [float(k * k % 17) for k in range(60)]
    means = charts.running_mean(values)                          # three to each side
    assert means[30] == pytest.approx(sum(values[27:34]) / 7)
    assert means[0] == pytest.approx(sum(values[:4]) / 4)
    assert means[59] == pytest.approx(sum(values[56:]) / 4)


# ---- widths and chances -------------------------------------------------------------------------
def test_bars_are_as_high_as_the_layers_are_wide():
    dense = dict(a=16, b=64, c=32)
    svg = charts.widths(dense, dict(a=8, b=48, c=32), "w")
    heights = [np.ptp(corners(svg, f"w-bar-{i}")[:, 1]) for i in range(3)]
    assert np.array(heights) / heights[0] == pytest.approx([1, 4, 2], rel=1e-4)
    kept = [np.ptp(corners(svg, f"w-{name}")[:, 1]) for name in kept_patches(svg)]
    assert np.array(kept) / heights[0] == pytest.approx([0.5, 3, 2], rel=1e-4)


def kept_patches(svg: str) -> list[str]:
    """The ids of the blue bars, without the one in the legend, which comes last."""
    found = []
    for group in parse(svg).iter():
        path = [e for e in group if e.tag.endswith("}path")]
        if path and f"fill: {charts.COLOURS[0]}" in path[0].get("style", ""):
            found.append(group.get("id").removeprefix("w-"))
    return found[:-1]


def test_the_chances_of_the_search():
    """Two layers over three steps: one decides for the widest width, the other for none."""
    even = [1 / 6] * 6
    lines = [dict(stage="search", step=k, loss=1.0, alpha=[even, [0.02] * 5 + [0.9]])
             for k in (1, 2, 3)]
    decided, mean, last = charts.chances([*LOG, *lines], "s")
    assert {"chance of the likeliest width", "step"} <= set(texts(decided))
    assert {"narrowest", "widest", "chance"} <= set(texts(mean))
    assert {"layer", "candidate width"} <= set(texts(last))
    [fields] = [element for element in parse(last).iter() if element.get("id") == "s-final-fields"]
    styles = " ".join(element.get("style", "") for element in fields.iter())
    strength = [float(n) for n in re.findall(r"fill-opacity: ([\d.]+)", styles)]
    # from the narrowest width to the widest, layer after layer
    assert strength == pytest.approx([1 / 6, 0.02] * 5 + [1 / 6, 0.9], abs=0.01)


def test_a_log_without_chances_has_no_chart_of_them():
    assert charts.chances(LOG, "s") == []
