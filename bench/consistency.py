"""Does the map of upscale.py --consistency show where a network is wrong?

    python -m bench.consistency runs/drn_s_x4_p30/tune.pt
    python -m bench.consistency A/tune.pt B/tune.pt --degradation nearest --test Set14

Where the original is known, so is the true error, |P(x) − y|: here its mean over the pixels of the
original that lie in one of x. Three maps are held against it, none of which knows y:

    D(P(x)) − x        the map: the learned way back
    bicubic − x        the same with MATLAB's reduction in place of D
    contrast of x      what any picture of edges would tell: x − the mean of 3×3 pixels

Columns: the correlation r with the true error, pixel by pixel and between means of 8×8 pixels, and
how many times the mean error is that of the tenth of the pixels of which the map is most in doubt
(the best that any map could do stands in the line "true error"). Means ± standard deviations over
the pictures.
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import consistency
import data
import models
from bench.claims import SIZES, spread
from run import command, usable_device
from upscale import upscale

BLOCK = 8


def maps(low: np.ndarray, high: np.ndarray, truth: np.ndarray, duals) -> dict[str, np.ndarray]:
    """{name: (H, W) in grey levels}, the true error last.

    low: uint8 (H, W, 3); high, truth: the result and the original, uint8 (H·s, W·s, 3).
    """
    scale = len(high) // len(low)
    wrong = np.abs(high.astype(float) - truth).mean(2)
    back = data.imresize(high, 1 / scale).astype(float)
    x = torch.from_numpy(low).permute(2, 0, 1)[None].double()
    mean = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return {
        "D(P(x)) − x": consistency.difference(low, high, duals),
        "bicubic − x": np.abs(back - low).mean(2),
        "contrast of x": (x - mean).abs().mean(1)[0].numpy(),
        "true error": block_means(torch.from_numpy(wrong), scale).numpy()}


def block_means(values: Tensor, side: int) -> Tensor:
    """(H, W) -> (H / side, W / side), rounded down: the mean of every square."""
    return F.avg_pool2d(values[None], side)[0]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two maps; 0 where one is the same everywhere."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def agreement(doubt: np.ndarray, wrong: np.ndarray) -> tuple[float, float, float]:
    """(r of pixels, r of 8×8 means, how many times the mean error the most doubtful tenth has)."""
    coarse = [block_means(torch.from_numpy(x).double(), BLOCK).numpy() for x in (doubt, wrong)]
    order = np.argsort(doubt.ravel(), kind="stable")
    worst = wrong.ravel()[order[-(len(order) // 10):]]
    return correlation(doubt, wrong), correlation(*coarse), float(worst.mean() / wrong.mean())


def table(found: dict[str, list[tuple]]) -> str:
    """Markdown; found: {map: agreement with the true error, for each picture}."""
    lines = ["| map | r, pixels | r, 8×8 means | error of the doubtful tenth, times the mean |",
             "|---|---|---|---|"]
    for name, rows in found.items():
        columns = [spread(list(column), 2) for column in zip(*rows)]
        lines.append("| " + " | ".join([name, *columns]) + " |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a wrong one ends with a sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("weights", nargs="+", metavar="FILE", help="checkpoints of train.py")
    add("--test", metavar="DIR", help="these pictures (default: eight built-in photographs)")
    add("--degradation", choices=data.KINDS, default="bicubic", help="how they are made small")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    models.PRESETS.update(SIZES)         # the networks of the other benchmarks can be given, too
    for file in args.weights:
        model, states = models.load_networks(file)
        duals = consistency.load_duals(file, model, states).to(args.device)
        scales = (1, model.scale)
        if args.test:
            pictures = data.open_folder(args.test, scales, degradation=args.degradation)
        else:
            pictures = data.photographs(scales, degradation=args.degradation)
        fast = models.inference(model).to(args.device)
        found = {}
        for picture in tqdm(pictures, "pictures", len(pictures), leave=False, delay=2):
            low, truth = picture.images[1], picture.images[model.scale]
            drawn = maps(low, upscale(fast, low), truth, duals)
            for name, doubt in drawn.items():
                found.setdefault(name, []).append(agreement(doubt, drawn["true error"]))
        print(f"\n**{file}**, {model.arch} x{model.scale}\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    command(main)
