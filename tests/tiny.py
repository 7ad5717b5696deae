"""What the tests share: golden numbers, small networks with golden weights, small batches, how to
run a command, and a file that wants to do harm.

The "golden numbers" in golden/ are outputs of the authors' own code, for weights and images that
come from a deterministic rule (golden/rule.py), so that both sides can make them anew.
"""
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import dual
import models
import run
from backbones.base import SR
from backbones.dat import DAT
from backbones.dcls import DCLS
from backbones.drn import DRN
from backbones.swinir import SwinIR

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import rule

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def golden(name: str):
    """The golden numbers of one file."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_channels(name: str) -> list[int]:
    """The channel numbers of a released pruned network."""
    return [int(n) for n in (GOLDEN / "channels" / f"{name}.txt").read_text().split()]


def difference(tensor: torch.Tensor, summary: dict) -> float:
    """Largest deviation from golden samples, relative to the golden output's deviation."""
    flat = tensor.detach().double().flatten().numpy()
    assert len(flat) == summary["numel"]
    return float(np.abs(flat[summary["index"]] - summary["value"]).max() / summary["std"])


def fill(module: torch.nn.Module, prefix: str = "", gain: float = 0.7) -> torch.nn.Module:
    """Gives a module the golden weights; prefix: what released files put before its names."""
    state = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    filled = rule.fill(state, gain)
    module.load_state_dict({name.removeprefix(prefix): t for name, t in filled.items()})
    return module


def parameters(module: torch.nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def same(a, b) -> bool:
    """Whether nested containers of tensors are equal to the last bit, a state dict for example."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- small networks, each (model, duals) with golden weights ------------------------------------
def tiny_drn(blocks: int = 1, feats: int = 8, scale: int = 4):
    """DRN with one RCAB per up block."""
    model = fill(DRN("drn_s", scale, feats, blocks))
    return model, fill(dual.make_duals(model))


def tiny_swinir(scale: int = 4, depths=(2, 2), widths=None):
    """SwinIR with 2 heads of 6 channels."""
    model = fill(SwinIR("swinir_light", scale, 12, depths, 2, True, widths)).eval()
    return model, fill(dual.make_duals(model))


def tiny_dat(scale: int = 4, widths=None):
    """DAT with 4 blocks: shifted spatial attention in the third."""
    model = fill(DAT("dat_light", scale, 32, 1, 4, 4, 2, True, widths)).eval()
    return model, fill(dual.make_duals(model))


def tiny_dcls(scale: int = 4, widths=None):
    """DCLS with 1 group of 2 blocks."""
    filters = models.PRESETS["dcls"][1][scale]["filters"]
    sizes = dict(filters=filters, feats=16, groups=1, blocks=2, latent=12)
    model = fill(DCLS("dcls", scale, **sizes, widths=widths), gain=0.3)
    return model, fill(dual.make_duals(model))


# ---- small batches ------------------------------------------------------------------------------
def pooled_batch(seed: int, n: int, low: int, scale: int = 4) -> SR:
    """A batch as in the golden pruning numbers: the smaller images by average pooling."""
    high = rule.image(seed, n, low * scale, low * scale)
    scales = [s for s in (1, 2, 4, 8) if s <= scale]
    return SR({s: F.avg_pool2d(high, scale // s) for s in scales})


def blind_batch(seed: int, low: int = 8) -> SR:
    """A blind batch of images too small for data.degrade, with some kernel as the true one."""
    high = rule.image(seed, 1, 4 * low, 4 * low)
    kernel = data.blind_kernels(1, 31, torch.Generator().manual_seed(seed))
    return SR({1: F.avg_pool2d(high, 4), 4: high}, kernel)


# ---- losses, commands, files --------------------------------------------------------------------
def native_loss(duals, rgb_range: float = 255):
    """loss_fn(out, batch) with λ = 0.1."""
    return lambda out, batch: dual.native_loss(out, batch, duals, 0.1, rgb_range)


def run_command(module, monkeypatch, capsys, *arguments):
    """`python module.py ARGUMENTS`, in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    code = 0
    try:
        run.command(module.main)
    except SystemExit as end:
        code = end.code
    if code == 143:                  # SIGTERM was meant for the tests
        raise KeyboardInterrupt
    return code, *capsys.readouterr()


class Evil:
    """A pickle that makes the folder `marker` when it is loaded."""
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)
