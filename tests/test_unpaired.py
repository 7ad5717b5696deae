"""Photographs without originals: which are read, how a batch holds them, a run that adapts."""
import itertools
from functools import partial

import numpy as np
import pytest
import torch

import data
import dual
import fitting
import models
import report
import train
import unpaired
from backbones.base import SR
from backbones.drn import DRN
from pictures import picture, save
from small_runs import SIZES, photo, weights
from tiny import rule, run_command, same, tiny_drn

call = partial(run_command, train)
PAIRS = data.Pictures(["pair"], lambda i: data.reduced(picture(64, 64), (1, 2, 4), "p"), (1, 2, 4))


# ---- which photographs --------------------------------------------------------------------------
def test_photographs_of_a_folder_are_read_as_they_are(tmp_path):
    save(tmp_path / "a.png", picture(9, 14))
    save(tmp_path / "deep" / "b.png", picture(8, 8, 1))
    found = unpaired.open_photographs(tmp_path)
    assert found.names == ["a.png", "deep/b.png"] and found.scales == (1,)
    assert list(found[0].images) == [1]
    assert np.array_equal(found[0].images[1], picture(9, 14))


@pytest.mark.parametrize("name, words", [
    ("none", "none is missing: give a folder of photographs"),
    ("a.png", "a.png is a file: give a folder of photographs"),
    ("empty", "empty holds no picture")])
def test_folders_without_photographs_are_refused(name, words, tmp_path):
    save(tmp_path / "a.png", picture(4, 4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words):
        unpaired.open_photographs(tmp_path / name)


# ---- batches ------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch, share, count", [
    (16, 0.3, 5), (32, 0.3, 10), (10, 0.25, 2), (4, 0.3, 1), (2, 0.01, 1), (2, 0.99, 1),
    (3, 0.99, 2)])
def test_the_share_is_rounded_and_leaves_one_of_either(batch, share, count):
    assert unpaired.alone(batch, share) == count


