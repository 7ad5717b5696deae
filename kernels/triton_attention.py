"""Window attention in Triton, forward: the kernels behind attention.py. Imported when first used.

    S = scale · q kᵀ + bias + mask        P = softmax(S)        out = P v

The plain reference of these kernels is `reference` in attention.py. Read in this order:

1. `forward_64_kernel`. A window of 64 tokens (8×8, SwinIR): its (64, 64) scores are one tile that
   stays in registers from the product q kᵀ to the product with v.
2. `forward_256_kernel`. A window of 256 tokens (8×32, DAT): 256×256 scores are too many for the
   registers. A program takes 64 queries and goes over the keys in steps, with the online softmax
   of FlashAttention (arXiv 2205.14135).
3. The tile sizes with their reasons, and the launches.

Rolling, cutting into windows and putting back cost nothing: `locate` computes where a token of a
window lies on the map, and the rows that are read are the rows that are written.

Triton in a few words: a kernel is run by many programs at once, each knows its number
(tl.program_id) and works on whole tiles; tl.load and tl.store take a tile of addresses and a mask
of those that exist; a tl.constexpr is known when the kernel is compiled. The backward kernels are
in triton_attention_backward.py, to be read next.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import switch
from kernels.attention import padding

INTERPRETED = triton.knobs.runtime.interpret          # on the CPU, in Python: for the tests
LOG2E = tl.constexpr(1.4426950408889634)              # log₂ e

# These change with the picture. Triton would compile again for a 1 and for multiples of 16.
RUN_TIME = ["H", "W", "rows", "columns", "dy", "dx", "windows", "programs"]


# ---- parts of kernels ---------------------------------------------------------------------------
@triton.jit
def locate(window, token, H, W, rows, columns, dy, dx,
           WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Finds some tokens of a window on the map, by their places 0 .. n−1 in the window.

    Returns their rows in a (B·H·W, ·) matrix; whether they lie on the map, not in the padding; and
    their regions: 0, +2 if rolled from top to bottom, +1 if rolled from left to right.
    """
    y = window // columns % rows * WINDOW_H + token // WINDOW_W + dy
    x = window % columns * WINDOW_W + token % WINDOW_W + dx
    below = y >= rows * WINDOW_H
    beyond = x >= columns * WINDOW_W
    y = tl.where(below, y - rows * WINDOW_H, y)
    x = tl.where(beyond, x - columns * WINDOW_W, x)
    image = window // (rows * columns)
    row = (image * H + y).to(tl.int64) * W + x
    return row, (y < H) & (x < W), below.to(tl.int32) * 2 + beyond.to(tl.int32)


