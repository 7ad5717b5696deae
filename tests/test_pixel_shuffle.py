"""Convolution and pixel shuffle: PyTorch against numbers by hand and brute force, the kernel
against float64, on a GPU as it is, elsewhere under Triton's interpreter."""
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import pixel_shuffle
from triton_path import DEVICE, GPU, chosen_triton, needs_triton, triton_pixel_shuffle

SHAPES = {                                                # N, C, H, W, O, r, bias
    "rgb": (2, 60, 7, 9, 3, 4, True),                     # 48 columns, 126 pixels: ragged tiles
    "wide_r2": (1, 64, 5, 13, 40, 2, True),               # 160 columns: two tiles
    "odd_r3_no_bias": (1, 7, 12, 12, 5, 3, False),        # 144 pixels: past a tile
    "one_pixel": (1, 1, 1, 1, 1, 2, True),
    "channel_blocks": (1, 70, 3, 3, 2, 2, True),          # a second, ragged block of channels
}
FULL = {                                                  # the interpreter takes too long for these
    "drn": (2, 64, 48, 50, 64, 2, True),
    "swinir": (1, 180, 40, 31, 64, 2, True),
    "light": (1, 60, 180, 320, 3, 4, True),
}
if GPU:
    SHAPES |= FULL


@pytest.fixture
def triton():
    """The Triton path, with every output full of NaN until a kernel writes it."""
    with chosen_triton():
        yield


class Case(NamedTuple):
    inputs: list                                          # x, weight, bias or None
    r: int
    dout: torch.Tensor                                    # upstream gradient


def random_case(N, C, H, W, outputs, r, has_bias, dtype=torch.float32) -> Case:
    x = torch.randn(N, C, H, W)
    weight = torch.randn(outputs * r * r, C, 3, 3) / (3 * C**0.5)
    inputs = [x.to(DEVICE, dtype), weight.to(DEVICE, dtype), None]
    if has_bias:
        inputs[2] = torch.randn(outputs * r * r).to(DEVICE, dtype)
    dout = torch.randn(N, outputs, H * r, W * r)
    return Case(inputs, r, dout.to(DEVICE, dtype))


def results(function, case: Case, dtype=None) -> list:
    """[out, dx, dweight, dbias] in float64, computed in `dtype`; no dbias without a bias."""
    inputs = []
    for tensor in case.inputs:
        if tensor is not None:
            tensor = tensor.detach().to(dtype or tensor.dtype).requires_grad_()
        inputs.append(tensor)
    out = function(*inputs, case.r)
    out.backward(case.dout.to(out.dtype))
    gradients = [tensor.grad for tensor in inputs if tensor is not None]
    return [tensor.detach().double() for tensor in (out, *gradients)]


# ---- PyTorch ------------------------------------------------------------------------------------
def test_channels_become_blocks_of_pixels():
    """One pixel of value 10, weights 0 to 7 in the middle, bias 0.5: two 2×2 blocks, in order."""
    x = torch.full((1, 1, 1, 1), 10.0)
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, 0, 1, 1] = torch.arange(8)
    out = kernels.conv3x3_pixel_shuffle(x, weight, torch.full((8,), 0.5), 2)
    assert out[0].tolist() == [[[0.5, 10.5], [20.5, 30.5]], [[40.5, 50.5], [60.5, 70.5]]]


