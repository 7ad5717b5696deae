"""What the tests share: the repository on the import path, the rule of the golden numbers, a tiny DRN."""
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")          # tiny tensors: more threads only wait for each other

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
sys.path[:0] = [str(ROOT), str(GOLDEN)]

import rule                                                                                           # noqa: E402

import data                                                                                           # noqa: E402
import dual                                                                                           # noqa: E402
import evaluate                                                                                       # noqa: E402
import models                                                                                         # noqa: E402


def golden(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def difference(tensor: torch.Tensor, summary: dict) -> float:
    """Largest deviation from the golden samples, relative to the golden output's standard deviation."""
    flat = tensor.detach().double().flatten().numpy()
    assert len(flat) == summary["numel"]
    return float(np.abs(flat[summary["index"]] - summary["value"]).max() / summary["std"])


def fill(module: torch.nn.Module, prefix: str = "", gain: float = 0.7) -> torch.nn.Module:
    """The deterministic weights of the golden numbers; prefix: what released files put before the module's names."""
    named = rule.fill({prefix + name: tensor for name, tensor in module.state_dict().items()}, gain)
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in named.items()})
    return module


def tiny_drn(blocks: int = 1, feats: int = 8, scale: int = 4):
    """(model, duals) small enough for every test, with the golden weights."""
    model = fill(models.DRN("drn_s", scale, feats, blocks))
    return model, fill(dual.make_duals(model))


def tiny_swinir(scale: int = 4, depths=(2, 2), widths=None):
    """SwinIR with 2 heads of 6 channels, and its duals, with the golden weights."""
    model = fill(models.SwinIR("swinir_light", scale, 12, depths, 2, True, widths)).eval()
    return model, fill(dual.make_duals(model))


def tiny_dat(scale: int = 4, widths=None):
    """DAT with 4 blocks (shifted spatial attention in the third), and its duals, with the golden weights."""
    model = fill(models.DAT("dat_light", scale, 32, 1, 4, 4, 2, True, widths)).eval()
    return model, fill(dual.make_duals(model))


def tiny_dcls(scale: int = 4, widths=None):
    """DCLS with 1 group of 2 blocks and its dual, with the golden weights."""
    sizes = dict(filters=models.PRESETS["dcls"][1][scale]["filters"], feats=16, groups=1, blocks=2, latent=12)
    model = fill(models.DCLS("dcls", scale, **sizes, widths=widths), gain=0.3)
    return model, fill(dual.make_duals(model))


def blind_batch(seed: int, low: int = 8) -> dict:
    """Images too small for data.degrade, with some kernel as the true one."""
    high = rule.image(seed, 1, 4 * low, 4 * low)
    return {1: F.avg_pool2d(high, 4), 4: high, "kernel": data.blind_kernels(1, 31, torch.Generator().manual_seed(seed))}


def pooled_batch(seed: int, n: int, low: int, scale: int = 4) -> dict:
    """The batches of the golden pruning numbers: {scale: images}, the smaller ones by average pooling."""
    high = rule.image(seed, n, low * scale, low * scale)
    return {s: F.avg_pool2d(high, scale // s) for s in (1, 2, 4, 8) if s <= scale}


def native_loss(duals, rgb_range: float = 255):
    return lambda out, y: rgb_range * dual.dr_loss(out.images, y, duals)


def blind_loss(duals):
    return lambda out, y: dual.dr_loss(out.images, y, duals) + dual.blind_loss(out.kernel, y["kernel"])


def run_command(module, monkeypatch, capsys, *arguments):
    """`python module.py ARGUMENTS`, in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    code = 0
    try:
        evaluate.run(module.main)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
