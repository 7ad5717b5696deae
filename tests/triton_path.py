"""Makes the Triton kernels run in the tests: on a GPU as they are, elsewhere interpreted.

Triton decides when it is imported whether it interprets, and other libraries may have imported it
already (PyTorch's counter of FLOPs does). So this file forgets such an import and starts anew.
"""
import sys
from contextlib import contextmanager

import pytest
import torch

import kernels
from kernels import attention, switch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def forget_triton() -> None:
    """Removes Triton from the imported modules, but for its compiled part, which must not go."""
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and "._C" not in name:
            del sys.modules[name]


try:
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            patch.setenv("TRITON_INTERPRET", "1")
            forget_triton()
        from kernels import triton_attention, triton_attention_backward, triton_pixel_shuffle
        from kernels.triton_tiles import TILES
except ImportError:
    triton_attention = triton_attention_backward = triton_pixel_shuffle = None

needs_triton = pytest.mark.skipif(triton_attention is None, reason="Triton is not installed")


@contextmanager
def precision_of(products, name: str):
    """Within it a setting of PyTorch for float32 products is "tf32" or "ieee"."""
    before = products.fp32_precision
    products.fp32_precision = name
    try:
        yield
    finally:
        products.fp32_precision = before


@contextmanager
def chosen_triton():
    """Within it the operations use Triton, and new memory is full of NaN until it is written."""
    assert GPU or triton_attention.INTERPRETED, "Triton was imported before: it does not interpret"
    with pytest.MonkeyPatch.context() as patch, precision_of(torch.backends.cudnn.conv, "ieee"):
        patch.setenv("TRITON_INTERPRET", "0" if GPU else "1")
        patch.setattr(switch, "IMPL", switch.IMPL)               # as it was, afterwards
        kernels.choose("triton")
        torch.use_deterministic_algorithms(True, warn_only=True)     # it fills new memory with NaN
        assert torch.empty(9, device=DEVICE).isnan().all()
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextmanager
def coarse_tiles():
    """Within it windows of 256 tokens have large tiles, and two programs share the windows.

    The interpreter's time goes by the number of tiles. On a GPU nothing changes.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:
            for key, tiles in list(TILES.items()):
                if key[0].endswith("_256"):
                    large = dict.fromkeys(tiles.blocks, 128)
                    patch.setitem(TILES, key, tiles._replace(blocks=large))
            for module in (triton_attention, triton_attention_backward):
                patch.setattr(module, "programs_for", two_programs)
        yield


def two_programs(windows: int, others: int, tiles, device) -> int:
    """In place of triton_attention.programs_for."""
    return min(windows, 2)


def attention_case(
        B: int, H: int, W: int, heads: int, d: int, window, shift=(0, 0), crossed: bool = False,
        dtype=torch.float32, device: str = DEVICE):
    """Random (qkv, table, upstream gradient, settings)."""
    entries = (2 * window[0] - 1) * (2 * window[1] - 1)
    settings = dict(heads=heads, window=window, shift=shift, scale=d**-0.5, crossed=crossed)
    qkv = torch.randn(B, H, W, 3 * heads * d)
    dout = torch.randn(B, H, W, heads * d)
    table = torch.randn(entries, heads)
    tensors = [t.to(device, dtype) for t in (qkv, table, dout)]
    return *tensors, settings


def attention_results(function, qkv, table, dout, settings, dtype=None) -> dict:
    """out, dqkv and dtable in float64, computed in `dtype` (default: that of the inputs)."""
    qkv = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
    table = table.detach().to(dtype or table.dtype).requires_grad_()
    out = function(qkv, table, **settings)
    out.backward(dout.to(out.dtype))
    assert out.dtype == qkv.dtype
    results = dict(out=out, dqkv=qkv.grad, dtable=table.grad)
    return {name: t.detach().double() for name, t in results.items()}


def exact_attention(qkv, table, dout, settings) -> dict:
    """The same by the reference in float64."""
    return attention_results(
        attention.reference, qkv, table, dout, settings, dtype=torch.float64)
