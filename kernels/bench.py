"""What the kernels gain, each against the strongest ways to write the same in PyTorch, in one run.

    python -m kernels.bench                                  # single operations
    python -m kernels.bench --model swinir                   # a whole network, and a training step of swinir
    python -m kernels.bench --json results.json

Times are of the GPU alone (events, behind a queue that hides the launches) with a cold L2 cache, median over --repeat;
those of whole networks include the launches. Bytes are what a fused kernel must move; the floor is what an H200 needs
for them, or for the exponentials. Without a GPU only the PyTorch paths run, on smaller inputs, by the clock.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import kernels
from kernels import pixel_shuffle

attention = sys.modules["kernels.window_attention"]               # the file; kernels.window_attention is its function
BANDWIDTH, EXPONENTIALS = 4.3e12, 4.2e12                          # an H200's, per second
ATTENTION = {                                                     # (B, H, W, heads, width, window, shift, crossed)
    "swinir 16x64x64": (16, 64, 64, 6, 30, (8, 8), (4, 4), False),
    "swinir 1x184x320": (1, 184, 320, 6, 30, (8, 8), (4, 4), False),
    "swinir_light 16x64x64": (16, 64, 64, 6, 10, (8, 8), (4, 4), False),
    "dat 16x64x64": (16, 64, 64, 6, 30, (8, 32), (4, 16), True),
}
CONVOLUTION = {                                                   # (N, C, H, W, O, r)
    f"conv {C}->{O * r * r} r{r} {W}x{H}": (1, C, H, W, O, r)
    for C, O, r in ((64, 64, 2), (60, 3, 4)) for W, H in ((320, 180), (640, 360))
}
MODELS = ("swinir", "swinir_light", "dat", "dat_light", "drn_s")


# ---- the ways to write windowed attention
def windows_of(part: Tensor, h: int, w: int, shift, down: int, right: int) -> Tensor:
    """(B, H, W, 3, heads, d) -> (3, B, windows of a map, heads, n, d)."""
    x = F.pad(part.flatten(3), (0, 0, 0, right, 0, down)) if down or right else part.flatten(3)
    x = x.roll((-shift[0], -shift[1]), (1, 2)) if shift[0] else x
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3)                    # (B, rows, columns, h, w, ...)
    return x.reshape(len(x), -1, h * w, *part.shape[3:]).permute(3, 0, 1, 4, 2, 5)


def image_of(x: Tensor, size: tuple[int, int], padded: tuple[int, int], h: int, w: int, shift) -> Tensor:
    """(B, windows of a map, heads, n, d) -> (B, H, W, heads·d)."""
    x = x.transpose(2, 3).reshape(len(x), padded[0] // h, padded[1] // w, h, w, -1)
    x = x.transpose(2, 3).reshape(len(x), *padded, -1)
    return (x.roll(tuple(shift), (1, 2)) if shift[0] else x)[:, :size[0], :size[1]]


class Ready(NamedTuple):
    """What does not change from call to call, for one orientation; made once, as the authors do in training."""
    index: Tensor                # (n, n) rows of the bias table
    region: Tensor               # (windows of a map, n)
    mask: Tensor | None          # (windows of a map, 1, n, n), 0 or −100; None without a shift


def prepare(qkv: Tensor, window, shift, crossed: bool) -> list[Ready]:
    result, (H, W), device = [], qkv.shape[1:3], qkv.device
    down, right = attention.padding((H, W), window, crossed)
    for (h, w), (dy, dx) in [(window, shift), (window[::-1], shift[::-1])][:1 + crossed]:
        rows, columns = (H + down) // h, (W + right) // w
        y = torch.arange(rows * h, device=device).view(rows, 1, h, 1) >= rows * h - dy
        x = torch.arange(columns * w, device=device).view(1, columns, 1, w) >= columns * w - dx
        region = (2 * y + x).view(rows * columns, h * w)
        mask = -100.0 * (region[:, :, None] != region[:, None, :]).to(qkv.dtype)[:, None] if dy else None
        result.append(Ready(attention.offsets(h, w, device), region, mask))
    return result


def written_out(core: Callable, qkv, bias_table, heads, window, shift, scale, crossed,
                ready: list[Ready] | None = None) -> Tensor:
    """Windowed attention with `core(q, k, v, bias (heads, n, n), ready, scale)` inside."""
    size, result = qkv.shape[1:3], []
    down, right = attention.padding(size, window, crossed)
    ready = ready or prepare(qkv, window, shift, crossed)
    parts = attention.branches(qkv, bias_table, heads, window, shift, crossed)
    for (part, table, (h, w), turned), known in zip(parts, ready):
        q, k, v = windows_of(part, h, w, turned, down, right)
        bias = table[known.index].permute(2, 0, 1).to(qkv.dtype)
        x = core(q, k, v, bias, known, scale)
        result.append(image_of(x, size, (size[0] + down, size[1] + right), h, w, turned))
    return torch.cat(result, 3) if crossed else result[0]


def authors(q, k, v, bias, ready: Ready, scale) -> Tensor:
    scores = (q * scale) @ k.transpose(-2, -1) + bias
    if ready.mask is not None:
        scores = scores + ready.mask
    return scores.softmax(-1) @ v


def widened(*tensors: Tensor) -> list[Tensor]:
    """Heads zero-padded to 16 or 32: what the fused attentions of PyTorch want."""
    d = tensors[0].shape[-1]
    return [F.pad(t, (0, (16 if d <= 16 else 32) - d)) for t in tensors]


def memory_efficient(q, k, v, bias, ready: Ready, scale) -> Tensor:
    """Windows and heads in one dimension: bias and mask serve the whole batch by a stride of 0, uncopied."""
    B, windows, heads, n, d = q.shape
    added = bias.expand(windows, -1, -1, -1) if ready.mask is None else bias + ready.mask
    q, k, v = (t.flatten(1, 2) for t in widened(q, k, v))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        x = F.scaled_dot_product_attention(q, k, v, added.flatten(0, 1).expand(B, -1, -1, -1), scale=scale)
    return x[..., :d].unflatten(1, (windows, heads))


def flex(q, k, v, bias, ready: Ready, scale) -> Tensor:
    B, windows, d, region = *q.shape[:2], q.shape[-1], ready.region

    def with_bias(score, b, head, i, j):
        score = score + bias[head, i, j]
        if ready.mask is not None:
            score = torch.where(region[b % windows, i] == region[b % windows, j], score, score - 100.0)
        return score

    x = flex_attention(*(t.flatten(0, 1) for t in widened(q, k, v)), score_mod=with_bias, scale=scale)
    return x[..., :d].unflatten(0, (B, windows))


def ways_of_attention(ready: list[Ready]) -> dict[str, Callable]:
    eager = {core.__name__: partial(written_out, core, ready=ready) for core in (authors, memory_efficient, flex)}
    if not torch.cuda.is_available():
        return {"ours, PyTorch": attention.torch_path, "eager": eager["authors"], "reference": in_full}
    compiled = {name: torch.compile(function, fullgraph=True, dynamic=False) for name, function in eager.items()}
    return {"triton": ours, "eager": eager["authors"], "compiled": compiled["authors"],
            "sdpa": eager["memory_efficient"], "sdpa compiled": compiled["memory_efficient"],
            "flex compiled": compiled["flex"], "ours, PyTorch": attention.torch_path}


def ours(qkv, bias_table, heads, window, shift, scale, crossed) -> Tensor:
    return kernels.window_attention(
        qkv, bias_table, heads=heads, window=window, shift=shift, scale=scale, crossed=crossed)


def in_full(qkv, bias_table, heads, window, shift, scale, crossed) -> Tensor:
    return attention.reference(qkv, bias_table, heads=heads, window=window, shift=shift, scale=scale, crossed=crossed)


def ways_of_convolution() -> dict[str, Callable]:
    if not torch.cuda.is_available():
        return {"ours, PyTorch": pixel_shuffle.torch_path}
    return {"triton": kernels.conv3x3_pixel_shuffle, "eager": pixel_shuffle.torch_path,
            "compiled": torch.compile(pixel_shuffle.torch_path, fullgraph=True, dynamic=False)}


# ---- measuring
def seconds(function: Callable, repeat: int) -> float:
    """Median. On a GPU: by events, the L2 cache overwritten before each, all queued before the GPU gets there."""
    for _ in range(3):
        function()
    if not torch.cuda.is_available():
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    wipe, pairs = torch.empty(2**28, dtype=torch.int8, device="cuda"), []
    for _ in range(repeat):
        pairs.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        torch.cuda._sleep(4_000_000)                              # about 2 ms, for the launches
        wipe.zero_()
        pairs[-1][0].record()
        function()
        pairs[-1][1].record()
        torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3


def peak(function: Callable) -> int | None:
    """Bytes that the call needs at most, besides what was there."""
    if not torch.cuda.is_available():
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compare(case: str, ways: dict[str, Callable], moved: int, floor: float, repeat: int) -> list[dict]:
    """A row for each way that runs here; a way that fails is a row with the reason."""
    rows = []
    for way, function in ways.items():
        row = dict(case=case, way=way)
        try:
            row |= dict(seconds=seconds(function, repeat), peak=peak(function))
            if torch.cuda.is_available():
                row |= dict(GB_per_s=moved / row["seconds"] / 1e9, of_floor=floor / row["seconds"])
        except Exception as error:                                # a baseline's limits are a result, not our failure
            if way == "triton":
                raise
            row["failed"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
        rows.append(row | dict(ratio=row.get("seconds", float("nan")) / rows[0]["seconds"] if rows else 1.0))
        show(rows[-1])
    return rows


def show(row: dict) -> None:
    if "failed" in row:
        print(f"{row['case']:42} {row['way']:14} {row['failed']}", flush=True)
        return
    memory = "-" if row["peak"] is None else f"{row['peak'] / 2**20:.0f}"
    speed = f"{row['GB_per_s']:.0f}" if "GB_per_s" in row else "-"
    share = f"{100 * row['of_floor']:.0f}" if "of_floor" in row else "-"
    print(f"{row['case']:42} {row['way']:14} {row['seconds'] * 1e6:10.1f} {row['ratio']:6.2f} "
          f"{speed:>6} {share:>8} {memory:>9}", flush=True)


# ---- cases
def attention_rows(cases: dict, repeat: int, device: str, dtype: torch.dtype) -> list[dict]:
    rows = []
    for name, (B, H, W, heads, d, window, shift, crossed) in cases.items():
        B, H, W = (B, H, W) if device == "cuda" else (1, 64, 64)
        A = heads * d
        entries, settings = (2 * window[0] - 1) * (2 * window[1] - 1), (heads, window, shift, d**-0.5, crossed)
        table = torch.randn(entries, heads, device=device)
        qkv, dout = (torch.randn(B, H, W, width, device=device, dtype=dtype) for width in (3 * A, A))
        tokens, exponentials = B * H * W, B * H * W * window[0] * window[1] * heads
        moved = tokens * (4 * A * qkv.element_size() + 4 * heads)
        torch._dynamo.reset()                                     # a compiled way is compiled for this case alone
        ways = ways_of_attention(prepare(qkv, window, shift, crossed))
        with torch.no_grad():
            calls = {way: partial(f, qkv, table, *settings) for way, f in ways.items()}
            rows += compare(f"{name} forward", calls, moved,
                            max(moved / BANDWIDTH, exponentials / EXPONENTIALS), repeat)
        qkv, table = qkv.requires_grad_(), table.requires_grad_()
        calls = {way: partial(forward_backward, f, (qkv, table), settings, dout) for way, f in ways.items()}
        moved, exponentials = moved + tokens * (7 * A * qkv.element_size() + 4 * heads), 2 * exponentials
        rows += compare(f"{name} forward + backward", calls, moved,
                        max(moved / BANDWIDTH, exponentials / EXPONENTIALS), repeat)
    return rows


def forward_backward(function: Callable, inputs: tuple, settings: tuple, dout: Tensor) -> None:
    torch.autograd.grad(function(*inputs, *settings), inputs, dout)


def convolution_rows(cases: dict, repeat: int, device: str, dtype: torch.dtype) -> list[dict]:
    rows = []
    for name, (N, C, H, W, O, r) in cases.items():
        x, weight = (torch.randn(*shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
                     for shape in ((N, C, H, W), (O * r * r, C, 3, 3)))
        torch._dynamo.reset()
        bias, moved = torch.randn(O * r * r, device=device, dtype=dtype), (C + O * r * r) * N * H * W * x.element_size()
        with torch.no_grad():
            calls = {way: partial(f, x, weight, bias, r) for way, f in ways_of_convolution().items()}
            rows += compare(name, calls, moved, moved / BANDWIDTH, repeat)
    return rows


def named(text: str, cases: dict) -> dict:
    return {name: sizes for name, sizes in cases.items() if text in name}


def set_way(way: str) -> None:
    """What the networks call: our kernels, our PyTorch path, or attention as the authors write it."""
    kernels.choose("triton" if way.startswith("triton") else "torch")
    attention.torch_path = partial(written_out, authors) if way.startswith("authors") else OUR_PATH


OUR_PATH = attention.torch_path


def model_rows(name: str, repeat: int, device: str) -> list[dict]:
    """The whole network on one LR image of 320×180, launches included."""
    import models
    rows, ways = [], ("triton", "triton compiled", "torch", "torch compiled", "authors", "authors compiled")
    low = torch.rand(1, 3, *((180, 320) if device == "cuda" else (48, 64)), device=device)
    for way in ways if device == "cuda" else ("torch", "authors"):
        set_way(way)
        torch._dynamo.reset()
        torch.manual_seed(0)
        network = models.inference(models.build(name), "bf16" if device == "cuda" else "float32").to(device)
        network = torch.compile(network, dynamic=False) if way.endswith("compiled") else network
        low = low.contiguous(memory_format=torch.channels_last)

        def call(network=network) -> None:
            with torch.no_grad():
                network(low)
            torch.cuda.synchronize() if device == "cuda" else None

        for _ in range(3):
            call()
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        row = dict(case=f"{name} {low.shape[3]}x{low.shape[2]}", way=way)
        row |= dict(seconds=statistics.median(times), peak=peak(call))
        rows.append(row | dict(ratio=row["seconds"] / (rows[0] if rows else row)["seconds"]))
        show(rows[-1])
    set_way("torch")
    return rows


def training_rows(repeat: int, device: str) -> list[dict]:
    """A step of swinir on 16 patches of 64×64 in bfloat16 (autocast)."""
    import models
    rows = []
    for way in ("triton", "torch", "authors"):
        set_way(way)
        torch.manual_seed(0)
        network = models.build("swinir").to(device)
        low, optimiser = torch.rand(16, 3, 64, 64, device=device), torch.optim.Adam(network.parameters(), 1e-5)

        def step(network=network, optimiser=optimiser) -> None:
            with torch.autocast(device, torch.bfloat16):
                loss = sum(image.float().square().mean() for image in network(low).images.values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

        row = dict(case="swinir training step 16x64x64", way=way, seconds=seconds(step, repeat), peak=peak(step))
        rows.append(row | dict(ratio=row["seconds"] / (rows[0] if rows else row)["seconds"]))
        show(rows[-1])
        del network, optimiser, step
    set_way("torch")
    return rows


def machine() -> dict:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        except OSError:
            return ""
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = None
    gpu = torch.cuda.is_available()
    return dict(gpu=torch.cuda.get_device_name() if gpu else None, torch=torch.__version__, triton=version,
                driver=output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
                commit=output("git", "rev-parse", "--short", "HEAD"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="time this whole network instead of single operations")
    parser.add_argument("--only", metavar="TEXT", default="", help="only the operations whose name holds this text")
    parser.add_argument("--repeat", type=int, help="measurements of which the median counts (default: 50, on a CPU 3)")
    parser.add_argument("--json", metavar="FILE", help="write the rows here, too")
    args = parser.parse_args()
    gpu, facts = torch.cuda.is_available(), machine()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    repeat = args.repeat or (50 if gpu else 3)
    if not gpu:
        print("no GPU: only the PyTorch paths run, in float32, on one picture instead of sixteen")
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    print(f"{'case':42} {'way':14} {'µs':>10} {'ratio':>6} {'GB/s':>6} {'% floor':>8} {'peak MiB':>9}")
    if args.model:
        rows = model_rows(args.model, repeat, device)
        rows += training_rows(repeat, device) if args.model == "swinir" and gpu else []
    else:
        if gpu:
            kernels.choose("triton")
        rows = attention_rows(named(args.only, ATTENTION), repeat, device, dtype)
        rows += convolution_rows(named(args.only, CONVOLUTION), repeat, device, dtype)
    if args.json:
        path = Path(args.json)
        partial_file = path.with_name(path.name + ".partial")
        partial_file.write_text(json.dumps(dict(machine=facts, rows=rows), indent=1))
        partial_file.replace(path)


if __name__ == "__main__":
    main()
