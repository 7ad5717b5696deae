"""How long networks take on this device, and which widths give the time that is wanted.

A computer is not equally fast at all times: it warms up, and other programs want it, too. So the
networks to be compared run in turns on the same input, round after round, and what counts is how
they compare within a round. Fewer multiply-adds are not always less time: a width of 20 may fill no
more vector lanes than one of 32 does.

    interleaved      compares whole networks; the report and the benchmarks use it
    measure_pairs    what each width of each layer takes, for --budget latency=F (ours, not DRC's)
    fit              chooses widths by it, measures the whole network, and corrects the limit

Networks are timed as `models.inference` makes them, on a GPU as CUDA graphs (graphs.py), as
upscale.py runs them. Not here: how widths are chosen within a budget
(widths.fit_budget), and when (train.py). Which widths are fast: bench/latency.py.
"""
import json
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import graphs
import models
from kernels import switch
from replay import count_calls
from run import progress, read_json, write_file
from widths import Budget

SIDE = 96                            # low-resolution pixels, the input for which MAdds are counted
ROUNDS = 7                           # passes of each network, at least
SMALL = 0.03                         # spread of a ratio at which no more rounds are needed,
MOST = 3                             # unless there have been so many times ROUNDS already
TRIES = 4                            # networks measured to meet a limit,
CLOSE = 0.02                         # until one is so close to it
clock = time.perf_counter            # bench/ counts the time of this process where others run, too


