"""The operations that decide the speed: in PyTorch for any device, in Triton for NVIDIA GPUs.

    switch.py                              which of the two may run: `IMPL`, `choose`
    choice.py                              which of them is faster, by measurement
    attention.py, pixel_shuffle.py         formula, reference, PyTorch path, operation and gradient
    mlp.py                                 likewise, for inference
    heads.py                               the head widths that the kernels have
    triton_*.py                            the Triton kernels; imported when they are first used
    compile.py                             a command: compiles every kernel without a GPU

Of the project outside this folder, only choice.py imports anything: how files are written (run.py)
and which of several processes decides (parallel.py). Read attention.py first.
"""
from kernels.attention import window_attention
from kernels.choice import remember_in
from kernels.mlp import residual_mlp
from kernels.pixel_shuffle import conv3x3_pixel_shuffle
from kernels.switch import available, choose, runs_triton

__all__ = ["available", "choose", "conv3x3_pixel_shuffle", "remember_in",
           "residual_mlp", "runs_triton", "window_attention"]
