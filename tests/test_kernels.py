"""The kernels against float64: on a GPU as they are, elsewhere under Triton's interpreter, and compiled without a GPU.

The PyTorch paths are checked against brute force first: they are the yardstick of the rest.
"""
import ast
import contextlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, difference, fill, golden, rule, tiny_dat, tiny_drn, tiny_swinir

import kernels
import kernels.bench
import kernels.pixel_shuffle
import kernels.window_attention
import models

attention_file = sys.modules["kernels.window_attention"]         # kernels.window_attention is the function of that name
shuffle_file = sys.modules["kernels.pixel_shuffle"]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
try:
    with pytest.MonkeyPatch.context() as patch:                # Triton decides at its import whether it interprets, and
        if not GPU:                                              # PyTorch's counter of FLOPs has imported it already
            patch.setenv("TRITON_INTERPRET", "1")
            for name in [name for name in sys.modules if name.split(".")[0] == "triton" and "._C" not in name]:
                del sys.modules[name]
        import kernels.triton_pixel_shuffle as shuffle_kernels
        import kernels.triton_window_attention as attention_kernels
except ImportError:
    attention_kernels = shuffle_kernels = None

OUTPUTS = "out", "dqkv", "dtable"
needs_triton = pytest.mark.skipif(attention_kernels is None, reason="Triton is not installed")


