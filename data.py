"""Pictures in, batches out: files, folders, sets of pictures, random patches to train on.

The method learns from pairs (DRC, arXiv 2207.07929, Section 3): a picture and its reductions. A
whole picture is a `Picture`, uint8 images (height, width, 3) by scale, where 1 is the input of the
network and the largest scale is the original. A set of them is a `Pictures`, from a folder
(`open_folder`), from a seed (`generate`) or with scikit-image (`photographs`). `batches` cuts
aligned random patches from a set and yields them as `SR`, float32 in 0..1.

A set decodes a picture when it is asked for. That is right for measuring; training looks at every
file first and decodes all of them once (gather.py, cache.py).

What pictures come from and go through stands in files of its own, and is offered here too: picture
files (files.py), MATLAB's reduction (bicubic.py), blurring for blind networks (degradation.py).
leaves.py draws the pictures of `generate`.

`python data.py get DIV2K --root DIR` fetches a set from where its authors keep it (download.py).

Not here: PSNR and other measures (evaluate.py), what training does with a batch (train.py). Read
bicubic.py next.
"""
import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import leaves
from backbones.base import SR
from bicubic import imresize, resize
from degradation import (
    KINDS,
    blind,
    blind_kernels,
    blur_images,
    corrected_kernel,
    degrade,
    degrade_picture,
    reduce,
    reduce_images,
)
from download import main
from files import check_folder, decode, list_pictures, size, some_pictures, write_image
from run import Bar, command

__all__ = ["KINDS", "Picture", "Pictures", "batches", "blind", "blind_kernels", "blur_images",
           "corrected_kernel", "decode", "degrade", "generate", "imresize", "open_folder",
           "photographs", "reduce", "reduce_images", "resize", "size", "to_device", "write_image"]

CACHE = 4 << 30  # bytes of decoded pictures that a set keeps in memory
AHEAD = 4  # batches that are prepared before they are asked for
WORKERS = 4  # threads that prepare them; they wait where AHEAD batches are ready


# ---- sets of pictures ----------------------------------------------------------------------------
class Picture(NamedTuple):
    """One picture at several scales. Treat the arrays as read-only: a set may keep them.

    images: {scale: uint8 (h, w, 3)}. Under 1 is the input of a network, under s an image s times as
      large, under the largest scale the original.
    kernel: float32 (k, k) with sum 1: what a blind network should estimate from the image under 1
      (degradation.py); None where nothing is blind.
    """
    images: dict[int, np.ndarray]
    kernel: np.ndarray | None = None


Load = Callable[[int], Picture]


class Pictures(Sequence):
    """A sequence of `Picture`s that are loaded when they are asked for.

    `p[i]` is one picture; `p[a:b]` is a set that shares the loader and so its cache.
    """
    def __init__(self, names: Sequence[str], load: Load, scales: Sequence[int]):
        """names: one for each picture; load: called with 0, 1, 2, ...; scales: of all pictures."""
        self.names = list(names)
        self.load = load
        self.scales = tuple(scales)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i):
        chosen = range(len(self))[i]  # counts negative ones from the end, raises IndexError
        if isinstance(i, slice):
            return Pictures(self.names[i], lambda k: self.load(chosen[k]), self.scales)
        return self.load(chosen)


def cached(load: Load, limit: int) -> Load:
    """Returns `load` with a memory of up to `limit` bytes.

    What comes first stays: with random access, replacing it by what comes later gains nothing.
    """
    kept = {}
    held = 0
    lock = threading.Lock()  # training's thread and an evaluation may load at the same time

    def load_once(key: int) -> Picture:
        nonlocal held
        if key in kept:
            return kept[key]
        picture = load(key)
        needed = sum(image.nbytes for image in picture.images.values())
        with lock:
            if key not in kept and held + needed <= limit:
                kept[key] = picture
                held += needed
        return picture

    return load_once


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """Returns the scales in order. Raises ValueError where they cannot be those of a picture."""
    scales = tuple(sorted(set(scales)))
    if len(scales) < 2 or scales[0] != 1 or any(scales[-1] % s for s in scales):
        raise ValueError(f"scales={scales} must hold 1 and a largest scale that the others divide, "
                         f"such as (1, 2, 4)")
    return scales


