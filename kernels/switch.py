"""The one switch between the Triton kernels and PyTorch.

`IMPL` is "triton" or "torch". `choose` sets it and returns the line that a program prints, so that
nobody has to guess what ran. Nothing falls back in silence: what the Triton kernels cannot take is
written at each operation. Read attention.py next.
"""
import importlib.util
import os

import torch

IMPL = "torch"


def available() -> str:
    """Says why the Triton kernels cannot run here; the empty string where they can.

    The reason is a sentence that can follow a colon.
    """
    if importlib.util.find_spec("triton") is None:
        # Only looked for: an import would take time and fix Triton's own switches.
        return "Triton is not installed (pip install triton; there is none for macOS)"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"    # slow, for the tests
    if not torch.cuda.is_available() and not interpreted:
        return "there is no CUDA GPU"
    return ""


def choose(name: str | None = None) -> str:
    """Sets `IMPL` to "triton" or "torch" and returns a line for the log.

    None takes "triton" where there is a GPU and Triton, else "torch".
    Raises ValueError for an unknown name, and for "triton" where it cannot run.
    """
    global IMPL
    missing = available()
    if name not in (None, "triton", "torch"):
        raise ValueError(f"unknown kernels {name!r}: choose torch or triton")
    if name == "triton" and missing:
        raise ValueError(f"kernels triton cannot run here: {missing}; choose torch")
    if name is not None:
        IMPL = name
        return f"kernels: {IMPL} (as asked)"
    if missing:
        IMPL = "torch"
        return f"kernels: {IMPL} ({missing})"
    # The interpreter is never chosen unasked: it is thousands of times slower than PyTorch.
    IMPL = "triton" if torch.cuda.is_available() else "torch"
    return f"kernels: {IMPL}"


def runs_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels are to take this tensor.

    They take tensors on a GPU; tensors on a CPU only where there is no GPU, which `choose`
    allowed because Triton interprets.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return IMPL == "triton" and x.device.type == device


choose()
