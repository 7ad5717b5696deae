"""Draws the pictures of README.md.

    python -m assets.draw                           # loop.svg and method.svg, by string formatting
    python -m assets.draw runs/drn_s_x4_p30         # and crops.png, from a finished run of train.py

The SVG files have no background of their own. Their colours can be read on light and on dark pages;
where the browser says which it is (`prefers-color-scheme`), the grey of the text follows.
"""
import math
import random
import sys
from functools import partial
from html import escape
from pathlib import Path

import numpy as np

import crops
import data
import evaluate
import models

HERE = Path(__file__).parent
BLUE = "#2f81f7"                     # networks; weights that stay
GREEN = "#2da44e"                    # the primal loss; the producer's weights
ORANGE = "#e16f24"                   # the dual loss; what is being decided
GREY = "#8b949e"
STYLE = """
text { font: 14px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif }
text { fill: #656d76 }
rect { shape-rendering: crispEdges }
.title { font-size: 17px; font-weight: 600 }
.small { font-size: 12px }
.white { fill: #ffffff; font-weight: 600 }
.blue { fill: #2f81f7; font-weight: 600 }
.green { fill: #2da44e; font-weight: 600 }
.orange { fill: #e16f24; font-weight: 600 }
@media (prefers-color-scheme: dark) { text { fill: #9198a1 } }
"""


# ---- SVG, element by element --------------------------------------------------------------------
def svg(width: int, height: int, title: str, elements: list[str]) -> str:
    """A whole file. title: what a screen reader says."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-label="{escape(title)}">')
    return "\n".join([head, f"<style>{STYLE}</style>", *elements, "</svg>", ""])


def rect(x: float, y: float, width: float, height: float, colour: str, opacity: float = 1) -> str:
    """A filled rectangle."""
    shade = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'fill="{colour}"{shade}/>')


def frame(x: float, y: float, width: float, height: float, dashed: bool = False) -> str:
    """An empty rectangle."""
    dashes = ' stroke-dasharray="3 2"' if dashed else ""
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="none" '
            f'stroke="{GREY}"{dashes}/>')


def text(x: float, y: float, words: str, style: str = "", anchor: str = "middle") -> str:
    return (f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" class="{style}">'
            f'{escape(words)}</text>')


def polygon(points: list[tuple[float, float]], colour: str) -> str:
    corners = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polygon points="{corners}" fill="{colour}"/>'


def arrow(points: list[tuple[float, float]], colour: str, both: bool = False) -> str:
    """A line through the points with a head at its end, or at both ends."""
    corners = " ".join(f"{x:g},{y:g}" for x, y in points)
    line = f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    heads = [head(points[-2], points[-1], colour)]
    if both:
        heads.append(head(points[1], points[0], colour))
    return line + "".join(heads)


def head(start: tuple[float, float], tip: tuple[float, float], colour: str) -> str:
    """A triangle whose tip lies a little beyond `tip`, pointing away from `start`."""
    length = math.dist(start, tip)
    dx = (tip[0] - start[0]) / length
    dy = (tip[1] - start[1]) / length
    x, y = tip[0] + 3 * dx, tip[1] + 3 * dy
    left = (x - 11 * dx - 6 * dy, y - 11 * dy + 6 * dx)
    right = (x - 11 * dx + 6 * dy, y - 11 * dy - 6 * dx)
    return polygon([(x, y), left, right], colour)


# ---- loop.svg: dual regression ------------------------------------------------------------------
SIDE = 24                            # pixels of the true image, which is 4 times as large as x


def landscape() -> np.ndarray:
    """The true image, (SIDE, SIDE, 3) in 0..255: a sun over two mountains and a meadow."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5                                    # (SIDE, SIDE) each
    image = np.full((SIDE, SIDE, 3), (140, 196, 240))                      # the sky
    image[y > 9] = (186, 222, 246)
    image[np.hypot(x - 18.5, y - 5.5) < 3.2] = (255, 196, 61)              # the sun
    for peak, top, slope in ((16.5, 10, 0.8), (8, 5, 1.15)):
        mountain = y - top > slope * abs(x - peak)
        image[mountain & (x < peak)] = (84, 98, 128)
        image[mountain & (x >= peak)] = (60, 72, 102)
    image[mountain & (y < 9)] = (240, 244, 250)                            # snow on the nearer one
    image[y > 18 + 1.5 * np.sin(x / 4)] = (76, 148, 82)                    # the meadow
    return image


