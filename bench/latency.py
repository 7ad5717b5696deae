"""Which widths are fast on this device, and what does --round 8 or 16 change?

    python -m bench.latency                  # pairs of layers, then whole networks
    python -m bench.latency --quick          # pairs of layers alone

First the pairs that are pruned most, alone and at every width: the two 3×3 convolutions of an RCAB
at the two sizes of DRN-S ×4, attention and the MLP of SwinIR-light. "ms per GMAdd" would be the
same for all widths if time followed the multiply-adds. Then whole networks: for every layer one of
the six candidates of --prune 0.3 is drawn, and rounded to multiples of 4, 8 and 16.

Everything is timed in turns (latency.py). On a machine that others use, too, give --busy: one
thread, and the processor's time of this process in place of the time that passes.
"""
import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import graphs
import latency
import models
import prune
from backbones.base import conv
from backbones.swinir import Mlp, WindowAttention
from run import command, number, usable_device

RATIO = 0.3
MULTIPLES = (4, 8, 16)


def rcab_pair(channels: int, hidden: int) -> nn.Module:
    """What the prunable width of an RCAB decides: conv, ReLU, conv, on (1, channels, H, W)."""
    pair = nn.Sequential(conv(channels, hidden), nn.ReLU(inplace=True), conv(hidden, channels))
    return pair.to(memory_format=torch.channels_last)


def pairs_of_layers() -> dict:
    """{title: (shape of the input, {width: layers})}."""
    map_96 = (1, 64, 96, 96)
    map_192 = (1, 64, 192, 192)
    tokens = (1, 96, 96, 60)
    convs = range(16, 65, 4)
    return {
        "two 3x3 convolutions, 64 -> width -> 64, 96x96": (
            map_96, {n: rcab_pair(64, n) for n in convs}),
        "two 3x3 convolutions, 64 -> width -> 64, 192x192": (
            map_192, {n: rcab_pair(64, n) for n in convs}),
        "window attention of SwinIR-light, 6 heads, width of a head, 96x96": (
            tokens, {n: WindowAttention(60, 6, 6 * n, shift=0) for n in range(2, 11)}),
        "MLP of SwinIR-light, 60 -> width -> 60, 96x96": (
            tokens, {n: Mlp(60, n) for n in range(32, 121, 4)}),
    }


def give_memory(x: torch.Tensor) -> torch.Tensor:
    """A map as the networks have it, channels last; tokens as they are."""
    if x.shape[1] == 64:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def print_pairs(device: torch.device, rounds: int) -> None:
    """A table for each pair of layers."""
    for title, (shape, layers) in pairs_of_layers().items():
        x = give_memory(torch.rand(shape)).to(device)
        layers = {n: pair.to(device).eval() for n, pair in reversed(layers.items())}
        counts = {n: madds_of(pair, x) for n, pair in layers.items()}
        if device.type == "cuda":
            for pair in layers.values():
                graphs.use(pair)
        found = latency.interleaved(layers, x, rounds)
        print(f"\n{title}\nwidth      ms  spread  of the widest   MAdds  ms per GMAdd")
        for n, timing in sorted(found.items()):
            madds = counts[n]
            ms = 1000 * timing.seconds
            print(f"{n:5} {ms:7.2f} {timing.ratio_spread:7.3f} {timing.ratio:14.3f} "
                  f"{madds / max(counts.values()):7.3f} {ms / madds * 1e9:13.2f}", flush=True)


def madds_of(layers: nn.Module, x: torch.Tensor) -> int:
    """Multiply-adds of some layers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layers(x)
    return counter.get_total_flops() // 2


def rounded(model, multiple: int) -> dict[str, int]:
    """{pair: width}: one of the six candidates drawn for each, then rounded to the multiple."""
    draw = np.random.default_rng(0)
    widths = {}
    for pair in model.pairs():
        options = prune.candidates(pair.width, RATIO, multiple)
        widths[pair.name] = pair.heads * options[draw.integers(len(options))]
    return widths


def print_networks(arch: str, device: torch.device, rounds: int) -> None:
    """Dense, and the same draw of candidates rounded to each multiple."""
    model = models.build(arch)
    choices = {"dense": model.widths}
    for multiple in MULTIPLES:
        choices[f"--round {multiple}"] = rounded(model, multiple)
    networks = {name: model.with_widths(widths) for name, widths in choices.items()}
    ready = {name: latency.ready(network, device) for name, network in networks.items()}
    found = latency.interleaved(ready, latency.noise(device), rounds)
    dense = evaluate.count(model, latency.SIDE, latency.SIDE)
    print(f"\n{arch} x4, LR {latency.SIDE}x{latency.SIDE}\n{'':10} parameters   MAdds  fewer  "
          f"     ms  faster  spread  faster / fewer")
    for name, network in networks.items():
        cost = evaluate.count(network, latency.SIDE, latency.SIDE)
        timing = found[name]
        fewer = dense.madds / cost.madds
        print(f"{name:10} {cost.params:10,} {cost.madds / 1e9:5.1f} G {fewer:6.2f} "
              f"{1000 * timing.seconds:8.0f} {1 / timing.ratio:7.2f} {timing.ratio_spread:7.3f} "
              f"{1 / timing.ratio / fewer:15.2f}", flush=True)


def add_busy(add: Callable) -> None:
    """The flag --busy of several benchmarks; see `heed_busy`."""
    add("--busy", action="store_true", help="count the time of this process alone, one thread")


def heed_busy(args: argparse.Namespace) -> None:
    """With --busy: one thread, and latency.py counts the time of this process alone."""
    if args.busy:
        torch.set_num_threads(1)
        latency.clock = time.process_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="no whole networks")
    add("--rounds", type=number(int, 1), default=15, help="at least (default 15)")
    add_busy(add)
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    heed_busy(args)
    torch.manual_seed(0)
    print(f"{latency.device_name(args.device)}, torch {torch.__version__}, float32, medians, "
          f"in turns")
    print_pairs(args.device, args.rounds)
    if not args.quick:
        for arch in ("drn_s", "swinir_light"):
            print_networks(arch, args.device, args.rounds)


if __name__ == "__main__":
    command(main)
