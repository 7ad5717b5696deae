"""The MLP of a transformer block with its norm and its skip, at inference; SwinIR has one a block.

    out = x + fc2(gelu(fc1(norm(x))))                        for every token alone

    norm(x) = (x − mean) / √(variance + eps) · weight + bias        over the C channels of a token
    fc1: C -> hidden channels, fc2: hidden -> C, gelu(h) = h · Φ(h), Φ the normal distribution's

What the fused kernel saves: memory traffic
-------------------------------------------
In PyTorch, each of the five operations reads what the one before has written. Numbers read and
written per token for SwinIR, C = 180 and 360 hidden channels: norm 2C, fc1 C + 360, gelu 2·360,
fc2 360 + C, sum 3C, so 2,700 in all. Fused, x is read and out is written: 360. The work is the
same, 259,200 FLOP a token, which is 360 FLOP a byte in bfloat16.

In this file: `torch_path`, the reference and the path for any device; `residual_mlp`, which the
networks call; and the Triton kernel wrapped as a PyTorch operation. Not here: a gradient. In
training the backward pass needs what lies between the layers. Read triton_mlp.py next.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import choice, switch, triton_tiles

EPS = 1e-5                           # of nn.LayerNorm, unless told otherwise


def torch_path(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor, bias1: Tensor,
               weight2: Tensor, bias2: Tensor) -> Tensor:
    """The reference, and the path for any device."""
    y = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, EPS)
    return x + F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2)


def residual_mlp(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor,
                 bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """x + fc2(gelu(fc1(norm(x)))) for the last dimension of x.

    x: (..., C). norm_weight, norm_bias, bias2: (C). weight1: (hidden, C), bias1: (hidden).
    weight2: (C, hidden).
    Returns (..., C).

    The Triton kernel takes bfloat16 of at most 256 channels, without gradients, where it is the
    fastest; everything else goes the PyTorch path.
    Raises ValueError for shapes that do not fit each other.
    """
    tensors = (x, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    check(*tensors)
    if not switch.runs_triton(x) or choice.trains(tensors) or not kernel_takes(*tensors):
        return torch_path(*tensors)
    hidden, C = weight1.shape
    kind = (f"{C} channels, {hidden} hidden, {switch.NUMBERS[x.dtype]}, "
            f"2^{choice.bucket(x.numel() // C)} tokens")
    ways = triton_tiles.ways(triton_path, ("mlp",), x, "matmul") | {"PyTorch": torch_path}
    return choice.call("residual_mlp", kind, ways, tensors, {})


def check(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor, bias1: Tensor,
          weight2: Tensor, bias2: Tensor) -> None:
    """Raises ValueError with a sentence that names what is wrong and its value."""
    C = x.shape[-1]
    hidden = len(weight1)
    expected = dict(norm_weight=(C,), norm_bias=(C,), weight1=(hidden, C), bias1=(hidden,),
                    weight2=(C, hidden), bias2=(C,))
    given = dict(norm_weight=norm_weight, norm_bias=norm_bias, weight1=weight1, bias1=bias1,
                 weight2=weight2, bias2=bias2)
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"residual_mlp: {name} has shape {tuple(given[name].shape)}, "
                             f"{C} channels and {hidden} hidden ones need {shape}")


def kernel_takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether there is a Triton kernel for this width and these dtypes."""
    return x.shape[-1] <= 256 and all(t.dtype == torch.bfloat16 for t in (x, *weights))


@torch.library.custom_op("drc::residual_mlp", mutates_args=())
def mlp_op(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor, bias1: Tensor,
           weight2: Tensor, bias2: Tensor, variant: str) -> Tensor:
    """`residual_mlp` by the Triton kernel."""
    from kernels import triton_mlp
    weights = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    return triton_mlp.forward(x, weights, variant)


@mlp_op.register_fake
def fake_forward(x, *others):
    return x.new_empty(x.shape)


def triton_path(*tensors: Tensor, variant: str) -> Tensor:
    """`residual_mlp` by the Triton kernel; variant: one of triton_tiles.VARIANTS."""
    return mlp_op(*tensors, variant)
