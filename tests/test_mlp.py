"""The MLP with its norm and skip: PyTorch against its formula, the kernel against float64."""
import math

import pytest
import torch

import kernels
import models
from kernels import mlp, switch
from tiny import rule, tiny_swinir
from triton_path import DEVICE, GPU, chosen_triton, needs_triton

SHAPES = {                                               # tokens, channels, hidden channels
    "light": ((2, 5, 7), 60, 120),                       # 70 tokens: past a tile
    "pruned_odd": ((3,), 20, 37),                        # a ragged step of hidden channels
    "one_token": ((1, 1), 16, 8),                        # less than a step
    "swinir": ((65,), 180, 360),
}


@pytest.fixture
def triton():
    """The Triton path, with every output full of NaN until the kernel writes it."""
    with chosen_triton():
        yield


def random_case(tokens, C, hidden, dtype=torch.float32, device=DEVICE) -> list:
    shapes = [(*tokens, C), (C,), (C,), (hidden, C), (hidden,), (C, hidden), (C,)]
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[3] /= C**0.5
    tensors[5] /= hidden**0.5
    tensors[0] += 3                                      # the mean of a token is to be found
    return [t.to(device, dtype) for t in tensors]


def exact(tensors: list) -> torch.Tensor:
    return mlp.torch_path(*(t.double() for t in tensors))


def test_pytorch_path_equals_the_formula():
    """One token of two channels, one hidden channel, by hand."""
    x = torch.tensor([1.0, 5.0])                         # mean 3, variance 4: norm is ∓1
    ones = torch.ones(2)
    h = 2 * -1.0 + 3 * 1.0 + 0.5                         # fc1 = (2, 3), 0.5
    gelu = h * 0.5 * (1 + math.erf(h / math.sqrt(2)))
    out = kernels.residual_mlp(x, ones, 0 * ones, torch.tensor([[2.0, 3.0]]), torch.tensor([0.5]),
                      torch.tensor([[1.0], [2.0]]), torch.tensor([0.25, 0.0]))
    assert out.tolist() == pytest.approx([1 + gelu + 0.25, 5 + 2 * gelu], abs=1e-4)


@needs_triton
@pytest.mark.skipif(GPU, reason="compiled, its products of float32 are in TensorFloat-32")
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_equals_float64(name, triton):
    tensors = random_case(*SHAPES[name])
    out = mlp.mlp_op(*tensors, "")
    assert out.shape == tensors[0].shape
    assert (out - exact(tensors)).norm() < 1e-6 * exact(tensors).norm()


@needs_triton
@pytest.mark.parametrize("name", SHAPES)
def test_the_kernel_in_bfloat16_errs_as_pytorch_does(name, triton):
    tensors = random_case(*SHAPES[name], dtype=torch.bfloat16)
    out = kernels.residual_mlp(*tensors)
    assert out.dtype == torch.bfloat16
    error = (mlp.torch_path(*tensors) - exact(tensors)).norm()
    assert (out - exact(tensors)).norm() < 2 * error + 1e-3 * exact(tensors).norm()


@needs_triton
def test_any_strides_and_no_tokens_will_do(triton):
    tensors = random_case((4, 6), 16, 24, dtype=torch.bfloat16)
    expected = exact(tensors)
    turned = [t.t().contiguous().t() if t.ndim == 2 else t for t in tensors]
    turned[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert (kernels.residual_mlp(*turned) - expected).norm() < 0.02 * expected.norm()
    assert kernels.residual_mlp(tensors[0][:0], *tensors[1:]).shape == (0, 6, 16)


@needs_triton
def test_the_operation_obeys_the_rules_of_pytorch(triton):
    torch.library.opcheck(mlp.mlp_op, (*random_case((3,), 16, 8, dtype=torch.bfloat16), ""))


@needs_triton
@pytest.mark.parametrize("change", ["float32", "wide", "gradient", "torch"])
def test_everything_else_goes_the_pytorch_path(change, triton, monkeypatch):
    def refuse(*tensors):
        pytest.fail("the kernel was called")

    monkeypatch.setattr(mlp, "mlp_op", refuse)
    tensors = random_case((2,), 300 if change == "wide" else 16, 8, dtype=torch.bfloat16)
    if change == "float32":
        tensors[0] = tensors[0].float()
        tensors[1:] = [t.float() for t in tensors[1:]]
    if change == "gradient":
        tensors[3].requires_grad_()
    if change == "torch":
        monkeypatch.setattr(switch, "IMPL", "torch")
    assert kernels.residual_mlp(*tensors).isfinite().all()


def test_what_does_not_fit_is_refused_by_name_and_value():
    tensors = random_case((2,), 16, 8, device="cpu")
    tensors[5] = torch.ones(8, 16)
    with pytest.raises(ValueError, match=r"weight2 has shape \(8, 16\), 16 channels and 8 hidden"):
        kernels.residual_mlp(*tensors)


# ---- in the network -----------------------------------------------------------------------------
@torch.no_grad()
def test_swinir_is_the_same_with_it():
    model = tiny_swinir()[0].eval()
    fast = models.inference(model)
    low = rule.image(1, 1, 8, 16)
    assert (fast(low).images[4] - model(low).images[4]).abs().max() < 1e-6
    names = {type(module).__name__ for module in fast.modules()}
    assert "WholeMlp" in names and "Mlp" not in names
    assert sum(p.numel() for p in fast.parameters()) == sum(p.numel() for p in model.parameters())
    fast.fold()                                          # a second time changes nothing
    assert (fast(low).images[4] - model(low).images[4]).abs().max() < 1e-6


@needs_triton
@torch.no_grad()
def test_swinir_in_bfloat16_uses_the_kernel(triton, monkeypatch):
    calls = []
    operation = mlp.mlp_op

    def spy(*tensors):
        calls.append(tensors[0].shape)
        return operation(*tensors)

    monkeypatch.setattr(mlp, "mlp_op", spy)
    model = tiny_swinir()[0].eval()
    fast = models.inference(model, "bf16").to(DEVICE)
    low = rule.image(1, 1, 8, 8)
    difference = fast(low.to(DEVICE)).images[4].cpu() - model(low).images[4]
    assert len(calls) == 4 and difference.abs().max() < 0.05
