"""Decoded pictures on disk: a training step reads pixels and never waits for a decoder.

To decode one PNG of 2040×1356 pixels takes as long as to cut hundreds of patches. So every picture
is decoded once, and its images at all scales are appended, as raw uint8, to one file that is mapped
into memory. Pixels in use stay in the system's file cache, which gives way when memory is needed:
nothing decoded is held by this process. A set of pictures has one folder for its scales:

    DIR/DIV2K_x1-2-4_3fa9c01b/manifest.jsonl   a line for each picture: where its pixels lie
    DIR/DIV2K_x1-2-4_3fa9c01b/pixels.raw       the pixels, one picture after the other

A picture is known by its name and a stamp, made of the sizes and times of change of its files. One
whose files have changed is another picture and is appended, too; when more than half of the file
would be of pictures that no longer exist, all is made anew. What kill -9 leaves is used: a line is
written only when its pixels are safe on the disk.

Not here: what is done with pictures that cannot be decoded. Read gather.py, which uses this, next.
"""
import errno
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import Load, Picture, ahead
from run import length, progress

try:
    import fcntl
except ImportError:                  # Windows: two runs that fill one cache are not kept apart
    fcntl = None

VERSION = 1                          # of what a manifest says, and of how pixels are made
GROUP_SECONDS = 5                    # at most this much work is lost to kill -9
SPARE = 1 << 28                      # bytes that stay free on the disk
MANIFEST = "manifest.jsonl"
PIXELS = "pixels.raw"


class Source(NamedTuple):
    """A picture of a folder, before it is decoded."""
    name: str
    stamp: str                       # another one: another picture
    nbytes: int                      # of all its images, decoded


class Entry(NamedTuple):
    """A line of the manifest."""
    offset: int
    shapes: dict[int, tuple[int, int]]   # {scale: (height, width)}
    broken: str                          # why there are no pixels; empty: there are

    def images(self, pixels: np.ndarray) -> dict[int, np.ndarray]:
        """{scale: uint8 (height, width, 3)}, views of the mapped file."""
        images = {}
        start = self.offset
        for s, (height, width) in self.shapes.items():
            end = start + 3 * height * width
            images[s] = pixels[start:end].reshape(height, width, 3)
            start = end
        return images

    def nbytes(self) -> int:
        """Of all its images."""
        return sum(3 * height * width for height, width in self.shapes.values())


Entries = dict[tuple[str, str], Entry]   # {(name, stamp): entry}


def folder_of(cache: Path, folder: str | os.PathLike, scales: Sequence[int],
              degradation: str = "bicubic") -> Path:
    """Where a cache keeps the pictures of `folder` at these scales, reduced in this way."""
    root = Path(folder).resolve()
    code = hashlib.sha256(f"{root} {scales} {degradation}".encode()).hexdigest()[:8]
    return cache / f"{root.name}_x{'-'.join(map(str, scales))}_{code}"


def open_cache(place: Path, scales: Sequence[int], sources: list[Source], load: Load,
               tidy: bool = True) -> tuple[Load, dict[int, str]]:
    """(how to read picture i, {i: why it could not be decoded}), of the folder `place`.

    load: decodes sources[i]; called, by threads, for pictures that are not there yet. ValueError:
      it cannot be decoded.
    tidy: make all anew where most is of pictures that no longer exist; a run that continues may
      need those.
    OSError, with a sentence: the disk is too small or cannot be written.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place):
            entries = known(place, scales)
            if any(source[:2] not in entries for source in sources):
                fill(place, scales, sources, load, tidy)
                entries = known(place, scales)
            pixels = map_file(place / PIXELS)
    except OSError as error:
        if error.errno is None:          # it is a sentence already
            raise
        what = error.strerror or error
        if error.errno == errno.ENOSPC:
            what = "the disk is full; what is there will be used"
        raise OSError(f"cannot work with the cache {place} ({what}): give --cache DIR on another "
                      f"disk") from error
    wanted = [entries[source[:2]] for source in sources]
    broken = {i: entry.broken for i, entry in enumerate(wanted) if entry.broken}
    return lambda i: Picture(wanted[i].images(pixels)), broken


def known(place: Path, scales: Sequence[int]) -> Entries:
    """What a folder of the cache holds; nothing where there is no such folder."""
    return read_manifest(place, scales)[0]


def first_line(scales: Sequence[int]) -> dict:
    """What a manifest begins with, if it is to be used."""
    return dict(version=VERSION, scales=list(scales))


def map_file(file: Path) -> np.ndarray:
    """The bytes of a file, uint8 (n,), read-only; the system reads them when they are looked at."""
    if not length(file):
        return np.empty(0, np.uint8)
    with open(file, "rb") as opened:
        return np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def read_manifest(place: Path, scales: Sequence[int]) -> tuple[Entries, int]:
    """(the entries of a cache folder, how many bytes of the manifest are good).

    It ends at the first line that is cut off, damaged, or tells of pixels that are not there.
    """
    entries = {}
    good = 0
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):   # ends at such a line
        with open(place / MANIFEST, "rb") as file:
            lines = file.read().splitlines(keepends=True)
        size = (place / PIXELS).stat().st_size
        for line in lines:
            content = json.loads(line)
            if not line.endswith(b"\n") or (not good and content != first_line(scales)):
                break
            if good:
                shapes = {int(s): (int(h), int(w)) for s, (h, w) in content["shapes"].items()}
                entry = Entry(int(content["offset"]), shapes, str(content["broken"]))
                if not 0 <= entry.offset <= entry.offset + entry.nbytes() <= size:
                    break
                entries[str(content["name"]), str(content["stamp"])] = entry
            good += len(line)
    return entries, good


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Within it no other process fills this folder; waits for one that does.

    A folder that cannot be written is used without a lock.
    """
    with ExitStack() as stack:
        file = None
        with suppress(PermissionError):
            file = stack.enter_context(open(place / "lock", "w"))
        if fcntl and file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"cache     another process fills {place}: waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- filling it ---------------------------------------------------------------------------------
