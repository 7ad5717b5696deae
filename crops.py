"""Crops in which one can see a difference: where they lie in a picture, and a sheet of them.

PSNR is a mean over a picture, and most of a picture is sky. So what is shown is the square in which
the last of some upscalers gains most over the first one. Read page.py next.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import upscale

CROP = 72                            # pixels of a picture that are shown,
ZOOM = 3                             # each as a square of this side
SIDE = CROP * ZOOM
LABEL = 44                           # height of the two lines of text above a crop
GAP = 5                              # between two crops
ACROSS = SIDE + GAP                  # from a crop to the next one
DOWN = SIDE + LABEL + GAP
FIELD, TITLE, TEXT = "#24292f", "#ffffff", "#c9d1d9"     # one look for light and dark pages
KERNEL = 15                          # middle entries of a blur kernel that are shown,
KERNEL_ZOOM = 4                      # each as a square of this side


def most_gained(before: np.ndarray, after: np.ndarray, original: np.ndarray,
                side: int) -> tuple[slice, slice]:
    """(rows, columns) of the square where the squared error shrinks most from before to after.

    before, after: uint8 (H, W, 3); original: the same, or larger at the bottom and on the right.
    Only squares that begin at multiples of 8 are looked at. An image smaller than `side` is taken
    as a whole.
    """
    height, width = before.shape[:2]
    truth = original[:height, :width].astype(float)
    errors = [np.square(image - truth).sum(2) for image in (before, after)]
    gain = torch.from_numpy(errors[0] - errors[1])[None]                   # (1, H, W)
    window = min(side, height), min(side, width)
    means = F.avg_pool2d(gain, window, stride=8)[0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return slice(8 * row, 8 * row + window[0]), slice(8 * column, 8 * column + window[1])


def comparison(rows: dict[str, list], pictures: data.Pictures, scale: int) -> np.ndarray:
    """A sheet with a line per picture and a column per upscaler, then the original.

    Each crop is where the last upscaler gains most over the first one. In its corner is the middle
    of the blur kernel, where there is one: the estimated one, and the true one in the original.
    rows: {upscaler: one evaluate.Row per picture}. Returns uint8 (H, W, 3).
    """
    # cells lie side by side, with a gap between them but not around
    width = (len(rows) + 1) * ACROSS - GAP
    height = len(pictures) * DOWN - GAP
    sheet = Image.new("RGB", (width, height), FIELD)
    for i, name in enumerate(pictures.names):
        picture = pictures[i]
        original = picture.images[scale]
        measured = [results[i] for results in rows.values()]
        box = most_gained(measured[0].image, measured[-1].image, original, CROP)
        corner = [0, i * DOWN]
        for upscaler, row in zip(rows, measured):
            draw_cell(sheet, corner, (upscaler, f"{row.psnr:.2f} dB"), row.image[box], row.kernel)
            corner[0] += ACROSS
        draw_cell(sheet, corner, ("original", Path(name).stem), original[box], picture.kernel)
    return np.array(sheet)


def draw_cell(sheet: Image.Image, corner: list[int], label: tuple[str, str], crop: np.ndarray,
              kernel: np.ndarray | None) -> None:
    """Draws an enlarged crop, its two lines of label above, its kernel in the lower right corner.

    corner: (left, top) of the label. crop: uint8 (h, w, 3). kernel: float (k, k).
    """
    left, top = corner
    pen = ImageDraw.Draw(sheet)
    pen.text((left + 9, top + 5), label[0], TITLE, ImageFont.load_default(14))
    pen.text((left + 9, top + 23), label[1], TEXT, ImageFont.load_default(14))
    enlarged = crop.repeat(ZOOM, 0).repeat(ZOOM, 1)
    sheet.paste(Image.fromarray(enlarged), (left, top + LABEL))
    if kernel is not None:
        start = max(0, len(kernel) - KERNEL) // 2
        middle = slice(start, (len(kernel) + KERNEL) // 2)
        inset = upscale.kernel_picture(kernel[middle, middle], KERNEL_ZOOM)
        x = left + SIDE - len(inset)
        y = top + LABEL + SIDE - len(inset)
        sheet.paste(Image.fromarray(inset), (x, y))
