"""bench.finetune: the stages of train.py with looks in between, stopped and continued."""
import json
from functools import partial

import numpy as np
import pytest

import data
import models
import run
from backbones.drn import DRN
from bench import finetune
from small_runs import QUICK, SIZES, photo, weights
from tiny import run_command, same

call = partial(run_command, finetune)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A tiny network, and one picture in place of the photographs."""
    monkeypatch.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))
    (tmp_path / "photographs").mkdir()
    photo(96).save(tmp_path / "photographs" / "a.png")
    monkeypatch.setattr(data, "photographs",
                        lambda scales: data.open_folder(tmp_path / "photographs", scales))
    monkeypatch.setattr(run, "SAVE_SECONDS", 0)


def test_marks_lie_close_at_the_beginning():
    marks = [step for step in range(1, 3001) if finetune.is_mark(step)]
    assert marks == [25, 50, 100, 200, 400, 800, 1000, 1600, 2000, 3000]


@pytest.mark.parametrize("uncut", [False, True])
def test_a_stopped_fine_tuning_goes_on_where_it_was(uncut, monkeypatch, capsys, tmp_path):
    line = [*QUICK, *(["--uncut"] if uncut else []), "--set", "tune_rate=1e-3"]
    monkeypatch.setattr(finetune, "is_mark", lambda step: step % 2 == 0)
    code, output, _ = call(monkeypatch, capsys, *line, "--run", tmp_path / "whole")
    assert code == 0
    whole = models.load(tmp_path / "whole" / ("train.pt" if uncut else "select.pt"))
    assert f"{sum(p.numel() for p in whole.parameters()):,} parameters" in output

    # the other one stops after four of its six steps of fine-tuning
    arguments = [*line, "--run", tmp_path / "stopped"]
    save = run.Run.save
    steps = []

    def stop_after_four(self, stage, step, parts):
        save(self, stage, step, parts)
        if stage == "tune":
            steps.append(step)
            if steps == [1, 2, 3, 4]:
                raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "save", stop_after_four)
    assert call(monkeypatch, capsys, *arguments)[0] == 130
    assert call(monkeypatch, capsys, *arguments)[0] == 0
    assert steps == [1, 2, 3, 4, 5, 6]
    assert same(weights(tmp_path / "whole", "tune"), weights(tmp_path / "stopped", "tune"))
    curves = [json.loads((tmp_path / name / "curve.json").read_text())
              for name in ("whole", "stopped")]
    assert curves[0] == curves[1]
    assert list(curves[0]) == ["0", "2", "4", "6"]


@pytest.mark.parametrize("text, words", [
    ("speed=3", "settings.py has no number 'speed'"),
    ("tune_rate", "'tune_rate' is not NAME=NUMBER"),
    ("arch=3", "settings.py has no number 'arch'"),
])
def test_wrong_numbers_are_one_sentence(text, words, monkeypatch, capsys, tmp_path):
    code, _, errors = call(monkeypatch, capsys, *QUICK, "--set", text, "--run", tmp_path / "run")
    assert code == 2
    assert words in errors


def test_halved_pictures_are_half_as_large():
    pictures = data.generate(2, 96, (1, 4), 0)
    [first, _] = finetune.halved(pictures)
    high = pictures[0].images[4]
    assert np.array_equal(first.images[4], data.imresize(high, 0.5))
    assert first.images[1].shape == (12, 12, 3)
