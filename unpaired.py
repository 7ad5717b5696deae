"""Photographs without originals, and training batches in which they stand beside pairs.

Unpaired adaptation (DRN, arXiv 2003.07018, Section 4.2) trains a network for the photographs of a
camera of which nobody has large versions. They are read as they are, nothing is reduced. A batch of
N inputs holds n pairs and, after them, N − n photographs, so its other images are (n, 3, ...): this
is how the loss (dual.mixed_loss) knows.

Not here: what such a loss can do and what it cannot (dual.py), pictures and pairs (data.py).
"""
import os
from collections.abc import Iterator
from contextlib import closing

import torch

import data
from backbones.base import SR
from files import check_folder, some_pictures

OTHER = 1 << 40                      # what the photographs' seed lies above that of the pairs


def open_photographs(path: str | os.PathLike, limit: int = data.CACHE) -> data.Pictures:
    """Lists the pictures below a folder, each at scale 1 alone; limit: as for `data.open_folder`.

    ValueError: a missing or empty folder, and on access a file that is damaged.
    """
    root = check_folder(path, "photographs")
    files = some_pictures(root, "photographs")

    def load(i: int) -> data.Picture:
        return data.Picture({1: data.decode(files[i]).rgb})

    names = [file.relative_to(root).as_posix() for file in files]
    return data.Pictures(names, data.cached(load, limit), (1,))


def alone(batch: int, share: float) -> int:
    """How many of a batch are photographs: the share of it, rounded, but at least one of either."""
    return min(max(1, round(share * batch)), batch - 1)


def batches(pairs: data.Pictures, photographs: data.Pictures, patch: int, batch: int, share: float,
            seed: int, start: int = 0) -> Iterator[SR]:
    """Yields training batches without end, on the CPU: pairs, then photographs.

    patch: side of a square of an original; a photograph gives one of patch / scale. batch: at least
    2. Step k depends on (seed, k, pictures) alone. Else as `data.batches`.
    """
    count = alone(batch, share)
    side = patch // pairs.scales[-1]
    # another seed: photographs that are reductions of the same originals would else be cut alike
    with (closing(data.batches(pairs, patch, batch - count, seed, start)) as first,
          closing(data.batches(photographs, side, count, seed + OTHER, start)) as second):
        for pair, photograph in zip(first, second):
            low = torch.cat((pair.images[1], photograph.images[1]))
            yield SR({**pair.images, 1: low})
