"""Attacks the project: random command lines and hostile files, none of which may give a traceback.

    python -m bench.attack --lines 1000 --files 100 --seed 1

A command line is drawn from the flags of train.py, upscale.py, evaluate.py and report.py, with good
values, values at the border, nonsense, and paths of everything that a disk can hold. It runs in
this process, on networks of a few hundred weights, with `train.fit` cut short by small numbers of
steps. A hostile file is a good checkpoint, stage file, config.json, report.json, log.jsonl,
channels.json or picture that was damaged at random: bytes flipped or cut, entries replaced by
values of another kind. What ends with an exit code and a sentence held; what raises anything else
is printed with its traceback, and the line that shows it again.

Not here: attacks that need a second process (tests/test_owner.py, tests/test_run.py).
"""
import argparse
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import dual
import evaluate
import models
import owner
from backbones.drn import DRN
from run import command, number

COMMANDS = ("train", "upscale", "evaluate", "report")
STRANGE = ["", " ", "0", "-1", "1", "7", "1e300", "nan", "inf", "-inf", "9" * 400, str(2**64),
           "0x10", "1_0", "²", "None", "a=b", "params=0.5", "madds=.01", "drn_tiny:", ":", "/",
           "..", "-", "--", "*", "[", "?", "meta", "hpu", "cuda:99", "\udcff", "ä", "x" * 300,
           "a\nb"]
KINDS = [None, True, 0, -1, 2**70, 1.5, float("nan"), "x", "", [], [1], {}, {"a": 1}, {1: 2}, (1,),
         torch.ones(1), torch.ones(2, 2), torch.tensor(3), torch.empty(2, device="meta"),
         torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.ones(0)]


# ---- the place ----------------------------------------------------------------------------------
def furnish(root: Path) -> list[str]:
    """Makes files of every kind in a folder; returns their paths, relative to it."""
    noise = np.random.RandomState(0).randint(0, 256, (48, 40, 4)).astype(np.uint8)
    (root / "photos").mkdir()
    for name, array in (("a.png", noise[..., :3]), ("b.png", noise), ("c.bmp", noise[..., 0])):
        Image.fromarray(array).save(root / "photos" / name)
    Image.fromarray(noise[..., :3]).save(root / "photos" / "d.jpg")
    (root / "small").mkdir()
    Image.fromarray(noise[:5, :5, :3]).save(root / "small" / "s.png")
    (root / "empty").mkdir()
    torch.manual_seed(0)
    model = models.build("drn_tiny", 4)
    duals = dual.make_duals(model)
    torch.save(models.checkpoint(model, duals), root / "ours.pt")
    torch.save(model.state_dict(), root / "official.pt")
    torch.save([d.state_dict() for d in duals], root / "duals.pt")
    (root / "channels.txt").write_text("\n".join(map(str, model.widths.values())))
    (root / "text.txt").write_text("nothing")
    (root / "zero").write_bytes(b"")
    (root / "ring").symlink_to("ring")
    (root / "gone").symlink_to("nowhere")
    os.mkfifo(root / "pipe")
    return ["photos", "photos/a.png", "photos/b.png", "photos/d.jpg", "photos/*.png", "small",
            "empty", "ours.pt", "official.pt", "duals.pt", "channels.txt", "text.txt", "zero",
            "ring", "gone", "pipe", ".", "missing", "missing/x.png", "new", "new.png", "photos/",
            "ring/x.png"]


@contextlib.contextmanager
def place():
    """Within it the working folder is a new, furnished one, and drn_tiny exists; yields paths."""
    before = os.getcwd()
    sizes = {4: dict(feats=8, blocks=1)}
    models.PRESETS["drn_tiny"] = (DRN, sizes)
    with tempfile.TemporaryDirectory() as folder:
        paths = furnish(Path(folder))
        os.chdir(folder)
        try:
            yield paths
        finally:
            os.chdir(before)
            del models.PRESETS["drn_tiny"]