def reduced(high: np.ndarray, scales: Sequence[int], name: str,
            degradation: str = "bicubic") -> Picture:
    """Makes a picture from the original, cropped at the bottom and at the right.

    Its sides become multiples of the largest scale. ValueError: then nothing would be left.
    degradation: how the image under 1 is made, one of degradation.KINDS. Those between are not what
      a network is given but what it should predict: they are always reduced by bicubic.
    """
    largest = scales[-1]
    height = high.shape[0] // largest * largest
    width = high.shape[1] // largest * largest
    if not height or not width:
        raise ValueError(f"{name} has {size(high)} pixels, too few for scale {largest}: remove it")
    high = np.ascontiguousarray(high[:height, :width])
    images = {}
    for s in scales[:-1]:
        images[s] = reduce(high, largest // s, degradation if s == 1 else "bicubic")
    return Picture({**images, largest: high})


def generate(count: int, side: int, scales: Sequence[int], seed: int,
             workers: int | None = None, degradation: str = "bicubic") -> Pictures:
    """Draws `count` dead-leaves pictures of side × side pixels (leaves.py), kept in memory.

    They depend on (seed, side) alone; `workers` processes share the work, see `leaves.draw`;
    degradation: see `reduced`.
    Raises ValueError for a count below 1, a negative seed, or a side that is no positive multiple
    of the largest scale.
    """
    scales = check_scales(scales)
    if count < 1 or side < 1 or side % scales[-1] or seed < 0:
        raise ValueError(f"cannot generate count={count} pictures of side={side}, seed={seed}: "
                         f"give count >= 1, seed >= 0 and a side that is a multiple of "
                         f"{scales[-1]}")
    names = [f"leaves{i:04d}" for i in range(count)]
    originals = leaves.draw([(seed, i) for i in range(count)], side, workers)
    progress = Bar(originals, "pictures", count, delay=2)
    pictures = [reduced(high, scales, name, degradation) for high, name in zip(progress, names)]
    return Pictures(names, pictures.__getitem__, scales)


PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
               "motorcycle_left.png", "retina.jpg", "rocket.jpg")


def photographs(scales: Sequence[int], kernel_size: int = 0,
                degradation: str = "bicubic") -> Pictures:
    """The eight colour photographs that come with scikit-image: nothing is downloaded.

    kernel_size: above 0, the image under 1 is made by `degrade` instead of `reduce`, with a kernel
      that is different for each photograph and always the same.
    degradation: else the image under 1 is made so, see `reduced`.
    Raises ValueError for wrong scales, and on access where scikit-image lacks the file.
    """
    import skimage.data  # here, because it is slow to import and seldom needed
    scales = check_scales(scales)
    folder = Path(skimage.data.__file__).parent

    def load(i: int) -> Picture:
        picture = reduced(decode(folder / PHOTOGRAPHS[i]).rgb, scales, PHOTOGRAPHS[i], degradation)
        if not kernel_size:
            return picture
        high = picture.images[scales[-1]]
        low, kernel = degrade_picture(high, scales[-1], kernel_size, i)
        return Picture({1: low, scales[-1]: high}, kernel)

    return Pictures([Path(name).stem for name in PHOTOGRAPHS], cached(load, CACHE), scales)


# ---- folders -------------------------------------------------------------------------------------
LAYOUTS = (  # (originals, reductions) as the authors lay them out, the best set first
    ("DF2K/DF2K_HR", "DF2K/DF2K_LR_bicubic"),
    ("DIV2K/DIV2K_train_HR", "DIV2K/DIV2K_train_LR_bicubic"),
    ("Flickr2K/Flickr2K_HR", "Flickr2K/Flickr2K_LR_bicubic"),
    ("HR", "LR_bicubic"),
)


def open_folder(path: str | os.PathLike, scales: Sequence[int], limit: int = CACHE,
                degradation: str = "bicubic") -> Pictures:
    """The pictures of a folder (`list_folder`); they are decoded when they are asked for.

    limit: bytes of decoded pictures to keep in memory; the others are decoded each time.
    Raises ValueError as `list_folder` does, and on access for a file that is damaged or does not
    match its reduction.
    """
    files = list_folder(path, scales, degradation)
    return Pictures(files.names, cached(files.load, limit), files.scales)


class Files(NamedTuple):
    """Where the pictures of a folder lie: one entry for each picture."""
    names: list[str]               # path of the original below the folder of originals
    high: list[Path]               # the originals
    lows: list[dict[int, Path]]    # {scale: file of the reduction}, where there is one
    scales: tuple[int, ...]
    degradation: str = "bicubic"   # how what is not there is made, see `reduced`

    def load(self, i: int) -> Picture:
        """Reads picture i. Raises ValueError, naming the file, where that cannot be done."""
        return load_picture(self.high[i], self.lows[i], self.scales, self.degradation)


