"""Window attention in Triton, backward. Read triton_attention.py first.

With dout the gradient of out, and P computed again from q, k and lse (softmax P = exp(S − lse)):

    dv = Pᵀ dout                 dP = dout vᵀ                dS = P · (dP − delta)
    dq = scale · dS k            dk = scale · dSᵀ q          dbias = Σ over windows of dS

delta is one number for each query: Σ over keys of P·dP, the same as Σ over channels of out·dout.
The gradient of a table entry is the sum of dbias over the pairs (query, key) that read it.

1. `backward_64_kernel`. Windows of 64 tokens: one tile again. dbias stays in the registers of the
   program over all of its windows.
2. `backward_256_kernel`. Windows of 256 tokens: all queries at once, the keys in steps.
3. `dbias_256_kernel`. 256×256 numbers of dbias fit in no program's registers. Each program of this
   kernel owns one tile of dbias, and goes over the windows for that tile alone.
4. `dtable_kernel`. From dbias (n, n) to the table.

A sum over windows is split among programs; each writes its own (dbias_sums), and PyTorch adds them
up in a fixed order. Nothing is added atomically: on one kind of GPU the same input gives the same
bits. (How many programs share a sum depends on the number of the GPU's multiprocessors.)

Of the padding, queries add nothing, since their dout is read as 0. Keys take part: nobody needs
their dk and dv, but their dS counts in dbias.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_attention import (
    RUN_TIME,
    Part,
    Tiles,
    arithmetic,
    at_edge,
    bias_tile,
    computable,
    exp_minus,
    laid_out,
    load_head,
    locate,
    options,
    parts_of,
    programs_for,
    store_head,
)


# ---- 1. windows of 64 tokens: one tile ----------------------------------------------------------
# For a window and head of d = 30 in bfloat16: 27 KB read and written, 1.2 MFLOP in five products,
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
        BLOCK_D: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        PRECISION: tl.constexpr):
    """A program takes one head and goes from window to window, as in the forward pass.

    The mask is applied in every window, where regions are all equal it changes nothing: asking
    whether a window is at an edge would cost registers, and they would spill.
    """
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head = FIRST_HEAD + tl.program_id(0) % HEADS
    program = tl.program_id(0) // HEADS
    token = tl.arange(0, 64)
    bias = bias_tile(table + head, token, token, CHANNELS // HEAD_DIM, WINDOW_H, WINDOW_W)
    dbias = tl.zeros([64, 64], tl.float32)
    qkv += head * HEAD_DIM
    dqkv += head * HEAD_DIM
    dout += head * HEAD_DIM
    for window in range(program, windows, programs):
        row, inside, region = locate(
            window, token, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        q = load_head(qkv, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        do = load_head(dout, row, inside, CHANNELS, HEAD_DIM, BLOCK_D)
        saved = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * 64 + token
        row_lse = tl.load(lse + saved)
        k = load_head(qkv + CHANNELS, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        v = load_head(qkv + 2 * CHANNELS, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED:
            s = tl.where(region[:, None] == region[None, :], s, s - 100.0)
        p = exp_minus(s, row_lse)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        dbias += ds
        dv = tl.dot(tl.trans(p.to(v.dtype)), do, input_precision=PRECISION)
        store_head(dqkv + 2 * CHANNELS, dv, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        ds = ds.to(v.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        store_head(dqkv + CHANNELS, dk, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        store_head(dqkv, dq, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
    place = (program * HEADS + head - FIRST_HEAD) * 64 * 64
    tl.store(dbias_sums + place + token[:, None] * 64 + token[None, :], dbias)


# ---- 2. windows of 256 tokens: dq, dk, dv -------------------------------------------------------
# For a window and head of d = 30 in bfloat16: 123 KB read and written, 20 MFLOP in five products,
# 65,536 exponentials. Here, too, the mask is applied in every window, for want of registers.
@triton.jit(do_not_specialize=RUN_TIME)
def backward_256_kernel(
        qkv,                         # as above
        table,                       # (all heads, T)
        lse,                         # (windows, HEADS, 256) float32, from the forward pass
        dout,                        # as above
        dqkv,
        out,                         # (B, H, W, CHANNELS)
        delta,                       # (windows, HEADS, 256) float32, written for dbias_256_kernel
        H, W, rows, columns, dy, dx, windows, scale,
        CHANNELS: tl.constexpr,
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_N: tl.constexpr):      # keys of a step
    """A program takes one window and head, all queries, and the keys BLOCK_N at a time.

    As all queries are there, dk and dv of a step are complete at once; dq grows from step to step.
    A row of P is never complete, so delta comes from out and dout.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    TABLE: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head = FIRST_HEAD + tl.program_id(0) % HEADS
    window = tl.program_id(0) // HEADS
    query = tl.arange(0, N)
    qkv += head * HEAD_DIM
    dqkv += head * HEAD_DIM
    row, inside, region = locate(window, query, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
    q = load_head(qkv, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
    do = load_head(dout + head * HEAD_DIM, row, inside, CHANNELS, HEAD_DIM, BLOCK_D)
    o = load_head(out + head * HEAD_DIM, row, inside, CHANNELS, HEAD_DIM, BLOCK_D)
    saved = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * N + query
    row_lse = tl.load(lse + saved)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + saved, row_delta)
    dq = tl.zeros([N, BLOCK_D], tl.float32)
    for start in range(0, N, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_row, key_inside, key_region = locate(
            window, key, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        k = load_head(qkv + CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        v = load_head(qkv + 2 * CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        bias = bias_tile(table + head * TABLE, query, key, 1, WINDOW_H, WINDOW_W)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED:
            s = tl.where(region[:, None] == key_region[None, :], s, s - 100.0)
        p = exp_minus(s, row_lse)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        dv = tl.dot(tl.trans(p.to(v.dtype)), do, input_precision=PRECISION)
        store_head(dqkv + 2 * CHANNELS, dv, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        ds = ds.to(v.dtype)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        store_head(dqkv + CHANNELS, dk, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        dq += tl.dot(ds, k, input_precision=PRECISION)
    store_head(dqkv, dq * scale, row, inside, STRIDE, HEAD_DIM, BLOCK_D)


# ---- 3. windows of 256 tokens: the gradient of the bias -----------------------------------------
# For a window and head of d = 30 in bfloat16: 61 KB, each of them read by four tiles (from the
# cache), 7.9 MFLOP in two products and 65,536 exponentials, both done a second time only for this.
@triton.jit(do_not_specialize=RUN_TIME)
def dbias_256_kernel(
        qkv,                         # as above
        table,
        lse,
        dout,
        delta,                       # (windows, HEADS, 256) float32, from backward_256_kernel
        dbias_sums,                  # (programs, HEADS, 256, 256) float32
        H, W, rows, columns, dy, dx, windows, scale,
        programs,                    # how many share the windows, for each head and tile
        CHANNELS: tl.constexpr,
        FIRST_HEAD: tl.constexpr,
        HEADS: tl.constexpr,
        HEAD_DIM: tl.constexpr,
        BLOCK_D: tl.constexpr,
        WINDOW_H: tl.constexpr, WINDOW_W: tl.constexpr,
        SHIFTED: tl.constexpr,
        PRECISION: tl.constexpr,
        BLOCK_M: tl.constexpr,       # queries of a tile
        BLOCK_N: tl.constexpr):      # keys of a tile
    """A program takes one head and one tile of scores, and goes from window to window.

    Here there are registers enough to ask whether a window is at an edge.
    """
    N: tl.constexpr = WINDOW_H * WINDOW_W
    TABLE: tl.constexpr = (2 * WINDOW_H - 1) * (2 * WINDOW_W - 1)
    TILES: tl.constexpr = (N // BLOCK_M) * (N // BLOCK_N)
    STRIDE: tl.constexpr = 3 * CHANNELS                          # from token to token in qkv
    head = FIRST_HEAD + tl.program_id(0) % HEADS
    tile = tl.program_id(0) // HEADS % TILES
    program = tl.program_id(0) // (HEADS * TILES)
    query = tile // (N // BLOCK_N) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = tile % (N // BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    qkv += head * HEAD_DIM
    dout += head * HEAD_DIM
    bias = bias_tile(table + head * TABLE, query, key, 1, WINDOW_H, WINDOW_W)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for window in range(program, windows, programs):
        row, inside, region = locate(
            window, query, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        key_row, key_inside, key_region = locate(
            window, key, H, W, rows, columns, dy, dx, WINDOW_H, WINDOW_W)
        q = load_head(qkv, row, inside, STRIDE, HEAD_DIM, BLOCK_D)
        do = load_head(dout, row, inside, CHANNELS, HEAD_DIM, BLOCK_D)
        k = load_head(qkv + CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        v = load_head(qkv + 2 * CHANNELS, key_row, key_inside, STRIDE, HEAD_DIM, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
        if SHIFTED and at_edge(window, rows, columns):
            s = tl.where(region[:, None] == key_region[None, :], s, s - 100.0)
        saved = (window * HEADS + head - FIRST_HEAD).to(tl.int64) * N + query
        p = exp_minus(s, tl.load(lse + saved))
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        dbias += p * (dp - tl.load(delta + saved)[:, None])
    place = (program * HEADS + head - FIRST_HEAD) * N * N
    tl.store(dbias_sums + place + query[:, None] * N + key[None, :], dbias)


# ---- 4. from the (n, n) bias to its table -------------------------------------------------------
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
    head = tl.program_id(0) % HEADS
    entry = tl.program_id(0) // HEADS * ENTRIES + tl.arange(0, ENTRIES)
    key = tl.arange(0, N)
    y = (entry // PITCH - (WINDOW_H - 1))[:, None] + (key // WINDOW_W)[None, :]
    x = (entry % PITCH - (WINDOW_W - 1))[:, None] + (key % WINDOW_W)[None, :]
    exists = (y >= 0) & (y < WINDOW_H) & (x >= 0) & (x < WINDOW_W)
    pair = (y * WINDOW_W + x) * N + key[None, :]
    values = tl.load(dbias + head * N * N + pair, mask=exists, other=0.0)
    total = tl.sum(values, 1).to(dtable.dtype.element_ty)
    in_table = entry < (2 * WINDOW_H - 1) * PITCH
    tl.store(dtable + entry * ALL_HEADS + FIRST_HEAD + head, total, mask=in_table)


# ---- tile sizes ---------------------------------------------------------------------------------
# Chosen as in triton_attention.py: no spilled register (with one exception, named below), then as
# many programs at once as possible. `registers` is the most over head widths and window shapes.

# P, dP (then dS), the bias and dbias are 32 numbers a thread each on 4 warps: up to 248 registers
# in bfloat16. float32 spills there: TensorFloat-32 needs 8 warps, full float32 needs 16.
BACKWARD_64 = {
    "bf16": Tiles({}, warps=4, stages=2, registers=248),
    "tf32": Tiles({}, warps=8, stages=1, registers=255),
    "ieee": Tiles({}, warps=16, stages=1, registers=96),
}

# 256 queries and 16 keys on 16 warps: 8 scores a thread. 32 keys spill. The exception: in full
# float32, windows of 32×8 spill 40 bytes a thread even so.
BACKWARD_256 = {
    "bf16": Tiles(dict(BLOCK_N=16), warps=16, stages=1, registers=104),
    "tf32": Tiles(dict(BLOCK_N=16), warps=16, stages=1, registers=104),
    "ieee": Tiles(dict(BLOCK_N=16), warps=16, stages=1, registers=128),
}

# The scores, the bias and dbias are 64×64 numbers each. More warps a program mean fewer registers a
# thread, and so more warps at once on a multiprocessor. TensorFloat-32: 8 a program, 16 at once (4
# a program: 12 at once). Full float32: 16 a program, 16 at once (4 a program: 8 at once).
DBIAS_256 = {
    "bf16": Tiles(dict(BLOCK_M=64, BLOCK_N=64), warps=4, stages=1, registers=168),
    "tf32": Tiles(dict(BLOCK_M=64, BLOCK_N=64), warps=8, stages=1, registers=128),
    "ieee": Tiles(dict(BLOCK_M=64, BLOCK_N=64), warps=16, stages=1, registers=88),
}
ENTRIES = 16                         # of the table, for a program of dtable_kernel: 16 × n numbers


# ---- launches -----------------------------------------------------------------------------------
def backward(
        qkv: Tensor, bias_table: Tensor, out: Tensor, lse: Tensor, dout: Tensor, heads: int,
        window, shift, scale: float, crossed: bool) -> tuple[Tensor, Tensor]:
    """Launches the backward kernels of each part; lse (parts, windows·heads·n) from `forward`.

    Returns dqkv, shape and dtype as qkv, and dtable, as bias_table.
    """
    if qkv.numel() == 0:
        return torch.empty_like(qkv), torch.zeros_like(bias_table)
    B, H, W, width = qkv.shape
    tokens = window[0] * window[1]
    numbers = arithmetic(qkv.dtype)
    table = laid_out(bias_table, tokens)
    work = computable(qkv).contiguous()
    out = computable(out).contiguous()
    dout = computable(dout).contiguous()
    dqkv = torch.empty_like(work)
    dtable = bias_table.new_empty(bias_table.shape)
    with torch.cuda.device_of(qkv):
        for i, part in enumerate(parts_of((B, H, W), heads, window, shift, crossed)):
            fixed = part.compile_time(width // 3, heads, numbers)
            arguments = part.run_time(H, W, scale) | fixed
            tensors = (work, table, lse[i], dout)
            if tokens == 64:
                dbias = launch_64(part, numbers, (*tensors, dqkv), arguments)
            else:
                dbias = launch_256(part, numbers, tensors, dqkv, out, arguments)
            launch_dtable(part, dbias, dtable)
    return dqkv.to(qkv.dtype), dtable


def launch_64(part: Part, numbers: str, tensors: tuple, arguments: dict) -> Tensor:
    """Launches `backward_64_kernel`; tensors are its first five. Returns dbias (heads, 64, 64)."""
    tiles = BACKWARD_64[numbers]
    lse = tensors[2]
    programs = programs_for(part.windows, part.heads, tiles, lse.device)
    dbias_sums = lse.new_empty(programs, part.heads, 64, 64)
    grid = (part.heads * programs,)
    backward_64_kernel[grid](
        *tensors, dbias_sums, programs=programs, **arguments, **options(tiles))
    return dbias_sums.sum(0)


def launch_256(
        part: Part, numbers: str, tensors: tuple, dqkv: Tensor, out: Tensor,
        arguments: dict) -> Tensor:
    """Launches both kernels for 256 tokens; tensors are the first four of either.

    Returns dbias (heads, 256, 256).
    """
    tiles = BACKWARD_256[numbers]
    lse = tensors[2]
    delta = torch.empty_like(lse)
    grid = (part.heads * part.windows,)
    backward_256_kernel[grid](
        *tensors, dqkv, out, delta, **arguments, **tiles.blocks, **options(tiles))

    tiles = DBIAS_256[numbers]
    blocks = (256 // tiles.blocks["BLOCK_M"]) * (256 // tiles.blocks["BLOCK_N"])
    programs = programs_for(part.windows, part.heads * blocks, tiles, lse.device)
    dbias_sums = lse.new_empty(programs, part.heads, 256, 256)
    grid = (part.heads * blocks * programs,)
    dbias_256_kernel[grid](
        *tensors, delta, dbias_sums, programs=programs, **arguments, **tiles.blocks,
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
