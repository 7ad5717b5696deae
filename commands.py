"""How a command begins, talks and ends: its flags' types, its progress, its one sentence of error.

Nothing here knows about super-resolution. A command calls `command(main)`: what the user can put
right becomes one sentence on stderr and an exit code, never a traceback; ctrl-C and SIGTERM let
`finally` clean up. Long work shows a `Bar`.

Everyone takes these names from run.py, which offers them again. Read run.py next.
"""
import argparse
import ctypes
import importlib
import io
import math
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

import torch
from tqdm import tqdm

import parallel

LINE_SECONDS = 30                    # between two lines of progress where there is no terminal
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3      # of mallopt, see malloc.h
KEPT = 2**30                         # bytes: more is returned to the system


class WrongUsage(Exception):
    """A sentence about the flags, for the user; the command ends with exit code 2."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: like ctrl-C, with another exit code."""


def command(main: Callable[[], None]) -> None:
    """Calls main() and ends the process as a user expects.

    What a user can put right becomes one sentence on stderr (`python -X dev`: and the traceback),
    with exit code 2 for wrong flags, else 1; 130 after ctrl-C, 143 after SIGTERM. A bug keeps its
    traceback.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:        # see quiet.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, terminate)
    keep_memory()
    try:
        main()
    except KeyboardInterrupt as stop:
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            parallel.audible()
            raise
        if sys.flags.dev_mode:
            traceback.print_exc()
        # wrong flags are wrong in all processes: one of them says so
        who = "" if isinstance(error, WrongUsage) else parallel.audible()
        print(f"error: {who}{sentence}", file=sys.stderr)
        sys.exit(2 if isinstance(error, WrongUsage) else 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def keep_memory() -> None:
    """Lets the process keep the memory of a tensor that is gone, for the next one.

    The C library of Linux (glibc) otherwise returns every large block to the system, which hands it
    out again page by page: up to a tenth of the time of a network on a CPU. Other systems have no
    such function, and nothing changes there.
    """
    with suppress(OSError, AttributeError, TypeError):
        set_option = ctypes.CDLL(None).mallopt
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            set_option(option, KEPT)


def terminate(number, frame):
    """The handler of SIGTERM: files that are half written are removed on the way out."""
    raise Terminated


def explain(error: Exception) -> str | None:
    """The sentence for the user; None for a bug."""
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    if full or "can't allocate memory" in str(error):
        return "out of memory: use smaller tiles, patches or batches"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if type(error).__module__.startswith("torch._inductor"):
        reason = str(error).strip().partition("\n")[0]
        return f"--compile needs a compiler that works on this machine ({reason}): leave it out"
    known = isinstance(error, (WrongUsage, ValueError, OSError, FloatingPointError))
    return str(error) if known else None


def need(package: str, purpose: str) -> ModuleType:
    """A package that may be missing; ValueError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.partition(".")[0]
        raise ValueError(f"{purpose} needs {name}: pip install {name}") from None


# ---- types of flags, for argparse ---------------------------------------------------------------
def at_least(least: int) -> Callable[[str], int]:
    """The type of an integer of at least `least` and at most 10^9, beyond which none is meant."""
    def integer(text: str) -> int:
        digits = text.isascii() and text.isdigit() and len(text) <= 10
        if not digits or not least <= int(text) <= 10**9:
            raise argparse.ArgumentTypeError(
                f"{text[:40]!r} must be an integer of at least {least}, and at most 10^9")
        return int(text)
    return integer


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """The type of a number in [low, high); kind: int or float."""
    def parse(text: str):
        value = kind(text)
        if not low <= value < high:
            wrong = f"outside [{low}, {high})"
            if high == math.inf:
                wrong = f"below {low}" if value < low else "no finite number"
            raise argparse.ArgumentTypeError(f"{text[:40]} is {wrong}")
        return value
    parse.__name__ = kind.__name__   # argparse then says "invalid float value"
    return parse


def positive(text: str) -> float:
    """The type of a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return float(text)


def filled(text: str) -> str:
    """The type of a path or any other text: an empty one is an unset variable of some script."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("it is empty: give a name, or leave the flag out")
    return text


def usable_device(text: str) -> torch.device:
    """The type of a device on which tensors can be made, computed with and read."""
    try:
        if torch.ones(1, device=text).add(1).item() == 2:
            return torch.empty(0, device=text).device
    except Exception as error:       # a device without its library raises nearly anything
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: try cpu") from error
    raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: try cpu")


# ---- progress -----------------------------------------------------------------------------------
class Bar(tqdm):
    """tqdm's progress bar; where stderr is no terminal, plain lines, at most one in 30 seconds."""
    def __init__(self, *arguments, **options):
        self.terminal = sys.stderr.isatty()
        if not self.terminal:
            # what tqdm writes besides lines, to wipe them away, goes nowhere
            options |= dict(mininterval=LINE_SECONDS, maxinterval=2 * LINE_SECONDS, ncols=100,
                            file=io.StringIO())
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Shows the bar; tqdm calls it."""
        if self.terminal:
            super().display(msg, pos)
        elif msg is None:                # otherwise it is the empty line that wipes the bar away
            print(self, file=sys.stderr, flush=True)


def progress(stage: str, total: int, start: int = 0, unit: str = "step") -> Bar:
    """A progress bar for a stage, shown after two seconds."""
    return Bar(total=total, initial=start, desc=f"{stage:8}", unit=unit, delay=2,
               dynamic_ncols=True)
