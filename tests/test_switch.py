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
    """Pretends a machine: machine(gpu, triton). The switch is set back afterwards.

    gpu: the compute capability of its GPU, or of several, or None.
    """
    monkeypatch.setattr(switch, "IMPL", switch.IMPL)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    switch.look_at.cache_clear()

    def pretend(gpu: tuple | list | None, triton: bool, hip: str | None = None) -> None:
        gpus = gpu if isinstance(gpu, list) else [gpu]

        def capability(device=None):
            return gpus[device.index if device else 0]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found" if triton else None)

    yield pretend
    switch.look_at.cache_clear()


class Somewhere:
    """Stands in for a tensor on a device that this machine does not have."""
    def __init__(self, device: str):
        self.device = torch.device(device)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown kernels 'cuda': choose torch or triton"):
        kernels.choose("cuda")


def test_torch_can_be_asked_for_anywhere(machine):
    machine(gpu=(9, 0), triton=True)
    assert kernels.choose("torch") == "kernels: torch (as asked)"
    assert switch.IMPL == "torch"


def test_triton_is_taken_where_there_is_a_gpu(machine):
    machine(gpu=(9, 0), triton=True)
    assert kernels.choose() == "kernels: Triton or PyTorch, timed at first use"
    assert switch.IMPL == "fastest"
    assert kernels.runs_triton(Somewhere("cuda:0"))
    assert kernels.choose("triton") == "kernels: triton (as asked)"
    assert switch.IMPL == "triton"
    assert not kernels.runs_triton(torch.ones(1)), "a tensor on the CPU beside the GPU"
    assert not kernels.runs_triton(torch.ones(1, device="meta"))


def test_a_gpu_before_ampere_is_refused_with_its_name(machine):
    machine(gpu=(7, 5), triton=True)
    words = "Tesla T4 has compute capability 7.5, the kernels need 8.0"
    assert kernels.choose() == f"kernels: torch ({words})"
    assert switch.IMPL == "torch"
    assert kernels.choose("torch") == "kernels: torch (as asked)"
    with pytest.raises(ValueError, match=words):
        kernels.choose("triton")


def test_each_gpu_is_looked_at_and_an_old_one_named_once(machine, capsys):
    """cuda:0 can run the kernels, cuda:1 cannot."""
    machine(gpu=[(8, 0), (7, 5)], triton=True)
    kernels.choose()
    assert switch.IMPL == "fastest"
    assert [kernels.runs_triton(Somewhere(name)) for name in ("cuda:0", "cuda:1", "cuda:1")] == [
        True, False, False]
    assert capsys.readouterr().err == (
        "kernels: torch on cuda:1 (Tesla T4 has compute capability 7.5, the kernels need 8.0)\n")


def test_an_amd_gpu_is_refused(machine):
    machine(gpu=(9, 4), triton=True, hip="6.4")
    assert kernels.choose().startswith("kernels: torch (the kernels are written for NVIDIA's GPUs")
    with pytest.raises(ValueError, match="for AMD's"):
        kernels.choose("triton")


def test_without_a_gpu_the_switch_says_so(machine):
    machine(gpu=None, triton=True)
    assert kernels.choose() == "kernels: torch (there is no CUDA GPU)"
    assert switch.IMPL == "torch"
    with pytest.raises(ValueError, match="triton cannot run here: there is no CUDA GPU; choose"):
        kernels.choose("triton")


def test_without_triton_the_switch_says_so(machine):
    machine(gpu=(9, 0), triton=False)
    line = kernels.choose()
    assert line.startswith("kernels: torch (Triton is not installed (pip install triton")
    with pytest.raises(ValueError, match="Triton is not installed"):
        kernels.choose("triton")


def test_the_interpreter_runs_only_when_asked_for(machine, monkeypatch):
    machine(gpu=None, triton=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.choose() == "kernels: torch"
    assert not kernels.runs_triton(torch.ones(1))
    kernels.choose("triton")
    assert kernels.runs_triton(torch.ones(1))


# ---- PyTorch's settings -------------------------------------------------------------------------
# What was set: (TensorFloat-32 for matmul, for conv). None: convolutions have a setting of their
# own, which PyTorch 2.11 obeys and 2.13 does not, where all products are set at once.
SETTINGS = {
    "": (False, True),                                         # PyTorch's defaults
    "b.fp32_precision = 'tf32'": (True, True),
    "b.fp32_precision = 'ieee'": (False, None),
    "b.cuda.matmul.fp32_precision = 'tf32'; b.cudnn.conv.fp32_precision = 'ieee'": (True, False),
    "b.cudnn.fp32_precision = 'ieee'": (False, None),
    "b.cuda.matmul.allow_tf32 = True; b.cudnn.allow_tf32 = False": (True, False),
    "torch.set_float32_matmul_precision('high')": (True, True),
    "fitting.allow_tf32(True)": (True, True),
    "fitting.allow_tf32(False)": (False, False),
    "b.cudnn.allow_tf32 = True; fitting.allow_tf32(False)": (False, False),
}
EACH = """
import os, sys, torch, fitting
from kernels.switch import allows_tf32
b = torch.backends
for change in sys.argv[1:]:
    if os.fork() == 0:                       # no setting outlives its process
        exec(change)
        print((allows_tf32("matmul"), allows_tf32("conv")), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_precision_of_float32_products_is_read_however_it_was_set():
    """In the older way and the newer one; reading the older after the newer was set raises."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", EACH, *SETTINGS], cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    found = [ast.literal_eval(line) for line in result.stdout.splitlines()]
    for change, (matmul, conv), expected in zip(SETTINGS, found, SETTINGS.values(), strict=True):
        assert matmul == expected[0] and expected[1] in (conv, None), (change, result.stderr)


@pytest.mark.parametrize("dtype, expected", [
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64)])
def test_tensors_are_cast_as_autocast_would(dtype, expected):
    x = torch.ones(2, 2, dtype=dtype)
    assert switch.like_autocast(x, None) == [x, None]
    with torch.autocast("cpu", torch.bfloat16):
        cast, nothing = switch.like_autocast(x, None)
        assert (cast.dtype, nothing) == (expected, None)
        assert (x @ x).dtype == expected
    assert switch.like_autocast(torch.ones(1, device="meta"))[0].is_meta


# ---- imports ------------------------------------------------------------------------------------
def test_triton_is_not_imported_before_it_is_used():
    """Nor is it needed: without it the switch says torch."""
    script = ("import sys, kernels; assert 'triton' not in sys.modules; "
              "sys.modules['triton'] = None; kernels.choose(); print(kernels.switch.IMPL)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment,
                            capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("torch\n", "")


def test_of_the_project_only_the_choice_imports_anything_into_the_kernels():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"backbones", "bench", "tests"}
    for path in (ROOT / "kernels").glob("*.py"):
        taken = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                taken |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: a relative import"
                taken.add(node.module.split(".")[0])
        assert taken & ours == ({"parallel", "run"} if path.stem == "choice" else set()), path
