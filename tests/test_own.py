"""own.py: networks from files of the user's own go through the whole program, and what is wrong
with them is said in a sentence.
"""
import copy
import sys

import pytest
import torch

import dual
import evaluate
import export
import models
import networks
import own
import prune
import train
import upscale
from backbones.base import SR
from run import WrongUsage
from small_runs import photo
from tiny import ROOT, parameters, run_command, same

FILE = ROOT / "tests" / "networks.py"
NAMES = ["EDSR", "RCAN", "RRDB", "IMDN", "SRResNet"]
SMALL = ["--prune", 0.3, "--preset", "quick", "--steps", 2, "--search-steps", 1, "--tune-steps", 1,
         "--pictures", 3, "--batch", 2, "--patch", 32, "--device", "cpu"]


@pytest.fixture(autouse=True)
def nothing_opened(monkeypatch):
    """Files that a test opens are known to it alone."""
    monkeypatch.setattr(own, "opened", {})
    monkeypatch.setattr(models, "PRESETS", dict(models.PRESETS))
    monkeypatch.setattr(sys, "path", list(sys.path))


def build(name: str, **options) -> own.Own:
    source, _ = own.describe(own.Given(f"{FILE}:{name}", "scale=2", options.get("range")))
    return own.build(source).eval()


def batch(seed: int = 0) -> SR:
    low = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return SR({1: low, 2: torch.nn.functional.interpolate(low, scale_factor=2)})


# ---- the method on them -------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_cut_equals_masked(name):
    model = build(name)
    for module in model.modules():           # statistics as after training
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    kept = {pair.name: torch.randperm(pair.width)[:5].tolist() for pair in model.pairs()}
    low = torch.rand(1, 3, 9, 11)
    with torch.no_grad():
        for pair in model.pairs():
            gone = sorted(set(range(pair.width)) - set(kept[pair.name]))
            for layer, columns in pair.consumers:
                model.get_submodule(layer).weight[:, columns[gone].flatten()] = 0
        masked = model(low).images[2]
        for pair in model.pairs():
            prune.silence(model, pair, kept[pair.name])
        silent = model(low).images[2]
        smaller = prune.cut(model, kept).eval()
        assert torch.allclose(silent, masked, atol=1e-6)
        assert torch.allclose(smaller(low).images[2], masked, atol=1e-6)
    assert set(smaller.widths.values()) == {5}
    assert parameters(smaller) < parameters(model)
    again = own.build(model.source, smaller.widths)
    assert same([p.shape for p in again.parameters()], [p.shape for p in smaller.parameters()])


@pytest.mark.parametrize("name", ["RRDB", "SRResNet"])
def test_selection_keeps_the_number_and_replays_without_a_change(name):
    """Dense blocks (consumers shared by several pairs) and members of Sequentials."""
    dense = build(name)
    assert dense.replays
    duals = dual.make_duals(dense)
    results = []
    for replay in (True, False):
        model = copy.deepcopy(dense)
        kept = prune.select(
            model, [batch(1), batch(2)], lambda out, b: dual.native_loss(out, b, duals, 0.1, 255),
            {pair.name: 4 for pair in model.pairs()}, rate=1e-6, per_round=2, replay=replay)
        with torch.no_grad():
            masked = model(batch().images[1]).images[2]
            cut = prune.cut(model, kept).eval()(batch().images[1]).images[2]
        assert torch.allclose(masked, cut, atol=1e-5)
        results.append((kept, model.state_dict()))
    assert same(*results)
    assert all(len(order) == 4 for order in results[0][0].values())


def test_search_scales_the_columns_of_all_pairs_of_a_consumer():
    model = build("RRDB")
    searcher = prune.Search(model, None, 0.3)
    scaled = searcher.scaled_weights()["net.body.0.conv3.weight"].detach()
    ratio = (scaled / model.net.body[0].conv3.weight).mean((0, 2, 3))
    assert torch.allclose(ratio[:16], torch.ones(16))
    assert (ratio[16:].view(3, 8) < 0.9).any(1).all()


class Collecting(networks.IMDN):
    """Reads the outputs of a Sequential's members again: replay keeps only the last of them."""
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.Sequential(*(networks.ResBlock(32) for _ in range(2)))


def test_where_replay_would_be_wrong_it_is_left_out(monkeypatch):
    monkeypatch.setattr(own, "open_file", lambda network: own.Opened(network, Collecting, ""))
    source, _ = own.describe(own.Given("mine.py:Collecting"))
    assert source["pairs"][0]["name"] == "blocks.0.body.0" and not source["replays"]