@pytest.fixture
def triton(monkeypatch):
    """The Triton path, with every output full of NaN until a kernel writes it."""
    assert GPU or attention_kernels.INTERPRETED, "Triton was imported before this file: it does not interpret"
    monkeypatch.setenv("TRITON_INTERPRET", "0" if GPU else "1")
    monkeypatch.setattr(kernels, "IMPL", kernels.IMPL)
    kernels.choose("triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)     # PyTorch's switch to fill new memory with NaN
    assert torch.empty(9, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def coarse(monkeypatch):
    """Larger tiles for windows of 256 tokens: the interpreter's time goes by their number. Two programs share them."""
    if not GPU:
        for table in (attention_kernels.FORWARD, attention_kernels.BACKWARD, attention_kernels.TABLE):
            for key in [key for key in table if key[0] == 256]:
                monkeypatch.setitem(table, key, table[key]._replace(queries=128, keys=128))
        monkeypatch.setattr(attention_kernels, "sharing", lambda windows, others, tiles, device: min(windows, 2))


# ---- windowed attention
def case(B, H, W, heads, d, window, shift=(0, 0), crossed=False, dtype=torch.float32, device=DEVICE):
    """(qkv, table, upstream gradient, settings), random."""
    entries = (2 * window[0] - 1) * (2 * window[1] - 1)
    settings = dict(heads=heads, window=window, shift=shift, scale=d**-0.5, crossed=crossed)
    qkv, dout = torch.randn(B, H, W, 3 * heads * d), torch.randn(B, H, W, heads * d)
    return (*(t.to(device, dtype) for t in (qkv, torch.randn(entries, heads), dout)), settings)


def run(function, qkv, table, dout, settings, dtype=None):
    """[out, dqkv, dtable] in float64, computed in `dtype`."""
    qkv, table, dout = (t.to(dtype or t.dtype) for t in (qkv, table, dout))
    qkv, table = qkv.detach().requires_grad_(), table.detach().requires_grad_()
    out = function(qkv, table, **settings)
    out.backward(dout)
    assert (out.dtype, qkv.grad.dtype, table.grad.dtype) == (qkv.dtype, qkv.dtype, table.dtype)
    return [t.detach().double() for t in (out, qkv.grad, table.grad)]


def torch_path(qkv, table, heads, window, shift, scale, crossed):
    return attention_file.torch_path(qkv, table, heads, window, shift, scale, crossed)


def brute_force(qkv, table, heads, window, shift, scale, crossed):
    """One query at a time, straight from the docstring: no roll, no partition, no mask tensor."""
    B, H, W, width = qkv.shape
    A, d = width // 3, width // 3 // heads
    unit = (max(window), max(window)) if crossed else window
    size = [-(-n // u) * u for n, u in zip((H, W), unit)]
    out = torch.zeros(B, H, W, A, dtype=qkv.dtype)
    for head in range(heads):
        (h, w), (sy, sx) = (window[::-1], shift[::-1]) if crossed and head >= heads // 2 else (window, shift)

        def address(y, x):                                       # (window, place in it, region) of a token of the map
            y, x = (y - sy) % size[0], (x - sx) % size[1]        # where the roll puts it
            zone = [0 if p < n - side else 1 if p < n - s else 2
                    for p, n, side, s in zip((y, x), size, (h, w), (sy, sx))]
            return (y // h, x // w), (y % h, x % w), zone if sy else None

        tokens = [(y, x) for y in range(size[0]) for x in range(size[1])]
        places = {token: address(*token) for token in tokens}
        padded = F.pad(qkv, (0, 0, 0, size[1] - W, 0, size[0] - H))
        for y, x in ((y, x) for y in range(H) for x in range(W)):
            cell, (qy, qx), zone = places[y, x]
            mates = [t for t in tokens if places[t][0] == cell]
            rows = torch.stack([padded[:, *t] for t in mates], 1)                              # (B, n, 3A)
            q, k, v = padded[:, y, x, head * d:][:, :d], *(rows[..., i * A + head * d:][..., :d] for i in (1, 2))
            bias = torch.stack([table[(qy - places[t][1][0] + h - 1) * (2 * w - 1) + qx - places[t][1][1] + w - 1, head]
                                - 100 * (places[t][2] != zone) for t in mates])
            weights = (scale * (k @ q[..., None])[..., 0] + bias).softmax(1)
            out[:, y, x, head * d:(head + 1) * d] = (weights[:, None] @ v)[:, 0]
    return out


@pytest.mark.parametrize("shape", [
    (2, 5, 7, 1, 3, (2, 4), (1, 2)), (1, 4, 8, 2, 2, (2, 4)), (1, 3, 5, 2, 2, (2, 4), (1, 2), True)])
def test_pytorch_paths_of_attention_equal_brute_force(shape):
    qkv, table, _, settings = case(*shape, dtype=torch.float64, device="cpu")
    expected = brute_force(qkv, table, **settings)
    for path in (attention_file.reference, torch_path, kernels.window_attention):
        assert (path(qkv, table, **settings) - expected).abs().max() < 1e-12
    if "shift" in settings and settings["shift"] != (0, 0):      # the mask must matter, or this proves nothing
        settings["shift"] = (0, 0)
        assert (attention_file.reference(qkv, table, **settings) - expected).abs().max() > 0.1


def test_what_inference_has_cached_serves_training():
    """The index table and the masks are kept; made in inference mode they could not be used in a graph."""
    attention_file.offsets.cache_clear(), attention_file.masks.cache_clear()
    qkv, table, dout, settings = case(1, 8, 8, 2, 4, (8, 8), (4, 4), device="cpu")
    with torch.inference_mode():
        kernels.window_attention(qkv, table, **settings)
    for path in (torch_path, attention_file.reference):
        run(path, qkv, table, dout, settings)


SHAPES = {
    "swinir": (1, 16, 16, 2, 30, (8, 8), (4, 4)),
    "light_unshifted_batch": (2, 8, 16, 2, 10, (8, 8)),
    "ragged_odd_width": (1, 8, 41, 1, 7, (8, 8), (4, 4)),
    "one_window": (1, 8, 8, 2, 8, (8, 8), (4, 4)),
    "less_than_a_window_uneven_shift": (1, 5, 3, 1, 6, (8, 8), (3, 6)),
}
LARGE = {
    "dat_wide": (1, 8, 41, 1, 30, (8, 32), (4, 16)),
    "dat_tall_batch": (2, 9, 8, 1, 10, (32, 8)),
    "dat_crossed": (1, 20, 32, 2, 10, (8, 32), (4, 16), True),
}
GPU_ONLY = {
    "swinir_full": (2, 64, 72, 6, 30, (8, 8), (4, 4)),
    "swinir_plain": (1, 184, 320, 6, 30, (8, 8)),
    "light_full": (2, 64, 61, 6, 10, (8, 8), (4, 4)),
    "dat_full": (2, 64, 64, 6, 30, (8, 32), (4, 16), True),
    "dat_ragged": (1, 50, 70, 6, 30, (8, 32), (4, 16), True),
    "dat_light": (2, 64, 64, 6, 10, (8, 32), (0, 0), True),
} if GPU else {}


@needs_triton
@pytest.mark.parametrize("name", [*SHAPES, *LARGE, *GPU_ONLY])
def test_attention_kernels_equal_float64(name, triton, coarse):
    inputs = case(*(SHAPES | LARGE | GPU_ONLY)[name])
    expected = run(attention_file.reference, *inputs, dtype=torch.float64)
    plain, fused = run(torch_path, *inputs), run(kernels.window_attention, *inputs)
    for name, a, b, c in zip(OUTPUTS, expected, plain, fused):
        assert b.sub(a).norm() < 5e-6 * a.norm(), f"{name} of the PyTorch path"
        assert c.sub(a).abs().max() < 2e-5 if name != "dtable" else c.sub(a).norm() < 1e-5 * a.norm(), name


@needs_triton
def test_attention_kernels_with_the_shipped_tiles_of_large_windows(triton):
    inputs = case(1, 8, 20, 1, 10, (8, 32), (4, 16))
    expected = run(attention_file.reference, *inputs, dtype=torch.float64)
    for a, b in zip(expected, run(kernels.window_attention, *inputs)):
        assert (b - a).norm() < 1e-6 * a.norm()


@needs_triton
@pytest.mark.parametrize("name", ["swinir", "ragged_odd_width", "dat_crossed", *GPU_ONLY])
def test_attention_kernels_in_bfloat16_err_as_pytorch_does(name, triton, coarse):
    inputs = case(*(SHAPES | LARGE | GPU_ONLY)[name], dtype=torch.bfloat16)
    expected = run(attention_file.reference, *inputs, dtype=torch.float64)
    plain, fused = run(torch_path, *inputs), run(kernels.window_attention, *inputs)
    for name, a, b, c in zip(OUTPUTS, expected, plain, fused):
        assert (c - a).norm() < 2 * (b - a).norm() + 1e-3 * a.norm(), name


@needs_triton
@pytest.mark.skipif(not GPU, reason="the interpreter does not emulate TensorFloat-32")
@pytest.mark.parametrize("shape", GPU_ONLY.values(), ids=GPU_ONLY)
def test_attention_kernels_in_tf32_err_as_pytorch_does(shape, triton, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    inputs = case(*shape)
    expected = run(attention_file.reference, *inputs, dtype=torch.float64)
    for a, b, c in zip(expected, run(torch_path, *inputs), run(kernels.window_attention, *inputs)):
        assert (c - a).norm() < 2 * (b - a).norm() + 1e-4 * a.norm()


@needs_triton
def test_attention_takes_a_table_in_float32_with_bfloat16(triton):
    """As under autocast: the Linear makes bfloat16, the table is a parameter."""
    qkv, table, dout, settings = case(*SHAPES["one_window"])
    expected = run(attention_file.reference, qkv, table, dout, settings, dtype=torch.float64)
    for path in (torch_path, kernels.window_attention):
        for a, b in zip(expected, run(path, qkv.bfloat16(), table, dout.bfloat16(), settings)):
            assert (b - a).norm() < 0.02 * a.norm()


@needs_triton
@pytest.mark.parametrize("shape", [SHAPES["swinir"], LARGE["dat_wide"], *GPU_ONLY.values()])
def test_backward_of_attention_repeats_to_the_bit(shape, triton, coarse):
    inputs = case(*shape)
    first = run(kernels.window_attention, *inputs)
    for _ in range(20 if GPU else 1):
        assert all(torch.equal(a, b) for a, b in zip(first, run(kernels.window_attention, *inputs)))


@needs_triton
def test_attention_takes_any_strides(triton):
    """A transposed map, and an upstream gradient that is one number."""
    qkv, table, _, settings = case(1, 16, 8, 2, 8, (8, 8), (4, 4))
    views = qkv.transpose(1, 2).contiguous().transpose(1, 2), table.t().contiguous().t(), torch.ones(1, device=DEVICE)
    one = torch.ones(1, 16, 8, 16, device=DEVICE)
    for a, b in zip(run(attention_file.reference, qkv, table, one, settings, dtype=torch.float64),
                    run(kernels.window_attention, *views[:2], views[2].expand(one.shape), settings)):
        assert (b - a).norm() < 1e-5 * a.norm()


@needs_triton
def test_attention_of_nothing_is_nothing(triton):
    out, dqkv, dtable = run(kernels.window_attention, *case(0, 8, 8, 2, 8, (8, 8), (4, 4)))
    assert (out.shape, dqkv.shape, dtable.abs().sum()) == ((0, 8, 8, 16), (0, 8, 8, 48), 0)


@needs_triton
@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat, tiny_drn])
def test_networks_are_the_same_with_the_kernels(tiny, triton, coarse, monkeypatch):
    """Called through models.py, forward and backward; and the kernels are what is called."""
    model, x, results = tiny()[0].eval().to(DEVICE), rule.image(1, 1, 8, 9).to(DEVICE), {}
    calls, upsample, attend = [], shuffle_file.conv_shuffle_op, attention_file.window_attention_op
    monkeypatch.setattr(shuffle_file, "conv_shuffle_op", lambda *args: calls.append("conv") or upsample(*args))
    monkeypatch.setattr(attention_file, "window_attention_op", lambda *args: calls.append("attention") or attend(*args))
    for way in ("torch", "triton"):
        assert not calls
        kernels.choose(way)
        image = model(x).images[4]
        results[way] = image, *torch.autograd.grad(image.square().sum(), list(model.parameters()), allow_unused=True)
    assert calls.count("conv") == (2 if tiny is tiny_drn else 1)
    assert calls.count("attention") == {tiny_swinir: 4, tiny_dat: 2, tiny_drn: 0}[tiny]
    for a, b in zip(*results.values()):
        assert (a is None) == (b is None) and (a is None or (a - b).norm() <= 1e-3 * a.norm() + 1e-4)


@pytest.mark.skipif(not GPU, reason="whole networks take the interpreter too long")
@pytest.mark.parametrize("name", golden("swinir") | golden("dat"))
def test_golden_outputs_hold_with_the_kernels(name, triton):
    expected, (arch, scale) = (golden("swinir") | golden("dat"))[name], name.replace("_drc", "").rsplit("_x", 1)
    model = fill(models.build(arch, int(scale), expected.get("channels"))).eval().to(DEVICE)
    with torch.no_grad():
        for wanted in expected["cases"]:
            image = model(rule.image(wanted["seed"], wanted["n"], wanted["h"], wanted["w"]).to(DEVICE)).images[int(scale)]
            assert difference(image.cpu(), wanted["sr"]) < 1e-3


@needs_triton
def test_inference_saves_nothing_and_training_gives_the_same(triton, monkeypatch):
    qkv, table, _, settings = case(*SHAPES["one_window"])
    saves, op = [], attention_file.window_attention_op
    monkeypatch.setattr(attention_file, "window_attention_op", lambda *args: saves.append(args[-1]) or op(*args))
    training = kernels.window_attention(qkv.requires_grad_(), table, **settings)
    with torch.inference_mode():
        inference = kernels.window_attention(qkv, table, **settings)
    assert saves == [True, False] and torch.equal(training, inference)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 8, 8, 2, 2, (8, 8), (4, 4)), (1, 8, 8, 4, 2, (8, 8), (0, 0), True)])
def test_attention_obeys_the_rules_of_pytorch_operations(shape, triton):
    qkv, table, dout, settings = case(*shape)
    args = settings["heads"], list(settings["window"]), list(settings["shift"]), settings["scale"], settings["crossed"]
    out, lse = attention_file.window_attention_op(qkv, table, *args, True)
    torch.library.opcheck(attention_file.window_attention_backward_op, (qkv, table, out, lse, dout, *args))
    qkv, table = qkv.clone().requires_grad_(), table.clone().requires_grad_()
    torch.library.opcheck(attention_file.window_attention_op, (qkv, table, *args, True))


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #")                    # not double precision: so it is
def test_gradients_of_attention_are_the_slopes(triton):
    """PyTorch's gradcheck along random directions; float32 is all the kernels have, hence the wide step."""
    qkv, table, _, settings = case(1, 8, 9, 1, 2, (8, 8), (4, 4))
    inputs = qkv.requires_grad_(), table.requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv, table: kernels.window_attention(qkv, table, **settings), inputs,
                                    eps=1e-2, atol=1e-2, rtol=1e-2, fast_mode=True, nondet_tol=0)