@triton.jit
def at_edge(window, rows, columns):
    """Whether a window is in the last row or column of windows: only these hold several regions."""
    return (window // columns % rows == rows - 1) | (window % columns == columns - 1)


@triton.jit
def load_head(matrix, row, inside, STRIDE: tl.constexpr,
              HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(tokens, BLOCK_D) numbers of a head: zero in the padding and from channel HEAD_DIM on."""
    channel = tl.arange(0, BLOCK_D)
    exists = inside[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(matrix + row[:, None] * STRIDE + channel[None, :], mask=exists, other=0.0)


@triton.jit
def store_head(matrix, values, row, inside, STRIDE: tl.constexpr,
               HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes what `load_head` would read."""
    channel = tl.arange(0, BLOCK_D)
    exists = inside[:, None] & (channel < HEAD_DIM)[None, :]
    values = values.to(matrix.dtype.element_ty)
    tl.store(matrix + row[:, None] * STRIDE + channel[None, :], values, mask=exists)


@triton.jit
def bias_tile(table, query, key, STRIDE: tl.constexpr,
              WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """(queries, keys) of one head's table, whose entries lie STRIDE numbers apart.

    The entry (Δy + h−1)·(2w−1) + (Δx + w−1) is of_query − of_key, two numbers that depend on the
    query alone and on the key alone: one subtraction for each score.
    """
    PITCH: tl.constexpr = 2 * WINDOW_W - 1
    of_query = (query // WINDOW_W + WINDOW_H - 1) * PITCH + query % WINDOW_W + WINDOW_W - 1
    of_key = key // WINDOW_W * PITCH + key % WINDOW_W
    return tl.load(table + (of_query[:, None] - of_key[None, :]) * STRIDE).to(tl.float32)


@triton.jit
def exp_minus(x, y):
    """exp(x − y) for x (m, n) and y (m). A GPU has an instruction for 2ˣ only: eˣ = 2^(x·log₂e)."""
    return tl.exp2(x * LOG2E - (y * LOG2E)[:, None])


# ---- 1. windows of 64 tokens: one tile ----------------------------------------------------------
# For a window and head of d = 30 in bfloat16: 15 KB read and written, 0.5 MFLOP in the two
# products, 4,096 exponentials. That is 32 FLOP a byte. An H100 does 300 FLOP in the time in which
# it moves a byte, so memory is what takes the time.
@triton.jit(do_not_specialize=RUN_TIME)
def forward_64_kernel(
        qkv,                         # (B, H, W, 3·CHANNELS): q, k, v, in each head after head
        table,                       # (T, all heads), T = (2·WINDOW_H − 1)·(2·WINDOW_W − 1)
        out,                         # (B, H, W, CHANNELS)
        lse,                         # (windows, HEADS, 64) float32, written only if SAVE
        H, W,                        # size of the map, in tokens
        rows, columns,               # size of the padded map, in windows
        dy, dx,                      # shift
        windows,                     # how many there are: B·rows·columns
        programs,                    # how many programs share them, for each head
        scale,                       # of q kᵀ
        CHANNELS: tl.constexpr,      # A, in all heads together
        FIRST_HEAD: tl.constexpr,    # of this launch
        HEADS: tl.constexpr,         # of this launch
        HEAD_DIM: tl.constexpr,      # d
        BLOCK_D: tl.constexpr,       # d, or the next size that a tile can have: 16, 32
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,       # whether dy and dx are more than 0
        SAVE: tl.constexpr,          # lse, for the backward pass
        PRECISION: tl.constexpr):    # of float32 products: "tf32" or "ieee"
    """A program takes one head and goes from window to window; the bias is loaded once.

    Neighbouring programs take the heads of the same window: a head's row in memory is 60 bytes or
    less, and the heads of a token lie side by side.
    """
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head = FIRST_HEAD + tl.program_id(0) % HEADS
    token = tl.arange(0, 64)
    ALL_HEADS: tl.constexpr = CHANNELS // HEAD_DIM
    bias = bias_tile(table + head, token, token, ALL_HEADS, WINDOW_H, WINDOW_W)
    qkv += head * HEAD_DIM
    out += head * HEAD_DIM
    for window in range(tl.program_id(0) // HEADS, windows, programs):
        row, inside, region = locate(
            window, token, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        q = load_head(qkv, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        k = load_head(qkv + CHANNELS, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        v = load_head(qkv + 2 * CHANNELS, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED and at_edge(window, rows, columns):
            s = tl.where(region[:, None] == region[None, :], s, s - 100.0)
        row_max = tl.max(s, 1)                                   # of each query, along the keys
        p = exp_minus(s, row_max)                                # softmax without its denominator
        row_sum = tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        store_head(out, acc / row_sum[:, None], row, inside, CHANNELS, HEAD_DIM, BLOCK_D)
        if SAVE:
            place = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * 64 + token
            tl.store(lse + place, row_max + tl.log(row_sum))


# ---- 2. windows of 256 tokens: online softmax ---------------------------------------------------
# For a window and head of d = 30 in bfloat16: 61 KB of q, k, v and out (k and v are read again by
# each tile of queries, from the cache), 7.9 MFLOP in the two products, 65,536 exponentials.
# An H100 needs as long for one exponential as for one byte, and each score wants a bias, a maximum
# and sums besides, so arithmetic is what takes the time.
@triton.jit(do_not_specialize=RUN_TIME)
def forward_256_kernel(
        qkv,                         # as above
        table,                       # (all heads, T): every program reads much of a head's row
        out,
        lse,                         # (windows, HEADS, 256) float32, written only if SAVE
        H, W, rows, columns, dy, dx, windows, scale,
        CHANNELS: tl.constexpr,
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        SAVE: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,       # queries of a program
        BLOCK_N: tl.constexpr):      # keys of a step
    """A program takes BLOCK_M queries of one window and head, and all keys, BLOCK_N at a time.

    The softmax of a row needs its maximum, which is known only after the last key. So acc and
    row_sum are kept relative to the maximum so far; when a step finds a larger one, both are
    multiplied by alpha = exp(old maximum − new maximum), as if they had always been relative to it.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    TABLE: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head = FIRST_HEAD + tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % (N // BLOCK_M)
    window = tl.program_id(0) // HEADS // (N // BLOCK_M)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qkv += head * HEAD_DIM
    out += head * HEAD_DIM
    row, inside, region = locate(window, query, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
    q = load_head(qkv, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_row, key_inside, key_region = locate(
            window, key, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        k = load_head(qkv + CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        v = load_head(qkv + 2 * CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        bias = bias_tile(table + head * TABLE, query, key, 1, WINDOW_H, WINDOW_W)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED and at_edge(window, rows, columns):
            s = tl.where(region[:, None] == key_region[None, :], s, s - 100.0)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        alpha = tl.exp2((row_max - new_max) * LOG2E)                   # eˣ again
        p = exp_minus(s, new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        row_max = new_max
    store_head(out, acc / row_sum[:, None], row, inside, CHANNELS, HEAD_DIM, BLOCK_D)
    if SAVE:
        place = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * N + query
        tl.store(lse + place, row_max + tl.log(row_sum))


# ---- tile sizes ---------------------------------------------------------------------------------
class Tiles(NamedTuple):
    """How a kernel is compiled."""
    blocks: dict[str, int]           # tile sizes, where the kernel leaves them open
    warps: int                       # of 32 threads, that work on a tile together
    stages: int                      # rounds of the loop whose loads are under way together
    registers: int                   # of a thread, at most, as `python -m kernels.compile` prints

    @property
    def resident(self) -> int:
        """How many programs a multiprocessor runs at once, by its 65,536 registers.

        The kernels whose programs share the windows have shared memory enough for that.
        """
        return 65536 // (self.registers * 32 * self.warps)


# All sizes below were chosen with the compiler alone, for Hopper: no register spills to memory, and
# then as many programs at once as possible, so that some compute while others wait for memory.
# `registers` is the most over all head widths and window shapes.

# 64×64 scores on 4 warps: each warp owns 16 whole rows, so row_max and row_sum need no exchange
# between warps, and 32 scores a thread, besides 32 numbers of the bias. In float32, of either kind,
# that would spill: 8 warps. Two stages: the loads of the next window run during this one.
FORWARD_64 = {
    "bf16": Tiles({}, warps=4, stages=2, registers=168),
    "tf32": Tiles({}, warps=8, stages=2, registers=128),
    "ieee": Tiles({}, warps=8, stages=2, registers=128),
}

# 64 queries and 32 keys, in bfloat16: 116 registers for a window of 8×32 (4 programs at once), 136
# for one of 32×8 (3). 64 keys take 178 registers (2 programs), 128 queries and 64 keys spill.
FORWARD_256 = {
    "bf16": Tiles(dict(BLOCK_M=64, BLOCK_N=32), warps=4, stages=1, registers=136),
    "tf32": Tiles(dict(BLOCK_M=64, BLOCK_N=32), warps=4, stages=1, registers=152),
    "ieee": Tiles(dict(BLOCK_M=64, BLOCK_N=32), warps=4, stages=1, registers=168),
}


def options(tiles: Tiles) -> dict:
    """Triton's own options; a·b + c may be rounded once, whatever the default of this Triton is."""
    return dict(num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True)


# ---- launches -----------------------------------------------------------------------------------
class Part(NamedTuple):
    """The heads with windows of one orientation: all, or one half in a crossed attention."""
    first_head: int
    heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    rows: int                        # of windows, on the padded map
    columns: int
    windows: int                     # in all maps of the batch

    def run_time(self, H: int, W: int, scale: float) -> dict:
        """What may change from call to call without another compilation."""
        dy, dx = self.shift
        return dict(H=H, W=W, rows=self.rows, columns=self.columns, dy=dy, dx=dx,
                    windows=self.windows, scale=scale)

    def compile_time(self, channels: int, heads: int, numbers: str) -> dict:
        """What the kernels are compiled for; nothing of it depends on the size of the map.

        channels and heads are those of all parts together; numbers: from `arithmetic`.
        """
        h, w = self.window
        head_dim = channels // heads
        return dict(
            CHANNELS=channels, FIRST_HEAD=self.first_head, HEADS=self.heads, HEAD_DIM=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)), WINDOW_H=h, WINDOW_W=w,
            SHIFTED=self.shift != (0, 0),
            PRECISION="ieee" if numbers == "ieee" else "tf32")        # bfloat16 has no choice


def parts_of(maps: tuple[int, int, int], heads: int, window, shift, crossed: bool) -> list[Part]:
    """The parts of an attention on `maps` = (B, H, W), in the order of their heads."""
    B, H, W = maps
    h, w = window
    dy, dx = shift
    down, right = padding((H, W), (h, w), crossed)
    height = H + down
    width = W + right
    count = heads // 2 if crossed else heads
    rows = height // h
    columns = width // w
    upright = Part(0, count, (h, w), (dy, dx), rows, columns, B * rows * columns)
    if not crossed:
        return [upright]
    rows = height // w
    columns = width // h
    turned = Part(count, count, (w, h), (dx, dy), rows, columns, B * rows * columns)
    return [upright, turned]


def arithmetic(dtype: torch.dtype) -> str:
    """"bf16" for bfloat16; for float32 "tf32" (TensorFloat-32) or "ieee" (in full).

    Which of the two, PyTorch's own switch says.
    """
    if dtype == torch.bfloat16:
        return "bf16"
    return "tf32" if switch.allows_tf32("matmul") else "ieee"


def computable(x: Tensor) -> Tensor:
    """x itself; under Triton's interpreter, which multiplies bfloat16 wrongly, x in float32."""
    return x.float() if INTERPRETED else x


def programs_for(windows: int, others: int, tiles: Tiles, device: torch.device) -> int:
    """How many programs share the windows; there are `others` such groups (a head, or a head and a
    tile of scores, each).

    As many as the GPU runs at once: more would only load the bias, or add up its gradient, more
    often. Interpreted, few, so that each takes several windows.
    """
    processors = 2
    if not INTERPRETED:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(windows, triton.cdiv(processors * tiles.resident, others))


def laid_out(table: Tensor, tokens: int) -> Tensor:
    """The bias table as the kernels for windows of this size read it.

    A program for windows of 64 tokens reads it once, as it is: (T, heads). Those for 256 tokens
    read it for every tile of scores: (heads, T), where neighbouring entries share a cache line.
    """
    if tokens == 64:
        return table.contiguous()
    return table.t().contiguous()


def forward(
        qkv: Tensor, bias_table: Tensor, heads: int, window, shift, scale: float, crossed: bool,
        save: bool) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel of each part; `attention.check` has seen the arguments.

    Returns out (B, H, W, A) and lse (parts, windows·heads·n) float32, empty unless `save`.
    """
    B, H, W, width = qkv.shape
    tokens = window[0] * window[1]
    numbers = arithmetic(qkv.dtype)
    parts = parts_of((B, H, W), heads, window, shift, crossed)
    saved = parts[0].windows * parts[0].heads * tokens if save else 0
    lse = qkv.new_empty(len(parts), saved, dtype=torch.float32)
    work = computable(qkv).contiguous()
    out = work.new_empty(B, H, W, width // 3)
    if out.numel() == 0:
        return out.to(qkv.dtype), lse
    table = laid_out(bias_table, tokens)
    launch = launch_64 if tokens == 64 else launch_256
    with torch.cuda.device_of(qkv):
        for i, part in enumerate(parts):
            fixed = part.compile_time(width // 3, heads, numbers) | dict(SAVE=save)
            arguments = part.run_time(H, W, scale) | fixed
            launch(part, numbers, (work, table, out, lse[i]), arguments)
    return out.to(qkv.dtype), lse


def launch_64(part: Part, numbers: str, tensors: tuple, arguments: dict) -> None:
    """One launch of `forward_64_kernel`."""
    tiles = FORWARD_64[numbers]
    programs = programs_for(part.windows, part.heads, tiles, tensors[0].device)
    grid = (part.heads * programs,)
    forward_64_kernel[grid](*tensors, programs=programs, **arguments, **options(tiles))


def launch_256(part: Part, numbers: str, tensors: tuple, arguments: dict) -> None:
    """One launch of `forward_256_kernel`."""
    tiles = FORWARD_256[numbers]
    grid = (part.heads * (256 // tiles.blocks["BLOCK_M"]) * part.windows,)
    forward_256_kernel[grid](*tensors, **arguments, **tiles.blocks, **options(tiles))
