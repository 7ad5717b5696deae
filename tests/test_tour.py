"""tour.py: it runs, shows what it says, and its network goes through the whole program."""
import subprocess
import sys

import pytest
import torch
from PIL import Image

import models
import prune
import train
from settings import PRESETS
from tiny import ROOT, parameters, run_command


@pytest.fixture
def edsr():
    """The tour's network, known to the tables for one test only."""
    sys.modules.pop("tour", None)
    import tour
    yield tour.EDSR
    del models.PRESETS["edsr"], PRESETS["edsr", "quick"]


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


def test_the_own_backbone_is_cut_without_a_change(edsr):
    model = models.build("edsr", 2).eval()
    kept = {pair.name: [1, 4, 5] for pair in model.pairs()}
    low = torch.rand(1, 3, 12, 12)
    for pair in model.pairs():
        prune.silence(model, pair, kept[pair.name])
    smaller = prune.cut(model, kept)
    with torch.no_grad():
        assert torch.allclose(model(low).images[2], smaller(low).images[2], atol=1e-6)


def test_the_own_backbone_runs_in_bfloat16(edsr):
    """The largest error is 1.3 to 2.9 % of what it adds to bicubic, with the random weights of six
    seeds; a rounding is up to 2⁻⁸ = 0.4 %, and ten layers round weights, sums and outputs.
    """
    model = models.build("edsr", 2)
    fast = models.inference(model, "bf16")
    assert fast.body[0][0].weight.dtype == torch.bfloat16
    assert fast.tail[1].weight.dtype == torch.float32
    low = torch.rand(1, 3, 12, 12)
    image = fast(low).images[2]
    exact = models.inference(model)(low).images[2]
    assert image.dtype == torch.float32
    added = exact - model.bicubic(low)
    assert 0 < (image - exact).abs().max() < 0.04 * added.std()


def test_the_own_backbone_goes_through_all_stages(edsr, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    code, _, errors = run_command(
        train, monkeypatch, capsys, "--arch", "edsr", "--scale", 2, "--preset", "quick", "--prune",
        0.4, "--steps", 2, "--search-steps", 1, "--tune-steps", 1, "--pictures", 4, "--batch", 1,
        "--device", "cpu", "--run", folder)
    assert code == 0, errors
    dense, pruned = (models.load(folder / f"{stage}.pt") for stage in ("train", "tune"))
    assert parameters(pruned) < parameters(dense)
    assert isinstance(pruned, edsr)