# ---- the whole program --------------------------------------------------------------------------
@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    photo(48).save(folder / "one.png")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_all_stages(name, tmp_path, pictures, monkeypatch, capsys):
    weights = tmp_path / "my.pth"
    own.open_file(f"{FILE}:{name}")
    net = own.opened[name].make(scale=2)
    torch.save({"state_dict": net.state_dict()}, weights)
    more = ["--range", 255] if name == "EDSR" else []
    flags = ["--network", f"{FILE}:{name}", "--network-args", "scale=2", *more]
    folder = tmp_path / "run"
    code, out, errors = run_command(
        train, monkeypatch, capsys, *flags, "--pretrained", weights, "--test", pictures, "--run",
        folder, *SMALL)
    assert code == 0, errors
    assert "enlarges 2 times" in out and "stay whole" in out and "pruned" in out
    dense, pruned = (models.load(folder / f"{stage}.pt") for stage in ("train", "tune"))
    assert parameters(pruned) < parameters(dense)
    assert all(n <= 0.75 * dense.widths[name] for name, n in pruned.widths.items())
    if name == "EDSR":
        assert not pruned.net.sub_mean.weight.requires_grad
        assert same(pruned.net.sub_mean.state_dict(), net.sub_mean.state_dict())


def test_a_finished_run_is_used_with_the_flag_and_refused_without(tmp_path, pictures, monkeypatch,
                                                                  capsys):
    """The file stands for one that does harm: it leaves a trace when it is run."""
    file = tmp_path / "mine.py"
    trace = tmp_path / "trace"
    file.write_text(f"open({str(trace)!r}, 'a').write('run ')\n{FILE.read_text()}")
    network = f"{file}:EDSR"
    model = models.build(*models.add_own(own.Given(network, "scale=2", 255.0))[:2])
    small = model.with_widths({pair.name: 8 for pair in model.pairs()})
    weights = tmp_path / "tune.pt"
    torch.save(models.checkpoint(small, dual.make_duals(small)), weights)
    own.opened.clear()
    trace.unlink()

    code, _, errors = run_command(evaluate, monkeypatch, capsys, "--weights", weights, "--data",
                                  pictures)
    assert code == 1 and f"add --network {network}" in errors and not trace.exists()

    code, out, errors = run_command(evaluate, monkeypatch, capsys, "--weights", weights, "--data",
                                    pictures, "--network", network)
    assert code == 0, errors
    assert "own_EDSR x2" in out and trace.exists()
    target = tmp_path / "large.png"
    code, _, errors = run_command(upscale, monkeypatch, capsys, pictures / "one.png", "--weights",
                                  weights, "--network", network, "--output", target)
    assert code == 0 and target.exists(), errors

    code, out, errors = run_command(
        train, monkeypatch, capsys, "--network", network, "--pretrained", weights, "--test",
        pictures, "--run", tmp_path / "again", *SMALL, "--round", 4)
    assert code == 0, errors                 # a pruned network is pruned again
    assert models.load(tmp_path / "again" / "tune.pt").widths["body.0.body.0"] == 4

    file.write_text(file.read_text() + "# a new line\n")
    code, _, errors = run_command(evaluate, monkeypatch, capsys, "--weights", weights, "--data",
                                  pictures, "--network", network)
    assert code == 1 and "another version of" in errors and "Traceback" not in errors


def test_an_exported_network_of_ones_own_comes_back(tmp_path, pictures, monkeypatch, capsys):
    network = f"{FILE}:EDSR"
    model = models.build(*models.add_own(own.Given(network, "scale=2", 255.0))[:2])
    small = model.with_widths({pair.name: 8 for pair in model.pairs()}).eval()
    torch.save(models.checkpoint(small, dual.make_duals(small)), tmp_path / "tune.pt")
    target = tmp_path / "mine.safetensors"
    code, _, errors = run_command(export, monkeypatch, capsys, tmp_path / "tune.pt", "--network",
                                  network, "--to", target)
    assert code == 0, errors
    again = models.load(target, given=own.Given(network)).eval()
    assert again.widths == small.widths and same(again.state_dict(), small.state_dict())
    low = torch.rand(1, 3, 9, 11)
    with torch.no_grad():
        assert torch.equal(again(low).images[2], small(low).images[2])
    own.opened.clear()
    with pytest.raises(ValueError, match="add --network"):
        models.load(target)

    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    target = tmp_path / "mine.onnx"
    code, out, errors = run_command(export, monkeypatch, capsys, tmp_path / "tune.pt", "--network",
                                    network, "--to", target)
    assert code == 0, errors
    assert "differs from PyTorch by at most" in out
    code, _, errors = run_command(upscale, monkeypatch, capsys, pictures / "one.png", "--weights",
                                  target, "--output", tmp_path / "large.png")
    assert code == 0, errors                 # it computes without the file of the user's


@pytest.mark.parametrize("name, value", [("network", 5), ("pairs", [{}]), ("pairs", 3),
                                         ("arguments", None)])
def test_a_damaged_source_is_one_sentence(name, value):
    source = build("EDSR").source
    with pytest.raises(ValueError, match="it is damaged"):
        own.build(source | {name: value})


