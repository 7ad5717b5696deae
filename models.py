"""The face of the networks: build one, load its weights, save it, make it ready for inference.

    model = models.build("drn_s", scale=4)             # 4,804,065 parameters, random weights
    model = models.load("runs/drn_s_x4_p30/tune.pt")   # a checkpoint of ours rebuilds itself
    model = models.load("DRNS4x.pt", "drn_s")          # a file of the authors
    model = models.load("zoo:drn_s")                   # the same, fetched (zoo.py)
    out = model(low)                                   # SR: images by scale, all in 0..1

The networks are in backbones/, a file each; `PRESETS` holds the published sizes. Not here: losses,
pruning. Duals are handled as plain state dicts (dual.py builds them).
"""
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import own
import zoo
from backbones.base import Backbone
from backbones.dat import DAT
from backbones.dcls import DCLS
from backbones.drn import DRN
from backbones.swinir import SwinIR
from run import misfit, need, read_checkpoint, read_json, read_text

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


def add_own(given: own.Given, weights: str | Path | None = None) -> tuple[str, int, str]:
    """Adds a network of the user's own to the `PRESETS`: (its arch, its scale, the table of what
    may be pruned). weights: a file of its trained weights. Errors: see own.py.
    """
    own.open_file(given.network)
    load = None
    if weights:
        state = read_checkpoint(weights)
        if is_checkpoint(state):
            return add_stored(state, weights)

        def load(net):
            try:
                load_state(net, state)
            except ValueError as error:
                raise ValueError(f"{weights}: {error}") from error

    source, table = own.describe(given, load)
    PRESETS[source["arch"]] = (own.build, {source["scale"]: dict(source=source)})
    return source["arch"], source["scale"], table


def add_stored(state: dict, file: str | Path) -> tuple[str, int, str]:
    """Likewise from a checkpoint of ours, which knows all of it; its network may be pruned."""
    if "network" not in state:
        raise ValueError(f"{file} holds {state['arch']} and no network of your own: leave "
                         f"--network out")
    model = from_file(state, file)
    PRESETS[model.arch] = (own.build, {model.scale: dict(source=model.source)})
    return model.arch, model.scale, own.told(model.pairs())


# ---- weights in, weights out --------------------------------------------------------------------
# what a checkpoint of ours holds, see disk.misfit
CHECKPOINT = dict(arch=str, scale=int, widths={str: int}, model={str: Tensor},
                  duals=[{str: Tensor}])
DERIVED = ("attn_mask", "relative_position_index", "rpe_biases")   # released files hold these
#                                                     buffers, which follow from the sizes
SELECTED = CHECKPOINT | dict(kept={str: [int]})        # that of stage 4: {pair name: channels}


