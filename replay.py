"""Replay: while a pair is selected, what ran before it is not run again.

While channels of a pair are chosen (prune.select), only weights of its block change, the
calibration batches are fixed, and in evaluation mode nothing is random: whatever ran before gives
the same output in every pass. So the output of every finished block is stored once for each batch,
and from then on the block returns it in place of running. Nothing is approximated: the same
operations on the same numbers follow. It only saves time, half of it for a small DRN.

What this asks of a network is the first of the traps in backbones/base.py. Everywhere in this file
`stored` is {module name: its output} for one batch and one network. Not here: what is done with the
passes (prune.py, to be read first).
"""
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def replaying(stored: list[tuple[nn.Module, object]]):
    """Within it each of the modules returns the output beside it and does not run."""
    for module, output in stored:
        module.forward = partial(again, output)
    try:
        yield
    finally:
        for module, _ in stored:
            del module.forward               # the class's own forward is visible again


def by_module(network: nn.Module, stored: dict) -> list[tuple[nn.Module, object]]:
    """{name: output} for `replaying`; looking modules up by name in every pass would take time."""
    return [(network.get_submodule(name), output) for name, output in stored.items()]


def again(stored, *inputs):
    """The stored output; a copy, because what follows may change it in place, as nn.ReLU can."""
    if isinstance(stored, tuple):
        return tuple(again(part) for part in stored)
    return stored if stored is None else stored.clone()


@torch.no_grad()
def ahead_of(network: nn.Module, pair, batch, stored: dict) -> dict:
    """{name: output} of what precedes the pair's consumer in its nn.Sequential, if it is in one.

    Only the consumer's weights change while channels are chosen, so these are not run again either.
    Of a chain only the last output is read; the members before it get None, which nobody uses.
    """
    parent, _, own = pair.consumers[0][0].rpartition(".")
    chain = network.get_submodule(parent)
    members = [name for name, _ in chain.named_children()]
    if not isinstance(chain, nn.Sequential) or members[0] == own:
        return {}
    names = [f"{parent}.{name}" for name in members[:members.index(own)]]
    with replaying(by_module(network, stored)):
        output = run_to(network, names[-1], batch.images[1])
    found = dict.fromkeys(names)
    found[names[-1]] = output
    return found


@contextmanager
def collecting(network: nn.Module, pair, note: Callable | None = None):
    """A list that collects what the pair's consumers put out while the block runs.

    note: (module, inputs, output) -> what is collected in place of the output.
    """
    found = []

    def collect(module, inputs, output):
        found.append(note(module, inputs, output) if note else output)

    hooks = [network.get_submodule(layer).register_forward_hook(collect)
             for layer, _ in pair.consumers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class Reached(Exception):
    """Carries a module's output out of the forward pass, which ends there."""


def run_to(network: nn.Module, name: str, low: Tensor):
    """The output of the module `name` for the images `low`; what comes after it is not run."""
    def leave(module, inputs, output):
        raise Reached(output)

    hook = network.get_submodule(name).register_forward_hook(leave)
    try:
        network(low)
    except Reached as reached:
        return reached.args[0]
    finally:
        hook.remove()
    raise ValueError(f"{type(network).__name__}.forward never calls its module {name!r}: selection "
                     f"needs every block of pairs() to be called as a module")


@torch.no_grad()
def count_calls(network: nn.Module, low: Tensor) -> Counter:
    """{module name: how often a forward pass calls it}."""
    calls = Counter()
    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
    network(low)
    for hook in hooks:
        hook.remove()
    return calls


def called_once(network: nn.Module, low: Tensor) -> set[str]:
    """The names of the modules that a forward pass calls once: only these can be replayed."""
    return {name for name, count in count_calls(network, low).items() if count == 1}


@torch.no_grad()
def advance(network: nn.Module, block: str, batch, stored: dict, once: set[str]) -> None:
    """Adds to `stored` what is finished when `block` is, and drops what no one will read again.

    After up_blocks.0.3 of a DRN, for example, `stored` has outputs for enlarge, sub_mean, head,
    down.0, down.1, tail.0 and up_blocks.0.3. None of these runs again. (Only the downs and the last
    one are blocks; the others are modules that have run by then.) The earlier members of the chain,
    up_blocks.0.0 to 2, have None: they are not run either, and nobody reads them. Once up_blocks.0
    as a whole is finished, it replaces its members. once: see `called_once`.
    """
    finished = {}

    def keep(name):
        def hook(module, inputs, output):
            finished[name] = again(output)   # before anything changes it in place
        return hook

    hooks = [network.get_submodule(name).register_forward_hook(keep(name))
             for name in once - stored.keys()]
    with replaying(by_module(network, stored)):
        run_to(network, block, batch.images[1])
    for hook in hooks:
        hook.remove()
    for name, output in finished.items():    # inner modules come first, and give way to outer ones
        parent = name.rpartition(".")[0]
        in_chain = isinstance(network.get_submodule(parent), nn.Sequential)
        for other in list(stored):
            if other.startswith(f"{name}."):
                del stored[other]
            elif in_chain and other.rpartition(".")[0] == parent:
                stored[other] = None         # it is still not to be run
        stored[name] = output


@torch.no_grad()
def can_replay(network: nn.Module, blocks: list[str], batch) -> bool:
    """Whether replayed blocks leave the output of a network as it is, of which nobody knows that it
    keeps the rules (backbones/base.py). Some five of the blocks are tried, the last one, too.
    """
    def images():
        return list(network(batch.images[1]).images.values())

    network.eval()
    once = called_once(network, batch.images[1])
    wanted = images()
    stored = {}
    blocks = list(dict.fromkeys(blocks))
    for block in blocks[::-1][::1 + len(blocks) // 5][::-1]:
        try:
            advance(network, block, batch, stored, once)
            with replaying(by_module(network, stored)):
                found = images()
        except (AttributeError, TypeError, ValueError, RuntimeError):    # it met a None
            return False
        if not all(torch.equal(a, b) for a, b in zip(found, wanted)):
            return False
    return True
