"""How good a network is, what it costs, and what it makes of your own picture.

    python evaluate.py --weights DRNS4x.pt --arch drn_s --data Set5     # a released file; --channels for a pruned one
    python evaluate.py --weights runs/mine/last.pt                      # our checkpoints know their arch and scale
    python evaluate.py --weights runs/mine/last.pt --input photo.jpg --output big.png
    python evaluate.py --weights dcls.pt --input photo.jpg --output big.png --kernel blur.png    # blind: what blurred it

PSNR and SSIM follow the protocol of the paper's tables (DRC, arXiv 2207.07929): luma only, `scale` pixels cut off every
side; MAdds are counted as in the same tables. Nothing is trained or chosen here, and no learned measure is computed.
Read train.py next, which calls `evaluate` after every stage, or data.py for where the pictures come from.
"""
import argparse
import copy
import itertools
import json
import math
import pickle
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from tqdm import tqdm

import data
import kernels
import models

OVERLAP = 32                     # LR pixels of context around a tile: beyond it, trained networks hardly look
ALIGN = 32                       # tiles start at multiples of it: the windows of every transformer here divide it
AUTO_TILE, AUTO_PIXELS = 384, 500_000          # --input of more LR pixels than this is worked on in tiles
FORMATS = {".png": (True, 2**31), ".tif": (True, 2**31), ".tiff": (True, 2**31), ".webp": (True, 16383),
           ".bmp": (False, 2**15), ".jpg": (False, 65500), ".jpeg": (False, 65500)}     # (keeps alpha, longest side)


# ---- how good: PSNR and SSIM of the luma
GAUSSIAN = np.exp(-np.arange(-5, 6) ** 2 / (2 * 1.5 ** 2))
GAUSSIAN /= GAUSSIAN.sum()


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> float64 (H, W): Y of ITU-R BT.601 in 16..235, not rounded, as in MATLAB's rgb2ycbcr."""
    return 16 + image @ np.array([65.481, 128.553, 24.966]) / 255