@needs_triton
def test_both_kernels_stay_one_graph_under_torch_compile(triton):
    qkv, table, dout, settings = case(*SHAPES["one_window"])
    x, weight = torch.randn(1, 4, 3, 5, device=DEVICE), torch.randn(8, 4, 3, 3, device=DEVICE)

    def attend(qkv, table, **settings):
        return 2 * kernels.window_attention(qkv + 1, table, **settings)

    def upsample(x, weight):
        return kernels.conv3x3_pixel_shuffle(2 * x, weight, None, 2) + 1

    options, inputs = dict(fullgraph=True, backend="inductor" if GPU else "aot_eager"), (qkv, table, dout, settings)
    for a, b in zip(run(attend, *inputs), run(torch.compile(attend, **options), *inputs)):
        assert (a - b).norm() <= 1e-6 * a.norm()
    x.requires_grad_()
    results = []
    for function in (upsample, torch.compile(upsample, **options)):
        out = function(x, weight)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(*results))


@needs_triton
def test_only_what_the_kernels_can_do_goes_to_them(triton, monkeypatch):
    """float64, other windows and wide heads take the PyTorch path; so does everything when the switch says torch."""
    monkeypatch.setattr(attention_file, "window_attention_op", lambda *args: pytest.fail("the kernel was called"))
    for shape, dtype in (((1, 8, 8, 1, 4, (8, 8)), torch.float64), ((1, 4, 4, 1, 4, (4, 4)), torch.float32),
                         ((1, 8, 8, 1, 33, (8, 8)), torch.float32)):
        qkv, table, _, settings = case(*shape, dtype=dtype)
        assert kernels.window_attention(qkv, table, **settings).isfinite().all()
    assert kernels.choose("torch").startswith("kernels: torch")
    qkv, table, _, settings = case(*SHAPES["one_window"])
    kernels.window_attention(qkv, table, **settings)


