"""Where not to trust an enlarged picture: where, mapped down again, it is not what it was made of.

A network trained with dual regression brings its way back along (dual.py). Any right answer leads
back to the picture x that was enlarged, so where D(P(x)) differs from x, P has failed for certain.
The reverse does not hold: D sees x's pixels alone, and detail that is invented between them leads
back to x as well. Black is agreement and no promise. How far this map agrees with the true error is
measured by bench/consistency.py.

Not here: the duals (dual.py), enlarging (upscale.py --consistency).
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import data
import dual
from files import Job, consistency_name

STRIP = 256                          # LR rows that are mapped down at a time, which bounds the
MARGIN = 8                           # memory, with so many on either side: the duals see no further
FULL = 16.0                          # grey levels that a heat map shows in white
UNLEARNED = 6.0                      # a mean difference that is rather D's fault than P's


def load_duals(source: str, model: nn.Module, states: list[dict] | None) -> nn.ModuleList:
    """The duals of a network; states: what models.load_networks found in the file `source`.

    ValueError: the file holds none.
    """
    if not states:
        raise ValueError(f"{source} holds no duals, the way back that --consistency needs: give a "
                         f"checkpoint of train.py, such as runs/NAME/tune.pt")
    return dual.restore_duals(model, states).requires_grad_(False)


@torch.inference_mode()
def difference(low: np.ndarray, high: np.ndarray, duals: nn.ModuleList) -> np.ndarray:
    """|D(high) − low| in grey levels, the mean of the colours: float32 (H, W).

    low: uint8 (H, W, 3); high: uint8 (H·s, W·s, 3), what a network of these duals made of it.
    """
    height = len(low)
    scale = len(high) // height
    device = next(duals.parameters()).device
    strips = []
    for top in range(0, height, STRIP):
        first = max(0, top - MARGIN)
        part = high[first * scale:(top + STRIP + MARGIN) * scale]
        image = torch.from_numpy(part.copy()).to(device).permute(2, 0, 1)[None].float()
        back = dual.way_back(image, scale, duals)[0].permute(1, 2, 0).cpu().numpy()
        own = low[top:top + STRIP]
        strips.append(np.abs(back[top - first:][:len(own)] - own).mean(2))
    return np.concatenate(strips)


def heat_map(values: np.ndarray, scale: int) -> np.ndarray:
    """Grey levels (H, W) as a picture, uint8 (H·scale, W·scale, 3): from black over red and yellow
    to white, which is FULL or more. The same in every map, so that they can be compared.
    """
    heat = (3 * values / FULL)[..., None] - np.arange(3)             # red, then green, then blue
    colours = (255 * heat.clip(0, 1)).round().astype(np.uint8)
    return colours.repeat(scale, 0).repeat(scale, 1)


def check(job: Job, duals: nn.ModuleList) -> str:
    """Writes the heat map of an enlarged picture beside it; returns what it says, in words.

    Both pictures are read from their files. ValueError, OSError: one cannot be read or written.
    """
    low = data.decode(job.source).rgb
    high = data.decode(job.target).rgb
    values = difference(low, high, duals)
    target = consistency_name(job.target)
    data.write_image(target, heat_map(values, len(high) // len(low)))
    text = (f"{target}: mapped down again it differs by {values.mean():.2f} grey levels on "
            f"average, {values.max():.1f} at most")
    if values.mean() > UNLEARNED:
        text += (" (so much that the duals have hardly learned the way back: do not rely on the "
                 "map, train the network longer)")
    return text


def existing(jobs: Sequence[Job]) -> list[Path]:
    """The heat maps of these pictures that are there already."""
    return [name for name in (consistency_name(job.target) for job in jobs) if name.exists()]
