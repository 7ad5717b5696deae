"""The training loop: bfloat16 where it pays, and batches in parts."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fitting
from settings import Settings
from tiny import blind_batch, native_loss, pooled_batch, tiny_dat, tiny_dcls, tiny_drn, tiny_swinir

ONCE = Settings(betas=(0.9, 0.999))


def one_step(settings: Settings, model, duals, batch) -> list[torch.Tensor]:
    """The gradients of the only step of `fitting.fit` on this batch."""
    def repeat(stage, steps, one_step, batches, parts):
        one_step(0, batch)

    fitting.fit(SimpleNamespace(repeat=repeat), "train", settings, model, duals, 1, 1e-4,
                native_loss(duals, model.rgb_range), None)
    return [p.grad for p in model.parameters()]


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    batch = pooled_batch(1, 5, 8)
    whole = one_step(ONCE, *tiny_drn(), batch)
    parts = one_step(replace(ONCE, accumulate=3), *tiny_drn(), batch)          # 2 + 2 + 1
    for a, b in zip(whole, parts):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


def test_parts_keep_the_order_and_the_kernels():
    batch = blind_batch(0)
    batch = type(batch)({s: x.repeat(3, 1, 1, 1) for s, x in batch.images.items()},
                        torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 31, 31))
    parts = fitting.divided(batch, 2)
    assert [len(part.images[4]) for part in parts] == [2, 1]
    assert parts[0].kernel[:, 0, 0, 0].tolist() == [0, 1]
    assert parts[1].kernel[:, 0, 0, 0].tolist() == [2]


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat, tiny_dcls])
def test_bf16_rounds_products_but_neither_weights_nor_images(tiny):
    """The image is near the one of float32, but not the same: the products were rounded."""
    model, _ = tiny()
    low = pooled_batch(2, 1, 16).images[1]
    with torch.no_grad():
        exact = model(low).images[4]
        with fitting.autocast(replace(ONCE, precision="bf16"), low.device):
            rounded = model(low).images[4]
        with fitting.autocast(ONCE, low.device):
            same = model(low).images[4]
    assert rounded.dtype == torch.float32
    assert torch.equal(exact, same)
    away = (rounded - exact).abs().max().item()
    assert 0 < away < 0.03 * exact.abs().max().item()


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat])
def test_the_trunk_stays_float32_under_bf16(tiny):
    """What enters the layers that form the image is a sum along the trunk."""
    model, _ = tiny()
    seen = []
    layer = model.get_submodule(model.feature or model.float32[0])
    layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    first = model.head if hasattr(model, "head") else model.conv_first
    first.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with fitting.autocast(replace(ONCE, precision="bf16"), torch.device("cpu")):
        model(pooled_batch(2, 1, 16).images[1])
    assert seen == [torch.float32] * len(seen)
    assert len(seen) >= 2


def test_gradients_under_bf16_are_those_of_float32_up_to_rounding():
    batch = pooled_batch(1, 2, 8)
    exact = torch.cat([g.flatten() for g in one_step(ONCE, *tiny_swinir(), batch)])
    settings = replace(ONCE, precision="bf16")
    rounded = torch.cat([g.flatten() for g in one_step(settings, *tiny_swinir(), batch)])
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()
