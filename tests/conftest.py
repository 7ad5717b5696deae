"""The repository on the import path, one thread for tiny tensors, the same random numbers, and a
clock that tests can turn.
"""
import math
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # more threads would only wait for each other

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import latency
from kernels import switch

# A shell that starts the tests in the background makes them, and their children, ignore ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """The same random numbers for every test, and the kernels as they were for the next one."""
    torch.manual_seed(0)
    monkeypatch.setattr(switch, "IMPL", switch.IMPL)


class Clock:
    """A clock that stands still unless it is told to go on."""
    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    """The clock by which latency.py measures."""
    fake = Clock()
    monkeypatch.setattr(latency, "clock", fake)
    return fake


def effort(layer: nn.Module) -> float:
    """Milliseconds of a layer whose inputs and outputs fill vectors of 6: a stair, no line."""
    outputs, inputs, *_ = layer.weight.shape
    return math.ceil(inputs / 6) * math.ceil(outputs / 6)


@pytest.fixture
def stairs(clock):
    """The clock goes on by `effort` in every convolution and linear layer, of any network."""
    def work(module, inputs, output):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            clock.seconds += effort(module) / 1000

    handle = nn.modules.module.register_module_forward_hook(work)
    yield clock
    handle.remove()
