"""A run folder belongs to one process and to one run, and nobody else's file is touched."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import owner
from run import Run, WrongUsage
from tiny import ROOT

CONFIG = dict(preset="quick", steps=8, betas=(0.9, 0.999), clip=math.inf, budget=None, data=None,
              continue_training=False)


def with_work(folder):
    """A run folder of CONFIG with a finished stage."""
    Run(folder, CONFIG).finish("train", {}, 0.0)
    return folder


# ---- the same run -------------------------------------------------------------------------------
def test_the_same_config_continues(tmp_path):
    with_work(tmp_path)
    before = (tmp_path / "config.json").stat().st_mtime_ns
    Run(tmp_path, CONFIG)
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("change, words", [
    (dict(steps=9), "--steps 8, now it is 9"),
    (dict(steps=9, preset="paper"), "--preset quick, now it is paper"),     # it explains the others
    (dict(steps=9, continue_training=True), "--steps 8, now it is 9"),      # which is no flag
    (dict(budget=("params", 0.7)), r"--budget None, now it is \['params', 0.7\]")])
def test_another_config_is_refused_once_there_is_work(change, words, tmp_path):
    with_work(tmp_path)
    with pytest.raises(WrongUsage, match=words):
        Run(tmp_path, CONFIG | change)


def test_another_config_is_taken_while_there_is_no_work(tmp_path):
    Run(tmp_path, CONFIG)
    Run(tmp_path, CONFIG | dict(steps=9))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 9


def test_a_path_may_be_spelled_in_another_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checks = dict(train=lambda content: None)
    Run(tmp_path / "run", CONFIG | dict(data="photos")).finish("train", {}, 0.0)
    for data in ("./photos", str(tmp_path / "photos"), "photos/"):
        again = Run(tmp_path / "run", CONFIG | dict(data=data))
        assert again.look(checks)
    with pytest.raises(WrongUsage, match="--data photos, now it is others"):
        Run(tmp_path / "run", CONFIG | dict(data="others"))


def test_a_run_of_another_version_is_refused_and_not_misread(tmp_path):
    """An entry more or less: nothing is guessed and nothing is touched."""
    known = json.loads((with_work(tmp_path) / "config.json").read_text())
    fewer = {name: value for name, value in known.items() if name != "clip"}
    for text in (json.dumps(known | dict(test=None)), json.dumps(fewer)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(WrongUsage) as caught:
            Run(tmp_path, CONFIG)
        assert str(caught.value) == (
            f"{tmp_path} was made by another version of this program, its config.json has other "
            f"entries: give another folder with --run")
        assert (tmp_path / "config.json").read_text() == text


# ---- somebody else's files ----------------------------------------------------------------------
def test_what_kill_left_half_written_is_removed(tmp_path):
    theirs = (".note.tmp", ".train.pt.tmp", ".a.9.tmp")
    for name in (".train.pt.123.tmp", ".config.json.7.tmp", *theirs):
        (tmp_path / name).write_bytes(b"half")
    Run(tmp_path, {})
    assert set(os.listdir(tmp_path)) == {*theirs, ".lock", "config.json"}


@pytest.mark.parametrize("text", ['{"editor": "vim"}', "[]", "half a fi"])
def test_a_folder_with_somebody_elses_config_is_left_alone(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / ".note.tmp").write_text("mine")
    with pytest.raises(WrongUsage):
        Run(tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == [".note.tmp", "config.json"]
    assert (tmp_path / "config.json").read_text() == text


@pytest.mark.parametrize("name", ["report.json", "log.jsonl", "comparison.png"])
def test_a_folder_with_files_that_a_run_would_overwrite_is_refused(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(WrongUsage, match=f"is no run folder and holds a {name}, which would be"):
        Run(tmp_path, CONFIG)
    assert os.listdir(tmp_path) == [name]


# ---- one process at a time ----------------------------------------------------------------------
HOLDER = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import run
made = run.Run(Path(sys.argv[1]), dict(steps=1))
print("ready", flush=True)
input()
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == "ready\n"
    half = tmp_path / ".train.pt.1.tmp"
    half.write_bytes(b"being written")
    with pytest.raises(ValueError, match="is in use by another process: wait until it ends"):
        Run(tmp_path, dict(steps=1))
    assert half.exists()
    first.kill()
    first.communicate()
    Run(tmp_path, dict(steps=1))
    assert not half.exists()


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(37, "No locks available")

    import fcntl
    monkeypatch.setattr(fcntl, "flock", fail)
    Run(tmp_path, {})
    assert "cannot be locked" in capsys.readouterr().out


def test_a_digest_tells_contents_apart():
    a = dict(x=torch.ones(2, 3), y=[1, 2.0, None], z="a")
    same = dict(z="a", y=(1, 2.0, None), x=torch.ones(3, 2).T.contiguous())
    assert owner.digest(a) == owner.digest(same)
    others = [a | dict(x=torch.ones(3, 2)), a | dict(x=torch.ones(2, 3).double()),
              a | dict(x=torch.zeros(2, 3)), a | dict(y=[1, 2, None]), a | dict(z="b"), dict(x=1)]
    assert len({owner.digest(each) for each in [a, *others]}) == 7
    assert owner.digest(torch.tensor(3.0)) != owner.digest(torch.tensor([3.0]))
