"""How much does working in tiles change a picture?

    python -m bench.tiling --weights DAT_light_x4.pth --arch dat_light --data Set14

The largest and the mean 8-bit difference to the untiled result, everywhere and near the seams.
"""
import argparse

import numpy as np

import data
import models
from run import command
from upscale import OVERLAP, tile_starts, upscale

NEAR = 8                         # LR pixels on each side of a seam


def seam_mask(height: int, width: int, tile: int, scale: int) -> np.ndarray:
    """bool (H·s, W·s): within NEAR LR pixels of where one tile takes over from another."""
    near = []
    for length in (height, width):
        starts, _ = tile_starts(length, tile, OVERLAP)
        seams = np.array([start + OVERLAP for start in starts[1:]])
        distance = np.abs(np.arange(length)[:, None] - seams)
        near.append((distance < NEAR).any(1).repeat(scale))
    rows, columns = near
    return rows[:, None] | columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--arch")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tile", type=int, default=128, help="LR pixels (default 128)")
    args = parser.parse_args()
    model = models.inference(models.load(args.weights, args.arch))
    pictures = data.open_folder(args.data, (1, model.scale))
    for i, name in enumerate(pictures.names):
        low = pictures[i].images[1]
        height, width = low.shape[:2]
        whole = upscale(model, low).astype(int)
        error = np.abs(whole - upscale(model, low, args.tile))
        seams = seam_mask(height, width, args.tile, model.scale)
        at_seams = error[seams].max() if seams.any() else 0
        print(f"{name:20} {data.size(low):>9}  largest {error.max():3d}  mean {error.mean():.4f}  "
              f"largest at a seam {at_seams:3d}")


if __name__ == "__main__":
    command(main)
