"""The training pictures of a folder: every file looked at, and decoded once, before the first step.

A night of training must not end because of one file. So all headers are read first, which takes
seconds, then everything is decoded: into memory where --memory holds it, else into the cache on
disk (cache.py). After that no file of the folder is opened again, whatever happens to it.

A picture that cannot be used (unreadable, smaller than a patch, of another size than its reduction
says) is named and skipped: its place is taken by the next one that can be used, so all others keep
their places, and a batch depends on (seed, step, files) alone. More than 5 % of them are an error,
with --strict one is.

The run folder keeps in pictures.json which pictures a run began with, with a stamp of their files'
sizes and times of change, and what was wrong with which. A run that continues takes these: a file
that was added is left out, one that was changed or removed comes from the cache, as it was. Where
there is no cache a changed file is used as it is now, and one that is gone is skipped. Each of it
is said.

Not here: test pictures; they are few, and the first broken one is an error (data.open_folder).
"""
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from cache import Entries, Source, attempt, folder_of, known, open_cache, processors
from data import Files, Load, Pictures, ahead, check_match, decode, list_folder
from files import MAX_PIXELS, look
from parallel import is_main
from run import has_work, progress, read_json, write_file

CACHE = Path("runs", ".cache")       # where decoded pictures go, unless --cache says otherwise
TOLERATED = 0.05                     # the part of the pictures that may be unusable
SHOWN = 5                            # as many are named on the screen; pictures.json names all
RECORD = "pictures.json"
FORM = dict(folder=str, cache=(str, None), pictures={str: str}, broken={str: str})


class Wishes(NamedTuple):
    """What a run wants of its pictures."""
    patch: int                       # the side of its largest patch, in pixels of an original
    memory: int                      # bytes that decoded pictures may take in memory
    cache: Path | None               # where to keep them on disk; None: only where memory is short
    strict: bool                     # one unusable picture is an error
    degradation: str = "bicubic"     # how small images are made (data.list_folder)


# ---- headers ------------------------------------------------------------------------------------
def survey(files: Files, patch: int) -> tuple[list[Source], dict[str, str]]:
    """([each picture], {name: why it cannot be used}) by what the files' headers say."""
    def look_at(i: int) -> tuple[Source, str]:
        try:
            return examine(files, i, patch), ""
        except (ValueError, OSError) as error:       # OSError: it was removed just now
            return Source(files.names[i], "", 0), str(error)

    sources = []
    broken = {}
    count = len(files.names)
    with (closing(ahead(look_at, range(count), 8, 64)) as results,
          progress("headers", count, unit="picture") as bar):
        for source, why in results:
            sources.append(source)
            if why:
                broken[source.name] = why
            bar.update()
    return sources, broken


