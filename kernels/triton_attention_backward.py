"""Window attention in Triton, backward. Read triton_attention.py first.

With dout the gradient of out, and P computed again from q, k and lse (softmax P = exp(S − lse)):

    dv = Pᵀ dout                 dP = dout vᵀ                dS = P · (dP − delta)
    dq = scale · dS k            dk = scale · dSᵀ q          dbias = Σ over windows of dS

delta is one number for each query: Σ over keys of P·dP, the same as Σ over channels of out·dout.
The gradient of a table entry is the sum of dbias over the pairs (query, key) that read it.

1. `backward_64_kernel`. Windows of 64 tokens: one tile again. dbias stays in the registers of the
   program over all of its windows.
2. `queries_256_kernel`. Windows of 256 tokens, dq: some queries and all keys, in steps.
3. `keys_256_kernel`. dk and dv: some keys and all queries, in steps. (2 and 3 are the two loops of
   FlashAttention-2, arXiv 2307.08691: nobody shares a sum with anybody.)
4. `dbias_256_kernel`. 256×256 numbers of dbias fit in no program's registers. Each program of this
   kernel owns one tile of dbias, and goes over the windows for that tile alone.
5. `dtable_kernel`. From dbias (n, n) to the table.

A sum over windows is split among programs; each writes its own (dbias_sums), and PyTorch adds them
up in a fixed order. Nothing is added atomically: on one kind of GPU the same input gives the same
bits. (How many programs share a sum depends on the number of the GPU's multiprocessors.)

Of the padding, queries add nothing, since their dout is read as 0. Keys take part: nobody needs
their dk and dv, but their dS counts in dbias.
"""
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.heads import cut_groups, head_width
from kernels.triton_attention import (
    RUN_TIME,
    Part,
    bias_tile,
    exp_minus,
    keep_apart,
    laid_out,
    load_head,
    locate,
    parts_of,
    place_in_grid,
    programs_for,
    readable,
    store_head,
)
from kernels.triton_tiles import arithmetic, options, tiles_for

ENTRIES = 16                         # of the table, for a program of dtable_kernel: 16 × n numbers


