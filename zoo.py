"""The authors' released networks by name.

    python upscale.py photo.jpg --weights zoo:drn_s
    python train.py --arch drn_s --prune 0.3 --pretrained zoo:drn_s --data DIR

A name is fetched once (download.py), into the folder ~/.cache/drc (or $XDG_CACHE_HOME/drc). It
stands for a file, the architecture and the scale that belong to it, and, where the network is
pruned, the widths of its layers. `models.load` takes such names wherever it takes files.

Not here: the networks (backbones/), the files' names and shapes (models.load_state).
"""
import os
from pathlib import Path
from typing import NamedTuple

from download import fetch

PREFIX = "zoo:"


class Released(NamedTuple):
    """A file of the authors."""
    url: str
    arch: str
    scale: int = 4
    widths: tuple[int, ...] | None = None    # in the order of pairs(); None: not pruned


# The channel numbers that the authors searched, from their channel files.
DRN_S30 = (12, 20) + tuple(4 * n for n in (
    9, 10, 10, 11, 9, 10, 11, 10, 9, 11, 10, 9, 11, 9, 9, 10, 10, 10, 11, 11, 9, 10, 9, 11, 10, 11,
    11, 11, 10, 10, 10, 11, 10, 11, 10, 11, 10, 10, 11, 11, 10, 10, 11, 9, 11, 10, 11, 11, 10, 11,
    11, 11, 10, 11, 11, 10, 11, 10, 11, 11, 11, 11))
SWINIR_LIGHT_DRC = tuple(4 * n for n in (
    12, 16, 12, 9, 12, 9, 12, 9, 12, 9, 12, 12, 9, 12, 12, 12, 9, 12, 12, 9, 12, 10, 12, 10, 12, 19,
    12, 9, 12, 9, 12, 9, 9, 9, 12, 12, 12, 9, 12, 9, 9, 9, 12, 16, 12, 16, 12, 18))
DCLS_DRC = tuple(4 * n for n in (
    5, 10, 11, 45, *(11,) * 13, 5, 10, *(11,) * 5, 5, *(11,) * 7, 9, *(11,) * 24))

RELEASES = "https://github.com/guoyongcs"
NETWORKS = {
    "drn_s": Released(f"{RELEASES}/DRN/releases/download/v0.1/DRNS4x.pt", "drn_s"),
    "drn_l": Released(f"{RELEASES}/DRN/releases/download/v0.1/DRNL4x.pt", "drn_l"),
    "drn_s30": Released(f"{RELEASES}/DRC/releases/download/v1.1/DRNS_4x_Prune_30.pt", "drn_s", 4,
                        DRN_S30),
    "swinir": Released(f"{RELEASES}/DRC/releases/download/v1.0/SwinIR_Dual_Regression.pth",
                       "swinir"),
    "swinir_light_drc": Released(f"{RELEASES}/DRC/releases/download/v1.0/SwinIR_light_DRC.pth",
                                 "swinir_light", 4, SWINIR_LIGHT_DRC),
    "dat": Released(f"{RELEASES}/DRC/releases/download/v1.0/DAT_Dual_Regression.pth", "dat"),
    "dcls_drc": Released(f"{RELEASES}/DRC/releases/download/v1.0/DCLSx4_setting2_DRC.pth", "dcls",
                         4, DCLS_DRC),
}


def is_name(path: str | os.PathLike) -> bool:
    """Whether a network is given by its name here, and not by a file."""
    return str(path).startswith(PREFIX)


def find(name: str) -> tuple[Path, Released]:
    """(its file, what is known of it) for "zoo:drn_s"; downloads it the first time.

    ValueError: an unknown name, or the file cannot be had; see download.fetch.
    """
    short = name.removeprefix(PREFIX)
    if short not in NETWORKS:
        known = ", ".join(PREFIX + key for key in NETWORKS)
        raise ValueError(f"{name}: there is no such released network, choose one of {known}")
    released = NETWORKS[short]
    return fetch(released.url, folder() / released.url.rpartition("/")[2]), released


def folder() -> Path:
    """Where fetched files are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "drc"
