"""Whole networks compute the same with the Triton kernels as with PyTorch."""
import pytest
import torch

import kernels
import models
from kernels import pixel_shuffle
from tiny import difference, fill, golden, golden_channels, rule, tiny_dat, tiny_drn, tiny_swinir
from triton_path import DEVICE, GPU, attention, chosen_triton, coarse_tiles, needs_triton

GOLDEN = golden("swinir") | golden("dat")


@pytest.fixture
def triton():
    """The Triton path with large tiles where it is interpreted."""
    with chosen_triton(), coarse_tiles():
        yield


@pytest.fixture
def calls(monkeypatch):
    """The names of the Triton operations that were called."""
    seen = []

    def watch(module, name, label):
        operation = getattr(module, name)

        def spy(*arguments):
            seen.append(label)
            return operation(*arguments)

        monkeypatch.setattr(module, name, spy)

    watch(pixel_shuffle, "conv_shuffle_op", "conv")
    watch(attention, "window_attention_op", "attention")
    return seen


def image_and_gradients(model, low) -> list:
    """The upscaled image, and the gradient of its sum of squares for every parameter, or None."""
    image = model(low).images[4]
    parameters = list(model.parameters())
    return [image, *torch.autograd.grad(image.square().sum(), parameters, allow_unused=True)]


@needs_triton
@pytest.mark.parametrize("tiny, convolutions, attentions", [
    (tiny_drn, 2, 0),                    # two steps of upsampling
    (tiny_swinir, 1, 4),                 # four layers of attention
    (tiny_dat, 1, 2),                    # two of four layers attend in windows, one launch for both
])
def test_networks_are_the_same_with_the_kernels(tiny, convolutions, attentions, triton, calls):
    """Forward and backward; and the kernels are what is called."""
    model = tiny()[0].eval().to(DEVICE)
    low = rule.image(1, 1, 8, 9).to(DEVICE)
    kernels.choose("torch")
    plain = image_and_gradients(model, low)
    assert calls == []
    kernels.choose("triton")
    fused = image_and_gradients(model, low)
    assert calls.count("conv") == convolutions
    assert calls.count("attention") == attentions
    for a, b in zip(plain, fused):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-3 * a.norm() + 1e-4


@needs_triton
def test_golden_outputs_of_a_pruned_and_padded_network_hold_with_the_kernels(triton, calls):
    """SwinIR-light as the authors pruned it, its heads of 6 to 10 channels padded to 16."""
    expected = GOLDEN["swinir_light_drc_x4"]
    channels = golden_channels("swinir_light_drc_channel_config")
    model = fill(models.build("swinir_light", 4, channels)).eval().requires_grad_(False)
    model.pad()
    case = expected["cases"][0]
    low = rule.image(case["seed"], case["n"], case["h"], case["w"]).to(DEVICE)
    image = model.to(DEVICE)(low).images[4]
    assert calls.count("attention") == 24
    assert difference(image.cpu(), case["sr"]) < 1e-4


@pytest.mark.skipif(not GPU, reason="whole networks take the interpreter too long")
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs_hold_with_the_kernels(name, triton):
    arch, scale = name.replace("_drc", "").rsplit("_x", 1)
    model = fill(models.build(arch, int(scale), GOLDEN[name].get("channels")))
    model = model.eval().to(DEVICE)
    for case in GOLDEN[name]["cases"]:
        low = rule.image(case["seed"], case["n"], case["h"], case["w"]).to(DEVICE)
        with torch.no_grad():
            image = model(low).images[int(scale)]
        assert difference(image.cpu(), case["sr"]) < 1e-3
