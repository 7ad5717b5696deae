"""Hidden widths padded with zeros: the same outputs and gradients, for GPUs only."""
import copy

import pytest
import torch
from torch import nn

import models
from backbones import base, dat, swinir
from kernels import heads
from tiny import (
    DRN,
    difference,
    fill,
    golden,
    golden_channels,
    rule,
    tiny_dat,
    tiny_dcls,
    tiny_drn,
    tiny_swinir,
)


def narrow(tiny, less: int):
    """A small network with `less` channels (of a head) fewer in every pair, golden weights."""
    dense = tiny()[0]
    widths = {pair.name: (pair.width - less) * pair.heads for pair in dense.pairs()}
    if isinstance(dense, DRN):
        return fill(dense.with_widths(widths))
    return tiny(widths=widths)[0]


NETWORKS = {
    "drn": lambda: narrow(tiny_drn, 3),
    "swinir": lambda: tiny_swinir()[0],              # heads of 6 channels
    "swinir_pruned": lambda: narrow(tiny_swinir, 1),
    "dat": lambda: tiny_dat()[0],                    # heads of 8 channels
    "dcls": lambda: narrow(tiny_dcls, 3),
}


def prepared(model, padded: bool, dtype: torch.dtype):
    """A copy as models.inference makes it for a GPU, or for a CPU."""
    model = copy.deepcopy(model).eval().to(dtype).requires_grad_(False)
    model.fold()
    if padded:
        model.pad()
    return model


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("name", NETWORKS)
def test_padding_leaves_the_output_as_it_is(name, dtype, allowed):
    model = NETWORKS[name]()
    if name == "dcls":               # with golden weights its kernel is a number divided by about 0
        model.start_from_interpolation()
    x = rule.image(1, 1, 16, 24).to(dtype)
    plain = prepared(model, False, dtype)(x).images
    padded = prepared(model, True, dtype)(x).images
    for scale in plain:
        assert (plain[scale] - padded[scale]).abs().max() < allowed


@pytest.mark.parametrize("name", NETWORKS)
def test_padded_layers_have_the_widths_that_gpus_like(name):
    model = prepared(NETWORKS[name](), True, torch.float32)
    changed = 0
    for pair in model.pairs():
        if pair.norm or pair.name.endswith("shuffle"):           # neither is padded
            continue
        for layer, _ in pair.producers:
            rows = model.get_submodule(layer).weight.shape[0]
            groups = 3 * pair.heads if pair.heads > 1 else 1
            assert rows % (8 * groups) == 0, layer
            assert pair.heads == 1 or rows // groups in (16, 32), layer
            changed += rows != pair.width * groups
    attentions = [m for m in model.modules() if isinstance(m, dat.AdaptiveSpatialAttention)]
    for attention in attentions:
        assert attention.qkv.out_features == 3 * attention.heads * 16
    assert changed or attentions
    for module in model.modules():                               # the sizes that layers tell
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def test_a_pair_with_a_norm_stays():
    """A LayerNorm divides by the number of channels: zeros would change it."""
    model = prepared(tiny_dat(widths=[30] * 4)[0], True, torch.float32)
    assert all(block.ffn.fc2.in_features == 30 for block in model.layers[0].blocks)


def test_pruned_networks_of_the_authors_stay_the_same():
    expected = golden("drn")["drn_s_x4_p03"]
    model = fill(models.build("drn_s", 4, golden_channels("search_x4p03")))
    case = expected["cases"][0]
    x = rule.image(case["seed"], case["n"], case["h"], case["w"])
    images = prepared(model, True, torch.float32)(x).images
    for scale, summary in zip(sorted(images), case["sr"], strict=True):
        assert difference(255 * images[scale], summary) < 1e-5


def test_inference_pads_a_copy_and_for_gpus_only(monkeypatch):
    padded = []
    monkeypatch.setattr(base, "pad_pairs", padded.append)
    monkeypatch.setattr(base.Backbone, "to", lambda self, *_, **__: self)        # there is no GPU
    model = tiny_swinir()[0]
    models.inference(model)
    models.inference(model, device="cpu")
    assert padded == []
    fast = models.inference(model, device="cuda")
    assert padded == [fast]
    assert fast is not model
    assert fast.widths == model.widths


# ---- in training: in the layers -----------------------------------------------------------------
@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_gradients_of_padded_layers(tiny, monkeypatch):
    """The layers around the attention pad in each pass; here as they do on a GPU."""
    model = tiny()[0].double().train()
    x = rule.image(1, 2, 9, 8).double()                          # BatchNorm wants several

    def results():
        parameters = list(model.parameters())
        image = model(x).images[4]
        return [image, *torch.autograd.grad(image.square().sum(), parameters, allow_unused=True)]

    plain = results()
    widths = []

    def wanted_width(d, x):
        widths.append(heads.head_width(d))
        return widths[-1]

    for module in (swinir, dat):
        monkeypatch.setattr(module, "wanted_width", wanted_width)
    padded = results()
    assert set(widths) == {16}
    for a, b in zip(plain, padded, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).norm() <= 1e-12 * (1 + a.norm())


# ---- the parts ----------------------------------------------------------------------------------
def test_head_widths():
    assert [heads.head_width(d) for d in (1, 16, 17, 30, 32, 33)] == [16, 16, 32, 32, 32, 33]


def test_zeros_come_behind_each_group_and_go_again():
    x = torch.arange(1, 7).view(1, 6)
    padded = heads.pad_groups(x, 1, 2, 4)
    assert padded.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0]]
    assert heads.pad_groups(x, -1, 2, 4).tolist() == padded.tolist()
    assert heads.pad_groups(x.t(), 0, 3, 3)[:, 0].tolist() == [1, 2, 0, 3, 4, 0, 5, 6, 0]
    assert torch.equal(heads.cut_groups(padded, 2, 3), x)
    assert heads.pad_groups(x, 1, 2, 3) is x
    assert heads.cut_groups(x, 2, 3) is x