def brute_convolution(x, weight, bias, r):
    """The formula at the head of pixel_shuffle.py, a loop over pixels and channels."""
    N, _, H, W = x.shape
    out = torch.zeros(N, len(weight) // r**2, H * r, W * r, dtype=x.dtype)
    x = F.pad(x, (1, 1, 1, 1))
    for h in range(H):
        for w in range(W):
            neighbourhood = x[:, :, h:h + 3, w:w + 3]
            y = torch.einsum("ncij,mcij->nm", neighbourhood, weight) + bias
            for m in range(len(weight)):
                i = m % r**2 // r
                j = m % r
                out[:, m // r**2, h * r + i, w * r + j] = y[:, m]
    return out


def test_pytorch_path_equals_brute_force():
    x = torch.randn(2, 3, 4, 2).double()
    weight = torch.randn(18, 3, 3, 3).double()
    bias = torch.randn(18).double()
    expected = brute_convolution(x, weight, bias, 3)
    out = kernels.conv3x3_pixel_shuffle(x, weight, bias, 3)
    assert (out - expected).abs().max() < 1e-12


# ---- the kernel ---------------------------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("dtype, floor", [(torch.float32, 2e-6), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("name", SHAPES)
def test_kernel_errs_as_pytorch_does_against_float64(name, dtype, floor, triton):
    case = random_case(*SHAPES[name], dtype=dtype)
    expected = results(pixel_shuffle.torch_path, case, dtype=torch.float64)
    plain = results(pixel_shuffle.torch_path, case)
    fused = results(kernels.conv3x3_pixel_shuffle, case)
    assert len(fused) == len(expected)
    for exact, ordinary, ours in zip(expected, plain, fused):
        allowed = 2 * (ordinary - exact).norm() + floor * exact.norm()
        assert (ours - exact).norm() < allowed


@needs_triton
@pytest.mark.skipif(GPU, reason="a GPU shows it in bfloat16")
def test_kernel_rounds_numbers_of_16_bits(triton):
    """float16 is refused by the operation, but the interpreter can do it, unlike bfloat16."""
    case = random_case(1, 20, 3, 5, 3, 2, True)
    expected = pixel_shuffle.torch_path(*case.inputs, 2).double()
    out = triton_pixel_shuffle.forward(*(tensor.half() for tensor in case.inputs), 2, "")
    assert out.dtype == torch.float16
    assert 1e-5 < (out - expected).norm() / expected.norm() < 1e-3


@needs_triton
def test_inputs_may_begin_anywhere_in_memory(triton):
    inputs = random_case(1, 4, 3, 5, 2, 2, True).inputs
    expected = kernels.conv3x3_pixel_shuffle(*inputs, 2)
    views = []
    for tensor in inputs:
        memory = torch.empty(tensor.numel() + 1, device=DEVICE)
        views.append(memory[1:].view(tensor.shape).copy_(tensor))
    assert torch.equal(kernels.conv3x3_pixel_shuffle(*views, 2), expected)


@needs_triton
def test_kernel_takes_any_memory_layout_and_gives_channels_last(triton):
    x, weight, bias = random_case(1, 6, 5, 4, 3, 2, True).inputs
    expected = pixel_shuffle.torch_path(x, weight, bias, 2)
    weight = weight.contiguous(memory_format=torch.channels_last)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (x, x.contiguous(memory_format=torch.channels_last), transposed):
        out = kernels.conv3x3_pixel_shuffle(view, weight, bias, 2)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert (out - expected).abs().max() < 1e-5
    assert kernels.conv3x3_pixel_shuffle(x[:0], weight, bias, 2).shape == (0, 3, 10, 8)


@needs_triton
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_operation_obeys_the_rules_of_pytorch(has_bias, triton):
    inputs = random_case(1, 3, 2, 4, 1, 2, has_bias).inputs
    for tensor in inputs:
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(pixel_shuffle.conv_shuffle_op, (*inputs, 2, ""))


@needs_triton
def test_torch_compile_keeps_one_graph(triton):
    x = torch.randn(1, 4, 3, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, 4, 3, 3, device=DEVICE)

    def upsample(x, weight):
        return kernels.conv3x3_pixel_shuffle(2 * x, weight, None, 2) + 1

    compiled = torch.compile(upsample, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    plain = upsample(x, weight)
    fused = compiled(x, weight)
    assert (plain - fused).norm() <= 1e-6 * plain.norm()
    plain_slope, = torch.autograd.grad(plain.square().sum(), x)
    fused_slope, = torch.autograd.grad(fused.square().sum(), x)
    assert (plain_slope - fused_slope).norm() <= 1e-6 * plain_slope.norm()


@needs_triton
def test_kernel_follows_autocast(triton):
    inputs = random_case(1, 6, 5, 4, 3, 2, True).inputs
    with torch.autocast(DEVICE, torch.bfloat16):
        out = kernels.conv3x3_pixel_shuffle(*inputs, 2)
        plain = pixel_shuffle.torch_path(*inputs, 2)
    assert out.dtype == plain.dtype == torch.bfloat16
    assert (out - plain).abs().max() < 0.05


@pytest.mark.parametrize("change, words", [
    (dict(r=5), "r is 5, it must be 2, 3, 4 or 8"),
    (dict(r=3), r"weight has shape \(8, 3, 3, 3\), r = 3 .* need \(O·9, 3, 3, 3\)"),
    (dict(x=torch.ones(3, 4, 5)), r"x has shape \(3, 4, 5\)"),
    (dict(x=torch.ones(1, 2, 4, 5)), r"weight has shape \(8, 3, 3, 3\).*\(O·4, 2, 3, 3\)"),
    (dict(bias=torch.ones(4)), r"bias has shape \(4,\).*\(8,\)"),
])
def test_what_does_not_fit_is_refused_by_name_and_value(change, words):
    arguments = dict(x=torch.ones(1, 3, 4, 5), weight=torch.ones(8, 3, 3, 3), bias=None, r=2)
    with pytest.raises(ValueError, match=words):
        kernels.conv3x3_pixel_shuffle(**arguments | change)