def photographs(side: int = 24) -> data.Pictures:
    """Two of them, darker than all pairs, so that a test can tell them apart."""
    return data.Pictures(["a", "b"], lambda i: data.Picture({1: picture(side, side, i + 1) // 128}),
                         (1,))


def some(count: int, start: int = 0, seed: int = 0) -> list[SR]:
    source = unpaired.batches(PAIRS, photographs(), 16, 5, 0.4, seed, start)
    found = list(itertools.islice(source, count))
    source.close()
    return found


def test_photographs_stand_behind_the_pairs():
    [batch] = some(1)
    shapes = {s: tuple(x.shape) for s, x in batch.images.items()}
    assert shapes == {1: (5, 3, 4, 4), 2: (3, 3, 8, 8), 4: (3, 3, 16, 16)}
    assert (batch.images[1][3:] * 255).max() <= 1
    assert (batch.images[1][:3] * 255).amax((1, 2, 3)).min() > 1
    [pairs] = itertools.islice(data.batches(PAIRS, 16, 3, 0), 1)
    assert torch.equal(pairs.images[1], batch.images[1][:3])
    assert torch.equal(pairs.images[4], batch.images[4])


def test_a_step_depends_on_seed_and_number_alone():
    assert same(some(2, start=3), some(5)[3:])
    assert not same(some(1), some(1, seed=1))


def test_photographs_are_not_cut_as_the_pairs_are():
    """Small images of the same originals: what is cut from them must be of other places."""
    small = data.Pictures(["pair"], lambda i: data.Picture({1: PAIRS[i].images[1]}), (1,))
    source = unpaired.batches(PAIRS, small, 16, 2, 0.5, 0)
    cuts = [batch.images[1] for batch in itertools.islice(source, 6)]
    source.close()
    assert not all(torch.equal(low[0], low[1]) for low in cuts[:1])
    assert sum(torch.equal(low[0], low[1]) for low in cuts) <= 1


def test_parts_of_a_batch_have_the_gradients_of_the_whole():
    """--accumulate: the last parts may hold photographs alone."""
    model, duals = tiny_drn()
    high = rule.image(0, 2, 32, 32)
    lows = rule.image(1, 5, 8, 8)
    batch = SR({1: lows, 2: high[..., ::2, ::2], 4: high})
    found = []
    for parts in (1, 2, 3, 5):
        model.zero_grad()
        duals.zero_grad()
        for part in fitting.divided(batch, parts):
            share = len(part.images[1]) / 5
            loss = dual.native_loss(model(part.images[1]), part, duals, 0.1, 255)
            (share * loss).backward()
        found.append([p.grad.clone() for p in (*model.parameters(), *duals.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7


# ---- a run --------------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path, monkeypatch):
    """drn_tiny, and the flags of a run that adapts and measures nothing."""
    monkeypatch.setitem(models.PRESETS, "drn_tiny", (DRN, {4: SIZES}))
    monkeypatch.setattr(report, "is_current", lambda *rest: True)
    monkeypatch.setattr(report, "print_table", lambda run: None)
    for name, side in (("test", 64), ("camera", 40)):
        (tmp_path / name).mkdir()
        photo(side).save(tmp_path / name / "0.png")
    return ["--arch", "drn_tiny", "--patch", "32", "--batch", "3", "--device", "cpu", "--data",
            tmp_path / "test", "--unpaired", tmp_path / "camera"]


def test_a_run_adapts_in_training_and_fine_tuning_and_continues(folders, tmp_path, monkeypatch,
                                                                capsys):
    kinds = []
    native = dual.native_loss

    def watched(out, batch, **rest):
        kinds.append((len(batch.images[1]), len(batch.images[4])))
        return native(out, batch, **rest)

    monkeypatch.setattr(dual, "native_loss", watched)
    line = [*folders, "--prune", "0.3", "--widths", "uniform", "--steps", "8", "--tune-steps", "6"]
    code, out, errors = call(monkeypatch, capsys, *line, "--run", tmp_path / "whole")
    assert code == 0, errors
    assert "unpaired  1 photographs" in out and "1 of the 3 patches of a step" in out
    assert kinds.count((3, 2)) == 8 + 6                     # all steps of stages 2 and 5
    assert {n for n, m in kinds if n == m} == {2}           # calibration: batches of pairs alone
    # stopped in the fifth step of each stage, it ends with the same weights
    monkeypatch.setattr(dual, "native_loss", native)
    monkeypatch.setattr(train.Run, "repeat", stopping(train.Run.repeat))
    codes = []
    while not codes or codes[-1] == 130:
        codes.append(call(monkeypatch, capsys, *line, "--run", tmp_path / "halves")[0])
    assert codes == [130, 130, 0]
    for stage in ("train", "tune"):
        assert same(weights(tmp_path / "whole", stage), weights(tmp_path / "halves", stage))


def stopping(repeat):
    """Run.repeat that is stopped once in a stage, after four steps, with its progress saved."""
    stopped = set()

    def once(self, stage, steps, one_step, batches, parts, *rest):
        def step(k, batch):
            if k == 4 and stage not in stopped:
                stopped.add(stage)
                self.save(stage, k, parts)
                raise KeyboardInterrupt
            return one_step(k, batch)
        return repeat(self, stage, steps, step, batches, parts, *rest)
    return once


def test_pretrained_weights_adapt(folders, tmp_path, monkeypatch, capsys):
    torch.manual_seed(1)
    model = models.build("drn_tiny")
    torch.save(models.checkpoint(model, dual.make_duals(model)), tmp_path / "w.pt")
    line = ["--steps", "2", "--pretrained", tmp_path / "w.pt"]
    ends = {}
    for name, flags in (("pairs", folders[:-2]), ("adapted", folders)):
        code, _, errors = call(monkeypatch, capsys, *flags, *line, "--run", tmp_path / name)
        assert code == 0, errors
        ends[name] = weights(tmp_path / name, "train")["model"]
    start = model.state_dict()
    assert not same(ends["pairs"], start) and not same(ends["adapted"], ends["pairs"])
    moved = [(ends["adapted"][name] - tensor).abs().max() for name, tensor in start.items()]
    assert max(moved) < 0.1                                 # two steps away from what was given


def test_an_empty_folder_is_one_sentence_before_any_work(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "camera" / "0.png").unlink()
    code, _, errors = call(monkeypatch, capsys, *folders, "--run", tmp_path / "run")
    assert code == 1
    assert errors.startswith("error: ") and "camera holds no picture" in errors
    assert not (tmp_path / "run" / "train.pt").exists()


def test_training_and_report_follow_the_degradation(folders, tmp_path, monkeypatch, capsys):
    opened = []
    load = data.load_picture

    def watched(high_file, low_files, scales, degradation="bicubic"):
        opened.append((scales, degradation))
        return load(high_file, low_files, scales, degradation)

    monkeypatch.setattr(data, "load_picture", watched)
    monkeypatch.setattr(report, "is_current", lambda *rest: False)
    monkeypatch.setattr(report, "times", lambda *rest: {})
    line = [*folders[:-2], "--steps", "1", "--test", tmp_path / "test", "--run", tmp_path / "run"]
    code, _, errors = call(monkeypatch, capsys, *line, "--degradation", "nearest")
    assert code == 0, errors
    # for training at the scales of the duals, for the report at two
    assert set(opened) == {((1, 2, 4), "nearest"), ((1, 4), "nearest")}
