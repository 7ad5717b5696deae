"""Window attention: PyTorch against numbers by hand and brute force, the kernels against float64.

The kernels run on a GPU as they are, elsewhere under Triton's interpreter. The reference of
attention.py is the yardstick, so it is checked first, against slower and plainer things.
"""
import math
import shutil
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kernels
from triton_path import (
    DEVICE,
    GPU,
    attention,
    attention_case,
    attention_results,
    chosen_triton,
    coarse_tiles,
    exact_attention,
    needs_triton,
    precision_of,
    triton_attention,
    triton_attention_backward,
)

PATHS = (attention.reference, attention.torch_path, kernels.window_attention)

# Windows of 64 tokens: B, H, W, heads, channels of a head, window, shift, crossed.
SMALL = {
    "swinir": (1, 16, 16, 2, 30, (8, 8), (4, 4)),
    "light_unshifted_batch": (2, 8, 16, 2, 10, (8, 8)),
    "ragged_odd_width": (1, 8, 41, 1, 7, (8, 8), (4, 4)),
    "one_window": (1, 8, 8, 2, 8, (8, 8), (4, 4)),
    "less_than_a_window_uneven_shift": (1, 5, 3, 1, 6, (8, 8), (3, 6)),
}
# Windows of 256 tokens.
LARGE = {
    "dat_wide": (1, 8, 41, 1, 30, (8, 32), (4, 16)),
    "dat_tall_batch": (2, 9, 8, 1, 10, (32, 8)),
    "dat_crossed": (1, 20, 32, 2, 10, (8, 32), (4, 16), True),
}
# What the interpreter takes too long for.
FULL = {
    "swinir_full": (2, 64, 72, 6, 30, (8, 8), (4, 4)),
    "swinir_plain": (1, 184, 320, 6, 30, (8, 8)),
    "light_full": (2, 64, 61, 6, 10, (8, 8), (4, 4)),
    "dat_full": (2, 64, 64, 6, 30, (8, 32), (4, 16), True),
    "dat_ragged": (1, 50, 70, 6, 30, (8, 32), (4, 16), True),
    "dat_light": (2, 64, 64, 6, 10, (8, 32), (0, 0), True),
}
ON_GPU = FULL if GPU else {}
SHAPES = SMALL | LARGE | ON_GPU


@pytest.fixture
def triton():
    """The Triton path, with every output full of NaN until a kernel writes it."""
    with chosen_triton():
        yield


@pytest.fixture
def coarse():
    """Large tiles and few programs, where the kernels are interpreted."""
    with coarse_tiles():
        yield


# ---- PyTorch: numbers by hand, brute force ------------------------------------------------------
def numbered_map(height: int, width: int):
    """q = k = 0, v = the number of the token: without a bias, out is the mean of what is seen."""
    qkv = torch.zeros(1, height, width, 3)
    qkv[0, :, :, 2] = torch.arange(height * width).view(height, width)
    return qkv