# ---- 1. windows of 64 tokens: one tile ----------------------------------------------------------
# For a window and head of d = 32 in bfloat16: 29 KB read and written, 1.3 MFLOP in five products,
# 4,096 exponentials. P, dP, dS, bias and dbias are 4,096 numbers each, 32 a thread.
@triton.jit(do_not_specialize=RUN_TIME)
def backward_64_kernel(
        qkv,                         # (B, H, W, 3·CHANNELS): q, k, v, in each head after head
        table,                       # (T, all heads), T = (2·WINDOW_H − 1)·(2·WINDOW_W − 1)
        lse,                         # (windows, HEADS, 64) float32, from the forward pass
        dout,                        # (B, H, W, CHANNELS)
        dqkv,                        # (B, H, W, 3·CHANNELS)
        dbias_sums,                  # (programs, HEADS, 64, 64) float32
        H, W,                        # size of the map, in tokens
        rows, columns,               # size of the padded map, in windows
        dy, dx,                      # shift
        windows,                     # how many there are: B·rows·columns
        programs,                    # how many programs share them, for each head
        scale,                       # of q kᵀ
        CHANNELS: tl.constexpr,      # the rest as in forward_64_kernel
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        PRECISION: tl.constexpr):
    """A program takes one head and goes from window to window, as in the forward pass."""
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head, _, program = place_in_grid(FIRST_HEAD, HEADS, 1)
    token = tl.arange(0, 64)
    query = token[:, None]
    key = token[None, :]
    bias = bias_tile(table + head, query, key, CHANNELS // HEAD_DIM, WINDOW_H, WINDOW_W)
    dbias = tl.zeros([64, 64], tl.float32)
    qkv += head * HEAD_DIM
    dqkv += head * HEAD_DIM
    dout += head * HEAD_DIM
    for window in range(program, windows, programs):
        row, inside = locate(window, token, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        q = load_head(qkv, row, inside, STRIDE, HEAD_DIM)
        do = load_head(dout, row, inside, CHANNELS, HEAD_DIM)
        saved = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * 64 + token
        row_lse = tl.load(lse + saved)
        k = load_head(qkv + CHANNELS, row, inside, STRIDE, HEAD_DIM)
        v = load_head(qkv + 2 * CHANNELS, row, inside, STRIDE, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED:
            s = keep_apart(s, window, query, key, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        p = exp_minus(s, row_lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        dbias += ds
        dv = tl.dot(tl.trans(p.to(v.dtype)), do, input_precision=PRECISION)
        store_head(dqkv + 2 * CHANNELS, dv, row, inside, STRIDE, HEAD_DIM)
        ds = ds.to(v.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        store_head(dqkv + CHANNELS, dk, row, inside, STRIDE, HEAD_DIM)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        store_head(dqkv, dq, row, inside, STRIDE, HEAD_DIM)
    place = (program * HEADS + head - FIRST_HEAD) * 64 * 64
    tl.store(dbias_sums + place + token[:, None] * 64 + token[None, :], dbias)


# ---- 2. windows of 256 tokens, for some queries: dq ---------------------------------------------
# For a window and head of d = 32 in bfloat16: 98 KB read and written (k and v by each tile of
# queries, three times of four from the cache), 13 MFLOP in three products, 65,536 exponentials.
@triton.jit(do_not_specialize=RUN_TIME)
def queries_256_kernel(
        qkv,                         # as above
        table,                       # (all heads, T)
        lse,                         # (windows, HEADS, 256) float32, from the forward pass
        dout,                        # as above
        dqkv,                        # as above; here the part of q is written
        out,                         # (B, H, W, CHANNELS)
        delta,                       # (windows, HEADS, 256) float32, written for the next two
        H, W, rows, columns, dy, dx, windows, scale,
        CHANNELS: tl.constexpr,
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,       # queries of a program
        BLOCK_N: tl.constexpr):      # keys of a step
    """A program takes BLOCK_M queries of one window and head, and all keys, BLOCK_N at a time.

    As in the forward pass; but lse is known, so that no maximum is wanted. A row of P is never
    complete here, so delta comes from out and dout.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    TABLE: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head, tile, window = place_in_grid(FIRST_HEAD, HEADS, N // BLOCK_M)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    qkv += head * HEAD_DIM
    row, inside = locate(window, query, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
    q = load_head(qkv, row, inside, STRIDE, HEAD_DIM)
    do = load_head(dout + head * HEAD_DIM, row, inside, CHANNELS, HEAD_DIM)
    o = load_head(out + head * HEAD_DIM, row, inside, CHANNELS, HEAD_DIM)
    saved = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * N + query
    row_lse = tl.load(lse + saved)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + saved, row_delta)
    dq = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_row, key_inside = locate(
            window, key, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        k = load_head(qkv + CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
        v = load_head(qkv + 2 * CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s += bias_tile(table + head * TABLE, query[:, None], key[None, :], 1, WINDOW_H, WINDOW_W)
        if SHIFTED:
            s = keep_apart(s, window, query[:, None], key[None, :], rows, columns, dy, dx,
                           WINDOW_H, WINDOW_W)
        p = exp_minus(s, row_lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    store_head(dqkv + head * HEAD_DIM, dq * scale, row, inside, STRIDE, HEAD_DIM)


# ---- 3. windows of 256 tokens, for some keys: dk and dv -----------------------------------------
# For a window and head of d = 32 in bfloat16: 98 KB read and written (q and dout by each tile of
# keys, mostly from the cache), 17 MFLOP in four products; the 65,536 exponentials once more.
@triton.jit(do_not_specialize=RUN_TIME)
def keys_256_kernel(
        qkv,                         # as above
        table,
        lse,
        dout,
        dqkv,                        # here the parts of k and v are written
        delta,                       # (windows, HEADS, 256) float32, from queries_256_kernel
        H, W, rows, columns, dy, dx, windows, scale,
        CHANNELS: tl.constexpr,
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,       # queries of a step
        BLOCK_N: tl.constexpr):      # keys of a program
    """A program takes BLOCK_N keys of one window and head, and all queries, BLOCK_M at a time.

    Its tiles are transposed, a row for each key: so Pᵀ and dSᵀ, the left factors of dv and dk, are
    where the products made them, in registers.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    TABLE: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head, tile, window = place_in_grid(FIRST_HEAD, HEADS, N // BLOCK_N)
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    qkv += head * HEAD_DIM
    dqkv += head * HEAD_DIM
    key_row, key_inside = locate(
        window, key, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
    k = load_head(qkv + CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
    v = load_head(qkv + 2 * CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for start in range(0, N, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        row, inside = locate(window, query, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        q = load_head(qkv, row, inside, STRIDE, HEAD_DIM)
        do = load_head(dout + head * HEAD_DIM, row, inside, CHANNELS, HEAD_DIM)
        saved = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * N + query
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        s += bias_tile(table + head * TABLE, query[None, :], key[:, None], 1, WINDOW_H, WINDOW_W)
        if SHIFTED:
            s = keep_apart(s, window, query[None, :], key[:, None], rows, columns, dy, dx,
                           WINDOW_H, WINDOW_W)
        p = exp_minus(s, tl.load(lse + saved)[None, :])
        dv += tl.dot(p.to(v.dtype), do, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - tl.load(delta + saved)[None, :])
        dk += tl.dot(ds.to(v.dtype), q, input_precision=PRECISION)
    store_head(dqkv + CHANNELS, dk * scale, key_row, key_inside, STRIDE, HEAD_DIM)
    store_head(dqkv + 2 * CHANNELS, dv, key_row, key_inside, STRIDE, HEAD_DIM)


# ---- 4. windows of 256 tokens: the gradient of the bias -----------------------------------------
# For a window and head of d = 32 in bfloat16: 66 KB, each of them read by four tiles (from the
# cache), 8.4 MFLOP in two products and 65,536 exponentials, both done a third time only for this.
@triton.jit(do_not_specialize=RUN_TIME)
def dbias_256_kernel(
        qkv,                         # as above
        table,
        lse,
        dout,
        delta,                       # (windows, HEADS, 256) float32, from queries_256_kernel
        dbias_sums,                  # (programs, HEADS, 256, 256) float32
        H, W, rows, columns, dy, dx, windows, scale,
        programs,                    # how many share the windows, for each head and tile
        CHANNELS: tl.constexpr,
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,       # queries of a tile
        BLOCK_N: tl.constexpr):      # keys of a tile
    """A program takes one head and one tile of scores, and goes from window to window."""
    N: tl.constexpr = WINDOW_H * WINDOW_W
    TABLE: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    TILES: tl.constexpr = (N // BLOCK_M) * (N // BLOCK_N)
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head, tile, program = place_in_grid(FIRST_HEAD, HEADS, TILES)
    query = tile // (N // BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    qkv += head * HEAD_DIM
    dout += head * HEAD_DIM
    bias = bias_tile(table + head * TABLE, query[:, None], key[None, :], 1, WINDOW_H, WINDOW_W)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in range(program, windows, programs):
        row, inside = locate(window, query, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        key_row, key_inside = locate(
            window, key, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        q = load_head(qkv, row, inside, STRIDE, HEAD_DIM)
        do = load_head(dout, row, inside, CHANNELS, HEAD_DIM)
        k = load_head(qkv + CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
        v = load_head(qkv + 2 * CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED:
            s = keep_apart(s, window, query[:, None], key[None, :], rows, columns, dy, dx,
                           WINDOW_H, WINDOW_W)
        saved = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * N + query
        p = exp_minus(s, tl.load(lse + saved)[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dbias += p * (dp - tl.load(delta + saved)[:, None])
    place = (program * HEADS + head - FIRST_HEAD) * N * N
    tl.store(dbias_sums + place + query[:, None] * N + key[None, :], dbias)


# ---- 5. from the (n, n) bias to its table -------------------------------------------------------
# For a head: n² numbers of dbias are read once and added up, 16 KB for n = 64, 262 KB for n = 256;
# written are 225 and 945 numbers. That is little beside the windows.
@triton.jit
def dtable_kernel(
        dbias,                       # (HEADS, n, n) float32, the sum over all windows
        dtable,                      # (T, ALL_HEADS), any dtype: the columns of HEADS are written
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        ALL_HEADS: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        ENTRIES: tl.constexpr):      # of the table, for a program
    """A program takes one head and ENTRIES entries, and sums for each the pairs that read it.

    For an entry (Δy, Δx) and a key at (y, x), the query is at (y + Δy, x + Δx), if there is one.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    PITCH: tl.constexpr = 2 * WINDOW_W - 1
    head, _, block = place_in_grid(0, HEADS, 1)
    entry = block * ENTRIES + tl.arange(0, ENTRIES)
    key = tl.arange(0, N)
    y = (entry // PITCH - (WINDOW_H - 1))[:, None] + (key // WINDOW_W)[None, :]
    x = (entry % PITCH - (WINDOW_W - 1))[:, None] + (key % WINDOW_W)[None, :]
    exists = (y >= 0) & (y < WINDOW_H) & (x >= 0) & (x < WINDOW_W)
    pair = (y * WINDOW_W + x) * N + key[None, :]
    values = tl.load(dbias + head * N * N + pair, mask=exists, other=0.0)
    total = tl.sum(values, 1).to(dtable.dtype.element_ty)
    in_table = entry < (2 * WINDOW_H - 1) * PITCH
    tl.store(dtable + entry * ALL_HEADS + FIRST_HEAD + head, total, mask=in_table)


# ---- launches -----------------------------------------------------------------------------------
def backward(
        qkv: Tensor, bias_table: Tensor, out: Tensor, lse: Tensor, dout: Tensor, heads: int,
        window, shift, scale: float, crossed: bool, variant: str) -> tuple[Tensor, Tensor]:
    """Launches the backward kernels of each part; lse (parts, windows·heads·n) from `forward`.

    Returns dqkv, shape and dtype as qkv, and dtable, as bias_table.
    """
    if qkv.numel() == 0:
        return torch.empty_like(qkv), torch.zeros_like(bias_table)
    B, H, W, width = qkv.shape
    d = width // 3 // heads
    head_dim = head_width(d)
    tokens = window[0] * window[1]
    numbers = arithmetic(qkv.dtype, "matmul")
    tiles_of = partial(tiles_for, numbers=numbers, device=qkv.device, variant=variant)
    table = laid_out(bias_table, tokens)
    work = readable(qkv, 3 * heads, head_dim)
    out = readable(out, heads, head_dim)
    dout = readable(dout, heads, head_dim)
    dqkv = torch.empty_like(work)
    dtable = bias_table.new_empty(bias_table.shape)
    with torch.cuda.device_of(qkv):
        for i, part in enumerate(parts_of((B, H, W), heads, window, shift, crossed)):
            arguments = part.run_time(H, W, scale) | part.compile_time(heads, head_dim)
            tensors = (work, table, lse[i], dout)
            if tokens == 64:
                dbias = launch_64(part, tiles_of, (*tensors, dqkv), arguments)
            else:
                dbias = launch_256(part, tiles_of, tensors, dqkv, out, arguments)
            launch_dtable(part, dbias, dtable)
    return cut_groups(dqkv, 3 * heads, d).to(qkv.dtype), dtable


def launch_64(part: Part, tiles_of: Callable, tensors: tuple, arguments: dict) -> Tensor:
    """Launches `backward_64_kernel`; tensors are its first five. Returns dbias (heads, 64, 64)."""
    lse = tensors[2]
    tiles = tiles_of("backward_64")
    programs = programs_for(part.windows, part.heads, tiles, lse.device)
    dbias_sums = lse.new_empty(programs, part.heads, 64, 64)
    grid = (part.heads * programs,)
    backward_64_kernel[grid](
        *tensors, dbias_sums, programs=programs, **arguments, **tiles.constants, **options(tiles))
    return dbias_sums.sum(0)


def launch_256(
        part: Part, tiles_of: Callable, tensors: tuple, dqkv: Tensor, out: Tensor,
        arguments: dict) -> Tensor:
    """Launches the three kernels for 256 tokens; tensors are the first four of each.

    Returns dbias (heads, 256, 256).
    """
    lse = tensors[2]
    delta = torch.empty_like(lse)
    tiles = tiles_of("queries_256")
    grid = (part.heads * (256 // tiles.blocks["BLOCK_M"]) * part.windows,)
    queries_256_kernel[grid](
        *tensors, dqkv, out, delta, **arguments, **tiles.constants, **options(tiles))

    tiles = tiles_of("keys_256")
    grid = (part.heads * (256 // tiles.blocks["BLOCK_N"]) * part.windows,)
    keys_256_kernel[grid](*tensors, dqkv, delta, **arguments, **tiles.constants, **options(tiles))

    tiles = tiles_of("dbias_256")
    blocks = (256 // tiles.blocks["BLOCK_M"]) * (256 // tiles.blocks["BLOCK_N"])
    programs = programs_for(part.windows, part.heads * blocks, tiles, lse.device)
    dbias_sums = lse.new_empty(programs, part.heads, 256, 256)
    grid = (part.heads * blocks * programs,)
    dbias_256_kernel[grid](
        *tensors, delta, dbias_sums, programs=programs, **arguments, **tiles.constants,
        **options(tiles))
    return dbias_sums.sum(0)


def launch_dtable(part: Part, dbias: Tensor, dtable: Tensor) -> None:
    """Launches `dtable_kernel`, which fills the columns of this part's heads."""
    entries, all_heads = dtable.shape
    h, w = part.window
    grid = (part.heads * triton.cdiv(entries, ENTRIES),)
    dtable_kernel[grid](
        dbias, dtable, FIRST_HEAD=part.first_head, HEADS=part.heads, ALL_HEADS=all_heads,
        WINDOW_H=h, WINDOW_W=w, ENTRIES=ENTRIES)
