"""How much memory does it take to enlarge a big picture?

    python -m bench.memory 6000x4000 --bicubic --scale 4
    python -m bench.memory 4000x3000 --alpha --weights W --arch dat_light --device cpu

Draws a picture of this size, runs upscale.py on it in another process, and prints the largest
amount of memory that this process held (its peak resident set, with Python and PyTorch), the time,
and the size of the file. All flags behind the size are upscale.py's, but for --alpha (the picture
has transparency) and --stand-in: in place of a network a single convolution with a shuffle, ×4,
cheap enough to try the way from the tiles to the file at full size.
"""
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import upscale
from backbones.base import SR, conv
from run import WrongUsage, command


class StandIn(nn.Module):
    """3×3 convolution and pixel shuffle, ×4, with small random weights."""
    arch = "stand-in"
    scale = 4

    def __init__(self):
        super().__init__()
        self.enlarge = nn.Sequential(conv(3, 48), nn.PixelShuffle(4))

    @torch.no_grad()
    def forward(self, low):
        return SR({4: self.enlarge(low)})


def draw(path: Path, width: int, height: int, alpha: bool) -> None:
    """Writes a JPEG, or with alpha a PNG, of waves and noise: as hard to pack as a photograph."""
    random = np.random.default_rng(0)
    y = np.sin(np.arange(height) / 97)[:, None, None]
    x = np.sin(np.arange(width)[:, None] / np.array([31, 53, 71]))
    image = np.empty((height, width, 3 + alpha), np.uint8)
    image[..., 3:] = 128
    for top in range(0, height, 256):                # by strips: this process should stay small
        rows = slice(top, top + 256)
        noise = random.normal(0, 4, (len(y[rows]), width, 1))
        image[rows, :, :3] = 128 + 60 * y[rows] + 60 * x + noise
    Image.fromarray(image).save(path)


def main() -> None:
    size, *flags = sys.argv[1:] or [""]
    if size == "--help":
        print(__doc__)
        upscale.main()                   # prints its flags, and ends
    if not re.fullmatch(r"child|\d+x\d+", size):
        raise WrongUsage("give a size, such as 4000x3000, and the flags of upscale.py")
    if size == "child":
        sys.argv[1:] = flags
        if "--stand-in" in flags:
            sys.argv.remove("--stand-in")
            sys.argv += ["--weights", "none"]
            upscale.load = lambda args: (StandIn(), None, "cpu")
        upscale.main()
        return
    width, height = map(int, size.split("x"))
    alpha = "--alpha" in flags
    flags = [flag for flag in flags if flag != "--alpha"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / ("picture.png" if alpha else "picture.jpg")
        target = Path(folder) / "large.png"
        draw(source, width, height, alpha)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bench.memory", "child", str(source), "--output",
                        str(target), *flags], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024     # Linux: kB
        print(f"{size} {' '.join(flags)}: {peak / 2**30:.2f} GiB at most, {seconds:.0f} s, "
              f"{target.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    command(main)
