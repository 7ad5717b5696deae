"""Compiles every kernel that is shipped for Hopper (sm_90a), on any Linux machine, without a GPU.

    python -m kernels.compile       # a line each: registers, bytes spilled, shared memory, ...

Triton's interpreter, which runs the kernels in the tests, accepts what its compiler does not
(ranges that are no powers of two, products with a side under 16) and knows nothing of registers.
This runs the compiler and NVIDIA's assembler, which come with Triton; it does not run the kernels.

    registers       of a thread; a thread has at most 255
    spilled         bytes that did not fit and go to slow memory: 0 is what we want
    shared          bytes of shared memory of a program; an H100 has 232,448
    tensor_cores    matrix instructions in the program; 0 for float32 in full precision ("ieee")
    fit             programs that fit on a multiprocessor at once, by their registers
    counted_on      programs that the launch counts on to fit; 0 where it does not matter

Read the kernels (triton_attention.py, triton_pixel_shuffle.py) first.
"""
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A kernel with all that the compiler must know."""
    name: str
    kernel: object
    numbers: str                     # "bf16", or "tf32" or "ieee" for float32
    constants: dict                  # values of the constexpr parameters
    options: dict                    # Triton's: warps, stages
    counted_on: int = 0              # see above


# (numbers, channels of a head, window, shifted). 30 and 10 are SwinIR's and DAT's head widths and
# those of their light versions; 7 is one of many that pruning leaves. 8×32 is a crossed attention,
# half of its heads have windows of 32×8.
ATTENTION = [
    ("bf16", 30, (8, 8), True),
    ("bf16", 30, (8, 8), False),
    ("bf16", 30, (8, 32), True),
    ("bf16", 30, (8, 32), False),
    ("bf16", 10, (8, 8), True),
    ("bf16", 10, (8, 32), True),
    ("bf16", 7, (8, 8), True),
    ("bf16", 7, (8, 32), True),
    ("tf32", 30, (8, 8), True),
    ("tf32", 30, (8, 32), True),
    ("ieee", 30, (8, 8), True),
    ("ieee", 30, (8, 32), True),
]

# (numbers, C, O, r): a convolution from C channels to O·r², which are shuffled to O.
CONVOLUTION = [
    ("bf16", 64, 64, 2),
    ("bf16", 60, 3, 4),
    ("bf16", 32, 16, 3),
    ("tf32", 64, 64, 2),
    ("tf32", 60, 3, 4),
    ("ieee", 64, 64, 2),
    ("ieee", 60, 3, 4),
]

# The types of the parameters that are not what the picture is computed in.
FLOAT32 = ("table", "lse", "delta", "dbias_sums", "dbias", "dtable")
INTEGERS = ("H", "W", "rows", "columns", "dy", "dx", "windows", "programs", "pixels")


def attention_cases() -> Iterator[Case]:
    """The kernels of window attention with 6 heads, for each line of ATTENTION."""
    from kernels import triton_attention as forward
    for numbers, d, window, shifted in ATTENTION:
        shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
        crossed = window == (8, 32)
        for part in forward.parts_of((1, 64, 64), 6, window, shift, crossed):
            h, w = part.window
            where = f"{numbers}_{h}x{w}_{'shifted' if shifted else 'plain'}_width{d}"
            fixed = part.compile_time(6 * d, 6, numbers)
            for name, kernel, table in attention_kernels(h * w):
                tiles = table[numbers]
                constants = fixed | tiles.blocks
                if name == "forward":
                    constants["SAVE"] = True
                yield Case(
                    f"{name}_{where}", kernel, numbers, constants, forward.options(tiles),
                    tiles.resident)


def attention_kernels(tokens: int) -> list[tuple]:
    """(name, kernel, its tile sizes) for windows of 64 or 256 tokens."""
    from kernels import triton_attention as forward
    from kernels import triton_attention_backward as backward
    if tokens == 64:
        return [
            ("forward", forward.forward_64_kernel, forward.FORWARD_64),
            ("backward", backward.backward_64_kernel, backward.BACKWARD_64),
        ]
    return [
        ("forward", forward.forward_256_kernel, forward.FORWARD_256),
        ("backward", backward.backward_256_kernel, backward.BACKWARD_256),
        ("dbias", backward.dbias_256_kernel, backward.DBIAS_256),
    ]


def dtable_cases() -> Iterator[Case]:
    """The kernel that sums the gradient of the bias to that of its table."""
    from kernels import triton_attention_backward as backward
    for h, w in ((8, 8), (8, 32), (32, 8)):
        constants = dict(FIRST_HEAD=3, HEADS=3, ALL_HEADS=6, WINDOW_H=h, WINDOW_W=w,
                         ENTRIES=backward.ENTRIES)
        yield Case(f"dtable_{h}x{w}", backward.dtable_kernel, "ieee", constants, {})


def convolution_cases() -> Iterator[Case]:
    """The convolution with pixel shuffle, for each line of CONVOLUTION."""
    from kernels import triton_pixel_shuffle as shuffle
    for numbers, inputs, outputs, r in CONVOLUTION:
        columns = outputs * r * r
        tiles = shuffle.tiles_for(inputs, columns, 2 if numbers == "bf16" else 4)
        constants = shuffle.compile_time(inputs, outputs, r, True, numbers, tiles)
        name = f"conv_{numbers}_{inputs}to{columns}_r{r}"
        yield Case(name, shuffle.conv_shuffle_kernel, numbers, constants, shuffle.options(tiles))


def cases() -> list[Case]:
    """Every kernel and configuration that is shipped."""
    return [*attention_cases(), *dtable_cases(), *convolution_cases()]


def signature(case: Case) -> dict[str, str]:
    """The type of every parameter, as Triton writes them."""
    element = "*bf16" if case.numbers == "bf16" else "*fp32"
    types = {}
    for name in case.kernel.arg_names:
        if name in case.constants:
            types[name] = "constexpr"
        elif name in INTEGERS:
            types[name] = "i32"
        elif name == "scale":
            types[name] = "fp32"
        elif name in FLOAT32:
            types[name] = "*fp32"
        else:
            types[name] = element
    return types


def build(case: Case) -> dict[str, int]:
    """Compiles a kernel for sm_90a and returns the columns that the command prints."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = signature(case)
    constants = {}
    attributes = {}
    for i, name in enumerate(types):
        if name in case.constants:
            constants[i,] = case.constants[name]
        if types[name].startswith("*"):
            attributes[i,] = [["tt.divisibility", 16]]           # as PyTorch allocates
    source = ASTSource(case.kernel, types, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=case.options)
    registers, spilled = resources(compiled.asm["cubin"])
    matrix_instructions = re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])
    return dict(
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_cores=len(matrix_instructions),
        fit=fit(registers, compiled.metadata.num_warps),
        counted_on=case.counted_on)


def fit(registers: int, warps: int) -> int:
    """How many programs the 65,536 registers of a multiprocessor hold.

    A warp is 32 threads; registers are handed out to a thread in eights.
    """
    of_thread = (registers + 7) // 8 * 8
    return 65536 // (of_thread * 32 * warps)


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a compiled kernel. All its stack is spilled registers."""
    import triton
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, the compiler is off: unset it")
    print("registers spilled shared tensor_cores fit counted_on configuration")
    for case in cases():
        used = build(case)
        print("{registers:9} {spilled:7} {shared:6} {tensor_cores:12} {fit:3} {counted_on:10} "
              .format(**used) + case.name, flush=True)


if __name__ == "__main__":
    main()
