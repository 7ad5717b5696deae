"""The page of a report: one HTML file with pictures, charts, style and script inside it.

It loads nothing from anywhere, so it can be sent by mail and opened without a network. Its style
and script are assets/report.css and assets/report.js. What it shows was measured by report.py (read
next), and found in the run folders (`Story`). Charts: charts.py.
"""
import base64
import io
import json
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

import charts
import data
from crops import most_gained
from run import Bar

ASSETS = Path(__file__).parent / "assets"
MARK = '<meta name="generator" content="report.py of dual regression compression">'
BYTES = 11_000_000                   # of pictures; in the page's base64 they take a third more
QUALITY = 95                         # of JPEG, for what is too large to be stored without loss
NEAR = 128                           # pixels from left to right in a close-up
LEAST = 96                           # the smallest side of a part of a picture


class Story(NamedTuple):
    """What led to the networks of a run."""
    name: str
    log: list[dict]                  # lines of log.jsonl
    config: dict                     # the settings
    largest: float                   # of a pixel inside the network: its losses are in this range
    dense: dict[str, int]            # {layer: channels}; empty where nothing was pruned, as are
    kept: dict[str, int]             # {layer: channels that stay},
    orders: dict[str, list[int]]     # {layer: its channels in the order of selection}


def build(title: str, table: dict[str, dict], rows: dict[str, list], pictures: data.Pictures,
          stories: list[Story], facts: dict[str, str]) -> str:
    """The page as text.

    table: {upscaler: its line of report.json}, bicubic first; rows: {upscaler: one evaluate.Row
    per picture} of those whose pictures are to be shown; facts: where it was measured.
    """
    parts = [head(title), summary(table, len(pictures)), table_section(table),
             gallery(rows, pictures), cost_section(table)]
    for number, story in enumerate(stories):
        name = story.name if len(stories) > 1 else ""
        parts.append(widths_section(story, name, f"widths{number}"))
        parts.append(search_section(story, name, f"search{number}"))
    parts += [loss_section(stories), origin(stories, facts),
              f"<script>{(ASSETS / 'report.js').read_text()}</script>", "</body>", "</html>", ""]
    return "\n".join(parts)


def head(title: str) -> str:
    """The beginning of the file, to the title."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{(ASSETS / "report.css").read_text()}</style>
</head>
<body>
<h1>{escape(title)}</h1>"""


# ---- numbers ------------------------------------------------------------------------------------
def summary(table: dict[str, dict], pictures: int) -> str:
    """A sentence and four numbers: the last network beside the first one."""
    networks = [name for name, line in table.items() if "params" in line]
    first, last = table[networks[0]], table[networks[-1]]
    gain = last["psnr"] - table["bicubic"]["psnr"]
    where = f"on {pictures} pictures" if pictures > 1 else "on one picture"
    if len(networks) == 1:
        return (f'<p class="lead">{escape(networks[0])} is {signed(gain)} against bicubic '
                f'interpolation {where}.</p>')
    names = f"{escape(networks[-1])} beside {escape(networks[0])}"
    tiles = [("PSNR-Y", f"{last['psnr']:.3f} dB", signed(last["psnr"] - first["psnr"])
              + f" against {networks[0]}")]
    for key, title, shown in (("params", "parameters", f"{last['params'] / 1e6:.2f} M"),
                              ("madds", "multiply-adds", f"{last['madds'] / 1e9:.1f} G"),
                              ("seconds", "time", f"{last['seconds']:.3f} s")):
        tiles.append((title, shown, f"{100 * last[key] / first[key]:.0f} % of {networks[0]}"))
    cells = [f'<div class="tile"><span>{title}</span><b>{shown}</b>'
             f'<span>{escape(part)}</span></div>' for title, shown, part in tiles]
    return (f'<p class="lead">{names}, {where}; bicubic interpolation reaches '
            f'{table["bicubic"]["psnr"]:.3f} dB.</p>\n<div class="tiles">{"".join(cells)}</div>')


