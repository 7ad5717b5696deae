"""How each kernel is compiled: tile sizes, warps, stages, for each kind of numbers and of GPU.

They were chosen with the compiler (`python -m kernels.compile --all` prints what it finds): no
register may spill to memory, shared memory must suffice, and then as many programs at once as
possible, so that some compute while others wait for memory. Which is fastest, only a GPU can tell
(RESULTS.md has an H200's times). So there are two or three of each kernel: TILES, the first choice,
and the VARIANTS of it. All are timed at first use (choice.py), forward and backward kernels of one
variant together.

Numbers are "bf16", or for float32 "tf32" (TensorFloat-32) or "ieee" (in full). A product in full
float32 runs without tensor cores, which is slow; "tf32x3" splits each factor into two numbers of
TensorFloat-32 and adds up three products of these, on tensor cores, with an error like float32's.
It needs more registers: the forward kernels have them, the backward kernels would spill.
"""
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import switch

TARGETS = (80, 86, 89, 90, 100, 120)     # 10·major + minor of the compute capabilities


class Tiles(NamedTuple):
    """How a kernel is compiled."""
    blocks: dict[str, int]           # tile sizes, where the kernel leaves them open
    warps: int                       # of 32 threads, that work on a tile together
    stages: int                      # rounds of the loop whose loads are under way together
    registers: int                   # of a thread, at most, as `python -m kernels.compile` prints
    precision: str = "tf32"          # of float32 products; bfloat16 has no choice
    limit: int | None = None         # the compiler is told to use no more registers than this

    @property
    def resident(self) -> int:
        """How many programs a multiprocessor runs at once, by its 65,536 registers.

        The kernels whose programs share the windows have shared memory enough for that.
        """
        return 65536 // (self.registers * 32 * self.warps)

    @property
    def constants(self) -> dict:
        """The compile-time arguments of the kernel that are decided here."""
        return self.blocks | dict(PRECISION=self.precision)


def mn(queries: int, keys: int) -> dict[str, int]:
    """The blocks of attention: BLOCK_M queries and BLOCK_N keys."""
    return dict(BLOCK_M=queries, BLOCK_N=keys)


def mnk(pixels: int, columns: int, channels: int) -> dict[str, int]:
    """The blocks of the convolution."""
    return dict(BLOCK_M=pixels, BLOCK_N=columns, BLOCK_K=channels)


