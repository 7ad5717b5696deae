"""gather.py: which pictures a run trains on, when some are broken and when the folder changes."""
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cache
import data
import gather
from gather import Wishes
from pictures import picture, same_images, save
from tiny import same

SCALES = (1, 4)
MEMORY = Wishes(16, 1 << 30, None, False)


def folder_of(root, count, side=32, reductions=False):
    for i in range(count):
        save(root / "HR" / f"{i:04d}.png", picture(side, side, i))
        if reductions:
            save(root / "LR_bicubic/X4" / f"{i:04d}x4.png", picture(side // 4, side // 4, i))
    return root


def gathered(root, run, wishes=MEMORY):
    run.mkdir(exist_ok=True)
    return gather.training_pictures(str(root), SCALES, wishes, run)


def begin(run):
    """What a run leaves after its first steps: from then on its pictures are settled."""
    (run / "progress.pt").write_bytes(b"")


def take(pictures, number=3, start=0):
    return list(itertools.islice(data.batches(pictures, 16, 4, 0, start), number))


@pytest.fixture
def stored(tmp_path):
    """Wishes for pictures on disk."""
    return MEMORY._replace(cache=tmp_path / "cache")


# ---- where pictures are kept --------------------------------------------------------------------
def test_in_memory_and_in_the_cache_they_are_those_of_the_folder(tmp_path, stored, capsys):
    root = folder_of(tmp_path / "d", 5, 36)
    plain = data.open_folder(root, SCALES)
    for wishes in (MEMORY, stored):
        pictures = gathered(root, tmp_path / "run", wishes)
        assert pictures.names == plain.names
        assert all(same_images(a.images, b.images) for a, b in zip(pictures, plain))
        assert all(same(a, b) for a, b in zip(take(pictures, 6), take(plain, 6)))
        assert all(same(a, b) for a, b in zip(take(pictures[1:4], 2), take(plain[1:4], 2)))
    assert "5 of 5 pictures" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_memory_decides_between_memory_and_disk(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "d", 3)
    monkeypatch.setattr(gather, "CACHE", tmp_path / "default")
    needed = 3 * 3 * (32 * 32 + 8 * 8)
    gathered(root, tmp_path / "run", MEMORY._replace(memory=needed))
    assert not (tmp_path / "default").exists()
    gathered(root, tmp_path / "run", MEMORY._replace(memory=needed - 1))
    assert (tmp_path / "default").exists()


def test_no_file_is_opened_after_the_first_step(tmp_path, stored):
    for wishes in (MEMORY, stored):
        root = folder_of(tmp_path / "d", 4)
        pictures = gathered(root, tmp_path / "run", wishes)
        first = take(pictures)
        shutil.rmtree(root)
        assert all(same(a, b) for a, b in zip(first, take(pictures)))


def test_reductions_are_checked_by_their_headers_also_of_turned_cameras(tmp_path):
    turned = Image.Exif()
    turned[274] = 6                      # upright it is 40 wide and 32 high
    root = tmp_path / "d"
    save(root / "HR/a.jpg", picture(40, 32), exif=turned)
    save(root / "LR_bicubic/X4/ax4.png", picture(8, 10))
    pictures = gathered(root, tmp_path / "run")
    assert pictures[0].images[4].shape == (32, 40, 3)


# ---- broken pictures ----------------------------------------------------------------------------
def truncated(file):
    file.write_bytes(file.read_bytes()[:1500])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[800:900] = bytes(255 - byte for byte in content[800:900])
    file.write_bytes(content)


def claims_to_be_huge(file):
    content = bytearray(file.read_bytes())
    content[16:24] = b"\0\1\0\0" * 2     # 65536 pixels a side
    file.write_bytes(content)


def of_another_size(file):
    low = file.parents[1] / "LR_bicubic/X4" / f"{file.stem}x4.png"
    save(low, picture(9, 8))


def with_a_broken_reduction(file):
    of_another_size(file)
    (file.parents[1] / "LR_bicubic/X4" / f"{file.stem}x4.png").write_bytes(b"PNG")


TEN_WAYS = {
    "empty": lambda file: file.write_bytes(b""),
    "only a signature": lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40),
    "cut off": truncated,
    "damaged in the middle": flipped,
    "zeros": lambda file: file.write_bytes(b"\0" * 3000),
    "a page of a server": lambda file: file.write_text("<html>404 not found</html>"),
    "smaller than the patch": lambda file: save(file, picture(12, 40)),
    "huge": claims_to_be_huge,
    "not the size of its reduction": of_another_size,
    "a broken reduction": with_a_broken_reduction,
}


def break_some(root, places):
    for place, way in zip(places, itertools.cycle(TEN_WAYS.values())):
        way(root / "HR" / f"{place:04d}.png")


@pytest.mark.parametrize("way", TEN_WAYS)
def test_each_way_of_being_broken_is_named_skipped_and_counted(way, tmp_path, capsys, stored):
    root = folder_of(tmp_path / "d", 20)
    TEN_WAYS[way](root / "HR" / "0007.png")
    for wishes in (MEMORY, stored):
        pictures = gathered(root, tmp_path / "run", wishes)
        assert pictures.names[6:9] == ["0006.png", "0008.png", "0008.png"]
        assert len(pictures) == 20
        printed = capsys.readouterr().out
        [line] = [line for line in printed.splitlines() if line.startswith("skipped")]
        assert "0007" in line
        assert "19 of 20 pictures" in printed
        gather.print_skipped(tmp_path / "run")
        assert "1 of 20 pictures" in capsys.readouterr().out
        with pytest.raises(ValueError, match="1 of 20 .* with --strict; .*: .*0007"):
            gathered(root, tmp_path / "run", wishes._replace(strict=True))


def test_2000_pictures_of_which_20_are_broken_in_ten_ways(tmp_path, stored, capsys):
    root = folder_of(tmp_path / "d", 2000, reductions=True)
    places = np.random.default_rng(0).choice(2000, 20, replace=False)
    break_some(root, places)
    pictures = gathered(root, tmp_path / "run", stored)
    assert "1,980 of 2,000 pictures" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / gather.RECORD).read_text())
    assert record["broken"].keys() == {f"{place:04d}.png" for place in places}
    assert all(pictures.names[i] == f"{i:04d}.png" for i in range(2000) if i not in places)
    assert not set(pictures.names) & record["broken"].keys()
    batches = take(pictures, 40)
    again = gathered(root, tmp_path / "run", stored)     # it decodes nothing
    assert all(same(a, b) for a, b in zip(batches[30:], take(again, 10, 30)))


