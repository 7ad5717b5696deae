"""A network of the user's own, from a file and a flag: --network my_network.py:MyNet.

    python train.py --network my_network.py:MyNet --network-args scale=4,feats=64 --prune 0.3

Any nn.Module will do whose forward maps images (N, 3, H, W) to larger ones. Its scale is found from
a forward pass, the range of its numbers from its weights (or --range), and what may be pruned by
pairs.py. `Own` wraps it as the Backbone that the rest of the project knows.

A checkpoint holds weights and names the file, and never runs it: the file is run because the flag
names it, and must be the same to the last byte (SHA-256). What it imports is not checked. Read
models.py next.
"""
import argparse
import ast
import copy
import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pairs
from backbones.base import SR, Backbone, Pair, named_widths
from narrow import narrow
from replay import can_replay
from run import WrongUsage, filled, misfit, positive

LOW = (16, 32)               # the input of trial passes: a multiple of every usual window
SCALES = (2, 3, 4, 8)        # those that duals can undo
RANGES = (1.0, 255.0)


# ---- the file -----------------------------------------------------------------------------------
class Given(NamedTuple):
    """The flags --network FILE.py:CLASS, --network-args and --range."""
    network: str
    arguments: str | None = None
    range: float | None = None


class Opened(NamedTuple):
    """A file that has been run, and the class in it."""
    network: str                     # FILE.py:CLASS
    make: Callable[..., nn.Module]
    sha256: str


SOURCE = dict(arch=str, network=str, sha256=str, scale=int, arguments=dict, range=float,  # of `Own`
              replays=bool, pairs=[dict(name=str, block=str, width=int, producers=(tuple, [list]),
                                        consumers=(tuple, [list]), heads=int, norm=str)])
opened: dict[str, Opened] = {}       # by the name of the class; only `open_file` adds to it


def add_flags(add: Callable) -> None:
    """The flags of a network of the user's own, for argparse."""
    add("--network", type=filled, metavar="FILE.py:CLASS",
        help="a network of your own; the file is run")
    add("--network-args", metavar="NAME=VALUE,...", help="what its constructor takes")
    add("--range", type=positive, metavar="F",
        help="largest value of its images (default: 1 or 255, whichever suits its weights)")


def given(args: argparse.Namespace) -> Given | None:
    """What --network and its companions say; None without it."""
    return Given(args.network, args.network_args, args.range) if args.network else None


def open_file(network: str) -> Opened:
    """Runs FILE.py of FILE.py:CLASS and takes CLASS (or a function that makes the network) from it.

    It is run once, unless it changes. It may import its neighbours; names of this project go before
    theirs. WrongUsage: no such file or class. ValueError: the file itself fails; its traceback is
    shown.
    """
    path, _, name = network.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise WrongUsage(f"--network {network} is not FILE.py:CLASS, as in my_network.py:MyNet")
    if not Path(path).is_file():
        raise WrongUsage(f"--network {network}: there is no file {path}")
    sha256 = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    known = opened.get(name)
    if known and (known.network, known.sha256) == (network, sha256):
        return known
    sys.path.append(str(Path(path).resolve().parent))
    module_name = f"own_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module        # dataclasses, for example, look it up there
    with of_user(path):
        spec.loader.exec_module(module)
    make = getattr(module, name, None)
    if not callable(make):
        networks = [key for key, value in vars(module).items()
                    if isinstance(value, type) and issubclass(value, nn.Module)
                    and value.__module__ == module_name]
        raise WrongUsage(f"{path} has no class {name}; its networks are "
                         f"{', '.join(networks) or 'none'}")
    opened[name] = Opened(network, make, sha256)
    return opened[name]