def run(name: str, arguments: list[str]) -> tuple[object, str]:
    """(exit code or traceback, what was printed) of `python NAME.py ARGUMENTS`, in this process."""
    module = importlib.import_module(name)
    argv, sys.argv = sys.argv, [f"{name}.py", *arguments]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            said.reconfigure = lambda **_: None           # upscale.py does so with stdout
            command(module.main)
        return 0, said.getvalue()
    except SystemExit as end:
        if end.code in (130, 143):               # somebody wants the attack to stop
            raise KeyboardInterrupt from end
        return end.code, said.getvalue()
    except BaseException:
        return traceback.format_exc(), said.getvalue()
    finally:
        sys.argv = argv
        owner.HELD.clear()           # the locks of what would have been a process of its own


# ---- random command lines -----------------------------------------------------------------------
def flags_of(name: str) -> dict[str, list[str] | None]:
    """{flag: its choices; [] for any value; None for none} of a command, from its own help."""
    module = importlib.import_module("flags" if name == "train" else name)
    found = {}
    add = argparse.ArgumentParser.parse_args

    def spy(parser, argv=None, namespace=None):
        for action in parser._actions:
            for flag in action.option_strings:
                takes = action.nargs != 0
                found[flag] = [str(c) for c in action.choices or []] if takes else None
        raise SystemExit

    argparse.ArgumentParser.parse_args = spy
    try:
        module.parse_args([])
    except SystemExit:
        pass
    finally:
        argparse.ArgumentParser.parse_args = add
    return {flag: choices for flag, choices in found.items() if flag not in ("-h", "--help")}


SMALL = {   # what keeps a command that is right to a second
    "train": ["--arch", "drn_tiny", "--pictures", "3", "--patch", "16", "--batch", "1", "--steps",
              "1", "--search-steps", "1", "--tune-steps", "1", "--test", "photos"],
    "upscale": ["photos/a.png"], "evaluate": ["--data", "photos"],
    "report": ["ours.pt", "--test", "photos"]}


def random_line(rng: random.Random, name: str, flags: dict, paths: list[str]) -> list[str]:
    """Arguments of a command: mostly right ones, a few flags with whatever comes."""
    line = list(SMALL[name]) if rng.random() < 0.8 else []
    for flag in rng.sample(sorted(flags), rng.choice([0, 1, 1, 2, 2, 3, 5])):
        choices = flags[flag]
        if choices is None:
            line.append(flag)
        elif choices and rng.random() < 0.8:
            line += [flag, rng.choice(choices)]
        else:
            line += [flag, rng.choice(paths if rng.random() < 0.6 else STRANGE)]
    if name in ("upscale", "report") and rng.random() < 0.4:
        line.append(rng.choice(paths + STRANGE))
    if name in ("upscale", "evaluate") and rng.random() < 0.6:
        line += rng.choice([["--bicubic", "--scale", "2"], ["--weights", "ours.pt"]])
    if "--device" not in line:
        line += ["--device", "cpu"]
    return line


def affordable(line: list[str]) -> bool:
    """Whether a right command would end soon: not with a published network, or a million steps, or
    through a compiler.
    """
    return not {"default", "paper", "--compile"} & set(line)


def attack_lines(rng: random.Random, count: int) -> int:
    """Runs `count` random command lines; returns how many failed."""
    flags = {name: flags_of(name) for name in COMMANDS}
    failures = 0
    for i in range(count):
        with place() as paths:
            name = rng.choice(COMMANDS)
            line = random_line(rng, name, flags[name], paths)
            if affordable(line):
                failures += judged(name, line, f"line {i}")
    return failures


def judged(name: str, line: list[str], title: str) -> bool:
    """Whether this command line fails other than by a sentence; prints it then."""
    start = time.monotonic()
    code, said = run(name, line)
    wrong = isinstance(code, str) or code not in (0, 1, 2) or "Traceback" in said
    if code in (1, 2) and "error:" not in said:
        wrong = True
    seconds = time.monotonic() - start
    if seconds > 60:
        print(f"{title}: {seconds:.0f} s for {name} {line}", flush=True)
    if wrong:
        print(f"\n---- {title}: python {name}.py {line}\n{code}\n{said[-500:]}", flush=True)
    return wrong


# ---- hostile files ------------------------------------------------------------------------------
def finished_run(root: Path) -> None:
    """Makes a finished run in `root`, of which a copy is damaged each time."""
    with place():
        code, said = run("train", [*SMALL["train"], "--prune", "0.3", "--device", "cpu", "--run",
                                   str(root)])
        if code:
            raise ValueError(f"a run that is right failed: {said}")