@pytest.mark.parametrize("change, words", [
    (dict(heads=5), r"qkv has shape \(1, 8, 8, 48\).*5 heads"), (dict(crossed=True, heads=1), "even"),
    (dict(window=(8, 4)), r"bias_table has shape \(225, 2\)"),
    (dict(shift=(4, 8)), r"shift \(4, 8\) must be"), (dict(shift=(4, 0)), "must be"),
    (dict(dtype=torch.float16), "float16"), (dict(dtype=torch.int32), "int32")])
def test_attention_refuses_what_does_not_fit(change, words):
    qkv, table, _, settings = case(1, 8, 8, 2, 8, (8, 8), (4, 4), device="cpu")
    qkv = qkv.to(change.pop("dtype", qkv.dtype))
    table = table[:, :1] if change.get("heads") == 1 else table
    with pytest.raises(ValueError, match=words):
        kernels.window_attention(qkv, table, **settings | change)


# ---- convolution and pixel shuffle
def brute_convolution(x, weight, bias, r):
    """The formula of the module's docstring, a loop over pixels."""
    (N, _, H, W), O = x.shape, len(weight) // r**2
    out, x = torch.zeros(N, O, H * r, W * r, dtype=x.dtype), F.pad(x, (1, 1, 1, 1))
    for y in range(H):
        for column in range(W):
            sums = torch.einsum("ncij,mcij->nm", x[:, :, y:y + 3, column:column + 3], weight) + bias
            for m in range(len(weight)):
                out[:, m // r**2, y * r + m % r**2 // r, column * r + m % r] = sums[:, m]
    return out


CONVOLUTIONS = {                                                # N, C, H, W, O, r, bias
    "rgb": (2, 60, 7, 9, 3, 4, True),                           # 48 columns, 126 pixels: the last tile ragged both ways
    "wide_r2": (1, 64, 5, 13, 40, 2, True),                     # 160 columns: two tiles
    "odd_r3_no_bias": (1, 7, 12, 12, 5, 3, False),              # 144 pixels: past a tile
    "one_pixel": (1, 1, 1, 1, 1, 2, True),
    "channel_blocks": (1, 70, 3, 3, 2, 2, True),                # a second, ragged block of channels in each tap
}
CONVOLUTIONS |= {
    "drn": (2, 64, 48, 50, 64, 2, True),
    "swinir": (1, 180, 40, 31, 64, 2, True),
    "light": (1, 60, 180, 320, 3, 4, True),
} if GPU else {}


def convolution_case(N, C, H, W, O, r, bias, dtype=torch.float32):
    tensors = [torch.randn(N, C, H, W), torch.randn(O * r * r, C, 3, 3) / (3 * C**0.5)]
    tensors.append(torch.randn(O * r * r) if bias else None)
    return SimpleNamespace(inputs=[t if t is None else t.to(DEVICE, dtype) for t in tensors], r=r,
                           dout=torch.randn(N, O, H * r, W * r).to(DEVICE, dtype))


def run_convolution(function, task, dtype=None):
    """[out, dx, dweight, dbias] in float64, computed in `dtype`."""
    inputs = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in task.inputs]
    out = function(*inputs, task.r)
    out.backward(task.dout.to(out.dtype))
    return [t.detach().double() for t in (out, *(t.grad for t in inputs if t is not None))]


