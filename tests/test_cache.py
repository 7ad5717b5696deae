"""cache.py: pixels as they were decoded, whatever stops, changes or damages the cache."""
import json
import os
import shutil
import sys
import time
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest

import cache
import data
from cache import Source
from data import Picture
from pictures import picture, same_images

SCALES = (1, 2)


def images(seed: int) -> dict:
    """A picture of its own size, at both scales."""
    return {1: picture(5 + seed, 7, seed), 2: picture(10 + 2 * seed, 14, 100 + seed)}


def sources(count: int, stamp: str = "s") -> list[Source]:
    return [Source(f"{i}.png", stamp, sum(x.nbytes for x in images(i).values()))
            for i in range(count)]


class Decoder:
    """Decodes `images`, notes which, and cannot read some."""
    def __init__(self, *broken: int):
        self.broken = broken
        self.calls = []

    def __call__(self, i: int) -> Picture:
        self.calls.append(i)
        if i in self.broken:
            raise ValueError(f"{i}.png is damaged")
        return Picture(images(i))


def opened(place, count: int, decoder=None, stamp: str = "s"):
    """(how to read, what is broken, what was decoded for it)"""
    decoder = decoder or Decoder()
    load, broken = cache.open_cache(place, SCALES, sources(count, stamp), decoder)
    return load, broken, sorted(decoder.calls)


def bytes_in(place) -> int:
    return sum(file.stat().st_size for file in place.iterdir())


def test_pictures_are_decoded_once_and_stay_as_they_were(tmp_path):
    load, broken, calls = opened(tmp_path / "c", 5, Decoder(3))
    assert calls == [0, 1, 2, 3, 4]
    assert broken == {3: "3.png is damaged"}
    assert all(same_images(load(i).images, images(i)) for i in (0, 1, 2, 4))
    assert not load(0).images[2].flags.writeable
    again, broken, calls = opened(tmp_path / "c", 5)
    assert calls == []                   # the broken one is not tried again either
    assert list(broken) == [3]
    assert same_images(again(4).images, images(4))


def test_its_size_is_said_before(tmp_path, capsys):
    """20 pictures of about 1.6 MB: the manifest does not count."""
    large = [Source(f"{i}", "s", 3 * 512 * 1024) for i in range(20)]

    def load(i):
        return Picture({1: np.full((256, 512, 3), i, np.uint8),
                        2: np.full((384, 1024, 3), i, np.uint8)})

    cache.open_cache(tmp_path, SCALES, large, load)
    said = float(capsys.readouterr().out.split()[1]) * 2**30
    assert bytes_in(tmp_path) == pytest.approx(said, rel=0.2)


def test_a_changed_picture_is_another_one_and_both_stay(tmp_path):
    opened(tmp_path, 3)
    mixed = [*sources(3)[:2], sources(3, "later")[2]]
    decoder = Decoder()
    cache.open_cache(tmp_path, SCALES, mixed, decoder)
    assert decoder.calls == [2]
    assert len(cache.known(tmp_path, SCALES)) == 4
    assert opened(tmp_path, 3)[2] == []


def test_all_is_made_anew_when_most_of_it_is_of_the_past(tmp_path):
    before, _, _ = opened(tmp_path, 4)
    opened(tmp_path, 4, stamp="2")
    assert opened(tmp_path, 4, stamp="3")[2] == [0, 1, 2, 3]
    assert {stamp for _, stamp in cache.known(tmp_path, SCALES)} == {"3"}
    assert bytes_in(tmp_path) < 2 * sum(source.nbytes for source in sources(4))
    assert same_images(before(3).images, images(3))      # mapped, so a run goes on with it


@pytest.mark.parametrize("scales, version", [((1, 4), 1), (SCALES, 2)])
def test_another_program_or_other_scales_do_not_use_it(tmp_path, monkeypatch, scales, version):
    opened(tmp_path, 2)
    assert len(cache.known(tmp_path, SCALES)) == 2
    monkeypatch.setattr(cache, "VERSION", version)
    assert cache.known(tmp_path, scales) == {}


def test_a_folder_for_each_set_scales_and_reduction(tmp_path):
    names = {cache.folder_of(tmp_path, folder, scales)
             for folder in ("a/HR", "b/HR") for scales in ((1, 2), (1, 4))}
    names.add(cache.folder_of(tmp_path, "a/HR", (1, 2), "nearest"))
    assert len(names) == 5
    assert cache.folder_of(tmp_path, "a/HR", (1, 2)).name.startswith("HR_x1-2_")


# ---- stopped, damaged, full ---------------------------------------------------------------------
@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_line_that_is_cut_off_costs_one_picture(tmp_path, cut):
    opened(tmp_path, 6)
    manifest = tmp_path / cache.MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-cut])
    lost = 6 - len(cache.known(tmp_path, SCALES))
    assert lost == (2 if cut == 150 else 1)
    load, _, calls = opened(tmp_path, 6)
    assert len(calls) == lost
    assert all(same_images(load(i).images, images(i)) for i in range(6))
    assert opened(tmp_path, 6)[2] == []


