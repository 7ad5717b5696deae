"""tiles.py: tiles that must not show, results in rows, the ensemble, the blind kernel."""
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import tiles
from backbones.base import SR
from bench import tiling
from pictures import picture
from tiny import tiny_dcls, tiny_drn, tiny_swinir


class Local(nn.Module):
    """Sees `reach` pixels around each one, and nothing else."""
    scale = 2

    def __init__(self, reach: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 2 * reach + 1, padding=reach)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        return SR({2: self.shuffle(self.conv(x))})


# ---- tiles --------------------------------------------------------------------------------------
@pytest.mark.parametrize("height, width", [(70, 200), (131, 97), (257, 64)])
def test_tiles_do_not_show_where_the_overlap_covers_what_is_seen(height, width):
    model = Local(4).eval()
    low = picture(height, width)
    whole = tiles.upscale(model, low)
    calls = []
    tiled = tiles.upscale(model, low, tile=96, overlap=8, on_tile=lambda: calls.append(1))
    assert np.abs(whole.astype(int) - tiled).max() <= 1      # sums in another order
    assert len(calls) > 1


@pytest.mark.parametrize("height, width", [(70, 200), (260, 97), (300, 300), (20, 30)])
@pytest.mark.parametrize("tile, overlap", [(0, 8), (96, 16), (96, 0), (128, 32)])
def test_rows_are_what_tiles_that_are_painted_over_each_other_leave(height, width, tile, overlap):
    """To the last bit. The painting holds the whole result, the rows do not."""
    model = Local(3).eval()
    low = picture(height, width)
    painted = np.zeros((2 * height, 2 * width, 3), np.uint8)
    tops, tall = tiles.tile_starts(height, tile or height, overlap)
    lefts, wide = tiles.tile_starts(width, tile or width, overlap)
    for top, left in itertools.product(tops, lefts):
        part = low[top:top + tall, left:left + wide]
        part = tiles.run_network(model, part, False, None)
        y, x = overlap * (top > 0), overlap * (left > 0)
        painted[2 * (top + y):2 * (top + tall), 2 * (left + x):2 * (left + wide)] = (
            part[2 * y:, 2 * x:])
    bands = list(tiles.upscale_rows(model, low, tile, overlap))
    assert len(bands) == len(tops)
    assert np.array_equal(np.concatenate(bands), painted)
    assert np.array_equal(tiles.upscale(model, low, tile, overlap), painted)


def test_an_overlap_that_is_too_small_shows():
    """Else the test above could not fail."""
    model = Local(20).eval()
    low = picture(131, 97)
    tiled = tiles.upscale(model, low, tile=64, overlap=0)
    assert np.abs(tiles.upscale(model, low).astype(int) - tiled).max() > 1


@pytest.mark.parametrize("overlap", [0, 8, 32])
def test_tiles_cover_a_side_and_share_their_overlap(overlap):
    for length in range(1, 1500, 7):
        for tile in (tiles.smallest_tile(overlap), 200, 384):
            starts, side = tiles.tile_starts(length, tile, overlap)
            assert side <= tile and starts[0] == 0 and starts[-1] + side == length
            assert all(start % tiles.ALIGN == 0 for start in starts)
            for left, right in zip(starts, starts[1:]):
                assert left + side - right >= 2 * overlap


def test_the_bench_looks_where_one_tile_takes_over_from_another():
    """Two tiles of 128 rows begin at 0 and 32: the lower one takes over at row 64."""
    assert tiles.tile_starts(128, 128, tiles.OVERLAP) == ([0], 128)
    assert tiles.tile_starts(160, 128, tiles.OVERLAP) == ([0, 32], 128)
    mask = tiling.seam_mask(160, 20, 128, 2)
    assert mask.shape == (320, 40)
    assert np.flatnonzero(mask[:, 0]).tolist() == list(range(2 * 57, 2 * 72))
    error = np.zeros((320, 40, 3), int)
    error[0, 0] = 9
    error[130] = 3
    largest, mean, near, near_mean = tiling.differences(error, mask)
    assert (largest, near) == (9, 3)
    assert near_mean == pytest.approx(3 / 30) and mean < near_mean
    assert tiling.differences(error, mask & False) == (9, mean, 0, 0)


@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (7, 5)])
def test_pictures_of_any_size(height, width):
    for model, _ in (tiny_drn(), tiny_swinir()):
        image = tiles.upscale(model.eval(), picture(height, width))
        assert image.shape == (4 * height, 4 * width, 3) and image.dtype == np.uint8


@pytest.mark.parametrize("low", [
    picture(8, 8).astype(np.float32), picture(8, 8)[..., 0], picture(8, 8)[:0]])
def test_other_arrays_are_refused(low):
    with pytest.raises(ValueError, match="uint8"):
        tiles.upscale(Local(1), low)


def test_a_tile_without_room_is_refused():
    with pytest.raises(ValueError, match="at least 128"):
        tiles.upscale(Local(1), picture(200, 200), tile=96)


# ---- ensemble and blind kernel ------------------------------------------------------------------
def test_ensemble_is_the_mean_of_eight():
    model, _ = tiny_swinir()
    low = picture(12, 20)
    total = 0
    for flip in (False, True):
        for k in range(4):
            turned = np.rot90(low[:, ::-1] if flip else low, k).copy()
            x = torch.from_numpy(turned).permute(2, 0, 1)[None].float() / 255
            with torch.inference_mode():
                image = model(x).images[4][0].permute(1, 2, 0).double().numpy()
            image = np.rot90(image, -k)
            total = total + (image[:, ::-1] if flip else image)
    expected = np.clip(np.rint(255 * total / 8), 0, 255)
    got = tiles.upscale(model, low, ensemble=True)
    assert np.abs(got - expected).max() <= 1
    assert (got != expected).mean() < 0.001


def test_a_kernel_is_estimated_once_and_can_be_given():
    model, _ = tiny_dcls()
    low = picture(40, 36)
    kernel = tiles.estimate_kernel(model.eval(), low)
    assert kernel.sum() == pytest.approx(1, abs=1e-4)
    given = tiles.upscale(model, low, kernel=kernel)
    assert np.array_equal(given, tiles.upscale(model, low))
    other = np.zeros_like(kernel)
    other[len(other) // 2, len(other) // 2] = 1
    assert not np.array_equal(given, tiles.upscale(model, low, kernel=other))
