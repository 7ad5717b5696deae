"""Pictures in, batches `{scale: image}` out: MATLAB's bicubic reduction, image files, folders, built-in pictures.

The method learns from pairs (DRC paper, section 3): a picture and its bicubic reductions. Whole pictures are uint8
(height, width, 3) in numpy; a set of them is `Pictures`, one dict {scale: image} each, where 1 is the network's input
and the largest scale is the original. `batches` cuts aligned random patches from a set, float32 in [0, 1] for torch.
Reductions are MATLAB's `imresize`, bit for bit, as in the published benchmarks; Pillow and torch differ from it.
The built-in pictures need no download: synthetic "dead leaves" to train on, photographs of scikit-image to look at.

For blind networks `degrade` blurs originals with random kernels on the device, and says what kernel is to be found.

Not here: PSNR and other measures (evaluate.py), what training does with the batches (train.py). Read models.py next.
"""

import contextlib
import io
import itertools
import math
import os
import queue
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MAX_PIXELS = 1 << 29  # the largest picture read: 536 million pixels, 1.6 GB as RGB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own bound is lower and warns; decode() checks MAX_PIXELS instead


# ---- MATLAB bicubic --------------------------------------------------------------------------------------------------

def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5 (R. Keys, "Cubic convolution interpolation", 1981, eq. 15)."""
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x <= 1, inner, torch.where(x <= 2, outer, 0.0))


def _taps(n: int, scale: float, edge: str) -> tuple[Tensor, Tensor]:
    """Where each output pixel of one axis looks: source indices (out, taps) in [0, n) and float64 weights (out, taps).

    A reduction stretches the kernel by 1/scale, so that it also removes what the smaller image cannot hold.
    """
    stretch = max(1.0, 1 / scale)
    centre = (torch.arange(math.ceil(n * scale), dtype=torch.float64) + 0.5) / scale - 0.5
    first = (centre - 2 * stretch).floor().long()
    index = first[:, None] + torch.arange(math.ceil(4 * stretch) + 2)
    weight = _cubic((centre[:, None] - index) / stretch)
    weight = weight / weight.sum(1, keepdim=True)
    if edge == "clamp":
        return index.clamp(0, n - 1), weight
    index = index.remainder(2 * n)  # "mirror" repeats the edge pixel: ... 1 0 | 0 1 2 ... has period 2n
    return torch.minimum(index, 2 * n - 1 - index), weight


def _resize_axis(x: Tensor, axis: int, scale: float, edge: str) -> Tensor:
    """Resize one axis of a float tensor, in its dtype: a banded matrix (out, n) times x, as one product per 32 rows.

    One batched product: many small ones would crawl where training's threads compete for the same cores.
    """
    index, weight = _taps(x.shape[axis], scale, edge)
    out, fill = len(index), -len(index) % 32
    index = torch.cat([index, index[-1:].expand(fill, -1)]).view(-1, 32, index.shape[1])  # (bands, 32, taps)
    weight = torch.cat([weight, weight[-1:].expand(fill, -1)]).view(index.shape)
    first = index.amin((1, 2), keepdim=True)
    index = index - first
    band = weight.new_zeros(len(index), 32, int(index.max()) + 1).scatter_add_(2, index, weight)
    source = (first[:, 0] + torch.arange(band.shape[2])).clamp(max=x.shape[axis] - 1)  # (bands, width): rows of x
    x = x.movedim(axis, 0)
    rows = x.reshape(len(x), -1).index_select(0, source.flatten().to(x.device)).view(*source.shape, -1)
    return (band.to(x) @ rows).flatten(0, 1)[:out].view(-1, *x.shape[1:]).movedim(0, axis)


def _check_resize(sides: Sequence[int], scale: float, edge: str) -> None:
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"cannot resize by scale={scale}: give a positive number")
    if edge not in ("clamp", "mirror"):
        raise ValueError(f"unknown edge={edge!r}: use 'clamp' (MATLAB's older rule) or 'mirror' (its newer one)")
    if min(sides) < 1:
        raise ValueError(f"cannot resize an empty image of {tuple(sides)} pixels: give at least one pixel")


def resize(x: Tensor, scale: float, edge: str = "clamp") -> Tensor:
    """Resize a float image as MATLAB does, without any rounding.

    x: (..., H, W), float32 or float64 of any range, on any device. Returns (..., ceil(H·scale), ceil(W·scale)),
    same dtype; values may overshoot the input's range a little, as the cubic kernel does.
    edge: what lies outside the image: "clamp" repeats the border pixel, "mirror" reflects the image (newer MATLAB).
    Raises ValueError for another dtype, another edge, a scale that is not positive or an empty image.
    """
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2:
        raise ValueError(f"resize got {x.dtype} of shape {tuple(x.shape)}: give a float32 or float64 (..., H, W)")
    _check_resize(x.shape[-2:], scale, edge)
    return _resize_axis(_resize_axis(x, -2, scale, edge), -1, scale, edge).contiguous()


def imresize(image: np.ndarray, scale: float, edge: str = "clamp") -> np.ndarray:
    """MATLAB's `imresize(image, scale)`, bit for bit; it made the LR images of all published benchmarks.

    image: uint8 (H, W) or (H, W, 3), values 0..255; returns uint8 with sides ceil(H·scale) and ceil(W·scale).
    What matters for equality: rows first, then columns, and 8-bit rounding (halves up) after *each* of the two.
    edge: "clamp" for the benchmarks' files (older MATLAB), "mirror" for newer versions.
    Raises ValueError for another dtype or shape, another edge, a scale that is not positive or an empty image.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise ValueError(f"imresize got {image.dtype} of shape {image.shape}: give uint8 of shape (H, W) or (H, W, 3)")
    _check_resize(image.shape[:2], scale, edge)
    # Weights at 1/2 and 1/4 are multiples of 2^-12 (sums are exact in float32), at 1/3 of 1/81 (no sum is within 1/162
    # of a rounding tie): there float32 rounds as MATLAB's float64 does, in half the time.
    x = torch.from_numpy(np.ascontiguousarray(image)).to(torch.float32 if 1 / scale in (2, 3, 4) else torch.float64)
    for axis in (0, 1):
        x = _resize_axis(x, axis, scale, edge).add_(0.5).floor_().clamp_(0, 255)
    return x.to(torch.uint8).numpy()


