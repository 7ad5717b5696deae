"""Finds the widths of a network that may be pruned, for networks that do not declare them.

A backbone of this project says what its `Pair`s are (backbones/base.py, to be read before this).
Any other network is asked. In one pass every Conv2d and Linear gets its input as it is, and hands
on fresh noise in place of its output. So the network falls into pieces between layers, and by
automatic differentiation each piece tells which output row of one layer reaches which input column
of another. A width is a candidate if

    - each row reaches a single column of each layer that takes it in, through whatever works on
      each channel alone: activations, PixelShuffle, BatchNorm, depthwise convolutions, scaling;
    - nothing else reaches these columns. Where a skip connection adds, two layers reach the same
      column: that is the trunk, and it keeps its width;
    - nothing of it reaches the image in another way.

Then it is proved, with the network's own weights (`holds`): channels whose columns are zero have no
effect, whatever the layer before them computes, and a network without them computes the same. What
forward does with fixed numbers (a split into 16 and 48) shows there, too.

Not here: how many channels stay, and which (search.py, prune.py). Read own.py next.
"""
import copy
import re
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbones.base import Pair
from narrow import gone, narrow
from run import Bar

LEAST = 8                            # channels: widths are multiples of 4, of fewer none can go
TOLERANCE = 1e-5                     # of the output's standard deviation: rounding is below it
NOWHERE, SEVERAL = -1, -2            # in place of a column, see `reached`
RECENT = 8                           # refused layers that are still looked at, see `wiring`
OUTPUT = "the output"


class Found(NamedTuple):
    """What `examine` finds: the pairs in forward order, and {layer: why its width must stay}."""
    pairs: list[Pair]
    refused: dict[str, str]


def find_pairs(model: nn.Module, low: Tensor) -> list[Pair]:
    """The prunable widths of any network whose forward maps `low` (N, 3, H, W) to images.

    A pair is named after the layer that makes the width. Its block is the smallest module that
    holds the consumers ("": the network itself) and that replay.py may replay.
    """
    return examine(model, low).pairs


def examine(model: nn.Module, low: Tensor) -> Found:
    """The pairs as of `find_pairs`, and the layers that were refused. The model stays as it is, and
    so do the random numbers of the caller.
    """
    model = copy.deepcopy(model).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        watch = Watch(model)
        watch.run(low)
        candidates, refused = wiring(watch)
        pairs = []
        prove(*precise(model, low), candidates, pairs, refused)
    return Found(with_blocks(pairs, watch.spans), refused)


# ---- one pass, layer by layer -------------------------------------------------------------------
class Take(NamedTuple):
    """A layer takes in `x`, whose channels are in dimension `dim`."""
    layer: str
    x: Tensor
    dim: int
    through: bool = False            # it works on each channel alone: BatchNorm, depthwise, PReLU


