"""The Triton half of window_attention.py: the kernels, their configurations, and the launches. Imported only when used.

A program owns one head and walks over windows. Where a token of a window lies on the map is arithmetic (`places`), so
rolling, cutting into windows, masking, and putting back cost no memory traffic; the rows read are the rows written.
Scores never leave the chip: backward computes them again from q, k and the logarithm of each row's sum of exponentials.

    S = scale·q kᵀ + bias + mask        P = 2^(S·log₂e − lse)        out = P v
    dP = dout vᵀ     dS = P·(dP − Σ out·dout)     dv = Pᵀ dout     dq = scale·dS k     dk = scale·dSᵀ q     dbias = Σ dS

Windows of 64 tokens: one tile of scores; a head's bias, and in backward its gradient, stay in registers over all
windows of the program. Windows of 256 tokens: key tiles with an online softmax (as FlashAttention, arXiv 2205.14135),
and the gradient of the bias in a kernel of its own. Nothing is added atomically: the same input gives the same bits.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.window_attention import padding

INTERPRETED = triton.knobs.runtime.interpret
LOG2E = tl.constexpr(1.4426950408889634)
MAP = ["H", "W", "rows", "columns", "dy", "dx", "windows", "groups"]            # never worth a compilation of their own


# ---- parts of kernels
@triton.jit
def places(window, token, H, W, rows, columns, dy, dx, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Of some tokens of a window: their rows in (B·H·W, ·), whether they lie on the map, and their regions. A token
    whose place wraps round the (virtually padded) map comes from the other end: that makes it another region."""
    y = window // columns % rows * HEIGHT + token // WIDTH + dy
    x = window % columns * WIDTH + token % WIDTH + dx
    below, beyond = y >= rows * HEIGHT, x >= columns * WIDTH
    y = tl.where(below, y - rows * HEIGHT, y)
    x = tl.where(beyond, x - columns * WIDTH, x)
    row = (window // (rows * columns) * H + y).to(tl.int64) * W + x
    return row, (y < H) & (x < W), below.to(tl.int32) * 2 + beyond.to(tl.int32)


@triton.jit
def at_edge(window, rows, columns):
    """Whether the window is in the last row or column of windows, the only ones that hold several regions."""
    return (window // columns % rows == rows - 1) | (window % columns == columns - 1)


@triton.jit
def take(matrix, row, inside, STRIDE: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    """(len(row), PADDED) values of one head, zero beyond its D channels and off the map."""
    channel = tl.arange(0, PADDED)
    return tl.load(matrix + row[:, None] * STRIDE + channel[None, :],
                   mask=inside[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def put(matrix, values, row, inside, STRIDE: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr):
    channel = tl.arange(0, PADDED)
    tl.store(matrix + row[:, None] * STRIDE + channel[None, :], values.to(matrix.dtype.element_ty),
             mask=inside[:, None] & (channel < D)[None, :])


@triton.jit
def bias_tile(table, query, key, ENTRY: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(queries, keys) of a head's column of the table, which has ENTRY elements between its entries."""
    from_query = query // WIDTH * (2 * WIDTH - 1) + query % WIDTH + (HEIGHT - 1) * (2 * WIDTH - 1) + WIDTH - 1
    from_key = key // WIDTH * (2 * WIDTH - 1) + key % WIDTH
    return tl.load(table + (from_query[:, None] - from_key[None, :]) * ENTRY).to(tl.float32)


@triton.jit
def scores(q, k, bias, query_region, key_region, edge, scale, SHIFTED: tl.constexpr, PRECISION: tl.constexpr):
    result = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    if SHIFTED:
        if edge:
            result = tl.where(query_region[:, None] == key_region[None, :], result, result - 100.0)
    return result


# ---- kernels
@triton.jit(do_not_specialize=MAP)
def forward_kernel(
        qkv,                     # (B, H, W, 3·A), q k v, heads-major
        table,                   # (T, heads) or (heads, T): see ENTRY, COLUMN
        out,                     # (B, H, W, A)
        lse,                     # (windows, HEADS, N) float32, log₂ of the sum of exponentials; only if SAVE
        H, W, rows, columns,     # the map in tokens and in windows
        dy, dx,                  # shift
        windows, groups,         # all of them; the programs that share them
        scale,
        A: tl.constexpr, FIRST: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,  # heads of this launch, head width
        ENTRY: tl.constexpr, COLUMN: tl.constexpr,                                   # strides of the table
        HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr,
        PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,             # tile sizes
        PRECISION: tl.constexpr, SAVE: tl.constexpr):
    """Grid: heads fastest (a head's row is 60 bytes or less, its neighbours share the sector), query tiles, groups."""
    N: tl.constexpr = HEIGHT * WIDTH
    head = tl.program_id(0) % HEADS
    query = tl.program_id(0) // HEADS % (N // QUERIES) * QUERIES + tl.arange(0, QUERIES)
    group = tl.program_id(0) // (HEADS * (N // QUERIES))
    qkv += (FIRST + head) * D
    out += (FIRST + head) * D
    table += (FIRST + head) * COLUMN
    if KEYS == N:
        bias = bias_tile(table, query, tl.arange(0, KEYS), ENTRY, HEIGHT, WIDTH)
    for window in range(group, windows if KEYS == N else group + 1, groups if KEYS == N else 1):
        edge = at_edge(window, rows, columns)
        row, inside, region = places(window, query, H, W, rows, columns, dy, dx, HEIGHT, WIDTH)
        q = take(qkv, row, inside, 3 * A, D, PADDED)
        largest = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        mean = tl.zeros([QUERIES, PADDED], tl.float32)
        for start in range(0, N, KEYS):
            key = start + tl.arange(0, KEYS)
            key_row, key_inside, key_region = places(window, key, H, W, rows, columns, dy, dx, HEIGHT, WIDTH)
            k = take(qkv + A, key_row, key_inside, 3 * A, D, PADDED)
            v = take(qkv + 2 * A, key_row, key_inside, 3 * A, D, PADDED)
            if KEYS != N:
                bias = bias_tile(table, query, key, ENTRY, HEIGHT, WIDTH)
            s = scores(q, k, bias, region, key_region, edge, scale, SHIFTED, PRECISION)
            new = tl.maximum(largest, tl.max(s, 1))
            p = tl.exp2(s * LOG2E - (new * LOG2E)[:, None])
            before = tl.exp2((largest - new) * LOG2E)
            total = total * before + tl.sum(p, 1)
            mean = mean * before[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            largest = new
        put(out, mean / total[:, None], row, inside, A, D, PADDED)
        if SAVE:
            tl.store(lse + (window * HEADS + head).to(tl.int64) * N + query, largest * LOG2E + tl.log2(total))


@triton.jit(do_not_specialize=MAP)
def backward_kernel(
        qkv, table, lse,         # as in forward
        out, dout,               # (B, H, W, A)
        dqkv,                    # (B, H, W, 3·A)
        delta,                   # (windows, HEADS, N) float32, Σ out·dout for table_kernel; only if KEYS < N
        partial,                 # (groups, HEADS, N, N) float32, sums of dS; only if KEYS == N
        H, W, rows, columns, dy, dx, windows, groups, scale,
        A: tl.constexpr, FIRST: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
        ENTRY: tl.constexpr, COLUMN: tl.constexpr,
        HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr,
        PADDED: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Grid: heads fastest, groups. All queries of a window at once: dk and dv of a key tile are complete as they come.
    The mask is applied without asking whether the window is at an edge: asking takes registers that are not there."""
    N: tl.constexpr = HEIGHT * WIDTH
    head = tl.program_id(0) % HEADS
    group = tl.program_id(0) // HEADS
    query = tl.arange(0, N)
    column = (FIRST + head) * D
    qkv += column
    dqkv += column
    table += (FIRST + head) * COLUMN
    if KEYS == N:
        bias = bias_tile(table, query, query, ENTRY, HEIGHT, WIDTH)
        dbias = tl.zeros([N, N], tl.float32)
    for window in range(group, windows if KEYS == N else group + 1, groups if KEYS == N else 1):
        row, inside, region = places(window, query, H, W, rows, columns, dy, dx, HEIGHT, WIDTH)
        q = take(qkv, row, inside, 3 * A, D, PADDED)
        do = take(dout + column, row, inside, A, D, PADDED)
        saved = (window * HEADS + head).to(tl.int64) * N + query
        log_total = tl.load(lse + saved)
        if KEYS != N:
            o = take(out + column, row, inside, A, D, PADDED)
            inner = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
            tl.store(delta + saved, inner)
        dq = tl.zeros([N, PADDED], tl.float32)
        for start in range(0, N, KEYS):
            key = start + tl.arange(0, KEYS)
            key_row, key_inside, key_region = places(window, key, H, W, rows, columns, dy, dx, HEIGHT, WIDTH)
            k = take(qkv + A, key_row, key_inside, 3 * A, D, PADDED)
            v = take(qkv + 2 * A, key_row, key_inside, 3 * A, D, PADDED)
            if KEYS != N:
                bias = bias_tile(table, query, key, ENTRY, HEIGHT, WIDTH)
            s = scores(q, k, bias, region, key_region, True, scale, SHIFTED, PRECISION)
            p = tl.exp2(s * LOG2E - log_total[:, None])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            if KEYS == N:                                      # the whole row of P is here: no need to read out
                ds = p * (dp - tl.sum(p * dp, 1)[:, None])
                dbias += ds
            else:
                ds = p * (dp - inner[:, None])
            dv = tl.dot(tl.trans(p.to(v.dtype)), do, input_precision=PRECISION)
            put(dqkv + 2 * A, dv, key_row, key_inside, 3 * A, D, PADDED)
            ds = ds.to(v.dtype)
            dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
            put(dqkv + A, dk, key_row, key_inside, 3 * A, D, PADDED)
            dq += tl.dot(ds, k, input_precision=PRECISION)
        put(dqkv, dq * scale, row, inside, 3 * A, D, PADDED)
    if KEYS == N:
        place = (group * HEADS + head) * N * N + query[:, None] * N + query[None, :]
        tl.store(partial + place, dbias)


@triton.jit(do_not_specialize=MAP)
def table_kernel(
        qkv, table, lse, dout, delta,                     # as in backward
        partial,                                          # (groups, HEADS, N, N) float32, sums of dS
        H, W, rows, columns, dy, dx, windows, groups, scale,
        A: tl.constexpr, FIRST: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
        ENTRY: tl.constexpr, COLUMN: tl.constexpr,
        HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SHIFTED: tl.constexpr,
        PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Grid: heads fastest, tiles of the scores, groups. A program sums one tile of dS over the windows of its group."""
    N: tl.constexpr = HEIGHT * WIDTH
    TILES: tl.constexpr = (N // QUERIES) * (N // KEYS)
    head = tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % TILES
    group = tl.program_id(0) // (HEADS * TILES)
    query = tile // (N // KEYS) * QUERIES + tl.arange(0, QUERIES)
    key = tile % (N // KEYS) * KEYS + tl.arange(0, KEYS)
    qkv += (FIRST + head) * D
    dout += (FIRST + head) * D
    bias = bias_tile(table + (FIRST + head) * COLUMN, query, key, ENTRY, HEIGHT, WIDTH)
    dbias = tl.zeros([QUERIES, KEYS], tl.float32)
    for window in range(group, windows, groups):
        row, inside, region = places(window, query, H, W, rows, columns, dy, dx, HEIGHT, WIDTH)
        key_row, key_inside, key_region = places(window, key, H, W, rows, columns, dy, dx, HEIGHT, WIDTH)
        q = take(qkv, row, inside, 3 * A, D, PADDED)
        do = take(dout, row, inside, A, D, PADDED)
        k = take(qkv + A, key_row, key_inside, 3 * A, D, PADDED)
        v = take(qkv + 2 * A, key_row, key_inside, 3 * A, D, PADDED)
        saved = (window * HEADS + head).to(tl.int64) * N + query
        s = scores(q, k, bias, region, key_region, at_edge(window, rows, columns), scale, SHIFTED, PRECISION)
        p = tl.exp2(s * LOG2E - tl.load(lse + saved)[:, None])
        dbias += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - tl.load(delta + saved)[:, None])
    tl.store(partial + (group * HEADS + head) * N * N + query[:, None] * N + key[None, :], dbias)


@triton.jit
def entries_kernel(
        dbias,                   # (HEADS, N, N) float32
        dtable,                  # (T, COLUMNS), any dtype; columns FIRST to FIRST + HEADS are written
        FIRST: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
        ENTRIES: tl.constexpr):
    """Grid: heads fastest, tiles of entries. An entry is the sum of the pairs (query, key) that are this far apart."""
    N: tl.constexpr = HEIGHT * WIDTH
    head = tl.program_id(0) % HEADS
    entry = tl.program_id(0) // HEADS * ENTRIES + tl.arange(0, ENTRIES)
    key = tl.arange(0, N)
    y = (entry // (2 * WIDTH - 1) - (HEIGHT - 1))[:, None] + (key // WIDTH)[None, :]                 # of the query
    x = (entry % (2 * WIDTH - 1) - (WIDTH - 1))[:, None] + (key % WIDTH)[None, :]
    there = (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)                  # never, for an entry past the table's end
    pairs = tl.load(dbias + head * N * N + (y * WIDTH + x) * N + key[None, :], mask=there, other=0.0)
    tl.store(dtable + entry * COLUMNS + FIRST + head, tl.sum(pairs, 1).to(dtable.dtype.element_ty),
             mask=entry < (2 * HEIGHT - 1) * (2 * WIDTH - 1))


# ---- configurations
class Tiles(NamedTuple):
    """How a kernel is compiled. `resident` programs fit on a multiprocessor, the limit is their registers."""
    queries: int                 # backward takes all queries of a window at once
    keys: int
    warps: int
    stages: int                  # of the pipelined loads
    resident: int


FORWARD = {                      # (tokens in a window, arithmetic)
    (64, "bf16"): Tiles(64, 64, 4, 2, 3),
    (64, "tf32"): Tiles(64, 64, 8, 2, 2),
    (64, "ieee"): Tiles(64, 64, 8, 2, 2),
    (256, "bf16"): Tiles(64, 32, 4, 1, 4),
    (256, "tf32"): Tiles(64, 32, 4, 1, 3),
    (256, "ieee"): Tiles(64, 32, 4, 1, 3),
}
BACKWARD = {
    (64, "bf16"): Tiles(64, 64, 4, 2, 2),
    (64, "tf32"): Tiles(64, 64, 8, 1, 1),
    (64, "ieee"): Tiles(64, 64, 16, 1, 1),
    (256, "bf16"): Tiles(256, 16, 16, 1, 1),
    (256, "tf32"): Tiles(256, 16, 16, 1, 1),
    (256, "ieee"): Tiles(256, 16, 16, 1, 1),
}
TABLE = {
    (256, "bf16"): Tiles(64, 64, 4, 1, 3),
    (256, "tf32"): Tiles(64, 64, 8, 1, 2),
    (256, "ieee"): Tiles(64, 64, 16, 1, 1),
}
ENTRIES = 16                     # of the table, in a program of entries_kernel


def arithmetic(dtype: torch.dtype) -> str:
    """bfloat16; or float32 in TensorFloat-32 or in full, by PyTorch's own switch."""
    return "bf16" if dtype == torch.bfloat16 else "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def constants(A: int, heads: int, first: int, count: int, window, shifted: bool, numbers: str) -> dict:
    """What all kernels are compiled for: `count` heads from `first` on. Nothing depends on the size of the map."""
    by_entry = window[0] * window[1] == 64                                                   # see `laid_out`
    return dict(A=A, FIRST=first, HEADS=count, D=A // heads, PADDED=max(16, triton.next_power_of_2(A // heads)),
                ENTRY=heads if by_entry else 1, COLUMN=1 if by_entry else (2 * window[0] - 1) * (2 * window[1] - 1),
                HEIGHT=window[0], WIDTH=window[1], SHIFTED=shifted,
                PRECISION="ieee" if numbers == "ieee" else "tf32")                            # bfloat16 ignores it


def options(tiles: Tiles, *names: str) -> dict:
    """The tile sizes asked for, and Triton's options; a·b + c may be one rounding, whatever this Triton's default."""
    return ({name.upper(): getattr(tiles, name) for name in names}
            | dict(num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True))


# ---- launches
def laid_out(table: Tensor, window) -> Tensor:
    """Large windows read the table for every tile: as (heads, T) then, so that neighbours share a cache line."""
    return table.contiguous() if window[0] * window[1] == 64 else table.t().contiguous()


class Launch(NamedTuple):
    """The heads of one orientation: what changes between the two halves of a crossed attention."""
    first: int
    count: int
    constants: dict
    geometry: tuple              # H, W, rows, columns, dy, dx
    windows: int


def launches(qkv: Tensor, heads: int, window, shift, crossed: bool) -> list[Launch]:
    B, H, W, A = *qkv.shape[:3], qkv.shape[3] // 3
    down, right = padding((H, W), tuple(window), crossed)
    count, result = heads // 2 if crossed else heads, []
    for first, (h, w), (dy, dx) in [(0, window, shift), (count, window[::-1], shift[::-1])][:1 + crossed]:
        rows, columns = (H + down) // h, (W + right) // w
        fixed = constants(A, heads, first, count, (h, w), dy > 0, arithmetic(qkv.dtype))
        result.append(Launch(first, count, fixed, (H, W, rows, columns, dy, dx), B * rows * columns))
    return result


def sharing(windows: int, others: int, tiles: Tiles, device: torch.device) -> int:
    """Programs that share the windows, for each of `others` heads and tiles: as many as the GPU runs at once.
    Interpreted, few, so that each takes several."""
    processors = 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return min(windows, -(-processors * tiles.resident // others))


def forward(qkv: Tensor, bias_table: Tensor, heads: int, window, shift, scale: float, crossed: bool,
            save: bool) -> tuple[Tensor, Tensor]:
    """(out (B, H, W, A), lse (orientations, windows·heads·N) float32, or (0) unless save)."""
    B, H, W, A = *qkv.shape[:3], qkv.shape[3] // 3
    n = window[0] * window[1]
    tiles, orientations = FORWARD[n, arithmetic(qkv.dtype)], launches(qkv, heads, window, shift, crossed)
    lse = qkv.new_empty((len(orientations), orientations[0].windows * orientations[0].count * n) if save else 0,
                        dtype=torch.float32)
    work, table = exact(qkv).contiguous(), laid_out(bias_table, window)
    out = work.new_empty(B, H, W, A)
    with torch.cuda.device_of(qkv):
        for i, part in enumerate(orientations if out.numel() else ()):
            groups = sharing(part.windows, part.count, tiles, qkv.device) if tiles.keys == n else part.windows
            forward_kernel[part.count * (n // tiles.queries) * groups,](
                work, table, out, lse[i] if save else lse, *part.geometry, part.windows, groups, scale,
                **part.constants, SAVE=save, **options(tiles, "queries", "keys"))
    return out.to(qkv.dtype), lse


def backward(qkv: Tensor, bias_table: Tensor, out: Tensor, lse: Tensor, dout: Tensor, heads: int, window, shift,
             scale: float, crossed: bool) -> tuple[Tensor, Tensor]:
    """(dqkv as qkv, dtable as bias_table)."""
    n, numbers = window[0] * window[1], arithmetic(qkv.dtype)
    tiles, table = BACKWARD[n, numbers], laid_out(bias_table, window)
    work, out, dout = (exact(t).contiguous() for t in (qkv, out, dout))
    dqkv = torch.empty_like(work)
    dtable = bias_table.new_empty(bias_table.shape) if qkv.numel() else torch.zeros_like(bias_table)
    delta = torch.empty_like(lse[0]) if tiles.keys < n else lse                              # unused where it is lse
    with torch.cuda.device_of(qkv):
        for i, part in enumerate(launches(qkv, heads, window, shift, crossed) if qkv.numel() else ()):
            share = tiles if tiles.keys == n else TABLE[n, numbers]
            others = part.count * (n // share.queries) * (n // share.keys)
            groups = sharing(part.windows, others, share, qkv.device)
            partial = lse.new_empty(groups, part.count, n, n)
            walks = groups if tiles.keys == n else part.windows
            backward_kernel[part.count * walks,](
                work, table, lse[i], out, dout, dqkv, delta, partial, *part.geometry, part.windows, walks, scale,
                **part.constants, **options(tiles, "keys"))
            if tiles.keys < n:
                table_kernel[others * groups,](
                    work, table, lse[i], dout, delta, partial, *part.geometry, part.windows, groups, scale,
                    **part.constants, **options(share, "queries", "keys"))
            h, w = part.constants["HEIGHT"], part.constants["WIDTH"]
            entries_kernel[part.count * triton.cdiv(len(bias_table), ENTRIES),](
                partial.sum(0), dtable, part.first, part.count, heads, h, w, ENTRIES)
    return dqkv.to(qkv.dtype), dtable


def exact(x: Tensor) -> Tensor:
    """Triton's interpreter multiplies bfloat16 matrices wrongly: float32 there."""
    return x.float() if INTERPRETED else x