def now(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def device_name(device: torch.device) -> str:
    """What a measured time belongs to: "AMD EPYC (AVX512, 2 threads)", "NVIDIA H200"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():        # Linux
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}, {torch.get_num_threads()} threads)"


def ready(network: nn.Module, device: torch.device) -> nn.Module:
    """The network as it is timed."""
    network = models.inference(network, device=device)
    if device.type == "cuda" and switch.IMPL != "torch":
        graphs.use(network)
    return network


def noise(device: torch.device, side: int = SIDE) -> torch.Tensor:
    """(1, 3, side, side) of noise, without touching the random numbers of the run."""
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


# ---- whole networks, in turns -------------------------------------------------------------------
class Timing(NamedTuple):
    """What `interleaved` finds out about one network."""
    seconds: float                   # of a pass, the median
    spread: float                    # of the seconds: the middle half of them, as a part of that
    ratio: float                     # seconds of this network / of the first one within a round,
    #                                  the median
    ratio_spread: float              # likewise of the ratio


def interleaved(networks: dict[str, Callable], low: torch.Tensor,
                rounds: int = ROUNDS) -> dict[str, Timing]:
    """Times functions of `low`, such as networks of `ready`, in turns; each runs once before that.

    On a GPU each also runs before each time that counts: between two rounds a GPU goes to sleep.

    low: (N, 3, H, W) on their device. There are at least `rounds` rounds, and up to MOST times as
    many while a ratio spreads by more than SMALL. (The order stays. Were every other round run
    backwards, the first and the last would follow themselves, and find the caches warm.)
    """
    names = list(networks)
    seconds = {name: [] for name in names}
    with torch.inference_mode(), progress("latency", rounds, unit="round") as bar:
        for name in names:
            networks[name](low)
        while True:
            for name in names:
                if low.is_cuda:
                    networks[name](low)
                start = now(low.device)
                networks[name](low)
                seconds[name].append(now(low.device) - start)
            bar.update()
            done = len(seconds[names[0]])
            if done < rounds:
                continue
            found = {name: timing(each, seconds[names[0]]) for name, each in seconds.items()}
            worst = max(each.ratio_spread for each in found.values())
            if worst <= SMALL or done >= MOST * rounds:
                return found
            bar.total = done + 1


def timing(seconds: list[float], first: list[float]) -> Timing:
    """The Timing of a network, from the seconds of its passes and those of the first network."""
    median, spread = middle(seconds)
    ratio, ratio_spread = middle(np.array(seconds) / first)
    return Timing(median, spread, ratio, ratio_spread)


def middle(values) -> tuple[float, float]:
    """(median, distance of the quartiles as a part of the median)."""
    low, median, high = np.percentile(values, (25, 50, 75))
    return float(median), float((high - low) / median)


# ---- what each width of each layer takes --------------------------------------------------------
# A pair's time runs from the call of its first producer to the return of its last consumer. One
# pass of a network gives the times of all its pairs, where they really run: with the caches as the
# layer before left them. Each of six networks has other candidates of every pair, so all of them
# are timed. The widths are mixed within a network, as they will be in the one that is chosen. Even
# so the sum over the layers can be off by a tenth, which is why `fit` measures the whole network.
# What a network takes besides its pairs does not depend on the widths.
def measure_pairs(model, options: dict[str, list[int]], device: torch.device, file: Path,
                  side: int = SIDE) -> dict:
    """The time of every candidate width: {"device", "rounds", "dense": ms, "rest": ms, "pairs":
    {pair: {width: ms}}}. A network takes rest + Σ pairs[name][width]; dense is measured as it is.

    options: {pair: its candidate widths}, equally many for all pairs. Every round is written to
    `file`, and what stands there is not measured again, unless it is of another device or of other
    candidates.
    """
    key = dict(device=device_name(device), side=side, dense=model.widths, options=options)
    low = noise(device, side)
    choices = [model.widths, *mixed(options)]
    state = key | dict(times=known_times(file, key, len(choices)))
    if len(state["times"]) < ROUNDS:
        networks = []
        with torch.random.fork_rng():            # new networks draw weights
            for widths in choices:
                networks.append(models.inference(model.with_widths(widths), device=device))
        called = set(count_calls(networks[0], low))
        pairs = model.pairs()
        with progress("latency", ROUNDS + 1, len(state["times"]), "round") as bar:
            passes = [timed_pass(network, pairs, called, low) for network in networks]
            for one_pass in passes:              # a warm one, which does not count
                one_pass()
            bar.update()
            while len(state["times"]) < ROUNDS:
                state["times"].append([one_pass() for one_pass in passes])
                write_file(file, json.dumps(state).encode())
                bar.update()
    return summary(state["times"], choices, identical(model, low)) | dict(device=key["device"])


def known_times(file: Path, key: dict, networks: int) -> list[list[dict]]:
    """The rounds that are measured already; none where the file is missing, damaged, or of another
    device or of other candidates, which `key` names.
    """
    try:
        state = read_json(file, dict(times=[[{str: float}]]))
    except ValueError:
        return []
    names = {"", *key["options"]}
    whole = all(len(each) == networks and all(one.keys() == names for one in each)
                for each in state["times"])
    return state["times"] if whole and {name: state.get(name) for name in key} == key else []


def mixed(options: dict[str, list[int]]) -> list[dict[str, int]]:
    """Six choices of widths, in which every candidate of every pair occurs once."""
    draw = np.random.default_rng(0)
    orders = [draw.permutation(each).tolist() for each in options.values()]
    return [dict(zip(options, widths)) for widths in zip(*orders)]


def timed_pass(network: nn.Module, pairs: list, called: set[str], low: torch.Tensor) -> Callable:
    """A function that runs a pass: {"": ms of it, pair name: ms within the pair}.

    On a GPU it replays a CUDA graph, in which the marks are recorded, too.
    """
    if not low.is_cuda:
        return partial(time_pass, network, pairs, called, low)
    marks = {}

    def marked(x: torch.Tensor):
        with marking(network, pairs, called, x.device) as found:
            begin = mark(x.device)
            result = network(x)
            marks.update(found | {"": [begin, mark(x.device)]})
        return result

    recorder = graphs.Recorder(marked)

    def one_pass() -> dict:
        with torch.inference_mode():
            recorder(low)
        torch.cuda.synchronize(low.device)
        return durations(marks)

    one_pass()                                   # as usual; the next one records
    return one_pass


def time_pass(network: nn.Module, pairs: list, called: set[str], low: torch.Tensor) -> dict:
    """The same, with all launches."""
    with torch.inference_mode(), marking(network, pairs, called, low.device) as marks:
        start = now(low.device)
        network(low)
        end = now(low.device)
    return durations(marks) | {"": 1000 * (end - start)}


def durations(marks: dict) -> dict[str, float]:
    """{name: milliseconds from its first mark to its second}."""
    return {name: between(begin, end) for name, (begin, end) in marks.items()}


@contextmanager
def marking(network: nn.Module, pairs: list, called: set[str], device: torch.device):
    """{pair name: [mark at its beginning, mark at its end]} of a pass within it.

    Of a layer that the network does not call as a module (its weight is used elsewhere, or has been
    folded into another one), the innermost module around it that is called stands for it.
    """
    marks = {}
    handles = []
    for pair in pairs:
        def begin(module, inputs, name=pair.name):
            marks.setdefault(name, [mark(device), None])

        def end(module, inputs, output, name=pair.name):
            marks[name][1] = mark(device)

        for layer, _ in pair.producers:
            module = network.get_submodule(innermost(layer, called))
            handles.append(module.register_forward_pre_hook(begin))
        for layer, _ in pair.consumers:
            module = network.get_submodule(innermost(layer, called))
            handles.append(module.register_forward_hook(end))
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def mark(device: torch.device):
    """A point in time: seconds, or on a GPU an event among the work that it was given, or that a
    CUDA graph records.
    """
    if device.type != "cuda":
        return clock()
    event = torch.cuda.Event(enable_timing=True, external=True)
    event.record()
    return event


def between(begin, end) -> float:
    """Milliseconds from one mark to another."""
    if isinstance(begin, float):
        return 1000 * (end - begin)
    return begin.elapsed_time(end)


def innermost(layer: str, called: set[str]) -> str:
    """The layer itself where it is called, else the innermost called module around it."""
    while layer not in called:
        layer = layer.rpartition(".")[0]
    return layer


@torch.inference_mode()
def identical(model, low: torch.Tensor) -> dict[str, str]:
    """{pair: the first pair like it}: the same shapes of weights, and of what enters its block."""
    entered = {}
    hooks = []
    for block in {pair.block for pair in model.pairs()}:
        def note(module, inputs, block=block):
            first = inputs[0]
            while isinstance(first, tuple):      # DCLS: two maps travel together
                first = first[0]
            entered[block] = first.shape

        hooks.append(model.get_submodule(block).register_forward_pre_hook(note))
    model.eval()
    model(low)
    for hook in hooks:
        hook.remove()
    first, result = {}, {}
    for pair in model.pairs():
        layers = [layer for layer, _ in pair.producers + pair.consumers]
        shapes = tuple(model.get_submodule(layer).weight.shape for layer in layers)
        like = (shapes, pair.heads, entered[pair.block])
        result[pair.name] = first.setdefault(like, pair.name)
    return result


def summary(times: list[list[dict]], choices: list[dict], like: dict[str, str]) -> dict:
    """The table of `measure_pairs`.

    times: for each round, what `timed_pass` found for the dense network and for each of the mixed
    ones; choices: the widths of each of these; like: see `identical`. A candidate's time is
    the median over the rounds, then the mean over the pairs that are alike. (The mean, so that what
    they take together stays right: every other window of SwinIR is shifted and takes longer.)
    """
    medians = []
    for network in range(len(choices)):
        passes = [one_round[network] for one_round in times]
        medians.append({name: float(np.median([each[name] for each in passes]))
                        for name in passes[0]})
    samples = {}
    for widths, found in zip(choices, medians):
        for name in like:
            samples.setdefault((like[name], widths[name]), []).append(found[name])
    pairs = {name: {} for name in like}
    for (first, width), found in samples.items():
        for name in like:
            if like[name] == first:
                pairs[name][width] = float(np.mean(found))
    rests = []
    for widths, found in zip(choices, medians):
        rests.append(found[""] - sum(pairs[name][widths[name]] for name in like))
    return dict(rounds=len(times), dense=medians[0][""], rest=float(np.mean(rests)), pairs=pairs)


# ---- widths for a given time --------------------------------------------------------------------
def budget(table: dict, part: float, options: dict[str, list[int]]) -> Budget:
    """The budget (in ms) of a `part` of the dense network's time.

    ValueError: no candidates take so much or so little. (A limit that the slowest ones miss by less
    than 5 %, which is not more than the error of the table, is theirs.)
    """
    def cost(widths):
        return table["rest"] + sum(table["pairs"][name][n] for name, n in widths.items())

    least, most = table["rest"], table["rest"]
    for name, widths in options.items():
        each = [table["pairs"][name][n] for n in widths]
        least += min(each)
        most += max(each)
    limit = part * table["dense"]
    if limit < least or most < 0.95 * limit:
        raise ValueError(
            f"--budget latency={part:g} cannot be met: on {table['device']} the candidate widths "
            f"take {least / table['dense']:.2f} to {most / table['dense']:.2f} of the dense "
            f"network's time; choose another budget or another --prune")
    return Budget(cost, min(limit, most))


def fit(widths_within: Callable[[Budget], dict[str, int]], model, first: Budget, part: float,
        device: torch.device, side: int = SIDE) -> tuple[dict[str, int], Timing]:
    """Widths with which the network really takes a `part` of the dense one's time, and that time.

    The sum of the pairs' times is an estimate. So the network that comes out is measured beside the
    dense one, and if it is not close enough, its limit is divided by the error and the widths are
    chosen anew. The closest of TRIES networks is taken. widths_within: Search.widths.
    """
    low = noise(device, side)
    dense = ready(model, device)
    limit = first.limit
    tried = {}
    best = None
    for _ in range(TRIES):
        try:
            widths = widths_within(first._replace(limit=limit))
        except ValueError:
            if best is None:
                raise
            break                    # the corrected limit is out of reach
        numbers = tuple(widths.values())
        if numbers in tried:
            break                    # correcting has come round
        with torch.random.fork_rng():
            network = ready(model.with_widths(widths), device)
        tried[numbers] = interleaved(dict(dense=dense, pruned=network), low)["pruned"]
        error = tried[numbers].ratio / part
        if best is None or abs(error - 1) < abs(best[1].ratio / part - 1):
            best = (widths, tried[numbers])
        if abs(error - 1) <= CLOSE:
            break
        limit /= error
    return best