class Watch(TorchFunctionMode):
    """Watches a pass: `takes` in the order in which layers run, `leaves` {layer: (the noise that
    stands for its output, its channels' dimension)}, and `spans` {module: (begin, end)} of those
    that are called once.

    It looks at functions, not at modules, since a layer may run without being called
    (backbones.base.enlarge). A layer is known by its weight.
    """
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.known = {}                      # id of a tensor: the layer that it belongs to
        for name, module in model.named_modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and tensor.numel() > 1:
                    self.known[id(tensor)] = name
        self.runs = Counter()
        self.takes = []
        self.leaves = {}
        self.spans = {}

    def run(self, low: Tensor) -> None:
        """The pass."""
        clock = 0
        calls = Counter()
        begins = {}
        hooks = []

        def begin(name):
            nonlocal clock
            clock += 1
            calls[name] += 1
            begins[name] = clock

        def end(name):
            nonlocal clock
            clock += 1
            self.spans[name] = begins[name], clock

        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: begin(name)))
            hooks.append(module.register_forward_hook(lambda *_, name=name: end(name)))
        with torch.enable_grad(), self:
            out = self.model(low)
        for hook in hooks:
            hook.remove()
        self.spans = {name: span for name, span in self.spans.items() if calls[name] == 1}
        self.takes += [Take(OUTPUT, image, 1) for image in tensors_of(out)]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function not in (F.conv2d, F.linear, F.batch_norm, F.prelu):
            return out
        given = [*args, *kwargs.values()]
        names = [self.known[id(each)] for each in given if id(each) in self.known]
        if not names:
            return out
        name = names[0]
        module = self.model.get_submodule(name)
        self.runs[name] += 1
        x = args[0] if args else kwargs["input"]
        dim = x.ndim - 1 if function is F.linear else 1
        groups = getattr(module, "groups", 1)
        if function in (F.batch_norm, F.prelu) or 1 < groups == len(module.weight) == x.shape[dim]:
            self.takes.append(Take(name, x, dim, through=True))
            return out
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or groups > 1:
            return out                       # it mixes channels, as anything unknown may do
        self.takes.append(Take(name, x, dim))
        # Above 0, where no ReLU is flat, and within the range of a clamp.
        noise = 0.1 + 0.8 * torch.rand(out.shape, dtype=out.dtype).to(out.device)
        self.leaves[name] = noise.requires_grad_(), dim
        return noise.clone()                 # what follows may change it in place