def signed(difference: float) -> str:
    """A difference in dB, with a true minus sign."""
    return f"{difference:+.3f} dB".replace("-", "−")


def table_section(table: dict[str, dict]) -> str:
    """The table."""
    heads = ("", "PSNR-Y (dB)", "SSIM", "parameters", "MAdds, 96×96 input",
             "MAdds, 720p output", "s, 96×96 input")
    best = max(table, key=lambda name: table[name]["psnr"])
    lines = []
    for name, line in table.items():
        cost = ["–", "–", "–", "–"]
        if "params" in line:
            cost = [f"{line['params']:,}", f"{line['madds'] / 1e9:.2f} G",
                    f"{line['madds_720p'] / 1e9:.1f} G", f"{line['seconds']:.3f}"]
        cells = [escape(name), f"{line['psnr']:.3f}", f"{line['ssim']:.4f}", *cost]
        mark = ' class="best"' if name == best else ""
        lines.append(f"<tr{mark}><td>{'</td><td>'.join(cells)}</td></tr>")
    return (f'<h2>Results</h2>\n<div class="wide"><table>\n'
            f'<tr><th>{"</th><th>".join(heads)}</th></tr>\n{chr(10).join(lines)}\n</table></div>\n'
            f'<p class="soft">Means over all pictures; PSNR and SSIM of the luma. The highest PSNR '
            f'is bold. The networks were timed in turns.</p>')


def cost_section(table: dict[str, dict]) -> str:
    """PSNR against parameters, against multiply-adds and against time."""
    shown = [charts.quality(table, "params", 1e6, "parameters", "parameters (millions)"),
             charts.quality(table, "madds", 1e9, "multiply-adds",
                            "multiply-adds, 96×96 input (billions)"),
             charts.quality(table, "seconds", 1, "time", "time, 96×96 input (s)")]
    return f"<h2>Quality and cost</h2>\n{side_by_side(shown)}"


def side_by_side(elements: list[str]) -> str:
    """Charts in a row, or below each other where the page is narrow."""
    return f'<div class="charts">{"".join(f"<figure>{svg}</figure>" for svg in elements)}</div>'


# ---- before and after ---------------------------------------------------------------------------
def gallery(rows: dict[str, list], pictures: data.Pictures) -> str:
    """A slider for every picture, between any two of the upscalers and the original."""
    names = [*rows, "original"]
    menus = []
    for side, chosen in (("left", names[0]), ("right", names[-2])):
        options = [f"<option{' selected' if name == chosen else ''}>{escape(name)}</option>"
                   for name in names]
        menus.append(f'<label>{side} <select id="{side}">{"".join(options)}</select></label>')
    figures = {}
    left = BYTES
    # from small to large: what a small picture does not need is left to the larger ones
    order = sorted(range(len(pictures)), key=lambda i: rows[names[0]][i].image.size)
    for i in Bar(order, desc="page", unit="picture", leave=False, delay=2):
        measured = {name: results[i] for name, results in rows.items()}
        share = left / (len(pictures) - len(figures))
        figures[i], taken = slider(measured, pictures.names[i], pictures[i], share)
        left -= taken
    return f"""<h2>Before and after</h2>
<p>Drag the edge with mouse or finger, or move it with the arrow keys. The close-up
shows the {NEAR} pixels where {escape(names[-2])} gains most over {escape(names[0])}.</p>
<div class="bench">{"".join(menus)}
<label><input type="checkbox" id="near"> close-up</label></div>
<div class="gallery">
{chr(10).join(figures[i] for i in range(len(pictures)))}
</div>"""


