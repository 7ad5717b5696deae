"""tour.py: it runs, shows what it says, and its network goes through the whole program."""
import subprocess
import sys

import pytest
import torch
from PIL import Image

import models
import own
import prune
import train
from small_runs import photo
from tiny import ROOT, parameters, run_command


@pytest.fixture
def network(monkeypatch):
    """The tour's network, known to the tables for one test only."""
    monkeypatch.setattr(own, "opened", {})
    monkeypatch.setattr(models, "PRESETS", dict(models.PRESETS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return f"{ROOT / 'tour.py'}:EDSR"


def test_the_tour_runs_and_writes_its_picture(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tour.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    for words in ("1 DUAL", "2 SEARCH", "3 SELECT", "4 CUT", "5 TUNE", "6 RESULT"):
        assert words in done.stdout
    rows = {}
    for line in done.stdout.splitlines():
        if " dB, " in line:
            psnr, _, rest = line.partition(" dB, ")
            apart, name = rest.split("  ")
            rows[name] = float(psnr)
            assert 0 < float(apart) < 2                  # grey levels
    assert rows["dense"] > rows["bicubic"] + 1
    assert abs(rows["tuned"] - rows["dense"]) < 0.5
    assert Image.open(tmp_path / "tour.png").width > 1000


def test_the_network_is_cut_without_a_change(network):
    given = own.Given(network, "scale=2,feats=16,blocks=4", 255.0)
    model = models.build(*models.add_own(given)[:2]).eval()
    assert list(model.widths) == [f"body.{b}.0" for b in range(4)] + ["tail.0"]
    kept = {pair.name: [1, 4, 5] for pair in model.pairs()}
    low = torch.rand(1, 3, 12, 12)
    for pair in model.pairs():
        gone = sorted(set(range(16)) - {1, 4, 5})
        [(layer, columns)] = pair.consumers
        model.get_submodule(layer).weight.data[:, columns[gone].flatten()] = 0
    smaller = prune.cut(model, kept)
    with torch.no_grad():
        assert torch.allclose(model(low).images[2], smaller(low).images[2], atol=1e-6)


def test_the_network_goes_through_all_stages(network, tmp_path, monkeypatch, capsys):
    """The command that tour.py names, with fewer steps."""
    folder = tmp_path / "run"
    (tmp_path / "pictures").mkdir()
    photo(48).save(tmp_path / "pictures" / "one.png")
    code, _, errors = run_command(
        train, monkeypatch, capsys, "--network", network, "--network-args",
        "scale=2,feats=16,blocks=4", "--range", 255, "--prune", 0.4, "--preset", "quick", "--steps",
        2, "--search-steps", 1, "--tune-steps", 1, "--pictures", 4, "--batch", 1, "--device", "cpu",
        "--test", tmp_path / "pictures", "--run", folder)
    assert code == 0, errors
    dense, pruned = (models.load(folder / f"{stage}.pt") for stage in ("train", "tune"))
    assert parameters(pruned) < parameters(dense)