# ---- image files -----------------------------------------------------------------------------------------------------

class Decoded(NamedTuple):
    """A picture file as 8-bit arrays."""
    rgb: np.ndarray           # (H, W, 3)
    alpha: np.ndarray | None  # (H, W), where the file has transparency
    grey: bool                # the file has one colour channel; the three of `rgb` are equal


def decode(path: str | os.PathLike) -> Decoded:
    """Read any picture file that Pillow can read, turned upright as its EXIF tag says; of several frames the first.

    16-bit grey becomes 8-bit by division by 257, rounded (65535 → 255). Colour profiles are ignored.
    Raises ValueError, naming the file, where it is missing, damaged, no picture, or above MAX_PIXELS.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height <= MAX_PIXELS:
                return _to_arrays(ImageOps.exif_transpose(image))
            size = f"{image.width}x{image.height}"
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: check the path") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise ValueError(f"cannot read {path} as a picture ({error}): replace or remove the file") from error
    raise ValueError(f"{path} has {size} pixels, above the limit of {MAX_PIXELS}: cut it into smaller pictures")


def _to_arrays(image: Image.Image) -> Decoded:
    """Convert any Pillow mode to 8-bit RGB, with alpha where the mode or a transparent colour asks for it."""
    if image.mode == "F":
        raise ValueError("it holds floating-point values, save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # I;16 in both byte orders, and I, which Pillow uses for 16-bit PGM
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > 65535:
            raise ValueError("it holds values outside 0..65535, save it with 8 or 16 bits")
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return Decoded(np.array(image.convert("RGB")), None, grey)
    rgba = np.array(image.convert("RGBA"))
    return Decoded(np.ascontiguousarray(rgba[..., :3]), rgba[..., 3].copy(), grey)


def write(path: str | os.PathLike, blob: bytes) -> None:
    """Write a file in full or not at all: under a temporary name in the same folder, then renamed over `path`.

    Raises OSError, naming the path, where the folder is missing, the disk is full or `path` is not a plain file.
    """
    target = Path(os.path.realpath(path))  # a link stays a link: the file it points to is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {path}: it is not a plain file, choose another name")
    try:
        temporary.write_bytes(blob)
        os.replace(temporary, target)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write {path} ({reason}): check the folder and its free space") from error
    finally:
        with contextlib.suppress(OSError):  # gone when all went well
            temporary.unlink()


def write_image(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write uint8 (H, W), (H, W, 3) or (H, W, 4) in the format of the path's extension, JPEG with quality 95.

    Raises ValueError for an unknown extension or an array the format cannot hold, OSError as `write` does.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    blob = io.BytesIO()
    try:
        if kind not in Image.SAVE:
            raise ValueError("unknown extension")
        Image.fromarray(array).save(blob, kind, **{"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {}))
    except (OSError, TypeError, ValueError) as error:
        what = f"{array.dtype} of shape {array.shape}"
        raise ValueError(f"cannot write {path} from {what} ({error}): use .png and uint8 (H, W, 3)") from error
    write(path, blob.getvalue())


# ---- sets of pictures ------------------------------------------------------------------------------------------------

class Pictures(Sequence):
    """A sequence of pictures, each a dict {scale: uint8 (h, w, 3)} for the scales of `scales`.

    Key s holds the picture at s times the size of key 1, the network's input; the largest is the original.
    `p[i]` is one picture, `p[a:b]` a set that shares the loader (and so its cache). Treat the arrays as read-only.
    names: one str per picture; load(key): the dict of one picture; keys: what `load` takes, by default 0, 1, 2, ...
    """

    def __init__(self, names: Sequence[str], load: Callable[[int], dict[int, np.ndarray]], scales: Sequence[int],
                 keys: Sequence[int] | None = None):
        self.names = list(names)
        self.scales = tuple(scales)
        self._load = load
        self._keys = range(len(self.names)) if keys is None else keys

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Pictures(self.names[i], self._load, self.scales, self._keys[i])
        return self._load(self._keys[i])


def _cached(load: Callable[[int], dict[int, np.ndarray]], limit: int) -> Callable[[int], dict[int, np.ndarray]]:
    """Keep what `load` returns up to `limit` bytes. First come stay: random access gains nothing from turning over."""
    kept, lock = {}, threading.Lock()
    held = 0

    def cached_load(key):
        nonlocal held
        if key in kept:
            return kept[key]
        y = load(key)
        size = sum(image.nbytes for image in y.values())
        with lock:  # training's background thread and an evaluation may load at the same time
            if key not in kept and held + size <= limit:
                kept[key] = y
                held += size
        return y

    return cached_load


def _check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    scales = tuple(sorted(set(scales)))
    if len(scales) < 2 or scales[0] != 1 or any(scales[-1] % s for s in scales):
        raise ValueError(f"scales={scales} must hold 1 and a largest scale that the others divide, such as (1, 2, 4)")
    return scales


def _blurred(y: dict[int, np.ndarray], kernel_size: int, seed: int) -> dict[int | str, np.ndarray]:
    """A picture with its LR blurred by the random kernel of this seed, and that kernel as the LR image shows it."""
    scale = max(y)
    high = torch.from_numpy(y[scale]).permute(2, 0, 1)[None].float() / 255
    made = degrade(high, scale, kernel_size, torch.Generator().manual_seed(seed))
    low = (made[1][0] * 255).round().byte().permute(1, 2, 0).contiguous()
    return {1: low.numpy(), scale: y[scale], "kernel": made["kernel"][0, 0].numpy()}


def _reduced(high: np.ndarray, scales: tuple[int, ...], name: str) -> dict[int, np.ndarray]:
    """{scale: image} from the original alone, cropped at the bottom and right to a multiple of the largest scale."""
    largest = scales[-1]
    height, width = (n // largest * largest for n in high.shape[:2])
    if not height or not width:
        raise ValueError(f"{name} has {_size(high)} pixels, too few for scale {largest}: remove it")
    high = np.ascontiguousarray(high[:height, :width])
    return {s: high if s == largest else imresize(high, s / largest) for s in scales}


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


LAYOUTS = (("DF2K/DF2K_HR", "DF2K/DF2K_LR_bicubic"),  # (originals, reductions) of the authors' release, best first
           ("DIV2K/DIV2K_train_HR", "DIV2K/DIV2K_train_LR_bicubic"),
           ("HR", "LR_bicubic"))


def _list(folder: Path) -> list[Path]:
    """All picture files below a folder, sorted by path; names with a leading dot are other programs' leftovers."""
    return sorted(f for f in folder.rglob("*")
                  if f.suffix.lower() in EXTENSIONS and not f.name.startswith(".") and f.is_file())