@pytest.mark.parametrize("path", PATHS)
def test_in_the_worked_example_each_token_sees_its_window_and_region(path):
    """The 4×4 map at the head of attention.py: 5, 6, 9, 10 share a window, 7 only sees 11."""
    out = path(numbered_map(4, 4), torch.zeros(9, 1), heads=1, window=(2, 2), shift=(1, 1), scale=1)
    expected = torch.tensor([[0, 1.5, 1.5, 3],
                             [6, 7.5, 7.5, 9],
                             [6, 7.5, 7.5, 9],
                             [12, 13.5, 13.5, 15]])
    assert (out[0, :, :, 0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_the_bias_is_read_by_where_the_key_lies(path):
    """Entry 1 of a 2×2 window is the key one row below: it counts three times here."""
    table = torch.zeros(9, 1)
    table[1] = math.log(3)
    out = path(numbered_map(2, 2), table, heads=1, window=(2, 2), scale=1)
    upper_left = (0 + 1 + 3 * 2 + 3) / 6                         # below token 0 lies token 2
    upper_right = (0 + 1 + 2 + 3 * 3) / 6                        # below token 1 lies token 3
    lower = (0 + 1 + 2 + 3) / 4                                  # nothing lies below
    expected = torch.tensor([[upper_left, upper_right], [lower, lower]])
    assert (out[0, :, :, 0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_padding_takes_part_as_keys(path):
    """One token in a window of four: three quarters of what it sees are zeros."""
    qkv = torch.tensor([0.0, 0.0, 8.0]).view(1, 1, 1, 3)
    out = path(qkv, torch.zeros(9, 1), heads=1, window=(2, 2), scale=1)
    assert out.item() == pytest.approx(2)


@pytest.mark.parametrize("path", PATHS)
def test_the_scale_multiplies_the_product_of_query_and_key(path):
    """q = 1, keys 0 and log 3, scale 2: weights 1 and 9."""
    qkv = torch.tensor([[1, 0, 0], [1, math.log(3), 10]]).view(1, 1, 2, 3)
    out = path(qkv, torch.zeros(3, 1), heads=1, window=(1, 2), scale=2)
    assert (out.flatten() - 9).abs().max() < 1e-5


def brute_force(qkv, table, heads, window, shift, scale, crossed):
    """One query at a time, from the formula: no roll, no windows cut, no mask."""
    B, H, W, width = qkv.shape
    d = width // 3 // heads
    unit = (max(window), max(window)) if crossed else window
    height = math.ceil(H / unit[0]) * unit[0]
    length = math.ceil(W / unit[1]) * unit[1]
    padded = F.pad(qkv, (0, 0, 0, length - W, 0, height - H))
    tokens = [(y, x) for y in range(height) for x in range(length)]
    out = torch.zeros(B, H, W, width // 3, dtype=qkv.dtype)
    for head in range(heads):
        turned = crossed and head >= heads // 2
        h, w = window[::-1] if turned else window
        dy, dx = shift[::-1] if turned else shift
        at = {}
        for y, x in tokens:
            ry = (y - dy) % height                               # where rolling puts it
            rx = (x - dx) % length
            region = (band(ry, height, h, dy), band(rx, length, w, dx)) if dy else None
            at[y, x] = (ry // h, rx // w), (ry % h, rx % w), region
        part = [padded[..., i * (width // 3) + head * d:][..., :d] for i in range(3)]
        for y, x in tokens:
            if y >= H or x >= W:
                continue
            home, (qy, qx), region = at[y, x]
            mates = [token for token in tokens if at[token][0] == home]
            q = part[0][:, y, x]
            k = torch.stack([part[1][:, i, j] for i, j in mates], 1)          # (B, n, d)
            v = torch.stack([part[2][:, i, j] for i, j in mates], 1)
            scores = scale * (k @ q[..., None])[..., 0]                       # (B, n)
            for n, mate in enumerate(mates):
                _, (ky, kx), key_region = at[mate]
                scores[:, n] += table[(qy - ky + h - 1) * (2 * w - 1) + qx - kx + w - 1, head]
                scores[:, n] -= 100 * (region != key_region)
            out[:, y, x, head * d:(head + 1) * d] = (scores.softmax(1)[:, None] @ v)[:, 0]
    return out


def band(place: int, size: int, side: int, shift: int) -> int:
    """Of the three bands of Swin: 0 up to the last window, 1 in it, 2 what was rolled into it."""
    if place < size - side:
        return 0
    return 1 if place < size - shift else 2


@pytest.mark.parametrize("shape", [
    (2, 5, 7, 1, 3, (2, 4), (1, 2)),
    (1, 4, 8, 2, 2, (2, 4)),
    (1, 5, 3, 2, 2, (2, 4), (1, 2), True),          # to 8×4, not 6×4, so that 4×2 fits, too
])
def test_pytorch_paths_equal_brute_force(shape):
    qkv, table, _, settings = attention_case(*shape, dtype=torch.float64, device="cpu")
    expected = brute_force(qkv, table, **settings)
    for path in PATHS:
        assert (path(qkv, table, **settings) - expected).abs().max() < 1e-12
    if settings["shift"] != (0, 0):         # the mask must matter, or this proves nothing
        settings["shift"] = (0, 0)
        assert (attention.reference(qkv, table, **settings) - expected).abs().max() > 0.1


def test_what_inference_has_cached_serves_training():
    """Index and masks are kept; tensors made in inference mode could not be used in a graph."""
    attention.offsets.cache_clear()
    attention.masks.cache_clear()
    case = attention_case(1, 8, 8, 2, 4, (8, 8), (4, 4), device="cpu")
    with torch.inference_mode():
        kernels.window_attention(*case[:2], **case[3])
    for path in (attention.torch_path, attention.reference):
        attention_results(path, *case)


def test_masked_weights_are_zero_and_no_denormal_numbers():
    """With the −100 of the papers they would be 4e-44, and a training step twice as long."""
    for mask in attention.masks(8, 8, 4, 4, torch.device("cpu")):
        weights = (mask + 10 * torch.randn(64, 64)).softmax(-1)
        apart = mask != 0
        assert apart.any() and not weights[apart].any()


def test_the_gradient_of_the_table_has_a_fixed_order():
    """Up to 256 pairs read an entry. Where several threads sum up the gradient of table[offsets],
    they race: with DAT's windows about one call in 40 gave other bits, on two busy cores.
    """
    qkv, table, _, settings = attention_case(1, 8, 32, 3, 4, (8, 32), device="cpu")
    out = attention.torch_path(qkv, table.requires_grad_(), **settings)
    seen = set()
    waiting = [out.grad_fn]
    while waiting:
        node = waiting.pop()
        seen.add(type(node).__name__)
        waiting += [parent for parent, _ in node.next_functions if parent]
    assert "IndexSelectBackward0" in seen
    assert not any(name.startswith(("IndexBackward", "IndexPut")) for name in seen)


# ---- the kernels against float64 ----------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_equal_float64(name, triton, coarse):
    case = attention_case(*SHAPES[name])
    expected = exact_attention(*case)
    plain = attention_results(attention.torch_path, *case)
    fused = attention_results(kernels.window_attention, *case)
    for output, exact in expected.items():
        assert (plain[output] - exact).norm() < 5e-6 * exact.norm(), f"PyTorch: {output}"
    for output in ("out", "dqkv"):
        assert (fused[output] - expected[output]).abs().max() < 2e-5, output
    dtable = expected["dtable"]
    assert (fused["dtable"] - dtable).norm() < 1e-5 * dtable.norm()


@needs_triton
def test_kernels_equal_float64_with_the_shipped_tiles_of_large_windows(triton):
    case = attention_case(1, 8, 20, 1, 10, (8, 32), (4, 16))
    fused = attention_results(kernels.window_attention, *case)
    for output, exact in exact_attention(*case).items():
        assert (fused[output] - exact).norm() < 1e-6 * exact.norm(), output


@needs_triton
@pytest.mark.parametrize("name", ["swinir", "ragged_odd_width", "dat_crossed", *ON_GPU])
def test_kernels_in_bfloat16_err_as_pytorch_does(name, triton, coarse):
    case = attention_case(*SHAPES[name], dtype=torch.bfloat16)
    plain = attention_results(attention.torch_path, *case)
    fused = attention_results(kernels.window_attention, *case)
    for output, exact in exact_attention(*case).items():
        allowed = 2 * (plain[output] - exact).norm() + 1e-3 * exact.norm()
        assert (fused[output] - exact).norm() < allowed, output


@needs_triton
@pytest.mark.skipif(GPU, reason="a GPU shows it in bfloat16")
@pytest.mark.parametrize("shape", [
    (1, 8, 16, 1, 30, (8, 8), (4, 4)),
    (1, 8, 20, 1, 10, (32, 8), (16, 4)),
])
def test_numbers_of_16_bits_are_rounded_where_bfloat16_is(shape, triton, coarse):
    """The interpreter multiplies bfloat16 wrongly, so there the kernels get float32. It can do
    float16, which the operations refuse: so this goes through the launches, with a loss as small as
    float16 wants it. A probability or dS that is not rounded before its product would not compile.
    """
    qkv, table, dout, settings = attention_case(*shape)
    expected = exact_attention(qkv, table, dout, settings)
    qkv, dout = qkv.half(), dout.half()
    fixed = [settings[name] for name in ("heads", "window", "shift", "scale", "crossed")]
    out, lse = triton_attention.forward(qkv, table, *fixed, "", True)
    dqkv, dtable = triton_attention_backward.backward(qkv, table, out, lse, dout, *fixed, "")
    assert out.dtype == dqkv.dtype == torch.float16
    for output, found in dict(out=out, dqkv=dqkv, dtable=dtable).items():
        error = (found.double() - expected[output]).norm() / expected[output].norm()
        assert 1e-5 < error < 2e-3, output


@needs_triton
@pytest.mark.parametrize("d", [1, 17, 31, 32])
def test_heads_of_any_width_are_padded(d, triton):
    case = attention_case(1, 8, 8, 1, d, (8, 8), (4, 4))
    fused = attention_results(kernels.window_attention, *case)
    for output, exact in exact_attention(*case).items():
        assert (fused[output] - exact).norm() < 1e-6 * exact.norm(), output


@needs_triton
def test_inputs_may_begin_anywhere_in_memory(triton):
    """At an address that 16-byte loads cannot have: the kernels read a copy."""
    qkv, table, dout, settings = attention_case(1, 8, 8, 1, 16, (8, 8))
    plain = attention_results(kernels.window_attention, qkv, table, dout, settings)
    views = []
    for tensor in (qkv, table, dout):
        memory = torch.empty(tensor.numel() + 1, device=DEVICE)
        views.append(memory[1:].view(tensor.shape).copy_(tensor))
        assert views[-1].data_ptr() % 16 == 4
        assert triton_attention.readable(views[-1], 1, tensor.shape[-1]).data_ptr() % 16 == 0
    moved = attention_results(kernels.window_attention, *views, settings)
    for output in plain:
        assert torch.equal(plain[output], moved[output]), output


@needs_triton
def test_a_table_in_bfloat16_is_read_as_it_is(triton):
    qkv, table, _, settings = attention_case(1, 8, 8, 2, 16, (8, 8))
    table = table.bfloat16()
    expected = attention.reference(qkv.double(), table.double(), **settings)
    out = kernels.window_attention(qkv, table, **settings)
    assert (out - expected).norm() < 1e-6 * expected.norm()


@needs_triton
@pytest.mark.skipif(not GPU, reason="the interpreter does not emulate TensorFloat-32")
@pytest.mark.parametrize("name", FULL)
def test_kernels_in_tf32_err_by_its_mantissa(name, triton):
    """TensorFloat-32 keeps 10 bits of a factor's mantissa, so a factor is off by up to 2^-10.

    PyTorch's error is no measure here: its fused attention computes in full float32.
    """
    case = attention_case(*FULL[name])
    with precision_of(torch.backends.cuda.matmul, "tf32"):
        fused = attention_results(kernels.window_attention, *case)
    for output, exact in exact_attention(*case).items():
        error = (fused[output] - exact).norm() / exact.norm()
        assert 1e-5 < error < 4 * 2**-10, (output, error)


@needs_triton
def test_a_table_in_float32_goes_with_bfloat16(triton):
    """As under autocast: the Linear makes bfloat16, the table is a parameter."""
    qkv, table, dout, settings = attention_case(*SHAPES["one_window"])
    expected = exact_attention(qkv, table, dout, settings)
    for path in (attention.torch_path, kernels.window_attention):
        results = attention_results(path, qkv.bfloat16(), table, dout.bfloat16(), settings)
        for output, exact in expected.items():
            assert (results[output] - exact).norm() < 0.02 * exact.norm(), output


@needs_triton
@pytest.mark.parametrize("name", ["swinir", "dat_wide", *ON_GPU])
def test_backward_repeats_to_the_bit(name, triton, coarse):
    case = attention_case(*SHAPES[name])
    first = attention_results(kernels.window_attention, *case)
    for _ in range(20 if GPU else 1):
        again = attention_results(kernels.window_attention, *case)
        for output in first:
            assert torch.equal(first[output], again[output]), output


@needs_triton
def test_any_strides_will_do(triton):
    """A transposed map, a transposed table, and an upstream gradient that is one number."""
    qkv, table, _, settings = attention_case(1, 16, 8, 2, 8, (8, 8), (4, 4))
    dout = torch.ones(1, 16, 8, 16, device=DEVICE)
    expected = exact_attention(qkv, table, dout, settings)
    qkv = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    table = table.t().contiguous().t()
    dout = torch.ones(1, device=DEVICE).expand(dout.shape)
    results = attention_results(kernels.window_attention, qkv, table, dout, settings)
    for output, exact in expected.items():
        assert (results[output] - exact).norm() < 1e-5 * exact.norm(), output


@needs_triton
def test_an_empty_batch_gives_empty_results(triton):
    case = attention_case(0, 8, 8, 2, 8, (8, 8), (4, 4))
    results = attention_results(kernels.window_attention, *case)
    assert results["out"].shape == (0, 8, 8, 16)
    assert results["dqkv"].shape == (0, 8, 8, 48)
    assert results["dtable"].abs().sum() == 0


# ---- the kernels as PyTorch operations ----------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("shape", [SMALL["one_window"], (1, 8, 8, 1, 16, (8, 32))])
def test_inference_saves_nothing_and_training_gives_the_same(shape, triton, coarse, monkeypatch):
    qkv, table, _, settings = attention_case(*shape)
    saves = []
    operation = attention.window_attention_op

    def spy(*arguments):
        saves.append(arguments[-1])
        return operation(*arguments)

    monkeypatch.setattr(attention, "window_attention_op", spy)
    training = kernels.window_attention(qkv.requires_grad_(), table, **settings)
    with torch.inference_mode():
        inference = kernels.window_attention(qkv, table, **settings)
    assert saves == [True, False]
    assert torch.equal(training, inference)


@needs_triton
@pytest.mark.parametrize("shape", [
    (1, 8, 8, 2, 2, (8, 8), (4, 4)),
    (1, 8, 8, 4, 2, (8, 8), (0, 0), True),
])
def test_the_operations_obey_the_rules_of_pytorch(shape, triton):
    qkv, table, dout, settings = attention_case(*shape)
    fixed = (settings["heads"], list(settings["window"]), list(settings["shift"]),
             settings["scale"], settings["crossed"], "")
    out, lse = attention.window_attention_op(qkv, table, *fixed, True)
    inputs = (qkv, table, out, lse, dout, *fixed)
    torch.library.opcheck(attention.window_attention_backward_op, inputs)
    inputs = (qkv.clone().requires_grad_(), table.clone().requires_grad_(), *fixed, True)
    torch.library.opcheck(attention.window_attention_op, inputs)
    torch.library.opcheck(attention.window_attention_op, (qkv, table, *fixed, False))


@needs_triton
@pytest.mark.filterwarnings("ignore:Input #")      # gradcheck would rather have float64
def test_gradients_are_the_slopes(triton):
    """PyTorch's gradcheck, number by number, the table along five directions.

    float32 is all the kernels have, hence the wide step.
    """
    qkv, table, _, settings = attention_case(1, 2, 3, 1, 2, (8, 8), (6, 7))
    directions = torch.randn(len(table), 5, device=DEVICE)

    def attend(qkv, along):
        return kernels.window_attention(qkv, table + directions @ along, **settings)

    inputs = (qkv.requires_grad_(), torch.zeros(5, 1, device=DEVICE, requires_grad=True))
    assert torch.autograd.gradcheck(attend, inputs, eps=1e-2, atol=3e-4, rtol=1e-2, nondet_tol=0)


@needs_triton
def test_torch_compile_keeps_one_graph(triton):
    case = attention_case(*SHAPES["one_window"])

    def attend(qkv, table, **settings):
        return 2 * kernels.window_attention(qkv + 1, table, **settings)

    compiled = torch.compile(attend, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    plain = attention_results(attend, *case)
    fused = attention_results(compiled, *case)
    for output in plain:
        assert (plain[output] - fused[output]).norm() <= 1e-6 * plain[output].norm(), output


@pytest.mark.skipif(GPU or not shutil.which("g++"), reason="needs a C++ compiler, and no GPU")
def test_the_whole_compiler_takes_shifted_windows():
    """Inductor refuses what aot_eager takes, such as a comparison of two truth values."""
    qkv, table = torch.randn(1, 16, 16, 12), torch.randn(225, 2)
    settings = dict(heads=2, window=(8, 8), shift=(4, 4), scale=0.4)
    compiled = torch.compile(partial(kernels.window_attention, **settings), fullgraph=True)
    with torch.inference_mode():
        difference = compiled(qkv, table) - kernels.window_attention(qkv, table, **settings)
    assert difference.abs().max() < 1e-6


# ---- what goes where ----------------------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("shape, dtype", [
    ((1, 8, 8, 1, 4, (8, 8)), torch.float64),
    ((1, 4, 4, 1, 4, (4, 4)), torch.float32),
    ((1, 8, 8, 1, 33, (8, 8)), torch.float32),
])
def test_other_dtypes_windows_and_wide_heads_go_the_pytorch_path(
        shape, dtype, triton, monkeypatch):
    monkeypatch.setattr(attention, "window_attention_op", refuse)
    qkv, table, _, settings = attention_case(*shape, dtype=dtype)
    assert kernels.window_attention(qkv, table, **settings).isfinite().all()


@needs_triton
def test_everything_goes_the_pytorch_path_when_the_switch_says_so(triton, monkeypatch):
    monkeypatch.setattr(attention, "window_attention_op", refuse)
    assert kernels.choose("torch").startswith("kernels: torch")
    qkv, table, _, settings = attention_case(*SHAPES["one_window"])
    assert kernels.window_attention(qkv, table, **settings).isfinite().all()


def refuse(*arguments):
    pytest.fail("the kernel was called")


@needs_triton
@pytest.mark.skipif(GPU, reason="the number of multiprocessors is that of the GPU")
def test_programs_that_share_the_windows_fill_the_gpu_once():
    """3 programs on each of the 2 multiprocessors that the interpreter pretends to have."""
    tiles = triton_attention.Tiles({}, warps=4, stages=1, registers=168)
    assert tiles.resident == 3                         # 3 · 4 · 32 · 168 = 64,512 of 65,536
    cpu = torch.device("cpu")
    assert triton_attention.programs_for(100, 1, tiles, cpu) == 6
    assert triton_attention.programs_for(100, 4, tiles, cpu) == 2     # 6 / 4, rounded up
    assert triton_attention.programs_for(1, 1, tiles, cpu) == 1


@pytest.mark.parametrize("change, words", [
    (dict(heads=5), r"qkv has shape \(1, 8, 8, 48\).*5 heads"),
    (dict(crossed=True, heads=1), "even number of heads, not 1"),
    (dict(window=(8, 4)), r"bias_table has shape \(225, 2\).*8x4 and 2 heads need \(105, 2\)"),
    (dict(shift=(4, 8)), r"shift \(4, 8\) must be \(0, 0\) or within 1..7, 1..7"),
    (dict(shift=(4, 0)), r"shift \(4, 0\) must be"),
    (dict(dtype=torch.float16), "float16"),
    (dict(dtype=torch.int32), "int32"),
])
def test_what_does_not_fit_is_refused_by_name_and_value(change, words):
    qkv, table, _, settings = attention_case(1, 8, 8, 2, 8, (8, 8), (4, 4), device="cpu")
    change = dict(change)
    qkv = qkv.to(change.pop("dtype", qkv.dtype))
    if change.get("heads") == 1:
        table = table[:, :1]
    with pytest.raises(ValueError, match=words):
        kernels.window_attention(qkv, table, **settings | change)
