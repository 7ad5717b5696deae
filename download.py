"""Fetches picture sets and released weights, once.

    python data.py get DIV2K --root datasets          # then: train.py --data datasets
    python data.py get Set5 --root datasets           # then: --data datasets/benchmark/Set5

A download that broke off goes on where it stopped, also when the command is given again. Its size
is compared with what the server says. The SHA-256 of the first download is remembered, and another
file under the same address is refused. An archive is looked through before anything is unpacked: no
file may leave the folder, and there may be no link and no device in it.

Not here: released networks by name (zoo.py, which uses `fetch`), what is read from the folders
(data.py).
"""
import argparse
import errno
import hashlib
import http.client
import json
import os
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from run import Bar, length, read_json, write_file

TRIES = 5                        # connections in a row that bring nothing new
TIMEOUT = 30.0                   # seconds without an answer
PAUSE = 2.0                      # seconds before the next try
CHUNK = 1 << 20                  # bytes


# ---- one file -----------------------------------------------------------------------------------
def fetch(url: str, target: Path) -> Path:
    """Downloads `url` to the file `target`, unless it is there; returns it.

    Until it is complete it is called target.part. ValueError: no connection, a file that is not the
    one of the first download, a full disk; the sentence says what to fetch by hand, or what to do.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    failures = 0
    while True:
        before = length(part)
        try:
            receive(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise ValueError(f"{part}: the disk is full, make room and try again") from error
            failures = 1 if length(part) > before else failures + 1
            final = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if final or failures == TRIES:
                reason = getattr(error, "reason", None) or error
                raise ValueError(f"cannot fetch {url} ({reason}): fetch it by hand and save it as "
                                 f"{target}") from error
            time.sleep(PAUSE)
    check_and_remember(url, part, target)
    os.replace(part, target)
    part.with_name(part.name + ".version").unlink(missing_ok=True)
    return target


def receive(url: str, part: Path) -> None:
    """Appends to `part` what it still lacks.

    OSError or HTTPException: the connection broke. ValueError: the disk is too small.
    """
    have = length(part)
    mark = part.with_name(part.name + ".version")    # the server's name for what `part` began with
    request = urllib.request.Request(url, headers={"User-Agent": "drc"})
    if have and mark.exists():
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", mark.read_text())
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return                       # nothing is missing: it was stopped just before the end
        raise
    with answer:
        if answer.status != 206:         # the whole file: another version, or it cannot continue
            have = 0
            remember_version(answer.headers, mark)
        rest = int(answer.headers.get("Content-Length", 0))
        check_space(part.parent, rest)
        with (open(part, "ab" if have else "wb") as file,
              Bar(desc=url.rpartition("/")[2], total=have + rest or None, initial=have, unit="B",
                   unit_scale=True, delay=2, dynamic_ncols=True) as bar):
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if rest and length(part) != have + rest:
        raise ConnectionError(f"it ended after {length(part)} of {have + rest} bytes")


def remember_version(headers, mark: Path) -> None:
    """Writes to `mark` what the server calls this version of the file: its ETag or its date."""
    version = headers.get("ETag", "")
    if not version.startswith('"'):      # W/"...": a weak one says nothing about bytes
        version = headers.get("Last-Modified", "")
    mark.unlink(missing_ok=True)
    if version:
        write_file(mark, version.encode())


def check_space(folder: Path, needed: int) -> None:
    """ValueError where the disk has less than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{folder} needs {needed / 1e9:.1f} GB more, the disk has {free / 1e9:.1f}"
                         f": make room or take another folder")


# ---- what was fetched before --------------------------------------------------------------------
def check_and_remember(url: str, part: Path, target: Path) -> None:
    """Compares the file with the SHA-256 of its first download, in downloads.json beside it.

    ValueError: it is another file; it is deleted.
    """
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    notes = target.with_name("downloads.json")
    known = read_notes(notes)
    first = known.setdefault(target.name, digest)
    if first != digest:
        part.unlink()
        raise ValueError(f"{url} is not the file of the first download (its SHA-256 begins with "
                         f"{digest[:12]}, then {first[:12]}): if you trust the new one, delete "
                         f"{notes}")
    write_file(notes, json.dumps(known, indent=1).encode())


def read_notes(notes: Path) -> dict[str, str]:
    """{file name: SHA-256 of its first download}; empty where nothing was fetched yet.

    ValueError: something else is in the file.
    """
    if not notes.exists():
        return {}
    try:
        return read_json(notes, {str: str})
    except ValueError as error:
        raise ValueError(f"{notes} is damaged: delete it") from error


# ---- archives -----------------------------------------------------------------------------------
class Member(NamedTuple):
    """A file in an archive."""
    name: str                            # with folders
    size: int                            # bytes, unpacked
    open: Callable[[], BinaryIO]


def unpack(archive: Path, folder: Path, anchors: tuple[str, ...]) -> int:
    """Unpacks a .zip or .tar and returns how many files there were.

    Of a file's path counts what begins with one of the anchors: with ("gt",), any/thing/gt/1.png
    becomes folder/gt/1.png. Other files are left out, and those that are there already. ValueError:
    a damaged or hostile archive (nothing is unpacked then), a disk that is too small.
    """
    try:
        with closing(open_archive(archive)) as opened:
            wanted = {}
            for member in list_members(opened, archive):
                place = below(member.name, anchors, archive)
                if place is not None:
                    wanted[folder / place] = member
            missing = {file: m for file, m in wanted.items() if length(file) != m.size}
            folder.mkdir(parents=True, exist_ok=True)
            check_space(folder, sum(member.size for member in missing.values()))
            for file, member in Bar(missing.items(), f"unpack {archive.name}", delay=2):
                write_member(member, file, archive)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError,
            NotImplementedError) as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and try again") from error
    if not wanted:
        raise ValueError(f"{archive} holds no folder {' or '.join(anchors)}: its layout has "
                         f"changed, unpack it by hand into {folder}")
    return len(wanted)


