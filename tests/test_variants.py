"""The variants of the Triton kernels: which there are, that each computes the same, and is used."""
import pytest
import torch

from kernels import mlp, pixel_shuffle, triton_tiles
from kernels.triton_tiles import TARGETS, TILES, VARIANTS
from triton_path import (
    DEVICE,
    GPU,
    attention,
    attention_case,
    attention_results,
    chosen_triton,
    exact_attention,
    needs_triton,
    precision_of,
    triton_attention,
    triton_attention_backward,
    triton_pixel_shuffle,
)

OTHERS = [name for name in VARIANTS if name]


@pytest.fixture
def triton():
    """The Triton path, with every output full of NaN until a kernel writes it."""
    with chosen_triton():
        yield


@pytest.fixture
def used(monkeypatch):
    """{kernel: tiles} of all that is launched."""
    seen = {}
    tiles_for = triton_tiles.tiles_for

    def spy(kernel, numbers, device, variant):
        seen[kernel] = tiles_for(kernel, numbers, device, variant)
        return seen[kernel]

    from kernels import triton_mlp
    for module in (triton_attention, triton_attention_backward, triton_pixel_shuffle, triton_mlp):
        monkeypatch.setattr(module, "tiles_for", spy)
    return seen


# ---- the table ----------------------------------------------------------------------------------
@pytest.mark.parametrize("target", TARGETS)
def test_a_variant_has_other_tiles_and_the_same_arithmetic(target):
    """On every GPU: the bits of a product must not depend on what is the fastest."""
    for kernel, numbers in {key[:2] for key in TILES}:
        first, *others = triton_tiles.variants(kernel, numbers, target).values()
        assert first == TILES.get((kernel, numbers, target), TILES[kernel, numbers])
        for tiles in others:
            assert numbers == "bf16" or tiles.precision == first.precision, (kernel, numbers)
            assert set(tiles.blocks) == set(first.blocks)
            assert tiles._replace(registers=0) != first._replace(registers=0)


def test_a_variant_names_kernels_that_exist():
    assert next(iter(VARIANTS)) == ""
    for name in OTHERS:
        assert {key[:2] for key in VARIANTS[name]} <= {key[:2] for key in TILES}


def test_each_operation_has_two_to_four_in_bfloat16():
    """On an operation only those variants are timed in which one of its kernels differs."""
    def names(*kernels):
        return triton_tiles.names_of(kernels, torch.bfloat16, "matmul", torch.device("cpu"))

    assert names(*attention.KERNELS[64]) == ("", "more warps")
    assert names(*attention.KERNELS[256]) == ("", "more warps", "long steps")
    assert names("dbias_256") == ("", "more warps")
    assert names("conv_wide") == ("", "small tiles", "short steps")
    assert names("conv_narrow") == ("", "small tiles")
    assert names("mlp") == ("", "more warps", "small tiles")


def test_the_ways_are_named_and_tell_the_variant():
    def path(*tensors, variant):
        return variant

    ways = triton_tiles.ways(path, ("mlp",), torch.ones(1, dtype=torch.bfloat16), "matmul")
    assert {name: way() for name, way in ways.items()} == {
        "triton": "", "triton more warps": "more warps", "triton small tiles": "small tiles"}


@pytest.mark.skipif(GPU, reason="a table for other GPUs")
def test_what_a_variant_says_for_one_target_counts_there_alone(monkeypatch):
    cpu = torch.device("cpu")                            # stands for Hopper
    kernel = ("dbias_256", "bf16")
    hopper = VARIANTS["more warps"][*kernel, 90]
    assert triton_tiles.tiles_for(*kernel, cpu, "more warps") == hopper
    assert triton_tiles.tiles_for(*kernel, cpu, "long steps") == TILES[*kernel, 90]
    monkeypatch.setattr(triton_tiles, "target_of", lambda device: 120)
    assert triton_tiles.tiles_for(*kernel, cpu, "more warps") == VARIANTS["more warps"][kernel]
    assert triton_tiles.tiles_for(*kernel, cpu, "long steps") == TILES[kernel]


