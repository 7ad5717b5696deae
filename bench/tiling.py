"""How much does working in tiles change a picture?

    python -m bench.tiling --weights DAT_light_x4.pth --arch dat_light --data Set14 --tile 128
    python -m bench.tiling --weights W --data PHOTOGRAPHS --against 96

The largest and the mean 8-bit difference, everywhere and near the seams, to the untiled result; or,
for pictures that are too large for that, to tiles of the same size with a larger overlap.
"""
import argparse

import numpy as np
from tqdm import tqdm

import data
import models
from run import at_least, command
from tiles import OVERLAP, smallest_tile, tile_starts, upscale

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


def differences(error: np.ndarray, seams: np.ndarray) -> tuple[int, float, int, float]:
    """Largest and mean of an error (H, W, 3), everywhere, then near the seams, bool (H, W); 0 where
    there are none.
    """
    near = error[seams] if seams.any() else np.zeros(1, int)
    return error.max(), error.mean(), near.max(), near.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True)
    parser.add_argument("--arch")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tile", type=at_least(smallest_tile(OVERLAP)), default=384,
                        help="LR pixels (default: that of upscale.py, %(default)s)")
    parser.add_argument("--against", type=at_least(OVERLAP + 1), metavar="OVERLAP",
                        help="compare with this overlap (default: with no tiles at all)")
    args = parser.parse_args()
    model = models.inference(models.load(args.weights, args.arch))
    pictures = data.open_folder(args.data, (1, model.scale))
    better = dict(tile=0)
    if args.against:             # what remains of a tile without its overlaps is of the same size
        better = dict(tile=args.tile + 2 * (args.against - OVERLAP), overlap=args.against)
    print("                                    everywhere          near the seams")
    print("picture                 size    largest    mean        largest    mean")
    for i in tqdm(range(len(pictures)), "pictures", leave=False, delay=2):
        low = pictures[i].images[1]
        height, width = low.shape[:2]
        error = np.abs(upscale(model, low, **better).astype(int) - upscale(model, low, args.tile))
        found = differences(error, seam_mask(height, width, args.tile, model.scale))
        line = "{:10d} {:7.4f} {:14d} {:7.4f}".format(*found)
        tqdm.write(f"{pictures.names[i]:18} {data.size(low):>9} {line}")


if __name__ == "__main__":
    command(main)
