"""The one switch between the Triton kernels and PyTorch, and what of PyTorch's settings they obey.

`IMPL` is "fastest", "triton" or "torch". "fastest", the default where there is a GPU for it, times
both at first use and keeps the faster one (choice.py, to be read next). `choose` sets it and
returns the line that a program prints, so that nobody has to guess what ran. Nothing falls back in
silence: what the Triton kernels cannot take is written at each operation.
"""
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from torch import Tensor
from tqdm import tqdm

IMPL = "torch"
NUMBERS = {torch.bfloat16: "bf16", torch.float32: "fp32"}      # that the kernels take
LEAST = (8, 0)                       # compute capability: Ampere, the first GPUs with bfloat16


def lacking() -> str:
    """What is missing on this machine, whatever its GPU; looks at no GPU, which would take time."""
    if importlib.util.find_spec("triton") is None:
        # Only looked for: an import would take time and fix Triton's own switches.
        return "Triton is not installed (pip install triton; there is none for macOS)"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA GPU"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA's GPUs, this PyTorch is for AMD's"
    return ""


def interpreted() -> bool:
    """Whether Triton runs on the CPU, in Python: slow, for the tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(device: torch.device | None = None) -> str:
    """Says why the Triton kernels cannot run here; the empty string where they can.

    device: the GPU in question, None for the current one. The reason is a sentence that can follow
    a colon.
    """
    reason = lacking()
    if reason or not torch.cuda.is_available():
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        return (f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}."
                f"{capability[1]}, the kernels need {LEAST[0]}.{LEAST[1]}")
    return ""


def choose(name: str | None = None) -> str:
    """Sets `IMPL` and returns a line for the log.

    None takes "fastest" where there is a GPU for Triton, else "torch"; "triton" takes the kernels
    without timing them. Raises ValueError for an unknown name, and for "triton" where it cannot
    run.
    """
    global IMPL
    if name not in (None, "triton", "torch"):
        raise ValueError(f"unknown kernels {name!r}: choose torch or triton")
    missing = "" if name == "torch" else available()
    if name == "triton" and missing:
        raise ValueError(f"kernels triton cannot run here: {missing}; choose torch")
    if name is not None:
        IMPL = name
        return f"kernels: {IMPL} (as asked)"
    if missing:
        IMPL = "torch"
        return f"kernels: {IMPL} ({missing})"
    if not torch.cuda.is_available():
        # The interpreter is never chosen unasked: it is thousands of times slower than PyTorch.
        IMPL = "torch"
        return f"kernels: {IMPL}"
    IMPL = "fastest"
    return "kernels: Triton or PyTorch, timed at first use"


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels may take this tensor.

    They take tensors on a GPU; tensors on a CPU only where there is no GPU, which `choose`
    allowed because Triton interprets.
    """
    if IMPL == "torch":
        return False
    if torch.cuda.is_available():
        return x.device.type == "cuda" and fit(x.device)
    return x.device.type == "cpu"


def constant(function: Callable) -> Callable:
    """Remembers the tensors that it returns. Made in inference, they must serve training, too.

    torch.compile makes them anew in its graph: as constants it would take two tensors of one
    function, which the two windows of DAT need, for one.
    """
    @lru_cache
    def remembered(*arguments):
        with torch.inference_mode(False):
            return function(*arguments)

    @wraps(function)
    def look_up(*arguments):
        if torch.compiler.is_dynamo_compiling():
            return function(*arguments)
        return remembered(*arguments)

    look_up.cache_clear = remembered.cache_clear
    return look_up


def fit(device: torch.device) -> bool:
    """Whether this GPU can run the kernels; says once why not. `choose` saw the current one only,
    and with IMPL = "fastest" from the import on not even that.
    """
    return look_at(device)


# torch.compile takes the answer and does not look inside. So does
# torch.compiler.assume_constant_result, which would import the compiler.
fit._dynamo_marked_constant = True


@lru_cache
def look_at(device: torch.device) -> bool:
    """What `fit` returns."""
    reason = available(device)
    if reason:
        say(f"kernels: torch on {device} ({reason})")
    return not reason


def say(line: str) -> None:
    """A line for people, on stderr, above any progress bar."""
    tqdm.write(line, file=sys.stderr)


# ---- PyTorch's settings -------------------------------------------------------------------------
def allows_tf32(products: str) -> bool:
    """Whether PyTorch's float32 products may use TensorFloat-32; products: "matmul" or "conv".

    The older switches (`allow_tf32`) raise once one of these has been set; these know the older
    ones.
    """
    settings = torch.backends.cudnn.conv if products == "conv" else torch.backends.cuda.matmul
    return settings.fp32_precision == "tf32"


def like_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as torch.autocast would cast for a product; it does not know our operations."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


# From the import on, as `choose` would set it; asking for the GPU's capability would start CUDA.
if torch.cuda.is_available() and not lacking():
    IMPL = "fastest"