def test_more_than_a_twentieth_stops_with_the_list(tmp_path, monkeypatch, capsys):
    root = folder_of(tmp_path / "d", 39)
    break_some(root, (3, 5))
    decoded = []
    monkeypatch.setattr(data.Files, "load", lambda files, i: decoded.append(i))
    with pytest.raises(ValueError, match=r"2 of 39 .*at most 5% may be; .*0003.*; .*0005.png as"):
        gathered(root, tmp_path / "run")
    assert decoded == []                 # the headers said it
    record = json.loads((tmp_path / "run" / gather.RECORD).read_text())
    assert list(record["broken"]) == ["0003.png", "0005.png"]
    monkeypatch.undo()
    folder_of(tmp_path / "d", 40)        # mended, and one more
    break_some(root, (3, 5))
    gathered(root, tmp_path / "run")


def test_what_only_decoding_shows_counts_too(tmp_path):
    root = folder_of(tmp_path / "d", 10)
    truncated(root / "HR/0002.png")
    with pytest.raises(ValueError, match=r"1 of 10 .*0002.png as a picture"):
        gathered(root, tmp_path / "run")


def test_a_place_is_taken_by_the_next_that_can_be_used():
    assert gather.places([True, False, False, True, False]) == [0, 3, 3, 3, 0]
    assert gather.places([False, True]) == [1, 1]


# ---- a folder that changes ----------------------------------------------------------------------
def test_a_run_goes_on_with_the_pictures_it_began_with(tmp_path, stored, capsys):
    """The cache holds them all: the batches stay the same, whatever happens in the folder."""
    root = folder_of(tmp_path / "d", 6)
    run = tmp_path / "run"
    before = take(gathered(root, run, stored), 6)
    begin(run)
    save(root / "HR/0000_new.png", picture(32, 32, 77))
    save(root / "HR/0002.png", picture(48, 40, 78))
    (root / "HR/0004.png").unlink()
    (root / "HR/0001.png").write_bytes(b"")
    capsys.readouterr()
    for wishes in (stored, MEMORY):      # the run remembers where its cache is
        pictures = gathered(root, run, wishes)
        printed = capsys.readouterr().out
        assert "has 1 new pictures (0000_new.png)" in printed
        assert "3 pictures of" in printed
        assert "(0001.png, 0002.png, 0004.png): 3 come from the cache" in printed
        assert "6 of 6 pictures" in printed
        assert all(same(a, b) for a, b in zip(before, take(pictures, 6)))
    with pytest.raises(ValueError, match="3 pictures of .* were changed .* leave --strict out"):
        gathered(root, run, stored._replace(strict=True))
    (root / "HR/0001.png").unlink()
    assert "0000_new.png" in gathered(root, tmp_path / "other", stored).names


