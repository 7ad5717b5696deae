"""Commands that end with one sentence, flags that say what is wrong with them, sparse progress."""
import argparse
import io
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import commands
from commands import WrongUsage
from tiny import ROOT

FULL = "error: out of memory: use smaller tiles, patches or batches\n"


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, ""),
    (WrongUsage("--a and --b exclude each other"), 2, "error: --a and --b exclude each other\n"),
    (ValueError("x.png is broken"), 1, "error: x.png is broken\n"),
    (FloatingPointError("loss is nan"), 1, "error: loss is nan\n"),
    (torch.OutOfMemoryError("CUDA out of\nmemory"), 1, FULL),
    (MemoryError(), 1, FULL),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 1, FULL),
    (FileNotFoundError(2, "No such file", "x.txt"), 1, "error: x.txt: No such file\n")])
def test_what_a_user_can_put_right_is_one_sentence(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        commands.command(main)
    assert end.value.code == code
    assert capsys.readouterr().err == words


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles for the GPU where there is one")
def test_a_missing_compiler_is_one_sentence(monkeypatch, capsys):
    from torch._inductor import config
    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    double = torch.compile(lambda x: 2 * x.sin())
    with pytest.raises(SystemExit, match="1"):
        commands.command(lambda: double(torch.ones(9)))
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --compile needs a compiler that works on this machine (")


def test_development_mode_shows_the_traceback_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))      # python -X dev
    with pytest.raises(SystemExit, match="1"):
        commands.command(lambda: int("x"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: invalid literal")


@pytest.mark.parametrize("bug", [RuntimeError("size mismatch"), KeyError("x"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        commands.command(main)


def test_a_command_that_succeeds_just_returns():
    assert commands.command(lambda: None) is None


@pytest.mark.parametrize("kind, text, value", [
    (commands.at_least(2), "2", 2), (commands.number(int, 0), "0", 0),
    (commands.number(float, 0, 1), "0.5", 0.5), (commands.filled, "a b", "a b"),
    (commands.positive, "1e-4", 1e-4), (commands.usable_device, "cpu", torch.device("cpu"))])
def test_flag_types_accept_what_is_in_their_range(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize("kind, text, words", [
    (commands.at_least(2), "1", "'1' must be an integer of at least 2, and at most 10^9"),
    (commands.at_least(2), "²", "'²' must be an integer of at least 2, and at most 10^9"),
    (commands.number(int, 1), "0", "0 is below 1"),
    (commands.number(float, 0, 1), "1", "1 is outside [0, 1)"),
    (commands.number(float, 0, 1), "nan", "nan is outside [0, 1)"),
    (commands.positive, "0", "0 must be above 0"),
    (commands.positive, "inf", "inf must be above 0"),
    (commands.at_least(0), "9" * 5000, f"'{'9' * 40}' must be an integer of at least 0, and at "
     "most 10^9"),
    (commands.number(int, 0, 2**63), str(2**64), f"{2**64} is outside [0, {2**63})"),
    (commands.filled, "", "it is empty: give a name, or leave the flag out"),
    (commands.filled, " ", "it is empty: give a name, or leave the flag out"),
    (commands.usable_device, "meta", "'meta' cannot be used here: try cpu"),
    (commands.usable_device, "hpu", "'hpu' cannot be used here: try cpu"),
    (commands.usable_device, "privateuseone", "'privateuseone' cannot be used here: try cpu"),
    (commands.usable_device, "toaster", "'toaster' cannot be used here: try cpu")])
def test_flag_types_say_what_is_wrong(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert str(caught.value) == words



# ---- signals ------------------------------------------------------------------------------------
def test_sigterm_cleans_up_and_exits_143():
    seen = []

    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            seen.append("cleaned")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        commands.command(main)
    assert end.value.code == 143
    assert seen == ["cleaned"]
    assert signal.getsignal(signal.SIGTERM) == before


IMPORTING = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
sys.modules["__main__"].__file__ = {str(ROOT / "train.py")!r}
import quiet
try:
    os.kill(os.getpid(), signal.SIGINT)
finally:
    print("a handler of Python ran")
"""


def test_ctrl_c_during_imports_is_quiet_in_commands_only():
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT           # which a shell shows as 130
    assert done.stdout == done.stderr == ""
    other = IMPORTING.replace("train.py", "tests/some.py")
    done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert "KeyboardInterrupt" in done.stderr


# ---- memory -------------------------------------------------------------------------------------
def test_a_command_keeps_the_memory_of_tensors_that_are_gone(monkeypatch):
    told = {}
    library = SimpleNamespace(mallopt=told.__setitem__)
    monkeypatch.setattr(commands.ctypes, "CDLL", lambda name: library)
    commands.command(lambda: None)
    assert told == {-3: 2**30, -1: 2**30}              # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


@pytest.mark.parametrize("error", [OSError, AttributeError, TypeError])
def test_a_system_without_that_option_does_without(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(commands.ctypes, "CDLL", fail)
    commands.keep_memory()


# ---- progress -----------------------------------------------------------------------------------
def bar_output(monkeypatch, seconds: float) -> list[str]:
    """What 100 steps of a bar print on a stderr that is no terminal, with a line per `seconds`."""
    monkeypatch.setattr(commands, "LINE_SECONDS", seconds)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    for _ in commands.Bar(range(100), "train"):
        time.sleep(0.002)
    return out.getvalue().splitlines()


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    started = time.monotonic()
    lines = bar_output(monkeypatch, 0.05)
    assert 3 <= len(lines) <= (time.monotonic() - started) / 0.05 + 2
    assert all("train" in line and "/100" in line for line in lines)
    assert "100/100" in lines[-1]
    assert len(bar_output(monkeypatch, 30)) <= 2       # the first and the last