def slider(measured: dict, name: str, picture: data.Picture, share: float) -> tuple[str, int]:
    """(one picture in all versions, the bytes of its files); measured: {upscaler: evaluate.Row}."""
    first, *_, last = names = list(measured)
    original = picture.images[max(picture.images)]
    height, width = measured[first].image.shape[:2]
    versions = [row.image for row in measured.values()] + [original[:height, :width]]
    before, after = versions[0], versions[-2]
    versions, files, how = stored(versions, share, partial(most_gained, before, after, original))
    kind = "jpeg" if how else "webp"
    before, after, original = (versions[k] for k in (0, -2, -1))     # now perhaps only a part
    height, width = original.shape[:2]
    zoom = max(1, width / NEAR)
    down, across = most_gained(before, after, original, NEAR)
    near = (f"--zoom: {zoom:.2f}; --across: {shift(across, width, zoom):.1f}%; "
            f"--down: {shift(down, height, zoom):.1f}%")
    says = [f"{upscaler} {row.psnr:.2f} dB" for upscaler, row in measured.items()] + ["original"]
    layers = []
    for version, file, text in zip([*names, "original"], files, says):
        side = {first: " left", last: " right"}.get(version, "")
        layers.append(f'<div class="layer{side}" data-version="{escape(version)}" '
                      f'data-says="{escape(text)}"><img alt="{escape(f"{name}: {text}")}" '
                      f'src="{uri(file, kind)}"></div>')
    html = f"""<figure class="slider">
<div class="frame" style="{near}; aspect-ratio: {width} / {height}">
{"".join(layers)}<div class="handle"></div>
<span class="tag left">{escape(says[0])}</span><span class="tag right">{escape(says[-2])}</span>
<input type="range" min="0" max="100" value="50" step="any"
aria-label="{escape(name)}: where the left version ends, percent">
</div>
<figcaption>{escape(name)}, {width}×{height} pixels{how}</figcaption>
</figure>"""
    return html, sum(map(len, files))


def shift(part: slice, whole: int, zoom: float) -> float:
    """How far an enlarged picture is to be moved, in percent of its size before, so that a part of
    it comes to the middle of the frame; but not beyond the picture's edge.
    """
    middle = 50 * (part.start + part.stop) / whole
    return min(0, max(100 - 100 * zoom, 50 - middle * zoom))


def stored(images: list[np.ndarray], share: float,
           part: Callable) -> tuple[list[np.ndarray], list[bytes], str]:
    """(images that are shown, their files, what is to be said about it), of a picture's versions.

    Together the files take about `share` bytes: without loss if that suffices, else as JPEG, else
    a square as JPEG. images: uint8 (H, W, 3), all of one size; part: side -> (rows, columns) of
    the square.
    """
    files = [encode(image, "WEBP", lossless=True, quality=0, method=0) for image in images]
    if sum(map(len, files)) <= share:
        return images, files, ""
    how = f": JPEG of quality {QUALITY}, since without loss it would make the page too large"
    jpeg = partial(encode, kind="JPEG", quality=QUALITY, subsampling=0)
    files = [jpeg(image) for image in images]
    size = sum(map(len, files))
    if size > share:
        height, width = images[0].shape[:2]
        side = max(LEAST, int((share / size * height * width) ** 0.5))
        box = part(side)
        how = f", a part of {width}×{height}{how}"
        images = [image[box] for image in images]
        files = [jpeg(image) for image in images]
    return images, files, how


def encode(image: np.ndarray, kind: str, **options) -> bytes:
    """An image as a file."""
    blob = io.BytesIO()
    Image.fromarray(image).save(blob, kind, **options)
    return blob.getvalue()


def uri(file: bytes, kind: str) -> str:
    """A file that stands in the page itself."""
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


# ---- what led to it -----------------------------------------------------------------------------
def heading(text: str, name: str) -> str:
    """A heading, with the run's name where there are several."""
    return f"<h2>{text}{f': {escape(name)}' if name else ''}</h2>"


