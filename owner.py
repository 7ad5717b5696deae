"""Whose folder it is: one process at a time, one run, and nobody else's files.

`lock` keeps a second process out. `check_config` compares the settings that stand in the folder
with those of now. `digest` is a fingerprint of settings and of finished stages: each stage's file
holds that of the settings and of the stage before it, so that run.py can tell a stage of this run
from one of another. Read run.py next.
"""
import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from commands import WrongUsage
from disk import read_json, real

STAGES = ("train", "search", "select", "tune")
NAMES = {"config.json", "log.jsonl", "channels.json", "latency.json", "report.json", "report.html",
         "comparison.png", "kernels.json", "pictures.json", "progress.pt",
         *(f"{stage}.pt" for stage in STAGES)}


def has_work(folder: Path) -> bool:
    """Whether anything is finished or saved there; before that, flags may still be corrected."""
    return any((folder / f"{stage}.pt").exists() for stage in ("progress", *STAGES))


def refuse_strangers(folder: Path) -> None:
    """WrongUsage: no run, but files with names that a run would overwrite."""
    if (folder / "config.json").exists() or has_work(folder):
        return
    found = sorted(name for name in NAMES if (folder / name).exists())
    if found:
        raise WrongUsage(f"{folder} is no run folder and holds a {found[0]}, which would be "
                         f"overwritten: give another folder with --run")


HELD = {}    # {folder: its open lock file}; the system unlocks it when the process ends


def lock(folder: Path) -> None:
    """Keeps other processes out of a folder. ValueError: one works in it already."""
    if real(folder) in HELD:
        return
    try:
        import fcntl
    except ImportError:                      # Windows
        return
    file = open(folder / ".lock", "a")       # noqa: SIM115, it stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder} is in use by another process: wait until it ends, or give "
                         f"another folder with --run") from None
    except OSError:                          # some network file systems have no locks
        print(f"note: {folder} cannot be locked: let one process at a time work in it")
    HELD[real(folder)] = file


def known_config(folder: Path) -> dict | None:
    """What config.json holds; None: it is missing, or damaged, in a folder with work.

    WrongUsage: it is no such file, and there is no work.
    """
    file = folder / "config.json"
    if not file.exists():
        return None
    try:
        return read_json(file)
    except ValueError as error:
        if not has_work(folder):
            raise WrongUsage(f"{error}: move it away, or give another folder with --run") from error
    return None


def as_json(config: dict) -> dict:
    """The config as it would be read back: tuples become lists."""
    return json.loads(json.dumps(config))


def check_config(folder: Path, known: dict, config: dict) -> None:
    """WrongUsage: known, the content of the folder's config.json, is not that of this config."""
    if known.keys() != config.keys():
        raise WrongUsage(f"{folder} was made by another version of this program, its config.json "
                         f"has other entries: give another folder with --run")
    now = as_json(config)
    # the preset explains the others; --steps implies continue_training, which is no flag
    for name in sorted(now, key=lambda name: (name != "preset", name == "continue_training", name)):
        if not equal(known[name], now[name]) and has_work(folder):
            flag = "--" + name.replace("_", "-")
            raise WrongUsage(f"{folder} was made with {flag} {known[name]}, now it is {now[name]}: "
                             f"give the same flags to continue it, or another folder with --run")


def equal(known, now) -> bool:
    """Whether two settings are the same; two paths are, where they lead to the same place."""
    if isinstance(known, str) and isinstance(now, str):
        return known == now or real(known) == real(now)
    return known == now and type(known) is type(now)


def digest(content) -> str:
    """A number for the content of a stage or of a config: equal contents have equal ones."""
    state = hashlib.sha256()
    feed(state, content)
    return state.hexdigest()


def feed(state, content) -> None:
    """Adds nested containers of tensors, numbers and texts to a hash."""
    if isinstance(content, Tensor):
        flat = content.detach().cpu().flatten().contiguous()
        state.update(f"{content.dtype} {tuple(content.shape)}".encode())
        state.update(flat.view(torch.uint8).numpy())
    elif isinstance(content, dict):
        state.update(b"{")
        for name, each in sorted(content.items()):
            feed(state, name)
            feed(state, each)
    elif isinstance(content, (list, tuple)):
        state.update(b"[")
        for each in content:
            feed(state, each)
    else:
        state.update(f"{content!r},".encode())