# (kernel, numbers), and a target where that one differs. Ampere, Ada and the RTX 50 have matrix
# instructions for 16 rows that a warp gives on its own; Hopper has others for 64 rows, which four
# warps give together and which take their right factor from shared memory: fewer registers.
TILES = {
    # 64×64 scores on 4 warps: each warp owns 16 whole rows, so row_max and row_sum need no exchange
    # between warps, and a thread has 32 scores besides 32 numbers of the bias. Two stages: the
    # loads of the next window run during this one; in float32 that takes too many registers, and on
    # the RTX 50 so does tf32x3 itself.
    ("forward_64", "bf16"): Tiles({}, warps=4, stages=2, registers=160),
    ("forward_64", "bf16", 90): Tiles({}, warps=4, stages=2, registers=128),
    ("forward_64", "tf32"): Tiles({}, warps=4, stages=1, registers=192),
    ("forward_64", "tf32", 90): Tiles({}, warps=4, stages=1, registers=128),
    ("forward_64", "ieee"): Tiles({}, warps=4, stages=1, registers=255, precision="tf32x3"),
    ("forward_64", "ieee", 120): Tiles({}, warps=8, stages=2, registers=128, precision="ieee"),
    ("forward_64", "ieee", 90): Tiles({}, warps=4, stages=1, registers=208, precision="tf32x3"),

    # P, dP (then dS), the bias and dbias are 32 numbers a thread each on 4 warps. With loads ahead
    # that spills but on Hopper. TensorFloat-32 needs 8 warps for it, full float32 16. On the RTX 50
    # TensorFloat-32 spills even so: full float32 takes its place. (On the A100 the compiler would
    # aim at 64 registers and spill, were it not told that it may have 128.)
    ("backward_64", "bf16"): Tiles({}, warps=4, stages=1, registers=255),
    ("backward_64", "bf16", 90): Tiles({}, warps=4, stages=2, registers=248),
    ("backward_64", "tf32"): Tiles({}, warps=8, stages=1, registers=255),
    ("backward_64", "tf32", 120): Tiles({}, warps=16, stages=1, registers=128, precision="ieee",
                                        limit=128),
    ("backward_64", "ieee"): Tiles({}, warps=16, stages=1, registers=128, precision="ieee",
                                   limit=128),

    # 64 queries are the rows of one matrix instruction of Hopper's; 32 keys a step leave 4 or 5
    # programs at once, 64 keys only 2. Without a limit the compiler aims at 72 registers for
    # narrow heads, and spills; so it does with 128 for the queries on the A100.
    ("forward_256", "bf16"): Tiles(mn(64, 32), warps=4, stages=1, registers=128, limit=128),
    ("forward_256", "tf32"): Tiles(mn(64, 32), warps=4, stages=1, registers=144),
    ("forward_256", "ieee"): Tiles(mn(64, 32), warps=4, stages=1, registers=255,
                                   precision="tf32x3"),
    ("forward_256", "ieee", 90): Tiles(mn(64, 32), warps=4, stages=1, registers=168,
                                       precision="tf32x3"),
    ("queries_256", "bf16"): Tiles(mn(64, 32), warps=4, stages=1, registers=168),
    ("queries_256", "tf32"): Tiles(mn(64, 32), warps=4, stages=1, registers=200),
    ("queries_256", "ieee"): Tiles(mn(64, 32), warps=4, stages=1, registers=168, precision="ieee"),
    ("queries_256", "ieee", 80): Tiles(mn(64, 32), warps=4, stages=1, registers=168,
                                       precision="ieee", limit=168),

    # The same turned round: 64 keys are the rows, 32 queries a step.
    ("keys_256", "bf16"): Tiles(mn(32, 64), warps=4, stages=1, registers=168),
    ("keys_256", "tf32"): Tiles(mn(32, 64), warps=4, stages=1, registers=240),
    ("keys_256", "ieee"): Tiles(mn(32, 64), warps=4, stages=1, registers=168, precision="ieee"),

    # The scores, the bias and dbias are 64×64 numbers each. More warps a program mean fewer
    # registers a thread, and so more warps at once on a multiprocessor.
    ("dbias_256", "bf16"): Tiles(mn(64, 64), warps=4, stages=1, registers=232),
    ("dbias_256", "bf16", 90): Tiles(mn(64, 64), warps=4, stages=1, registers=168),
    ("dbias_256", "tf32"): Tiles(mn(64, 64), warps=8, stages=1, registers=240),
    ("dbias_256", "tf32", 90): Tiles(mn(64, 64), warps=8, stages=1, registers=128),
    ("dbias_256", "ieee"): Tiles(mn(64, 64), warps=16, stages=1, registers=88, precision="ieee"),

    # More than 64 columns. A tile of 128×128 makes 128 FLOP of each number that it loads, one of
    # 128×64 makes 85 and one of 64×64 makes 64; larger ones do not fit into the registers (128×128
    # are 64 numbers a thread on 8 warps). A step of 64 channels in bfloat16, or of 32 in float32,
    # is 128 bytes of a pixel, a whole cache line. Loads run 3 steps ahead: 3·(128 + 128)·128 bytes
    # = 98 KB of shared memory. Hopper's compiler takes 133 registers, and does with 128, so that
    # two programs fit at once; elsewhere that would spill.
    ("conv_wide", "bf16"): Tiles(mnk(128, 128, 64), warps=8, stages=3, registers=184),
    ("conv_wide", "bf16", 90): Tiles(mnk(128, 128, 64), warps=8, stages=3, registers=128,
                                     limit=128),
    ("conv_wide", "tf32"): Tiles(mnk(128, 128, 32), warps=8, stages=3, registers=184),
    ("conv_wide", "ieee"): Tiles(mnk(128, 128, 32), warps=8, stages=3, registers=255,
                                 precision="ieee"),
    # 64 columns or fewer: a picture with 3 channels at any r <= 4.
    ("conv_narrow", "bf16"): Tiles(mnk(128, 64, 64), warps=8, stages=3, registers=168),
    ("conv_narrow", "tf32"): Tiles(mnk(64, 64, 32), warps=8, stages=2, registers=80),
    ("conv_narrow", "ieee"): Tiles(mnk(64, 64, 32), warps=8, stages=2, registers=80,
                                   precision="ieee"),

    # 64 tokens and 128 + 64 channels are 96 numbers of acc a thread on 4 warps, which give the
    # matrix instructions of Hopper together. 32 hidden channels a step: y and two steps of both
    # weights take 74 KB of shared memory on Hopper, 49 KB elsewhere, so two programs fit at once.
    ("mlp", "bf16"): Tiles(mn(64, 32), warps=4, stages=2, registers=255),
}

