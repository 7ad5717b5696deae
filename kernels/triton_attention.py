"""Window attention in Triton, forward: the kernels behind attention.py. Imported when first used.

    S = scale · q kᵀ + bias + mask        P = softmax(S)        out = P v

The plain reference of these kernels is `reference` in attention.py. Read in this order:

1. `forward_64_kernel`. A window of 64 tokens (8×8, SwinIR): its (64, 64) scores are one tile that
   stays in registers from the product q kᵀ to the product with v.
2. `forward_256_kernel`. A window of 256 tokens (8×32, DAT): 256×256 scores are too many for the
   registers. A program takes 64 queries and goes over the keys in steps, with the online softmax
   of FlashAttention (arXiv 2205.14135).
3. The launches. (The tile sizes and their reasons are in triton_tiles.py.)

Rolling, cutting into windows and putting back cost nothing: `locate` computes where a token of a
window lies on the map, and the rows that are read are the rows that are written. In the example at
the head of attention.py (a map of 4×4, windows of 2×2, shift 1) the place 3 of window 1 is row
0·2 + 1 + 1 = 2 and column 1·2 + 1 + 1 = 4 of the map; there is no column 4, so it was rolled from
column 0: the token 2·4 + 0 = 8. In `keep_apart` window 1 is in the last column; the places 1 and 3
of it have x >= 2 − 1, so their region is 1, that of the places 0 and 2 is 0.

All heads have 16 or 32 channels here: heads.py says why, and who sees to it.

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

from kernels.attention import padding
from kernels.heads import cut_groups, head_width, pad_groups
from kernels.triton_tiles import Tiles, arithmetic, options, tiles_for

INTERPRETED = triton.knobs.runtime.interpret          # on the CPU, in Python: for the tests
LOG2E = tl.constexpr(1.4426950408889634)              # log₂ e

# These change with the picture. Triton would compile again for a 1 and for multiples of 16.
RUN_TIME = ["H", "W", "rows", "columns", "dy", "dx", "windows", "programs"]


# ---- parts of kernels ---------------------------------------------------------------------------
@triton.jit
def place_in_grid(FIRST_HEAD: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr):
    """(head, tile, window) of this program: which of HEADS heads, of TILES tiles, of the windows.

    Neighbouring programs take the heads of the same tokens: a head's row in memory is 64 bytes or
    less, and the heads of a token lie side by side. Where programs share the windows, the last of
    the three is the first window of this one, and its number among them.
    """
    program = tl.program_id(0)
    head = FIRST_HEAD + program % HEADS
    return head, program // HEADS % TILES, program // HEADS // TILES


@triton.jit
def place_of(window, rows, columns):
    """(image, row, column) of a window. A division of unsigned numbers is a third shorter."""
    rows_above = (tl.cast(window, tl.uint32) // columns.to(tl.uint32)).to(tl.int32)
    image = (rows_above.to(tl.uint32) // rows.to(tl.uint32)).to(tl.int32)
    return image, rows_above - image * rows, window - rows_above * columns


# A row's number is below 2³¹: the q, k and v of so many tokens would need 206 GB at least. Times
# the numbers in a row it may be more: load_head and store_head multiply in 64 bits.
@triton.jit
def locate(window, token, H, W, rows, columns, dy, dx,
           WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """Finds some tokens of a window on the map, by their places 0 .. n−1 in the window.

    Returns their rows in a (B·H·W, ·) matrix, and whether they lie on the map, not in the padding.
    """
    image, row, column = place_of(window, rows, columns)
    y = row * WINDOW_H + token // WINDOW_W + dy
    x = column * WINDOW_W + token % WINDOW_W + dx
    y = tl.where(y >= rows * WINDOW_H, y - rows * WINDOW_H, y)   # rolled from the top
    x = tl.where(x >= columns * WINDOW_W, x - columns * WINDOW_W, x)
    return (image * H + y) * W + x, (y < H) & (x < W)


@triton.jit
def region_of(token, at_bottom, at_right, dy, dx, WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """The regions of some tokens: 0, +2 if rolled from top to bottom, +1 from left to right."""
    below = at_bottom & (token // WINDOW_W >= WINDOW_H - dy)
    beyond = at_right & (token % WINDOW_W >= WINDOW_W - dx)
    return below.to(tl.int32) * 2 + beyond.to(tl.int32)


@triton.jit
def keep_apart(s, window, query, key, rows, columns, dy, dx,
               WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """The scores, less 100 where query and key lie in different regions.

    Only windows in the last row or column of windows hold several. query and key: as in bias_tile.
    """
    _, row, column = place_of(window, rows, columns)
    at_bottom = row == rows - 1
    at_right = column == columns - 1
    if at_bottom | at_right:
        of_query = region_of(query, at_bottom, at_right, dy, dx, WINDOW_H, WINDOW_W)
        of_key = region_of(key, at_bottom, at_right, dy, dx, WINDOW_H, WINDOW_W)
        s = tl.where(of_query == of_key, s, s - 100.0)
    return s


@triton.jit
def load_head(matrix, row, inside, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(tokens, HEAD_DIM) numbers of a head: zero in the padding of the map."""
    place = row.to(tl.int64)[:, None] * STRIDE + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(matrix + place, mask=inside[:, None], other=0.0)


