"""Dead leaves: pictures to train on, drawn from a seed, so that nothing has to be downloaded.

Think of the ground of a wood in autumn. Leaves of all sizes have fallen on one another, and each
hides what lies beneath it. A photograph is built in the same way: it shows objects of all sizes,
since things stand near and far, and the near ones hide the far ones. So a picture of leaves has
what a super-resolution network must learn to draw: edges of every length and direction between
areas that are smooth or textured. The model is that of Lee, Mumford & Huang ("Occlusion models for
natural images", 2001); networks trained on nothing else restore photographs well (Achddou, Gousseau
& Ladjal, "Synthetic images as a regularity prior", 2021). Here, a small ×2 network gained 1.54 dB
over bicubic on photographs from dead leaves, and 1.72 dB from real photographs.

A picture is made in four steps, each with random numbers from the seed:

    1. leaves, disks and rectangles, are thrown until nearly all of the ground is covered
    2. each gets a colour of the picture's palette, many also a gradient and a texture
    3. all that is drawn at twice the size and averaged, which makes the edges smooth
    4. half of the pictures are blurred by depth, as by a lens that is focused on some leaves

Real leaves pile up, the last one on top. It is faster to throw them front to back: a leaf is then
painted only where nothing lies yet, every pixel once, and one can stop when the ground is covered.

Not here: the smaller images of a pair, and batches. data.py does that, and is to be read next.
"""
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

UNCOVERED = 0.0005  # the part of the ground that may stay without a leaf
WORTH_IT = 1 << 20  # pixels to draw from which on starting processes pays

# Colours are drawn in three independent directions, as in photographs: light against dark, red
# against green, yellow against blue. The rows are these directions in RGB.
AXES = np.array([[1, 1, 1],
                 [0.5 ** 0.5, -0.5 ** 0.5, 0],
                 [6 ** -0.5, 6 ** -0.5, -2 * 6 ** -0.5]], np.float32)


def dead_leaves(seed: int | Sequence[int], side: int) -> np.ndarray:
    """Draws one picture, uint8 (side, side, 3), always the same for the same seed and side.

    seed: whatever `np.random.default_rng` takes: an int >= 0, or several.
    """
    rng = np.random.default_rng(seed)
    image = sharp_leaves(rng, side)
    if rng.random() < 0.5:
        image = out_of_focus(rng, image)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def draw(seeds: Sequence, side: int, workers: int | None = None) -> Iterator[np.ndarray]:
    """Yields `dead_leaves(seed, side)` for every seed, in order, drawn by several processes.

    workers: how many; by default one per usable core on Linux where there is enough to do, else
    the work is done in this process. The processes are forked, because any other way of starting
    them imports the user's script again, which breaks one without `if __name__ == "__main__"`. They
    compute with numpy only: torch's threads do not survive a fork.
    """
    if workers is None:
        enough = len(seeds) * side ** 2 >= WORTH_IT
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" and enough else 1
    if workers < 2:
        yield from map(dead_leaves, seeds, repeat(side))
        return
    pool = ProcessPoolExecutor(workers, get_context("fork"), end_with, [os.getpid()])
    try:
        with warnings.catch_warnings():  # Python warns of a fork beside threads; see above
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            pictures = pool.map(dead_leaves, seeds, repeat(side))
        yield from pictures
    finally:
        pool.shutdown(cancel_futures=True)         # after ctrl-C nobody wants the other pictures


