"""The four networks are the authors', and each keeps the contract of backbones/base.py.

What DCLS alone has, a kernel estimator and a deconvolution, is tested in test_dcls.py.
"""
import importlib
import inspect
from functools import partial
from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dual
import models
from backbones import dat
from backbones.base import Backbone, DropPath, Upsample, interpolate, pass_on
from backbones.swinir import pad_to_multiple
from tiny import (
    GOLDEN,
    ROOT,
    difference,
    fill,
    golden,
    golden_channels,
    parameters,
    rule,
    tiny_dat,
    tiny_dcls,
    tiny_drn,
    tiny_swinir,
)

DRN = golden("drn")
TRANSFORMERS = golden("swinir") | golden("dat")
TINY = [tiny_drn, tiny_swinir, tiny_dat, tiny_dcls]


# ---- they compute what the authors' code computes -----------------------------------------------
def golden_network(name: str):
    """The network of an entry such as "drn_s_x4_p03" or "swinir_light_drc_x4", golden weights."""
    arch, _, rest = name.partition("_x")
    channels = None
    if "_p" in rest:
        channels = golden_channels("search_x" + rest.replace("_", ""))
    if arch.endswith("_drc"):
        channels = golden_channels(f"{arch}_channel_config")
    model = models.build(arch.removesuffix("_drc"), int(rest[0]), channels)
    return fill(model).eval()


def test_every_released_channel_file_is_used_by_a_golden_network():
    files = {file.stem for file in (GOLDEN / "channels").iterdir()}
    pruned = {f"search_x{name[7:].replace('_', '')}" for name in DRN if "_p" in name}
    assert files == pruned | {"swinir_light_drc_channel_config", "DCLS_prune03"}


@pytest.mark.parametrize("name", DRN)
def test_drn_is_the_authors(name):
    expected = DRN[name]
    model = golden_network(name)
    duals = fill(dual.make_duals(model))
    assert parameters(model) == expected["params"]
    assert parameters(duals) == expected["dual_params"]
    assert len(model.state_dict()) == expected["names"]
    fast = models.inference(model)
    for case in expected["cases"]:
        x = rule.image(case["seed"], case["n"], case["h"], case["w"])
        with torch.no_grad():
            images = model(x).images
            folded = fast(x).images
            back = [d(255 * images[d.src]) for d in duals]
        for scale, summary in zip(sorted(images), case["sr"], strict=True):
            assert difference(255 * images[scale], summary) < 1e-5
            assert difference(255 * folded[scale], summary) < 1e-5   # the fold is exact
        for image, summary in zip(back, case["sr2lr"], strict=True):
            assert difference(image, summary) < 1e-5


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_is_the_authors(name):
    expected = TRANSFORMERS[name]
    model = golden_network(name)
    back = fill(dual.make_duals(model)[0], "dual_model.")
    assert parameters(model) == expected["params"]
    assert len(model.state_dict()) == expected["names"]
    fast = models.inference(model)
    for case in expected["cases"]:
        x = rule.image(case["seed"], case["n"], case["h"], case["w"])
        with torch.no_grad():
            image = model(x).images[model.scale]
            folded = fast(x).images[model.scale]
            small = back(image)
        assert difference(image, case["sr"]) < 1e-5
        assert difference(folded, case["sr"]) < 1e-5                 # BatchNorm folded
        if model.scale == 3:
            continue         # the release's ×3 dual halves the image: its output has another size
        assert parameters(back) == expected["dual_params"]
        assert difference(small, case["sr2lr"]) < 1e-5


# ---- the contract -------------------------------------------------------------------------------
def our_module_classes() -> list[type]:
    """All nn.Module classes that files of this project define (tests aside)."""
    files = sorted((ROOT / "backbones").glob("*.py"))
    names = [f"backbones.{file.stem}" for file in files if file.stem != "__init__"]
    result = []
    for name in [*names, "dual"]:
        for _, cls in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if issubclass(cls, nn.Module) and cls.__module__ == name:
                result.append(cls)
    return result


@pytest.mark.parametrize("cls", our_module_classes(), ids=lambda cls: cls.__name__)
def test_every_module_of_the_project_has_a_forward(cls):
    missing = nn.Module.forward                     # what a class inherits that defines none
    assert cls.forward is not missing, f"{cls.__name__} cannot be called"


