"""Compiles every kernel that is shipped, on any Linux machine, without a GPU.

    python -m kernels.compile                     # for Hopper (sm_90), a line for each kernel
    python -m kernels.compile --all               # for every NVIDIA GPU since Ampere
    python -m kernels.compile --target 89 --only bf16_8x8

Triton's interpreter, which runs the kernels in the tests, accepts what its compiler does not
(ranges that are no powers of two, products with a side under 16) and knows nothing of registers.
This runs the compiler and NVIDIA's assembler, which come with Triton; it does not run the kernels.

    target          80: A100; 86: RTX 30; 89: RTX 40; 90: H100, H200; 100: B200; 120: RTX 50
    registers       of a thread; a thread has at most 255
    spilled         bytes of a thread that did not fit and go to slow memory: 0 is what we want
    shared          bytes of shared memory of a program
    tensor_cores    matrix instructions in the program; 0 for float32 in full precision ("ieee")
    loop            instructions of a warp in the longest loop, once around: a window of 64 tokens
    fit             programs that fit on a multiprocessor at once
    occupancy       their warps, in percent of those that it can hold
    counted_on      programs that the launch counts on to fit; 0 where it does not matter

The name of a variant (triton_tiles.py) stands at the end of a kernel's name.

Read the kernels (triton_attention.py, triton_pixel_shuffle.py, triton_mlp.py) and triton_tiles.py
first.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What a multiprocessor has."""
    shared: int                      # bytes of shared memory
    of_program: int                  # bytes of them that one program may have
    warps: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
TARGETS = {
    80: Target(164 * 1024, 163 * 1024, 64),
    86: Target(100 * 1024, 99 * 1024, 48),
    89: Target(100 * 1024, 99 * 1024, 48),
    90: Target(228 * 1024, 227 * 1024, 64),
    100: Target(228 * 1024, 227 * 1024, 64),
    120: Target(100 * 1024, 99 * 1024, 48),
}
OF_DRIVER = 1024                     # bytes of shared memory that CUDA takes for each program
COLUMNS = ("target", "registers", "spilled", "shared", "tensor_cores", "loop", "fit", "occupancy",
           "counted_on")


class Case(NamedTuple):
    """A kernel with all that the compiler must know."""
    name: str
    kernel: object
    numbers: str                     # "bf16", or "tf32" or "ieee" for float32
    constants: dict                  # values of the constexpr parameters
    options: dict                    # Triton's: warps, stages
    counted_on: int = 0              # see above