def test_plain_weights_are_enlarged_with_the_same_flags(tmp_path, pictures, monkeypatch, capsys):
    own.open_file(f"{FILE}:RRDB")
    weights = tmp_path / "my.pth"
    torch.save(own.opened["RRDB"].make(2, 8).state_dict(), weights)
    target = tmp_path / "large.png"
    code, _, errors = run_command(
        upscale, monkeypatch, capsys, pictures / "one.png", "--weights", weights, "--network",
        f"{FILE}:RRDB", "--network-args", "scale=2,feats=8", "--output", target)
    assert code == 0 and target.exists(), errors


# ---- what a network says about itself -----------------------------------------------------------
@pytest.mark.parametrize("largest", [1.0, 255.0])
def test_the_range_is_found_from_trained_weights(largest):
    """A network as after training: bicubic, and a little more, which knows its range by biases."""
    class Trained(torch.nn.Module):
        def forward(self, x):
            high = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic")
            return high + 0.02 * (torch.relu(high - 0.5 * largest) - 0.1 * largest)

    assert own.find_range(Trained(), 2) == largest


def test_arguments_are_literals_and_words():
    text = "scale=4,feats=64,depths=(6,6),act=relu,rate=-1e-3,norm=None"
    assert own.parse_arguments(text) == dict(scale=4, feats=64, depths=(6, 6), act="relu",
                                             rate=-1e-3, norm=None)
    assert own.parse_arguments(None) == {}
    for wrong in ("scale", "4,feats=64", "scale=f(x)", "scale=", "**{}", "a=1)+g(b=2"):
        with pytest.raises(WrongUsage):
            own.parse_arguments(wrong)


# ---- wrong input --------------------------------------------------------------------------------
WRONG = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, scale, feats=8):
        super().__init__()
        self.scale = scale
        self.a = nn.Conv2d(3, 3, 1)
    def forward(self, x):
        return torch.nn.functional.interpolate(self.a(x), scale_factor=self.scale)
class Fails(Net):
    def forward(self, x):
        raise KeyError("deep in my code")
class Crops(Net):
    def forward(self, x):
        return super().forward(x)[..., 1:]
class Dict(Net):
    def forward(self, x):
        return dict(image=x)
def number(scale):
    return 3
"""
SENTENCES = [
    (["{file}:Net"], 2, "missing a required argument: 'scale'; "),
    (["{file}:Net", "--network-args", "scale=2,hue=1"], 2, "unexpected keyword argument 'hue'"),
    (["{file}:Net", "--network-args", "scale"], 2, "NAME=VALUE"),
    (["{file}:number", "--network-args", "scale=2"], 2, "gives a int, no torch.nn.Module"),
    (["{file}:Missing"], 2, "has no class Missing; its networks are Net, Fails, Crops, Dict"),
    (["{file}"], 2, "is not FILE.py:CLASS"),
    (["nowhere.py:Net"], 2, "there is no file nowhere.py"),
    (["{file}:Crops", "--network-args", "scale=2"], 1, "(1, 3, 32, 63), it must be an image"),
    (["{file}:Net", "--network-args", "scale=5"], 1, "2, 3, 4 or 8 times as large"),
    (["{file}:Dict", "--network-args", "scale=2"], 1, "gave a dict"),
    (["{file}:Net", "--network-args", "scale=2"], 1, "no width that can be pruned"),
    (["{file}:Net", "--network-args", "scale=2", "--scale", 4], 2, "enlarges 2 times"),
    (["{file}:Net", "--network-args", "scale=2", "--arch", "drn_s"], 2, "or --network")]


@pytest.mark.parametrize("flags, expected, sentence", SENTENCES, ids=[s[2] for s in SENTENCES])
def test_wrong_input_is_a_sentence(flags, expected, sentence, tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text(WRONG)
    flags = [str(flag).replace("{file}", str(file)) for flag in flags]
    code, _, errors = run_command(train, monkeypatch, capsys, "--network", *flags, "--prune", 0.3,
                                  "--run", tmp_path / "run")
    assert code == expected and sentence in errors
    assert "Traceback" not in errors


def test_the_users_own_traceback_is_shown(tmp_path, monkeypatch, capsys):
    file = tmp_path / "mine.py"
    file.write_text(WRONG)
    flags = ["--network", f"{file}:Fails", "--network-args", "scale=2", "--prune", 0.3]
    code, _, errors = run_command(train, monkeypatch, capsys, *flags)
    assert code == 1 and "deep in my code" in errors and "Traceback" in errors
    assert errors.splitlines()[-1].startswith("error: ") and "forward of an input" in errors


def test_a_budget_needs_costs_that_add_up(monkeypatch, capsys):
    flags = ["--network", f"{FILE}:RRDB", "--budget", "params=0.7"]
    code, _, errors = run_command(train, monkeypatch, capsys, *flags)
    assert code == 2 and "costs add up" in errors


def test_wrong_weights_name_the_file(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "my.pth"
    torch.save({"a.weight": torch.zeros(1)}, weights)
    flags = ["--network", f"{FILE}:RRDB", "--pretrained", weights]
    code, _, errors = run_command(train, monkeypatch, capsys, *flags)
    assert code == 1 and str(weights) in errors and "missing" in errors
