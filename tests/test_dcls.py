"""DCLS alone: the estimated blur kernel, the deconvolution with it, and who trains what."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import dual
import models
from backbones.dcls import DCLS, deconvolve
from tiny import difference, fill, golden, golden_channels, parameters, rule, tiny_dcls

GOLDEN_DCLS = golden("dcls")


# ---- it is the authors' network -----------------------------------------------------------------
@pytest.mark.parametrize("name, channels", [
    ("dcls_x4", None), ("dcls_drc_x4", golden_channels("DCLS_prune03"))])
def test_dcls_is_the_authors(name, channels):
    expected = GOLDEN_DCLS[name]
    model = fill(models.build("dcls", 4, channels), gain=0.3)
    back = fill(dual.make_duals(model)[0], "dual_model.", 0.3).double()
    assert parameters(model) == expected["params"]
    assert parameters(back) == expected["dual_params"]
    assert len(model.state_dict()) == expected["names"]
    assert len(model.pairs()) == 57
    low = rule.image(0, 1, 24, 24)
    with torch.no_grad():
        assert difference(model.estimate(low), expected["cases"][0]["kernel"]) < 5e-6
    model.double()               # the deconvolution divides by numbers down to 1e-14
    for case in expected["cases"]:
        x = rule.image(case["seed"], case["n"], case["h"], case["w"]).double()
        with torch.no_grad():
            out = model(x)
            small = back(out.images[4])
        assert difference(out.images[4], case["sr"]) < 1e-9
        assert difference(out.kernel, case["kernel"]) < 1e-9
        assert difference(small, case["sr2lr"]) < 1e-9


def test_dcls_x2_has_its_own_kernel():
    model, duals = tiny_dcls(2)
    x = rule.image(1, 2, 12, 9)
    out = model(x)
    assert out.images[2].shape == (2, 3, 24, 18)
    assert model.kernel_size == 11                               # of filters 7, 3, 3, 1
    assert out.kernel.shape == (2, 1, 11, 11)
    assert torch.allclose(out.kernel.sum((1, 2, 3)), torch.ones(2))
    assert duals[0](out.images[2]).shape == x.shape


def test_dcls_x2_differs_from_x4_in_its_filters_and_one_enlargement():
    with torch.device("meta"):
        x2 = parameters(models.build("dcls", 2))
        x4 = parameters(models.build("dcls", 4))
    filters_x4 = 3*16*11**2 + 16*16*9**2 + 16*16*7**2 + 16*16*5**2 + 16*3*3**2
    filters_x2 = 3*16*7**2 + 16*16*3**2 + 16*16*3**2 + 16*3*1**2
    enlargement = (64*9 + 1) * 256
    assert x4 - x2 == 257 * (filters_x4 - filters_x2) + enlargement       # 256 latents, one bias


# ---- the kernel ---------------------------------------------------------------------------------
def test_every_image_has_its_own_kernel_and_a_given_one_is_used():
    model, _ = tiny_dcls()
    x = rule.image(2, 2, 9, 12)
    out = model(x)
    assert torch.equal(model.estimate(x), out.kernel)
    assert torch.allclose(model.estimate(x[1:]), out.kernel[1:], rtol=1e-4)
    assert not torch.allclose(out.kernel[0], out.kernel[1], rtol=1e-3)
    assert torch.equal(model(x, out.kernel).images[4], out.images[4])
    swapped = model(x, out.kernel.flip(0))
    assert torch.equal(swapped.kernel, out.kernel.flip(0))
    assert not torch.equal(swapped.images[4], out.images[4])


def test_images_do_not_train_the_estimator():
    model, _ = tiny_dcls()
    out = model(rule.image(3, 1, 8, 8))
    out.images[4].sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.Estimator.parameters())
    assert all(p.grad is not None for p in model.Restorer.parameters())
    dual.blind_loss(out.kernel, torch.zeros_like(out.kernel)).backward()
    assert all(p.grad is not None for p in model.Estimator.parameters())


@pytest.mark.parametrize("size", [(6, 9), (9, 6), (1, 1)])
def test_too_small_an_image_for_dcls_is_refused(size):
    height, width = size
    model, _ = tiny_dcls()
    x = torch.rand(1, 3, height, width)
    sentence = f"image of {width}x{height} pixels: give at least 7x7"
    with pytest.raises(ValueError, match=sentence):
        model(x)
    with pytest.raises(ValueError, match=sentence):
        model(x, torch.ones(1, 1, 31, 31) / 31**2)
    with pytest.raises(ValueError, match=sentence):
        model.estimate(x)
    assert model(torch.rand(1, 3, 7, 7)).images[4].shape == (1, 3, 28, 28)


# ---- the deconvolution --------------------------------------------------------------------------
def transfer_function(kernel, shape):
    """The complex spectrum of a (k, k) kernel whose centre is put at the origin of a torus."""
    wrapped = np.zeros(shape)
    centre = len(kernel) // 2
    for i in range(len(kernel)):
        for j in range(len(kernel)):
            wrapped[(i - centre) % shape[0], (j - centre) % shape[1]] += kernel[i, j]
    return np.fft.fft2(wrapped)


def deconvolve_one_channel(x, kernel, prior):
    """deconvolve by complex transforms: x (h, w), kernel (k, k), prior (p, p)."""
    k = len(kernel)
    padded = np.pad(x, k, "edge")
    blur = transfer_function(kernel, padded.shape)
    penalty = transfer_function(prior, padded.shape)
    spectrum = np.conj(blur) * np.fft.fft2(padded) / (abs(blur) ** 2 + abs(penalty) ** 2)
    return np.fft.ifft2(spectrum).real[k:-k, k:-k]


@pytest.mark.parametrize("height, width, k", [(10, 13, 5), (9, 8, 31), (7, 7, 11)])
def test_deconvolution_equals_a_loop_over_channels(height, width, k):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    kernel = torch.randn(2, 1, k, k, dtype=torch.float64)
    prior = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    z = deconvolve(x, kernel, prior).numpy()
    for n in range(2):
        for c in range(3):
            expected = deconvolve_one_channel(x[n, c].numpy(), kernel[n, 0].numpy(),
                                              prior[n, c].numpy())
            assert np.abs(z[n, c] - expected).max() < 1e-10 * np.abs(expected).max()
    assert deconvolve(x.float(), kernel.float(), prior.float()).dtype == torch.float32


def test_deconvolution_has_the_right_gradient():
    shapes = [(1, 2, 4, 4), (1, 1, 5, 5), (1, 2, 3, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(deconvolve, inputs)


def test_deconvolution_undoes_a_blur():
    """Of an image whose borders are constant: there, repeating the last pixel is exact."""
    x = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    x[..., 18:22, 17:23] = torch.rand(4, 6, dtype=torch.float64)
    kernel = data.blind_kernels(1, 11, torch.Generator().manual_seed(1)).double()
    blurred = F.conv2d(x, kernel.flip(2, 3), padding=5)
    prior = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    prior[..., 1, 1] = 1e-6
    error = (deconvolve(blurred, kernel, prior) - x).abs().max()
    assert error < 0.02 < (blurred - x).abs().max()


# ---- the start of training, and bfloat16 --------------------------------------------------------
def test_dcls_starts_near_interpolation_with_a_narrow_kernel():
    model = DCLS("dcls", 4, (11, 9, 7, 5, 3), blocks=1)
    x = F.avg_pool2d(rule.image(3, 1, 96, 96), 4)                # smooth
    enlarged = F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)

    def error(image):
        inside = slice(8, -8)
        return (image - enlarged)[..., inside, inside].abs().mean()

    with torch.no_grad():
        before = error(model(x).images[4])
        model.start_from_interpolation()
        out = model(x)
    assert error(out.images[4]) < before / 20
    kernel = out.kernel[0, 0]
    place = torch.arange(31.) - 15
    variance = (kernel * (place[:, None] ** 2 + place ** 2) / 2).sum()
    assert 0.3 < variance < 1.2
    assert kernel.max() == kernel[15, 15]


def test_bfloat16_dcls_keeps_kernel_deconvolution_and_last_layer():
    model, _ = tiny_dcls()
    fast = models.inference(model, "bf16")
    restorer = fast.Restorer
    for layer in (fast.Estimator.dec[0], restorer.head2.reduce_feature, restorer.upscale[4]):
        assert layer.weight.dtype == torch.float32
    assert restorer.body[0].body[0].body1[0].weight.dtype == torch.bfloat16
    x = rule.image(1, 1, 12, 12)
    out = fast(x)
    assert out.images[4].dtype == out.kernel.dtype == torch.float32
    # Not even the weights of the estimator are rounded.
    assert torch.allclose(out.kernel, model(x).kernel, rtol=1e-4)
    exact = models.inference(model)(x).images[4]
    assert 0 < (out.images[4] - exact).abs().mean() < 0.02
