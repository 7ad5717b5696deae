"""Every kernel that is shipped, through the real compiler, without a GPU.

In another process: this one may have Triton's interpreter in it, which replaces the compiler.
"""
import os
import subprocess
import sys

import pytest

from tiny import ROOT

# The one kernel that spills a few bytes, see BACKWARD_256.
SPILLS = {"backward_ieee_32x8_shifted_width30": 64}


def run_compile(**environment) -> subprocess.CompletedProcess:
    """`python -m kernels.compile`, without the interpreter unless asked for."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"} | environment
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "kernels.compile"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def why_not() -> str:
    """Why the kernels cannot be compiled here; empty where they can."""
    try:
        import triton
        tools = (triton.knobs.nvidia.ptxas.path, triton.knobs.nvidia.cuobjdump.path)
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"no compiler for the kernels: {error}"
    for tool in tools:
        if not os.path.exists(tool):
            return f"{tool} is missing"
    return ""


needs_compiler = pytest.mark.skipif(why_not() != "", reason=why_not())


@pytest.fixture(scope="module")
def table() -> dict:
    """{configuration: its other columns} as the command prints them."""
    result = run_compile()
    assert result.returncode == 0, result.stderr[-2000:]
    titles, *lines = [line.split() for line in result.stdout.splitlines()]
    rows = {}
    for *numbers, name in lines:
        rows[name] = dict(zip(titles, map(int, numbers)))
    return rows


@needs_compiler
def test_every_kind_of_kernel_is_compiled(table):
    kinds = {name.split("_")[0] for name in table}
    assert kinds == {"forward", "backward", "dbias", "dtable", "conv"}
    for part in ("bf16_8x8_plain_width30", "bf16_32x8_shifted_width30", "tf32_8x32", "ieee_8x8"):
        assert any(part in name for name in table), part


@needs_compiler
def test_no_kernel_spills_its_registers_or_overflows_shared_memory(table):
    for name, used in table.items():
        assert used["registers"] <= 255, name
        assert used["spilled"] <= SPILLS.get(name, 0), name
        assert used["shared"] <= 227 * 1024, name


@needs_compiler
def test_every_product_runs_on_tensor_cores_except_in_full_float32(table):
    for name, used in table.items():
        if "ieee" not in name and not name.startswith("dtable"):
            assert used["tensor_cores"] > 0, name


@needs_compiler
def test_as_many_programs_fit_at_once_as_the_launches_count_on(table):
    """The registers stated beside the tile sizes, against those that the compiler used."""
    for name, used in table.items():
        assert used["fit"] >= used["counted_on"], name


@needs_compiler
def test_the_command_refuses_to_work_under_the_interpreter():
    result = run_compile(TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert result.stderr.startswith("error: TRITON_INTERPRET=1 is set")