def tensors_of(out) -> list[Tensor]:
    """The floating-point tensors in an output: a tensor, an SR, any nest of lists and dicts."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        out = list(out.values())
    if not isinstance(out, (list, tuple)):
        return []
    return [tensor for each in out for tensor in tensors_of(each)]


# ---- which row reaches which column -------------------------------------------------------------
def reached(take: Take, leaves: dict) -> dict[str, Tensor]:
    """{layer: (rows,), the column of `take` that each of its rows reaches, NOWHERE or SEVERAL} of
    those `leaves` that reach it at all.

    Two backward passes, with a random seed s and with s · (1 + c/C) in column c of C: a gradient
    that comes from column c alone is 1 + c/C times as large in the second one, everywhere.
    """
    if not leaves or not take.x.requires_grad:
        return {}
    size = take.x.shape[take.dim]
    shape = [1] * take.x.ndim
    shape[take.dim] = size
    mark = 1 + torch.arange(size, device=take.x.device) / size
    seed = 0.1 + torch.rand_like(take.x)
    tensors = [leaf for leaf, _ in leaves.values()]
    plain, marked = (torch.autograd.grad(take.x, tensors, each, retain_graph=True,
                                         allow_unused=True)
                     for each in (seed, seed * mark.view(shape)))
    found = {}
    for (name, (_, dim)), a, b in zip(leaves.items(), plain, marked):
        if a is None:
            continue
        a = some_positions(a, dim)
        b = some_positions(b, dim)
        largest, at = a.abs().max(1, keepdim=True)
        ratio = b.gather(1, at) / a.gather(1, at)
        column = (size * (ratio - 1)).round().nan_to_num(0)
        error = (b - (1 + column / size) * a).abs().amax(1, keepdim=True)
        column[error > 1e-5 * largest] = SEVERAL
        column[largest == 0] = NOWHERE
        if largest.any():
            found[name] = column[:, 0].long().cpu()
    return found


def some_positions(x: Tensor, dim: int) -> Tensor:
    """(channels, at most 512 positions) of a map whose channels are in dimension `dim`."""
    x = x.movedim(dim, 0).flatten(1)
    return x[:, ::1 + x.shape[1] // 512].contiguous()


def wiring(watch: Watch) -> tuple[list[Pair], dict[str, str]]:
    """(candidates in the order in which their producers run, {layer: why not}).

    The layers of a trunk reach all that follows, and are soon refused; of those only the latest are
    asked again, so that the time does not grow with the square of the depth. (What this overlooks
    the proof refuses.)
    """
    refused = {}
    ran = []
    tables = {}                              # {producer: {(layer, through): its columns}}
    for take in Bar(watch.takes, "pairs", leave=False, delay=5):
        asked = [name for name in ran if name not in refused]
        asked += [name for name in ran if name in refused][-RECENT:]
        found = reached(take, {name: watch.leaves[name] for name in asked})
        for name, columns in found.items():
            reason = objection(watch, take, name, columns, found)
            if reason:
                refused.setdefault(name, reason)
            tables.setdefault(name, {})[take.layer, take.through] = columns
        if take.layer in watch.leaves and take.layer not in ran:
            ran.append(take.layer)
    candidates = []
    for name in ran:
        if watch.runs[name] > 1:
            refused[name] = "it runs more than once in a pass"
        if name not in refused:
            pair = paired(name, tables.get(name, {}))
            if isinstance(pair, str):
                refused[name] = pair
            else:
                candidates.append(pair)
    return candidates, refused


def objection(watch: Watch, take: Take, name: str, columns: Tensor,
              found: dict[str, Tensor]) -> str:
    """Why the layer `name` cannot be pruned, of which `columns` are what reaches `take`; ""."""
    if take.layer == OUTPUT:
        return "its channels reach the image without a further layer"
    if (columns == SEVERAL).any():
        return (f"each of its channels reaches several inputs of {take.layer}: attention, a norm "
                f"or a reshape lies between")
    if (columns == NOWHERE).any():
        return f"only some of its channels reach {take.layer} (a split)"
    if watch.runs[take.layer] > 1:
        return f"{take.layer}, which takes it in, runs more than once in a pass"
    if not take.through and take.layer not in watch.spans:
        return f"{take.layer}, which takes it in, is not called as a module"
    mine = set(columns.tolist())
    for other, theirs in found.items():
        if other != name and ((theirs == SEVERAL).any() or mine & set(theirs.tolist())):
            return (f"{take.layer} sees its channels together with those of {other}: a skip "
                    f"connection or a gate")
    return ""


def paired(name: str, tables: dict) -> Pair | str:
    """The pair whose width the layer `name` makes, or why there is none."""
    consumers = [columns for (_, through), columns in tables.items() if not through]
    if not consumers:
        return "no layer takes its channels in"
    # A channel is what has one column in the layer that sees fewest: with PixelShuffle(2) between,
    # four rows.
    coarse = min(consumers, key=lambda columns: len(columns.unique()))
    width = len(coarse.unique())
    if width < LEAST:
        return f"it is {width} channels wide, too few to remove any"
    if len(set(coarse.unique(return_counts=True)[1].tolist())) > 1:
        return "its rows do not form channels of equal size"
    rows = coarse.argsort(stable=True).view(width, -1)
    sides = {False: [], True: [(name, rows)]}
    for (layer, through), columns in tables.items():
        table = columns[rows]
        if (table == table[:, :1]).all():
            table = table[:, :1]
        if len(table.unique()) < table.numel():
            return f"its channels are mixed on the way to {layer}"
        sides[through].append((layer, table))
    return Pair(name, "", width, tuple(sides[True]), tuple(sides[False]))


# ---- the proof ----------------------------------------------------------------------------------
def precise(model: nn.Module, low: Tensor) -> tuple[nn.Module, Tensor]:
    """Both in float64, where forward allows it: a division by nearly 0 (the sum of a blur kernel)
    makes float32's rounding large.
    """
    double = copy.deepcopy(model).double()
    try:
        with torch.no_grad():
            double(low.double())
    except Exception:                        # of someone else's forward: it may be any
        return model, low
    return double, low.double()


def prove(model: nn.Module, low: Tensor, candidates: list[Pair], accepted: list[Pair],
          refused: dict[str, str]) -> None:
    """Moves the candidates that hold to `accepted`, the others to `refused`.

    All are tried together: what one of them does wrong shows in the output. If so, each half is
    tried by itself (beside what is accepted), and so on, until the culprit is alone.
    """
    if not candidates:
        return
    reason = failure(model, low, accepted + candidates)
    if not reason:
        accepted += candidates
    elif len(candidates) == 1:
        refused[candidates[0].name] = reason
    else:
        middle = len(candidates) // 2
        prove(model, low, candidates[:middle], accepted, refused)
        prove(model, low, candidates[middle:], accepted, refused)


@torch.no_grad()
def failure(model: nn.Module, low: Tensor, pairs: list[Pair]) -> str:
    """"" if half of the channels of every pair, drawn at random, can be removed; else why not.

    With their columns in the consumers zero, (1) random numbers in their rows of the producers must
    leave the output as it is, and (2) so must removing both.
    """
    kept = {pair.name: torch.randperm(pair.width)[:pair.width // 2].sort().values
            for pair in pairs}
    masked = copy.deepcopy(model)
    for p in masked.parameters():
        if not p.any():                      # it would hide all that lies behind it
            p.normal_(std=0.02)
    smaller = copy.deepcopy(masked)
    rows, columns = gone(pairs, kept)
    for layer, at in columns.items():
        masked.get_submodule(layer).weight[:, at] = 0
    wanted = tensors_of(masked(low))
    for layer, at in rows.items():
        for p in masked.get_submodule(layer).parameters(recurse=False):
            p[at] = torch.randn(p[at].shape).to(p) * (p.std() if p.numel() > 1 else 1)
    if apart(tensors_of(masked(low)), wanted):
        return "the output depends on its channels in another way, too"
    try:
        narrow(smaller, pairs, kept)
        found = tensors_of(smaller(low))
    except Exception as error:               # of someone else's forward: it may be any
        return f"forward fails without some of its channels: {str(error).splitlines()[0][:80]}"
    if apart(found, wanted):
        return "removing channels changes the output"
    return ""


def apart(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether outputs differ by more than rounding (root mean square, beside the deviation)."""
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or not (a - b).square().mean().sqrt() <= TOLERANCE * b.std():
            return True
    return False