def end_with(parent: int) -> None:
    """Makes a worker end within a second of the process that started it, however that ended.

    Without it, a worker would wait for ever for the next task, with a copy of the parent's memory.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)         # not the parent's handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # ctrl-C is the parent's, which ends it

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- 1 throw leaves ------------------------------------------------------------------------------
class Shape(NamedTuple):
    """A leaf as it is thrown. All lengths are in pixels of the canvas."""
    radius: float  # of a disk; a rectangle has the area of this disk
    height: float  # half of a rectangle's height, 0 for a disk
    width: float   # half of its width
    angle: float   # by which the rectangle is turned anticlockwise, in radians
    reach: float   # from the centre to the farthest point
    y: float       # the centre, which may lie outside the canvas
    x: float


class Leaf(NamedTuple):
    """What one sees of a leaf. h × w is the size of its bounding box."""
    radius: float
    box: tuple[slice, slice]  # the rows and columns of the canvas where it lies
    seen: np.ndarray          # bool (h, w): its pixels that no leaf in front of it hides
    dy: np.ndarray            # float32 (h, 1): how far each row is from its centre
    dx: np.ndarray            # float32 (w,): how far each column is


def scatter(rng: Generator, side: int, smallest: float) -> Iterator[Leaf]:
    """Throws leaves front to back on a square; yields those that are seen, until it is covered.

    smallest: the smallest radius. The caller draws from the same `rng` to paint each leaf.
    """
    free = np.ones((side, side), bool)  # where nothing lies yet
    while free.mean() > UNCOVERED:
        for shape in throw(rng, side, smallest):
            box = bounding_box(shape, side)
            if not free[box].any():
                continue
            leaf = lay_down(shape, box, free)
            if leaf.seen.any():
                free[box] &= ~leaf.seen
                yield leaf


def throw(rng: Generator, side: int, smallest: float, count: int = 1000) -> list[Shape]:
    """Draws leaves on and around a square: half are disks, half rectangles.

    A rectangle has the area of the disk, (2 · height) · (2 · width) = π · radius², with
    aspect = height / width between 1/2 and 2, so height = radius · √(π/4 · aspect).
    """
    radius = radii(rng, count, smallest, side)
    aspect = 2 ** rng.uniform(-1, 1, count)
    rectangle = rng.random(count) < 0.5
    height = rectangle * radius * np.sqrt(np.pi / 4 * aspect)
    width = rectangle * radius * np.sqrt(np.pi / 4 / aspect)
    reach = np.where(rectangle, np.hypot(height, width), radius)
    angle = rng.uniform(0, np.pi, count)
    y, x = rng.uniform(-reach, side + reach, (2, count))
    rows = np.stack([radius, height, width, angle, reach, y, x], 1)
    return [Shape(*row) for row in rows.tolist()]


def radii(rng: Generator, count: int, smallest: float, side: int) -> np.ndarray:
    """Draws radii in [smallest, 2·side], float64 (count,), as they are met on a square.

    Objects of radius r appear in photographs with density r^-3. A leaf touches the square from all
    places within r of it, about (side + 2r)², so the density of those met is r^-3 (side + 2r)².
    Its integral, by trapezoids, grows from 0 to the total: where it passes a uniform random number
    between these two is a radius with this density.
    """
    grid = np.geomspace(smallest, 2 * side, 1000)
    density = grid ** -3 * (side + 2 * grid) ** 2
    areas = np.diff(grid) * (density[1:] + density[:-1]) / 2
    integral = np.concatenate([[0], np.cumsum(areas)])
    total = integral[-1]
    return np.interp(rng.random(count) * total, integral, grid)


def bounding_box(shape: Shape, side: int) -> tuple[slice, slice]:
    """The rows and columns of the canvas that a leaf may touch, none where it is outside."""
    def span(centre: float) -> slice:
        start = math.floor(centre - shape.reach)
        stop = math.floor(centre + shape.reach) + 2
        start = min(max(start, 0), side)
        stop = min(max(stop, 0), side)
        return slice(start, stop)

    return span(shape.y), span(shape.x)


def lay_down(shape: Shape, box: tuple[slice, slice], free: np.ndarray) -> Leaf:
    """Finds the pixels that a leaf covers and no other hides."""
    rows, columns = box
    dy = distances(rows, shape.y)[:, None]
    dx = distances(columns, shape.x)
    if shape.height:
        cos = math.cos(shape.angle)
        sin = math.sin(shape.angle)
        along = cos * dy + sin * dx  # distances in the direction of the rectangle's height
        across = cos * dx - sin * dy
        covered = abs(along) <= shape.height
        covered &= abs(across) <= shape.width
    else:
        covered = dy * dy + dx * dx <= shape.radius * shape.radius
    return Leaf(shape.radius, box, covered & free[box], dy, dx)


def distances(span: slice, centre: float) -> np.ndarray:
    """Returns how far the pixels of one axis are from a centre, float32 (length of the span,)."""
    pixels = np.arange(span.start, span.stop, dtype=np.float32)
    return pixels - np.float32(centre)


# ---- 2 and 3 paint them --------------------------------------------------------------------------
def sharp_leaves(rng: Generator, side: int) -> np.ndarray:
    """Draws a picture that is sharp everywhere, float32 (side, side, 3) in [0, 1].

    The canvas has twice the size, so a leaf's diameter in pixels of the picture is its radius here.
    """
    palette = random_palette(rng)
    background = palette.mean[0]
    canvas = np.full((2 * side, 2 * side, 3), background, np.float32)
    noises = [noise(rng, 2 * side, rng.uniform(0.5, 2.5)) for _ in range(6)]
    smallest = 2 * rng.choice([1.5, 10.0])  # half of the pictures: large smooth areas only
    for leaf in scatter(rng, 2 * side, smallest):
        canvas[leaf.box][leaf.seen] = paint(rng, leaf, palette, noises)
    canvas.clip(0, 1, out=canvas)
    return halved(canvas)


def halved(canvas: np.ndarray) -> np.ndarray:
    """Averages blocks of 2×2 pixels, float32 (2h, 2w, 3) -> (h, w, 3)."""
    total = canvas[::2, ::2] + canvas[1::2, ::2]
    total += canvas[::2, 1::2]
    total += canvas[1::2, 1::2]
    return total / 4


class Palette(NamedTuple):
    """How one picture's colours are distributed along the three `AXES`: normally."""
    mean: list[float]
    deviation: list[float]


def random_palette(rng: Generator) -> Palette:
    """Draws a picture's palette: dark or bright, of low or high contrast, dull or colourful."""
    luminance = rng.uniform(0.25, 0.65)
    contrast = rng.uniform(0.12, 0.28)
    tint = rng.normal(0, 0.05, 2)
    colourfulness = rng.uniform(0.02, 0.10, 2)
    return Palette([luminance, *tint], [contrast, *colourfulness])


