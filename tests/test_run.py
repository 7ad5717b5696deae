"""Runs that continue where they were, in folders that belong to them alone."""
import json
import math
import os
import signal

import pytest
import torch

import run
from run import Run, WrongUsage


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


# ---- stages that are done -----------------------------------------------------------------------
CONFIG = dict(preset="quick", steps=8, betas=(0.9, 0.999), clip=math.inf, budget=None)
NONE = dict.fromkeys(("train", "search", "tune"), lambda content: None)


def three_stages(folder, config: dict = CONFIG) -> Run:
    """Does what is still to be done of three stages, each of which depends on the one before."""
    made = Run(folder, config)
    made.look(NONE)
    for number, stage in enumerate(NONE):
        made.done(stage) or made.finish(stage, dict(x=torch.tensor([number])), 0.0)
    return made


def when(folder) -> dict[str, int]:
    """When each stage was written."""
    return {stage: (folder / f"{stage}.pt").stat().st_mtime_ns for stage in NONE}


def test_finished_stages_are_not_done_again(tmp_path):
    three_stages(tmp_path)
    before = when(tmp_path)
    three_stages(tmp_path)
    assert when(tmp_path) == before


@pytest.mark.parametrize("stage", NONE)
@pytest.mark.parametrize("damage", ["gone", "cut", "wrong"])
def test_a_lost_or_damaged_stage_is_done_again_alone(stage, damage, tmp_path, capsys):
    """It comes out as before, so what was made from it stays."""
    three_stages(tmp_path)
    before = when(tmp_path)
    file = tmp_path / f"{stage}.pt"
    blob = file.read_bytes()
    file.unlink()
    if damage == "cut":
        file.write_bytes(blob[:-100])
    if damage == "wrong":
        torch.save([], file)
    three_stages(tmp_path)
    changed = [name for name, time in when(tmp_path).items() if time != before[name]]
    assert changed == [stage]
    if damage != "gone":
        assert f"{stage}.pt is damaged" in capsys.readouterr().out
        assert (tmp_path / f"{stage}.pt.old").exists()


def test_what_a_check_refuses_is_done_again(tmp_path, capsys):
    three_stages(tmp_path)

    def refuse(content):
        raise ValueError("its duals do not fit")

    assert not Run(tmp_path, CONFIG).look(NONE | dict(search=refuse))
    assert "search.pt is damaged (its duals do not fit)" in capsys.readouterr().out


def test_a_stage_that_comes_out_otherwise_makes_the_later_ones_useless(tmp_path, capsys):
    three_stages(tmp_path)
    (tmp_path / "train.pt").unlink()
    made = Run(tmp_path, CONFIG)
    assert not made.look(NONE)
    assert made.done("train") is None
    made.finish("train", dict(x=torch.tensor([99])), 0.0)          # on another device, say
    assert made.done("search") is None
    assert "search.pt was made from what is gone" in capsys.readouterr().out


def test_a_stage_of_another_run_is_refused(tmp_path):
    three_stages(tmp_path / "a")
    three_stages(tmp_path / "b", CONFIG | dict(steps=9))
    (tmp_path / "a" / "search.pt").write_bytes((tmp_path / "b" / "search.pt").read_bytes())
    words = "search.pt belongs to another run or version of this program: move it away"
    with pytest.raises(WrongUsage, match=words):
        three_stages(tmp_path / "a")


def test_a_stage_from_another_stage_is_refused(tmp_path):
    """The same settings, and weights of another machine."""
    three_stages(tmp_path)
    other = Run(tmp_path / "other", CONFIG)
    other.finish("train", dict(x=torch.tensor([99])), 0.0)
    (tmp_path / "train.pt").write_bytes((tmp_path / "other" / "train.pt").read_bytes())
    with pytest.raises(WrongUsage, match="search.pt was not made from the stage before it"):
        three_stages(tmp_path)


def test_a_lost_config_is_written_again_where_the_stages_are_of_it(tmp_path):
    three_stages(tmp_path)
    before = when(tmp_path)
    for text in (None, "{", "[]"):
        (tmp_path / "config.json").unlink()
        if text:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(WrongUsage, match="was made with other flags or by another version"):
            three_stages(tmp_path, CONFIG | dict(steps=9))
        three_stages(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["steps"] == 8
    assert when(tmp_path) == before


@pytest.mark.parametrize("damage", ["cut", "keys"])
def test_damaged_progress_begins_the_stage_again(damage, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)
    whole = walk(tmp_path / "whole")

    def stop(k):
        if k == 5:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        walk(tmp_path / "run", one_step=stop)
    file = tmp_path / "run" / "progress.pt"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-200])
    else:
        torch.save(dict(stage="walk"), file)
    assert walk(tmp_path / "run") == whole
    assert "progress.pt is damaged" in capsys.readouterr().out


def test_progress_that_does_not_fit_is_one_sentence(tmp_path):
    made = Run(tmp_path, CONFIG)
    made.save("walk", 3, dict(other=Walk()))
    with pytest.raises(ValueError, match="progress.pt does not fit stage walk of this run"):
        made.resume("walk", dict(walk=Walk()))
    Run(tmp_path / "b", CONFIG | dict(steps=9)).save("walk", 3, dict(walk=Walk()))
    (tmp_path / "progress.pt").write_bytes((tmp_path / "b" / "progress.pt").read_bytes())
    with pytest.raises(WrongUsage, match="progress.pt belongs to another run"):
        made.resume("walk", dict(walk=Walk()))


def test_sigterm_is_told_from_ctrl_c(tmp_path):
    def stop(k):
        if k == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(run.Terminated):
        walk(tmp_path / "run", one_step=stop)
