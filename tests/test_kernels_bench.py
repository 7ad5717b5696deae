"""The benchmark of the kernels: its baselines compute the same, and it runs without a GPU."""
import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from bench import baselines, measuring
from bench import kernels as bench_kernels
from tiny import ROOT
from triton_path import attention, attention_case

SHAPES = [
    (2, 9, 16, 2, 10, (8, 8), (4, 4)),
    (1, 20, 40, 2, 30, (8, 32), (4, 16), True),
    (1, 8, 8, 1, 10, (8, 8)),
]


@pytest.mark.filterwarnings("ignore:.*flex_attention")           # not compiled here, so slow
@pytest.mark.parametrize("core", [baselines.authors, baselines.memory_efficient, baselines.flex])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_baselines_compute_the_same(shape, core, monkeypatch):
    """A baseline that computes something else would be no baseline."""
    monkeypatch.setattr(baselines, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    qkv, table, _, settings = attention_case(*shape, device="cpu")
    expected = attention.reference(qkv, table, **settings)
    ready = baselines.prepare(qkv, settings["window"], settings["shift"], settings["crossed"])
    out = baselines.written_out(core, qkv, table, **settings, ready=ready)
    assert (out - expected).abs().max() < 1e-5


@pytest.mark.parametrize("core", [baselines.authors, baselines.memory_efficient])
def test_the_baselines_can_be_compiled_as_one_graph(core, monkeypatch):
    monkeypatch.setattr(baselines, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    qkv, table, _, settings = attention_case(*SHAPES[1], device="cpu")
    ready = baselines.prepare(qkv, settings["window"], settings["shift"], settings["crossed"])
    function = bench_kernels.around(core, ready)
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    difference = compiled(qkv, table, **settings) - function(qkv, table, **settings)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_the_authors_can_take_the_place_of_ours(shape):
    qkv, table, _, settings = attention_case(*shape, device="cpu")
    expected = attention.reference(qkv, table, **settings)
    assert (baselines.authors_attention(qkv, table, **settings) - expected).abs().max() < 1e-5


class Traffic(TorchDispatchMode):
    """Counts the numbers that operations read and write; views move none."""
    moved = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        inputs = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        memory = {x.untyped_storage().data_ptr() for x in inputs}
        if not any(x.untyped_storage().data_ptr() in memory for x in outputs):
            self.moved += sum(numbers_in(x) for x in inputs + outputs)
        return result


def numbers_in(x: torch.Tensor) -> int:
    """How many numbers of memory a tensor has; those repeated by a stride of 0 count once."""
    count = 1
    for size, stride in zip(x.shape, x.stride()):
        if stride != 0:
            count *= size
    return count


def test_the_memory_traffic_told_at_the_head_of_attention_is_counted():
    """8,536 numbers a token forward, 10,273 backward, for a layer of SwinIR on 320×184."""
    settings = dict(heads=6, window=(8, 8), shift=(4, 4), scale=30**-0.5, crossed=False)
    qkv = torch.randn(1, 184, 320, 540, requires_grad=True)
    table = torch.randn(225, 6, requires_grad=True)
    ready = baselines.prepare(qkv, (8, 8), (4, 4), False)
    with Traffic() as forward:
        out = baselines.written_out(baselines.authors, qkv, table, **settings, ready=ready)
    dout = torch.randn_like(out)
    with Traffic() as backward:
        torch.autograd.grad(out, (qkv, table), dout)
    assert forward.moved / (184 * 320) == pytest.approx(8536, abs=2)
    assert backward.moved / (184 * 320) == pytest.approx(10273, abs=2)
    words = attention.__doc__
    for told in ("8,536, fused 720", "1,005 MB", "10,273 numbers", "1,210 MB", "85 MB", "148 MB"):
        assert told in words
    assert round(184 * 320 * 8536 * 2 / 1e6) == 1005
    assert round(184 * 320 * 10273 * 2 / 1e6) == 1210
    assert round(184 * 320 * 720 * 2 / 1e6) == 85
    assert round(184 * 320 * 1260 * 2 / 1e6) == 148


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes longer")
@pytest.mark.parametrize("cases, rows_of, name, ours, inputs, moved", [
    ("MLP", "mlp_rows", "mlp 60->120 16x64x64", "residual_mlp",
     [(1, 64, 64, 60), (60,), (60,), (120, 60), (120,), (60, 120), (60,)],
     64 * 64 * (60 + 60)),
    ("CONVOLUTION", "convolution_rows", "conv 60->48 r4 320x180", "conv3x3_pixel_shuffle",
     [(1, 60, 180, 320), (48, 60, 3, 3), (48,)],
     320 * 180 * (60 + 48)),
])
def test_an_operation_is_timed_in_every_way(
        cases, rows_of, name, ours, inputs, moved, monkeypatch):
    """Ours first, and PyTorch's own, both on what a network would give them; moved: numbers that
    are read or written, of four bytes here.
    """
    def ways_of(mine, plain):
        assert mine is getattr(kernels, ours)

        def watch(*arguments):
            seen.append([tuple(x.shape) for x in arguments if isinstance(x, torch.Tensor)])
            return plain(*arguments)

        return dict(triton=watch, eager=plain)

    class Rows(measuring.Rows):
        def __init__(self, case, timer, repeat, moved, floor):
            super().__init__(case, timer, repeat, moved, floor)
            seen.append(moved)

    seen = []
    monkeypatch.setattr(bench_kernels, "Rows", Rows)
    monkeypatch.setattr(measuring, "keep", lambda row: None)
    monkeypatch.setattr(bench_kernels, "ways_of", ways_of)
    case = getattr(bench_kernels, cases)[name]
    rows = getattr(bench_kernels, rows_of)(name, case, 1)
    assert [row["way"] for row in rows] == ["triton", "eager"]
    assert all(row["case"] == name and row["seconds"] > 0 for row in rows)
    assert seen[:2] == [4 * moved, inputs]


def test_the_way_of_a_network_can_be_set_and_set_back(monkeypatch):
    ours = kernels.window_attention
    monkeypatch.setattr(kernels.switch, "IMPL", kernels.switch.IMPL)
    bench_kernels.set_way("authors compiled")
    assert kernels.window_attention is baselines.authors_attention
    bench_kernels.set_way("torch")
    assert kernels.window_attention is ours
    assert kernels.switch.IMPL == "torch"


def test_a_way_that_fails_gets_a_row_with_the_reason(capsys):
    def fail():
        raise ValueError("too large\nand more")

    rows = measuring.Rows("case", lambda function, repeat: 0.5, repeat=1)
    rows.measure("first", lambda: None)
    rows.measure("second", fail)
    assert rows.rows[0]["ratio"] == 1
    assert rows.rows[1]["failed"] == "ValueError: too large"
    assert "ValueError: too large" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes")
def test_without_a_gpu_it_says_so_and_times_the_pytorch_paths(tmp_path):
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.kernels", "--repeat", "1", "--only", "light",
               "--json", str(path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("no GPU: only the PyTorch paths run")
    assert [file.name for file in tmp_path.iterdir()] == ["rows.json"]
    written = json.loads(path.read_text())
    assert set(written["machine"]) == {"gpu", "driver", "cuda", "torch", "triton", "python",
                                       "commit"}
    assert written["machine"]["gpu"] is None
    assert written["machine"]["torch"] == torch.__version__
    assert len(written["rows"]) == 6                             # three ways, forward and both
    ways = {row["way"] for row in written["rows"]}
    assert ways == {"ours, PyTorch", "eager", "reference"}
    assert all(row["seconds"] > 0 for row in written["rows"])
