"""How each kernel is compiled: tile sizes, warps, stages, for each kind of numbers and of GPU.

All were chosen with the compiler alone (`python -m kernels.compile --all` prints what it finds): no
register may spill to memory, shared memory must suffice, and then as many programs at once as
possible, so that some compute while others wait for memory. A GPU may find others faster.

Numbers are "bf16", or for float32 "tf32" (TensorFloat-32) or "ieee" (in full). A product in full
float32 runs without tensor cores, which is slow; "tf32x3" splits each factor into two numbers of
TensorFloat-32 and adds up three products of these, on tensor cores, with an error like float32's.
It needs more registers: the forward kernels have them, the backward kernels would spill.
"""
from functools import lru_cache
from typing import NamedTuple

import torch

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


TILES = {
    ("forward_64", "bf16"): Tiles({}, 4, 2, 152),
    ("forward_64", "bf16", 90): Tiles({}, 4, 2, 128),
    ("forward_64", "tf32"): Tiles({}, 8, 2, 128),
    ("forward_64", "ieee"): Tiles({}, 8, 2, 128, "tf32x3"),
    ("backward_64", "bf16"): Tiles({}, 4, 1, 255),
    ("backward_64", "bf16", 90): Tiles({}, 4, 2, 248),
    ("backward_64", "tf32"): Tiles({}, 8, 1, 255),
    ("backward_64", "ieee"): Tiles({}, 16, 1, 96, "ieee"),
    ("forward_256", "bf16"): Tiles(mn(64, 32), 4, 1, 136),
    ("forward_256", "tf32"): Tiles(mn(64, 32), 4, 1, 152),
    ("forward_256", "ieee"): Tiles(mn(64, 32), 4, 1, 168, "tf32x3"),
    ("queries_256", "bf16"): Tiles(mn(64, 32), 4, 1, 168),
    ("queries_256", "tf32"): Tiles(mn(64, 32), 4, 1, 168),
    ("queries_256", "ieee"): Tiles(mn(64, 32), 4, 1, 255, "ieee"),
    ("keys_256", "bf16"): Tiles(mn(32, 64), 4, 1, 168),
    ("keys_256", "tf32"): Tiles(mn(32, 64), 4, 1, 168),
    ("keys_256", "ieee"): Tiles(mn(32, 64), 4, 1, 255, "ieee"),
    ("dbias_256", "bf16"): Tiles(mn(64, 64), 4, 1, 168),
    ("dbias_256", "tf32"): Tiles(mn(64, 64), 8, 1, 128),
    ("dbias_256", "ieee"): Tiles(mn(64, 64), 16, 1, 96, "ieee"),
    ("conv_wide", "bf16"): Tiles(mnk(128, 128, 64), 8, 3, 255),
    ("conv_wide", "bf16", 90): Tiles(mnk(128, 128, 64), 8, 3, 128, limit=128),
    ("conv_wide", "tf32"): Tiles(mnk(128, 128, 32), 8, 3, 255),
    ("conv_wide", "ieee"): Tiles(mnk(128, 128, 32), 8, 3, 255, "ieee"),
    ("conv_narrow", "bf16"): Tiles(mnk(128, 64, 64), 8, 3, 128),
    ("conv_narrow", "tf32"): Tiles(mnk(64, 64, 32), 8, 2, 128),
    ("conv_narrow", "ieee"): Tiles(mnk(64, 64, 32), 8, 2, 128, "ieee"),
}


def tiles_for(kernel: str, numbers: str, target: int) -> Tiles:
    """The tiles of a kernel, named as in TILES, for the GPUs of a target."""
    return TILES.get((kernel, numbers, target), TILES.get((kernel, numbers)))


def conv_tiles(C: int, columns: int, numbers: str, target: int) -> Tiles:
    """The tiles of the convolution for C channels and O·r² columns: no more depth than C wants."""
    tiles = tiles_for("conv_wide" if columns > 64 else "conv_narrow", numbers, target)
    wanted = max(16, 1 << (C - 1).bit_length())
    return tiles._replace(blocks=tiles.blocks | dict(BLOCK_K=min(tiles.blocks["BLOCK_K"], wanted)))


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