def reduced(image: np.ndarray) -> np.ndarray:
    """The image at a quarter of its size: the means of 4×4 pixels."""
    return image.reshape(SIDE // 4, 4, SIDE // 4, 4, 3).mean((1, 3))


def softened(image: np.ndarray) -> np.ndarray:
    """The image as a network might predict it that is not sure of the details."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), "edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (0, 1)).mean((3, 4))
    return 0.3 * image + 0.7 * around


def pixels(left: float, top: float, side: float, image: np.ndarray) -> list[str]:
    """The image drawn as a square: neighbours of one colour in a row share a rectangle."""
    cell = side / len(image)
    elements = []
    for j, row in enumerate(image.round().astype(int)):
        start = 0
        for i in range(1, len(row) + 1):
            if i == len(row) or (row[i] != row[start]).any():
                red, green, blue = row[start]
                colour = f"#{red:02x}{green:02x}{blue:02x}"
                width = (i - start) * cell
                elements.append(rect(left + start * cell, top + j * cell, width, cell, colour))
                start = i
    return [*elements, frame(left, top, side, side)]


def loop() -> str:
    """x -> P -> P(x) -> D -> D(P(x)), which should be x again, and the two losses."""
    y = landscape()
    guess = softened(y)
    elements = [
        *pixels(44, 42, 84, reduced(y)), text(86, 32, "x: low resolution"),
        *pixels(390, 42, 168, guess), text(474, 32, "P(x): super-resolved"),
        *pixels(692, 42, 168, y), text(776, 32, "y: the true image"),
        text(776, 232, "one of many images"), text(776, 250, "that shrink to x"),
        *pixels(44, 208, 84, reduced(guess)), text(86, 311, "D(P(x)): small again"),
        arrow([(138, 84), (378, 84)], BLUE), *network(258, 84, "primal", "network P"),
        arrow([(474, 216), (474, 250), (142, 250)], BLUE), *network(258, 250, "dual", "network D"),
        arrow([(570, 126), (680, 126)], GREEN, both=True),
        text(625, 96, "primal loss", "green"), text(625, 114, "| P(x) − y |", "green"),
        arrow([(86, 138), (86, 196)], ORANGE, both=True),
        text(102, 163, "dual loss", "orange", "start"),
        text(102, 181, "λ · | D(P(x)) − x |", "orange", "start"),
    ]
    return svg(880, 324, "Dual regression: the primal network P enlarges x, the dual network D "
               "shrinks the result, which should be x again", elements)


def network(x: float, y: float, *words: str) -> list[str]:
    """A trapezoid around (x, y), its small side where the images are small, with two words."""
    corners = [(x - 52, y - 20), (x + 52, y - 36), (x + 52, y + 36), (x - 52, y + 20)]
    return [polygon(corners, BLUE), text(x, y - 3, words[0], "white"),
            text(x, y + 15, words[1], "white")]


# ---- method.svg: search, select, cut ------------------------------------------------------------
CELL = 22                            # side of a weight in the drawings
HIDDEN, TRUNK = 8, 6                 # channels between the two layers, and in front of and behind
CANDIDATES = (2, 3, 3, 4, 5, 5)      # search.candidates(8, 0.3, multiple=1)
CHANCES = (0.1, 0.05, 0.05, 0.2, 0.2, 0.4)              # softmax(α); made up, as the weights are
TAKEN = (2, 5, 0)                    # selected so far, in this order
SCORES = {1: 0.3, 3: 0.95, 4: 0.6, 6: 0.15, 7: 0.4}     # of the other channels
KEPT = (0, 2, 3, 4, 5)               # in the end; by the norms it would be 7 in place of 3
TOP = 112                            # of the consumer's weights


def random_weights(rows: int, columns: int, seed: int) -> list[list[float]]:
    """(rows, columns) of numbers in 0..1, some columns stronger than others."""
    chance = random.Random(seed)
    strengths = [chance.uniform(0.5, 1) for _ in range(columns)]
    return [[strength * chance.uniform(0.6, 1) for strength in strengths] for _ in range(rows)]


def matrix(left: float, top: float, weights: list[list[float]], colour: str,
           removed_rows=(), removed_columns=()) -> list[str]:
    """A square for every weight, the stronger the darker; an empty one where it is removed."""
    elements = []
    for j, row in enumerate(weights):
        for i, weight in enumerate(row):
            x, y = left + i * CELL, top + j * CELL
            if j in removed_rows or i in removed_columns:
                elements.append(frame(x + 3, y + 3, CELL - 6, CELL - 6, dashed=True))
            else:
                opacity = 0.08 + 0.92 * weight
                elements.append(rect(x + 1, y + 1, CELL - 2, CELL - 2, colour, opacity))
    return elements


def factors(weights: list[list[float]]) -> list[float]:
    """m_j of every column: the chances of all candidate widths that it would survive."""
    norms = [sum(column) for column in zip(*weights)]
    order = sorted(range(HIDDEN), key=norms.__getitem__, reverse=True)
    result = []
    for j in range(HIDDEN):
        rank = order.index(j)
        result.append(sum(p for n, p in zip(CANDIDATES, CHANCES) if rank < n))
    return result


def centre(left: float, column: int) -> float:
    return left + (column + 0.5) * CELL


def draw_search(left: float, weights: list[list[float]]) -> list[str]:
    """The chances of six candidate widths, and the consumer's columns scaled by m_j."""
    elements = [text(left, 24, "1 · search: how many?", "title", "start")]
    for k, (n, p) in enumerate(zip(CANDIDATES, CHANCES)):
        x = left + 28 + k * 20
        best = p == max(CHANCES)
        elements.append(rect(x, 84 - 110 * p, 16, 110 * p, ORANGE if best else GREY))
        elements.append(text(x + 8, 99, str(n), "small orange" if best else "small"))
    m = factors(weights)
    scaled = [[weight * m[i] for i, weight in enumerate(row)] for row in weights]
    elements += matrix(left, TOP, scaled, BLUE)
    for j in range(HIDDEN):
        elements.append(text(centre(left, j), TOP + 150, f"{m[j]:.1g}", "small"))
    return elements + captions(left, "bars: chances of six widths; 5 wins",
                               "numbers: m, larger for larger norms")


def draw_select(left: float, weights: list[list[float]]) -> list[str]:
    """After three of five rounds: the scores of the columns that are still out."""
    elements = [text(left, 24, "2 · select: which?", "title", "start")]
    best = max(SCORES, key=SCORES.get)
    for j, score in SCORES.items():
        colour = ORANGE if j == best else GREY
        elements.append(rect(centre(left, j) - 8, 99 - 55 * score, 16, 55 * score, colour))
    elements += matrix(left, TOP, weights, BLUE, removed_columns=SCORES)
    for turn, j in enumerate(TAKEN, 1):
        elements.append(text(centre(left, j), TOP + 150, str(turn), "small blue"))
    elements.append(text(centre(left, best) + 4, TOP + 150, "next", "small orange"))
    return elements + captions(left, "bars: gradient of the loss at the",
                               "others; the largest is taken next")


def draw_cut(left: float, weights: list[list[float]]) -> list[str]:
    """The producer without its rows, the consumer without its columns, of the other channels."""
    removed = [j for j in range(HIDDEN) if j not in KEPT]
    producer = random_weights(HIDDEN, TRUNK, 3)
    right = left + TRUNK * CELL + 50                # where the consumer begins
    top = TOP - (HIDDEN - TRUNK) * CELL             # where the producer begins
    middle = TOP + TRUNK * CELL / 2
    return [
        text(left, 24, "3 · cut", "title", "start"),
        *matrix(left, top, producer, GREEN, removed_rows=removed),
        *matrix(right, TOP, weights, BLUE, removed_columns=removed),
        arrow([(right - 42, middle), (right - 12, middle)], GREY),
        text(left + TRUNK * CELL / 2, top - 11, "producer", "green"),
        text(right + HIDDEN * CELL / 2, TOP - 11, "consumer", "blue"),
        text(left + TRUNK * CELL / 2, TOP + 150, "8 × 6 → 5 × 6", "small green"),
        text(right + HIDDEN * CELL / 2, TOP + 150, "6 × 8 → 6 × 5", "small blue"),
        *captions(left, "rows of the producer and columns of the consumer",
                  "leave the weights: 96 numbers become 60")]


def captions(left: float, *lines: str) -> list[str]:
    """Lines under a drawing."""
    return [text(left, TOP + 178 + 20 * k, line, "", "start") for k, line in enumerate(lines)]


def method() -> str:
    """Search, select and cut of one hidden width of 8 channels, of which 5 stay."""
    weights = random_weights(TRUNK, HIDDEN, 7)
    elements = [*draw_search(12, weights), *draw_select(266, weights), *draw_cut(520, weights)]
    return svg(892, 322, "Search multiplies every column by a factor, select takes the columns one "
               "after another, cut removes the others and the rows that made them", elements)


# ---- crops.png: what it looks like --------------------------------------------------------------
PHOTOGRAPH = "motorcycle_left"       # one of the eight built-in ones


def draw_crops(folder: Path) -> None:
    """Draws crops.png: a photograph enlarged by bicubic and by the networks of a run.

    folder: a finished run of train.py. Shown is the square in which the pruned network is better
    than bicubic by the most; the PSNR-Y is that of the whole photograph.
    """
    dense = models.load(folder / "train.pt")
    pruned = models.load(folder / "tune.pt")
    scale = dense.scale
    photographs = data.photographs((1, scale))
    i = photographs.names.index(PHOTOGRAPH)
    one = photographs[i:i + 1]
    rows = {"bicubic": evaluate.evaluate(partial(data.imresize, scale=scale), one)}
    for name, network in (("dense", dense), ("pruned", pruned)):
        count = sum(weight.numel() for weight in network.parameters())
        fast = models.inference(network)
        rows[f"{name}, {count / 1e6:.2f}M parameters"] = evaluate.evaluate(fast, one)
    data.write_image(HERE / "crops.png", crops.comparison(rows, one, scale))


if __name__ == "__main__":
    (HERE / "loop.svg").write_text(loop())
    (HERE / "method.svg").write_text(method())
    if len(sys.argv) > 1:
        draw_crops(Path(sys.argv[1]))
