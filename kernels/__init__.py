"""The performance-critical operations, each for any device in PyTorch and for NVIDIA GPUs in Triton.

    window_attention.py, pixel_shuffle.py    formula, reference, PyTorch path, the operation and its gradient
    triton_*.py                              the Triton kernels, their configurations and launches; imported when used
    compile.py, bench.py                     commands: compile them without a GPU; measure them against PyTorch

`IMPL` is the one switch, "triton" or "torch"; `choose` sets it and says why. Read window_attention.py next.
"""
import importlib.util
import os

import torch


def available() -> str:
    """"" where the Triton kernels can run, else the reason why not, as a sentence that can follow a colon."""
    if importlib.util.find_spec("triton") is None:             # not imported: that takes time and fixes its switches
        return "Triton is not installed (pip install triton; there is none for macOS)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"                   # Triton's own switch: slow, for the tests
    return "" if torch.cuda.is_available() or interpreted else "there is no CUDA GPU"


def choose(name: str | None = None) -> str:
    """Sets `IMPL` to "triton" or "torch"; None: "triton" where a GPU and Triton are there. Returns a line for the log.

    ValueError: an unknown name, or "triton" where it cannot run."""
    global IMPL
    missing = available()
    if name not in (None, "triton", "torch"):
        raise ValueError(f"unknown kernels {name!r}: choose torch or triton")
    if name == "triton" and missing:
        raise ValueError(f"kernels triton cannot run here: {missing}; choose torch")
    if name is None:
        IMPL = "triton" if torch.cuda.is_available() and not missing else "torch"
        return f"kernels: {IMPL}" + (f" ({missing})" if missing else "")
    IMPL = name
    return f"kernels: {IMPL} (as asked)"


def runs_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take this tensor: on a GPU; on a CPU only where `choose` found the interpreter."""
    return IMPL == "triton" and x.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


IMPL = "torch"
choose()

from kernels.pixel_shuffle import conv3x3_pixel_shuffle                                              # noqa: E402, F401
from kernels.window_attention import window_attention                                                # noqa: E402, F401