def _stem(file: Path, folder: Path) -> str:
    return file.relative_to(folder).with_suffix("").as_posix()


def _list_lows(folder: Path, scales: tuple[int, ...]) -> dict[int, dict[str, Path]]:
    """{scale: {name of the original: file}} from folders such as X4 with files such as babyx4.png, where they exist."""
    lows = {}
    for s in scales[:-1]:
        factor = scales[-1] // s
        files = _list(folder / f"X{factor}")
        lows[s] = {_stem(f, folder / f"X{factor}").removesuffix(f"x{factor}"): f for f in files}
    return lows


def _list_blurred(root: Path, scale: int) -> dict[str, Path]:
    """{name of the original: file} of DIV2KRK, where gt/img_7_gt.png belongs to lr_x4/im_7.png: by the first number."""
    def number(file):
        return int((re.findall(r"\d+", file.stem) or [-1])[0])

    high, low = root / "gt", root / f"lr_x{scale}"
    lows = {number(f): f for f in _list(low)}
    if alone := next((f for f in _list(high) if number(f) not in lows), None):
        raise ValueError(f"{alone} has no blurred picture with its number in {low}: complete it or take another scale")
    return {_stem(f, high): lows[number(f)] for f in _list(high)}


def _load_pair(high_file: Path, low_files: dict[int, Path], scales: tuple[int, ...]) -> dict[int, np.ndarray]:
    """One picture at all scales: the reductions in `low_files` as they are, the others made from the original."""
    high = decode(high_file).rgb
    lows = {s: decode(f).rgb for s, f in low_files.items()}
    for s, low in lows.items():
        factor = scales[-1] // s
        if any(not 0 <= n - m * factor < factor for n, m in zip(high.shape[:2], low.shape[:2])):
            raise ValueError(f"{high_file} ({_size(high)}) is not {factor} times {low_files[s]} ({_size(low)}) "
                             f"up to {factor - 1} pixels: replace one of them")
    y = _reduced(high, tuple(s for s in scales if s not in lows), str(high_file))
    height, width = (n // scales[-1] for n in high.shape[:2])
    return {s: y[s] if s in y else np.ascontiguousarray(lows[s][:height * s, :width * s]) for s in scales}


def open_folder(path: str | os.PathLike, scales: Sequence[int], limit: int = 4 << 30) -> Pictures:
    """The pictures of a folder, listed now and decoded when asked for; LR by `imresize` where no file holds it.

    path: a folder with pictures at any depth (png jpg jpeg webp bmp tif tiff), or one of the authors' layouts:
    a root with DF2K/DF2K_HR or DIV2K/DIV2K_train_HR (and .._LR_bicubic/X4/0001x4.png), a benchmark set with HR (and
    LR_bicubic/X4/babyx4.png), or the blurred set DIV2KRK with gt/img_1_gt.png and lr_x4/im_1.png, whose kernels are not
    read: they are of HR pixels and another reduction, so not what `corrected_kernel` defines.
    Originals are cropped to LR size times scale.
    scales: such as (1, 2, 4); limit: bytes of decoded pictures to keep in memory, the others are decoded each time.
    Raises ValueError for a missing or empty folder, and on access for a file that is damaged or does not match its LR.
    """
    scales, root = _check_scales(scales), Path(path)
    if not root.is_dir():
        raise ValueError(f"{path} is {'a file' if root.exists() else 'missing'}: give a folder of pictures")
    high, low = next(((root / h, root / l) for h, l in LAYOUTS if (root / h).is_dir()), (root, None))
    if blurred := (root / "gt").is_dir() and any(root.glob("lr_x*")):
        high = root / "gt"
    files = _list(high)
    if not files:
        raise ValueError(f"{high} holds no picture ({' '.join(sorted(EXTENSIONS))}): give a folder of pictures")
    if mixed := next((f for f in files if any("LR_bicubic" in part for part in f.relative_to(high).parts)), None):
        raise ValueError(f"{path} mixes originals and reductions ({mixed}): give the folder of one set, with HR in it")
    lows = {1: _list_blurred(root, scales[-1])} if blurred else _list_lows(low, scales) if low else {}

    def load(i):
        name = _stem(files[i], high)
        return _load_pair(files[i], {s: found[name] for s, found in lows.items() if name in found}, scales)

    return Pictures([f.relative_to(high).as_posix() for f in files], _cached(load, limit), scales)


PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
               "retina.jpg", "rocket.jpg")


