"""How bench/kernels.py measures: time on the GPU or by the clock, memory, and what a GPU can do.

A row of its table is made by `Rows.measure`, printed, and kept in the file of --json, so that what
was measured remains if the rest takes too long or crashes.
"""
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch

import run
from kernels import choice

GPU = torch.cuda.is_available()


# ---- time and memory -----------------------------------------------------------------------------
def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def by_the_clock(function: Callable, repeat: int) -> float:
    """Median seconds of a call, launches included."""
    times = []
    for _ in range(repeat):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def on_the_gpu(function: Callable, repeat: int) -> float:
    """Median seconds of a call on the GPU, with nothing of its inputs in the L2 cache; without its
    launches as far as they take less than 2 ms.
    """
    wipe = torch.empty(2**28, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeat):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)         # about 2 ms, in which the launches below are queued
        wipe.zero_()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def peak(function: Callable) -> int | None:
    """Bytes of GPU memory that a call needs at most, besides what was there."""
    if not GPU:
        return None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Rows:
    """The results of one case, printed as they come; the first is what the others are compared to.

    moved: bytes that a fused kernel must move; floor: seconds that the GPU needs; 0: not known.
    """
    def __init__(self, case: str, timer: Callable, repeat: int, moved: int = 0, floor: float = 0):
        self.case = case
        self.timer = timer
        self.repeat = repeat
        self.moved = moved
        self.floor = floor
        self.rows = []

    def measure(self, way: str, function: Callable) -> None:
        """Adds the row of a way; one that fails gets a row with the reason."""
        row = dict(case=self.case, way=way)
        try:
            for _ in range(3):
                function()
            row["seconds"] = self.timer(function, self.repeat)
            row["peak"] = peak(function)
        except Exception as error:           # the limits of a way are a result
            row["failed"] = choice.reason(error)[:120]
        else:
            first = self.rows[0] if self.rows else row
            row["ratio"] = row["seconds"] / first["seconds"] if "seconds" in first else None
            if GPU and self.moved:
                row["GB_per_s"] = self.moved / row["seconds"] / 1e9
                row["of_floor"] = self.floor / row["seconds"]
        self.rows.append(row)
        show(row)
        keep(row)


kept = dict(path=None, machine=None, rows=[], choices={})        # what --json writes


def keep(row: dict) -> None:
    """Writes all rows so far, so that what was measured remains if the rest takes too long."""
    kept["rows"].append(row)
    kept["choices"] = dict(choice.chosen)
    if kept["path"]:
        blob = {name: kept[name] for name in ("machine", "rows", "choices")}
        run.write_file(kept["path"], json.dumps(blob, indent=1).encode())


def show(row: dict) -> None:
    """Prints a row of the table."""
    if "failed" in row:
        print(f"{row['case']:42} {row['way']:14} {row['failed']}", flush=True)
        return
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    speed = f"{row['GB_per_s']:.0f}" if "GB_per_s" in row else "-"
    share = f"{100 * row['of_floor']:.0f}" if "of_floor" in row else "-"
    memory = "-" if row["peak"] is None else f"{row['peak'] / 2**20:.0f}"
    print(f"{row['case']:42} {row['way']:14} {row['seconds'] * 1e6:10.1f} {ratio:>6} "
          f"{speed:>6} {share:>8} {memory:>9}", flush=True)


@lru_cache
def ceilings() -> tuple[float, float]:
    """Bytes a second of this GPU, by a large copy, and exponentials, 16 a cycle and multiprocessor;
    infinite without a GPU.
    """
    if not GPU:
        return math.inf, math.inf
    source = torch.empty(2**29, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    seconds = on_the_gpu(partial(target.copy_, source), 10)
    megahertz = output("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
    cycles = float(megahertz.split()[0]) * 1e6 if megahertz else 1.7e9
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return 2 * len(source) / seconds, 16 * cycles * processors


# ---- the machine ---------------------------------------------------------------------------------
def output(*command: str) -> str | None:
    """What a program prints; None if it cannot be run."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return result.stdout.strip() or None


def machine() -> dict:
    """What the times depend on."""
    try:
        import triton
        version = triton.__version__
    except ImportError:
        version = None
    return dict(
        gpu=torch.cuda.get_device_name() if GPU else None,
        driver=output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        triton=version,
        python=platform.python_version(),
        commit=output("git", "rev-parse", "--short", "HEAD"))
