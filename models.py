"""The face of the networks: build one, load its weights, save it, make it ready for inference.

    model = models.build("drn_s", scale=4)             # 4,804,065 parameters, random weights
    model = models.load("runs/drn_s_x4_p30/tune.pt")   # a checkpoint of ours rebuilds itself
    model = models.load("DRNS4x.pt", "drn_s")          # a file of the authors
    out = model(low)                                   # SR: images by scale, all in 0..1

The networks are in backbones/, a file each; `PRESETS` holds the published sizes. Not here: losses,
pruning. Duals are handled as plain state dicts (dual.py builds them).
"""
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.base import Backbone
from backbones.dat import DAT
from backbones.dcls import DCLS
from backbones.drn import DRN
from backbones.swinir import SwinIR
from run import read_checkpoint

SWINIR = dict(dim=180, depths=(6,) * 6, heads=6, direct=False)
SWINIR_LIGHT = dict(dim=60, depths=(6,) * 4, heads=6, direct=True)
DAT_FULL = dict(dim=180, groups=6, blocks=6, heads=6, expansion=4, direct=False)
DAT_LIGHT = dict(dim=60, groups=1, blocks=18, heads=6, expansion=2, direct=True)

PRESETS = {                                   # arch: (class, {scale: sizes})
    "drn_s": (DRN, {4: dict(feats=16, blocks=30),        # 4,804,065 parameters
                    8: dict(feats=8, blocks=30)}),       # 5,403,000
    "drn_l": (DRN, {4: dict(feats=20, blocks=40),        # 9,825,893
                    8: dict(feats=10, blocks=36)}),      # 10,004,018
    "swinir": (SwinIR, dict.fromkeys((2, 3, 4, 8), SWINIR)),               # at ×4 11,900,199
    "swinir_light": (SwinIR, dict.fromkeys((2, 3, 4, 8), SWINIR_LIGHT)),   # at ×4 929,628
    "dat": (DAT, dict.fromkeys((2, 3, 4), DAT_FULL)),                      # at ×4 14,802,051
    "dat_light": (DAT, dict.fromkeys((2, 3, 4), DAT_LIGHT)),               # at ×4 572,766
    "dcls": (DCLS, {4: dict(filters=(11, 9, 7, 5, 3)),                     # 19,054,027
                    2: dict(filters=(7, 3, 3, 1))}),                       # 8,905,931
}


def build(arch: str, scale: int = 4, widths: dict[str, int] | list[int] | None = None) -> Backbone:
    """A backbone with random weights.

    widths: {pair name: kept channels}, or a list in the order of `pairs()`, which is the order of
    the authors' channel files; None is the dense network.
    ValueError: an unknown arch or scale, or widths that do not fit.
    """
    if arch not in PRESETS:
        raise ValueError(f"unknown arch {arch!r}: choose one of {', '.join(PRESETS)}")
    cls, sizes = PRESETS[arch]
    if scale not in sizes:
        scales = ", ".join(str(s) for s in sizes)
        raise ValueError(f"{arch} has no scale {scale}: choose one of {scales}")
    return cls(arch=arch, scale=scale, widths=widths, **sizes[scale])


# ---- weights in, weights out --------------------------------------------------------------------
DERIVED = ("attn_mask", "relative_position_index", "rpe_biases")   # released files hold these
#                                                     buffers, which follow from the sizes


