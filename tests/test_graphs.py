"""CUDA graphs: which calls run, record and replay, with recordings that a CPU can make."""
import numpy as np
import pytest
import torch
from torch import nn

import graphs
import upscale
from backbones.base import SR
from tiny import tiny_dcls, tiny_drn


class FakeGraph:
    """As a CUDA graph: computes again from the tensors it read, into the tensors it wrote."""
    def __init__(self, function, held, result):
        self.function, self.held, self.result = function, held, result
        self.replays = 0

    def replay(self):
        self.replays += 1
        again = self.function(*self.held)
        for old, new in zip(images_of(self.result), images_of(again)):
            old.copy_(new)


def images_of(result) -> list:
    """The tensors of a result, which is an SR or one tensor."""
    return [result] if isinstance(result, torch.Tensor) else list(result.images.values())


@pytest.fixture
def fake(monkeypatch):
    """Recordings on the CPU; returns the list of graphs that were made."""
    made = []

    def record(self, inputs):
        held = [x.clone() for x in inputs]
        result = self.function(*held)
        made.append(FakeGraph(self.function, held, result))
        for image in images_of(result):              # a recording computes nothing
            image.fill_(torch.nan)
        return made[-1], held, result

    monkeypatch.setattr(graphs.Recorder, "record", record)
    return made


class Double(nn.Module):
    scale = 1

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, low, kernel=None):
        self.calls += 1
        return SR({1: 2 * low}, kernel)


@torch.no_grad()
def test_the_first_call_runs_the_second_records_the_others_replay(fake):
    model = Double()
    graphs.use(model)
    results = []
    for k in range(4):
        x = torch.full((1, 3, 4, 5), float(k))
        results.append((model(x).images[1], 2 * x))
    assert len(fake) == 1 and fake[0].replays == 3
    for image, expected in results:                  # also those of earlier replays
        assert torch.equal(image, expected)
    model(torch.ones(1, 3, 5, 4))
    assert len(fake) == 1, "another size begins anew"


@torch.no_grad()
def test_layers_are_replayed_too(fake):
    """Their result is one tensor; latency.py times them so."""
    layers = nn.Linear(3, 2)
    inputs = [torch.randn(4, 3) for _ in range(4)]
    expected = [layers(x) for x in inputs]
    graphs.use(layers)
    results = [layers(x) for x in inputs]
    assert len(fake) == 1 and fake[0].replays == 3
    for out, right in zip(results, expected):        # also those of earlier replays
        assert torch.equal(out, right)


@torch.no_grad()
def test_few_recordings_are_kept(fake):
    model = Double()
    graphs.use(model)
    for side in range(1, graphs.MOST + 3):
        for _ in range(2):
            model(torch.ones(1, 3, side, side))
    assert len(model.forward.recordings) == graphs.MOST


def test_with_gradients_nothing_is_recorded(fake):
    model = Double()
    graphs.use(model)
    for _ in range(3):
        model(torch.ones(1, 3, 2, 2))
    assert fake == [] and model.calls == 3


@torch.no_grad()
def test_a_network_that_cannot_be_recorded_runs_as_usual_and_one_line_says_so(
        monkeypatch, capsys):
    """Here for want of a GPU."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", None)
    model = Double()
    graphs.use(model)
    for side in (2, 3):
        for _ in range(4):
            x = torch.ones(1, 3, side, side)
            assert torch.equal(model(x).images[1], 2 * x)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("no CUDA graph: ")


@pytest.mark.parametrize("tiny, ensemble", [(tiny_drn, True), (tiny_dcls, False)])
def test_pictures_are_the_same_with_graphs(tiny, ensemble, fake):
    """Tiles in all orientations; a blind network with its kernel."""
    model = tiny()[0].eval()
    low = np.random.default_rng(0).integers(0, 256, (70, 97, 3), np.uint8)
    expected = upscale.upscale(model, low, tile=64, overlap=0, ensemble=ensemble)
    graphs.use(model)
    assert np.array_equal(
        upscale.upscale(model, low, tile=64, overlap=0, ensemble=ensemble), expected)
    assert fake and sum(graph.replays for graph in fake) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a real CUDA graph needs a GPU")
@pytest.mark.parametrize("tiny", [tiny_drn, tiny_dcls])
def test_real_graphs_give_the_same(tiny):
    model = tiny()[0].eval().cuda()
    inputs = [torch.rand(1, 3, 32, 24, device="cuda") for _ in range(4)]
    with torch.inference_mode():
        expected = [model(x).images[model.scale] for x in inputs]
        graphs.use(model)
        for x, image in zip(inputs, expected):
            assert (model(x).images[model.scale] - image).abs().max() < 1e-5
    assert not model.forward.off
