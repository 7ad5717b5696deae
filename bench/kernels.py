"""What the Triton kernels gain, against the strongest ways to write the same in PyTorch.

    python -m bench.kernels                              # single operations
    python -m bench.kernels --model swinir               # a whole network, and training of swinir
    python -m bench.kernels --json results.json
    python -m bench.kernels --report                     # tests, then all of it: kernels.md

Times of operations are of the GPU alone (events behind a queue that hides the launches) with a cold
L2 cache, the median of --repeat; those of whole networks include the launches.

    ratio       time of this way by the time of the first; above 1 the first is faster
    GB/s        bytes that a fused kernel must move, by the time
    % floor     the time that the GPU needs for these bytes, at the speed of a large copy, or for
                the exponentials, at 16 a cycle and multiprocessor, by the time
    peak MiB    memory that the call needs at most, besides its inputs

All ways run one after the other on the same machine; compare only within one run. "triton" gets
heads that are padded to 16 or 32 channels, as the networks make them; "triton narrow" pads them.

Without a GPU only the PyTorch paths run, on smaller inputs, by the clock. The ways to write window
attention are in baselines.py, how it is measured in measuring.py, the report in kernels_report.py.
"""
import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import graphs
import kernels
import models
import run
from bench import baselines, measuring
from bench.measuring import GPU, Rows, by_the_clock, ceilings, machine, on_the_gpu
from kernels import attention, mlp, pixel_shuffle
from kernels.heads import head_width, pad_groups

MODELS = ("swinir", "swinir_light", "dat", "dat_light", "drn_s")


class Attention(NamedTuple):
    B: int                           # pictures
    H: int
    W: int
    heads: int
    d: int                           # channels of a head
    window: tuple[int, int]
    shift: tuple[int, int]
    crossed: bool


ATTENTION = {
    "swinir 16x64x64": Attention(16, 64, 64, 6, 30, (8, 8), (4, 4), False),
    "swinir 1x184x320": Attention(1, 184, 320, 6, 30, (8, 8), (4, 4), False),
    "swinir_light 16x64x64": Attention(16, 64, 64, 6, 10, (8, 8), (4, 4), False),
    "dat 16x64x64": Attention(16, 64, 64, 6, 30, (8, 32), (4, 16), True),
}
CONVOLUTION = {                      # C, outputs, r, width, height
    "conv 64->256 r2 320x180": (64, 64, 2, 320, 180),
    "conv 64->256 r2 640x360": (64, 64, 2, 640, 360),
    "conv 60->48 r4 320x180": (60, 3, 4, 320, 180),
    "conv 60->48 r4 640x360": (60, 3, 4, 640, 360),
}
MLP = {                              # pictures, height, width, C, hidden channels
    "mlp 180->360 16x64x64": (16, 64, 64, 180, 360),
    "mlp 180->360 1x184x320": (1, 184, 320, 180, 360),
    "mlp 60->120 16x64x64": (16, 64, 64, 60, 120),
}


# ---- single operations --------------------------------------------------------------------------
def compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False)


def around(core: Callable, ready: list[baselines.Ready]) -> Callable:
    """Window attention around one of the cores of baselines.py, index and mask made beforehand."""
    def attend(qkv: Tensor, bias_table: Tensor, **settings) -> Tensor:
        return baselines.written_out(core, qkv, bias_table, ready=ready, **settings)

    return attend


def ways_of_attention(ready: list[baselines.Ready]) -> dict[str, Callable]:
    """{name: a function with the signature of kernels.window_attention}; ours comes first."""
    authors = around(baselines.authors, ready)
    if not GPU:
        return {
            "ours, PyTorch": attention.torch_path,
            "eager": authors,
            "reference": attention.reference,
        }
    fused = around(baselines.memory_efficient, ready)
    return where_triton_runs(kernels.window_attention, "triton narrow") | {
        "eager": authors,
        "compiled": compiled(authors),
        "sdpa": fused,
        "sdpa compiled": compiled(fused),
        "flex compiled": compiled(around(baselines.flex, ready)),
        "ours, PyTorch": attention.torch_path,
    }


def where_triton_runs(function: Callable | None = None, *more: str) -> dict[str, Callable]:
    """The way "triton", and others of the same function, where this GPU can run it."""
    return {} if kernels.available() else dict.fromkeys(("triton", *more), function)