@contextmanager
def of_user(what: str):
    """Within it the user's code runs: if it fails, its own traceback is shown, and a sentence."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        raise ValueError(f"{what} failed with {type(error).__name__}, see its traceback "
                         f"above") from error


def parse_arguments(text: str | None) -> dict:
    """"scale=4,feats=64,act=relu" as a dict: Python's literals, other words are strings."""
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if call.args or any(word.arg is None for word in call.keywords):
            raise ValueError
        found = {}
        for word in call.keywords:
            plain = isinstance(word.value, ast.Name)
            found[word.arg] = word.value.id if plain else ast.literal_eval(word.value)
        return found
    except (SyntaxError, ValueError, AttributeError) as error:
        raise WrongUsage(f"--network-args {text} is not NAME=VALUE,NAME=VALUE with numbers, words, "
                         f"lists") from error


def construct(file: Opened, arguments: dict) -> nn.Module:
    """The network with random weights. WrongUsage: arguments that do not fit, or no nn.Module."""
    try:
        signature = inspect.signature(file.make)
        signature.bind(**arguments)
    except TypeError as error:
        raise WrongUsage(f"--network-args: {error}; {file.network} takes {signature}") from error
    with of_user(f"{file.network}{signature}"), torch.device("cpu"):
        net = file.make(**arguments)
    if not isinstance(net, nn.Module):
        raise WrongUsage(f"--network {file.network} gives a {type(net).__name__}, no "
                         f"torch.nn.Module")
    return net


# ---- what a network says about itself -----------------------------------------------------------
def find_scale(net: nn.Module, name: str) -> int:
    """How many times larger the output is. ValueError: forward fails, or it is no enlargement."""
    height, width = LOW
    with of_user(f"{name}: forward of an input (1, 3, {height}, {width})"), torch.no_grad():
        out = net.eval()(torch.rand(1, 3, height, width))
    shape = tuple(getattr(largest(out), "shape", ()))
    for scale in SCALES:
        if shape == (1, 3, scale * height, scale * width):
            return scale
    what = f"an output of shape {shape}" if shape else f"a {type(out).__name__}"
    raise ValueError(f"{name}: an input of shape (1, 3, {height}, {width}) gave {what}, it must be "
                     f"an image 2, 3, 4 or 8 times as large")


def largest(out):
    """The image: of an SR the largest one, anything else as it is."""
    return out.images[max(out.images)] if isinstance(out, SR) else out


@torch.no_grad()
def find_range(net: nn.Module, scale: int) -> float:
    """1, or 255 if a trained network's image is nearer to the bicubic one there, and clearly so.

    (A network for 0..1 fed with 0..255 merely loses its biases; one for 0..255 that is fed with
    0..1 sees nothing but them.)
    """
    y, x = (torch.linspace(0, 6, side) for side in LOW)
    wave = 0.5 + 0.4 * torch.sin(y)[:, None] * torch.cos(x)                # (H, W)
    low = torch.stack((wave, wave.flip(0), 1 - wave))[None]
    high = F.interpolate(low, scale_factor=scale, mode="bicubic")

    def error(largest_value: float) -> Tensor:
        return (largest(net.eval()(largest_value * low)) / largest_value - high).abs().mean()

    small, large = RANGES
    return large if error(large) < error(small) / 2 else small


# ---- the network as a backbone ------------------------------------------------------------------
class Own(Backbone):
    """The user's network, `net`, between images in 0..1. Its losses are in 0..255, whatever range
    it computes in, so that one set of learning rates serves all.
    """
    rgb_range = 255.0

    def __init__(self, net: nn.Module, source: dict, found: list[Pair]):
        """source: what rebuilds it, see `describe`; found: its pairs, with this class's names."""
        config = dict(arch=source["arch"], scale=source["scale"], found=found)
        super().__init__(config, None)
        self.net = net
        self.source = source
        self.replays = source["replays"]
        self.dual_spec = ((self.scale, 1, 16),)

    @classmethod
    def hidden_widths(cls, found: list[Pair], **_) -> dict[str, int]:
        return {pair.name: pair.width for pair in found}

    def pairs(self) -> list[Pair]:
        return self.config["found"]

    def forward(self, low: Tensor) -> SR:
        out = self.net(self.source["range"] * low)
        images = out.images if isinstance(out, SR) else {self.scale: out}
        return SR({s: image.float() / self.source["range"] for s, image in images.items()})

    def with_widths(self, widths) -> "Own":
        """A copy with fewer channels, at most those it has: the first ones of every width."""
        smaller = copy.deepcopy(self)
        kept = {name: range(n) for name, n in named_widths(self.widths, widths).items()}
        return Own(smaller.net, self.source, narrow(smaller, self.pairs(), kept))