def twisted(rng: random.Random, content):
    """The content of a file with one entry, anywhere in it, replaced by a value of another kind."""
    if isinstance(content, (dict, list)) and content and rng.random() < 0.8:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = rng.choice(keys)
        changed = content.copy()
        if rng.random() < 0.15:
            del changed[key]
        else:
            changed[key] = twisted(rng, content[key])
        return changed
    return rng.choice(KINDS)


def damage(rng: random.Random, file: Path) -> str:
    """Damages a file; returns how."""
    blob = file.read_bytes()
    way = rng.choice(["cut", "flipped", "twisted", "twisted", "twisted", "gone", "nested", "other"])
    if way == "cut":
        file.write_bytes(blob[:rng.randrange(len(blob) + 1)])
    elif way == "flipped":
        changed = bytearray(blob)
        for _ in range(rng.choice([1, 10, 100])):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
    elif way == "gone":
        file.unlink()
    elif way == "nested":
        file.write_bytes(b'{"a":' * 5000 + b"1" + b"}" * 5000)
    elif way == "other":
        others = [b"", b"[]", b"5", b"PK\x03\x04", b"\x80\x02]q\x00.", b"\xff" * 99]
        file.write_bytes(rng.choice(others))
    elif file.suffix == ".pt":
        torch.save(twisted(rng, torch.load(file, weights_only=True)), file)
    elif file.suffix == ".json":
        content = twisted(rng, json.loads(blob))
        file.write_text(json.dumps(content, default=str, skipkeys=True))
    elif file.suffix == ".jsonl":
        lines = blob.decode().splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(twisted(rng, json.loads(lines[at])), default=str, skipkeys=True)
        file.write_text("\n".join(lines))
    return way


def attack_files(rng: random.Random, count: int) -> int:
    """Damages `count` files, gives each to what reads it; returns how many commands failed."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        finished_run(whole)
        names = [file.name for file in sorted(whole.iterdir())
                 if file.suffix in (".pt", ".json", ".jsonl")]
        for i in range(count):
            with place():
                shutil.copytree(whole, "run")
                name = rng.choice([*names, "photos/a.png", "photos/d.jpg", "ours.pt", "duals.pt"])
                file = Path(name) if Path(name).exists() else Path("run") / name
                way = damage(rng, file)
                for script, line in readers(file):
                    failures += judged(script, [*line, "--device", "cpu"], f"{name} {way} {i}")
    return failures


def readers(file: Path) -> list[tuple[str, list[str]]]:
    """The command lines that read a file."""
    train = ("train", [*SMALL["train"], "--prune", "0.3", "--run", "run"])
    if file.suffix in (".png", ".jpg"):
        return [("upscale", [str(file), "--bicubic", "--scale", "2"]),
                ("evaluate", ["--bicubic", "--scale", "4", "--data", "photos"])]
    if file.parent == Path("run"):
        lines = [("report", ["run", "--test", "photos"]), train]
        if file.suffix == ".pt":
            lines.append(("upscale", ["photos/a.png", "--weights", str(file)]))
        return lines
    flag = "--pretrained" if file.name == "ours.pt" else "--pretrained-dual"
    return [("train", [*SMALL["train"], "--pretrained", "official.pt", flag, str(file)]),
            ("evaluate", ["--data", "photos", "--weights", str(file)])]


def cheap_count(model, *_) -> evaluate.Cost:
    """Stands in for evaluate.count, which takes most of a small run's time."""
    params = sum(p.numel() for p in model.parameters())
    return evaluate.Cost(params, params)


# ---- the command --------------------------------------------------------------------------------
def main() -> None:
    parser = argparse.ArgumentParser(description="Random command lines and hostile files.",
                                     allow_abbrev=False)
    parser.add_argument("--lines", type=number(int, 0), default=300, metavar="N")
    parser.add_argument("--files", type=number(int, 0), default=100, metavar="N")
    parser.add_argument("--seed", type=number(int, 0), default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data.PHOTOGRAPHS = ("chelsea.png",)          # the smallest
    evaluate.count = cheap_count
    failures = attack_lines(random.Random(args.seed), args.lines)
    failures += attack_files(random.Random(args.seed), args.files)
    print(f"{args.lines} command lines, {args.files} files: {failures} without a sentence")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    command(main)
