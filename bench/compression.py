"""What does each shortcut of the selection save, and what does it cost?

    python -m bench.compression

A small DRN is trained on dead leaves and then pruned by 30 % in several ways: (a) as the release,
with the whole network run in every pass; (b) replaying finished blocks, which must select the same
channels; (c) several channels a round, with the gradients of the tuning pass reused as scores, as
in the presets; (d) by the L1 norms of the weights, without a selection. Printed: seconds, how many
of the channels are those of (a), and PSNR-Y on the built-in photographs after the cut and after
fine-tuning, which is the same for all.
"""
import argparse
import copy
import time
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import nn

import data
import dual
import evaluate
import models
import prune
from backbones.drn import DRN
from bench.channels import by_l1_norm
from run import command
from settings import PRESETS

FEATURES = 8
RATIO = 0.3
PATCH, BATCH = 64, 4
CALIBRATION = 10                 # batches
SEED = 0


def fit(model, duals, pictures, steps: int, rate: float, teacher=None) -> None:
    """The loop of train.py in short: L_DR, with distillation where there is a teacher."""
    weights = [*model.parameters(), *duals.parameters()]
    optimiser = torch.optim.Adam(weights, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with dual.distillation(model, teacher or model) as distance:
        for batch in islice(data.batches(pictures, PATCH, BATCH, SEED), steps):
            out = model(batch.images[1])
            loss = dual.native_loss(out, batch, duals, 0.1, model.rgb_range)
            if teacher:
                loss = loss + distance(batch.images[1], out)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 20)
            optimiser.step()
            schedule.step()


def psnr(model, pictures) -> float:
    """Mean PSNR-Y over the pictures, in dB."""
    rows = evaluate.evaluate(models.inference(model), pictures)
    return float(np.mean([row.psnr for row in rows]))


def ways() -> dict[str, dict | None]:
    """{what is printed: options of prune.select}; None: no selection."""
    result = {
        "a whole network, as the release": dict(replay=False),
        "b replaying finished blocks": {},
    }
    for preset in ("default", "quick"):
        settings = PRESETS["drn", preset]
        options = dict(per_round=settings.per_round, reuse=settings.reuse)
        result[f"c preset {preset}: {settings.per_round} a round, reuse"] = options
    result["d L1 norm, no selection"] = None
    return result


def shared(kept: dict, reference: dict) -> str:
    """How many of the channels are those of the reference, or "identical", their order too."""
    if kept == reference:
        return "identical"
    parts = [len(set(kept[k]) & set(reference[k])) / len(kept[k]) for k in kept]
    return f"{100 * np.mean(parts):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4, help="RCABs per up block (default 4)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--tune-steps", type=int, default=500, help="default 500")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    pictures = data.generate(24, 384, (1, 2, 4), SEED)
    model = DRN("drn_s", 4, FEATURES, args.blocks)
    duals = dual.make_duals(model)
    model.start_from_interpolation()
    fit(model, duals, pictures, args.steps, 1e-3)
    photographs = data.photographs((1, 4))
    widths = {p.name: prune.candidates(p.width, RATIO)[-1] for p in model.pairs()}
    calibration = list(islice(data.batches(pictures, PATCH, BATCH, SEED + 1), CALIBRATION))
    print(f"DRN with {FEATURES} features and {args.blocks} RCABs, {sum(widths.values())} of "
          f"{sum(model.widths.values())} channels kept, {CALIBRATION} calibration batches of "
          f"{BATCH} patches of {PATCH}x{PATCH}, {torch.get_num_threads()} threads")
    print(f"dense {psnr(model, photographs):.3f} dB")
    print(f"{'':36} {'seconds':>8} {'times':>6} {'same channels':>13} {'cut dB':>7} "
          f"{'tuned dB':>8}", flush=True)
    reference = slowest = None
    for name, options in ways().items():
        masked = copy.deepcopy(model)
        frozen = copy.deepcopy(duals).requires_grad_(False)
        loss_fn = partial(dual.native_loss, duals=frozen, weight=0.1, rgb_range=model.rgb_range)
        start = time.perf_counter()
        if options is None:
            kept = by_l1_norm(model, widths)
        else:
            rate = PRESETS["drn", "paper"].select_rate
            kept = prune.select(masked, calibration, loss_fn, widths, rate=rate, **options)
        seconds = time.perf_counter() - start
        reference = reference or kept
        slowest = slowest or seconds
        small, student = prune.cut(masked, kept), copy.deepcopy(duals)
        before = psnr(small, photographs)
        teacher = copy.deepcopy(model).requires_grad_(False)
        fit(small, student, pictures, args.tune_steps, 5e-4, teacher)
        times = "-" if options is None else f"{slowest / seconds:.1f}"
        print(f"{name:36} {seconds:8.1f} {times:>6} {shared(kept, reference):>13} {before:7.3f} "
              f"{psnr(small, photographs):8.3f}", flush=True)


if __name__ == "__main__":
    command(main)