# What is timed beside them. No variant changes how a product is computed. One that names only some
# kernels of an operation leaves the others as they are in TILES. Left out is what would spill.
VARIANTS = {
    "": TILES,

    # Attention on twice the warps, for 256 tokens mostly with twice the rows. Either a warp has
    # half of the scores, or k and v are read half as often; but more warps wait for each other, and
    # where the registers of a thread do not become fewer, fewer programs fit at once. The MLP with
    # twice the tokens, on Hopper in half as many steps: the weights are read half as often.
    "more warps": {
        ("forward_64", "bf16"): Tiles({}, warps=8, stages=1, registers=136),
        ("forward_64", "bf16", 80): Tiles({}, warps=8, stages=1, registers=128),
        ("forward_64", "bf16", 90): Tiles({}, warps=8, stages=1, registers=104),
        ("forward_64", "bf16", 120): Tiles({}, warps=8, stages=1, registers=144, limit=144),
        ("backward_64", "bf16"): Tiles({}, warps=8, stages=1, registers=255),
        ("forward_256", "bf16"): Tiles(mn(128, 32), warps=8, stages=1, registers=168),
        ("queries_256", "bf16"): Tiles(mn(128, 32), warps=8, stages=1, registers=168),
        ("keys_256", "bf16"): Tiles(mn(32, 128), warps=8, stages=1, registers=184),
        ("dbias_256", "bf16"): Tiles(mn(64, 64), warps=8, stages=1, registers=232),
        ("dbias_256", "bf16", 90): Tiles(mn(64, 64), warps=8, stages=1, registers=128),

        ("forward_64", "tf32"): Tiles({}, warps=8, stages=1, registers=192),
        ("forward_64", "tf32", 90): Tiles({}, warps=8, stages=1, registers=128),
        ("forward_256", "tf32"): Tiles(mn(128, 32), warps=8, stages=1, registers=168),
        ("queries_256", "tf32"): Tiles(mn(128, 32), warps=8, stages=1, registers=184),
        ("keys_256", "tf32"): Tiles(mn(32, 128), warps=8, stages=1, registers=232),

        ("forward_64", "ieee", 90): Tiles({}, warps=8, stages=1, registers=200,
                                          precision="tf32x3"),
        ("forward_256", "ieee"): Tiles(mn(128, 32), warps=8, stages=1, registers=216,
                                       precision="tf32x3"),
        ("queries_256", "ieee"): Tiles(mn(64, 32), warps=8, stages=1, registers=96,
                                       precision="ieee"),
        ("keys_256", "ieee"): Tiles(mn(32, 64), warps=8, stages=1, registers=128,
                                    precision="ieee"),

        ("mlp", "bf16"): Tiles(mn(128, 32), warps=8, stages=2, registers=255),
        ("mlp", "bf16", 90): Tiles(mn(128, 64), warps=8, stages=2, registers=232),
    },

    # Attention for 256 tokens in half as many steps, each with twice the scores. Without a limit
    # the compiler aims at 168 registers, and spills.
    "long steps": {
        ("forward_256", "bf16"): Tiles(mn(64, 64), warps=4, stages=1, registers=208, limit=208),
        ("queries_256", "bf16"): Tiles(mn(64, 64), warps=4, stages=1, registers=232),
        ("keys_256", "bf16"): Tiles(mn(64, 64), warps=4, stages=1, registers=248, limit=248),

        ("forward_256", "tf32"): Tiles(mn(64, 64), warps=4, stages=1, registers=216),
    },

    # Convolution and MLP in smaller tiles, mostly on half the warps: what is loaded serves fewer
    # products, but more programs fit at once, and one computes while another loads.
    "small tiles": {
        ("conv_wide", "bf16"): Tiles(mnk(64, 128, 64), warps=4, stages=3, registers=168),
        ("conv_wide", "tf32"): Tiles(mnk(64, 128, 32), warps=4, stages=3, registers=168),
        ("conv_narrow", "bf16"): Tiles(mnk(64, 64, 64), warps=4, stages=3, registers=168),
        ("conv_narrow", "tf32"): Tiles(mnk(64, 64, 32), warps=4, stages=3, registers=168),
        ("conv_wide", "ieee"): Tiles(mnk(64, 64, 32), warps=8, stages=2, registers=104,
                                     precision="ieee"),
        ("mlp", "bf16"): Tiles(mn(32, 32), warps=4, stages=2, registers=136),
    },

    # The wide convolution with half the channels a step, and one more step under way.
    "short steps": {
        ("conv_wide", "bf16"): Tiles(mnk(128, 128, 32), warps=8, stages=4, registers=184),
    },
}