def paint(rng: Generator, leaf: Leaf, palette: Palette, noises: list[np.ndarray]) -> np.ndarray:
    """Draws the colour of a leaf, RGB float32 about 0..1: (3,), or (pixels that are seen, 3).

    Leaves too small to show a gradient or a texture have none.
    """
    colour = rng.normal(palette.mean, palette.deviation)
    colour = colour.astype(np.float32) @ AXES
    if leaf.radius > 12 and rng.random() < 0.6:
        factor = gradient(rng, leaf)
        colour = colour * factor[leaf.seen][:, None]
    if leaf.radius > 4 and rng.random() < 0.7:
        pattern = texture(rng, leaf, noises)
        colour = colour + pattern[leaf.seen][:, None]
    return colour


def gradient(rng: Generator, leaf: Leaf) -> np.ndarray:
    """Draws a factor (h, w): from 0.7 on one edge of the leaf to 1.3 on the opposite one."""
    angle = rng.uniform(0, 2 * np.pi)
    slope_x = np.float32(0.3 * math.cos(angle) / leaf.radius)
    slope_y = np.float32(0.3 * math.sin(angle) / leaf.radius)
    factor = 1 + slope_x * leaf.dx + slope_y * leaf.dy
    return np.clip(factor, 0.7, 1.3)


def texture(rng: Generator, leaf: Leaf, noises: list[np.ndarray]) -> np.ndarray:
    """Draws a grey pattern (h, w) to add to a leaf: stripes, or a piece of one of the noises."""
    strength = np.float32(rng.uniform(0, 0.12))
    if rng.random() < 0.15:
        return strength * stripes(rng, leaf)
    pattern = noises[rng.integers(len(noises))]
    h = len(leaf.dy)
    w = len(leaf.dx)
    top = rng.integers(len(pattern) - h + 1)
    left = rng.integers(len(pattern) - w + 1)
    return strength * pattern[top:top + h, left:left + w]


def stripes(rng: Generator, leaf: Leaf) -> np.ndarray:
    """Draws a sine wave (h, w) in any direction, 0.03 to 0.25 cycles per pixel of the picture."""
    frequency = rng.uniform(0.03, 0.25) / 2  # a pixel of the canvas is half of one
    angle = rng.uniform(0, np.pi)
    phase = np.float32(rng.uniform(0, 2 * np.pi))
    cos = np.float32(math.cos(angle))
    sin = np.float32(math.sin(angle))
    along = cos * leaf.dx + sin * leaf.dy
    speed = np.float32(2 * np.pi * frequency)
    return np.sin(speed * along + phase)


def noise(rng: Generator, side: int, slope: float) -> np.ndarray:
    """Draws noise float32 (side, side), mean 0, deviation 1, with amplitudes falling as 1/f^slope.

    Random numbers for every frequency are weighted and transformed back, so the noise is periodic.
    A slope of 1 is that of photographs; a smaller one makes finer noise, a larger one coarser.
    """
    rows = np.fft.fftfreq(side)[:, None]
    columns = np.fft.rfftfreq(side)
    frequency = np.hypot(rows, columns).astype(np.float32)
    frequency[0, 0] = np.inf  # so the mean is 0
    white = rng.standard_normal((*frequency.shape, 2), np.float32)
    white = white.view(np.complex64)[..., 0]  # (…, 2) real numbers -> complex ones
    spectrum = white * frequency ** np.float32(-slope)
    pattern = np.fft.irfft2(spectrum, s=(side, side))
    pattern = pattern.astype(np.float32)
    return pattern / pattern.std()


# ---- 4 depth of field ----------------------------------------------------------------------------
def out_of_focus(rng: Generator, image: np.ndarray) -> np.ndarray:
    """Blurs a picture by depth, float32 (side, side, 3) -> the same.

    A second throw of leaves, at a quarter of the size, is a map of depths from 0 to 1: at 0 the
    picture stays sharp, at 1 it becomes the picture under a Gaussian of 0.6 to 2.5 pixels.
    """
    side = len(image)
    coarse = math.ceil(side / 4)
    depth = np.zeros((coarse, coarse), np.float32)
    for leaf in scatter(rng, coarse, 10):
        depth[leaf.box][leaf.seen] = rng.random()
    depth = depth.repeat(4, 0).repeat(4, 1)[:side, :side, None]
    depth = gaussian_blur(depth, 4)
    blurred = gaussian_blur(image, rng.uniform(0.6, 2.5))
    return image + depth * (blurred - image)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs float32 (h, w, c) by a Gaussian of deviation sigma, in pixels; mirrored at the border.

    A Gaussian of two variables is the product of two of one: first the rows, then the columns.
    """
    reach = math.ceil(3 * sigma)
    distance = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (distance / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for _ in range(2):
        padded = np.pad(image, ((reach, reach), (0, 0), (0, 0)), mode="symmetric")
        blurred = sum(w * padded[i:i + len(image)] for i, w in enumerate(weights))
        image = blurred.swapaxes(0, 1)  # the second time this undoes the first
    return image
