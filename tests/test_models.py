"""The backbones are the authors': parameter counts, state-dict names and outputs; and ours: widths, steps, folding."""
import ast

import pytest
import torch
from conftest import GOLDEN, ROOT, difference, fill, golden, rule, tiny_drn

import dual
import models

DRN = golden("drn")


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


def test_published_parameter_counts():
    counts = {("drn_s", 4): 4_804_065, ("drn_l", 4): 9_825_893, ("drn_s", 8): 5_403_000, ("drn_l", 8): 10_004_018}
    for (arch, scale), count in counts.items():
        assert sum(p.numel() for p in models.build(arch, scale).parameters()) == count


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
def test_any_size(size):
    out = tiny_drn()[0](torch.rand(2, 3, *size))
    assert {s: x.shape for s, x in out.images.items()} == {s: (2, 3, s * size[0], s * size[1]) for s in (1, 2, 4)}


def test_steps_are_the_forward_pass_cut_at_the_consumers():
    model, _ = tiny_drn(blocks=2)
    x, pairs, steps = torch.rand(1, 3, 6, 5), model.pairs(), model.steps()
    assert len(steps) == len(pairs) + 1
    state = steps[0](model.begin(x))
    for pair, step in zip(pairs, steps[1:]):
        seen = []
        (layer, columns), = pair.consumers
        hook = model.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
        before, state = state["x"], step(state)
        hook.remove()
        assert len(columns) == pair.width == before.shape[1] and seen[0] is before   # a step begins with its consumer
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


def test_starts_as_bicubic():
    model = models.build("drn_s", 4)
    x = rule.image(3, 1, 12, 12)
    enlarged = torch.nn.functional.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)
    before = (model(x).images[4] - enlarged).abs().mean()
    model.start_from_interpolation()
    assert (model(x).images[4] - enlarged).abs().mean() < before / 8


def test_bfloat16_keeps_the_layers_that_form_the_image():
    fast = models.inference(tiny_drn()[0], "bf16")
    assert fast.tail[2].weight.dtype == fast.sub_mean.weight.dtype == fast.add_mean.weight.dtype == torch.float32
    assert fast.head.weight.dtype == fast.up_blocks[0][0].body[0].weight.dtype == torch.bfloat16
    x = rule.image(1, 1, 8, 8)
    image = fast(x).images[4]
    assert image.dtype == torch.float32
    assert 0 < (image - models.inference(tiny_drn()[0])(x).images[4]).abs().max() < 0.02


# ---- widths and what is refused
def test_widths_as_list_and_as_names_agree():
    dense = models.build("drn_s").widths
    assert len(dense) == 64 and list(dense)[:3] == ["down0", "down1", "up0.rcab0"]
    some = models.build("drn_s", 4, {"up0.rcab12": 20})
    assert some.widths == {**dense, "up0.rcab12": 20}
    assert models.build("drn_s", 4, list(some.widths.values())).widths == some.widths


@pytest.mark.parametrize("arguments, sentence", [
    (("drn_m",), "unknown arch 'drn_m': choose one of drn_s, drn_l"),
    (("drn_s", 3), "drn_s has no scale 3: choose one of 4, 8"),
    (("drn_s", 4, [4] * 63), "63 channel numbers were given, this network has 64"),
    (("drn_s", 4, {"up0.rcab0": 65}), "up0.rcab0 keeps 65 channels, it must keep 1 to 64"),
    (("drn_s", 4, {"up0.rcab0": 0}), "up0.rcab0 keeps 0 channels"),
    (("drn_s", 4, {"rcab0": 4}), "no prunable width is called 'rcab0'"),
])
def test_build_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        models.build(*arguments)


def test_load_state_unwraps_drops_and_splits():
    model, _ = tiny_drn()
    state = {**model.state_dict(), "dual_model.dual_module.1.weight": torch.ones(3),
             "layers.0.attn_mask": torch.ones(1), "x.relative_position_index": torch.ones(1)}
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