def photographs(scales: Sequence[int], kernel_size: int = 0) -> Pictures:
    """The eight colour photographs that come with scikit-image (nothing is downloaded), their LR by `imresize`.

    kernel_size: above 0, the LR is made by `degrade` instead, each photograph with a kernel of its own that is always
    the same, and the key "kernel" holds what a blind network should find: float32 (kernel_size, kernel_size).
    Raises ValueError for wrong scales, and on access where the installed scikit-image lacks the file.
    """
    import skimage.data  # here, for it is slow to import and seldom needed
    scales, folder = _check_scales(scales), Path(skimage.data.__file__).parent

    def load(i):
        y = _reduced(decode(folder / PHOTOGRAPHS[i]).rgb, scales, PHOTOGRAPHS[i])
        return _blurred(y, kernel_size, i) if kernel_size else y

    return Pictures([Path(name).stem for name in PHOTOGRAPHS], _cached(load, 4 << 30), scales)


# ---- synthetic pictures ----------------------------------------------------------------------------------------------
# Dead leaves: opaque shapes with sizes as in nature, thrown on each other (Lee, Mumford & Huang 2001), which suffice to
# train restoration networks (Achddou, Gousseau & Ladjal 2021). Everything is drawn at twice the size, then averaged.

AXES = np.array([[1, 1, 1], [0.5 ** 0.5, -0.5 ** 0.5, 0], [6 ** -0.5, 6 ** -0.5, -2 * 6 ** -0.5]], np.float32)
UNCOVERED = 0.0005  # the part of the picture that may stay without a leaf


