"""bench.unpaired: the pictures it makes, its loss with a known reduction, stop and continue."""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch.nn.functional as F

import data
import dual
import models
import train
from backbones.base import SR
from bench import claims, unpaired
from pictures import picture
from small_runs import photo
from tiny import rule, run_command, tiny_drn


def test_pictures_are_reduced_again_and_left_alone():
    original = picture(16, 24)
    pairs = data.Pictures(["a"], lambda i: data.reduced(original, (1, 2, 4), "a"), (1, 2, 4))
    [found] = unpaired.again(pairs, "nearest")
    assert np.array_equal(found.images[1], data.reduce(original, 4, "nearest"))
    assert np.array_equal(found.images[2], data.imresize(original, 1 / 2))
    alone = unpaired.without_originals(unpaired.again(pairs, "nearest"))
    assert alone.scales == (1,) and list(alone[0].images) == [1]
    assert np.array_equal(alone[0].images[1], found.images[1])


@pytest.mark.parametrize("kind", unpaired.KINDS)
def test_the_known_way_back_is_that_of_inputs_alone(kind):
    """Two pairs by L_DR, one input alone by its reduction: a third of each image's loss."""
    model, duals = tiny_drn()
    whole = {s: rule.image(s, 3, 8 * s, 8 * s) for s in (1, 2, 4)}
    out = model(whole[1])
    batch = SR({s: x if s == 1 else x[:2] for s, x in whole.items()})
    settings = replace(claims.NETWORKS["drn_small"], dual_weight=0.3)
    loss = 0
    for i in range(2):
        images = {s: x[i:i + 1] for s, x in out.images.items()}
        loss += dual.dr_loss(images, {s: x[i:i + 1] for s, x in whole.items()}, duals, 0.3)
    back = data.reduce_images(out.images[4][2:], 4, kind)
    loss += 0.3 * F.l1_loss(back, whole[1][2:])
    found = unpaired.known_loss(settings, model, duals, kind)(out, batch)
    assert found.item() == pytest.approx(255 * loss.item() / 3, rel=1e-5)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command on tiny sizes: call it with its flags."""
    monkeypatch.setattr(models, "PRESETS", {**models.PRESETS, **claims.SIZES})
    for name in ("photographs", "Set1"):
        (tmp_path / name).mkdir()
        photo(96).save(tmp_path / name / "a.png")
    monkeypatch.setattr(data, "photographs",
                        lambda scales: data.open_folder(tmp_path / "photographs", scales))
    monkeypatch.setattr(unpaired, "QUICK", dict(steps=2, tune_steps=2, batch=2))
    folder = tmp_path / "photographs"
    return partial(run_command, unpaired), [
        "--quick", "--seeds", 1, "--device", "cpu", "--data", folder, "--unpaired", folder,
        "--run", tmp_path / "run"]


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_command_continues_and_measures_new_pictures_only(small, monkeypatch, capsys, tmp_path):
    command, line = small
    fit = train.fit
    calls = []

    def counted(*rest):
        calls.append(rest[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*rest)

    monkeypatch.setattr(train, "fit", counted)
    monkeypatch.setattr(unpaired, "fit", counted)
    assert command(monkeypatch, capsys, *line)[0] == 130
    code, out, errors = command(monkeypatch, capsys, *line)
    assert code == 0, errors
    # before, pairs alone, and three ways for each of two kinds; one was begun twice
    assert len(calls) == 2 + 2 * 3 + 1
    rows = cells(out)
    assert [row[0] for row in rows if row[0] in unpaired.WAYS] == 2 * list(unpaired.WAYS)
    assert all(len(row) == 5 for row in rows if row[0] in unpaired.WAYS)
    monkeypatch.setattr(train, "fit", lambda *a: pytest.fail("trained again"))
    code, out, errors = command(monkeypatch, capsys, *line, "--test", tmp_path / "Set1")
    assert code == 0, errors
    again = cells(out)
    assert len(again) == len(rows)
    for before, after in zip(rows, again):
        if before[0] in unpaired.WAYS:
            assert after[:4] == before[:4] and len(after) == 8


def test_all_ways_begin_with_the_same_weights_and_differ_as_they_say(small, monkeypatch, capsys,
                                                                     tmp_path):
    command, line = small
    seen = {}

    def noted(run, settings, device, pairs, photographs=None):
        low = pairs[0].images[1]
        seen[run.folder.name] = (settings, low, photographs and photographs[0].images[1])
        model = models.build("drn_small")
        return run.finish("train", models.checkpoint(model, dual.make_duals(model)), 0.0)

    monkeypatch.setattr(train, "train", noted)
    ways = "pairs alone,adapted,true pairs"
    code, _, errors = command(monkeypatch, capsys, *line, "--ways", ways, "--dual-weight", 0.5)
    assert code == 0, errors
    original = np.array(photo(96))
    before = seen.pop("before")[0]
    assert (before.pretrained, before.dual_weight, before.steps) == (None, 0.1, 2)
    assert len(seen) == 5
    for name, (settings, low, alone) in seen.items():
        assert settings.pretrained.endswith("before/train.pt") and settings.continue_training
        kind = "nearest" if name.startswith("nearest") else "blur-down"
        expected = data.reduce(original, 4, kind if "true pairs" in name else "bicubic")
        assert np.array_equal(low, expected)
        if "adapted" in name:
            assert np.array_equal(alone, data.reduce(original, 4, kind))
            assert settings.dual_weight == 0.5
        else:
            assert alone is None
            assert settings.dual_weight == (0 if "alone" in name else 0.1)


@pytest.mark.parametrize("flags, code, words", [
    (["--ways", "adapted,other"], 2, "'other' is no way: choose among before, pairs alone"),
    (["--share", "1"], 2, "--share: 1 is outside (0, 1)"),
    (["--dual-weight", "0"], 2, "--dual-weight: 0 must be above 0"),
    (["--unpaired", "nowhere"], 1, "nowhere is missing")])
def test_wrong_flags_are_one_sentence(flags, code, words, small, monkeypatch, capsys):
    command, line = small
    found, _, errors = command(monkeypatch, capsys, *line, *flags)
    assert found == code
    assert words in errors and "Traceback" not in errors