def test_a_backbone_without_pairs_cannot_be_made():
    class Half(Backbone):
        def forward(self, low):
            return low

    with pytest.raises(TypeError, match="hidden_widths.*pairs"):
        Half(dict(arch="half", scale=2), None)


@pytest.mark.parametrize("tiny", TINY)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (9, 33)])
def test_any_size(tiny, size):
    height, width = size
    if tiny is tiny_dcls:                            # its smallest image is 7×7, see test_dcls.py
        height, width = height + 6, width + 6
    model, _ = tiny()
    images = model(torch.rand(2, 3, height, width)).images
    assert list(images) == ([1, 2, 4] if tiny is tiny_drn else [4])
    for scale, image in images.items():
        assert image.shape == (2, 3, scale * height, scale * width)
        assert image.isfinite().all()


def events(model, names) -> list[tuple[str, str]]:
    """("enter" or "leave", name) of the modules named, in the order of one forward pass."""
    seen = []
    hooks = []
    for name in names:
        module = model.get_submodule(name)
        enter = partial(note, seen, ("enter", name))
        leave = partial(note, seen, ("leave", name))
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))
    with torch.no_grad():
        model(torch.rand(1, 3, 8, 9))
    for hook in hooks:
        hook.remove()
    return seen


def note(seen: list, event: tuple, *_) -> None:
    seen.append(event)


@pytest.mark.parametrize("tiny", TINY)
def test_the_forward_pass_reaches_pairs_in_order_each_within_its_block(tiny):
    """What selection relies on: a hook at the consumers sees them, a hook at the block ends it."""
    model, _ = tiny()
    pairs = model.pairs()
    consumers = [layer for pair in pairs for layer, _ in pair.consumers]
    blocks = {pair.block for pair in pairs}
    seen = events(model, [*blocks, *consumers])
    assert [name for kind, name in seen if kind == "leave" and name in consumers] == consumers
    for pair in pairs:
        enter = seen.index(("enter", pair.block))
        leave = seen.index(("leave", pair.block))
        assert seen.count(("enter", pair.block)) == 1
        for layer, _ in pair.consumers:
            assert enter < seen.index(("enter", layer)) < leave
        for layer, _ in (*pair.producers, *pair.consumers):
            assert layer.startswith(f"{pair.block}.")


@pytest.mark.parametrize("tiny", TINY)
def test_a_block_is_finished_before_the_next_begins(tiny):
    """Replay freezes a block after its last pair: no later pair may lie in it or before it."""
    model, _ = tiny()
    blocks = [block for block, _ in groupby(model.pairs(), lambda pair: pair.block)]
    assert len(set(blocks)) == len(blocks)
    for k, block in enumerate(blocks):
        assert not any(later.startswith(f"{block}.") for later in blocks[k + 1:])
    seen = events(model, blocks)
    assert [name for kind, name in seen if kind == "leave"] == blocks


@pytest.mark.parametrize("tiny", TINY)
def test_tables_of_a_pair_name_every_row_and_column_once(tiny):
    model, _ = tiny()
    pairs = model.pairs()
    assert [pair.name for pair in pairs] == list(model.widths)
    for pair in pairs:
        assert pair.width * pair.heads == model.widths[pair.name]
        for layer, rows in pair.producers:
            weight = model.get_submodule(layer).weight
            assert len(rows) == pair.width
            assert rows.flatten().sort().values.equal(torch.arange(len(weight)))
        for layer, columns in pair.consumers:
            weight = model.get_submodule(layer).weight
            assert len(columns) == pair.width
            assert columns.flatten().sort().values.equal(torch.arange(weight.shape[1]))


def test_a_channel_of_each_kind_of_pair():
    """Which rows and columns channel 1 is, by hand."""
    drn, swinir, dat = (tiny()[0] for tiny in (tiny_drn, tiny_swinir, tiny_dat))
    chosen = {pair.name: pair for model in (drn, swinir, dat) for pair in model.pairs()}

    def channel_1(name):
        pair = chosen[name]
        tables = (*pair.producers, *pair.consumers)
        return {layer.rpartition(f"{pair.block}.")[2]: at[1].tolist() for layer, at in tables}

    assert channel_1("up0.rcab0") == {"body.0": [1], "body.2": [1]}
    assert channel_1("up0.shuffle") == {"1.0": [4, 5, 6, 7], "2": [1]}        # PixelShuffle(2)
    # SwinIR with 2 heads of 6 channels: q is 0..11, k is 12..23, v is 24..35.
    qkv = [1, 7, 13, 19, 25, 31]
    assert channel_1("group1.block0.attn") == {"attn.qkv": qkv, "attn.proj": [1, 7]}
    # DAT with x1 in 0..31 and x2 in 32..63: x1[1] is multiplied by the gate of x2[1].
    gate = {"ffn.fc1": [1, 33], "ffn.sg.norm": [1], "ffn.sg.conv": [1], "ffn.fc2": [1]}
    assert channel_1("group0.block2.ffn") == gate
    assert chosen["group0.block2.ffn"].norm == "layers.0.blocks.2.ffn.sg.norm"