def _radii(rng: np.random.Generator, count: int, smallest: float, side: int) -> np.ndarray:
    """Radii in [smallest, 2·side] with density r^-3 (as objects in photographs), times the places that show them."""
    grid = np.geomspace(smallest, 2 * side, 1000)
    density = grid ** -3 * (side + 2 * grid) ** 2
    steps = np.diff(grid) * (density[1:] + density[:-1]) / 2
    cumulative = np.concatenate([[0], np.cumsum(steps)])
    return np.interp(rng.random(count) * cumulative[-1], cumulative, grid)


def _throw(rng: np.random.Generator, side: int, smallest: float, count: int) -> np.ndarray:
    """Random leaves around a square, (count, 7): radius, half height, half width, angle, reach, centre y, centre x.

    Half are disks (half height and width 0), half rectangles of the disk's area, aspect in [1/2, 2], at any angle.
    """
    radius = _radii(rng, count, smallest, side)
    aspect = 2 ** rng.uniform(-1, 1, count)
    rectangle = rng.random(count) < 0.5
    height = rectangle * radius * np.sqrt(np.pi / 4 * aspect)
    width = rectangle * radius * np.sqrt(np.pi / 4 / aspect)
    reach = np.where(rectangle, np.hypot(height, width), radius)
    angle = rng.uniform(0, np.pi, count)
    y, x = rng.uniform(-reach, side + reach, (2, count))
    return np.stack([radius, height, width, angle, reach, y, x], 1)