def load_state(module: nn.Module, state: dict) -> dict | None:
    """Loads a state dict, official or ours, with every name and shape checked.

    A dict under `params_ema` or `params` is unwrapped. Official files of SwinIR, DAT and DCLS have
    their dual inside, under `dual_model.`: returns its state dict, or None where there is none.
    ValueError: the first weight that is missing, has another shape, or is unexpected.
    """
    for key in ("params_ema", "params"):
        if isinstance(state, dict):
            state = state.get(key, state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError("this is no state dict of one network (a dict of tensors): give the file "
                         "of the weights themselves")
    mine = module.state_dict()
    weights, dual = {}, {}
    for name, tensor in state.items():
        if name.startswith("dual_model."):
            dual[name.removeprefix("dual_model.")] = tensor
        elif not any(part in name.rpartition(".")[2] for part in DERIVED):
            weights[name] = tensor
    for name in mine:
        if name not in weights:
            raise ValueError(f"weight {name} is missing: this file is of another network (check "
                             f"the arch, scale and channels)")
        if mine[name].shape != weights[name].shape:
            theirs = tuple(weights[name].shape)
            raise ValueError(f"weight {name} has shape {theirs}, this network needs "
                             f"{tuple(mine[name].shape)} (check the arch, scale and channels)")
    for name in weights:
        if name not in mine:
            raise ValueError(f"weight {name} is unexpected: this file is of another network (check "
                             f"the arch, scale and channels)")
    module.load_state_dict(weights)
    return dual or None


def checkpoint(model: Backbone, duals: nn.ModuleList) -> dict:
    """All that rebuilds a network and its duals: `run.Run.write` stores it, `load` reads it."""
    return dict(arch=model.arch, scale=model.scale, widths=model.widths, model=model.state_dict(),
                duals=[d.state_dict() for d in duals])


def from_checkpoint(state: dict) -> Backbone:
    """The network of a `checkpoint`, on the CPU and in training mode."""
    model = build(state["arch"], state["scale"], state["widths"])
    load_state(model, state["model"])
    return model


def load(path: str | Path, arch: str | None = None, scale: int | None = None,
         channels: str | Path | None = None) -> Backbone:
    """The network in a file; see `load_networks`."""
    return load_networks(path, arch, scale, channels)[0]


def load_networks(path: str | Path, arch: str | None = None, scale: int | None = None,
                  channels: str | Path | None = None) -> tuple[Backbone, list[dict] | None]:
    """(network, state dicts of its duals, or None where the file has none) of a file.

    One of our checkpoints rebuilds itself, and so does a .safetensors file of export.py. An
    official file needs `arch`, `scale` (4 if not given) and, for a pruned network, `channels`, the
    path of its channel file. Only tensors and plain containers are unpickled. The network is on
    the CPU and in training mode.
    ValueError: a file that is missing, damaged, or of another arch or scale than given; see also
    load_state and read_channels.
    """
    state = read_file(path)
    duals = widths = None
    if {"arch", "scale", "widths", "model"} <= state.keys():
        for flag, given in (("arch", arch), ("scale", scale)):
            if given is not None and given != state[flag]:
                raise ValueError(f"{path} holds {flag} {state[flag]}, --{flag} {given} was given: "
                                 f"leave --{flag} out")
        if channels is not None:
            raise ValueError(f"{path} knows its own channel numbers: leave --channels out")
        duals = state.get("duals")
        arch, scale, widths, state = (state[k] for k in ("arch", "scale", "widths", "model"))
    elif arch is None:
        raise ValueError(f"{path} does not say what network it is: give --arch "
                         f"({', '.join(PRESETS)}) and --scale")
    scale = scale or 4
    if channels is not None:
        with torch.device("meta"):
            widths = read_channels(channels, len(build(arch, scale).widths))
    try:
        model = build(arch, scale, widths)
        official = load_state(model, state)
    except ValueError as error:
        source = f"{path} with {channels}" if channels else path
        raise ValueError(f"{source}: {error}") from error
    if not duals and official:
        duals = [official]
    return model, duals


def read_file(path: str | Path) -> dict:
    """The content of a file of weights, by its extension; ValueError as in `load_networks`."""
    kind = Path(path).suffix.lower()
    if kind == ".onnx":
        raise ValueError(f"{path} is an exported network, which only upscale.py runs: give the "
                         f"checkpoint that it was made of")
    return read_safetensors(path) if kind == ".safetensors" else read_checkpoint(path)


def read_safetensors(path: str | Path) -> dict:
    """A .safetensors file as `checkpoint` would be, without duals; where its metadata do not say
    what network it is, its state dict. ValueError: it is missing or damaged, or safetensors is.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise ValueError(f"reading {path} needs safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the path of a checkpoint") from None
    except Exception as error:                   # garbage, as in run.read_checkpoint
        raise ValueError(f"{path} is damaged or no safetensors file at all: copy or download it "
                         f"again") from error
    if "arch" not in about:
        return state
    try:
        scale, widths = int(about["scale"]), json.loads(about["widths"])
        widths = {name: int(n) for name, n in widths.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has damaged metadata (scale, widths): export it again") from error
    return dict(arch=about["arch"], scale=scale, widths=widths, model=state)


def read_channels(path: str | Path, count: int) -> list[int]:
    """The channel numbers of a pruned network, one for each of its `count` prunable widths.

    The file is the authors' text file, an integer per line (blank lines are skipped), or the
    channels.json of train.py. ValueError: another number of entries, an entry that is no positive
    integer.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    entries = text.splitlines()
    if text.lstrip().startswith("{"):
        try:
            entries = [str(n) for n in json.loads(text)["widths"].values()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is neither a list of integers nor a channels.json of "
                             f"train.py") from error
    channels = []
    for number, line in enumerate(entries, 1):
        entry = line.strip()
        if not entry:
            continue
        if not (entry.isascii() and entry.isdigit() and int(entry)):
            raise ValueError(f"{path}, entry {number}: {entry[:40]!r} is no positive integer")
        channels.append(int(entry))
    if len(channels) != count:
        raise ValueError(f"{path} has {len(channels)} channel numbers, this network needs {count}: "
                         f"one for every prunable width")
    return channels


# ---- inference ----------------------------------------------------------------------------------
@torch.no_grad()
def inference(model: Backbone, precision: str = "float32") -> Backbone:
    """A copy for inference: folded (`Backbone.fold`), channels-last, without gradients.

    precision: "float32", or "bf16" for everything but the layers that form the image
    (`model.float32`) in bfloat16, which pays on hardware that has bfloat16 instructions.
    """
    if precision not in ("float32", "bf16"):
        raise ValueError(f"unknown precision {precision!r}: choose float32 or bf16")
    model = copy.deepcopy(model).eval()
    model.fold()
    model.requires_grad_(False)
    if precision == "bf16":
        exact = {name: model.get_submodule(name).state_dict() for name in model.float32}
        model.to(torch.bfloat16)
        for name, state in exact.items():            # the weights from before they were rounded
            model.get_submodule(name).float().load_state_dict(state)
    return model.to(memory_format=torch.channels_last)
