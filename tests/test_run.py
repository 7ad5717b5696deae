"""Commands that end with one sentence, files that are whole or not there, runs that continue."""
import argparse
import errno
import json
import math
import os
import pickle
import resource
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import run
from run import Run, WrongUsage
from tiny import Evil

# ---- commands -----------------------------------------------------------------------------------
FULL = "error: out of memory: use smaller tiles, patches or batches\n"


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, ""),
    (WrongUsage("--a and --b exclude each other"), 2, "error: --a and --b exclude each other\n"),
    (ValueError("x.png is broken"), 1, "error: x.png is broken\n"),
    (FloatingPointError("loss is nan"), 1, "error: loss is nan\n"),
    (torch.OutOfMemoryError("CUDA out of\nmemory"), 1, FULL),
    (MemoryError(), 1, FULL),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 1, FULL),
    (FileNotFoundError(2, "No such file", "x.txt"), 1, "error: x.txt: No such file\n")])
def test_what_a_user_can_put_right_is_one_sentence(error, code, words, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run.command(main)
    assert end.value.code == code
    assert capsys.readouterr().err == words


def test_development_mode_shows_the_traceback_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))      # python -X dev
    with pytest.raises(SystemExit, match="1"):
        run.command(lambda: int("x"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith("error: invalid literal")


@pytest.mark.parametrize("bug", [RuntimeError("size mismatch"), KeyError("x"), ZeroDivisionError()])
def test_a_bug_keeps_its_traceback(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)):
        run.command(main)


def test_a_command_that_succeeds_just_returns():
    assert run.command(lambda: None) is None


@pytest.mark.parametrize("kind, text, value", [
    (run.at_least(2), "2", 2), (run.number(int, 0), "0", 0), (run.number(float, 0, 1), "0.5", 0.5),
    (run.positive, "1e-4", 1e-4), (run.usable_device, "cpu", torch.device("cpu"))])
def test_flag_types_accept_what_is_in_their_range(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize("kind, text, words", [
    (run.at_least(2), "1", "'1' must be an integer of at least 2"),
    (run.at_least(2), "²", "'²' must be an integer of at least 2"),
    (run.number(int, 1), "0", "0 is below 1"),
    (run.number(float, 0, 1), "1", "1 is outside [0, 1)"),
    (run.number(float, 0, 1), "nan", "nan is outside [0, 1)"),
    (run.positive, "0", "0 must be above 0"),
    (run.positive, "inf", "inf must be above 0"),
    (run.usable_device, "toaster", "'toaster' cannot be used here: try cpu")])
def test_flag_types_say_what_is_wrong(kind, text, words):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert str(caught.value) == words


# ---- files --------------------------------------------------------------------------------------
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.bin"
    run.write_file(target, b"old")
    assert target.read_bytes() == b"old"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))    # full after 1000 bytes
    try:
        with pytest.raises(OSError, match=r"a\.bin"):
            run.write_file(target, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failing_rename_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.bin"
    run.write_file(target, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match=r"a\.bin .No space left"):
        run.write_file(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")           # stands for a device, which must not be replaced
    for path in (tmp_path / "no" / "x", tmp_path / "file" / "x", tmp_path, tmp_path / "pipe"):
        with pytest.raises(OSError, match=f"cannot write {path}"):
            run.write_file(path, b"new")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    run.write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "marker"
    torch.save({"model": Evil(marker)}, tmp_path / "zip.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"model": Evil(marker)}))
    for name in ("zip.pt", "bare.pt"):
        words = f"^refused: .*{name} is not a plain .*; nothing in it was executed$"
        with pytest.raises(ValueError, match=words):
            run.read_checkpoint(tmp_path / name)
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
            run.read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    torch.save([{}, {}], tmp_path / "list.pt")
    assert run.read_checkpoint(tmp_path / "list.pt", list) == [{}, {}]
    with pytest.raises(ValueError, match="holds a list, not the dict of weights expected here"):
        run.read_checkpoint(tmp_path / "list.pt")


# ---- the run folder -----------------------------------------------------------------------------
class Walk:
    """A random walk: the smallest thing whose end shows a step done twice or left out."""
    def __init__(self):
        self.place = torch.zeros(())

    def step(self, k: int, batch: int) -> float:
        assert batch == k                      # the batches continue, too
        self.place = 0.9 * self.place + torch.randn(())
        return float(self.place)

    def state_dict(self) -> dict:
        return dict(place=self.place)

    def load_state_dict(self, state: dict) -> None:
        self.place = state["place"]


def batches(start: int):
    k = start
    while True:
        yield k
        k += 1


def walk(folder, steps: int = 10, one_step=None) -> float:
    """The end of a walk of `steps` steps that continues what is in the folder."""
    torch.manual_seed(0)
    part = Walk()
    step = part.step
    if one_step:
        def step(k, batch):
            one_step(k)
            return part.step(k, batch)
    Run(folder, dict(steps=steps)).repeat("walk", steps, step, batches, dict(walk=part))
    return part.place.item()


def steps_in_log(folder) -> list[int]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_a_crash_in_any_step_costs_no_step_and_no_bit(tmp_path, monkeypatch):
    whole = walk(tmp_path / "whole")
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    folder = tmp_path / "crashed"
    for crash in (0, 1, 5, 9):
        def stop(k, crash=crash):
            if k == crash:
                raise ZeroDivisionError        # stands for kill -9: nothing can be saved any more
        with pytest.raises(ZeroDivisionError):
            walk(folder, one_step=stop)
    assert walk(folder) == whole
    assert steps_in_log(folder) == list(range(1, 11))


@pytest.mark.parametrize("steps, logged", [(7, 7), (100, 100), (199, 99), (240, 80), (250, 83)])
def test_a_stage_logs_at_most_100_steps(steps, logged, tmp_path):
    walk(tmp_path, steps)
    assert len(steps_in_log(tmp_path)) == logged


def test_a_stage_adds_its_facts_to_the_log(tmp_path):
    part = Walk()
    Run(tmp_path, {}).repeat("walk", 2, part.step, batches, dict(walk=part),
                             lambda: dict(place=part.place.item()))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["place"] != lines[1]["place"]
    assert lines[1]["place"] == part.place.item()


def test_without_a_save_the_stage_begins_again(tmp_path):
    """SAVE_SECONDS bounds what is lost: here all of the few steps."""
    def stop(k):
        if k == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        walk(tmp_path / "run", one_step=stop)
    assert not (tmp_path / "run" / "progress.pt").exists()
    assert walk(tmp_path / "run") == walk(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_lets_the_step_end_and_saves_it(number, tmp_path):
    def stop(k):
        if k == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path / "run", one_step=stop)
    assert signal.getsignal(number) == before
    state = run.read_checkpoint(tmp_path / "run" / "progress.pt")
    assert (state["stage"], state["step"]) == ("walk", 4)
    assert walk(tmp_path / "run") == walk(tmp_path / "whole")
    assert steps_in_log(tmp_path / "run") == list(range(1, 11))


def test_a_second_stop_signal_interrupts_at_once(tmp_path):
    def stop(k):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    with pytest.raises(KeyboardInterrupt):
        walk(tmp_path, one_step=stop)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    def one_step(k, batch):
        return math.inf if k == 2 else 1.0

    words = "the loss became inf in step 3 of train: lower --rate"
    with pytest.raises(FloatingPointError, match=words):
        Run(tmp_path, {}).repeat("train", 5, one_step, batches, {})


def test_the_state_of_another_stage_is_left_alone(tmp_path):
    folder = Run(tmp_path, {})
    part = Walk()
    folder.save("train", 7, dict(walk=part))
    assert folder.resume("tune", dict(walk=part)) == 0
    assert folder.resume("train", dict(walk=part)) == 7


def test_a_finished_stage_is_a_file_and_a_line_of_the_log(tmp_path):
    folder = Run(tmp_path, {})
    folder.save("train", 1, {})
    assert folder.finish("train", dict(x=torch.ones(2)), 0.0, steps=3)["x"].sum() == 2
    assert folder.read("train.pt")["x"].tolist() == [1, 1]
    assert folder.read("search.pt") is None
    assert not (tmp_path / "progress.pt").exists()
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["stage"], line["steps"]) == ("train", 3)
    assert line["seconds"] > 0


def test_what_kill_left_half_written_is_removed(tmp_path):
    (tmp_path / ".train.pt.123.tmp").write_bytes(b"half")
    Run(tmp_path, {})
    assert os.listdir(tmp_path) == ["config.json"]


CONFIG = dict(preset="quick", steps=8, betas=(0.9, 0.999), clip=math.inf, budget=None)


def with_work(folder):
    """A run folder of CONFIG with a finished stage."""
    Run(folder, CONFIG).write("train.pt", {})
    return folder


def test_the_same_config_continues(tmp_path):
    with_work(tmp_path)
    before = (tmp_path / "config.json").stat().st_mtime_ns
    Run(tmp_path, CONFIG)
    assert (tmp_path / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("change, words", [
    (dict(steps=9), "--steps 8, now it is 9"),
    (dict(steps=9, preset="paper"), "--preset quick, now it is paper"),     # it explains the others
    (dict(budget=("params", 0.7)), r"--budget None, now it is \['params', 0.7\]")])
def test_another_config_is_refused_once_there_is_work(change, words, tmp_path):
    with_work(tmp_path)
    with pytest.raises(WrongUsage, match=words):
        Run(tmp_path, CONFIG | change)


def test_another_config_is_taken_while_there_is_no_work(tmp_path):
    Run(tmp_path, CONFIG)
    Run(tmp_path, CONFIG | dict(steps=9))
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 9


def test_a_run_of_another_version_is_refused_and_not_misread(tmp_path):
    """An entry more or less, or no config at all: nothing is guessed and nothing is touched."""
    known = json.loads((with_work(tmp_path) / "config.json").read_text())
    fewer = {name: value for name, value in known.items() if name != "clip"}
    config = tmp_path / "config.json"
    for text in (json.dumps(known | dict(test=None)), json.dumps(fewer), "[]", "half a fi", None):
        config.unlink()
        if text:
            config.write_text(text)
        with pytest.raises(WrongUsage) as caught:
            Run(tmp_path, CONFIG)
        assert str(caught.value) == (
            f"{tmp_path} was made by another version of this program, its config.json is missing "
            f"or has other entries: give another folder with --run")
        assert text is None or config.read_text() == text
        config.touch()


def test_a_folder_with_somebody_elses_config_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"editor": "vim"}')
    (tmp_path / ".note.tmp").write_text("mine")
    with pytest.raises(WrongUsage):
        Run(tmp_path, CONFIG)
    assert sorted(os.listdir(tmp_path)) == [".note.tmp", "config.json"]
