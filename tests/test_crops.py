"""Crops: where the gain is largest, and the sheet of them."""
import numpy as np

import crops
import data
import upscale
from crops import ACROSS, CROP, DOWN, LABEL, SIDE, ZOOM
from evaluate import Row


def noisy(height: int, width: int, box: tuple, seed: int = 0) -> np.ndarray:
    """A grey picture with noise in one box."""
    image = np.full((height, width, 3), 128, np.uint8)
    image[box] = np.random.default_rng(seed).integers(0, 256, image[box].shape)
    return image


def enlarged(crop: np.ndarray) -> np.ndarray:
    """Every pixel as a square, without numpy.repeat."""
    return np.kron(crop, np.ones((ZOOM, ZOOM, 1), np.uint8))


def cell(sheet: np.ndarray, line: int, column: int) -> np.ndarray:
    """A crop of the sheet, without its label."""
    top = line * DOWN + LABEL
    left = column * ACROSS
    return sheet[top:top + SIDE, left:left + SIDE]


# ---- where --------------------------------------------------------------------------------------
def test_the_crop_is_where_the_error_shrinks_most():
    """The first version is wrong in two boxes, more so in the one that the second leaves wrong."""
    original = np.full((200, 240, 3), 100, np.uint8)
    before, after = original.copy(), original.copy()
    before[40:80, 160:200] += 30
    before[120:160, 16:56] += 90
    after[120:160, 16:56] += 90
    assert crops.most_gained(before, after, original, 40) == (slice(40, 80), slice(160, 200))


def test_a_small_picture_is_taken_as_a_whole():
    images = [noisy(40, 50, (slice(8), slice(8)), seed) for seed in range(3)]
    assert crops.most_gained(*images, 72) == (slice(0, 40), slice(0, 50))


def test_an_original_may_be_larger():
    """52×63 pixels leave 13×15 small ones, which become 52×60."""
    original = noisy(52, 63, (slice(52), slice(63)))
    before = np.full((52, 60, 3), 128, np.uint8)
    after = before.copy()
    after[16:32, 24:40] = original[16:32, 24:40]
    assert crops.most_gained(before, after, original, 16) == (slice(16, 32), slice(24, 40))


# ---- the sheet ----------------------------------------------------------------------------------
def test_the_sheet_shows_every_upscaler_and_the_original():
    """Two pictures, three upscalers; only the last one is right, in another box of each."""
    boxes = [(slice(16, 16 + CROP), slice(32, 32 + CROP)),
             (slice(80, 80 + CROP), slice(8, 8 + CROP))]
    originals = [noisy(200, 220, box, seed) for seed, box in enumerate(boxes)]
    pictures = data.Pictures(["a.png", "b.png"],
                             lambda i: data.Picture({1: originals[i][::4, ::4], 4: originals[i]}),
                             (1, 4))
    grey = np.full((200, 220, 3), 128, np.uint8)
    rows = {}
    for name, images in dict(first=[grey, grey], middle=[255 - o for o in originals],
                             last=originals).items():
        rows[name] = [Row("", 30.0, 0.9, 1.0, image) for image in images]
    sheet = crops.comparison(rows, pictures, 4)
    assert sheet.shape == (2 * DOWN - 5, 4 * ACROSS - 5, 3)
    for line, box in enumerate(boxes):
        for column, images in enumerate(rows.values()):
            assert np.array_equal(cell(sheet, line, column), enlarged(images[line].image[box]))
        assert np.array_equal(cell(sheet, line, 3), enlarged(originals[line][box]))
        for column in range(4):
            label = sheet[line * DOWN:line * DOWN + LABEL, column * ACROSS:][:, :SIDE]
            assert label.max() > 200, "there are letters"


def test_the_sheet_shows_the_middle_of_blur_kernels():
    """31×31 entries: the 15×15 in the middle, 4 pixels each, in the lower right of the crop."""
    image = noisy(72, 72, (slice(72), slice(72)))
    true, found = np.random.default_rng(0).random((2, 31, 31), np.float32)
    pictures = data.Pictures(
        ["a"], lambda i: data.Picture({1: image[::4, ::4], 4: image}, true), (1, 4))
    sheet = crops.comparison({"ours": [Row("a", 30.0, 0.9, 1.0, image, found)]}, pictures, 4)
    for column, kernel in enumerate((found, true)):
        inset = cell(sheet, 0, column)[-60:, -60:]
        for colour in range(3):
            shown = upscale.kernel_picture(kernel[8:23, 8:23], 4)
            assert np.array_equal(inset[..., colour], shown)