@pytest.mark.parametrize("tiny", TINY)
def test_with_widths_is_a_network_of_the_same_kind(tiny):
    model, _ = tiny()
    wanted = {pair.name: pair.heads * (pair.width // 2) for pair in model.pairs()}
    smaller = model.with_widths(wanted)
    assert type(smaller) is type(model)
    assert smaller.config == model.config
    assert smaller.widths == wanted
    assert parameters(smaller) < parameters(model)
    assert smaller.with_widths(None).widths == model.widths


@pytest.mark.parametrize("tiny", TINY)
def test_the_blind_network_and_no_other_estimates_a_blur_kernel(tiny):
    model, _ = tiny()
    low = torch.rand(2, 3, 9, 8)
    if tiny is tiny_dcls:
        side = model.kernel_size
        assert side > 0
        assert model.estimate(low).shape == (2, 1, side, side)
        return
    assert model.kernel_size == 0
    with pytest.raises(NotImplementedError, match=f"{model.arch} is not blind: it estimates no"):
        model.estimate(low)


# ---- shared layers ------------------------------------------------------------------------------
def test_upsample_is_its_layers_one_after_another():
    up = Upsample((4, 5, 3), (5, 3, 2))
    x = torch.randn(2, 4, 5, 3)
    assert up(x).shape == (2, 3, 30, 18)
    assert torch.allclose(up(x), nn.Sequential.forward(up, x), atol=1e-6)


@pytest.mark.parametrize("r", [2, 3])
def test_interpolation_is_exact_on_parabolas(r):
    """A pixel centre y of the large image lies at (y + ½)/r − ½ in the small one."""
    def parabola(y, x):
        return 0.3 + 0.2 * y - 0.05 * x + 0.02 * y * y - 0.01 * x * x + 0.03 * x * y

    small = torch.arange(8.)
    large = (torch.arange(8. * r) + 0.5) / r - 0.5
    layer = nn.Conv2d(3, 3 * r * r, 3, padding=1)
    with torch.no_grad():
        interpolate(layer, r)
        low = parabola(small[:, None], small).expand(1, 3, 8, 8)
        high = F.pixel_shuffle(layer(low), r)
    wanted = parabola(large[:, None], large).expand_as(high)
    inside = slice(r, -r)                            # at the border the convolution pads with zeros
    assert torch.allclose(high[..., inside, inside], wanted[..., inside, inside], atol=1e-5)


def test_pass_on_copies_the_first_channels():
    layer = nn.Conv2d(5, 4, 3, padding=1)
    with torch.no_grad():
        pass_on(layer)
    x = torch.rand(1, 5, 6, 6)
    assert torch.equal(layer(x)[:, :3], x[:, :3])


def test_padding_reflects_and_repeats_where_there_is_too_little():
    x = torch.arange(30.).view(1, 1, 5, 6)
    padded = pad_to_multiple(x, 8)
    assert padded.shape == (1, 1, 8, 8)
    assert torch.equal(padded[..., :5, :6], x)
    assert padded[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 4, 3]
    assert padded[0, 0, :, 0].tolist() == [0, 6, 12, 18, 24, 18, 12, 6]
    narrow = pad_to_multiple(x[..., :4], 8)
    assert narrow[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    fits = x.new_zeros(1, 3, 8, 16)
    assert pad_to_multiple(fits, 8).shape == fits.shape


# ---- stochastic depth ---------------------------------------------------------------------------
def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    layer = DropPath(depth=1)
    layer.rate = 0.25
    y = layer(torch.ones(4000, 2, 1, 1))
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert torch.equal(y[:, 0], y[:, 1])
    assert y.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_stochastic_depth_rises_from_0_in_the_first_block(tiny):
    model, _ = tiny()
    model.set_drop_path(0.6)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6])


@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_stochastic_depth_acts_in_training_only(tiny):
    model, _ = tiny()
    x = torch.rand(6, 3, 8, 8)
    quiet = model(x).images[4]
    model.set_drop_path(0.9)
    assert torch.equal(model(x).images[4], quiet)                    # in evaluation
    for module in model.modules():
        module.training = isinstance(module, DropPath)               # BatchNorm stays as it is
    assert not torch.equal(model(x).images[4], quiet)
    model.set_drop_path(0.0)
    assert torch.equal(model(x).images[4], quiet)


# ---- the start of training ----------------------------------------------------------------------
@pytest.mark.parametrize("arch, scale", [
    ("drn_s", 4), ("swinir_light", 3), ("swinir_light", 8), ("swinir", 4), ("swinir", 3),
    ("dat_light", 4)])
def test_starts_as_an_interpolation(arch, scale):
    model = models.build(arch, scale).eval()
    x = rule.image(3, 1, 12, 12)
    enlarged = F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
    with torch.no_grad():
        before = (model(x).images[scale] - enlarged).abs().mean()
        model.start_from_interpolation()
        after = (model(x).images[scale] - enlarged).abs().mean()
    assert after < before / 8


# ---- bfloat16 -----------------------------------------------------------------------------------
def test_bfloat16_keeps_the_layers_of_drn_that_form_the_image():
    model, _ = tiny_drn()
    fast = models.inference(model, "bf16")
    for layer in (fast.tail[2], fast.sub_mean, fast.add_mean):
        assert layer.weight.dtype == torch.float32
    for layer in (fast.head, fast.up_blocks[0][0].body[0]):
        assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(fast.tail[2].weight, model.tail[2].weight)     # never rounded on the way
    x = rule.image(1, 1, 8, 8)
    image = fast(x).images[4]
    assert image.dtype == torch.float32
    assert 0 < (image - models.inference(model)(x).images[4]).abs().max() < 0.02


@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_bfloat16_transformers_form_the_image_in_float32(tiny):
    model, _ = tiny()
    fast = models.inference(model, "bf16")
    assert fast.conv_first.weight.dtype == torch.bfloat16
    assert fast.upsample[0].weight.dtype == torch.float32
    x = rule.image(1, 1, 16, 24)
    image = fast(x).images[4]
    exact = model(x).images[4]
    assert image.dtype == torch.float32
    assert 0 < (image - exact).abs().max() < 0.05 * exact.std()


def test_bfloat16_of_the_large_upsampler():
    """The light networks form the image in `upsample`, the others in `conv_last`."""
    sizes = dict(dim=12, depths=(1,), heads=2, direct=False)
    model = fill(models.PRESETS["swinir"][0]("swinir", 4, **sizes)).eval()
    fast = models.inference(model, "bf16")
    assert fast.upsample[0].weight.dtype == torch.bfloat16
    assert fast.conv_last.weight.dtype == torch.float32
    x = rule.image(1, 1, 16, 24)
    exact = model(x).images[4]
    assert 0 < (fast(x).images[4] - exact).abs().max() < 0.05 * exact.std()


def test_inference_through_torch_compile_gives_the_same(monkeypatch):
    """The program itself is the compiler's; that one is made, and used, is ours."""
    used = []

    def count(graph, inputs):
        used.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    model, _ = tiny_drn()
    fast = models.inference(model, compiled=True)
    x = torch.rand(1, 3, 9, 12)
    with torch.inference_mode():
        assert torch.equal(fast(x).images[4], models.inference(model)(x).images[4])
    assert len(used) == 1


@pytest.mark.parametrize("make", [tiny_swinir, tiny_dat])
def test_transformers_can_be_compiled(make):
    """In one graph. DAT's two windows have tensors of one function, which must stay two."""
    model, _ = make()
    low = torch.rand(1, 3, 32, 32)
    plain = model(low).images[4]
    model.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(model(low).images[4], plain)


@pytest.mark.parametrize("parts", [1, 3, 12])
def test_the_cosines_of_channels_may_be_summed_up_in_parts(parts):
    """As on a GPU: there each row of the map is a part."""
    q, k = torch.randn(2, 2, 4, 5, 12, dtype=torch.float64)
    product = dat.over_tokens(q, k, parts)
    assert (product - torch.einsum("nhit,nhjt->nhij", q, k)).abs().max() < 1e-13
