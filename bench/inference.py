"""How fast is a network on a CPU, as the papers write it, with our forward pass, and made ready for
inference?

    python -m bench.inference --weights runs/drn_s_x4_p30/train.pt --data Set5
    python -m bench.inference --arch swinir_light                     # random weights
    python -m bench.inference --weights tune.pt --openvino tune.onnx  # and OpenVINO, see export.py

Four ways, in turns on the same 96×96 input: "as written" does every operation of an RCAB alone, and
window attention by rolling, cutting and a mask made anew; then ours; `models.inference` of ours in
float32; and in bfloat16. Median time, and what changes on real pictures. With --openvino also the
exported network in OpenVINO, which is only timed. On a machine that others use, too, give --busy:
one thread, and the processor's time of this process in place of the time that passes.
"""
import argparse
import copy
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

import data
import evaluate
import kernels
import latency
import models
from backbones.drn import RCAB
from bench.baselines import authors_attention
from bench.latency import add_busy, heed_busy
from run import command, need
from upscale import cpu_has_bf16

SIDE = 96                        # LR pixels


def as_written(model: nn.Module) -> nn.Module:
    """A copy in which an RCAB is: convolution, ReLU, convolution, times attention, plus input."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, RCAB):
            block.body[1] = nn.ReLU()
            block.forward = partial(plain_rcab, block.body)
    return model


def plain_rcab(body: nn.Sequential, x: Tensor) -> Tensor:
    """The forward pass of RCAB without in-place operations and without addcmul."""
    y = body[2](body[1](body[0](x)))
    return y * body[3](y) + x


@contextmanager
def attention_by(function):
    """Within it the transformers use this function for window attention."""
    usual = kernels.window_attention
    kernels.window_attention = function
    try:
        yield
    finally:
        kernels.window_attention = usual


def load(args: argparse.Namespace) -> nn.Module:
    """The network of --weights, or one of --arch with random weights near an interpolation."""
    if args.weights:
        return models.load(args.weights, args.arch).eval()
    model = models.build(args.arch).eval()
    model.start_from_interpolation()
    return model


def measure(ways: dict, repeat: int) -> dict[str, list[float]]:
    """{way: seconds of each of `repeat` passes}, in turns, after one pass to warm up."""
    x = torch.rand(1, 3, SIDE, SIDE)
    times = {name: [] for name in ways}
    for _ in range(repeat + 1):
        for name, (network, attention) in ways.items():
            with torch.inference_mode(), attention_by(attention):
                start = latency.clock()
                network(x)
                times[name].append(latency.clock() - start)
    return {name: each[1:] for name, each in times.items()}


def openvino(file: str, precision: str):
    """A function of the input by OpenVINO, with as many threads as PyTorch has."""
    ov = need("openvino", "--openvino")
    core = ov.Core()
    try:
        # not reshaped to SIDE: a SwinIR of one size comes out wrong in OpenVINO 2026.4
        ready = core.compile_model(core.read_model(file), "CPU", dict(
            PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=torch.get_num_threads(),
            INFERENCE_PRECISION_HINT=precision))
    except RuntimeError as error:
        raise ValueError(f"OpenVINO cannot run {file}: give a file that export.py made") from error
    request = ready.create_infer_request()
    return lambda x: request.infer({0: x.numpy()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", metavar="FILE")
    parser.add_argument("--arch", choices=tuple(models.PRESETS))
    parser.add_argument("--data", metavar="DIR", help="default: the built-in photographs")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--openvino", metavar="FILE.onnx",
                        help="time this export of the same network by OpenVINO, too")
    add_busy(parser.add_argument)
    args = parser.parse_args()
    if not (args.weights or args.arch):
        parser.error("give --weights FILE or --arch")
    heed_busy(args)
    model = load(args)
    scales = (1, model.scale)
    pictures = data.open_folder(args.data, scales) if args.data else data.photographs(scales)
    ours = kernels.window_attention
    ways = {
        "as written in the paper": (as_written(model), authors_attention),
        "our forward": (model, ours),
        "inference float32": (models.inference(model), ours),
        "inference bf16": (models.inference(model, "bf16"), ours),
    }
    theirs = {}
    if args.openvino:
        for name, precision in (("float32", "f32"), ("bf16", "bf16")):
            theirs[f"OpenVINO {name}"] = (openvino(args.openvino, precision), ours)
    times = measure(ways | theirs, args.repeat)
    print(f"{model.arch} x{model.scale}, {args.weights or 'random weights'}, LR {SIDE}x{SIDE}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{torch.backends.cpu.get_cpu_capability()}, bf16 instructions: {cpu_has_bf16()}")
    print(f"{'':24} {'median s':>9} {'times':>6} {'PSNR-Y':>8} {'largest 8-bit difference':>25}")
    first = next(iter(ways))
    reference = None
    for name, (network, attention) in ways.items():
        with attention_by(attention):
            rows = evaluate.evaluate(network, pictures)
        reference = reference or rows
        worst = 0
        for a, b in zip(rows, reference):
            worst = max(worst, int(np.abs(a.image.astype(int) - b.image).max()))
        ratio = np.median(np.array(times[first]) / np.array(times[name]))
        psnr = np.mean([row.psnr for row in rows])
        print(f"{name:24} {np.median(times[name]):9.3f} {ratio:6.2f} {psnr:8.3f} {worst:>25}")
    for name in theirs:
        own = name.replace("OpenVINO", "inference")
        ratio = np.median(np.array(times[own]) / np.array(times[name]))
        print(f"{name:24} {np.median(times[name]):9.3f}, {own} takes {ratio:.2f} times as long")


if __name__ == "__main__":
    command(main)