# ---- the operations -----------------------------------------------------------------------------
@needs_triton
@pytest.mark.parametrize("name, shape", [
    ("more warps", (1, 8, 16, 2, 10, (8, 8), (4, 4))),
    ("more warps", (1, 8, 32, 2, 4, (8, 32), (4, 16))),          # several heads, tiles and steps
    ("long steps", (1, 32, 8, 1, 4, (32, 8))),
])
def test_attention_is_the_same_in_every_variant(name, shape, triton, used):
    """Forward and backward, the backward kernels in the variant of the forward kernel."""
    def attend(qkv, table, **settings):
        return attention.triton_path(qkv, table, **settings, variant=name)

    case = attention_case(*shape, dtype=torch.bfloat16)
    plain = attention_results(attention.torch_path, *case)
    fused = attention_results(attend, *case)
    for output, exact in exact_attention(*case).items():
        allowed = 2 * (plain[output] - exact).norm() + 1e-3 * exact.norm()
        assert (fused[output] - exact).norm() < allowed, output
    kernels = attention.KERNELS[shape[5][0] * shape[5][1]]
    target = triton_tiles.target_of(torch.device(DEVICE))
    assert set(used) == set(kernels)
    for kernel in kernels:
        found = triton_tiles.variants(kernel, "bf16", target)
        assert used[kernel] == found.get(name, found[""]), kernel


@needs_triton
@pytest.mark.parametrize("name", ["small tiles", "short steps"])
@pytest.mark.parametrize("shape", [(64, 5, 27, 96), (20, 9, 8, 48), (7, 3, 4, 260)])
def test_the_convolution_is_the_same_in_every_variant(name, shape, triton, used):
    """C, the size of the picture, columns: with ragged tiles, and fewer channels than a step."""
    C, H, W, columns = shape
    x = torch.randn(2, C, H, W, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.randn(columns, C, 3, 3, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(columns, device=DEVICE, dtype=torch.bfloat16)
    out = pixel_shuffle.triton_path(x, weight, bias, 2, variant=name)
    exact = pixel_shuffle.torch_path(x.double(), weight.double(), bias.double(), 2)
    assert (out - exact).norm() < 5e-3 * exact.norm()
    assert list(used) == ["conv_wide" if columns > 64 else "conv_narrow"]


@needs_triton
@pytest.mark.parametrize("name", ["more warps", "small tiles"])
@pytest.mark.parametrize("shape", [(70, 60, 120), (33, 20, 37), (1, 180, 64), (2, 48, 5)])
def test_the_mlp_is_the_same_in_every_variant(shape, name, triton, used):
    """Tokens, channels, hidden channels: past a tile, and less than one."""
    tokens, C, hidden = shape
    shapes = [(tokens, C), (C,), (C,), (hidden, C), (hidden,), (C, hidden), (C,)]
    tensors = [torch.randn(s, device=DEVICE).div(len(s) * 3).bfloat16() for s in shapes]
    out = mlp.triton_path(*tensors, variant=name)
    exact = mlp.torch_path(*(t.double() for t in tensors))
    assert (out - exact).norm() < 5e-3 * exact.norm()
    assert used == dict(mlp=triton_tiles.tiles_for("mlp", "bf16", torch.device(DEVICE), name))


@needs_triton
def test_float32_asks_for_its_own_variants(triton):
    """Which of the two kinds of float32, PyTorch's switch says at each call."""
    def names():
        return triton_tiles.names_of(
            ("forward_256",), torch.float32, "matmul", torch.device(DEVICE))

    with precision_of(torch.backends.cuda.matmul, "tf32"):
        assert names() == ("", "more warps", "long steps")
    with precision_of(torch.backends.cuda.matmul, "ieee"):
        assert names() == ("", "more warps")
