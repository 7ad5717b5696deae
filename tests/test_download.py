"""Downloads: broken connections, changed files, hostile archives; nothing leaves this machine."""
import io
import json
import os
import shutil
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image

import data
import download
from loopback import serving
from tiny import run_command

BLOB = os.urandom(300_000)


@pytest.fixture
def site(monkeypatch):
    """(what the server sends, its address); no waiting between tries."""
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "CHUNK", 50_000)
    with serving() as (sends, address):
        sends.files["/a.bin"] = BLOB
        yield sends, address


# ---- one file -----------------------------------------------------------------------------------
def test_a_file_is_fetched_once(site, tmp_path):
    sends, address = site
    target = tmp_path / "new" / "a.bin"
    assert download.fetch(f"{address}/a.bin", target) == target
    assert target.read_bytes() == BLOB
    download.fetch(f"{address}/a.bin", target)
    assert len(sends.asked) == 1
    assert {file.name for file in target.parent.iterdir()} == {"a.bin", "downloads.json"}


def test_a_connection_that_breaks_is_continued(site, tmp_path):
    sends, address = site
    sends.cut = [100_000, 50_000]
    download.fetch(f"{address}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BLOB
    assert [asked for _, asked in sends.asked] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_continues_what_an_earlier_one_began(site, tmp_path):
    sends, address = site
    sends.cut = [100_000] + [0] * download.TRIES
    with pytest.raises(ValueError, match="it ended after 100000 of 300000 bytes") as error:
        download.fetch(f"{address}/a.bin", tmp_path / "a.bin")
    assert "fetch it by hand and save it as" in str(error.value)
    assert not (tmp_path / "a.bin").exists()
    sends.cut, sends.asked = [], []
    download.fetch(f"{address}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BLOB
    assert sends.asked == [("/a.bin", "bytes=100000-")]


def test_a_file_that_changed_meanwhile_is_not_glued_to_the_old_one(site, tmp_path):
    sends, address = site
    sends.cut = [100_000] + [0] * download.TRIES
    with pytest.raises(ValueError):
        download.fetch(f"{address}/a.bin", tmp_path / "a.bin")
    sends.cut = []
    sends.files["/a.bin"] = bytes(200_000)
    sends.etag = '"2"'
    download.fetch(f"{address}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == bytes(200_000)


@pytest.mark.parametrize("etag, ranges", [('"1"', False), ("", True), ('W/"1"', True)])
def test_a_server_that_cannot_continue_sends_all_again(site, tmp_path, etag, ranges):
    sends, address = site
    sends.etag, sends.ranges, sends.cut = etag, ranges, [100_000]
    download.fetch(f"{address}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BLOB


def test_a_part_that_is_complete_is_only_renamed(site, tmp_path):
    sends, address = site
    (tmp_path / "a.bin.part").write_bytes(BLOB)
    (tmp_path / "a.bin.part.version").write_text('"1"')
    download.fetch(f"{address}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == BLOB
    assert sends.asked == [("/a.bin", "bytes=300000-")]


def test_a_wrong_size_is_refused(site, tmp_path):
    sends, address = site
    sends.says = 300_001
    sends.ranges = False
    with pytest.raises(ValueError, match="300000 of 300001 bytes"):
        download.fetch(f"{address}/a.bin", tmp_path / "a.bin")


def test_a_file_that_is_not_there_is_asked_for_once(site, tmp_path):
    sends, address = site
    with pytest.raises(ValueError, match="Not Found.*save it as .*b.bin"):
        download.fetch(f"{address}/b.bin", tmp_path / "b.bin")
    assert len(sends.asked) == 1


def test_no_network_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "PAUSE", 0)
    with pytest.raises(ValueError, match="cannot fetch http://127.0.0.1:9/a"):
        download.fetch("http://127.0.0.1:9/a", tmp_path / "a")


def test_another_file_than_the_first_time_is_refused(site, tmp_path):
    sends, address = site
    target = tmp_path / "a.bin"
    download.fetch(f"{address}/a.bin", target).unlink()
    sends.files["/a.bin"] = BLOB[::-1]
    with pytest.raises(ValueError, match="not the file of the first download"):
        download.fetch(f"{address}/a.bin", target)
    assert not target.exists()
    (tmp_path / "downloads.json").unlink()
    download.fetch(f"{address}/a.bin", target)
    assert target.read_bytes() == BLOB[::-1]


def test_damaged_notes_are_named(site, tmp_path):
    (tmp_path / "downloads.json").write_text("[1")
    with pytest.raises(ValueError, match="downloads.json is damaged: delete it"):
        download.fetch(f"{site[1]}/a.bin", tmp_path / "a.bin")


def test_a_disk_that_is_too_small_is_said_before(site, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="make room or take another folder"):
        download.fetch(f"{site[1]}/a.bin", tmp_path / "a.bin")


# ---- archives -----------------------------------------------------------------------------------
def zipped(file, **contents) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, blob in contents.items():
            archive.writestr(name, blob)


def tarred(file, *infos: tuple[str, bytes, bytes, str]) -> None:
    """infos: (name, type, content, link target)."""
    with tarfile.open(file, "w") as archive:
        for name, kind, blob, link in infos:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = len(blob)
            info.linkname = link
            archive.addfile(info, io.BytesIO(blob))


def test_only_what_lies_below_an_anchor_is_unpacked(tmp_path):
    zipped(tmp_path / "a.zip", **{"any/gt/1.png": b"one", "any/other/2.png": b"two", "gt": b"file",
                                  "gt/sub/3.png": b"three"})
    assert download.unpack(tmp_path / "a.zip", tmp_path / "out", ("gt",)) == 2
    files = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.png")}
    assert files == {"gt/1.png", "gt/sub/3.png"}


def test_unpacking_continues(tmp_path):
    tarred(tmp_path / "a.tar", *[(f"gt/{i}", tarfile.REGTYPE, b"x" * i, "") for i in range(1, 4)])
    download.unpack(tmp_path / "a.tar", tmp_path, ("gt",))
    stamp = (tmp_path / "gt" / "1").stat().st_mtime_ns
    (tmp_path / "gt" / "2").write_bytes(b"broken off")
    download.unpack(tmp_path / "a.tar", tmp_path, ("gt",))
    assert (tmp_path / "gt" / "2").read_bytes() == b"xx"
    assert (tmp_path / "gt" / "1").stat().st_mtime_ns == stamp


HOSTILE = {
    "up": ("gt/../../evil", tarfile.REGTYPE, b"x", ""),
    "absolute": ("/gt/evil", tarfile.REGTYPE, b"x", ""),
    "windows": ("gt\\..\\..\\evil", tarfile.REGTYPE, b"x", ""),
    "drive": ("gt/C:evil", tarfile.REGTYPE, b"x", ""),
    "symbolic link": ("gt/evil", tarfile.SYMTYPE, b"", "/etc"),
    "hard link": ("gt/evil", tarfile.LNKTYPE, b"", "gt/good"),
    "device": ("gt/evil", tarfile.CHRTYPE, b"", ""),
    "pipe": ("gt/evil", tarfile.FIFOTYPE, b"", ""),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tar_is_refused_before_anything_is_written(tmp_path, what):
    tarred(tmp_path / "a.tar", ("gt/good", tarfile.REGTYPE, b"good", ""), HOSTILE[what])
    with pytest.raises(ValueError, match="refused: .*a.tar"):
        download.unpack(tmp_path / "a.tar", tmp_path / "out", ("gt",))
    assert not (tmp_path / "out").exists()


def test_a_hostile_zip_is_refused(tmp_path):
    zipped(tmp_path / "up.zip", **{"gt/../../evil": b"x"})
    link = zipfile.ZipInfo("gt/evil")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    for name in ("up.zip", "link.zip"):
        with pytest.raises(ValueError, match="refused"):
            download.unpack(tmp_path / name, tmp_path / "out", ("gt",))


def test_an_archive_too_large_for_the_disk_is_refused(tmp_path, monkeypatch):
    zipped(tmp_path / "a.zip", **{"gt/1": bytes(10_000_000)})          # 10 kB: a small bomb
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(ValueError, match="make room"):
        download.unpack(tmp_path / "a.zip", tmp_path / "out", ("gt",))


@pytest.mark.parametrize("name", ["a.zip", "a.tar"])
def test_damaged_archives_are_one_sentence(tmp_path, name):
    if name == "a.zip":
        zipped(tmp_path / name, **{"gt/1": os.urandom(5000)})
    else:
        tarred(tmp_path / name, ("gt/1", tarfile.REGTYPE, os.urandom(50_000), ""))
    whole = (tmp_path / name).read_bytes()
    for blob in (whole[:300], whole[:-40000 if name == "a.tar" else -100], b"", b"garbage" * 99):
        (tmp_path / name).write_bytes(blob)
        with pytest.raises(ValueError, match="a.(zip|tar)"):
            download.unpack(tmp_path / name, tmp_path / "out", ("gt",))
    assert not list(tmp_path.rglob(".*.tmp"))


# ---- the command --------------------------------------------------------------------------------
def call(monkeypatch, capsys, *arguments):
    module = SimpleNamespace(__name__="data", main=download.main)
    return run_command(module, monkeypatch, capsys, *arguments)


def picture(side: int) -> bytes:
    blob = io.BytesIO()
    Image.new("RGB", (side, side), (9, 9, 9)).save(blob, "PNG")
    return blob.getvalue()


def test_sets_are_laid_out_as_the_loader_reads_them(site, tmp_path, monkeypatch, capsys):
    """DF2K is DIV2K and Flickr2K together; a benchmark is one folder of its archive."""
    sends, address = site
    for name, source in download.SETS.items():
        urls = tuple(f"{address}/{url.rpartition('/')[2]}" for url in source.urls)
        monkeypatch.setitem(download.SETS, name, source._replace(urls=urls))
    for s in (2, 3, 4):
        zipped(tmp_path / "z.zip", **{
            f"DIV2K_train_LR_bicubic/X{s}/0001x{s}.png": picture(48 // s)})
        sends.files[f"/DIV2K_train_LR_bicubic_X{s}.zip"] = (tmp_path / "z.zip").read_bytes()
    zipped(tmp_path / "z.zip", **{"DIV2K_train_HR/0001.png": picture(48)})
    sends.files["/DIV2K_train_HR.zip"] = (tmp_path / "z.zip").read_bytes()
    tarred(tmp_path / "t.tar",
           ("Flickr2K/Flickr2K_HR/000001.png", tarfile.REGTYPE, picture(48), ""),
           ("Flickr2K/Flickr2K_LR_bicubic/X4/000001x4.png", tarfile.REGTYPE, picture(12), ""))
    sends.files["/Flickr2K.tar"] = (tmp_path / "t.tar").read_bytes()
    tarred(tmp_path / "t.tar",
           ("benchmark/Set5/HR/baby.png", tarfile.REGTYPE, picture(48), ""),
           ("benchmark/Set5/LR_bicubic/X4/babyx4.png", tarfile.REGTYPE, picture(12), ""),
           ("benchmark/Set14/HR/lenna.png", tarfile.REGTYPE, picture(48), ""))
    sends.files["/benchmark.tar"] = (tmp_path / "t.tar").read_bytes()

    root = tmp_path / "sets"
    for name in ("DF2K", "Set5"):
        code, out, err = call(monkeypatch, capsys, "get", name, "--root", root)
        assert (code, err) == (0, "")
        assert f"{name} is in" in out
    assert sorted(data.open_folder(root, (1, 2, 4)).names) == ["000001.png", "0001.png"]
    assert data.open_folder(root, (1, 4))[0].images[1].shape == (12, 12, 3)
    assert data.open_folder(root / "benchmark" / "Set5", (1, 4)).names == ["baby.png"]
    assert not (root / "benchmark" / "Set14").exists()
    asked = len(sends.asked)
    call(monkeypatch, capsys, "get", "Set14", "--root", root)          # the archive is still there
    assert len(sends.asked) == asked
    assert (root / "benchmark" / "Set14").exists()
    assert "benchmark.tar" in json.loads((root / "archives" / "downloads.json").read_text())


@pytest.mark.parametrize("line, wrong", [
    (["get", "Set6", "--root", "x"], "invalid choice: 'Set6'"),
    (["get", "Set5"], "--root"),
    ([], "required: command, name, --root"),
])
def test_wrong_usage(monkeypatch, capsys, line, wrong):
    code, _, err = call(monkeypatch, capsys, *line)
    assert code == 2
    assert wrong in err