# ---- where selection may replay -----------------------------------------------------------------
def with_blocks(pairs: list[Pair], spans: dict[str, tuple[int, int]]) -> list[Pair]:
    """The pairs with their `block`, in the order in which selection takes them.

    A block is the shortest call of a module that holds all consumers. Once it is finished it is
    replayed as it is: so no block may end while a consumer of a later pair has run already. One
    that would is replaced by the longer one, in which it lies.
    """
    first = {}
    blocks = {}
    for pair in pairs:
        calls = [spans[layer] for layer, _ in pair.consumers]
        begin = min(call[0] for call in calls)
        end = max(call[1] for call in calls)
        around = [span for span in spans.values() if span[0] <= begin and span[1] >= end]
        first[pair.name] = begin
        blocks[pair.name] = min(around, key=lambda span: span[1] - span[0])
    growing = True
    while growing:
        growing = False
        for one, block in blocks.items():
            for other, later in blocks.items():
                if first[other] < block[1] < later[1] and blocks[one] != later:
                    blocks[one] = later
                    growing = True
    names = {span: name for name, span in spans.items()}
    result = []
    for pair in sorted(pairs, key=lambda pair: (blocks[pair.name][1], first[pair.name])):
        consumers = sorted(pair.consumers, key=lambda consumer: spans[consumer[0]])
        result.append(pair._replace(block=names[blocks[pair.name]], consumers=tuple(consumers)))
    return result


# ---- for people ---------------------------------------------------------------------------------
def table(found: Found) -> str:
    """What was found, and what was refused and why; layers whose names differ only by numbers share
    a line.
    """
    lines = Counter()
    for pair in found.pairs:
        takers = ", ".join(layer for layer, _ in pair.consumers)
        lines[starred(f"{pair.name} -> {takers}"), pair.width] += 1
    result = [f"  {n:>4} x {width:<5} {text}" for (text, width), n in lines.items()]
    reasons = Counter(starred(f"{name}: {why}") for name, why in found.refused.items())
    result += [f"  {n:>4} stay whole  {text}" for text, n in reasons.items()]
    return "\n".join(result)


def starred(text: str) -> str:
    """The numbers in layers' names as stars."""
    return re.sub(r"(?<=\.)\d+(?=[.,: ]|$)", "*", text)
