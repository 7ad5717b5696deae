"""Measures a network: how good it is on a folder of pictures, and what it costs.

    python evaluate.py --weights runs/drn_s_x4_p30/tune.pt              # eight built-in photographs
    python evaluate.py --weights DRNS4x.pt --arch drn_s --data Set5     # a released file
    python evaluate.py --bicubic --scale 4 --data Set5                  # 28.430 dB / 0.8111

PSNR and SSIM follow the protocol of the paper's tables (DRC, arXiv 2207.07929): luma only, `scale`
pixels cut off every side. MAdds (multiply-adds) are counted as in the same tables.

Nothing is trained or chosen here. To enlarge your own pictures: upscale.py. Read report.py next,
which measures the networks of a run.
"""
import quiet  # noqa: F401, first: what follows takes seconds to import

# isort: split

import argparse
import copy
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import data
import degradation
import kernels
import models
import own
from run import Bar, WrongUsage, command, filled, real
from tiles import check_image, estimate_kernel, upscale
from upscale import (
    add_how,
    add_network,
    check_network,
    kernel_picture,
    place,
)


# ---- how good: PSNR and SSIM of the luma --------------------------------------------------------
def luma(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float64 (H, W): Y of ITU-R BT.601, 16..235, not rounded.

    MATLAB's rgb2ycbcr, with which the published numbers were measured.
    """
    return 16 + image @ np.array([65.481, 128.553, 24.966]) / 255


def luma_pair(a: np.ndarray, b: np.ndarray, crop: int,
              least: int) -> tuple[np.ndarray, np.ndarray]:
    """The lumas of two pictures without `crop` pixels on every side; ValueError where that cannot
    be, or where fewer than `least` pixels remain.
    """
    check_image(a)
    check_image(b)
    if a.shape != b.shape:
        raise ValueError(f"images of {data.size(a)} and {data.size(b)} pixels cannot be compared: "
                         f"give two of the same size")
    height, width = a.shape[:2]
    if min(height, width) - 2 * crop < least:
        raise ValueError(f"an image of {data.size(a)} pixels is too small to compare: with {crop} "
                         f"pixels cut off every side, at least {least}x{least} must remain")
    inner = slice(crop, height - crop), slice(crop, width - crop)
    return luma(a[inner]), luma(b[inner])


def psnr_y(a: np.ndarray, b: np.ndarray, crop: int) -> float:
    """Peak signal-to-noise ratio of the luma in dB, peak 255; inf for identical pictures.

    a, b: uint8 (H, W, 3); `crop` pixels are left out on every side.
    ValueError: other arrays, sizes that differ, nothing left after the crop.
    """
    y, z = luma_pair(a, b, crop, least=1)
    error = np.mean((y - z) ** 2)
    if error == 0:
        return math.inf
    return 10 * math.log10(255 ** 2 / error)


def ssim_y(a: np.ndarray, b: np.ndarray, crop: int) -> float:
    """Structural similarity of the luma (Wang et al. 2004, eq. 13); 1.0 for identical pictures.

    Gaussian window 11×11 of sigma 1.5, C1 = (0.01·255)², C2 = (0.03·255)², population statistics,
    the mean over all places where the window fits. Arguments and errors as in `psnr_y`; 11×11
    pixels must remain after the crop.
    """
    y, z = luma_pair(a, b, crop, least=WINDOW)
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    mean_y = window_means(y)
    mean_z = window_means(z)
    product = mean_y * mean_z
    squares = mean_y ** 2 + mean_z ** 2
    covariance = window_means(y * z) - product
    variances = window_means(y * y + z * z) - squares      # var y + var z: only the sum is needed
    ratio = (2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))
    return float(np.mean(ratio))


WINDOW = 11                          # pixels, the side of SSIM's window
GAUSSIAN = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
GAUSSIAN /= GAUSSIAN.sum()


def window_means(x: np.ndarray) -> np.ndarray:
    """(H, W) -> (H − 10, W − 10): Gaussian means of 11×11 windows, down and then across."""
    windows = np.lib.stride_tricks.sliding_window_view
    down = windows(x, 11, 0) @ GAUSSIAN
    return windows(down, 11, 1) @ GAUSSIAN


# ---- what it costs ------------------------------------------------------------------------------
class Cost(NamedTuple):
    """What a network costs."""
    params: int
    madds: int                   # multiply-adds of one forward pass


def count(model: nn.Module, height: int, width: int) -> Cost:
    """Parameters, and MAdds for one LR input of height × width, as the papers' tables count them.

    That is convolutions, linear layers and attention products; in DRN also an addition for every
    output of a layer with a bias (`Backbone.madds_count_bias`). Give the network of `models.build`,
    not the folded copy of `models.inference`. Nothing is computed: the pass runs on PyTorch's meta
    device, where tensors have a shape and no content.
    """
    twin = copy.deepcopy(model).eval()
    formulas = {}
    if getattr(model, "madds_count_bias", False):
        formulas[torch.ops.aten.convolution] = flops_with_bias

    def madds(device: str) -> int:
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        with torch.no_grad(), counter:
            twin.to(device)(torch.zeros(1, 3, height, width, device=device))
        return counter.get_total_flops() // 2

    try:
        total = madds("meta")
    except (RuntimeError, NotImplementedError):
        if not getattr(model, "source", None):
            raise
        twin = copy.deepcopy(model).eval()   # of the user's own: its forward may need real numbers
        total = madds("cpu")
    params = sum(p.numel() for p in model.parameters())
    return Cost(params, total)


def count_with(model: nn.Module, widths: dict[str, int], kind: str) -> int:
    """What a network would cost with other widths; kind: "params", or "madds" for 96 × 96."""
    with torch.device("meta"):
        return getattr(count(model.with_widths(widths), 96, 96), kind)


def fixed_part(model: nn.Module, kind: str) -> float:
    """The part of a network's cost that belongs to no width that may be pruned, 0..1.

    The cost is a constant and a term for every width: what half of all the widths saves, saved
    twice, leaves the constant. Widths that are odd make it inexact by as little.
    kind: see `count_with`.
    """
    half = {pair.name: pair.heads * (pair.width // 2) for pair in model.pairs()}
    halved = count_with(model, half, kind)
    return max(0.0, 2 * halved / count_with(model, model.widths, kind) - 1)


def flops_with_bias(x, weight, bias, stride, padding, dilation, transposed, *_, out_shape=None,
                    **__) -> int:
    """FLOPs of a convolution, two for every multiply-add and for every bias that is added."""
    flops = conv_flop_count(x, weight, out_shape, transposed)
    if bias is not None:
        flops += 2 * math.prod(out_shape)
    return flops


# ---- a set of pictures --------------------------------------------------------------------------
class Row(NamedTuple):
    """One picture's result."""
    name: str
    psnr: float                  # dB
    ssim: float
    seconds: float               # of upscaling alone
    image: np.ndarray | None     # uint8 (H·s, W·s, 3); None where it was not kept
    kernel: np.ndarray | None = None         # float32 (k, k), estimated by a blind network


def evaluate(upscaler: nn.Module | Callable, pictures: data.Pictures,
             on_row: Callable[[Row], object] | None = None, **options) -> list[Row]:
    """Measures an upscaler on a set of pictures, one Row each.

    upscaler: a network, with `options` of `upscale.upscale` (in training mode it is replaced by
    its `models.inference` copy), or any function from uint8 low to high, such as
    `lambda low: data.imresize(low, 4)`. The original is cut to the size of low times the scale
    where it is larger, and `scale` pixels are cropped for the measures. on_row: takes each Row when
    it is measured; the rows that are returned then hold no images, which would fill the memory.
    ValueError names the picture.
    """
    model = upscaler if isinstance(upscaler, nn.Module) else None
    if model and model.training:
        model = models.inference(model)
    rows = []
    for i in Bar(range(len(pictures)), desc="evaluate", unit="picture", leave=False, delay=2):
        images = pictures[i].images
        scale, low = max(images), images[1]
        height, width = low.shape[:2]
        truth = images[scale][:height * scale, :width * scale]
        start = time.perf_counter()
        kernel = None
        if model:
            kernel = estimate_kernel(model, low)
            image = upscale(model, low, kernel=kernel, **options)
        else:
            image = upscaler(low)
        seconds = time.perf_counter() - start
        try:
            psnr = psnr_y(image, truth, scale)
            ssim = ssim_y(image, truth, scale)
        except ValueError as error:
            raise ValueError(f"{pictures.names[i]}: {error}") from error
        row = Row(pictures.names[i], psnr, ssim, seconds, image, kernel)
        if on_row:
            on_row(row)
            row = row._replace(image=None)
        rows.append(row)
    return rows


# ---- the command --------------------------------------------------------------------------------
def measure(args: argparse.Namespace, model: nn.Module | None, scale: int, using: str) -> None:
    """Prints PSNR-Y and SSIM of every picture beside bicubic's, and the costs of the network."""
    blind = getattr(model, "kernel_size", 0)
    if blind and args.degradation != "bicubic" and not args.data:
        raise WrongUsage(f"--degradation {args.degradation}: the built-in photographs are blurred "
                         f"for a blind network, leave it out or give --data DIR")
    if args.data:
        pictures = data.open_folder(args.data, (1, scale), degradation=args.degradation)
    else:
        pictures = data.photographs((1, scale), blind, args.degradation)
    keep = drop = lambda row: None
    if args.save:
        keep = partial(save, targets=save_targets(args, pictures.names, blind))
    tables = {}
    if model:
        fast = models.inference(model, args.precision, args.device, args.compile)
        tables[f"{model.arch} x{scale}"] = evaluate(
            fast, pictures, keep, tile=args.tile or 0, overlap=args.overlap,
            ensemble=args.self_ensemble)
    tables["bicubic"] = evaluate(partial(data.imresize, scale=scale), pictures,
                                 drop if model else keep)
    rows = next(iter(tables.values()))
    print_rows(tables, scale)
    if blind:
        print_kernels(args, pictures, rows, scale)
    if model:
        print_cost(model, scale)
        seconds = np.median([row.seconds for row in rows])
        where = place(args.device, args.precision, using)
        print(f"{seconds:.3f} s per picture (median) on {where}")


def print_kernels(args: argparse.Namespace, pictures: data.Pictures, rows: list[Row],
                  scale: int) -> None:
    """How far estimated blur kernels are off the true ones, where these are known: those of the
    built-in photographs, and of a folder laid out as DIV2KRK with gt_k_x4 in it.
    """
    folder = Path(args.data or "") / f"gt_k_x{scale}"
    if args.data and not folder.is_dir():
        return
    errors = []
    levels = []
    for i in Bar(range(len(rows)), "kernels", unit="picture", leave=False, delay=2):
        images, true = pictures[i]
        if args.data:
            number = data.number(Path(rows[i].name))
            kernel = degradation.read_kernel(folder / f"kernel_{number}.mat")
            low, off = degradation.blurred_by(images[scale], kernel, images[1])
            levels.append(off)
            size = len(rows[i].kernel)
            true = degradation.kernel_of_blurred(images[scale], low, scale, size)
        errors.append(np.abs(rows[i].kernel - true).mean())
    print(f"blur kernels: mean |k - k*| {np.mean(errors):.2e}")
    if levels:
        print(f"the files of {folder} make these pictures up to {np.mean(levels):.2f} grey levels, "
              f"the worst up to {max(levels):.2f}")


def print_rows(tables: dict[str, list[Row]], scale: int) -> None:
    """A line per picture, a column per upscaler, and the means."""
    names = [row.name for row in next(iter(tables.values()))]
    wide = max(len(name) for name in ["picture", *names])
    print(f"PSNR-Y in dB and SSIM, {scale} pixels cropped")
    print(f"{'picture':{wide}}", *(f"{title:>17}" for title in tables))
    for name, *entries in zip(names, *tables.values()):
        print(f"{name:{wide}}", *(f"{row.psnr:9.3f} {row.ssim:.5f}" for row in entries))
    means = []
    for rows in tables.values():
        psnr = np.mean([row.psnr for row in rows])
        ssim = np.mean([row.ssim for row in rows])
        means.append(f"{psnr:9.3f} {ssim:.5f}")
    print(f"{'mean':{wide}}", *means)


def print_cost(model: nn.Module, scale: int) -> None:
    """Parameters and MAdds, at the two input sizes that tables use."""
    small = count(model, 96, 96)
    large = count(model, math.ceil(720 / scale), math.ceil(1280 / scale))
    print(f"{small.params:,} parameters; MAdds {small.madds / 1e9:.2f} G for a 96x96 LR input, "
          f"{large.madds / 1e9:.2f} G for a 1280x720 output")


class Target(NamedTuple):
    """Where the results of one picture go."""
    image: Path
    kernel: Path


def save_targets(args: argparse.Namespace, names: list[str], blind: int) -> dict[str, Target]:
    """{name of a picture: its Target} for --save, with the folders made.

    WrongUsage: something would be overwritten, or become a picture of --data.
    """
    folder = Path(args.save)
    if args.data and real(args.data) in (real(folder), *real(folder).parents):
        raise WrongUsage(f"--save {folder} lies in --data {args.data}: its pictures would be "
                         f"overwritten or become more, give another folder")
    targets = {}
    taken = {}
    for name in names:
        file = folder / (name if name.endswith(".png") else f"{name}.png")
        targets[name] = Target(file, file.with_name(f"{file.stem}_kernel.png"))
        for path in targets[name] if blind else (file,):
            if path in taken:
                raise WrongUsage(f"{taken[path]} and {name} would both be written to {path}: "
                                 f"rename one")
            if path.exists() and not args.force:
                raise WrongUsage(f"{path} exists already: give another --save, or --force to "
                                 f"overwrite it")
            taken[path] = name
    for target in targets.values():
        target.image.parent.mkdir(parents=True, exist_ok=True)
    return targets


def save(row: Row, targets: dict[str, Target]) -> None:
    """Writes an enlarged picture, and the estimated kernel, as PNG."""
    data.write_image(targets[row.name].image, row.image)
    if row.kernel is not None:
        data.write_image(targets[row.name].kernel, kernel_picture(row.kernel))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(
        description="Measure a network on a folder of pictures.", allow_abbrev=False,
        epilog="To enlarge your own pictures: python upscale.py photo.jpg --weights FILE")
    add_network(parser)
    add = parser.add_argument_group("pictures").add_argument
    add("--data", type=filled, metavar="DIR", help="a folder of pictures (default: eight built-in "
        "photographs, for dcls blurred)")
    add("--degradation", choices=data.KINDS, default="bicubic",
        help="how small images are made of originals (default bicubic)")
    add("--save", type=filled, metavar="DIR",
        help="write the enlarged pictures, and estimated kernels, as PNG")
    add("--force", action="store_true", help="overwrite results that exist")
    add_how(parser, "0: none (default 0)")
    args = parser.parse_args(argv)
    check_network(parser, args)
    if not args.weights and not args.bicubic:
        parser.error("give --weights FILE, or --bicubic for no network")
    return args


def main() -> None:
    args = parse_args()
    using = kernels.choose(args.kernels)
    if args.bicubic:
        measure(args, None, args.scale, using)
        return
    model = models.load(args.weights, args.arch, args.scale, args.channels, own.given(args))
    measure(args, model, model.scale, using)


if __name__ == "__main__":
    command(main)
