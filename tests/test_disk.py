"""Files that are whole or not there, and files from elsewhere that are not trusted."""
import errno
import os
import pickle
import resource
import zipfile

import pytest
import torch
from torch import Tensor

import disk
from tiny import Evil


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.bin"
    disk.write_file(target, b"old")
    assert target.read_bytes() == b"old"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))    # full after 1000 bytes
    try:
        with pytest.raises(OSError, match=r"a\.bin"):
            disk.write_file(target, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failing_rename_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.bin"
    disk.write_file(target, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"a\.bin .No space left"):
        disk.write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")           # stands for a device, which must not be replaced
    for path in (tmp_path / "no" / "x", tmp_path / "file" / "x", tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match=f"cannot write {path}"):
            disk.write_file(path, b"new")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    disk.write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"model": Evil(marker)}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"model": Evil(marker)}))
    for name in ("zip.pt", "bare.pt"):
        words = f"^refused: .*{name} is not a plain .*; nothing in it was executed$"
        with pytest.raises(ValueError, match=words):
            disk.read_checkpoint(tmp_path / name)
        assert not marker.exists()


def test_damaged_files_are_refused_by_name(tmp_path):
    contents = {"empty.pt": b"", "text.pt": b"not one", "zip.pt": b"PK\x03\x04 broken"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-500])
    (tmp_path / "folder.pt").mkdir()
    for name in (*contents, "cut.pt", "folder.pt", "missing.pt"):
        with pytest.raises(ValueError, match=name) as caught:
            disk.read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save([{}, {}], tmp_path / "list.pt")
    assert disk.read_checkpoint(tmp_path / "list.pt", list) == [{}, {}]
    with pytest.raises(ValueError, match="holds a list, not the dict of weights expected here"):
        disk.read_checkpoint(tmp_path / "list.pt")


def test_a_file_is_on_the_disk_before_its_old_content_goes(tmp_path, monkeypatch):
    """A power cut after the rename must not leave an empty file: fsync, rename, fsync."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("rename") or replace(*names))
    disk.write_file(tmp_path / "a.bin", b"new")
    assert calls == ["fsync", "rename", "fsync"]


def test_a_ring_of_links_is_one_sentence(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="cannot write .*a: it is not a plain file"):
        disk.write_file(tmp_path / "a", b"new")


def test_what_is_set_aside_overwrites_nothing(tmp_path):
    for text in ("1", "2", "3"):
        (tmp_path / "x.pt").write_text(text)
        disk.set_aside(tmp_path / "x.pt")
    assert [(tmp_path / f"x.pt.old{n}").read_text() for n in ("", "2", "3")] == ["1", "2", "3"]


# ---- hostile files ------------------------------------------------------------------------------
def test_an_archive_that_grows_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", bytes(50_000_000))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"bomb\.pt would fill 0\.0 GiB when it is unpacked"):
        disk.read_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.parametrize("tensor", [
    torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.ones(2, dtype=torch.complex64),
    torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)])
def test_strange_tensors_are_refused_wherever_they_are(tensor, tmp_path):
    torch.save({"a": [{"b": tensor}]}, tmp_path / "strange.pt")
    with pytest.raises(ValueError, match=r"strange\.pt"):
        disk.read_checkpoint(tmp_path / "strange.pt")


def test_a_container_in_itself_ends(tmp_path):
    ring = [torch.ones(1)]
    ring.append(ring)
    torch.save({"ring": ring}, tmp_path / "ring.pt")
    assert disk.read_checkpoint(tmp_path / "ring.pt")["ring"][0] == 1


def test_a_file_that_is_too_large_or_a_pipe_is_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe cannot be read: it is a folder or a device"):
        disk.read_checkpoint(tmp_path / "pipe")
    monkeypatch.setattr(disk, "LARGEST", 10)
    torch.save({}, tmp_path / "large.pt")
    with pytest.raises(ValueError, match=r"refused: .*large\.pt has 0\.0 GiB"):
        disk.read_checkpoint(tmp_path / "large.pt")


@pytest.mark.parametrize("text, words", [
    ("", "is damaged or no JSON"), ("{", "is damaged or no JSON"),
    ("[" * 200_000 + "]" * 200_000, "nested too deep"), ("[]", "it is a list, not a dict"),
    ('{"x": ' + "9" * 5000 + "}", "is damaged or no JSON"), ("\x00\xff", "no JSON")],
    ids=["empty", "half", "deep", "list", "long number", "binary"])
def test_damaged_json_is_named(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        disk.read_json(tmp_path / "config.json")
    assert words in str(caught.value)


FORM = dict(arch=str, scale=int, rate=float, widths={str: int}, model={str: Tensor},
            duals=[{str: Tensor}], note=(str, None))
GOOD = dict(arch="drn", scale=4, rate=1, widths=dict(a=3), model=dict(w=torch.ones(1)),
            duals=[dict(w=torch.ones(1))], note=None)


@pytest.mark.parametrize("change, words", [
    ({}, None), (dict(more=3), None), (dict(note="x"), None), (dict(widths={}), None),
    (dict(arch=["drn"]), "arch is a list, not a str"), (dict(scale=4.0), "scale is a float"),
    (dict(scale=True), "scale is a bool, not an int"), (dict(rate="1"), "rate is a str"),
    (dict(widths=dict(a=None)), "widths['a'] is a NoneType, not an int"),
    (dict(widths={3: 3}), "widths has an int where a name should be"),
    (dict(widths=5), "widths is an int, not a dict"),
    (dict(duals=5), "duals is an int, not a list"),
    (dict(duals=[dict(w=2)]), "duals[0]['w'] is an int, not a Tensor"),
    (dict(note=3), "note is an int, not a str")])
def test_the_first_misfit_is_told(change, words):
    assert disk.misfit(GOOD | change, FORM, "it") == words or words in disk.misfit(
        GOOD | change, FORM, "it")


def test_a_missing_entry_is_told():
    assert disk.misfit({}, FORM, "it") == "it lacks the entry 'arch'"
