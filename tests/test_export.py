"""export.py: what leaves computes the same, knows what it is, and comes back."""
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import export
import models
import upscale
from backbones.dat import DAT
from backbones.dcls import DCLS, PortableMeans, deconvolve, deconvolve_portably
from backbones.drn import DRN
from backbones.swinir import SwinIR, pad_to_multiple
from pictures import picture, save
from tiny import fill, run_command, same

CPU = torch.device("cpu")


def pruned(arch: str):
    """The smallest network with every kind of layer, about a third of its widths removed.

    Exporting takes its time with every block: of the transformers the first block goes, which does
    nothing that those with shifted windows do not.
    """
    if arch == "drn_s":
        model = DRN(arch, 4, 4, 1)
    elif arch == "swinir_light":                             # the second block has shifted windows
        model = SwinIR(arch, 4, 12, (2,), 2, True)
    elif arch == "dat_light":                                # the third block likewise
        model = DAT(arch, 4, 32, 1, 3, 4, 2, True)
    else:
        model = DCLS(arch, 4, models.PRESETS[arch][1][4]["filters"], 16, 1, 1, 12)
    widths = {pair.name: pair.heads * max(1, pair.width * 2 // 3) for pair in model.pairs()}
    torch.manual_seed(0)
    model = model.with_widths(widths).eval()
    if arch == "dcls":           # of a kernel made at random, float32 cannot undo the blur
        model.start_from_interpolation()
        return model
    if arch == "swinir_light":
        del model.layers[0].residual_group.blocks[0]
    if arch == "dat_light":
        del model.layers[0].blocks[0]
    return fill(model, gain=0.3)


@pytest.fixture(scope="module")
def exported():
    """arch -> (network, its ONNX file), made once."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    made = {}

    def get(arch: str):
        if arch not in made:
            model = pruned(arch)
            made[arch] = model, export.to_onnx(model)
        return made[arch]

    return get


def call(monkeypatch, capsys, module, *arguments):
    return run_command(module, monkeypatch, capsys, *arguments)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(model, path) -> None:
    """Writes what train.py would, without duals."""
    torch.save(models.checkpoint(model, torch.nn.ModuleList()), path)


# ---- ONNX ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("arch", ["drn_s", "swinir_light", "dat_light", "dcls"])
def test_an_onnx_file_computes_what_the_network_does(arch, exported):
    """At any size: whole windows, none, sides below one, a side too short to be reflected."""
    model, content = exported(arch)
    other = export.OnnxNetwork(content, CPU)
    assert (other.arch, other.scale) == (arch, 4)
    assert other.kernel_size == model.kernel_size
    assert export.largest_difference(model, other) < export.CLOSE
    sizes = [(32, 64), (33, 71)] + [(1, 1), (3, 20)] * (arch != "dcls")
    fast = models.inference(model)
    for height, width in sizes:
        low = torch.rand(1, 3, height, width)
        with torch.inference_mode():
            image = fast(low).images[4]
        assert (other(low).images[4] - image).abs().max() < export.CLOSE


def test_an_onnx_file_says_what_it_is_and_not_where_it_was_made(exported):
    onnx = pytest.importorskip("onnx")
    model, content = exported("drn_s")
    file = onnx.load_from_string(content)
    assert {each.key: each.value for each in file.metadata_props} == export.facts(model)
    assert json.loads(export.facts(model)["widths"]) == model.widths
    for word in (b".py", str(export.__file__).encode()):
        assert word not in content


def test_tiles_share_the_kernel_of_a_blind_network(exported):
    model, content = exported("dcls")
    other = export.OnnxNetwork(content, CPU)
    fast = models.inference(model)
    low = torch.rand(1, 3, 20, 24)
    with torch.inference_mode():
        kernel = fast.estimate(low)
        assert (other.estimate(low) - kernel).abs().max() < 1e-6
        turned = kernel.flip(2, 3).transpose(2, 3)
        image = fast(low, turned).images[4]
        assert (fast(low).images[4] - image).abs().max() > 10 * export.CLOSE
    assert (other(low, turned).images[4] - image).abs().max() < export.CLOSE
    with pytest.raises(ValueError, match="onnxruntime cannot run this network on 4x3 pixels"):
        other(torch.rand(1, 3, 3, 4))


def test_upscale_runs_an_onnx_file_in_tiles(exported, here, monkeypatch, capsys):
    model, content = exported("drn_s")
    (here / "w.onnx").write_bytes(content)
    low = picture(150, 130)
    save(here / "photo.png", low)
    code, out, errors = call(monkeypatch, capsys, upscale, "photo.png", "--weights", "w.onnx",
                             "--device", "cpu", "--tile", 96, "--overlap", 16)
    assert code == 0, errors
    assert "600 by drn_s x4 on cpu, float32, onnxruntime" in out
    expected = upscale.upscale(models.inference(model), low, 96, 16).astype(int)
    shown = np.asarray(Image.open(here / "photo_x4.png"))
    assert np.abs(shown - expected).max() <= 1
    assert (shown != expected).mean() < 0.001


def test_an_onnx_file_takes_no_flag_that_it_knows_itself(exported, here, monkeypatch, capsys):
    (here / "w.onnx").write_bytes(exported("drn_s")[1])
    save(here / "photo.png", picture(9, 9))
    for flag, value in (("--arch", "drn_s"), ("--precision", "bf16"), ("--scale", 4)):
        code, _, errors = call(monkeypatch, capsys, upscale, "photo.png", "--weights", "w.onnx",
                               flag, value)
        assert code == 2 and f"which takes no {flag}: leave it out" in errors
    code, _, errors = call(monkeypatch, capsys, evaluate, "--weights", "w.onnx")
    assert code == 1 and "only upscale.py runs" in errors


def test_other_files_are_refused(exported, here):
    onnx = pytest.importorskip("onnx")
    file = onnx.load_from_string(exported("drn_s")[1])
    del file.metadata_props[:]
    (here / "foreign.onnx").write_bytes(file.SerializeToString())
    (here / "broken.onnx").write_bytes(exported("drn_s")[1][:5000])
    for name, words in (("foreign", "does not say its arch"), ("broken", "is damaged"),
                        ("missing", "cannot be read")):
        with pytest.raises(ValueError, match=f"{name}.onnx {words}"):
            export.open_onnx(f"{name}.onnx", CPU)


def test_a_file_that_computes_something_else_is_not_written(exported, here, monkeypatch, capsys):
    model, content = exported("drn_s")
    monkeypatch.setattr(models, "load", lambda *_: model)
    monkeypatch.setattr(export, "to_onnx", lambda _: content)
    code, out, errors = call(monkeypatch, capsys, export, "w.pt", "--to", "w.onnx")
    assert code == 0, errors
    assert "w.onnx: drn_s x4" in out and "differs from PyTorch by at most" in out
    with torch.no_grad():
        model.tail[-1].bias[0] += 0.1                        # 1/2550 of the image's range
    code, _, errors = call(monkeypatch, capsys, export, "w.pt", "--to", "x.onnx")
    model.tail[-1].bias.data[0] -= 0.1
    assert code == 1 and "differs from PyTorch by 3.9e-04" in errors
    assert not (here / "x.onnx").exists()


def test_a_missing_package_is_named(here, monkeypatch, capsys):
    checkpoint(models.build("swinir_light"), here / "w.pt")
    for package, name in (("onnx", "w.onnx"), ("safetensors.torch", "w.safetensors")):
        monkeypatch.setitem(sys.modules, package, None)
        code, _, errors = call(monkeypatch, capsys, export, "w.pt", "--to", name)
        assert code == 1 and f"pip install {package.partition('.')[0]}\n" in errors
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        export.OnnxNetwork(b"", CPU)
    assert "needs onnxruntime" in export.checked(None, b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        models.load("w.safetensors")


# ---- what ONNX has no operation for -------------------------------------------------------------
@pytest.mark.parametrize("height, width", [(7, 9), (40, 53), (64, 64)])
def test_deconvolution_by_matrices(height, width):
    generator = torch.Generator().manual_seed(0)
    x, kernel, prior = (torch.rand(shape, generator=generator, dtype=torch.float64)
                        for shape in ((2, 4, height, width), (2, 1, 31, 31), (2, 4, 3, 3)))
    kernel = kernel / kernel.sum((2, 3), keepdim=True)
    expected = deconvolve(x, kernel, prior)
    assert (deconvolve_portably(x, kernel, prior) - expected).abs().max() < 1e-10


def test_means_by_matrices():
    for height in range(1, 20):
        x = torch.rand(2, 4, height, 3 + height)
        expected = torch.nn.functional.adaptive_avg_pool2d(x, 3)
        assert torch.allclose(PortableMeans()(x), expected, atol=1e-6)


def test_padding_reflects_and_repeats_what_is_too_short_to_be_reflected():
    x = torch.arange(5.0).view(1, 1, 1, 5)
    assert pad_to_multiple(x, 8)[0, 0].tolist() == [[0, 1, 2, 3, 4, 3, 2, 1]] * 8
    x = torch.arange(4.0).view(1, 1, 1, 4)
    assert pad_to_multiple(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert pad_to_multiple(x, 1) is x


# ---- safetensors --------------------------------------------------------------------------------
def test_safetensors_come_back(here, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    widths = {"group0.block0.mlp": 50, "group1.block3.attn": 48}
    model = models.build("swinir_light", 2, widths)
    checkpoint(model, here / "w.pt")
    code, out, errors = call(monkeypatch, capsys, export, "w.pt", "--to", "w.safetensors")
    assert code == 0, errors
    assert "w.safetensors: swinir_light x2" in out
    again = models.load("w.safetensors")
    assert (again.arch, again.scale, again.widths) == ("swinir_light", 2, model.widths)
    assert same(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="w.safetensors holds arch swinir_light"):
        models.load("w.safetensors", "drn_s")


def test_safetensors_of_others(here):
    save = pytest.importorskip("safetensors.torch").save
    state = models.build("dat_light").state_dict()
    (here / "official.safetensors").write_bytes(save(state))
    assert same(models.load("official.safetensors", "dat_light").state_dict(), state)
    (here / "broken.safetensors").write_bytes(save(state)[:1000])
    for about in ({"scale": "4", "widths": "[1]"}, {"scale": "x", "widths": "{}"}, {}):
        (here / "odd.safetensors").write_bytes(save(state, {"arch": "dat_light", **about}))
        with pytest.raises(ValueError, match="odd.safetensors has damaged metadata"):
            models.load("odd.safetensors")
    for name, words in (("official", "give --arch"), ("broken", "is damaged"),
                        ("missing", "does not exist")):
        with pytest.raises(ValueError, match=f"{name}.safetensors .*{words}"):
            models.load(f"{name}.safetensors")


# ---- the command --------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, code, words", [
    (["w.pt"], 2, "--to"),
    (["w.pt", "--to", "x.pt"], 2, "use a name with .onnx or .safetensors"),
    (["w.pt", "--to", "mine.onnx"], 2, "mine.onnx exists already"),
    (["w.pt", "--to", "no/x.onnx"], 1, "its folder does not exist"),
    (["w.pt", "--to", "x.onnx"], 1, "w.pt does not exist"),
    (["mine.onnx", "--to", "x.safetensors"], 1, "only upscale.py runs")])
def test_wrong_usage_is_one_sentence(arguments, code, words, here, monkeypatch, capsys):
    (here / "mine.onnx").write_text("mine")
    got, _, errors = call(monkeypatch, capsys, export, *arguments)
    assert got == code
    assert words in errors and "Traceback" not in errors
    assert (here / "mine.onnx").read_text() == "mine"
