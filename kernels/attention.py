"""Window attention with shift, position bias and region mask, as SwinIR and DAT use it.

Swin Transformer, arXiv 2103.14030, Section 3.2. The map of tokens is cut into windows. Within each
window and for each head, with n tokens in a window and d channels in a head:

    S = scale · q kᵀ + bias − 100 · [regions differ]             (n, n); […]: 1 if true, else 0
    out = softmax(S) v                                           (n, d), softmax along the keys

The bias depends only on where the key lies as seen from the query. It is read from a table with one
entry for every difference (Δy, Δx) = place of the query − place of the key.

A worked example: a map of 4×4 tokens, windows of 2×2, shift 1
--------------------------------------------------------------
Tokens of different windows never meet in one layer, so every other layer shifts the windows: the
map is rolled up and left by the shift, cut into windows, and rolled back at the end. Rolling brings
the top rows to the bottom and the left columns to the right. The letters say which tokens are
neighbours in the picture (a "region") within each window:

    the map              rolled by 1, cut        regions
     0  1  2  3            5  6 |  7  4           a  a | a  b
     4  5  6  7            9 10 | 11  8           a  a | a  b
     8  9 10 11           ------+------          ------+-----
    12 13 14 15           13 14 | 15 12           a  a | a  b
                           1  2 |  3  0           c  c | c  d

    window   tokens at the places 0 1 2 3   the mask lets these see each other
    0             5   6   9  10             all four
    1             7   4  11   8             7 and 11;  4 and 8
    2            13  14   1   2             13 and 14;  1 and 2
    3            15  12   3   0             nobody but themselves

Everyone else gets −100 added to the score, and e^−100 is as good as 0 (but see APART). Windows in
the last row and the last column need the mask, no others. In window 1 the query 4 (place 1, at row
0, column 1) and the key 8 (place 3, at row 1, column 1) differ by (Δy, Δx) = (−1, 0): table entry
(Δy + 1)·3 + (Δx + 1) = 1. A 2×2 window has 3·3 = 9 entries per head, an 8×8 window 225.

What the fused kernels save: memory traffic
-------------------------------------------
Everything above is arithmetic on a few thousand scores that fit on the chip. Fused, only q, k, v
are read (3A numbers a token, A channels in all heads) and out is written (A): 4A. Written in
PyTorch, each operation reads its inputs from memory and writes its result there. Numbers read and
written per token for SwinIR, the authors' way (bench/baselines.py); A = 180 in 6 heads, windows of
8×8 = 64 tokens, so s = 6·64 = 384 scores a token:

    roll there, and back             2·3A + 2·A                     1,440
    cut into windows, into heads;    2·3A + 2·3A
      join the heads, the windows      + 2·A + 2·A                  2,880
    scale q                          2·A                              360
    q kᵀ, and P v                    (A + A + s) + (s + A + A)      1,488
    add the bias, add the mask       2·s + (2·s + 64)               1,600
    softmax                          2·s                              768
    in all                                                          8,536, fused 720

On a picture of 320×184 in bfloat16 that is 1,005 MB for one layer, fused 85 MB. The backward pass
takes 10,273 numbers a token (1,210 MB), fused 7A = 1,260 (148 MB, without the small sums and the
bias): the kernel reads q, k, v and the gradient of out, writes those of q, k, v, and computes the
scores again rather than reading them. (Those for 256 tokens also read out, and compute the scores
three times: for dq, for dk and dv, for the bias.)

In this file: `reference`, the text above in PyTorch, line by line; `torch_path`, the same faster;
`window_attention`, which the networks call; and the Triton kernels as a PyTorch operation with a
gradient. Not here: the Linear layers before and after (token by token, so the map may be rolled
before or after them), and the network of DAT's bias table. Read triton_attention.py next.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import choice, switch, triton_tiles

Size = tuple[int, int]               # rows, columns


# ---- what all ways to compute it share ----------------------------------------------------------
def orientations(qkv: Tensor, bias_table: Tensor, heads: int, window, shift, crossed: bool) -> list:
    """Splits the heads by the shape of their windows: one part, or two for a crossed attention.

    A part is (q, k, v of its heads (B, H, W, 3, heads, d), its table, its window, its shift).
    """
    parts = qkv.unflatten(3, (3, heads, -1))                          # (B, H, W, 3, heads, d)
    if not crossed:
        return [(parts, bias_table, window, shift)]
    half = heads // 2
    upright = (parts[..., :half, :], bias_table[:, :half], window, shift)
    turned = (parts[..., half:, :], bias_table[:, half:], window[::-1], shift[::-1])
    return [upright, turned]


def padding(size: Size, window: Size, crossed: bool) -> Size:
    """How many rows and columns a map lacks to be made of whole windows.

    A crossed attention pads to multiples of the longer side, so that both orientations fit.
    """
    h, w = window
    if crossed:
        h = w = max(window)
    return -size[0] % h, -size[1] % w


@switch.constant
def offsets(h: int, w: int, device: torch.device) -> Tensor:
    """(n, n) entry of the bias table for every query and key of a window of h×w = n tokens."""
    place = torch.arange(h * w, device=device)
    y = place // w
    x = place % w
    from_y = y[:, None] - y + h - 1                                   # Δy + h − 1, 0 or more
    from_x = x[:, None] - x + w - 1
    return from_y * (2 * w - 1) + from_x


# ---- reference: slow, for any dtype -------------------------------------------------------------
def reference(
        qkv: Tensor,
        bias_table: Tensor,
        *,
        heads: int,
        window: Size,
        shift: Size = (0, 0),
        scale: float,
        crossed: bool = False) -> Tensor:
    """Computes `window_attention` as the papers describe it, one step after the other."""
    B, H, W, _ = qkv.shape
    down, right = padding((H, W), window, crossed)
    results = []
    parts = orientations(qkv, bias_table, heads, window, shift, crossed)
    for part, table, (h, w), (dy, dx) in parts:
        x = F.pad(part.flatten(3), (0, 0, 0, right, 0, down))         # (B, H', W', 3·heads·d)
        x = x.roll((-dy, -dx), (1, 2))
        rows = x.shape[1] // h
        columns = x.shape[2] // w
        x = x.view(B, rows, h, columns, w, -1).transpose(2, 3)        # (B, rows, columns, h, w, ·)
        x = x.reshape(-1, h * w, 3, part.shape[4], part.shape[5])
        q, k, v = x.permute(2, 0, 3, 1, 4)                            # (windows, heads, n, d) each
        bias = table[offsets(h, w, qkv.device)].permute(2, 0, 1)      # (heads, n, n)
        scores = q @ k.transpose(2, 3) * scale + bias
        if dy:
            apart = regions_differ(rows, columns, h, w, dy, dx).to(qkv.device)
            mask = -100.0 * apart.to(scores.dtype)                    # (windows of a map, n, n)
            scores = scores + mask.repeat(B, 1, 1)[:, None]
        out = (scores.softmax(-1) @ v).transpose(1, 2)                # (windows, n, heads, d)
        out = out.reshape(B, rows, columns, h, w, -1).transpose(2, 3)
        out = out.reshape(B, rows * h, columns * w, -1)               # (B, H', W', heads·d)
        results.append(out.roll((dy, dx), (1, 2))[:, :H, :W])
    return torch.cat(results, 3)


def regions_differ(rows: int, columns: int, h: int, w: int, dy: int, dx: int) -> Tensor:
    """(windows of a map, n, n), true where two tokens of a window are no neighbours in the picture.

    Regions are numbered as in Swin. Three bands of rows: 0 above the last row of windows, 1 in it,
    2 in its rows that were rolled there from the top. Three bands of columns likewise, times 3.
    """
    region = torch.zeros(rows * h, columns * w)
    region[-h:] += 1
    region[-dy:] += 1
    region[:, -w:] += 3
    region[:, -dx:] += 3
    region = region.view(rows, h, columns, w).transpose(1, 2).reshape(-1, 1, h * w)
    return region != region.transpose(1, 2)


# ---- PyTorch path: any device, differentiable ---------------------------------------------------
def torch_path(
        qkv: Tensor,
        bias_table: Tensor,
        *,
        heads: int,
        window: Size,
        shift: Size = (0, 0),
        scale: float,
        crossed: bool = False,
        fused: bool | None = None) -> Tensor:
    """Computes the same as `reference`, faster: no mask for each window, and a fused softmax.

    fused: whether products and softmax are PyTorch's one operation for them; None: where it pays
    as a rule, and gives all that is asked for.
    """
    _, H, W, _ = qkv.shape
    down, right = padding((H, W), window, crossed)
    results = []
    parts = orientations(qkv, bias_table, heads, window, shift, crossed)
    for part, table, (h, w), (dy, dx) in parts:
        x = part.flatten(3)                                           # (B, H, W, 3·heads·d)
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        # table[offsets] would do, but its backward pass adds in any order where threads share it.
        entry = offsets(h, w, qkv.device)                             # (n, n)
        bias = table.index_select(0, entry.flatten()).unflatten(0, entry.shape)
        bias = bias.permute(2, 0, 1).contiguous().to(qkv.dtype)       # (heads, n, n)
        if dy:
            x = attend_shifted(x, bias, h, w, dy, dx, scale, fused)
        else:
            x = attend(x, bias, h, w, scale, fused)
        results.append(x[:, :H, :W])
    return torch.cat(results, 3) if crossed else results[0]


def attend_shifted(x: Tensor, bias: Tensor, h: int, w: int, dy: int, dx: int, scale: float,
                   fused: bool | None) -> Tensor:
    """Attention on the rolled map: (B, rows·h, columns·w, 3·heads·d) -> (…, heads·d).

    The map falls into four rectangles: most of it without a mask, the last column of windows, the
    last row, and the window in the corner. The windows of a rectangle share one (heads, n, n) bias,
    mask included, whatever the size of the map.
    """
    below, beyond = masks(h, w, dy, dx, x.device)                     # (n, n) each
    below = below.to(bias)
    beyond = beyond.to(bias)
    bias_column = bias + beyond
    bias_row = bias + below
    bias_corner = bias + torch.minimum(below, beyond)
    x = x.roll((-dy, -dx), (1, 2))
    upper, lower = x.split((x.shape[1] - h, h), 1)
    middle, column = upper.split((x.shape[2] - w, w), 2)
    row, corner = lower.split((x.shape[2] - w, w), 2)
    middle = attend(middle, bias, h, w, scale, fused)
    column = attend(column, bias_column, h, w, scale, fused)
    upper = torch.cat([middle, column], 2)
    row = attend(row, bias_row, h, w, scale, fused)
    corner = attend(corner, bias_corner, h, w, scale, fused)
    lower = torch.cat([row, corner], 2)
    return torch.cat([upper, lower], 1).roll((dy, dx), (1, 2))


APART = -10_000.0        # the papers' −100 leaves "denormal" weights, each of them slow on a CPU


@switch.constant
def masks(h: int, w: int, dy: int, dx: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The (n, n) masks, 0 or APART, of a window in the last row and of one in the last column.

    The last dy rows of the one and dx columns of the other come from the other end of the map. In
    the corner two tokens are apart if either mask says so.
    """
    place = torch.arange(h * w, device=device)
    y = (place // w + dy) // h       # 1 there, else 0: torch.compile cannot compare truth values
    x = (place % w + dx) // w
    return APART * (y[:, None] - y).abs(), APART * (x[:, None] - x).abs()


def attend(x: Tensor, bias: Tensor, h: int, w: int, scale: float, fused: bool | None) -> Tensor:
    """Attention in windows that share a bias.

    (B, rows·h, columns·w, 3·heads·d) and (heads, n, n) -> (B, rows·h, columns·w, heads·d).
    """
    B = x.shape[0]
    rows = x.shape[1] // h
    columns = x.shape[2] // w
    width = x.shape[3] // 3                                           # heads·d
    x = x.unflatten(2, (columns, w)).unflatten(1, (rows, h))
    x = x.transpose(2, 3)                                             # (B, rows, columns, h, w, ·)
    x = x.reshape(B * rows * columns, h * w, 3, len(bias), width // len(bias))
    q, k, v = x.permute(2, 0, 3, 1, 4)                                # (windows, heads, n, d) each
    if fused is None:
        # On the CPU the fused operation gives no gradient of the bias, and on the meta device,
        # where MAdds are counted, its products would be counted otherwise.
        fused = not (bias.requires_grad or x.is_meta)
    if fused:
        x = fused_attention(q, k, v, bias, scale)
    else:
        x = ((q * scale) @ k.transpose(2, 3) + bias).softmax(-1) @ v
    x = x.transpose(1, 2).reshape(B, rows, columns, h, w, width).transpose(2, 3)
    return x.reshape(B, rows * h, columns * w, width)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """(windows, heads, n, d) three times and (heads, n, n) -> (windows, heads, n, d).

    PyTorch's fused attention on GPUs takes heads of a multiple of 8 channels; others it would
    compute one step after the other. So there they are padded with zeros, which changes nothing.
    """
    d = q.shape[3]
    if q.is_cuda and len(q) == 0:    # no windows: PyTorch returns None there
        return q
    if q.is_cuda:
        q, k, v = (F.pad(x, (0, -d % 8)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias[None], scale=scale)[..., :d]


# ---- what the networks call ---------------------------------------------------------------------
def window_attention(
        qkv: Tensor,
        bias_table: Tensor,
        *,
        heads: int,
        window: Size,
        shift: Size = (0, 0),
        scale: float,
        crossed: bool = False) -> Tensor:
    """Attention of the tokens within each window; see the head of this file.

    qkv: (B, H, W, 3·A), q then k then v, in each head after head, A = heads·d. It is the map before
        rolling. A map that is not made of whole windows gets rows and columns of zeros below and on
        the right; these take part as keys and values (q kᵀ = 0, so only the bias counts).
    bias_table: ((2h−1)·(2w−1), heads) for windows (h, w), see `offsets`.
    shift: (y, x), both 0 or both within 1..h−1 and 1..w−1.
    scale: of q kᵀ. Not computed from d: a head that lost channels keeps the scale it had.
    crossed: the second half of the heads has window and shift turned by 90 degrees (DAT).
    Returns (B, H, W, A).

    The Triton kernels take windows of 64 or 256 tokens and heads of at most 32 channels in bfloat16
    or float32, where they are the fastest; everything else goes the PyTorch path. Raises ValueError
    for shapes that do not fit each other and for a dtype other than bfloat16, float32, float64.
    """
    check(qkv, bias_table, heads, window, shift, crossed)
    settings = dict(heads=heads, window=window, shift=shift, scale=scale, crossed=crossed)
    if not switch.runs_triton(qkv):
        return torch_path(qkv, bias_table, **settings)
    qkv, = switch.like_autocast(qkv)
    if not kernels_take(qkv, heads, window):
        return torch_path(qkv, bias_table, **settings)
    B, H, W, width = qkv.shape
    kind = (f"{heads} heads of {width // 3 // heads}, window {window[0]}x{window[1]}, "
            f"{'shifted' if shift[0] else 'plain'}, {'crossed, ' if crossed else ''}"
            f"{switch.NUMBERS[qkv.dtype]}, 2^{choice.bucket(B * H * W)} tokens")
    tensors = (qkv, bias_table)
    compiled = KERNELS[window[0] * window[1]][:None if choice.trains(tensors) else 1]
    ways = triton_tiles.ways(triton_path, compiled, qkv, "matmul")
    return choice.call(NAME, kind, ways | TORCH_WAYS, tensors, settings)


def triton_path(qkv: Tensor, bias_table: Tensor, *, heads: int, window: Size, shift: Size,
                scale: float, crossed: bool, variant: str) -> Tensor:
    """`window_attention` by the Triton kernels; variant: one of triton_tiles.VARIANTS."""
    save = choice.trains((qkv, bias_table))
    return window_attention_op(
        qkv, bias_table, heads, list(window), list(shift), scale, crossed, variant, save)[0]


NAME = "window_attention"
KERNELS = {                          # by the tokens of a window; the first one is for inference
    64: ("forward_64", "backward_64"),
    256: ("forward_256", "queries_256", "keys_256", "dbias_256"),
}
TORCH_WAYS = {                       # of these and of the Triton kernels the fastest runs
    "eager": partial(torch_path, fused=False),
    "fused": partial(torch_path, fused=True),
}


def check(qkv: Tensor, bias_table: Tensor, heads: int, window, shift, crossed: bool) -> None:
    """Raises ValueError with a sentence that names what is wrong and its value."""
    h, w = window
    name = "window_attention:"
    if qkv.ndim != 4 or qkv.shape[3] == 0 or qkv.shape[3] % (3 * heads) != 0:
        raise ValueError(f"{name} qkv has shape {tuple(qkv.shape)}, it must be "
                         f"(B, H, W, 3·heads·d) with {heads} heads")
    entries = (2 * h - 1) * (2 * w - 1)
    if tuple(bias_table.shape) != (entries, heads):
        raise ValueError(f"{name} bias_table has shape {tuple(bias_table.shape)}, "
                         f"window {h}x{w} and {heads} heads need ({entries}, {heads})")
    within = 0 < shift[0] < h and 0 < shift[1] < w
    if tuple(shift) != (0, 0) and not within:
        raise ValueError(f"{name} shift {shift} must be (0, 0) or within 1..{h - 1}, 1..{w - 1}")
    if crossed and heads % 2 != 0:
        raise ValueError(f"{name} crossed needs an even number of heads, not {heads}")
    if qkv.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} qkv is {qkv.dtype}: use bfloat16 or float32 "
                         "(float16 overflows in these networks and gives black images)")


def kernels_take(qkv: Tensor, heads: int, window) -> bool:
    """Whether there is a Triton kernel for this window, head width and dtype."""
    if window[0] * window[1] not in (64, 256):
        return False
    head_dim = qkv.shape[3] // 3 // heads
    return head_dim <= 32 and qkv.dtype in (torch.bfloat16, torch.float32)


# ---- the Triton kernels as PyTorch operations ---------------------------------------------------
# torch.compile sees each as one opaque step, whose output shapes the "fake" versions tell.
@torch.library.custom_op("drc::window_attention", mutates_args=())
def window_attention_op(
        qkv: Tensor,
        bias_table: Tensor,
        heads: int,
        window: list[int],
        shift: list[int],
        scale: float,
        crossed: bool,
        variant: str,
        save: bool) -> tuple[Tensor, Tensor]:
    """(out, lse). lse, the logarithm of each row's sum of exponentials, is empty unless `save`."""
    from kernels import triton_attention
    return triton_attention.forward(
        qkv, bias_table, heads, window, shift, scale, crossed, variant, save)


@torch.library.custom_op("drc::window_attention_backward", mutates_args=())
def window_attention_backward_op(
        qkv: Tensor,
        bias_table: Tensor,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        heads: int,
        window: list[int],
        shift: list[int],
        scale: float,
        crossed: bool,
        variant: str) -> tuple[Tensor, Tensor]:
    """(dqkv, dtable), where dout is the gradient of out."""
    from kernels import triton_attention_backward
    return triton_attention_backward.backward(
        qkv, bias_table, out, lse, dout, heads, window, shift, scale, crossed, variant)


@window_attention_op.register_fake
def fake_forward(qkv, bias_table, heads, window, shift, scale, crossed, variant, save):
    B, H, W, width = qkv.shape
    down, right = padding((H, W), tuple(window), crossed)
    tokens = B * (H + down) * (W + right)
    parts = 2 if crossed else 1
    saved = tokens * heads // parts if save else 0
    out = qkv.new_empty(B, H, W, width // 3)
    return out, qkv.new_empty(parts, saved, dtype=torch.float32)


@window_attention_backward_op.register_fake
def fake_backward(qkv, bias_table, out, lse, dout, *settings):
    return qkv.new_empty(qkv.shape), bias_table.new_empty(bias_table.shape)


def remember(ctx, inputs, output) -> None:
    """Keeps what the backward pass needs: no scores, only the inputs, out and lse."""
    qkv, bias_table, *settings, _ = inputs
    out, lse = output
    ctx.settings = settings                                           # heads ... variant
    ctx.save_for_backward(qkv, bias_table, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def gradients(ctx, dout: Tensor | None, _):
    """One gradient for each input of `window_attention_op`; None where there is none."""
    nothing = (None,) * 7                                             # heads ... save
    if dout is None:
        return None, None, *nothing
    qkv, bias_table, out, lse = ctx.saved_tensors
    try:
        result = window_attention_backward_op(qkv, bias_table, out, lse, dout, *ctx.settings)
    except Exception as error:       # see choice.call
        choice.give_up(NAME, error)
        result = torch_gradients(qkv, bias_table, dout, *ctx.settings)
    return *result, *nothing


def torch_gradients(qkv, bias_table, dout, heads, window, shift, scale, crossed, _) -> tuple:
    """(dqkv, dtable) by PyTorch, which computes the forward pass once more."""
    inputs = [x.detach().requires_grad_() for x in (qkv, bias_table)]
    with torch.enable_grad():
        out = torch_path(
            *inputs, heads=heads, window=tuple(window), shift=tuple(shift), scale=scale,
            crossed=crossed)
    return torch.autograd.grad(out, inputs, dout)


window_attention_op.register_autograd(gradients, setup_context=remember)