def list_folder(path: str | os.PathLike, scales: Sequence[int],
                degradation: str = "bicubic") -> Files:
    """Lists the pictures of a folder; no file is opened.

    path: a folder with pictures at any depth (png jpg jpeg webp bmp tif tiff), or one of these:
        DF2K/DF2K_HR/0001.png               and   DF2K/DF2K_LR_bicubic/X4/0001x4.png
        DIV2K/DIV2K_train_HR/0001.png       and   DIV2K/DIV2K_train_LR_bicubic/X4/0001x4.png
        HR/baby.png (a benchmark)           and   LR_bicubic/X4/babyx4.png
        gt/img_1_gt.png (blurred: DIV2KRK)  and   lr_x4/im_1.png
      Smaller images that no file holds are made by `imresize`. The kernels of DIV2KRK are read by
      evaluate.py.
      Originals are cropped to the size of the small image times the scale.
    scales: such as (1, 2, 4).
    degradation: see `reduced`. With another kind than bicubic, images under 1 are made even where
      the folder holds them.
    Raises ValueError for wrong scales, and a missing, empty or mixed folder.
    """
    scales = check_scales(scales)
    root = check_folder(path)
    high, low = find_layout(root, scales[-1])
    files = list_originals(root, high)
    found = {}  # {scale: {name of the original: file of its reduction}}
    if high == root / "gt":
        found[1] = match_by_number(files, high, low)
    elif low is not None:
        for s in scales[:-1]:
            found[s] = list_reductions(low, scales[-1] // s)
    if degradation != "bicubic":
        found.pop(1, None)
    lows = []
    for file in files:
        name = stem(file, high)
        lows.append({s: of_name[name] for s, of_name in found.items() if name in of_name})
    names = [file.relative_to(high).as_posix() for file in files]
    return Files(names, files, lows, scales, degradation)


def find_layout(root: Path, scale: int) -> tuple[Path, Path | None]:
    """Returns the folders of the originals and of the reductions (None: there are none)."""
    if (root / "gt").is_dir() and any(root.glob("lr_x*")):
        return root / "gt", root / f"lr_x{scale}"
    for high, low in LAYOUTS:
        if (root / high).is_dir():
            return root / high, root / low
    return root, None


def list_originals(root: Path, high: Path) -> list[Path]:
    """Returns the files of the originals. Raises ValueError for none, or reductions among them."""
    files = some_pictures(high)
    for file in files:
        if "LR_bicubic" in file.relative_to(high).as_posix():
            raise ValueError(f"{root} mixes originals and reductions ({file}): give the folder of "
                             f"one set, with HR in it")
    return files


def stem(file: Path, folder: Path) -> str:
    """Returns what identifies a picture: its path below the folder, without the extension."""
    return file.relative_to(folder).with_suffix("").as_posix()


def list_reductions(low: Path, factor: int) -> dict[str, Path]:
    """Returns {name of the original: file}, such as {"baby": X4/babyx4.png} for factor 4."""
    folder = low / f"X{factor}"
    return {stem(f, folder).removesuffix(f"x{factor}"): f for f in list_pictures(folder)}


def number(file: Path) -> int:
    """Returns 7 for img_7_gt.png of DIV2KRK, −1 where a name has no number."""
    match = re.search(r"\d+", file.stem)
    return int(match[0]) if match else -1


def match_by_number(files: list[Path], high: Path, low: Path) -> dict[str, Path]:
    """Returns {name of the original: file} of DIV2KRK: gt/img_7_gt.png belongs to lr_x4/im_7.png.

    Raises ValueError for an original without a reduction.
    """
    numbered = {number(file): file for file in list_pictures(low)}
    for file in files:
        if number(file) not in numbered:
            raise ValueError(f"{file} has no blurred picture with its number in {low}: complete it "
                             f"or take another scale")
    return {stem(file, high): numbered[number(file)] for file in files}


def load_picture(high_file: Path, low_files: dict[int, Path], scales: Sequence[int],
                 degradation: str = "bicubic") -> Picture:
    """Reads a picture: reductions in `low_files` as they are, the others made from the original."""
    high = decode(high_file).rgb
    height = high.shape[0] // scales[-1]
    width = high.shape[1] // scales[-1]
    lows = {}
    for s, file in low_files.items():
        low = decode(file).rgb
        check_match(high.shape[:2], high_file, low.shape[:2], file, scales[-1] // s)
        lows[s] = np.ascontiguousarray(low[:height * s, :width * s])
    missing = [s for s in scales if s not in lows]
    made = reduced(high, missing, str(high_file), degradation).images
    return Picture({s: lows[s] if s in lows else made[s] for s in scales})


def check_match(high: Sequence[int], high_file: Path, low: Sequence[int], low_file: Path,
                factor: int) -> None:
    """Raises ValueError where (height, width) `high` is not `factor` times `low`, up to a pixel
    that is incomplete.
    """
    for n, m in zip(high, low):
        if not 0 <= n - m * factor < factor:
            raise ValueError(f"{high_file} ({high[1]}x{high[0]}) is not {factor} times {low_file} "
                             f"({low[1]}x{low[0]}) up to {factor - 1} pixels: replace one of them")


# ---- training batches ----------------------------------------------------------------------------
def batches(pictures: Pictures, patch: int, batch: int, seed: int, start: int = 0,
            pin: bool = False) -> Iterator[SR]:
    """Yields training batches without end, on the CPU.

    patch: the side in pixels of a square of the original; batch: how many squares. Their images are
      float32 (batch, 3, h, h) in 0..1 with h = patch · scale / largest scale. They are aligned
      random crops, flipped and turned in one of eight ways, the same at all scales.
    pin: put them into page-locked memory, from which a GPU takes them while it computes.
    Step k depends on (seed, k, pictures) alone, so `start=k` continues exactly. Threads work ahead
    until the iterator is closed or dropped; in what order they finish changes nothing.
    Raises ValueError for a patch that is no multiple of the largest scale, no pictures, a batch
    below 1, a negative seed or start; from the iterator, for a picture that is smaller than the
    patch or cannot be read.
    """
    largest = pictures.scales[-1]
    if patch < 1 or patch % largest:
        raise ValueError(f"patch={patch} must be a positive multiple of the scale {largest}")
    if not len(pictures) or batch < 1 or seed < 0 or start < 0:
        raise ValueError(f"cannot draw batch={batch}, seed={seed}, start={start} from "
                         f"{len(pictures)} pictures: give batch >= 1, seed >= 0, start >= 0 and at "
                         f"least one picture")

    def make(k: int) -> SR:
        rng = np.random.default_rng((seed, k))
        crops = [random_crop(pictures, patch // largest, rng) for _ in range(batch)]
        return SR({s: to_tensor([crop[s] for crop in crops], pin) for s in pictures.scales})

    return ahead(make, itertools.count(start))


def random_crop(pictures: Pictures, side: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Cuts an aligned random square from a random picture, at all scales; side: that at scale 1."""
    i = rng.integers(len(pictures))
    images = pictures[i].images
    height, width = images[1].shape[:2]
    if min(height, width) < side:
        largest = pictures.scales[-1]
        raise ValueError(f"{pictures.names[i]} ({size(images[largest])} pixels) is smaller than "
                         f"the patch ({side * largest}): choose a smaller patch or remove the "
                         f"picture")
    top = rng.integers(height - side + 1)
    left = rng.integers(width - side + 1)
    way = rng.integers(8)
    crop = {}
    for s, image in images.items():
        rows = slice(s * top, s * (top + side))
        columns = slice(s * left, s * (left + side))
        crop[s] = turned(image[rows, columns], way)
    return crop


def turned(square: np.ndarray, way: int) -> np.ndarray:
    """Applies one of the eight symmetries of the square, way = 0..7."""
    if way & 4:
        square = square.swapaxes(0, 1)
    if way & 2:
        square = square[::-1]
    if way & 1:
        square = square[:, ::-1]
    return square


def to_tensor(squares: list[np.ndarray], pin: bool = False) -> Tensor:
    """Copies uint8 squares (h, h, 3) into a float32 (N, 3, h, h) in 0..1; pin: see `batches`."""
    side = len(squares[0])
    out = torch.empty(len(squares), 3, side, side, pin_memory=pin)
    for image, square in zip(out.numpy(), squares):
        image[...] = square.transpose(2, 0, 1)  # (h, h, 3) -> (3, h, h)
    return out.div_(255)


def ahead(make: Callable[[Any], Any], keys: Iterable, workers: int = WORKERS,
          depth: int = AHEAD) -> Iterator:
    """Yields make(key) for every key, in their order, made by threads up to `depth` keys ahead.

    The threads' errors are raised here. They end when the iterator is closed or dropped.
    """
    # One OpenMP thread for each (the setting holds for the thread that makes it): with further
    # teams of them, training would be nearly half as fast.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    keys = iter(keys)
    try:
        waiting = deque(pool.submit(make, key) for key in itertools.islice(keys, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(make, key) for key in itertools.islice(keys, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def to_device(batches: Iterator[SR], device: torch.device) -> Iterator[SR]:
    """Yields the batches on a device, in the memory layout that convolutions like best."""
    with closing(batches):
        for batch in batches:
            images = {}
            for s, x in batch.images.items():
                images[s] = x.to(device, memory_format=torch.channels_last, non_blocking=True)
            kernel = batch.kernel
            yield SR(images, kernel if kernel is None else kernel.to(device))


if __name__ == "__main__":
    command(main)