def describe(given: Given, load: Callable[[nn.Module], None] | None = None) -> tuple[dict, str]:
    """(source, the table of what may be pruned) of a network that is seen for the first time.

    load: puts trained weights into it. source is all that `build` needs, plain enough for a
    checkpoint.
    """
    file = open_file(given.network)
    arguments = parse_arguments(given.arguments)
    with torch.random.fork_rng(devices=[]):
        net = construct(file, arguments)
        if load:
            load(net)
        scale = find_scale(net, given.network)
        rgb_range = given.range or (find_range(net, scale) if load else RANGES[0])
        low = torch.rand(1, 3, *LOW)
    found = pairs.examine(net, rgb_range * low)
    name = given.network.rpartition(":")[2]
    source = dict(arch=f"own_{name}", network=given.network, sha256=file.sha256, scale=scale,
                  arguments=arguments, range=rgb_range, replays=True,
                  pairs=[prefixed(pair)._asdict() for pair in found.pairs])
    model = Own(net, source, stored_pairs(source))
    blocks = [pair.block for pair in model.pairs()]
    source["replays"] = can_replay(model, blocks, SR({1: low}))
    return source, pairs.table(found)


def told(found: list[Pair]) -> str:
    """The table of the pairs that a checkpoint knows."""
    return pairs.table(pairs.Found(found, {}))


def prefixed(pair: Pair) -> Pair:
    """The pair of a network, with the names its layers have within `Own`."""
    def inside(tables):
        return tuple((f"net.{layer}", table) for layer, table in tables)

    return pair._replace(block=f"net.{pair.block}".rstrip("."), producers=inside(pair.producers),
                         consumers=inside(pair.consumers))


def stored_pairs(source: dict) -> list[Pair]:
    """The pairs that a `source` holds as dicts; its tables are tensors, or lists in a JSON."""
    def tables(layers):
        return tuple((layer, torch.as_tensor(table, device="cpu")) for layer, table in layers)

    pairs = [Pair(*(pair[name] for name in Pair._fields)) for pair in source["pairs"]]
    return [pair._replace(producers=tables(pair.producers), consumers=tables(pair.consumers))
            for pair in pairs]


def as_json(source: dict) -> str:
    """A `source` as a text, for files that hold nothing else."""
    return json.dumps(source, default=Tensor.tolist)


def build(source: dict, widths=None, **_) -> Own:
    """The network of a `source` with random weights. ValueError: its file was not opened, since no
    flag names it, or it is another one now; or the source is damaged.
    """
    wrong = misfit(source, SOURCE, "its network")
    if wrong:
        raise ValueError(f"it is damaged ({wrong}), copy or download it again")
    network = source["network"]
    name = network.rpartition(":")[2]
    if name not in opened:
        raise ValueError(f"it holds a network of the file {network}, and a checkpoint runs no "
                         f"code: add --network {network} to run that file")
    file = opened[name]
    if file.sha256 != source["sha256"]:
        raise ValueError(f"it was made with another version of {network} than {file.network} is "
                         f"now (SHA-256 {source['sha256'][:12]}, now {file.sha256[:12]}): give the "
                         f"file as it was then")
    net = construct(file, source["arguments"])
    model = Own(net, source, stored_pairs(source))
    return model if widths is None else model.with_widths(widths)


def shares_layers(source: dict) -> bool:
    """Whether a layer makes one width and consumes another: its cost is a product of both."""
    layers = []
    for pair in source["pairs"]:
        layers += {layer for layer, _ in (*pair["producers"], *pair["consumers"])}
    return len(set(layers)) < len(layers)