def attention_rows(name: str, case: Attention, repeat: int) -> list[dict]:
    """Forward, and forward with backward, in every way."""
    B, H, W, heads, d, window, shift, crossed = case
    if not GPU:
        B, H, W = 1, 64, 64
    A = heads * d
    settings = dict(heads=heads, window=window, shift=shift, scale=d**-0.5, crossed=crossed)
    table = randn((2 * window[0] - 1) * (2 * window[1] - 1), heads).float()
    qkv = randn(B, H, W, 3 * A)
    dout = randn(B, H, W, A)
    torch._dynamo.reset()                    # what is compiled, is compiled for this case alone
    ways = ways_of_attention(baselines.prepare(qkv, window, shift, crossed))

    byte_rate, exponential_rate = ceilings()
    tokens = B * H * W
    exponentials = tokens * window[0] * window[1] * heads
    moved = tokens * (4 * A * qkv.element_size() + 4 * heads)    # q, k, v, out and lse
    floor = max(moved / byte_rate, exponentials / exponential_rate)
    timer = on_the_gpu if GPU else by_the_clock
    forward = Rows(f"{name} forward", timer, repeat, moved, floor)
    given = {way: inputs_of(way, qkv, dout, heads) for way in ways}
    with torch.no_grad():
        for way, function in ways.items():
            forward.measure(way, partial(function, given[way][0], table, **settings))

    moved += tokens * (7 * A * qkv.element_size() + 4 * heads)
    floor = max(moved / byte_rate, 2 * exponentials / exponential_rate)
    both = Rows(f"{name} forward + backward", timer, repeat, moved, floor)
    table.requires_grad_()
    for way, function in ways.items():
        qkv, dout = given[way]
        qkv.requires_grad_()
        attend = partial(function, qkv, table, **settings)
        both.measure(way, partial(forward_backward, attend, (qkv, table), dout))
    return forward.rows + both.rows


