"""What a person looks at after a run: the table on the screen, report.json, comparison.png.

The networks of a run (dense, cut, pruned) and bicubic interpolation are measured on test pictures:
PSNR and SSIM of the luma, parameters, multiply-adds (evaluate.py), and how long they take, measured
in turns (latency.py). Pictures come from --test, or are the eight photographs of scikit-image,
blurred for a blind network.

Not here: the measures themselves (evaluate.py), and what led to the networks. Read run.py next.
"""
import json
import math
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import data
import evaluate
import latency
import models
import upscale
from run import Run

SIDE = 192                           # pixels of a crop in comparison.png
LABEL = 18                           # height of the text above it
GAP = 4                              # between two crops
ACROSS = SIDE + GAP                  # from a crop to the next one
DOWN = SIDE + LABEL + GAP
KERNEL = 15                          # middle entries of a blur kernel that are shown,
ZOOM = 4                             # each as a square of this side


# ---- measuring ----------------------------------------------------------------------------------
def measure(run: Run, states: dict[str, dict], test: str | None, device: torch.device) -> None:
    """Measures bicubic and the networks of `states`; writes report.json and comparison.png.

    states: {"dense": checkpoint, ...}, all of one scale.
    test: folder of pictures; None: the photographs.
    """
    started = time.monotonic()
    dense = models.from_checkpoint(states["dense"])
    scale = dense.scale
    pictures = open_pictures(test, scale, dense.kernel_size)
    # bicubic first, then the networks in their order
    bicubic = partial(data.imresize, scale=scale)
    measured = evaluate.evaluate(bicubic, pictures)
    rows = dict(bicubic=measured)
    table = dict(bicubic=means(measured))
    networks = {}
    for name, state in states.items():
        network = models.from_checkpoint(state)
        fast = models.inference(network).to(device)
        measured = evaluate.evaluate(fast, pictures)
        rows[name] = measured
        # the costs are counted on the network itself: folding changes them
        table[name] = means(measured) | costs(network)
        networks[name] = network
    for name, timing in times(networks, device).items():
        table[name]["latency"] = timing._asdict()
    # report.json comes last: where it stands, the picture and the log belong to it
    (run.folder / "report.json").unlink(missing_ok=True)
    data.write_image(run.folder / "comparison.png", comparison(rows, pictures, scale))
    psnr = {name: round(line["psnr"], 3) for name, line in table.items()}
    seconds = round(time.monotonic() - started, 1)
    run.log(stage="report", seconds=seconds, test=test, **psnr)
    run.write_json("report.json", table)


def is_current(run: Run, test: str | None) -> bool:
    """Whether there is a report, and its pictures were these: log.jsonl tells which they were."""
    if not run.has("report.json"):
        return False
    measured_on = None
    log = (run.folder / "log.jsonl").read_text()
    for line in log.splitlines():
        with suppress(ValueError):   # kill -9 may leave half a line
            entry = json.loads(line)
            if entry["stage"] == "report":
                measured_on = entry["test"]
    return measured_on == test


def open_pictures(test: str | None, scale: int, kernel_size: int) -> data.Pictures:
    """The test pictures at scales 1 and `scale`."""
    if test:
        return data.open_folder(test, (1, scale))
    return data.photographs((1, scale), kernel_size)


def means(rows: list) -> dict:
    """PSNR-Y in dB, SSIM and seconds, each the mean over the evaluate.Rows of all pictures."""
    result = {}
    for name in ("psnr", "ssim", "seconds"):
        values = [getattr(row, name) for row in rows]
        result[name] = float(np.mean(values))
    return result


def costs(network: nn.Module) -> dict:
    """Parameters, and multiply-adds for a 96×96 input and for a 1280×720 output."""
    s = network.scale
    small = evaluate.count(network, 96, 96)
    large = evaluate.count(network, math.ceil(720 / s), math.ceil(1280 / s))
    return dict(params=small.params, madds=small.madds, madds_720p=large.madds)


def times(networks: dict[str, nn.Module], device) -> dict[str, latency.Timing]:
    """How long each network takes beside the first; those of the same widths are timed as one."""
    shapes = {name: tuple(network.widths.values()) for name, network in networks.items()}
    distinct = {shapes[name]: network for name, network in networks.items()}
    ready = {shape: latency.ready(network, device) for shape, network in distinct.items()}
    measured = latency.interleaved(ready, latency.noise(device))
    return {name: measured[shape] for name, shape in shapes.items()}