def widths_section(story: Story, name: str, key: str) -> str:
    """The widths of all layers, with the order of selection; key: see charts.svg."""
    if not story.kept:
        return ""
    svg = charts.widths(story.dense, story.kept, key)
    lines = []
    for i, (layer, whole) in enumerate(story.dense.items()):
        kept, order = story.kept[layer], story.orders[layer]
        heads = kept // len(order)
        says = f"{layer}: {kept} of {whole} channels kept"
        if heads > 1:
            says += f", the same {len(order)} of {whole // heads} in each of {heads} heads"
        says += ". Channel by channel, its place in the order of selection; empty: cut."
        svg = svg.replace(f'<g id="{key}-bar-{i}"', (
            f'<g class="bar" data-panel="{key}-order" data-says="{escape(says)}" '
            f'data-dense="{whole // heads}" data-order="{json.dumps(order)}"'))
        lines.append(f'<tr><td>{escape(layer)}</td><td>{whole}</td><td>{kept}</td>'
                     f'<td class="long">{", ".join(map(str, order))}</td></tr>')
    total = sum(story.kept.values()), sum(story.dense.values())
    return f"""{heading("Widths", name)}
<p>{total[0]:,} of {total[1]:,} hidden channels stay ({100 * total[0] / total[1]:.0f} %). Point at a
bar, or tap it, to see which channels of the layer, and in which order they were selected.</p>
<div class="broad">{svg}</div>
<div class="order soft" id="{key}-order" aria-live="polite"></div>
<details><summary>All layers as a table</summary><div class="wide"><table>
<tr><th>layer</th><th>dense</th><th>kept</th><th>channels in the order of selection</th></tr>
{chr(10).join(lines)}
</table></div></details>"""


def search_section(story: Story, name: str, key: str) -> str:
    """softmax(α) over the steps."""
    if not story.kept:
        return ""
    shown = charts.chances(story.log, key)
    if not shown:
        return (f'{heading("Search", name)}\n<p class="soft">The log of this run does not hold the '
                f'chances softmax(α), so their chart is left out.</p>')
    return f"""{heading("Search", name)}
<p>Each layer has six candidate widths; their chances, softmax(α), begin nearly equal. Where a line
ends near 1, the search has decided.</p>
{side_by_side(shown)}"""


def loss_section(stories: list[Story]) -> str:
    """Losses of all stages, all runs in the same charts."""
    shown = charts.losses({story.name: story.log for story in stories},
                          {story.name: story.largest for story in stories})
    if not shown:
        return ""
    return f"""<h2>Losses</h2>
{side_by_side(shown)}
<p class="soft">Thin: the loss of a batch. Thick: its running mean over a tenth of the steps. The
loss of fine-tuning includes the distance to the teacher.</p>"""


def origin(stories: list[Story], facts: dict[str, str]) -> str:
    """Commands, versions, machines, settings, how long the stages took."""
    parts = ["<h2>How this was made</h2>"]
    for story in stories:
        parts.append(f"<h3>{escape(story.name)}</h3>")
        starts = {line["command"]: line for line in story.log if line["stage"] == "start"}
        if not starts:
            parts.append('<p class="soft">The log of this run does not say by which command it was '
                         'trained; its settings are below.</p>')
        for line in starts.values():
            parts.append(f"<pre>{escape(line['command'])}</pre>")
            parts.append(f'<p class="soft">on {escape(sentence(line))}</p>')
        seconds = {line["stage"]: line["seconds"] for line in story.log if "seconds" in line}
        if seconds:
            took = ", ".join(f"{stage} {value:,.0f}" for stage, value in seconds.items())
            parts.append(f"<p>Seconds: {escape(took)}.</p>")
        lines = [f"{name} = {json.dumps(value)}" for name, value in story.config.items()]
        parts.append(f"<details><summary>All settings</summary><pre>{escape(chr(10).join(lines))}"
                     f"</pre></details>")
    parts.append(f"<h3>Measured</h3>\n<pre>{escape(facts['command'])}</pre>\n"
                 f"<p class='soft'>on {escape(sentence(facts))}</p>")
    return "\n".join(parts)


def sentence(facts: dict[str, str]) -> str:
    """Machine, versions and date of report.surroundings as a line."""
    return f"{facts['machine']}; {facts['versions']}; {facts['date']}"
