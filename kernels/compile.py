"""Compiles every configuration that is shipped for Hopper (sm_90a), on any Linux machine, without a GPU.

    python -m kernels.compile          # a line each: registers, bytes spilled, shared memory, tensor cores

The interpreter, which runs the kernels in the tests, accepts what the compiler does not (ranges that are no powers of
two, products with a side under 16) and knows nothing of registers. This runs the compiler, not the kernels.
"""
import os
import re
import subprocess
import sys
import tempfile
from typing import Iterator

CASES = [                        # (arithmetic, width of each of 6 heads, window, shifted)
    *(("bf16", d, window, True) for d in (30, 10, 7) for window in ((8, 8), (8, 32))),        # 7: pruned
    ("bf16", 30, (8, 8), False), ("bf16", 30, (8, 32), False), ("bf16", 30, (32, 8), True),
    *((numbers, 30, window, True) for numbers in ("tf32", "ieee") for window in ((8, 8), (8, 32))),
]


def attention() -> Iterator[tuple]:
    """(name, kernel, arithmetic, constants, options) of the kernels of windowed attention."""
    from kernels import triton_window_attention as k
    for numbers, d, window, shifted in CASES:
        n, count = window[0] * window[1], 6 if window == (8, 8) else 3                     # crossed: half of the heads
        fixed = k.constants(6 * d, 6, 0, count, window, shifted, numbers)
        where = f"{numbers}_{window[0]}x{window[1]}_{'shifted' if shifted else 'plain'}_width{d}"
        forward, backward = k.FORWARD[n, numbers], k.BACKWARD[n, numbers]
        yield (f"forward_{where}", k.forward_kernel, numbers, fixed | {"SAVE": True},
               k.options(forward, "queries", "keys"))
        yield f"backward_{where}", k.backward_kernel, numbers, fixed, k.options(backward, "keys")
        if (n, numbers) in k.TABLE:
            yield f"table_{where}", k.table_kernel, numbers, fixed, k.options(k.TABLE[n, numbers], "queries", "keys")
    for h, w in (8, 8), (8, 32):
        yield (f"entries_{h}x{w}", k.entries_kernel, "ieee", {},
               dict(FIRST=0, HEADS=3, COLUMNS=6, HEIGHT=h, WIDTH=w, ENTRIES=k.ENTRIES))


def convolution() -> Iterator[tuple]:
    from kernels import triton_pixel_shuffle as k
    sizes = [("bf16", 64, 64, 2), ("bf16", 60, 3, 4), ("bf16", 32, 16, 3)]
    for numbers in "tf32", "ieee":
        sizes += [(numbers, 64, 64, 2), (numbers, 60, 3, 4)]
    for numbers, C, O, r in sizes:
        tiles = k.configuration(C, O * r * r, 2 if numbers == "bf16" else 4)
        yield (f"conv_{numbers}_{C}to{O * r * r}_r{r}", k.conv_shuffle_kernel, numbers,
               k.constants(C, O, r, True, "ieee" if numbers == "ieee" else "tf32", tiles),
               k.options(tiles))


def build(kernel, numbers: str, constants: dict, options: dict) -> dict:
    """{registers, spilled, shared, tensor_cores} of a kernel for sm_90a; `options` in capitals are constants, too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    constants = constants | {name: value for name, value in options.items() if name.isupper()}
    names, element = kernel.arg_names, "*bf16" if numbers == "bf16" else "*fp32"
    kinds = dict.fromkeys(["table", "lse", "delta", "partial", "dbias", "dtable"], "*fp32") | {"scale": "fp32"}
    kinds |= dict.fromkeys(["H", "W", "rows", "columns", "dy", "dx", "windows", "groups", "pixels"], "i32")
    signature = {name: "constexpr" if name in constants else kinds.get(name, element) for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs={(names.index(n),): v for n, v in constants.items()},
                       attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32),
                              options={n: v for n, v in options.items() if not n.isupper()})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                               capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return dict(registers=int(registers), spilled=int(stack), shared=compiled.metadata.shared,
                tensor_cores=len(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])))


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1 is set, the compiler is off: unset it")
    print(f"{'registers':>9} {'spilled':>8} {'shared':>8} {'tensor_cores':>13} configuration")
    for name, *case in (*attention(), *convolution()):
        print("{registers:>9} {spilled:>8} {shared:>8} {tensor_cores:>13}".format(**build(*case)), name, flush=True)


if __name__ == "__main__":
    main()