# ---- the table ----------------------------------------------------------------------------------
def print_table(run: Run) -> None:
    """Prints report.json as a table, and which files the run folder holds.

    "fewer" and "faster" say how many times fewer multiply-adds the network needs than the first
    one, and how many times faster it is, both for an input of 96×96.
    """
    table = json.loads((run.folder / "report.json").read_text())
    # 10 characters of name, then the columns, each as wide as its head
    print()
    print("            PSNR-Y    SSIM  parameters  MAdds 720p  MAdds 96x96  fewer  s 96x96  faster")
    first = next((line for line in table.values() if "madds" in line), {})
    for name, line in table.items():
        quality = f"{line['psnr']:>8.3f} {line['ssim']:>7.4f}"
        print(f"{name:10}{quality} {cost_columns(line, first)}")
    found = []
    for name in ("comparison.png", "channels.json", "latency.json", "report.json", "log.jsonl",
                 "train.pt", "search.pt", "select.pt", "tune.pt"):
        if run.has(name):
            found.append(name)
    print(f"\n{run.folder}/: {', '.join(found)}")


def cost_columns(line: dict, first: dict) -> str:
    """Parameters, MAdds and time of one line, beside those of the first network; dashes for
    bicubic, which has none.
    """
    if "params" not in line:
        return "          -           -            -      -        -       -"
    madds = line["madds"] / 1e9
    madds_720p = line["madds_720p"] / 1e9
    fewer = first["madds"] / line["madds"]
    size = f"{line['params']:>11,} {madds_720p:>9.1f} G {madds:>10.2f} G {fewer:>6.2f}"
    if "latency" not in line:        # a report of before it was measured
        return f"{size}        -       -"
    timing = line["latency"]
    return f"{size} {timing['seconds']:>8.3f} {1 / timing['ratio']:>7.2f}"


# ---- comparison.png -----------------------------------------------------------------------------
def comparison(rows: dict[str, list], pictures: data.Pictures, scale: int) -> np.ndarray:
    """A sheet with a line per picture and a column per upscaler, then the original.

    Each crop is the part of most detail. In its corner is the middle of the blur kernel, where
    there is one: the estimated one, and beside the original the true one.
    rows: {upscaler: one evaluate.Row per picture}. Returns uint8 (H, W, 3).
    """
    # cells lie side by side, with a gap between them but not around
    columns = len(rows) + 1
    width = columns * ACROSS - GAP
    height = len(pictures) * DOWN - GAP
    sheet = Image.new("RGB", (width, height), "white")
    for i, name in enumerate(pictures.names):
        picture = pictures[i]
        original = picture.images[scale]
        box = busiest(original, SIDE)
        top = i * DOWN
        left = 0
        for upscaler, measured in rows.items():
            row = measured[i]
            label = f"{upscaler} {row.psnr:.2f} dB"
            draw_cell(sheet, left, top, label, row.image[box], row.kernel)
            left += ACROSS
        draw_cell(sheet, left, top, Path(name).stem, original[box], picture.kernel)
    return np.array(sheet)


def draw_cell(sheet: Image.Image, left: int, top: int, label: str, crop, kernel) -> None:
    """Draws a crop with its label above and its kernel in the lower right corner.

    left, top: where the label begins. crop: uint8 (h, w, 3). kernel: float (k, k), or None.
    """
    sheet.paste(Image.fromarray(crop), (left, top + LABEL))
    if kernel is not None:
        start = max(0, len(kernel) - KERNEL) // 2
        middle = slice(start, (len(kernel) + KERNEL) // 2)
        inset = upscale.kernel_picture(kernel[middle, middle], ZOOM)
        x = left + SIDE - len(inset)
        y = top + LABEL + SIDE - len(inset)
        sheet.paste(Image.fromarray(inset), (x, y))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    pen.text((left + 2, top + 1), label, "black", font)


def busiest(image: np.ndarray, side: int) -> tuple:
    """(rows, columns), slices: the side×side square in which neighbouring pixels differ most.

    image: uint8 (H, W, 3). Only squares that begin at multiples of 16 are looked at; a smaller
    image is taken as a whole.
    """
    y = torch.from_numpy(image).float().mean(2)                            # (H, W)
    down = y.diff(dim=0)[:, 1:].abs()                                      # (H − 1, W − 1)
    across = y.diff(dim=1)[1:].abs()
    detail = (down + across)[None]                                         # (1, H − 1, W − 1)
    window = [min(side, n) for n in down.shape]
    pooled = nn.functional.avg_pool2d(detail, window, stride=16)[0]
    # the mean detail of every square; the largest is at 16·(row, column)
    row, column = divmod(int(pooled.argmax()), pooled.shape[1])
    top = 16 * row
    left = 16 * column
    return slice(top, top + side), slice(left, left + side)
