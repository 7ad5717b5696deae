"""The kernels through the real compiler, without a GPU, for two of the targets.

In another process: this one may have Triton's interpreter in it, which replaces the compiler. Not
every kernel: `python -m kernels.compile --all` takes minutes, and is for whoever changes one.
"""
import os
import subprocess
import sys

import pytest

from kernels import compile as compiler
from tiny import ROOT

TARGETS = ("89", "90")                   # with and without the matrix instructions of Hopper
KERNELS = (
    "64_bf16_8x8_shifted_width32",       # forward and backward
    "256_bf16_32x8_shifted_width32",     # forward, queries, keys, dbias
    "forward_64_ieee",
    "dtable_8x8",
    "conv_bf16_64to256",
    "mlp_bf16",
)
VARIANTS = ("_more_warps", "_long_steps", "_small_tiles", "_short_steps")


def run_compile(*arguments: str, **environment) -> subprocess.CompletedProcess:
    """`python -m kernels.compile`, without the interpreter unless asked for."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"} | environment
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "kernels.compile", *arguments]
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
    """{(target, kernel): its other columns} as the command prints them."""
    result = run_compile("--target", *TARGETS, "--only", *KERNELS)
    assert result.returncode == 0, result.stderr[-2000:]
    titles, *lines = [line.split() for line in result.stdout.splitlines()]
    rows = {}
    for *numbers, name in lines:
        row = dict(zip(titles, map(int, numbers)))
        rows[row["target"], name] = row
    return rows


@needs_compiler
def test_every_kind_of_kernel_is_compiled_for_each_target(table):
    kinds = {"forward_64", "forward_256", "backward_64", "queries_256", "keys_256", "dbias_256",
             "dtable_8x8", "conv_bf16", "mlp_bf16"}
    for target in TARGETS:
        names = [name for number, name in table if number == int(target)]
        assert {"_".join(name.split("_")[:2]) for name in names} == kinds
        assert len([name for name in names if not name.endswith(VARIANTS)]) == 11
        found = [len([name for name in names if name.endswith(variant)]) for variant in VARIANTS]
        assert found == [9 if target == "90" else 8, 3, 3, 1]


@needs_compiler
def test_no_kernel_spills_its_registers_or_overflows_shared_memory(table):
    for (target, name), used in table.items():
        assert used["registers"] <= 255, name
        assert used["spilled"] == 0, name
        assert used["shared"] <= compiler.TARGETS[target].of_program, name
        assert used["fit"] > 0, name


@needs_compiler
def test_every_product_runs_on_tensor_cores(table):
    """In full float32, too: the forward kernels split it into three products."""
    for (_, name), used in table.items():
        assert used["tensor_cores"] > 0 or name.startswith("dtable"), name


@needs_compiler
def test_as_many_programs_fit_at_once_as_the_launches_count_on(table):
    """The registers stated beside the tile sizes, against those that the compiler used."""
    for (target, name), used in table.items():
        assert used["fit"] >= used["counted_on"], (target, name)
    assert table[90, "conv_bf16_64to256_r2"]["fit"] == 2


@needs_compiler
def test_a_window_takes_no_more_instructions_than_were_counted(table):
    """Of a warp, for a window of 64 tokens in bfloat16; with channel masks 861 and 1,108."""
    for target in map(int, TARGETS):
        assert 300 < table[target, "forward_64_bf16_8x8_shifted_width32"]["loop"] <= 600
        assert 300 < table[target, "backward_64_bf16_8x8_shifted_width32"]["loop"] <= 850


def test_the_longest_loop_is_found_in_a_listing():
    """Three instructions from 0010 to the branch back; a branch forward is no loop."""
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   FADD R2, R2, R1 ;
        /*0020*/              @P0  BRA 0x40 ;
        /*0030*/             @!P1  BRA P2, 0x10 ;
        /*0040*/                   EXIT ;
    """
    assert compiler.longest_loop(listing) == 3
    assert compiler.longest_loop(listing.replace("P2, 0x10", "P2, 0x40")) == 0


def test_a_multiprocessor_holds_programs_by_what_runs_out_first():
    hopper = compiler.TARGETS[90]
    assert compiler.fit(128, 4, 1024, hopper) == 4       # 4 · 4 · 32 · 128 = 65,536 registers
    assert compiler.fit(121, 4, 1024, hopper) == 4       # handed out in eights
    assert compiler.fit(32, 4, 75 * 1024, hopper) == 3   # 3 · 76 of 228 KB
    assert compiler.fit(32, 16, 1024, hopper) == 4       # 4 · 16 = 64 warps


@needs_compiler
def test_the_command_refuses_to_work_under_the_interpreter():
    result = run_compile(TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert result.stderr.startswith("error: TRITON_INTERPRET=1 is set")