def luma_pair(a: np.ndarray, b: np.ndarray, crop: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    for image in (a, b):
        check_image(image)
    if a.shape != b.shape:
        raise ValueError(f"images of {size(a)} and {size(b)} pixels cannot be compared: give two of the same size")
    if min(a.shape[:2]) - 2 * crop < least:
        raise ValueError(f"an image of {size(a)} pixels is too small to compare: with {crop} pixels cut off every "
                         f"side, at least {least}x{least} must remain")
    inner = slice(crop, a.shape[0] - crop), slice(crop, a.shape[1] - crop)
    return luma(a[inner]), luma(b[inner])


def size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def check_image(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be a uint8 array of shape (H, W, 3), this is {image.dtype} {image.shape}")


def psnr_y(a: np.ndarray, b: np.ndarray, crop: int) -> float:
    """Peak signal-to-noise ratio of the luma in dB, peak 255 (inf for identical images).

    a, b: uint8 (H, W, 3); `crop` pixels are left out on every side. ValueError: other arrays, sizes that differ,
    nothing left after the crop."""
    y, z = luma_pair(a, b, crop, least=1)
    error = np.mean((y - z) ** 2)
    return 10 * math.log10(255 ** 2 / error) if error else math.inf


def ssim_y(a: np.ndarray, b: np.ndarray, crop: int) -> float:
    """Structural similarity of the luma (Wang et al. 2004, Eq. 13; 1.0 for identical images): 11×11 Gaussian window of
    sigma 1.5, C1 = (0.01·255)², C2 = (0.03·255)², population statistics, mean over the places where the window fits.

    Arguments and errors as in `psnr_y`; 11×11 pixels must remain after the crop."""
    y, z = luma_pair(a, b, crop, least=11)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_y, mean_z = blur(y), blur(z)
    product, squares = mean_y * mean_z, mean_y ** 2 + mean_z ** 2
    covariance = blur(y * z) - product
    variances = blur(y * y + z * z) - squares                # var y + var z: only their sum is needed, one blur less
    return float(np.mean((2 * product + c1) * (2 * covariance + c2) / ((squares + c1) * (variances + c2))))


def blur(x: np.ndarray) -> np.ndarray:
    """(H, W) -> (H - 10, W - 10): the Gaussian window, down and then across. As fast as it gets without a compiler."""
    windows = np.lib.stride_tricks.sliding_window_view
    return windows(windows(x, 11, 0) @ GAUSSIAN, 11, 1) @ GAUSSIAN


# ---- what it costs
class Cost(NamedTuple):
    params: int
    madds: int                   # multiply-adds of one forward pass


def count(model: nn.Module, height: int, width: int) -> Cost:
    """Parameters, and MAdds for one LR input of height × width, as the papers' tables count them: convolutions, linear
    layers and attention products, plus one addition per bias and output element where `model.madds_count_bias` (DRN).

    Give the network of `models.build`, not its folded `models.inference` copy. Nothing is computed (meta device)."""
    twin = copy.deepcopy(model).eval().to("meta")

    def with_bias(x, weight, bias, stride, padding, dilation, transposed, *_, out_shape=None, **__) -> int:
        return conv_flop_count(x, weight, out_shape, transposed) + 2 * math.prod(out_shape) * (bias is not None)

    formulas = {torch.ops.aten.convolution: with_bias} if getattr(model, "madds_count_bias", False) else {}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), counter:
        twin(torch.empty(1, 3, height, width, device="meta"))
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


# ---- upscaling one picture
def upscale(model: nn.Module, low: np.ndarray, tile: int = 0, overlap: int = OVERLAP, ensemble: bool = False,
            kernel: np.ndarray | None = None) -> np.ndarray:
    """low: uint8 (H, W, 3), any size from 1×1 -> uint8 (H·s, W·s, 3), clamped and rounded to nearest. `model` runs as
    it is, on its own device; for speed give `models.inference(model)`.

    tile: 0 for the whole picture at once, or the largest side of a tile in LR pixels; memory is then bounded by the
      tile, only the result is full-size. A tile sees `overlap` LR pixels of its neighbours, whose result is cut away
      again: the whole is the untiled one where `overlap` covers the receptive field. Networks that pool over the whole
      image (channel attention in DRN and DCLS) differ slightly; tests/test_evaluate.py measures how much.
    ensemble: mean of the eight flips and rotations, in float before rounding (EDSR, Lim et al. 2017, Section 3.4).
    kernel: for a blind network, the blur kernel (k, k) of the picture; default: its own estimate, one for all tiles.
    ValueError: another array, a tile without room for its overlap. FloatingPointError: the network gave nan or inf."""
    check_image(low)
    if tile and tile < smallest_tile(overlap):
        raise ValueError(f"tile {tile} is too small for an overlap of {overlap}: give at least "
                         f"{smallest_tile(overlap)}, or 0 for the whole picture")
    kernel = estimate_kernel(model, low) if kernel is None else kernel
    (height, width), s = low.shape[:2], model.scale
    rows, tile_height = tile_starts(height, tile or height, overlap)
    columns, tile_width = tile_starts(width, tile or width, overlap)
    high = np.empty((height * s, width * s, 3), np.uint8)
    tiles = list(itertools.product(rows, columns))
    for top, left in tqdm(tiles, desc="tiles", unit="tile", leave=False, delay=2, disable=len(tiles) == 1):
        part = forward(model, low[top:top + tile_height, left:left + tile_width], ensemble, kernel)
        y, x = top and top + overlap, left and left + overlap       # the next tile writes over the other end's context
        high[y * s:(top + tile_height) * s, x * s:(left + tile_width) * s] = part[(y - top) * s:, (x - left) * s:]
    return high


def smallest_tile(overlap: int) -> int:
    return 2 * overlap + 2 * ALIGN


def tile_starts(length: int, tile: int, overlap: int) -> tuple[list[int], int]:
    """Where the tiles of one side begin, and their common size <= tile: as few as possible, then as small as possible.

    Starts are multiples of ALIGN, the last tile ends with the picture, neighbours share at least 2·overlap pixels."""
    if length <= tile:
        return [0], length
    inner = (length - 2 * overlap) // ALIGN
    for number in itertools.count(2):
        quotient, rest = divmod(inner, number)
        last = quotient * (number - 1) + max(rest - 1, 0)           # start of the last tile, in units of ALIGN
        side = length - last * ALIGN
        if side <= tile:
            return [last * i // (number - 1) * ALIGN for i in range(number)], side


def to_input(model: nn.Module, low: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) -> (1, 3, H, W) in 0..1 on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.from_numpy(np.array(low)).to(device).permute(2, 0, 1)[None].float() / 255


@torch.inference_mode()
def estimate_kernel(model: nn.Module, low: np.ndarray) -> np.ndarray | None:
    """The blur kernel that a blind network sees in low, uint8 (H, W, 3): float32 (k, k), in LR pixels, sum 1; None from
    a network that is not blind. A picture has one blur, and a tile of sky does not show it: the kernel is estimated
    once, of the whole picture, or of its centre where it has more than AUTO_PIXELS pixels, which bounds memory."""
    if not hasattr(model, "estimate"):
        return None
    side = math.isqrt(AUTO_PIXELS)
    if low.shape[0] * low.shape[1] > AUTO_PIXELS:
        top, left = (max(0, n - side) // 2 for n in low.shape[:2])
        low = low[top:top + side, left:left + side]
    return model.estimate(to_input(model, low))[0, 0].float().cpu().numpy()


@torch.inference_mode()
def forward(model: nn.Module, low: np.ndarray, ensemble: bool, kernel: np.ndarray | None) -> np.ndarray:
    """uint8 (H, W, 3) -> uint8 (H·s, W·s, 3)."""
    inputs = [to_input(model, low)]
    if kernel is not None:
        inputs.append(torch.from_numpy(kernel).to(inputs[0])[None, None])                 # (1, 1, k, k)
    turns = [(k, flip) for k in range(4) for flip in (False, True)] if ensemble else [(0, False)]
    total = 0
    for k, flip in turns:
        turned = [torch.rot90(x.flip(3) if flip else x, k, (2, 3)) for x in inputs]       # the blur turns, too
        image = torch.rot90(model(*turned).images[model.scale], -k, (2, 3))
        total = total + (image.flip(3) if flip else image)
    image = total / len(turns)
    if not image.isfinite().all():
        raise FloatingPointError("the network's output is not finite: its weights are damaged, train it again")
    return (image[0] * 255).round_().clamp_(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def kernel_picture(kernel: np.ndarray, zoom: int = 8) -> np.ndarray:
    """float (k, k) -> uint8 (zoom·k, zoom·k): grey, the largest entry white, every entry a square."""
    grey = (255 * (kernel / kernel.max()).clip(0, 1)).round().astype(np.uint8)
    return grey.repeat(zoom, 0).repeat(zoom, 1)


# ---- evaluating a set of pictures
class Row(NamedTuple):
    name: str
    psnr: float
    ssim: float
    seconds: float               # of upscaling alone
    image: np.ndarray            # uint8 (H·s, W·s, 3)
    kernel: np.ndarray | None = None       # float32 (k, k), estimated by a blind network


def evaluate(upscaler: nn.Module | Callable, pictures, **options) -> list[Row]:
    """One Row for every picture of a data.Pictures. A picture is {1: low, ..., s: high}: the largest scale is the
    truth, cut to low's size × s where it is larger; `s` pixels are cropped for the measures.

    upscaler: a network, with `options` of `upscale` (one in training mode is replaced by its `models.inference` copy),
      or any function low -> high, such as `lambda low: data.imresize(low, 4)`. ValueError names the picture."""
    model, rows = None, []
    if isinstance(upscaler, nn.Module):
        model = models.inference(upscaler) if upscaler.training else upscaler
    for i in tqdm(range(len(pictures)), desc="evaluate", unit="picture", leave=False, delay=2):
        picture, name = pictures[i], pictures.names[i]
        scale, low = max(s for s in picture if s != "kernel"), picture[1]
        truth = picture[scale][:low.shape[0] * scale, :low.shape[1] * scale]
        start = time.perf_counter()
        kernel = model and estimate_kernel(model, low)
        image = upscale(model, low, kernel=kernel, **options) if model else upscaler(low)
        seconds = time.perf_counter() - start
        try:
            rows.append(Row(name, psnr_y(image, truth, scale), ssim_y(image, truth, scale), seconds, image, kernel))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return rows


# ---- files
def read_checkpoint(path: str | Path, kind: type = dict) -> dict | list:
    """The dict (or list: official duals) in a file of torch.save, on the CPU. Only tensors and plain containers are
    unpickled (weights_only). ValueError names a file that is missing, damaged or anything else."""
    try:
        with warnings.catch_warnings(action="ignore"):           # of old pickle protocols: not the user's concern
            state = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the path of a checkpoint") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"refused: {path} is not a plain state dict; nothing in it was executed") from error
    except Exception as error:           # torch.load on garbage raises whatever its parser stumbles over
        raise ValueError(f"{path} is damaged or no checkpoint at all: copy or download it again") from error
    if not isinstance(state, kind):
        raise ValueError(f"refused: {path} holds a {type(state).__name__}, not the {kind.__name__} of weights expected here")
    return state


def read_channels(path: str | Path, count: int) -> list[int]:
    """Channel numbers of a pruned network, one per prunable width: the authors' text file with an integer per line
    (blank lines are skipped) or the channels.json of train.py.
    ValueError: another number of entries than `count`, an entry that is no positive integer."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        entries = [str(n) for n in json.loads(text)["widths"].values()] if text.lstrip().startswith("{") else text.splitlines()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is neither a list of integers nor a channels.json of train.py") from error
    channels = []
    for number, entry in enumerate(map(str.strip, entries), 1):
        if entry:
            if not (entry.isascii() and entry.isdigit() and int(entry)):
                raise ValueError(f"{path}, entry {number}: {entry[:40]!r} is no positive integer")
            channels.append(int(entry))
    if len(channels) != count:
        raise ValueError(f"{path} has {len(channels)} channel numbers, this network needs {count}: one for every "
                         f"prunable width")
    return channels


def load_model(path: str | Path, arch: str | None = None, scale: int | None = None,
               channels: str | Path | None = None) -> nn.Module:
    """The network alone of `load_networks`."""
    return load_networks(path, arch, scale, channels)[0]


def load_networks(path: str | Path, arch: str | None = None, scale: int | None = None,
                  channels: str | Path | None = None) -> tuple[nn.Module, list[dict] | None]:
    """A network with the weights of `path`: one of our checkpoints, which rebuilds itself, or an official file, which
    needs `arch`, `scale` (4 when not given) and, for a pruned one, `channels`, the path of its channel file. And the
    state dicts of the duals in the same file, None where there are none.

    On the CPU, in training mode. ValueError: the file is of another arch or scale than given, or does not fit the
    network; see also read_checkpoint, read_channels."""
    state = read_checkpoint(path)
    widths = duals = None
    if {"arch", "scale", "widths", "model"} <= state.keys():
        for flag, given in (("arch", arch), ("scale", scale)):
            if given is not None and given != state[flag]:
                raise ValueError(f"{path} holds {flag} {state[flag]}, --{flag} {given} was given: leave --{flag} out")
        if channels is not None:
            raise ValueError(f"{path} knows its own channel numbers: leave --channels out")
        duals = state.get("duals")
        arch, scale, widths, state = (state[key] for key in ("arch", "scale", "widths", "model"))
    elif arch is None:
        raise ValueError(f"{path} does not say what network it is: give --arch ({', '.join(models.ARCHS)}) and --scale")
    scale = scale or 4
    if channels is not None:
        with torch.device("meta"):
            widths = read_channels(channels, len(models.build(arch, scale).widths))
    try:
        model = models.build(arch, scale, widths)
        official = models.load_state(model, state)
    except ValueError as error:
        raise ValueError(f"{path}{f' with {channels}' if channels else ''}: {error}") from error
    return model, duals or official and [official]


# ---- the command
def settings(args: argparse.Namespace, tile: int) -> dict:
    """What the flags say to `upscale`."""
    return dict(tile=tile, overlap=args.overlap, ensemble=args.self_ensemble)


def place(args: argparse.Namespace) -> str:
    name, precision = str(args.device), args.precision
    if args.device.type == "cuda":
        name = torch.cuda.get_device_name(args.device)
    elif precision == "bf16" and not cpu_has_bf16():
        precision = "bf16 (emulated: this CPU has no bfloat16 instructions, float32 is faster)"
    return f"{name}, {precision}, {args.kernels}"


def cpu_has_bf16() -> bool:
    known = getattr(torch.cpu, "get_capabilities", dict)()             # since torch 2.12
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def report(args: argparse.Namespace, model: nn.Module | None, scale: int) -> None:
    """Prints PSNR-Y and SSIM of every picture beside bicubic's, their means and the costs; writes them for --save."""
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)                # a bad folder fails now, not after the work
    blind = getattr(model, "kernel_size", 0)
    pictures = data.open_folder(args.data, (1, scale)) if args.data else data.photographs((1, scale), blind)
    tables = {}
    if model:
        fast = models.inference(model, args.precision).to(args.device)
        tables[f"{model.arch} x{scale}"] = evaluate(fast, pictures, **settings(args, args.tile or 0))
    tables["bicubic"] = evaluate(partial(data.imresize, scale=scale), pictures)
    rows = next(iter(tables.values()))
    wide = max(map(len, ["picture", *pictures.names]))
    print(f"PSNR-Y in dB and SSIM, {scale} pixels cropped\n{'picture':{wide}}", *(f"{title:>17}" for title in tables))
    for name, *entries in zip(pictures.names, *tables.values()):
        print(f"{name:{wide}}", *(f"{row.psnr:9.3f} {row.ssim:.5f}" for row in entries))
    means = [(np.mean([row.psnr for row in table]), np.mean([row.ssim for row in table])) for table in tables.values()]
    print(f"{'mean':{wide}}", *(f"{psnr:9.3f} {ssim:.5f}" for psnr, ssim in means))
    for row in rows if args.save else ():
        file = Path(args.save, row.name if row.name.endswith(".png") else row.name + ".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        data.write_image(file, row.image)
        if row.kernel is not None:
            data.write_image(file.with_name(f"{file.stem}_kernel.png"), kernel_picture(row.kernel))
    if blind and not args.data:
        errors = [np.abs(row.kernel - pictures[i]["kernel"]).mean() for i, row in enumerate(rows)]
        print(f"blur kernels: mean |k - k*| {np.mean(errors):.2e}")
    if model:
        small, large = count(model, 96, 96), count(model, math.ceil(720 / scale), math.ceil(1280 / scale))
        print(f"{small.params:,} parameters; MAdds {small.madds / 1e9:.2f} G for a 96x96 LR input, "
              f"{large.madds / 1e9:.2f} G for a 1280x720 output")
        print(f"{np.median([row.seconds for row in rows]):.3f} s per picture (median) on {place(args)}")


def enlarge(args: argparse.Namespace, model: nn.Module | None, scale: int) -> None:
    """Upscales args.input, of any mode and orientation, into args.output; grey stays grey, alpha is made by bicubic."""
    if args.kernel and not hasattr(model, "estimate"):
        raise ValueError(f"--kernel {args.kernel}: only a blind network (dcls) estimates a kernel, leave it out")
    low, alpha, grey = data.decode(args.input)
    alpha = check_output(args, low, alpha, scale)
    if sixteen_bit(args.input):
        print(f"note: {args.input} has 16 bits per channel, the result has 8")
    tile = args.tile or 0
    if args.tile is None and model and low.shape[0] * low.shape[1] > AUTO_PIXELS:
        tile = AUTO_TILE
        print(f"note: {size(low)} pixels are worked on in tiles of at most {tile} (--tile 0: all at once)")
    start = time.perf_counter()
    if model:
        fast = models.inference(model, args.precision).to(args.device)
        kernel = estimate_kernel(fast, low)
        high = upscale(fast, low, kernel=kernel, **settings(args, tile))
    else:
        high = data.imresize(low, scale)
    if grey:
        high = np.asarray(Image.fromarray(high).convert("L"))
    if alpha is not None:
        high = np.dstack((high, data.imresize(alpha, scale)))             # (H·s, W·s, 2 or 4)
    data.write_image(args.output, high)
    if args.kernel:
        data.write_image(args.kernel, kernel_picture(kernel))
    how = f"{model.arch} x{scale} on {place(args)}" if model else f"bicubic x{scale}"
    print(f"{args.output}: {size(low)} -> {size(high)} by {how}, {time.perf_counter() - start:.1f} s")


def check_output(args: argparse.Namespace, low: np.ndarray, alpha: np.ndarray | None, scale: int) -> np.ndarray | None:
    """Refuses, before the work, what args.output could not hold. Returns alpha, or None where it is opaque everywhere
    and the format has none: nothing is lost then. Else it is refused, for what is hidden beneath it would show."""
    keeps_alpha, longest = FORMATS[Path(args.output).suffix.lower()]
    for file in filter(None, (args.output, args.kernel)):
        if not Path(file).resolve().parent.is_dir():
            raise ValueError(f"{file}: its folder does not exist, create it first")
    if max(low.shape[:2]) * scale > longest:
        raise ValueError(f"{args.output}: its format holds {longest} pixels a side, {size(low)} times {scale} is more: "
                         f"use .png")
    if keeps_alpha or alpha is None:
        return alpha
    if alpha.min() < 255:
        raise ValueError(f"{args.input} has transparent parts, {args.output} cannot hold them: use .png, .webp or .tif")
    return None


def sixteen_bit(path: str) -> bool:
    """Whether Pillow reads the file from samples of 16 bits; of colour it keeps the upper 8 without a word."""
    with Image.open(path) as image:
        return image.mode.startswith("I") or any("16" in str(part[3]) for part in image.tile)


def at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {least}")
        return int(text)
    return integer


def usable_device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:      # AssertionError: this PyTorch is built without CUDA
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: try cpu") from error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a network or upscale a picture.", allow_abbrev=False)
    add = parser.add_argument_group("network").add_argument
    add("--weights", metavar="FILE", help="a checkpoint of train.py or an official file")
    add("--arch", choices=models.ARCHS, help="network of an official file")
    add("--scale", type=at_least(2), help="scale of an official file (default 4) or of --bicubic")
    add("--channels", metavar="FILE", help="channel numbers of an official pruned file, one integer per line")
    add("--bicubic", action="store_true", help="no network: MATLAB's bicubic alone")
    add = parser.add_argument_group("pictures").add_argument
    add("--data", metavar="DIR",
        help="evaluate on a folder of pictures (default: eight built-in photographs, for dcls blurred)")
    add("--save", metavar="DIR", help="write the upscaled pictures of the evaluation, and estimated kernels, as PNG")
    add("--input", metavar="FILE", help="upscale this picture instead of evaluating")
    add("--output", metavar="FILE", help="result of --input: " + " ".join(FORMATS))
    add("--kernel", metavar="FILE.png", help="write the blur kernel that a blind network (dcls) finds in --input")
    add = parser.add_argument_group("how").add_argument
    add("--self-ensemble", action="store_true", help="mean of eight flips and rotations: better, 8 times slower")
    add("--tile", type=at_least(0), metavar="N",
        help=f"largest tile in LR pixels, 0: none (default: 0; {AUTO_TILE} for --input of over {AUTO_PIXELS:,} pixels)")
    add("--overlap", type=at_least(0), default=OVERLAP, metavar="N",
        help="context around a tile in LR pixels (default %(default)s)")
    add("--precision", choices=("float32", "bf16"), default="float32")
    add("--kernels", choices=("torch", "triton"), help="default: triton where there is a GPU and Triton")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    problems = {
        f"--arch {args.arch} without --weights would run random weights: give --weights FILE, or --bicubic":
            args.arch and not args.weights and not args.bicubic,
        "give --weights FILE, or --bicubic for no network": not args.arch and not args.weights and not args.bicubic,
        "--weights and --bicubic exclude each other": args.weights and args.bicubic,
        "--bicubic needs --scale": args.bicubic and not args.scale,
        "--input and --data exclude each other": args.input and args.data,
        "--save is for evaluations: --output names the result of --input": args.input and args.save,
        "--input and --output need each other": bool(args.input) != bool(args.output),
        "--kernel belongs to --input": args.kernel and not args.input,
        f"--kernel {args.kernel}: use a name with .png": args.kernel and not args.kernel.lower().endswith(".png"),
        f"--output {args.output}: unknown extension, use one of {' '.join(FORMATS)}":
            args.output and Path(args.output).suffix.lower() not in FORMATS,
        f"--overlap {args.overlap} needs --tile 0 or a tile of at least {smallest_tile(args.overlap)}":
            args.tile != 0 and (args.tile or AUTO_TILE) < smallest_tile(args.overlap),
    }
    for sentence in (text for text, wrong in problems.items() if wrong):
        parser.error(sentence)
    return args


def main() -> None:
    args = parse_args()
    args.kernels = kernels.choose(args.kernels)
    model = None if args.bicubic else load_model(args.weights, args.arch, args.scale, args.channels)
    (enlarge if args.input else report)(args, model, model.scale if model else args.scale)


def run(main: Callable[[], None]) -> None:
    """Calls main(). For what a user can put right, one sentence on stderr and exit code 1 (`python -X dev` shows the
    traceback too); 130 after ctrl-C. Everything else is a bug and keeps its traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not full:
            raise
        if sys.flags.dev_mode:
            traceback.print_exc()
        sentence = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        print("error:", "out of memory: use smaller tiles, patches or batches" if full else sentence, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
