"""What does one batched real transform save in the deconvolution of DCLS?

    python -m bench.deconvolution

`backbones.dcls.deconvolve` against the way of the release, a loop over channels with complex
transforms, on the same features, in turns: time, number of operations, and the difference in
float64.
"""
import argparse
import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import data
from backbones.dcls import deconvolve
from run import command


def wrapped_spectrum(f: Tensor, like: Tensor) -> Tensor:
    """The spectrum of f (N, 1, k, k) with its centre at the origin and the rest wrapped around."""
    canvas = like.new_zeros(len(like), 1, *like.shape[2:])
    canvas[..., :f.shape[-1], :f.shape[-1]] = f
    back = -(f.shape[-1] // 2)
    return torch.fft.fft2(canvas.roll((back, back), (2, 3)))


def channel_by_channel(x: Tensor, kernel: Tensor, prior: Tensor) -> Tensor:
    """deconvolve as the release computes it, the kernel's transform too for every channel."""
    k, (height, width) = kernel.shape[-1], x.shape[2:]
    x = nn.functional.pad(x, (k, k, k, k), "replicate")
    channels = []
    for i in range(x.shape[1]):
        blur = wrapped_spectrum(kernel, x)
        penalty = wrapped_spectrum(prior[:, i:i + 1], x)
        spectrum = blur.conj() * torch.fft.fft2(x[:, i:i + 1])
        z = torch.fft.ifft2(spectrum / (blur.abs() ** 2 + penalty.abs() ** 2)).real
        channels.append(z[..., k:k + height, k:k + width])
    return torch.cat(channels, 1)


class CountOperations(TorchDispatchMode):
    """Counts what computes or copies, on a GPU at least as many launches. Views are free."""
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and "empty" not in function.name():
            self.count += 1
        return function(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96, help="side in LR pixels (default 96)")
    parser.add_argument("--repeat", type=int, default=30)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    kernel = data.blind_kernels(1, 31, generator)
    x = torch.rand(1, 16, args.size, args.size, generator=generator)
    prior = torch.rand(1, 16, 3, 3, generator=generator)
    prior = prior - prior.mean((2, 3), keepdim=True)
    ways = {"channel by channel": channel_by_channel, "one transform": deconvolve}
    counts = {}
    for name, function in ways.items():
        with CountOperations() as counted:
            function(x, kernel, prior)
        counts[name] = counted.count
    times = {name: [] for name in ways}
    for _ in range(args.repeat):
        for name, function in ways.items():
            start = time.perf_counter()
            function(x, kernel, prior)
            times[name].append(time.perf_counter() - start)
    a, b = (f(x.double(), kernel.double(), prior.double()) for f in ways.values())
    print(f"LR {args.size}x{args.size}, 16 channels, kernel 31x31, float32, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; in float64 they differ "
          f"by at most {(a - b).abs().max() / a.std():.1e} of the deviation")
    for name, each in times.items():
        print(f"{name:20} {1e3 * np.median(each):8.2f} ms {counts[name]:5} operations")
    slow, fast = (np.array(each) for each in times.values())
    print(f"{np.median(slow / fast):.1f} times as fast")


if __name__ == "__main__":
    command(main)
