"""Ctrl-C while PyTorch is imported, which takes seconds, ends a command without a traceback.

A command imports this file before anything else. `commands.command` gives ctrl-C its usual meaning
back. Where something else was started (the tests, a program that imports this one), nothing is
changed.
"""
import signal
import sys
from pathlib import Path

started = Path(getattr(sys.modules["__main__"], "__file__", None) or "/")
if (Path(__file__).resolve().parent in started.resolve().parents
        and "tests" not in started.parts
        and signal.getsignal(signal.SIGINT) == signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