# (numbers, channels of a head, window, shifted). All head widths are padded to 16 or 32. 8×32 is a
# crossed attention, half of its heads have windows of 32×8.
ATTENTION = [
    ("bf16", 32, (8, 8), True),
    ("bf16", 32, (8, 8), False),
    ("bf16", 32, (8, 32), True),
    ("bf16", 16, (8, 8), True),
    ("bf16", 16, (8, 32), True),
    ("tf32", 32, (8, 8), True),
    ("tf32", 32, (8, 32), True),
    ("ieee", 32, (8, 8), True),
    ("ieee", 32, (8, 32), True),
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
INTEGERS = ("H", "W", "rows", "columns", "dy", "dx", "windows", "programs", "pixels",
            "tokens")


# ---- what is compiled ---------------------------------------------------------------------------
def attention_cases(target: int) -> Iterator[Case]:
    """The kernels of window attention with 6 heads, for each line of ATTENTION."""
    from kernels import attention, triton_tiles
    from kernels import triton_attention as forward
    from kernels import triton_attention_backward as backward
    for numbers, d, window, shifted in ATTENTION:
        shift = (window[0] // 2, window[1] // 2) if shifted else (0, 0)
        crossed = window == (8, 32)
        for part in forward.parts_of((1, 64, 64), 6, window, shift, crossed):
            h, w = part.window
            where = f"{numbers}_{h}x{w}_{'shifted' if shifted else 'plain'}_width{d}"
            for name in attention.KERNELS[h * w]:
                module = forward if name.startswith("forward") else backward
                kernel = getattr(module, f"{name}_kernel")
                for variant, tiles in triton_tiles.variants(name, numbers, target).items():
                    constants = part.compile_time(6, d) | tiles.constants
                    if module is forward:
                        constants["SAVE"] = True
                    counted_on = tiles.resident if "programs" in kernel.arg_names else 0
                    yield Case(named(f"{name}_{where}", variant), kernel, numbers, constants,
                               triton_tiles.options(tiles), counted_on)


def named(case: str, variant: str) -> str:
    """The name of a case in a variant, without spaces."""
    return "_".join([case, *variant.split()])


def dtable_cases() -> Iterator[Case]:
    """The kernel that sums the gradient of the bias to that of its table."""
    from kernels import triton_attention_backward as backward
    for h, w in ((8, 8), (8, 32)):
        constants = dict(FIRST_HEAD=3, HEADS=3, ALL_HEADS=6, WINDOW_H=h, WINDOW_W=w,
                         ENTRIES=backward.ENTRIES)
        yield Case(f"dtable_{h}x{w}", backward.dtable_kernel, "ieee", constants, {})


def convolution_cases(target: int) -> Iterator[Case]:
    """The convolution with pixel shuffle, for each line of CONVOLUTION."""
    from kernels import triton_pixel_shuffle as shuffle
    from kernels import triton_tiles
    for numbers, inputs, outputs, r in CONVOLUTION:
        columns = outputs * r * r
        kernel = triton_tiles.conv_kernel(columns)
        for variant, tiles in triton_tiles.variants(kernel, numbers, target).items():
            tiles = triton_tiles.shallow(tiles, inputs)
            constants = shuffle.compile_time(inputs, outputs, r, True) | tiles.constants
            name = named(f"conv_{numbers}_{inputs}to{columns}_r{r}", variant)
            yield Case(name, shuffle.conv_shuffle_kernel, numbers, constants,
                       triton_tiles.options(tiles))


def mlp_cases(target: int) -> Iterator[Case]:
    """The MLP of SwinIR and of its light version."""
    from kernels import triton_mlp as mlp
    from kernels import triton_tiles
    for channels in (180, 60):
        for variant, tiles in triton_tiles.variants("mlp", "bf16", target).items():
            constants = mlp.compile_time(channels, 2 * channels, tiles)
            name = named(f"mlp_bf16_{channels}to{2 * channels}", variant)
            yield Case(name, mlp.mlp_kernel, "bf16", constants, triton_tiles.options(tiles))


def cases(target: int) -> list[Case]:
    """Every kernel and configuration that is shipped for a target."""
    return [*attention_cases(target), *dtable_cases(), *convolution_cases(target),
            *mlp_cases(target)]


# ---- how ----------------------------------------------------------------------------------------
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


def build(case: Case, target: int) -> dict[str, int]:
    """Compiles a kernel for a target and returns the columns that the command prints."""
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
            attributes[i,] = [["tt.divisibility", 16]]           # the launches see to it
    source = ASTSource(case.kernel, types, constants, attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", target, 32), options=case.options)
    registers, spilled, loop = disassembled(compiled.asm["cubin"])
    matrix_instructions = re.findall(
        r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", compiled.asm["ptx"])
    warps = compiled.metadata.num_warps
    programs = fit(registers, warps, compiled.metadata.shared, TARGETS[target])
    return dict(
        target=target,
        registers=registers,
        spilled=spilled,
        shared=compiled.metadata.shared,
        tensor_cores=len(matrix_instructions),
        loop=loop,
        fit=programs,
        occupancy=round(100 * programs * warps / TARGETS[target].warps),
        counted_on=case.counted_on)


def fit(registers: int, warps: int, shared: int, target: Target) -> int:
    """How many programs a multiprocessor holds, by registers, shared memory and warps.

    It has 65,536 registers; a warp is 32 threads; registers are handed out to a thread in eights.
    """
    of_thread = (registers + 7) // 8 * 8
    by_registers = 65536 // (of_thread * 32 * warps)
    return min(by_registers, target.shared // (shared + OF_DRIVER), target.warps // warps)


def disassembled(cubin: bytes) -> tuple[int, int, int]:
    """(registers, bytes of stack, instructions of the longest loop) of a compiled kernel.

    All its stack is spilled registers.
    """
    import triton
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack), longest_loop(text)


def longest_loop(sass: str) -> int:
    """Instructions from the target of a backward branch to the branch, of the longest; 0 without.

    A line of the listing is: /*address*/ instruction, and the branch says BRA and an address.
    """
    addresses = []
    longest = 0
    for address, instruction in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass):
        addresses.append(int(address, 16))
        back = re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", instruction)
        if back and int(back[1], 16) < addresses[-1]:
            longest = max(longest, len(addresses) - addresses.index(int(back[1], 16)))
    return longest


# ---- the command --------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every target")
    parser.add_argument("--target", type=int, nargs="+", choices=list(TARGETS), default=[90])
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                        help="only kernels whose name contains one of these")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, the compiler is off: unset it")
    widths = [max(6, len(title)) for title in COLUMNS]
    print(*(title.rjust(n) for title, n in zip(COLUMNS, widths)), "kernel")
    for target in list(TARGETS) if args.all else args.target:
        for case in cases(target):
            if any(name in case.name for name in args.only):
                used = build(case, target)
                numbers = (str(used[title]).rjust(n) for title, n in zip(COLUMNS, widths))
                print(*numbers, case.name, flush=True)


if __name__ == "__main__":
    main()