@pytest.mark.parametrize("line", [
    b"nonsense\n", b"[1]\n", b'{"name": "1.png"}\n', b"\xff\n",
    json.dumps(dict(name="1.png", stamp="s", offset=9, shapes={"1": [9999, 9]},
                    broken="")).encode() + b"\n",
    json.dumps(dict(name="1.png", stamp="s", offset=-9, shapes={"1": [1, 1]},
                    broken="")).encode() + b"\n"])
def test_a_damaged_line_ends_what_is_believed(tmp_path, line):
    opened(tmp_path, 3)
    manifest = tmp_path / cache.MANIFEST
    lines = manifest.read_bytes().splitlines(keepends=True)
    manifest.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    load, _, calls = opened(tmp_path, 3)
    assert calls == [1, 2]
    assert all(same_images(load(i).images, images(i)) for i in range(3))


def test_what_follows_a_damaged_line_is_forgotten(tmp_path):
    """Its pixels are overwritten."""
    opened(tmp_path, 6)
    manifest = tmp_path / cache.MANIFEST
    lines = manifest.read_bytes().splitlines(keepends=True)
    lines[2] = b"x" * (len(lines[2]) - 1) + b"\n"
    manifest.write_bytes(b"".join(lines))
    cache.open_cache(tmp_path, SCALES, sources(6)[::3], lambda k: Decoder()(3 * k))
    assert {name for name, _ in cache.known(tmp_path, SCALES)} == {"0.png", "3.png"}
    load, _, _ = opened(tmp_path, 6)
    assert all(same_images(load(i).images, images(i)) for i in range(6))


def test_pixels_that_are_missing_are_made_again(tmp_path):
    opened(tmp_path, 3)
    pixels = tmp_path / cache.PIXELS
    os.truncate(pixels, pixels.stat().st_size - 1)
    assert opened(tmp_path, 3)[2] == [2]
    pixels.unlink()
    assert opened(tmp_path, 3)[2] == [0, 1, 2]


def test_a_full_disk_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    small = SimpleNamespace(free=cache.SPARE + 700)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: small)
    decoder = Decoder()
    with pytest.raises(OSError, match=r"has 0.25 GiB of free space, .* give --cache DIR on a lar"):
        opened(tmp_path, 5, decoder)
    assert decoder.calls == []
    opened(tmp_path, 1)                  # there is room for a little


def test_a_disk_that_fills_up_later_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "GROUP_SECONDS", -1)
    fsync = os.fsync
    left = [5]                           # two calls for each picture

    def full(number):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full; what is there will be used"):
        opened(tmp_path, 6)
    monkeypatch.setattr(os, "fsync", fsync)
    load, _, calls = opened(tmp_path, 6)
    assert 2 <= 6 - len(calls) <= 3
    assert all(same_images(load(i).images, images(i)) for i in range(6))


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="cannot work with the cache .*file/c .*give --cache DIR on"):
        opened(tmp_path / "file" / "c", 1)


def fill_slowly(place, step) -> None:
    """Fills a cache forwards (step 1) or backwards, a line at a time; for a process of its own."""
    cache.GROUP_SECONDS = 0
    order = range(30)[::step]
    decode = Decoder()

    def load(i):
        time.sleep(0.03)
        return decode(order[i])

    cache.open_cache(place, SCALES, sources(30)[::step], load)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and locks a file")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_killed_it_goes_on_and_two_processes_share_the_work(tmp_path):
    place = tmp_path / "c"
    processes = [get_context("fork").Process(target=fill_slowly, args=(place, step))
                 for step in (1, 1, -1)]
    processes[0].start()
    start = time.monotonic()
    while len(cache.known(place, SCALES)) < 3:
        assert time.monotonic() - start < 60
        assert processes[0].is_alive()
        time.sleep(0.01)
    processes[0].kill()
    processes[0].join(10)
    assert 3 <= len(cache.known(place, SCALES)) < 30
    for each in processes[1:]:
        each.start()
    for each in processes[1:]:
        each.join(60)
        assert each.exitcode == 0
    lines = (place / cache.MANIFEST).read_bytes().splitlines()
    assert len(lines) == 1 + 30          # none twice
    load, _, calls = opened(place, 30)
    assert calls == []
    assert all(same_images(load(i).images, images(i)) for i in range(30))


# ---- batches ------------------------------------------------------------------------------------
def test_batches_are_those_without_a_cache(tmp_path):
    plain = data.Pictures([str(i) for i in range(5)], lambda i: Picture(images(i)), SCALES)
    load, _ = cache.open_cache(tmp_path, SCALES, sources(5), Decoder())
    stored = data.Pictures(plain.names, load, SCALES)
    for start in (0, 3):
        streams = (data.batches(pictures, 8, 4, 1, start) for pictures in (plain, stored))
        for a, b, _ in zip(*streams, range(6)):
            assert all((a.images[s] == b.images[s]).all() for s in SCALES)