def inputs_of(way: str, qkv: Tensor, dout: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(qkv, dout) as a way gets them: the Triton kernels with the heads that the networks pad."""
    if way != "triton":
        return qkv, dout
    width = head_width(dout.shape[3] // heads)
    return pad_groups(qkv, 3, 3 * heads, width), pad_groups(dout, 3, heads, width)


def forward_backward(function: Callable, inputs: tuple, dout: Tensor) -> None:
    torch.autograd.grad(function(), inputs, dout)


def convolution_rows(name: str, case: tuple, repeat: int) -> list[dict]:
    """Forward, for one picture, in every way."""
    C, outputs, r, W, H = case
    columns = outputs * r * r
    x = randn(1, C, H, W).contiguous(memory_format=torch.channels_last)
    weight = randn(columns, C, 3, 3).contiguous(memory_format=torch.channels_last)
    inputs = (x, weight, randn(columns), r)
    ways = ways_of(kernels.conv3x3_pixel_shuffle, pixel_shuffle.torch_path)
    return forward_rows(name, ways, inputs, (C + columns) * H * W, repeat)


def mlp_rows(name: str, case: tuple, repeat: int) -> list[dict]:
    """Forward, with the norm before it and the sum after it, in every way."""
    B, H, W, C, hidden = case
    if not GPU:
        B, H, W = 1, 64, 64
    shapes = [(B, H, W, C), (C,), (C,), (hidden, C), (hidden,), (C, hidden), (C,)]
    inputs = tuple(randn(*shape) for shape in shapes)
    ways = ways_of(kernels.residual_mlp, mlp.torch_path)
    return forward_rows(name, ways, inputs, 2 * inputs[0].numel(), repeat)


def randn(*shape: int) -> Tensor:
    """Random numbers where the operations are timed, and as they are."""
    return torch.randn(
        shape, device="cuda" if GPU else "cpu", dtype=torch.bfloat16 if GPU else torch.float32)


def ways_of(ours: Callable, plain: Callable) -> dict[str, Callable]:
    """{name: a function with their signature}; ours comes first, plain is PyTorch's own."""
    if not GPU:
        return {"ours, PyTorch": plain}
    return where_triton_runs(ours) | {"eager": plain, "compiled": compiled(plain)}


def forward_rows(name: str, ways: dict[str, Callable], inputs: tuple, moved: int,
                 repeat: int) -> list[dict]:
    """Forward in every way; moved: the numbers that a fused kernel must move."""
    torch._dynamo.reset()
    moved *= inputs[0].element_size()
    timer = on_the_gpu if GPU else by_the_clock
    rows = Rows(name, timer, repeat, moved, moved / ceilings()[0])
    with torch.no_grad():
        for way, function in ways.items():
            rows.measure(way, partial(function, *inputs))
    return rows.rows


# ---- whole networks -----------------------------------------------------------------------------
OUR_ATTENTION = kernels.window_attention


def set_way(way: str) -> None:
    """What the networks call: the kernels, our PyTorch path, or attention as the authors write it.

    way: "fastest" (of the first two), "triton", "torch" or "authors", and perhaps more words.
    """
    name = way.split()[0]
    kernels.choose(dict(fastest=None, triton="triton").get(name, "torch"))
    kernels.window_attention = OUR_ATTENTION
    if name == "authors":
        kernels.window_attention = baselines.authors_attention


def model_rows(name: str, repeat: int) -> list[dict]:
    """The whole network on one low-resolution picture of 320×180, launches included."""
    ways = ["torch", "authors"]
    low = torch.rand(1, 3, 48, 64)
    if GPU:
        ways = ["fastest", "fastest graph", *where_triton_runs(), "torch", "authors",
                "fastest compiled", "torch compiled", "authors compiled"]
        low = torch.rand(1, 3, 180, 320, device="cuda")
    low = low.contiguous(memory_format=torch.channels_last)
    rows = Rows(f"{name} {low.shape[3]}x{low.shape[2]}", by_the_clock, repeat)
    for way in ways:
        set_way(way)
        torch._dynamo.reset()
        torch.manual_seed(0)
        precision = "bf16" if GPU else "float32"
        network = models.inference(models.build(name), precision, low.device)
        if way.endswith("compiled"):
            network = torch.compile(network, dynamic=False)
        if way.endswith("graph"):
            graphs.use(network)
        with torch.no_grad():
            rows.measure(way, partial(network, low))
    set_way("torch")
    return rows.rows


def training_rows(repeat: int) -> list[dict]:
    """A training step of swinir on 16 patches of 64×64, in bfloat16 by autocast, on a GPU."""
    rows = Rows("swinir training step 16x64x64", on_the_gpu, repeat)
    for way in ("fastest", *where_triton_runs(), "torch", "authors"):
        set_way(way)
        torch.manual_seed(0)
        network = models.build("swinir").to("cuda")
        optimiser = torch.optim.Adam(network.parameters(), 1e-5)
        low = torch.rand(16, 3, 64, 64, device="cuda")
        rows.measure(way, partial(training_step, network, optimiser, low))
        del network, optimiser               # their memory, before the next
    set_way("torch")
    return rows.rows


def training_step(network: torch.nn.Module, optimiser: torch.optim.Optimizer, low: Tensor) -> None:
    """One step of some loss."""
    with torch.autocast("cuda", torch.bfloat16):
        images = network(low).images.values()
        loss = sum(image.float().square().mean() for image in images)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


# ---- the command --------------------------------------------------------------------------------
def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", choices=MODELS, help="time this whole network instead of single operations")
    add("--only", metavar="TEXT", default="", help="only operations whose name holds this text")
    add("--repeat", type=run.at_least(1), default=50 if GPU else 3,
        help="measurements of which the median counts (default: 50, on a CPU 3)")
    add("--json", metavar="FILE", help="write the rows here, too")
    add("--report", metavar="FILE", nargs="?", const="kernels.md",
        help="tests of the kernels, then all measurements that 10 minutes allow, as Markdown "
        "(default: kernels.md)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.report:
        # Imported here, since it starts this file for each of its steps.
        from bench import kernels_report
        kernels_report.make(args.report)
        return
    facts = machine()
    measuring.kept.update(path=args.json, machine=facts)
    if not GPU:
        print("no GPU: only the PyTorch paths run, in float32, on one picture instead of sixteen")
    print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    print(f"{'case':42} {'way':14} {'µs':>10} {'ratio':>6} {'GB/s':>6} {'% floor':>8} "
          f"{'peak MiB':>9}")
    if args.model:
        model_rows(args.model, args.repeat)
        if args.model == "swinir" and GPU:
            training_rows(args.repeat)
        return
    kernels.choose("torch" if kernels.available() else "triton")
    operations = [(ATTENTION, attention_rows), (CONVOLUTION, convolution_rows), (MLP, mlp_rows)]
    for cases, rows_of in operations:
        for name, case in cases.items():
            if args.only in name:
                rows_of(name, case, args.repeat)


if __name__ == "__main__":
    run.command(main)
