"""Benchmarks that need no GPU. Each compares its candidates in one run on one machine; absolute times are only that run's.

    python tests/bench.py compression                                   # what each way to select channels costs and gives
    python tests/bench.py inference --weights runs/drn_s_x4_p30/train.pt --data DIR    # float32, folded, bfloat16
"""
import argparse
import copy
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import data                                                                                           # noqa: E402
import dual                                                                                           # noqa: E402
import evaluate                                                                                       # noqa: E402
import models                                                                                         # noqa: E402
import prune                                                                                          # noqa: E402
import train                                                                                          # noqa: E402


def fit(model, duals, pictures, steps: int, rate: float, teacher=None, patch: int = 64, batch: int = 4) -> None:
    """The loop of train.py in short: L_DR, with distillation where there is a teacher."""
    weights = [*model.parameters(), *duals.parameters()]
    optimiser = torch.optim.Adam(weights, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    loss = train.native_loss(model, duals)
    with train.distillation(model, teacher or model) as distance:
        for y in islice(data.batches(pictures, patch, batch, 0), steps):
            total = loss(model(y[1]), y) + (distance(y[1]) if teacher else 0)
            optimiser.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(weights, 20)
            optimiser.step()
            schedule.step()


def psnr(model, pictures) -> float:
    return float(np.mean([row.psnr for row in evaluate.evaluate(models.inference(model), pictures)]))


def compression(args: argparse.Namespace) -> None:
    """A DRN of 8 features: (a) 20 full passes per channel, as the release; (b) cached; (c) the presets; (d) L1 norms."""
    torch.manual_seed(0)
    pictures = data.generate(24, 384, (1, 2, 4), 0)
    model = models.DRN("drn_s", 4, 8, args.blocks)
    duals = dual.make_duals(model)
    model.start_from_interpolation()
    fit(model, duals, pictures, args.steps, 1e-3)
    photographs = data.photographs((1, 4))
    widths = {pair.name: prune.candidates(pair.width, 0.3)[-1] for pair in model.pairs()}
    calibration = list(islice(data.batches(pictures, 64, 4, 1), 10))
    print(f"DRN with 8 features and {args.blocks} RCABs, {sum(widths.values())} of {sum(model.widths.values())} channels kept, "
          f"10 calibration batches of 4 patches of 64x64, {torch.get_num_threads()} threads", flush=True)
    print(f"dense {psnr(model, photographs):.3f} dB\n{'':36} {'seconds':>8} {'times':>6} {'same channels':>13} "
          f"{'cut dB':>7} {'tuned dB':>8}", flush=True)
    ways = {"a plain, as the release": dict(cache=False), "b exact caching": {}}
    for preset in ("default", "quick"):
        settings = {key: train.PRESETS[preset][key] for key in ("per_round", "reuse")}
        ways[f"c preset {preset}: {settings['per_round']} a round, reuse"] = settings
    reference = plain = None
    for name, settings in [*ways.items(), ("d L1 norm, no selection", None)]:
        masked, frozen, start = copy.deepcopy(model), copy.deepcopy(duals).requires_grad_(False), time.perf_counter()
        if settings is None:
            kept = {pair.name: prune.importance(model, pair).topk(widths[pair.name]).indices.tolist() for pair in model.pairs()}
        else:
            kept = prune.select(masked, calibration, train.native_loss(masked, frozen), widths, rate=train.SELECT_RATE, **settings)
        seconds = time.perf_counter() - start
        small, student = prune.cut(masked, kept), copy.deepcopy(duals)
        before = psnr(small, photographs)
        fit(small, student, pictures, args.tune_steps, 5e-4, teacher=copy.deepcopy(model).requires_grad_(False))
        reference, plain = reference or kept, plain or seconds
        same = np.mean([len(set(kept[k]) & set(reference[k])) / len(kept[k]) for k in kept])
        identical = "identical" if kept == reference else f"{100 * same:.1f} %"
        times = "-" if settings is None else f"{plain / seconds:.1f}"
        print(f"{name:36} {seconds:8.1f} {times:>6} {identical:>13} {before:7.3f} {psnr(small, photographs):8.3f}",
              flush=True)


def literal(model):
    """A copy in which every operation of an RCAB is one of its own: ReLU, x · attention, + skip."""
    model = copy.deepcopy(model)
    for block in (m for m in model.modules() if isinstance(m, models.RCAB)):
        block.body[1] = nn.ReLU()
        block.second_half = lambda s, body=block.body: then_add(body[2](s["x"]), body[3], s)
    return model


def then_add(x, attention, state: dict) -> dict:
    x = x * attention(x)
    return {**state, "x": x + state["skip"], "skip": None}


def inference(args: argparse.Namespace) -> None:
    """The network as the paper writes it, ours, and `models.inference` of it, interleaved: time for a 96×96 input in
    NCHW, and what changes on real pictures."""
    model = evaluate.load_model(args.weights, args.arch).eval()
    pictures = data.open_folder(args.data, (1, model.scale)) if args.data else data.photographs((1, model.scale))
    ways = {"as written in the paper": literal(model), "our forward": model, "inference float32": models.inference(model),
            "inference bf16": models.inference(model, "bf16")}
    x = torch.rand(1, 3, 96, 96)                                                             # contiguous: NCHW
    times = {name: [] for name in ways}
    for _ in range(args.repeat + 1):
        for name, network in ways.items():
            start = time.perf_counter()
            with torch.inference_mode():
                network(x)
            times[name].append(time.perf_counter() - start)
    print(f"{args.weights}, LR 96x96, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{torch.backends.cpu.get_cpu_capability()}, bf16 instructions: {evaluate.cpu_has_bf16()}")
    rows = {name: evaluate.evaluate(network, pictures) for name, network in ways.items()}
    first = next(iter(ways))
    print(f"{'':24} {'median s':>9} {'times':>6} {'PSNR-Y':>8} {'largest 8-bit difference':>25}")
    for name, row in rows.items():
        ratio = np.median([a / b for a, b in zip(times[first][1:], times[name][1:])])
        worst = max(int(np.abs(a.image.astype(int) - b.image).max()) for a, b in zip(row, rows[first]))
        print(f"{name:24} {np.median(times[name][1:]):9.3f} {ratio:6.2f} {np.mean([r.psnr for r in row]):8.3f} {worst:>25}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("compression")
    add.add_argument("--blocks", type=int, default=4)
    add.add_argument("--steps", type=int, default=1000)
    add.add_argument("--tune-steps", type=int, default=500)
    add.set_defaults(run=compression)
    add = commands.add_parser("inference")
    add.add_argument("--weights", required=True)
    add.add_argument("--arch")
    add.add_argument("--data")
    add.add_argument("--repeat", type=int, default=7)
    add.set_defaults(run=inference)
    args = parser.parse_args()
    evaluate.run(lambda: args.run(args))


if __name__ == "__main__":
    main()