def test_pytorch_path_of_the_convolution_equals_brute_force():
    x, weight, bias = torch.randn(2, 3, 4, 2).double(), torch.randn(18, 3, 3, 3).double(), torch.randn(18).double()
    expected = brute_convolution(x, weight, bias, 3)
    assert (kernels.conv3x3_pixel_shuffle(x, weight, bias, 3) - expected).abs().max() < 1e-12


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolution_kernel_equals_float64(shape, dtype, triton):
    task = convolution_case(*shape, dtype=dtype)
    expected = run_convolution(shuffle_file.torch_path, task, dtype=torch.float64)
    plain, fused = run_convolution(shuffle_file.torch_path, task), run_convolution(kernels.conv3x3_pixel_shuffle, task)
    assert len(fused) == len(expected)
    for a, b, c in zip(expected, plain, fused):
        assert (c - a).norm() < 2 * (b - a).norm() + (2e-6 if dtype == torch.float32 else 1e-3) * a.norm()


@needs_triton
def test_convolution_takes_any_memory_and_gives_channels_last(triton):
    task = convolution_case(1, 6, 5, 4, 3, 2, True)
    x, weight, bias = task.inputs
    expected = shuffle_file.torch_path(x, weight, bias, 2)
    for view in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        out = kernels.conv3x3_pixel_shuffle(view, weight.contiguous(memory_format=torch.channels_last), bias, 2)
        assert out.is_contiguous(memory_format=torch.channels_last) and (out - expected).abs().max() < 1e-5
    assert kernels.conv3x3_pixel_shuffle(x[:0], weight, bias, 2).shape == (0, 3, 10, 8)