def _boxes(leaves: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounding boxes in the picture, int (count, 4): top, bottom, left, right; and which hold a free pixel."""
    reach, centre = leaves[:, 4:5], leaves[:, 5:7]
    low = np.clip(np.floor(centre - reach), 0, len(free)).astype(int)
    high = np.clip(np.floor(centre + reach) + 2, 0, len(free)).astype(int)
    (top, left), (bottom, right) = low.T, high.T
    total = np.pad(free.cumsum(0, dtype=np.int32).cumsum(1), ((1, 0), (1, 0)))  # free pixels above and to the left
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    return np.stack([top, bottom, left, right], 1), inside > 0


def _cover(rng: np.random.Generator, side: int, smallest: float, paint: Callable) -> np.ndarray:
    """Throw leaves front to back until nearly the whole square is covered; return what is not, bool (side, side).

    paint(box, seen, radius, dy, dx) colours a leaf: box two slices, seen its visible pixels, bool (h, w),
    dy (h, 1) and dx (1, w) float32 distances from its centre.
    """
    free = np.ones((side, side), bool)
    while free.mean() > UNCOVERED:
        leaves = _throw(rng, side, smallest, 1000)
        boxes, visible = _boxes(leaves, free)
        for leaf, (top, bottom, left, right) in zip(leaves[visible].tolist(), boxes[visible].tolist()):
            radius, height, width, angle, _, y, x = leaf
            box = slice(top, bottom), slice(left, right)
            dy = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
            dx = np.arange(left, right, dtype=np.float32) - np.float32(x)
            if height:
                c, s = math.cos(angle), math.sin(angle)
                seen = (abs(c * dy + s * dx) <= height) & (abs(c * dx - s * dy) <= width)
            else:
                seen = dy * dy + dx * dx <= radius * radius
            seen &= free[box]
            if seen.any():
                paint(box, seen, radius, dy, dx)
                free[box] &= ~seen
    return free


def _noise(rng: np.random.Generator, side: int, slope: float) -> np.ndarray:
    """Periodic Gaussian noise with amplitude spectrum 1/f^slope, mean 0 and deviation 1, float32 (side, side)."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)).astype(np.float32)
    frequency[0, 0] = np.inf  # no mean
    spectrum = rng.standard_normal((*frequency.shape, 2), np.float32).view(np.complex64)[..., 0]
    noise = np.fft.irfft2(spectrum * frequency ** np.float32(-slope), s=(side, side)).astype(np.float32)
    return noise / noise.std()


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of float32 (h, w, c), mirrored at the border."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for _ in range(2):
        padded = np.pad(image, ((reach, reach), (0, 0), (0, 0)), mode="symmetric")
        blurred = sum(w * padded[i:i + len(image)] for i, w in enumerate(weights))
        image = blurred.swapaxes(0, 1)
    return image


def _palette(rng: np.random.Generator) -> tuple[Callable[[], np.ndarray], float]:
    """The colours of one picture: a function that draws one, float32 (3,), and the mean luminance."""
    luminance, contrast = rng.uniform(0.25, 0.65), rng.uniform(0.12, 0.28)
    tint, colourfulness = rng.normal(0, 0.05, 2), rng.uniform(0.02, 0.10, 2)
    mean, deviation = [luminance, *tint], [contrast, *colourfulness]
    return lambda: rng.normal(mean, deviation).astype(np.float32) @ AXES, luminance


def _texture(rng: np.random.Generator, bank: list[np.ndarray], dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """A grey pattern (h, w) to add to a leaf: a piece of noise, or stripes of 0.03..0.25 cycles per output pixel."""
    strength = np.float32(rng.uniform(0, 0.12))
    if rng.random() < 0.15:
        frequency, angle, phase = rng.uniform(0.03, 0.25) / 2, rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
        along = np.float32(math.cos(angle)) * dx + np.float32(math.sin(angle)) * dy
        return strength * np.sin(np.float32(2 * np.pi * frequency) * along + np.float32(phase))
    noise, h, w = bank[rng.integers(len(bank))], dy.size, dx.size
    top, left = rng.integers(len(noise) - h + 1), rng.integers(len(noise) - w + 1)
    return strength * noise[top:top + h, left:left + w]


def _gradient(rng: np.random.Generator, radius: float, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    """A factor (h, w) for a leaf's colour, from 0.7 on one edge to 1.3 on the other in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.float32(0.3 * math.cos(angle) / radius), np.float32(0.3 * math.sin(angle) / radius)
    return np.clip(1 + slope[0] * dx + slope[1] * dy, 0.7, 1.3)


def _sharp_leaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """The picture before depth of field, float32 (side, side, 3) in [0, 1]."""
    draw, luminance = _palette(rng)
    canvas = np.full((2 * side, 2 * side, 3), luminance, np.float32)
    bank = [_noise(rng, 2 * side, rng.uniform(0.5, 2.5)) for _ in range(6)]
    smallest = 2 * rng.choice([1.5, 10.0])  # half of the pictures have no small leaves: large smooth areas

    def paint(box, seen, radius, dy, dx):  # a leaf's size in output pixels equals its radius here
        colour = draw()
        if radius > 12 and rng.random() < 0.6:
            colour = colour * _gradient(rng, radius, dy, dx)[seen][:, None]
        if radius > 4 and rng.random() < 0.7:
            colour = colour + _texture(rng, bank, dy, dx)[seen][:, None]
        canvas[box][seen] = colour

    _cover(rng, 2 * side, smallest, paint)
    canvas.clip(0, 1, out=canvas)
    return (canvas[::2, ::2] + canvas[1::2, ::2] + canvas[::2, 1::2] + canvas[1::2, 1::2]) / 4


def _focus(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Depth of field: blur the picture by a random amount per (coarse) leaf, none to a Gaussian of 0.6..2.5 pixels."""
    side = len(image)
    depth = np.zeros((-(-side // 4),) * 2, np.float32)

    def paint(box, seen, *_):
        depth[box][seen] = rng.random()

    _cover(rng, len(depth), 10, paint)
    depth = _blur(depth.repeat(4, 0).repeat(4, 1)[:side, :side, None], 4)
    return image + depth * (_blur(image, rng.uniform(0.6, 2.5)) - image)


def dead_leaves(seed: int | Sequence[int], side: int) -> np.ndarray:
    """A synthetic picture, uint8 (side, side, 3), always the same for the same seed.

    Leaves as above with one palette per picture, on them gradients, noise and stripes, over half of the pictures blur
    by depth. On photographs, a small x2 network gained 1.54 dB over bicubic from these, 1.72 from real photographs.
    """
    rng = np.random.default_rng(seed)
    image = _sharp_leaves(rng, side)
    if rng.random() < 0.5:
        image = _focus(rng, image)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def generate(count: int, side: int, scales: Sequence[int], seed: int, workers: int | None = None) -> Pictures:
    """`count` dead-leaves pictures of side x side pixels, made now and kept in memory, their LR by `imresize`.

    The pictures depend on (seed, side) only; `workers` processes (default: one per core) share the work on Linux.
    Raises ValueError for count below 1, a side that is no positive multiple of the largest scale, or a negative seed.
    """
    scales = _check_scales(scales)
    if count < 1 or side < 1 or side % scales[-1] or seed < 0:
        raise ValueError(f"cannot generate count={count} pictures of side={side}, seed={seed}: give count >= 1, "
                         f"seed >= 0 and a side that is a multiple of {scales[-1]}")
    seeds, names = [(seed, i) for i in range(count)], [f"leaves{i:04d}" for i in range(count)]
    pictures = []
    for high in tqdm(_draw_all(seeds, side, workers), "pictures", count, delay=2):
        pictures.append(_reduced(high, scales, names[len(pictures)]))
    return Pictures(names, pictures.__getitem__, scales)


def _draw_all(seeds: list[tuple[int, int]], side: int, workers: int | None) -> Iterator[np.ndarray]:
    """`dead_leaves` of all seeds, in order, in several processes where these can be forked and there is enough to do.

    Other ways to start processes import the user's script again, which breaks one without `if __name__ == ...`.
    The children touch numpy only: torch's threads do not survive a fork.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if sys.platform == "linux" and len(seeds) * side ** 2 >= 1 << 20 else 1
    if workers < 2:
        yield from map(dead_leaves, seeds, itertools.repeat(side))
        return
    with warnings.catch_warnings(), ProcessPoolExecutor(workers, get_context("fork")) as pool:
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # see above
        yield from pool.map(dead_leaves, seeds, itertools.repeat(side))


# ---- training batches ------------------------------------------------------------------------------------------------

def batches(pictures: Pictures, patch: int, batch: int, seed: int, start: int = 0) -> Iterator[dict[int, Tensor]]:
    """Endless training batches {scale: float32 (batch, 3, h, w) in [0, 1]}, h = w = patch · scale / largest scale.

    The patches are aligned random crops, flipped and turned in one of eight ways, the same at all scales.
    Step k depends on (seed, k, pictures) alone: `start=k` continues exactly. A background thread works ahead.
    Raises ValueError for a patch that is no multiple of the largest scale, no pictures, a batch below 1 or a negative
    seed or start; and, from the iterator, for a picture smaller than the patch or one that cannot be read.
    """
    largest = pictures.scales[-1]
    if patch < 1 or patch % largest:
        raise ValueError(f"patch={patch} must be a positive multiple of the scale {largest}")
    if not len(pictures) or batch < 1 or seed < 0 or start < 0:
        raise ValueError(f"cannot draw batch={batch}, seed={seed}, start={start} from {len(pictures)} pictures: "
                         "give batch >= 1, seed >= 0, start >= 0 and at least one picture")
    return _ahead(lambda k: _batch(pictures, patch // largest, batch, np.random.default_rng((seed, k))), start)


def _batch(pictures: Pictures, low_patch: int, batch: int, rng: np.random.Generator) -> dict[int, Tensor]:
    """One batch; low_patch is the side of its patches at scale 1."""
    crops = [_crop(pictures, rng.integers(len(pictures)), low_patch, rng) for _ in range(batch)]
    stacked = {s: np.stack([crop[s] for crop in crops]) for s in pictures.scales}  # uint8 (N, h, w, 3)
    return {s: torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().float().div_(255) for s, x in stacked.items()}


def _crop(pictures: Pictures, i: int, low_patch: int, rng: np.random.Generator) -> dict[int, np.ndarray]:
    """One aligned random crop of picture i at all scales, turned in one of the eight ways."""
    y = pictures[i]
    room = [n - low_patch + 1 for n in y[1].shape[:2]]
    if min(room) < 1:
        largest = pictures.scales[-1]
        raise ValueError(f"{pictures.names[i]} ({_size(y[largest])} pixels) is smaller than the patch "
                         f"({low_patch * largest}): choose a smaller patch or remove the picture")
    top, left, way = rng.integers(room[0]), rng.integers(room[1]), rng.integers(8)
    return {s: _turn(x[s * top:s * (top + low_patch), s * left:s * (left + low_patch)], way) for s, x in y.items()}


def _turn(x: np.ndarray, way: int) -> np.ndarray:
    """One of the eight symmetries of the square: the three bits of `way` are transpose, upside down, left to right."""
    x = x.swapaxes(0, 1) if way & 4 else x
    return x[::-1 if way & 2 else 1, ::-1 if way & 1 else 1]


def _ahead(make: Callable[[int], dict[int, Tensor]], start: int, depth: int = 3) -> Iterator[dict[int, Tensor]]:
    """Yield make(start), make(start + 1), ..., up to `depth` of them prepared by a thread; its errors are raised here.

    The thread ends when the iterator is closed or dropped, or with the main thread.
    """
    ready, stop = queue.Queue(depth), threading.Event()

    def running():
        return not stop.is_set() and threading.main_thread().is_alive()

    def put(item):
        while running():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        torch.set_num_threads(1)  # of this thread: a second team of OpenMP threads would nearly halve the training's speed
        try:
            for k in itertools.count(start):
                if not running():
                    return
                put((make(k), None))
        except BaseException as error:  # raised again by the consumer, whatever it is
            put((None, error))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        worker.join()


# ---- blind batches: blurred by kernels that the network is not told --------------------------------------------------

def blind_kernels(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random anisotropic Gaussians, float32 (count, 1, size, size) on the generator's device, each with sum 1.

    "Setting 2" of DCLS (Luo et al., CVPR 2022), in HR pixels: deviations U(0.6, 5) along two axes at right angles,
    turned by U(-π, π); every weight is multiplied by 1 + U(0, 0.25). Size 31 goes with x4, 11 with x2.
    """
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=generator.device)

    sigma_a, sigma_b, angle = (uniform(low, high, 1, 1, 1) for low, high in ((0.6, 5), (0.6, 5), (-math.pi, math.pi)))
    grid = torch.arange(size, device=generator.device) - size // 2
    y, x = grid[:, None], grid
    a, b = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x  # along the two axes
    kernels = torch.exp(-((a / sigma_a) ** 2 + (b / sigma_b) ** 2) / 2) * uniform(1, 1.25, 1, size, size)
    return kernels / kernels.sum((2, 3), keepdim=True)


def blur(x: Tensor, kernels: Tensor) -> Tensor:
    """True convolution of x (N, C, H, W) with one kernel per image, (N, 1, k, k); mirrored at the border, which is not
    repeated: H, W > k // 2."""
    padded = F.pad(x, (kernels.shape[-1] // 2,) * 4, mode="reflect")
    return F.conv2d(padded.transpose(0, 1), kernels.flip(2, 3), groups=len(x)).transpose(0, 1)  # images as channels


def corrected_kernel(blurred: Tensor, clean: Tensor, size: int, epsilon: float = 1e-4) -> Tensor:
    """The kernel k with blurred = k * clean, which a blind network should find (DCLS' reformulated degradation).

    blurred, clean: LR images (N, 3, h, w), float and unrounded, h, w >= size, taken as periodic. Returns (N, 1, size,
    size) with sum 1: the mean of the three colours' quotients of spectra where their product is positive, less 3/4 of
    its 41st largest value; about 40 pixels hold the kernels of either scale.
    epsilon: added to |clean's spectrum|²; the release's 1e-20 yields a useless kernel for one photograph in a hundred.
    """
    spectrum = torch.fft.rfft2(clean)
    ratio = spectrum.conj() * torch.fft.rfft2(blurred) / (torch.view_as_real(spectrum).square().sum(-1) + epsilon)
    each = torch.fft.irfft2(ratio, clean.shape[2:]).roll((size // 2,) * 2, (2, 3))[..., :size, :size]  # (N, 3, k, k)
    k = torch.where(each.prod(1, keepdim=True) > 0, each.mean(1, keepdim=True), 0)
    k = (k - 0.75 * k.flatten(1).topk(41).values[:, -1].view(-1, 1, 1, 1)).clamp(0, 1)
    return k / (k.sum((2, 3), keepdim=True) + 1e-20)


@torch.no_grad()
def degrade(high: Tensor, scale: int, size: int, generator: torch.Generator, epsilon: float = 1e-4) -> dict:
    """A blind batch {1: low, scale: high, "kernel": k*} from originals (N, 3, H, W) in [0, 1], float, on any device.

    low: blurred by `blind_kernels` of `size`, reduced by `resize`, clamped and rounded to 8 bit, in [0, 1].
    k*: `corrected_kernel` of the LR images before rounding, (N, 1, size, size).
    Raises ValueError for images whose LR is smaller than the kernel or that are no multiple of the scale.
    """
    if min(high.shape[2:]) < size * scale or any(n % scale for n in high.shape[2:]):
        raise ValueError(f"cannot blur an image of {high.shape[3]}x{high.shape[2]} pixels for a blind x{scale}: its "
                         f"sides must be multiples of {scale} and at least {size * scale} ({size} LR pixels, the kernel)")
    kernels = blind_kernels(len(high), size, generator).to(high)
    blurred, clean = (resize(x, 1 / scale) for x in (blur(high, kernels), high))
    low = (blurred.clamp(0, 1) * 255).round() / 255
    return {1: low, scale: high, "kernel": corrected_kernel(blurred, clean, size, epsilon)}


def blind(batches: Iterator[dict[int, Tensor]], size: int, seed: int, start: int = 0,
          epsilon: float = 1e-4) -> Iterator[dict]:
    """The stream `batches`, which is at step `start`, with the LR images of every batch replaced by `degrade`.

    Step k depends on (seed, k, batch) alone. The work is done on the device of the batches; the random numbers are
    drawn on the CPU and so the same for every device.
    """
    with contextlib.closing(batches):
        for k, y in enumerate(batches, start):
            scale, mixed = max(y), np.random.default_rng((seed, k)).integers(1 << 32)  # torch's seeds have 32 bits
            yield degrade(y[scale], scale, size, torch.Generator().manual_seed(int(mixed)), epsilon)