@triton.jit
def store_head(matrix, values, row, inside, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes what `load_head` would read."""
    place = row.to(tl.int64)[:, None] * STRIDE + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(matrix + place, values.to(matrix.dtype.element_ty), mask=inside[:, None])


@triton.jit
def bias_tile(table, query, key, STRIDE: tl.constexpr,
              WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr):
    """The bias of (query, key) from one head's table, whose entries lie STRIDE numbers apart.

    query is a column (m, 1) and key a row (1, n), or the other way round.

    The entry (Δy + h−1)·(2w−1) + (Δx + w−1) is of_query − of_key, two numbers that depend on the
    query alone and on the key alone: one subtraction for each score.
    """
    PITCH: tl.constexpr = 2 * WINDOW_W - 1
    of_query = (query // WINDOW_W + WINDOW_H - 1) * PITCH + query % WINDOW_W + WINDOW_W - 1
    of_key = key // WINDOW_W * PITCH + key % WINDOW_W
    return tl.load(table + (of_query - of_key) * STRIDE).to(tl.float32)


@triton.jit
def exp_minus(x, y):
    """exp(x − y). A GPU has an instruction for 2ˣ only, and eˣ = 2^(x·log₂e)."""
    return tl.exp2(x * LOG2E - y * LOG2E)


# ---- 1. windows of 64 tokens: one tile ----------------------------------------------------------
# For a window and head of d = 32 in bfloat16: 16 KB read and written, 0.5 MFLOP in the two
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
        HEAD_DIM: tl.constexpr,      # d: 16 or 32
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,       # whether dy and dx are more than 0
        SAVE: tl.constexpr,          # lse, for the backward pass
        PRECISION: tl.constexpr):    # of float32 products, see triton_tiles.py
    """A program takes one head and goes from window to window; the bias is loaded once."""
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head, _, first = place_in_grid(FIRST_HEAD, HEADS, 1)
    token = tl.arange(0, 64)
    query = token[:, None]
    key = token[None, :]
    bias = bias_tile(table + head, query, key, CHANNELS // HEAD_DIM, WINDOW_H, WINDOW_W)
    qkv += head * HEAD_DIM
    out += head * HEAD_DIM
    for window in range(first, windows, programs):
        row, inside = locate(window, token, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        q = load_head(qkv, row, inside, STRIDE, HEAD_DIM)
        k = load_head(qkv + CHANNELS, row, inside, STRIDE, HEAD_DIM)
        v = load_head(qkv + 2 * CHANNELS, row, inside, STRIDE, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED:
            s = keep_apart(s, window, query, key, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        row_max = tl.max(s, 1)                                   # of each query, along the keys
        p = exp_minus(s, row_max[:, None])                       # softmax, not yet divided
        row_sum = tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        store_head(out, acc * (1 / row_sum)[:, None], row, inside, CHANNELS, HEAD_DIM)
        if SAVE:
            place = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * 64 + token
            tl.store(lse + place, row_max + tl.log(row_sum))


# ---- 2. windows of 256 tokens: online softmax ---------------------------------------------------
# For a window and head of d = 32 in bfloat16: 66 KB of q, k, v and out (k and v are read again by
# each tile of queries, from the cache), 8.4 MFLOP in the two products, 65,536 exponentials.
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
    head, tile, window = place_in_grid(FIRST_HEAD, HEADS, N // BLOCK_M)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qkv += head * HEAD_DIM
    out += head * HEAD_DIM
    row, inside = locate(window, query, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
    q = load_head(qkv, row, inside, STRIDE, HEAD_DIM)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_row, key_inside = locate(
            window, key, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        k = load_head(qkv + CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
        v = load_head(qkv + 2 * CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
        bias = bias_tile(
            table + head * TABLE, query[:, None], key[None, :], 1, WINDOW_H, WINDOW_W)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED:
            s = keep_apart(s, window, query[:, None], key[None, :], rows, columns, dy, dx,
                           WINDOW_H, WINDOW_W)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        alpha = exp_minus(row_max, new_max)
        p = exp_minus(s, new_max[:, None])
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        row_max = new_max
    store_head(out, acc * (1 / row_sum)[:, None], row, inside, CHANNELS, HEAD_DIM)
    if SAVE:
        place = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * N + query
        tl.store(lse + place, row_max + tl.log(row_sum))


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

    def compile_time(self, heads: int, head_dim: int) -> dict:
        """What the kernels are compiled for; nothing of it depends on the size of the map.

        heads: of all parts together; head_dim: 16 or 32.
        """
        h, w = self.window
        return dict(
            CHANNELS=heads * head_dim, FIRST_HEAD=self.first_head, HEADS=self.heads,
            HEAD_DIM=head_dim, WINDOW_H=h, WINDOW_W=w, SHIFTED=self.shift != (0, 0))


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


def readable(x: Tensor, groups: int, head_dim: int) -> Tensor:
    """x (..., groups·d) as the kernels read it: (..., groups·head_dim), contiguous, and at an
    address that 16-byte loads can have. x itself where it is so already.
    """
    if INTERPRETED and x.dtype == torch.bfloat16:     # the interpreter multiplies it wrongly
        x = x.float()
    x = pad_groups(x, -1, groups, head_dim).contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


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
        variant: str, save: bool) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel of each part; `attention.check` has seen the arguments.

    Returns out (B, H, W, A) and lse (parts, windows·heads·n) float32, empty unless `save`.
    """
    B, H, W, width = qkv.shape
    d = width // 3 // heads
    head_dim = head_width(d)
    tokens = window[0] * window[1]
    tiles = tiles_for(f"forward_{tokens}", arithmetic(qkv.dtype, "matmul"), qkv.device, variant)
    parts = parts_of((B, H, W), heads, window, shift, crossed)
    saved = parts[0].windows * parts[0].heads * tokens if save else 0
    lse = qkv.new_empty(len(parts), saved, dtype=torch.float32)
    if qkv.numel() == 0:
        return qkv.new_empty(B, H, W, width // 3), lse
    work = readable(qkv, 3 * heads, head_dim)
    out = work.new_empty(B, H, W, heads * head_dim)
    table = laid_out(bias_table, tokens)
    launch = launch_64 if tokens == 64 else launch_256
    with torch.cuda.device_of(qkv):
        for i, part in enumerate(parts):
            fixed = part.compile_time(heads, head_dim) | dict(SAVE=save)
            arguments = part.run_time(H, W, scale) | fixed
            launch(part, tiles, (work, table, out, lse[i]), arguments)
    return cut_groups(out, heads, d).to(qkv.dtype), lse


def launch_64(part: Part, tiles: Tiles, tensors: tuple, arguments: dict) -> None:
    """One launch of `forward_64_kernel`."""
    programs = programs_for(part.windows, part.heads, tiles, tensors[0].device)
    grid = (part.heads * programs,)
    forward_64_kernel[grid](
        *tensors, programs=programs, **arguments, **tiles.constants, **options(tiles))


def launch_256(part: Part, tiles: Tiles, tensors: tuple, arguments: dict) -> None:
    """One launch of `forward_256_kernel`."""
    grid = (part.heads * (256 // tiles.blocks["BLOCK_M"]) * part.windows,)
    forward_256_kernel[grid](*tensors, **arguments, **tiles.constants, **options(tiles))
