"""What the tests of train.py share: a run of seconds, and a look at what it left.

A tiny DRN, "drn_tiny", stands in for the published sizes.
"""
import json
import subprocess
import sys
import time

import torch
from PIL import Image

import leaves
from tiny import ROOT

SIZES = dict(feats=8, blocks=1)
STAGES = ("train", "search", "select", "tune")
DRIVER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import models, run, train
from backbones.drn import DRN
models.PRESETS["drn_tiny"] = (DRN, {{4: {SIZES}}})
run.SAVE_SECONDS = 0
run.command(train.main)
"""
SMALL = ["--pictures", "4", "--patch", "32", "--batch", "1", "--device", "cpu"]
QUICK = ["--arch", "drn_tiny", "--prune", "0.3", "--steps", "8", "--search-steps", "5",
         "--tune-steps", "6", *SMALL]


def process(folder, *more) -> list[str]:
    """The command line of QUICK in a process of its own, which saves after every step."""
    return [sys.executable, "-c", DRIVER, *QUICK, "--run", str(folder), *map(str, more)]


def finish(arguments: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300, **options)


def photo(side: int = 64, seed: int = 0) -> Image.Image:
    """A generated picture that stands in for a photograph."""
    return Image.fromarray(leaves.dead_leaves((seed, 0), side))


def weights(folder, stage: str) -> dict:
    """The content of a stage's file, without what it says of the run that it belongs to."""
    content = torch.load(folder / f"{stage}.pt", weights_only=True)
    content.pop("made")
    return content


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def wait_for(condition, running: subprocess.Popen, seconds: float = 120) -> None:
    start = time.monotonic()
    while not condition():
        assert running.poll() is None, "the process ended before it could be stopped"
        assert time.monotonic() - start < seconds
        time.sleep(0.002)
