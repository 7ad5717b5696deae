"""Does a network searched with --budget latency=F take that time?

    python -m bench.budget --arch drn_s --part 0.7
    python -m bench.budget --arch swinir_light --part 0.7

The time of every candidate width is measured, then widths are chosen as `train.py` chooses them,
with random numbers in place of what a search has learned. Printed: what the table of times
predicts, and what the whole network takes beside the dense one, before and after the correction.
The correction ends with the measurement that comes closest, so it leans towards the target; "again"
is one more of the chosen network, by which nothing is decided. Beside it the part of the
multiply-adds.

On a machine that others use, too, give --busy: one thread, and the processor's time of this process
in place of the time that passes.
"""
import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

import evaluate
import latency
import models
import prune
from bench.latency import add_busy, heed_busy
from run import command, number, usable_device


def random_choice(model, options: dict[str, list[int]], seed: int, budget: prune.Budget) -> dict:
    """{pair: width} within the budget, for chances drawn at random."""
    chances = np.random.default_rng(seed).dirichlet(np.ones(len(prune.FRACTIONS)), len(options))
    picks = prune.fit_budget(np.log(chances), list(options.values()), list(options), budget)
    return {name: widths[k] for (name, widths), k in zip(options.items(), picks)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--arch", choices=tuple(models.PRESETS), default="drn_s")
    add("--part", type=number(float, 0.01, 1.01), default=0.7, help="F (default 0.7)")
    add("--round", type=int, choices=(4, 8, 16), default=4, help="multiples of widths (default 4)")
    add("--seeds", type=number(int, 1), default=3, help="random choices (default 3)")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    add_busy(add)
    args = parser.parse_args()
    heed_busy(args)
    torch.manual_seed(0)
    model = models.build(args.arch).to(args.device).eval()
    ratio = prune.budget_ratio(args.part, evaluate.fixed_part(model, "madds"))
    options = {}
    for pair in model.pairs():
        options[pair.name] = [pair.heads * n
                              for n in prune.candidates(pair.width, ratio, args.round)]
    with tempfile.TemporaryDirectory() as folder:
        table = latency.measure_pairs(model, options, args.device, Path(folder) / "latency.json")
    budget = latency.budget(table, args.part, options)
    print(f"{args.arch}, {latency.device_name(args.device)}, LR {latency.SIDE}x{latency.SIDE}: "
          f"dense {table['dense']:.0f} ms, of which {table['rest']:.0f} ms do not depend on widths")
    print("seed  asked  predicted  measured  spread  corrected  spread  again  spread  MAdds")
    low = latency.noise(args.device)
    dense = latency.ready(model, args.device)
    for seed in range(args.seeds):
        choose = partial(random_choice, model, options, seed)
        widths = choose(budget)
        network = latency.ready(model.with_widths(widths), args.device)
        first = latency.interleaved(dict(dense=dense, pruned=network), low)["pruned"]
        widths_after, after = latency.fit(choose, model, budget, args.part, args.device)
        again = latency.interleaved(
            dict(dense=dense, pruned=latency.ready(model.with_widths(widths_after), args.device)),
            low)["pruned"]
        predicted = budget.cost(widths) / table["dense"]
        left = evaluate.count_with(model, widths_after, "madds")
        part = left / evaluate.count_with(model, model.widths, "madds")
        print(f"{seed:4} {args.part:6.3f} {predicted:10.3f} {first.ratio:9.3f} "
              f"{first.ratio_spread:7.3f} {after.ratio:10.3f} {after.ratio_spread:7.3f} "
              f"{again.ratio:6.3f} {again.ratio_spread:7.3f} {part:6.3f}", flush=True)


if __name__ == "__main__":
    command(main)