def open_archive(archive: Path) -> zipfile.ZipFile | tarfile.TarFile:
    if archive.suffix == ".zip":
        return zipfile.ZipFile(archive)
    return tarfile.open(archive)


def list_members(opened, archive: Path) -> list[Member]:
    """All files of an open archive. ValueError: it holds a link or a device."""
    members = []
    if isinstance(opened, zipfile.ZipFile):
        for info in opened.infolist():
            mode = info.external_attr >> 16
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f"refused: {archive} holds a link or a device, {info.filename}")
            if not info.is_dir():
                members.append(Member(info.filename, info.file_size,
                                      lambda info=info: opened.open(info)))
        return members
    for info in opened.getmembers():
        if not info.isreg() and not info.isdir():
            raise ValueError(f"refused: {archive} holds a link or a device, {info.name}")
        if info.isreg():
            members.append(Member(info.name, info.size,
                                  lambda info=info: opened.extractfile(info)))
    return members


def below(name: str, anchors: tuple[str, ...], archive: Path) -> Path | None:
    """The path of a member from its anchor on; None where it has none.

    ValueError: a path that leaves the folder.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise ValueError(f"refused: {archive} holds a file that would leave its folder, {name!r}")
    for i, part in enumerate(path.parts[:-1]):
        if part in anchors:
            return Path(*path.parts[i:])
    return None


def write_member(member: Member, file: Path, archive: Path) -> None:
    """Writes a member under a temporary name, then renames it. ValueError: another size than said.

    No more is read than the archive's table says, so a bomb cannot fill the disk.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with member.open() as source, open(temporary, "wb") as goal:
            left = member.size + 1
            while left and (chunk := source.read(min(CHUNK, left))):
                goal.write(chunk)
                left -= len(chunk)
        if left != 1:
            raise ValueError(f"{archive} is damaged ({member.name} has another size than its "
                             f"table says): delete it and try again")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


# ---- picture sets -------------------------------------------------------------------------------
class Source(NamedTuple):
    """Where a set comes from, and which folders of its archives go where."""
    urls: tuple[str, ...]
    folder: str                          # below --root
    anchors: tuple[str, ...]


ETH = "https://data.vision.ee.ethz.ch/cvl/DIV2K"
SNU = "https://cv.snu.ac.kr/research/EDSR"
SETS = {
    "DIV2K": Source(
        (f"{ETH}/DIV2K_train_HR.zip", f"{ETH}/DIV2K_train_LR_bicubic_X2.zip",
         f"{ETH}/DIV2K_train_LR_bicubic_X3.zip", f"{ETH}/DIV2K_train_LR_bicubic_X4.zip"),
        "DIV2K", ("DIV2K_train_HR", "DIV2K_train_LR_bicubic")),
    "DIV2K_valid": Source((f"{ETH}/DIV2K_valid_HR.zip",), "DIV2K", ("DIV2K_valid_HR",)),
    "Flickr2K": Source((f"{SNU}/Flickr2K.tar",), "Flickr2K",
                       ("Flickr2K_HR", "Flickr2K_LR_bicubic")),
    "DIV2KRK": Source(
        ("https://www.wisdom.weizmann.ac.il/~vision/kernelgan/DIV2KRK_public.zip",),
        "DIV2KRK", ("gt", "lr_x2", "lr_x4", "gt_k_x2", "gt_k_x4")),
}
for benchmark in ("Set5", "Set14", "B100", "Urban100", "Manga109"):
    SETS[benchmark] = Source((f"{SNU}/benchmark.tar",), "benchmark", (benchmark,))
DF2K = "DF2K"                            # DIV2K and Flickr2K in one folder


def get(name: str, root: Path) -> Path:
    """Lays out a picture set below `root`, as data.open_folder reads it; returns its folder.

    The archives stay in root/archives. ValueError: see `fetch` and `unpack`.
    """
    if name == DF2K:
        for part in ("DIV2K", "Flickr2K"):
            get(part, root)
        join(root / "DIV2K/DIV2K_train_HR", root / "DF2K/DF2K_HR")
        join(root / "DIV2K/DIV2K_train_LR_bicubic", root / "DF2K/DF2K_LR_bicubic")
        join(root / "Flickr2K/Flickr2K_HR", root / "DF2K/DF2K_HR")
        join(root / "Flickr2K/Flickr2K_LR_bicubic", root / "DF2K/DF2K_LR_bicubic")
        return root / DF2K
    source = SETS[name]
    for url in source.urls:
        archive = fetch(url, root / "archives" / url.rpartition("/")[2])
        count = unpack(archive, root / source.folder, source.anchors)
        print(f"{archive.name}: {count} files in {root / source.folder}")
    folder = root / source.folder
    return folder / name if source.folder == "benchmark" else folder


def join(source: Path, target: Path) -> None:
    """Links the files below `source` into `target`, under the same names: no byte is copied."""
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, place)


def main() -> None:
    """The command of data.py."""
    parser = argparse.ArgumentParser(
        prog="data.py", allow_abbrev=False,
        description="Fetch a picture set into the folders that train.py and evaluate.py read.")
    add = parser.add_argument
    add("command", choices=("get",), help="download and unpack a set")
    add("name", choices=(*SETS, DF2K), help="the set")
    add("--root", metavar="DIR", required=True,
        help="folder that holds all sets; the archives stay in DIR/archives")
    args = parser.parse_args()
    folder = get(args.name, Path(args.root))
    print(f"{args.name} is in {folder}")
