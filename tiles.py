"""Enlarges an array with a network: in overlapping tiles, and handed out in rows from the top.

A network needs far more memory than the picture it makes. So a large picture is cut into tiles, and
each sees a part of its neighbours, which is cut away from its result. `upscale` returns the whole.
`upscale_rows` yields it in bands of rows while it is being made: who writes them to a file at once
(png.py) never holds the whole result.

Not here: picture files, grey, transparency (upscale.py).
"""
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

OVERLAP = 32                 # LR pixels of context around a tile: networks hardly see further
ALIGN = 32                   # tiles start at multiples of it: it is a multiple of every window
AUTO_PIXELS = 500_000        # LR pixels: larger pictures are worked on in tiles by default, and
#                              a blur kernel is estimated from as many


def upscale(model: nn.Module, low: np.ndarray, tile: int = 0, overlap: int = OVERLAP,
            ensemble: bool = False, kernel: np.ndarray | None = None,
            on_tile: Callable[[], object] | None = None) -> np.ndarray:
    """Enlarges a picture: uint8 (H, W, 3), any size from 1×1 -> uint8 (H·s, W·s, 3).

    The result is clamped and rounded to the nearest integer. `model` runs as it is, on its own
    device; for speed give `models.inference(model)`.

    tile      largest side of a tile in LR pixels, 0 for the whole picture at once. It bounds the
              memory: only the result is full-size. A tile sees `overlap` LR pixels of its
              neighbours, which are cut away from its result: the whole equals the untiled result
              where `overlap` covers what the network sees. Networks with channel attention (DRN,
              DCLS) or channel-wise attention (DAT) look at a whole tile and differ slightly;
              `python -m bench.tiling` measures by how much.
    ensemble  mean of the eight flips and rotations, before rounding (EDSR, Lim et al. 2017, 3.4)
    kernel    for a blind network the blur kernel (k, k) of the picture; default: its own estimate
    on_tile   called after each tile
    ValueError: another kind of array, a tile without room for its overlap. FloatingPointError: the
    network returned nan or inf.
    """
    check_image(low)
    height, width = low.shape[:2]
    high = np.empty((height * model.scale, width * model.scale, 3), np.uint8)
    y = 0
    for band in upscale_rows(model, low, tile, overlap, ensemble, kernel, on_tile):
        high[y:y + len(band)] = band
        y += len(band)
    return high


def upscale_rows(model: nn.Module, low: np.ndarray, tile: int = 0, overlap: int = OVERLAP,
                 ensemble: bool = False, kernel: np.ndarray | None = None,
                 on_tile: Callable[[], object] | None = None) -> Iterator[np.ndarray]:
    """Yields the rows of `upscale`'s result from top to bottom, uint8 (h, W·s, 3) at a time.

    A band is what a row of tiles adds. Arguments and errors as there; nothing is checked before the
    first band is asked for.
    """
    check_image(low)
    if tile and tile < smallest_tile(overlap):
        raise ValueError(f"tile {tile} is too small for an overlap of {overlap}: give at least "
                         f"{smallest_tile(overlap)}, or 0 for the whole picture")
    if kernel is None:
        kernel = estimate_kernel(model, low)
    height, width = low.shape[:2]
    s = model.scale
    tops, tile_height = tile_starts(height, tile or height, overlap)
    lefts, tile_width = tile_starts(width, tile or width, overlap)
    # What a tile knows too little of is left out: at its top and left here, at its other ends the
    # next tiles take over.
    begins = [0] + [top + overlap for top in tops[1:]]
    for top, begin, end in zip(tops, begins, [*begins[1:], height]):
        band = np.empty(((end - begin) * s, width * s, 3), np.uint8)
        for left in lefts:
            part = low[top:top + tile_height, left:left + tile_width]
            part = run_network(model, part, ensemble, kernel)
            x = 0 if left == 0 else left + overlap
            right = left + tile_width
            band[:, x * s:right * s] = part[(begin - top) * s:(end - top) * s, (x - left) * s:]
            if on_tile:
                on_tile()
        yield band


def check_image(image: np.ndarray) -> None:
    """ValueError for anything but a uint8 array (H, W, 3) with at least one pixel."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be a uint8 array of shape (H, W, 3), this is "
                         f"{image.dtype} {image.shape}")


def smallest_tile(overlap: int) -> int:
    """The smallest side of a tile that leaves something of it behind its overlaps."""
    return 2 * overlap + 2 * ALIGN


def tile_starts(length: int, tile: int, overlap: int) -> tuple[list[int], int]:
    """Where the tiles of one side begin, and their common size, which is at most `tile`.

    As few tiles as possible, and then as small as possible. Starts are multiples of ALIGN, the last
    tile ends with the picture, neighbours share at least 2·overlap pixels.
    """
    if length <= tile:
        return [0], length
    inner = (length - 2 * overlap) // ALIGN
    for number in itertools.count(2):
        quotient, rest = divmod(inner, number)
        last = quotient * (number - 1) + max(rest - 1, 0)      # the last start, in ALIGNs
        side = length - last * ALIGN
        if side <= tile:
            return [last * i // (number - 1) * ALIGN for i in range(number)], side


def to_input(model: nn.Module, low: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> (1, 3, H, W) in 0..1 on the model's device."""
    device = torch.device("cpu")
    for parameter in model.parameters():
        device = parameter.device
    return torch.from_numpy(np.array(low)).to(device).permute(2, 0, 1)[None].float() / 255


@torch.inference_mode()
def estimate_kernel(model: nn.Module, low: np.ndarray) -> np.ndarray | None:
    """The blur kernel that a blind network sees in a picture; None from any other network.

    low: uint8 (H, W, 3) -> float32 (k, k), in LR pixels, sums to 1. A picture has one blur, and a
    tile of sky does not show it: the kernel is estimated once, from the whole picture, or from its
    centre where it has more than AUTO_PIXELS pixels, which bounds the memory.
    """
    if not getattr(model, "kernel_size", 0):
        return None
    height, width = low.shape[:2]
    if height * width > AUTO_PIXELS:
        side = math.isqrt(AUTO_PIXELS)
        top = max(0, height - side) // 2
        left = max(0, width - side) // 2
        low = low[top:top + side, left:left + side]
    return model.estimate(to_input(model, low))[0, 0].float().cpu().numpy()


@torch.inference_mode()
def run_network(model: nn.Module, low: np.ndarray, ensemble: bool,
                kernel: np.ndarray | None) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (H·s, W·s, 3), the whole at once."""
    inputs = [to_input(model, low)]
    if kernel is not None:
        inputs.append(torch.from_numpy(kernel).to(inputs[0])[None, None])      # (1, 1, k, k)
    turns = [(0, False)]
    if ensemble:
        turns = list(itertools.product(range(4), (False, True)))
    total = 0
    for k, flip in turns:                    # the blur kernel is turned with the picture
        turned = [torch.rot90(x.flip(3) if flip else x, k, (2, 3)) for x in inputs]
        image = torch.rot90(model(*turned).images[model.scale], -k, (2, 3))
        total = total + (image.flip(3) if flip else image)
    image = total / len(turns)
    if not image.isfinite().all():
        raise FloatingPointError("the network's output is not finite: its weights are damaged, "
                                 "train it again")
    return (image[0] * 255).round_().clamp_(0, 255).byte().permute(1, 2, 0).cpu().numpy()