def examine(files: Files, i: int, patch: int) -> Source:
    """Picture i by its headers. ValueError: they show that it cannot be used."""
    high_file = files.high[i]
    largest = files.scales[-1]
    high = sides(high_file)
    if min(high) < patch:
        raise ValueError(f"{high_file} ({high[1]}x{high[0]} pixels) is smaller than the patch "
                         f"({patch}): choose a smaller patch or remove the picture")
    for s, low_file in files.lows[i].items():
        low = sides(low_file)
        turned = (high[0] < high[1]) != (low[0] < low[1])    # a camera's, which EXIF puts upright
        check_match(high, high_file, low[::-1] if turned else low, low_file, largest // s)
    pixels = sum((high[0] // largest * s) * (high[1] // largest * s) for s in files.scales)
    stats = [os.stat(file) for file in (high_file, *files.lows[i].values())]
    times = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    stamp = hashlib.sha256(repr(times).encode()).hexdigest()[:16]
    return Source(files.names[i], stamp, 3 * pixels)


def sides(file: Path) -> tuple[int, int]:
    """(height, width) by the header. ValueError: it cannot be read, or the picture is too large."""
    height, width, _ = look(file)
    if height * width == 1 or height * width > MAX_PIXELS:
        decode(file)                     # it says what is wrong
    return height, width


# ---- the pictures of a run ----------------------------------------------------------------------
def training_pictures(folder: str, scales: Sequence[int], wishes: Wishes, run: Path) -> Pictures:
    """All pictures of a folder (data.list_folder), decoded, for the run in the folder `run`.

    The set has a place for each picture, see above. ValueError: too many cannot be used, or what
    data.list_folder raises; OSError: no room for the cache.
    """
    files = list_folder(folder, scales, wishes.degradation)
    sources, broken = survey(files, wishes.patch)
    at_hand = {source[:2]: i for i, source in enumerate(sources)}
    # of several processes (parallel.py) the others begin with what the first one found
    record = read_record(run) if has_work(run) or not is_main() else None
    began = record["pictures"] if record else dict(source[:2] for source in sources)
    cache = choose_cache(wishes, record, sum(source.nbytes for source in sources))
    place = cache and folder_of(cache, folder, files.scales, files.degradation)
    if record:
        stored = known(place, files.scales) if place else {}
        sources, broken = as_begun(folder, began, sources, broken, stored, wishes.strict)
    judge = partial(check, run, folder, cache, began, strict=wishes.strict)
    judge(broken)
    usable = [source for source in sources if source.name not in broken]

    def load(i: int):
        if usable[i][:2] not in at_hand:
            raise ValueError(f"{usable[i].name} is no longer in {folder}")
        return files.load(at_hand[usable[i][:2]])

    if place:
        load, failed = open_cache(place, files.scales, usable, load, tidy=not record)
    else:
        load, failed = keep(load, len(usable))
    broken = broken | {usable[i].name: why for i, why in failed.items()}
    judge(broken)
    size = sum(source.nbytes for source in usable) / 2**30
    where = f"decoded in {place}" if place else f"decoded in memory ({size:.2f} GiB)"
    name_broken(broken)
    print(f"data      {len(sources) - len(broken):,} of {len(sources):,} pictures of {folder}, "
          f"{where}")
    number = {source.name: i for i, source in enumerate(usable)}
    chosen = places([source.name not in broken for source in sources])
    names = [sources[i].name for i in chosen]
    return Pictures(names, lambda i: load(number[names[i]]), files.scales)


def choose_cache(wishes: Wishes, record: dict | None, nbytes: int) -> Path | None:
    """The folder of caches; None where the pictures, of so many bytes, are kept in memory."""
    if wishes.cache:
        return wishes.cache
    if record and record["cache"]:       # it may hold what is no longer in the folder
        return Path(record["cache"])
    return CACHE if nbytes > wishes.memory else None


def keep(load: Load, count: int) -> tuple[Load, dict[int, str]]:
    """Decodes pictures 0 to count − 1 into memory, in parallel; returns what open_cache does."""
    kept = []
    workers = processors()
    with (closing(ahead(attempt(load), range(count), workers, 2 * workers)) as results,
          progress("decode", count, unit="picture") as bar):
        for result in results:
            kept.append(result)
            bar.update()
    failed = {i: result for i, result in enumerate(kept) if isinstance(result, str)}
    return kept.__getitem__, failed


def places(usable: Sequence[bool]) -> list[int]:
    """Which picture stands in each place: its own, or the next one that can be used.

    After the last comes the first.
    """
    following = usable.index(True)
    chosen = []
    for i in reversed(range(len(usable))):
        if usable[i]:
            following = i
        chosen.append(following)
    return chosen[::-1]


# ---- the run's record ---------------------------------------------------------------------------
def read_record(run: Path) -> dict | None:
    """pictures.json of a run: {"folder", "cache", "pictures": {name: stamp}, "broken": {name: why
    it could not be used}}; None: there is none. ValueError: it is damaged.
    """
    file = run / RECORD
    if not file.exists():
        return None
    try:
        return read_json(file, FORM)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: remove it, and the run goes on with the pictures "
                         f"that are there now") from error


def check(run: Path, folder: str, cache: Path | None, began: dict[str, str],
          broken: dict[str, str], strict: bool) -> None:
    """Writes the run's record. ValueError: more pictures cannot be used than are tolerated.

    began: {name: stamp} of all pictures the run began with; broken: {name: why it cannot be used}.
    """
    record = dict(folder=str(folder), cache=cache and str(cache.resolve()), broken=broken,
                  pictures=began)
    if is_main():
        write_file(run / RECORD, json.dumps(record, indent=1).encode())
    if not broken or (not strict and len(broken) <= TOLERATED * len(began)):
        return
    reasons = list(broken.values())
    listed = "; ".join(reasons[:SHOWN])
    if len(reasons) > SHOWN:
        listed += f"; and {len(reasons) - SHOWN} more"
    limit = "none may be, with --strict" if strict else f"at most {TOLERATED:.0%} may be"
    raise ValueError(f"{len(broken)} of {len(began)} pictures of {folder} are unusable ({limit}; "
                     f"{run / RECORD} names all): {listed}")


def name_broken(broken: dict[str, str]) -> None:
    """Prints which pictures are skipped, and why."""
    reasons = list(broken.values())
    for why in reasons[:SHOWN]:
        print(f"skipped   {why}")
    if len(reasons) > SHOWN:
        print(f"skipped   and {len(reasons) - SHOWN} more")


def as_begun(folder: str, began: dict[str, str], sources: list[Source], broken: dict[str, str],
             stored: Entries, strict: bool) -> tuple[list[Source], dict[str, str]]:
    """(pictures, {name: why it cannot be used}) of a run that continues; says what has changed.

    began: {name: stamp} of those it began with; sources, broken: what is in the folder now; stored:
    what the cache holds. ValueError: something has changed, with --strict.
    """
    now = {source.name: source for source in sources}
    added = [name for name in now if name not in began]
    if added:
        print(f"data      {folder} has {len(added)} new pictures ({named(added)}): this run goes "
              f"on without them")
    differ = [name for name, stamp in began.items()
              if name not in now or now[name].stamp != stamp]
    if differ and strict:
        raise ValueError(f"{len(differ)} pictures of {folder} were changed or removed since this "
                         f"run began ({named(differ)}): restore them, begin anew with another "
                         f"--run, or leave --strict out")
    saved = [name for name in differ if (name, began[name]) in stored]
    gone = [name for name in differ if name not in now and name not in saved]
    if differ:
        print(f"data      {len(differ)} pictures of {folder} were changed or removed since this "
              f"run began ({named(differ)}): {len(saved)} come from the cache as they were, "
              f"{len(differ) - len(saved) - len(gone)} are used as they are now, {len(gone)} are "
              f"skipped")
    for name in saved:
        now[name] = Source(name, began[name], stored[name, began[name]].nbytes())
    for name in gone:
        now[name] = Source(name, "", 0)
    broken = broken | {name: f"{name} is no longer in {folder}" for name in gone}
    left = {name: why for name, why in broken.items() if name in began and name not in saved}
    return [now[name] for name in began], left


def named(names: Sequence[str]) -> str:
    """The first names of a list, as one would write them."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def print_skipped(run: Path) -> None:
    """Says at the end of a run how many pictures it did without."""
    record = read_record(run)
    if record and record["broken"]:
        print(f"skipped   {len(record['broken']):,} of {len(record['pictures']):,} pictures of "
              f"{record['folder']} could not be used: {run / RECORD} names them")
