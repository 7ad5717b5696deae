"""The switch between the Triton kernels and PyTorch: what it says, what it sets, its imports."""
import ast
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import switch
from tiny import ROOT


@pytest.fixture
def machine(monkeypatch):
    """Pretends a machine: machine(gpu, triton). The switch is set back afterwards."""
    monkeypatch.setattr(switch, "IMPL", switch.IMPL)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def pretend(gpu: bool, triton: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found" if triton else None)

    return pretend


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown kernels 'cuda': choose torch or triton"):
        kernels.choose("cuda")


def test_torch_can_be_asked_for_anywhere(machine):
    machine(gpu=True, triton=True)
    assert kernels.choose("torch") == "kernels: torch (as asked)"
    assert switch.IMPL == "torch"


def test_triton_is_taken_where_there_is_a_gpu(machine):
    machine(gpu=True, triton=True)
    assert kernels.choose() == "kernels: triton"
    assert switch.IMPL == "triton"
    assert kernels.choose("triton") == "kernels: triton (as asked)"
    assert not kernels.runs_triton(torch.ones(1)), "a tensor on the CPU beside the GPU"
    assert not kernels.runs_triton(torch.ones(1, device="meta"))


def test_without_a_gpu_the_switch_says_so(machine):
    machine(gpu=False, triton=True)
    assert kernels.choose() == "kernels: torch (there is no CUDA GPU)"
    assert switch.IMPL == "torch"
    with pytest.raises(ValueError, match="triton cannot run here: there is no CUDA GPU; choose"):
        kernels.choose("triton")


def test_without_triton_the_switch_says_so(machine):
    machine(gpu=True, triton=False)
    line = kernels.choose()
    assert line.startswith("kernels: torch (Triton is not installed (pip install triton")
    with pytest.raises(ValueError, match="Triton is not installed"):
        kernels.choose("triton")


def test_the_interpreter_runs_only_when_asked_for(machine, monkeypatch):
    machine(gpu=False, triton=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.choose() == "kernels: torch"
    assert not kernels.runs_triton(torch.ones(1))
    kernels.choose("triton")
    assert kernels.runs_triton(torch.ones(1))


def test_triton_is_not_imported_before_it_is_used():
    """Nor is it needed: without it the switch says torch."""
    script = ("import sys, kernels; assert 'triton' not in sys.modules; "
              "sys.modules['triton'] = None; kernels.choose(); print(kernels.switch.IMPL)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("torch\n", "")


def test_the_kernels_import_nothing_of_the_project():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"backbones", "bench", "tests"}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                names = [node.module]
            for name in names:
                assert name.split(".")[0] not in ours, f"{path} imports {name}"