@needs_triton
def test_convolution_obeys_the_rules_of_pytorch_operations(triton):
    for bias in (True, False):
        inputs = [t if t is None else t.requires_grad_() for t in convolution_case(1, 3, 2, 4, 1, 2, bias).inputs]
        torch.library.opcheck(shuffle_file.conv_shuffle_op, (*inputs, 2))


@needs_triton
def test_convolution_follows_autocast(triton):
    task = convolution_case(1, 6, 5, 4, 3, 2, True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, plain = kernels.conv3x3_pixel_shuffle(*task.inputs, 2), shuffle_file.torch_path(*task.inputs, 2)
    assert out.dtype == plain.dtype == torch.bfloat16 and (out - plain).abs().max() < 0.05


@pytest.mark.parametrize("change, words", [
    (dict(r=5), "r is 5"), (dict(r=3), r"O·9"), (dict(x=torch.ones(3, 4, 5)), r"x has shape \(3, 4, 5\)"),
    (dict(x=torch.ones(1, 2, 4, 5)), "weight has shape"), (dict(bias=torch.ones(4)), r"bias has shape \(4,\).*\(8,\)")])
def test_convolution_refuses_what_does_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        kernels.conv3x3_pixel_shuffle(
            **dict(x=torch.ones(1, 3, 4, 5), weight=torch.ones(8, 3, 3, 3), bias=None, r=2) | change)


# ---- the switch, the files, the compiler
def test_the_switch_says_what_it_does(monkeypatch):
    monkeypatch.setattr(kernels, "IMPL", kernels.IMPL)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="unknown kernels 'cuda'"):
        kernels.choose("cuda")
    assert kernels.choose("torch") == "kernels: torch (as asked)" and kernels.IMPL == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: True)
    assert kernels.choose() == "kernels: triton" and kernels.IMPL == "triton"
    assert not kernels.runs_triton(torch.ones(1)) and not kernels.runs_triton(torch.ones(1, device="meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.choose().startswith("kernels: torch (there is no CUDA GPU") and kernels.IMPL == "torch"
    with pytest.raises(ValueError, match="kernels triton cannot run here: there is no CUDA GPU; choose torch"):
        kernels.choose("triton")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        kernels.choose("triton")


def command(*arguments, **environment):
    environment = {**os.environ, **environment, "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_triton_is_not_imported_before_it_is_used():
    script = ("import sys, kernels; assert 'triton' not in sys.modules; sys.modules['triton'] = None; "
              "kernels.choose(); print(kernels.IMPL)")
    result = command("-c", script)
    assert (result.stdout, result.stderr) == ("torch\n", "")


def test_kernels_import_nothing_from_the_root():
    ours = {path.stem for path in ROOT.glob("*.py")}
    for path in (ROOT / "kernels").glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        nodes = [node for node in tree if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {name.name for node in nodes for name in node.names} | {getattr(node, "module", None) for node in nodes}
        assert path.stem == "bench" or not {str(name).split(".")[0] for name in names} & ours, path


@pytest.mark.filterwarnings("ignore:.*flex_attention")           # called without the compiler here
@pytest.mark.parametrize("shape", [
    (2, 9, 16, 2, 10, (8, 8), (4, 4)), (1, 20, 40, 2, 30, (8, 32), (4, 16), True), (1, 8, 8, 1, 10, (8, 8))])
def test_benchmark_compares_the_same_operation(shape, monkeypatch):
    """A baseline that computes something else would be no baseline."""
    monkeypatch.setattr(kernels.bench, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    qkv, table, _, settings = case(*shape, device="cpu")
    expected = attention_file.reference(qkv, table, **settings)
    ready = kernels.bench.prepare(qkv, settings["window"], settings["shift"], settings["crossed"])
    for core in (kernels.bench.authors, kernels.bench.memory_efficient, kernels.bench.flex):
        out = kernels.bench.written_out(core, qkv, table, **settings, ready=ready)
        assert (out - expected).abs().max() < 1e-5, core


@pytest.mark.skipif(GPU, reason="on a GPU it takes minutes")
def test_benchmark_runs_without_a_gpu_and_says_so(tmp_path):
    result = command("-m", "kernels.bench", "--repeat", "1", "--only", "light", "--json", str(tmp_path / "rows.json"))
    assert result.returncode == 0 and result.stdout.startswith("no GPU: only the PyTorch paths run"), result.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"] and written["machine"]["gpu"] is None
    assert len(written["rows"]) == 6
    assert {row["way"] for row in written["rows"]} == {"ours, PyTorch", "eager", "reference"}


def compiler() -> str:
    """Why the kernels cannot be compiled here, if so."""
    try:
        import triton
        tools = triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"no compiler for the kernels: {error}"
    return "" if all(map(os.path.exists, tools)) else f"one of {tools} is missing"


@pytest.mark.skipif(compiler() != "", reason=compiler())
def test_every_configuration_compiles_for_hopper_without_spills():
    result = command("-m", "kernels.compile")
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert {re.match("[a-z]+", row[4])[0] for row in rows} == {"forward", "backward", "table", "entries", "conv"}
    for registers, spilled, shared, tensor_cores, name in rows:
        assert int(spilled) == 0 and int(shared) <= 227 * 1024 and int(registers) <= 255, name
        assert int(tensor_cores) > 0 or "ieee" in name or name.startswith("entries"), name