def test_without_a_cache_only_the_lost_ones_are_replaced(tmp_path, capsys, monkeypatch):
    root = folder_of(tmp_path / "d", 40)
    run = tmp_path / "run"
    gathered(root, run)
    begin(run)
    save(root / "HR/0000_new.png", picture(32, 32, 77))
    (root / "HR/0004.png").unlink()
    os.utime(root / "HR/0006.png", (1, 1))
    capsys.readouterr()
    for _ in range(2):                   # said each time: the record stays that of the beginning
        pictures = gathered(root, run)
        printed = capsys.readouterr().out
        assert "(0004.png, 0006.png): 0 come from the cache as they were, 1 are used as they are" \
            in printed
        assert "1 are skipped" in printed
        assert "0004.png is no longer in" in printed
        assert pictures.names == [f"{i + (i == 4):04d}.png" for i in range(40)]
    monkeypatch.setattr(gather, "TOLERATED", 0.02)
    with pytest.raises(ValueError, match="1 of 40 .*0004.png is no longer in"):
        gathered(root, run)


def test_a_new_run_takes_the_folder_as_it_is(tmp_path):
    root = folder_of(tmp_path / "d", 3)
    gathered(root, tmp_path / "run")
    folder_of(root, 4)
    assert len(gathered(root, tmp_path / "run")) == 4    # nothing was trained yet


def test_a_cache_that_was_deleted_does_not_matter_unless_files_are_gone(tmp_path, stored):
    root = folder_of(tmp_path / "d", 40)
    run = tmp_path / "run"
    before = take(gathered(root, run, stored))
    begin(run)
    shutil.rmtree(stored.cache)
    assert all(same(a, b) for a, b in zip(before, take(gathered(root, run, stored))))
    shutil.rmtree(stored.cache)
    (root / "HR/0009.png").unlink()
    assert gathered(root, run, stored).names[9] == "0010.png"


def test_a_run_that_continues_does_not_throw_away_what_it_needs(tmp_path, stored):
    """Another run has filled the cache with larger pictures, and a picture was mended."""
    root = folder_of(tmp_path / "d", 20)
    run = tmp_path / "run"
    (root / "HR/0007.png").write_bytes(b"")
    before = gathered(root, run, stored)
    begin(run)
    folder_of(root, 20, 64)
    gathered(root, tmp_path / "other", stored)
    save(root / "HR/0007.png", picture(32, 32, 7))
    after = gathered(root, run, stored)
    assert after.names[7] == "0007.png"
    assert all(same_images(before[i].images, after[i].images) for i in range(20) if i != 7)


def test_a_cache_that_is_deleted_in_the_middle_is_made_of_what_is_there(tmp_path, stored,
                                                                        monkeypatch):
    root = folder_of(tmp_path / "d", 40)
    run = tmp_path / "run"
    gathered(root, run, stored)
    begin(run)
    (root / "HR/0009.png").unlink()

    def delete(*arguments):
        found = cache.known(*arguments)
        shutil.rmtree(stored.cache)
        return found

    monkeypatch.setattr(gather, "known", delete)
    assert gathered(root, run, stored).names[9] == "0010.png"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"folder": 1, "pictures": 3}'])
def test_a_damaged_record_is_one_sentence(tmp_path, content):
    root = folder_of(tmp_path / "d", 3)
    gathered(root, tmp_path / "run")
    begin(tmp_path / "run")
    (tmp_path / "run" / gather.RECORD).write_text(content)
    with pytest.raises(ValueError, match="pictures.json is damaged: remove it"):
        gathered(root, tmp_path / "run")


def test_a_file_that_goes_between_header_and_decoder_is_skipped(tmp_path, monkeypatch):
    root = folder_of(tmp_path / "d", 30)
    survey = gather.survey

    def slow_survey(*arguments):
        found = survey(*arguments)
        (root / "HR/0005.png").unlink()
        return found

    monkeypatch.setattr(gather, "survey", slow_survey)
    assert gathered(root, tmp_path / "run").names[5] == "0006.png"


def test_the_default_folder_is_among_the_runs():
    assert Path("runs") / ".cache" == gather.CACHE
    assert cache.folder_of(gather.CACHE, "x/DIV2K", SCALES).parent == gather.CACHE
