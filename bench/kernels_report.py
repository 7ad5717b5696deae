"""What the kernels do on the GPU that is there, as Markdown: `python -m bench.kernels --report`.

First the tests of the kernels run, on the GPU. Then bench/kernels.py measures operations against
four ways to write them in PyTorch, whole networks and a training step, step by step, the most
telling first. Every step is a process of its own with a time after which it is ended: a kernel that
crashes takes nothing else with it, and the whole takes 10 minutes at most. What was not reached is
shown as "–".

Not here: how something is measured (measuring.py).
"""
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import run

GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[1]
TESTS = ["tests/test_attention.py", "tests/test_pixel_shuffle.py", "tests/test_choice.py",
         "tests/test_mlp.py", "tests/test_graphs.py", "tests/test_kernels_networks.py"]

# (words for the progress, arguments of bench.kernels, seconds). A step may also use what the steps
# before it left over. Together with the tests 570 seconds: the rest is for starting and writing.
TEST_SECONDS = 180
STEPS = [
    ("attention of swinir", ["--only", "swinir 16"], 70),
    ("attention of dat", ["--only", "dat"], 70),
    ("convolutions", ["--only", "conv"], 40),
    ("MLPs", ["--only", "mlp"], 20),
    ("drn_s", ["--model", "drn_s"], 50),
    ("swinir, and its training", ["--model", "swinir"], 80),
    ("attention of swinir on a picture", ["--only", "swinir 1x"], 30),
    ("attention of swinir_light", ["--only", "swinir_light"], 30),
]


class Result(NamedTuple):
    """Of a step."""
    machine: dict
    rows: list[dict]                 # as bench.kernels writes them
    choices: dict[str, str]          # as kernels.choice keeps them
    problem: str                     # why it ended early; empty if it did not


def make(path: str) -> None:
    """Runs the tests and all steps, and writes the report. WrongUsage: there is no GPU."""
    if not GPU:
        raise run.WrongUsage("--report measures a GPU, and there is none here: leave it out to "
                             "time the PyTorch paths")
    print(f"tests of the kernels, at most {TEST_SECONDS} s", flush=True)
    end = time.monotonic() + TEST_SECONDS
    tested = test(TEST_SECONDS)
    print(tested, flush=True)
    results = []
    for words, arguments, seconds in STEPS:
        end += seconds
        limit = end - time.monotonic()
        print(f"\n{words}, at most {limit:.0f} s", flush=True)
        results.append(measure(arguments, limit))
        print(results[-1].problem, end="", flush=True)
    run.write_file(path, markdown(tested, results).encode())
    print(f"\nwritten to {path}")


# ---- the steps ----------------------------------------------------------------------------------
def test(limit: float) -> str:
    """The last line of pytest, with the names of tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "--durations=0", "-rfE", *TESTS]
    if importlib.util.find_spec("xdist"):        # most of their time goes into compiling kernels
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"tests: not finished after {limit:.0f} s"
    lines = ended.stdout.strip().splitlines() or [ended.stderr.strip()[-300:]]
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([f"tests: {lines[-1].strip('= ')}", *failed])


def measure(arguments: list[str], limit: float) -> Result:
    """Runs bench.kernels, which shows its rows; what it has written when the time is up counts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "bench.kernels", *arguments, "--json", str(file)]
        problem = ""
        environment = dict(os.environ)
        if "--only" in arguments:
            # Single operations are compiled fast enough by one process, and where there are more a
            # step takes half a minute to end.
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        try:
            ended = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                   timeout=max(limit, 1), env=environment)
            if ended.returncode:
                lines = ended.stderr.strip().splitlines() or ["no reason given"]
                problem = f"{' '.join(arguments)}: ended with {lines[-1][:200]}\n"
        except subprocess.TimeoutExpired:
            problem = f"{' '.join(arguments)}: not finished after {limit:.0f} s\n"
        written = dict(machine={}, rows=[], choices={})
        if file.exists():
            written = json.loads(file.read_bytes())
    return Result(**written, problem=problem)


# ---- Markdown -----------------------------------------------------------------------------------
def markdown(tested: str, results: list[Result]) -> str:
    """The report."""
    facts = next((result.machine for result in results if result.machine), {})
    rows = [row for result in results for row in result.rows]
    lines = [f"Measured on an {facts.get('gpu')} (driver {facts.get('driver')}, torch "
             f"{facts.get('torch')}, triton {facts.get('triton')}, Python {facts.get('python')}, "
             f"commit {facts.get('commit')}): `python -m bench.kernels --report`.", "", tested, ""]
    operations = [row for row in rows if " forward" in row["case"]]
    convolutions = [row for row in rows if row["case"].startswith("conv")]
    mlps = [row for row in rows if row["case"].startswith("mlp")]
    networks = [row for row in rows if row not in operations + convolutions + mlps]
    lines += table("attention, µs", operations, 1e6, 0)
    lines += table("convolution 3×3 and shuffle, µs", convolutions, 1e6, 0)
    lines += table("norm, MLP and sum, µs", mlps, 1e6, 0)
    lines += table("whole networks, ms", networks, 1e3, 1)
    lines += chosen(results)
    lines += [f"- {result.problem.strip()}" for result in results if result.problem]
    return "\n".join(lines) + "\n"


def table(title: str, rows: list[dict], unit: float, digits: int) -> list[str]:
    """One line for each case, one column for each way; failures below. [] without rows.

    The last two columns belong to the first way: its part of the speed that the memory (or the
    exponentials) would allow, and the memory it needs by that of the most frugal other way.
    """
    if not rows:
        return []
    ways = list(dict.fromkeys(row["way"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = ["| " + " | ".join([title, *ways, "% of floor", "memory"]) + " |",
             "|---" * (len(ways) + 3) + "|"]
    notes = []
    for case in cases:
        of_way = {row["way"]: row for row in rows if row["case"] == case}
        cells = [case]
        for way in ways:
            row = of_way.get(way, {})
            seconds = row.get("seconds")
            cells.append("–" if seconds is None else f"{seconds * unit:.{digits}f}")
            if "failed" in row:
                notes.append(f"- {case}, {way}: {row['failed']}")
        first = next(iter(of_way.values()))
        others = [row for way, row in of_way.items() if not way.startswith("triton")]
        floor = first.get("of_floor")
        cells.append("–" if floor is None else f"{100 * floor:.0f}")
        cells.append(memory(first, others))
        lines.append("| " + " | ".join(cells) + " |")
    return lines + [""] + notes + [""] * bool(notes)


def memory(first: dict, others: list[dict]) -> str:
    """Peak memory of the first way, by the least of the others."""
    peaks = [row["peak"] for row in others if row.get("peak")]
    if not peaks or not first.get("peak"):
        return "–"
    return f"{first['peak'] / min(peaks):.2f}"


def chosen(results: list[Result]) -> list[str]:
    """What was found to be the fastest way, for each class of inputs."""
    choices = {}
    for result in results:
        choices.update(result.choices)
    if not choices:
        return []
    lines = ["| class of inputs | fastest |", "|---|---|"]
    lines += [f"| {key.partition(';')[0]} | {way} |" for key, way in choices.items()]
    return [*lines, ""]