def load_state(module: nn.Module, state: dict) -> dict | None:
    """Loads a state dict, official or ours, with every name and shape checked.

    A dict under `params_ema` or `params` is unwrapped. Official files of SwinIR, DAT and DCLS have
    their dual inside, under `dual_model.`: returns its state dict, or None where there is none.
    ValueError: the first weight that is missing, has another shape, or is unexpected.
    """
    for key in ("params_ema", "params", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if isinstance(state, dict) and all(str(name).startswith("module.") for name in state):
        state = {name.removeprefix("module."): p for name, p in state.items()}   # DataParallel's
    if misfit(state, {str: Tensor}, "it"):
        raise ValueError("this is no state dict of one network (a dict of tensors): give the file "
                         "of the weights themselves")
    mine = module.state_dict()
    weights, dual = {}, {}
    for name, tensor in state.items():
        if name.startswith("dual_model."):
            dual[name.removeprefix("dual_model.")] = tensor
        elif name in mine or not any(part in name.rpartition(".")[2] for part in DERIVED):
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
    """All that rebuilds a network and its duals: `run.Run.write` stores it, `load` reads it. Of a
    network of the user's own the file is named under "network", see own.py.
    """
    state = dict(arch=model.arch, scale=model.scale, widths=model.widths, model=model.state_dict(),
                 duals=[d.state_dict() for d in duals])
    return state | dict(network=model.source) if model.source else state


def is_checkpoint(state: dict) -> bool:
    """Whether a file's content is a `checkpoint`, and no state dict of an official file."""
    return {"arch", "scale", "widths", "model"} <= state.keys()


def from_checkpoint(state: dict) -> Backbone:
    """The network of a `checkpoint`, on the CPU and in training mode.

    ValueError: it has not the form of CHECKPOINT, or weights that do not fit.
    """
    wrong = misfit(state, CHECKPOINT, "it")
    if wrong:
        raise ValueError(f"it is damaged ({wrong}), copy or download it again")
    if "network" in state:
        model = own.build(state["network"], state["widths"])
    else:
        model = build(state["arch"], state["scale"], state["widths"])
    load_state(model, state["model"])
    return model


def from_file(state: dict, file: str | Path) -> Backbone:
    """`from_checkpoint` of what a file holds, which its errors name."""
    try:
        return from_checkpoint(state)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load(path: str | Path, arch: str | None = None, scale: int | None = None,
         channels: str | Path | None = None, given: own.Given | None = None) -> Backbone:
    """The network in a file; see `load_networks`."""
    return load_networks(path, arch, scale, channels, given)[0]


def load_networks(path: str | Path, arch: str | None = None, scale: int | None = None,
                  channels: str | Path | None = None,
                  given: own.Given | None = None) -> tuple[Backbone, list[dict] | None]:
    """(network, state dicts of its duals, or None where the file has none) of a file.

    One of our checkpoints rebuilds itself, and so does a .safetensors file of export.py, or a name
    of zoo.py, such as "zoo:drn_s30", whose file is downloaded the first time. An official file
    needs `arch`, `scale` (4 if not given) and, for a pruned network, `channels`, the path of its
    channel file. Only tensors and plain containers are unpickled. The network is on the CPU and in
    training mode. given: the flags of a network of the user's own, whose file is run.
    ValueError: a file that is missing, damaged, or of another arch or scale than given; see also
    load_state and read_channels.
    """
    widths = None
    name = path
    if zoo.is_name(name):
        path, released = zoo.find(name)
        check_given(name, released.arch, released.scale, arch, scale, channels)
        arch, scale, widths = released.arch, released.scale, released.widths
    state = read_file(path)
    if given:
        own.open_file(given.network)
        if not is_checkpoint(state):
            arch, found, _ = add_own(given, path)
            scale = scale or found
    if is_checkpoint(state):
        model = from_file(state, path)
        check_given(name, model.arch, model.scale, arch, scale, channels)
        return model, state["duals"] or None
    if arch is None:
        raise ValueError(f"{path} does not say what network it is: give --arch "
                         f"({', '.join(PRESETS)}) and --scale")
    scale = scale or 4
    if channels is not None:
        with torch.device("meta"):
            widths = read_channels(channels, len(build(arch, scale).widths))
    try:
        model = build(arch, scale, widths)
        # a file of the user's own network knows no wrapper
        official = load_state(model.net if model.source else model, state)
    except ValueError as error:
        source = f"{path} with {channels}" if channels else path
        raise ValueError(f"{source}: {error}") from error
    return model, [official] if official else None


def check_given(name: str | Path, its_arch: str, its_scale: int, arch: str | None,
                scale: int | None, channels: str | Path | None) -> None:
    """ValueError: something else was given for a network that knows what it is."""
    for flag, its, given in (("arch", its_arch, arch), ("scale", its_scale, scale)):
        if given is not None and given != its:
            raise ValueError(f"{name} holds {flag} {its}, --{flag} {given} was given: give "
                             f"--{flag} {its}")
    if channels is not None:
        raise ValueError(f"{name} knows its own channel numbers: leave --channels out")


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
    safetensors = need("safetensors", f"reading {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
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
        more = dict(network=json.loads(about["network"])) if "network" in about else {}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has damaged metadata (scale, widths): export it again") from error
    return dict(arch=about["arch"], scale=scale, widths=widths, model=state, duals=[], **more)


def read_channels(path: str | Path, count: int) -> list[int]:
    """The channel numbers of a pruned network, one for each of its `count` prunable widths.

    The file is the authors' text file, an integer per line (blank lines are skipped), or the
    channels.json of train.py. ValueError: another number of entries, an entry that is no positive
    integer.
    """
    text = read_text(path)
    entries = text.splitlines()
    if text.lstrip().startswith("{"):
        try:
            found = read_json(path, dict(widths={str: int}))["widths"]
        except ValueError as error:
            raise ValueError(f"{path} is neither a list of integers nor a channels.json of "
                             f"train.py") from error
        entries = [str(n) for n in found.values()]
    channels = []
    for number, line in enumerate(entries, 1):
        entry = line.strip()
        if not entry:
            continue
        if not (entry.isascii() and entry.isdigit() and len(entry) < 10 and int(entry)):
            raise ValueError(f"{path}, entry {number}: {entry[:40]!r} is no positive integer")
        channels.append(int(entry))
    if len(channels) != count:
        raise ValueError(f"{path} has {len(channels)} channel numbers, this network needs {count}: "
                         f"one for every prunable width")
    return channels


# ---- inference ----------------------------------------------------------------------------------
@torch.no_grad()
def inference(model: Backbone, precision: str = "float32",
              device: str | torch.device | None = None, compiled: bool = False) -> Backbone:
    """A copy for inference: folded (`Backbone.fold`), channels-last, without gradients.

    device: where it is to run, by default where `model` is. For a GPU the hidden widths are padded
    with zeros (`Backbone.pad`): the same output, sooner. On a CPU that would cost time.

    precision: "float32", or "bf16" for everything but the layers that form the image
    (`model.float32`) in bfloat16, which pays on hardware that has bfloat16 instructions.

    compiled: through torch.compile, which takes a minute or more at the first call, and again for
    most new sizes of input: it is meant for many tiles of one size.
    """
    if precision not in ("float32", "bf16"):
        raise ValueError(f"unknown precision {precision!r}: choose float32 or bf16")
    model = copy.deepcopy(model).eval()
    device = torch.device(device or next(model.parameters()).device)
    model.fold()
    if device.type == "cuda":
        model.pad()
    model.requires_grad_(False)
    if precision == "bf16":
        exact = {name: model.get_submodule(name).state_dict() for name in model.float32}
        model.to(torch.bfloat16)
        for name, state in exact.items():            # the weights from before they were rounded
            model.get_submodule(name).float().load_state_dict(state)
    model.to(device, memory_format=torch.channels_last)
    if compiled:
        model.forward = torch.compile(model.forward)
    return model