def fill(place: Path, scales: Sequence[int], sources: list[Source], load: Load,
         tidy: bool) -> None:
    """Decodes what the folder lacks, in parallel, and appends it. OSError: no room."""
    entries, good = read_manifest(place, scales)
    missing = [i for i, source in enumerate(sources) if source[:2] not in entries]
    end = max((entry.offset + entry.nbytes() for entry in entries.values()), default=0)
    total = sum(source.nbytes for source in sources)
    needed = sum(sources[i].nbytes for i in missing)
    if tidy and end + needed > 2 * total:    # more than half would be of pictures that have gone
        missing = list(range(len(sources)))
        needed = total
        end = 0
    check_room(place, needed, 0 if end else length(place / PIXELS))
    print(f"cache     {needed / 2**30:.2f} GiB of decoded pictures go to {place}, once", flush=True)
    if not end:
        # unlinked and not cut off: another run may have it mapped
        (place / MANIFEST).unlink(missing_ok=True)
        (place / PIXELS).unlink(missing_ok=True)
        (place / PIXELS).touch()
        (place / MANIFEST).write_bytes(json.dumps(first_line(scales)).encode() + b"\n")
        good = (place / MANIFEST).stat().st_size
    workers = processors()
    with (open(place / PIXELS, "r+b") as pixels, open(place / MANIFEST, "r+b") as manifest,
          closing(ahead(attempt(load), missing, workers, 2 * workers)) as results,
          progress("cache", len(sources), len(sources) - len(missing), "picture") as bar):
        pixels.seek(end)
        manifest.truncate(good)
        manifest.seek(good)
        append(pixels, manifest, sources, zip(missing, results), bar.update)


def check_room(place: Path, needed: int, freed: int) -> None:
    """OSError: the disk has no room for `needed` bytes when `freed` bytes are given back first."""
    free = shutil.disk_usage(place).free + freed
    if needed + SPARE > free:
        raise OSError(f"{place} has {free / 2**30:.2f} GiB of free space, the decoded pictures "
                      f"take {needed / 2**30:.2f} GiB: give --cache DIR on a larger disk, or a "
                      f"--memory that holds them all")


def processors() -> int:
    """How many CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def attempt(load: Load) -> Callable[[int], Picture | str]:
    """`load`, but for a picture that cannot be decoded it returns the sentence that says why."""
    def load_or_say(i: int) -> Picture | str:
        try:
            return load(i)
        except ValueError as error:
            return str(error)
    return load_or_say


def append(pixels, manifest, sources: list[Source], results: Iterator[tuple[int, Picture | str]],
           done: Callable[[], None]) -> None:
    """Writes the results to both files, the lines always after their pixels.

    results: (i, picture i or what is wrong with it); done: called after each.
    """
    lines = []
    written = time.monotonic()

    def commit() -> None:
        for file, content in ((pixels, b""), (manifest, b"".join(lines))):
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        lines.clear()

    for i, result in results:
        source = sources[i]
        line = dict(name=source.name, stamp=source.stamp, offset=pixels.tell(), shapes={},
                    broken="")
        if isinstance(result, str):
            line["broken"] = result
        else:
            for s, image in sorted(result.images.items()):
                line["shapes"][s] = image.shape[:2]
                pixels.write(np.ascontiguousarray(image))
        lines.append(json.dumps(line).encode() + b"\n")
        done()
        if time.monotonic() - written > GROUP_SECONDS:
            commit()
            written = time.monotonic()
    commit()