def variants(kernel: str, numbers: str, target: int) -> dict[str, Tiles]:
    """{name of the variant: tiles} of a kernel, named as in TILES, for the GPUs of a target.

    The first one is that of TILES, named "". A variant that says nothing of the kernel is left out.
    """
    found = {}
    for name, table in VARIANTS.items():
        tiles = table.get((kernel, numbers, target), table.get((kernel, numbers)))
        if tiles is not None:
            found[name] = tiles
    return found


def tiles_for(kernel: str, numbers: str, device: torch.device, variant: str) -> Tiles:
    """The tiles of a kernel in a variant; those of TILES where it says nothing of the kernel."""
    found = variants(kernel, numbers, target_of(device))
    return found.get(variant, found[""])


def ways(path: Callable, kernels: tuple[str, ...], x: Tensor, products: str) -> dict[str, Callable]:
    """{"triton": path, "triton more warps": ...}: all variants in which one of the kernels differs.

    path: a function that takes the name as `variant`. products: see `arithmetic`, for x.
    """
    names = names_of(kernels, x.dtype, products, x.device)
    return {f"triton {name}".strip(): partial(path, variant=name) for name in names}


def names_of(kernels: tuple[str, ...], dtype: torch.dtype, products: str,
             device: torch.device) -> tuple[str, ...]:
    """The names of these variants, "" first."""
    return names_for(kernels, arithmetic(dtype, products), target_of(device))


names_of._dynamo_marked_constant = True      # torch.compile asks it, see switch.constant


@lru_cache
def names_for(kernels: tuple[str, ...], numbers: str, target: int) -> tuple[str, ...]:
    """The same, remembered, since it is asked at every call of an operation."""
    found = [variants(kernel, numbers, target) for kernel in kernels]
    return tuple(name for name in VARIANTS if any(name in each for each in found))


def arithmetic(dtype: torch.dtype, products: str) -> str:
    """"bf16" for bfloat16; for float32 "tf32" (TensorFloat-32) or "ieee" (in full).

    Which of the two, PyTorch's own switch for `products` ("matmul" or "conv") says.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if switch.allows_tf32(products) else "ieee"


def conv_kernel(columns: int) -> str:
    """The name in TILES of the convolution for so many columns O·r²."""
    return "conv_wide" if columns > 64 else "conv_narrow"


def shallow(tiles: Tiles, C: int) -> Tiles:
    """The tiles of the convolution for C channels: no more depth than C wants."""
    wanted = max(16, 1 << (C - 1).bit_length())
    if wanted >= tiles.blocks["BLOCK_K"]:
        return tiles
    return tiles._replace(blocks=tiles.blocks | dict(BLOCK_K=wanted), limit=None)


def options(tiles: Tiles) -> dict:
    """Triton's own options; a·b + c may be rounded once, whatever the default of this Triton is."""
    return dict(num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.limit,
                enable_fp_fusion=True)


@lru_cache
def target_of(device: torch.device) -> int:
    """The target of a GPU: its own compute capability, or the last one before it that is known.

    On a CPU, where the kernels are interpreted, that of Hopper.
    """
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return max(target for target in TARGETS if target <= 10 * major + minor)
