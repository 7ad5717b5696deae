"""Benchmarks that need no GPU. Each compares its candidates in one run on one machine; absolute times are only that run's.

    python tests/bench.py compression                                   # what each way to select channels costs and gives
    python tests/bench.py deconvolution                                 # DCLS: one real transform, or a loop over channels
    python tests/bench.py inference --weights runs/drn_s_x4_p30/train.pt --data DIR    # float32, folded, bfloat16
    python tests/bench.py refit --weights DAT_light_x4.pth --data Set5 --train BSDS400 # masked, cut, refitted
    python tests/bench.py tiling --weights DAT_light_x4.pth --arch dat_light --data Set14      # what tiles change
"""
import argparse
import copy
import sys
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

import data                                                                                           # noqa: E402
import dual                                                                                           # noqa: E402
import evaluate                                                                                       # noqa: E402
import kernels                                                                                        # noqa: E402
import models                                                                                         # noqa: E402
import prune                                                                                          # noqa: E402
import train                                                                                          # noqa: E402
from kernels import bench as kernel_bench                                                             # noqa: E402


def fit(model, duals, pictures, steps: int, rate: float, teacher=None, patch: int = 64, batch: int = 4) -> None:
    """The loop of train.py in short: L_DR, with distillation where there is a teacher."""
    weights = [*model.parameters(), *duals.parameters()]
    optimiser = torch.optim.Adam(weights, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    loss = train.native_loss(model, duals)
    with train.distillation(model, teacher or model) as distance:
        for y in islice(data.batches(pictures, patch, batch, 0), steps):
            out = model(y[1])
            total = loss(out, y) + (distance(y[1], out) if teacher else 0)
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
            kept = prune.select(masked, calibration, train.native_loss(masked, frozen), widths, rate=train.COMMON["select_rate"], **settings)
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


def written(qkv, table, *, heads, window, shift=(0, 0), scale, crossed=False):
    """Window attention as the authors write it: roll where shifted, cut, softmax, put together; the mask made anew."""
    return kernel_bench.written_out(kernel_bench.authors, qkv, table, heads, window, shift, scale, crossed)


@contextmanager
def attention_by(function):
    """Within the block the transformers use this function for window attention."""
    usual, kernels.window_attention = kernels.window_attention, function
    try:
        yield
    finally:
        kernels.window_attention = usual


def inference(args: argparse.Namespace) -> None:
    """The network as the paper writes it (transformers: roll, partition, softmax, mask made anew), ours, and
    `models.inference` of it, interleaved: time for a 96×96 input in NCHW, and what changes on real pictures."""
    if args.weights:
        model = evaluate.load_model(args.weights, args.arch).eval()
    else:
        model = models.build(args.arch).eval()
        model.start_from_interpolation()
    pictures = data.open_folder(args.data, (1, model.scale)) if args.data else data.photographs((1, model.scale))
    ours = kernels.window_attention
    ways = {"as written in the paper": (literal(model), written), "our forward": (model, ours),
            "inference float32": (models.inference(model), ours), "inference bf16": (models.inference(model, "bf16"), ours)}
    x = torch.rand(1, 3, 96, 96)                                                             # contiguous: NCHW
    times = {name: [] for name in ways}
    for _ in range(args.repeat + 1):
        for name, (network, attention) in ways.items():
            with torch.inference_mode(), attention_by(attention):
                start = time.perf_counter()
                network(x)
                times[name].append(time.perf_counter() - start)
    print(f"{model.arch} x{model.scale}, {args.weights or 'random weights'}, LR 96x96, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, bf16 instructions: {evaluate.cpu_has_bf16()}")
    rows = {}
    for name, (network, attention) in ways.items():
        with attention_by(attention):
            rows[name] = evaluate.evaluate(network, pictures)
    first = next(iter(ways))
    print(f"{'':24} {'median s':>9} {'times':>6} {'PSNR-Y':>8} {'largest 8-bit difference':>25}")
    for name, row in rows.items():
        ratio = np.median([a / b for a, b in zip(times[first][1:], times[name][1:])])
        worst = max(int(np.abs(a.image.astype(int) - b.image).max()) for a, b in zip(row, rows[first]))
        print(f"{name:24} {np.median(times[name][1:]):9.3f} {ratio:6.2f} {np.mean([r.psnr for r in row]):8.3f} {worst:>25}")


def refit(args: argparse.Namespace) -> None:
    """What the LayerNorm within DAT's MLP costs: 30 % of every hidden width by the L1 norm of fc2, masked, cut, refitted."""
    model = evaluate.load_model(args.weights, args.arch).eval().requires_grad_(False)
    pictures, photographs = (data.open_folder(folder, (1, model.scale)) for folder in (args.data, args.train))
    calibration = [next(data.batches(photographs, 64 * model.scale, 1, 0))]
    kept = {pair.name: prune.importance(model, pair).topk(round(0.7 * pair.width)).indices.tolist() for pair in model.pairs()}
    masked = copy.deepcopy(model)
    for pair in model.pairs():
        gone = sorted(set(range(pair.width)) - set(kept[pair.name]))
        for layer, columns in pair.consumers:
            masked.get_submodule(layer).weight[:, columns[gone].flatten()] = 0
    ways = {"uncut": model, "masked": masked, "cut": prune.cut(masked, kept), "cut and refitted": prune.cut(masked, kept, calibration)}
    for name, network in ways.items():
        print(f"{name:18} {psnr(network, pictures):8.3f} dB {sum(p.numel() for p in network.parameters()):10,} parameters")


def tiling(args: argparse.Namespace) -> None:
    """What tiles change: the largest and mean 8-bit difference to the untiled picture, everywhere and near the seams."""
    model = models.inference(evaluate.load_model(args.weights, args.arch))
    for name, picture in ((name, pictures[i]) for pictures in [data.open_folder(args.data, (1, model.scale))]
                          for i, name in enumerate(pictures.names)):
        whole = evaluate.upscale(model, picture[1]).astype(int)
        tiled = evaluate.upscale(model, picture[1], args.tile).astype(int)
        error = np.abs(whole - tiled)
        seams = seam_mask(picture[1].shape[:2], args.tile, model.scale)
        print(f"{name:20} {evaluate.size(picture[1]):>9}  largest {error.max():3d}  mean {error.mean():.4f}  "
              f"largest at a seam {error[seams].max() if seams.any() else 0:3d}")


def seam_mask(size, tile: int, scale: int):
    """(H, W) bool: within 8 LR pixels of where one tile takes over from another."""
    near = []
    for length in size:
        starts, _ = evaluate.tile_starts(length, tile, evaluate.OVERLAP)
        seams = np.array([start + evaluate.OVERLAP for start in starts[1:]])
        near.append((np.abs(np.arange(length)[:, None] - seams) < 8).any(1).repeat(scale))
    return near[0][:, None] | near[1]


def channel_by_channel(x, kernel, prior):
    """models.deconvolve as the release computes it: full complex transforms, of the kernel too, for every channel."""
    k, (height, width) = kernel.shape[-1], x.shape[2:]
    x = nn.functional.pad(x, (k, k, k, k), "replicate")

    def otf(f):                                            # f's centre at the origin, the rest wrapped around it
        canvas = x.new_zeros(len(x), 1, *x.shape[2:])
        canvas[..., :f.shape[-1], :f.shape[-1]] = f
        return torch.fft.fft2(canvas.roll((-(f.shape[-1] // 2),) * 2, (2, 3)))

    channels = []
    for i in range(x.shape[1]):
        blur, penalty = otf(kernel), otf(prior[:, i:i + 1])
        z = torch.fft.ifft2(blur.conj() * torch.fft.fft2(x[:, i:i + 1]) / (blur.abs() ** 2 + penalty.abs() ** 2)).real
        channels.append(z[..., k:k + height, k:k + width])
    return torch.cat(channels, 1)


class CountOperations(TorchDispatchMode):
    """Counts what computes or copies: on a GPU at least that many launches. Views are free."""
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and "empty" not in function.name()
        return function(*args, **(kwargs or {}))


def deconvolution(args: argparse.Namespace) -> None:
    """Both ways on the same features, interleaved; and what separates them in float64."""
    generator = torch.Generator().manual_seed(0)
    kernel = data.blind_kernels(1, 31, generator)
    x, prior = torch.rand(1, 16, args.size, args.size, generator=generator), torch.rand(1, 16, 3, 3, generator=generator)
    prior = prior - prior.mean((2, 3), keepdim=True)
    ways = {"channel by channel": channel_by_channel, "one transform": models.deconvolve}
    times, counts = {name: [] for name in ways}, {}
    for name, function in ways.items():
        with CountOperations() as counted:
            function(x, kernel, prior)
        counts[name] = counted.count
    for _ in range(args.repeat):
        for name, function in ways.items():
            start = time.perf_counter()
            function(x, kernel, prior)
            times[name].append(time.perf_counter() - start)
    slow, fast = (np.array(each) for each in times.values())
    a, b = (function(x.double(), kernel.double(), prior.double()) for function in ways.values())
    print(f"LR {args.size}x{args.size}, 16 channels, kernel 31x31, float32, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}; float64: largest difference {(a - b).abs().max() / a.std():.1e} of the deviation")
    for name, each in times.items():
        print(f"{name:20} {1e3 * np.median(each):8.2f} ms {counts[name]:5} operations")
    print(f"{np.median(slow / fast):.1f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    add = commands.add_parser("compression")
    add.add_argument("--blocks", type=int, default=4)
    add.add_argument("--steps", type=int, default=1000)
    add.add_argument("--tune-steps", type=int, default=500)
    add.set_defaults(run=compression)
    add = commands.add_parser("inference")
    add.add_argument("--weights")
    add.add_argument("--arch")
    add.add_argument("--data")
    add.add_argument("--repeat", type=int, default=7)
    add.set_defaults(run=inference)
    add = commands.add_parser("refit")
    add.add_argument("--weights", required=True)
    add.add_argument("--arch", default="dat_light")
    add.add_argument("--data", required=True)
    add.add_argument("--train", required=True, help="folder of the calibration picture")
    add.set_defaults(run=refit)
    add = commands.add_parser("tiling")
    add.add_argument("--weights", required=True)
    add.add_argument("--arch")
    add.add_argument("--data", required=True)
    add.add_argument("--tile", type=int, default=128)
    add.set_defaults(run=tiling)
    add = commands.add_parser("deconvolution")
    add.add_argument("--size", type=int, default=96)
    add.add_argument("--repeat", type=int, default=30)
    add.set_defaults(run=deconvolution)
    args = parser.parse_args()
    evaluate.run(lambda: args.run(args))


if __name__ == "__main__":
    main()
