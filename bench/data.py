"""How many training patches a second does the data give, and what would decoding them each time?

    python -m bench.data                         # two minutes, 1 GB of the temporary folder

60 PNGs of 2040×1356 pixels, like DIV2K's, with their reductions to a quarter, and batches of 16
augmented patches of 192×192 with theirs of 48×48:

    (a) every sample decodes its picture, in the worker processes of torch's DataLoader, as BasicSR
        does: the whole file for a small part of it
    (b) our loader without a cache, and with memory for 7 of the 60 pictures
    (c) our loader and the cache (cache.py), which is made first: its time is told

Batches go to pinned memory where there is a GPU. The ways take turns, so that what else the machine
does hits all of them; the CPU time of a patch depends on it less. Of (c) it also tells how much
memory the process has gained that is not the system's file cache.
"""
import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import data
import gather
from leaves import noise
from run import command, progress

HEIGHT = 1356
WIDTH = 2040
SCALES = (1, 4)
PATCH = 192                      # pixels of the original
BATCH = 16
SMALL = 64 << 20                 # bytes of decoded pictures that (b) keeps in memory


def draw(root: Path, count: int) -> None:
    """Writes noise with the spectrum of photographs on squares of different colours."""
    rng = np.random.default_rng(0)
    texture = np.stack([noise(rng, 2 * WIDTH, 1.0)[:, :WIDTH] for _ in range(3)], -1)
    texture = (16 * texture).astype(np.int16)
    for folder in ("HR", "LR_bicubic/X4"):
        (root / folder).mkdir(parents=True, exist_ok=True)

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        top = rng.integers(len(texture) - HEIGHT)
        squares = rng.integers(40, 216, (HEIGHT // 113 + 1, WIDTH // 113 + 1, 3), np.int16)
        ground = squares.repeat(113, 0).repeat(113, 1)[:HEIGHT, :WIDTH]
        high = (ground + texture[top:top + HEIGHT]).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(high)
        image.save(root / "HR" / f"{i:04d}.png", compress_level=1)
        image.reduce(4).save(root / "LR_bicubic/X4" / f"{i:04d}x4.png", compress_level=1)

    with progress("draw", count, unit="picture") as bar:
        for _ in data.ahead(write, range(count)):
            bar.update()


class DecodePerSample(Dataset):
    """Sample i: a random patch of a picture that is decoded for it, as BasicSR does."""
    def __init__(self, root: Path):
        self.pictures = data.open_folder(root, SCALES, limit=0)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> dict[int, torch.Tensor]:
        rng = np.random.default_rng(i)
        crop = data.random_crop(self.pictures, PATCH // 4, rng)
        return {s: data.to_tensor([square])[0] for s, square in crop.items()}


def per_sample(root: Path, pin: bool, workers: int) -> Iterator:
    """(a): endless batches."""
    loader = DataLoader(DecodePerSample(root), BATCH, num_workers=workers, pin_memory=pin)
    yield from loader


def rate(stream: Iterator, seconds: float) -> tuple[float, float]:
    """(patches a second, milliseconds of CPU time for each) of a stream, over so many seconds."""
    next(stream)                     # the workers start
    start = time.perf_counter()
    used = time.process_time()
    for count in itertools.count(1):
        next(stream)
        passed = time.perf_counter() - start
        if passed > seconds:
            return count * BATCH / passed, 1e3 * (time.process_time() - used) / count / BATCH


def own_memory() -> int:
    """Bytes of this process that are no pages of files (Linux), else 0."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(ways: dict, rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """{way: (rounds, 2) of what `rate` says}, in turns."""
    rates = {way: [] for way in ways}
    for _ in range(rounds):
        for way, make in ways.items():
            with closing(make()) as stream:
                rates[way].append(rate(stream, seconds))
    return {way: np.array(each) for way, each in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="pictures (default 60)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="for each way in a round")
    args = parser.parse_args()
    pin = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root / "set", args.count)
        wishes = gather.Wishes(PATCH, 0, root / "cache", False)
        start = time.perf_counter()
        cached = gather.training_pictures(str(root / "set"), SCALES, wishes, root)
        made = time.perf_counter() - start
        with redirect_stdout(None):
            start = time.perf_counter()
            gather.training_pictures(str(root / "set"), SCALES, wishes, root)
            opened = time.perf_counter() - start
        few = data.open_folder(root / "set", SCALES, limit=SMALL)
        ways = {
            "(a) decode per sample": partial(per_sample, root / "set", pin, cores),
            "(b) 64 MiB, no cache": partial(data.batches, few, PATCH, BATCH, 0, 0, pin),
            "(c) the cache": partial(data.batches, cached, PATCH, BATCH, 0, 0, pin),
        }
        before = own_memory()
        rate(ways["(c) the cache"](), args.seconds)
        gained = own_memory() - before
        rates = measure(ways, args.rounds, args.seconds)
        # what its worker processes take is not seen from here
        _, work = rate(per_sample(root / "set", False, 0), 0)
        rates["(a) decode per sample"][:, 1] = work
        nbytes = sum(file.stat().st_size for file in (root / "cache").rglob("*"))
    print(f"{args.count} PNGs of {WIDTH}x{HEIGHT}, {cores} cores, "
          f"{'pinned' if pin else 'not pinned'}; the cache: {made:.1f} s to make, "
          f"{opened:.2f} s to open again, {nbytes / 2**30:.2f} GiB, memory of the process while it "
          f"is read: {gained / 2**20:+.0f} MiB")
    print(f"{'':24} {'patches/s':>10} {'in each round':>24} {'times (a)':>10} {'CPU ms':>7}")
    first = next(iter(rates.values()))[:, 0]
    for way, each in rates.items():
        speed, work = each.T
        listed = " ".join(f"{value:.0f}" for value in speed)
        print(f"{way:24} {np.median(speed):10.0f} {listed:>24} {np.median(speed / first):10.1f} "
              f"{np.median(work):7.2f}")


if __name__ == "__main__":
    command(main)
