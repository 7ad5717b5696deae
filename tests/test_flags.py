"""Settings, their presets, and flags: the papers' numbers, what a flag changes, what is refused."""
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest
import torch

import flags
import models
from backbones.drn import DRN
from settings import PRESETS, Settings
from tiny import ROOT


def parse(line: str):
    """(args, settings) of `python train.py --device cpu LINE`."""
    return flags.parse_args(["--device", "cpu", *line.split()])


def settings(line: str):
    return parse(line)[1]


# ---- settings -----------------------------------------------------------------------------------
# Written down by hand from the papers; the test below says from which sections.
DRN_PAPER = dict(
    patch=384, batch=32, steps=1_000_000, rate=1e-4, floor=1e-7, betas=(0.9, 0.999), milestones=(),
    warmup=0, ema=0, drop_path=0, dual_weight=0.1,
    search_steps=2_500, epoch=25, search_patch=192, search_batch=16, search_rate=1e-4,
    search_decay=3e-4, search_clip=5, first_order=False,
    calibration_pictures=160, select_patch=192, select_batch=16, select_batches=10,
    select_rate=5e-5, per_round=1, reuse=False,
    tune_steps=1_000_000, tune_rate=1e-4, distill_weight=1)
SWINIR_PAPER = DRN_PAPER | dict(
    patch=256, steps=500_000, rate=2e-4, ema=0.999, drop_path=0.1,
    warmup=4_000 / 500_000,
    milestones=(250_000 / 500_000, 400_000 / 500_000, 450_000 / 500_000, 475_000 / 500_000),
    search_patch=256, search_rate=2e-4, search_decay=0, select_patch=256, select_rate=1e-4,
    tune_steps=500_000, tune_rate=2e-4)
DAT_PAPER = SWINIR_PAPER | dict(ema=0, betas=(0.9, 0.99))
DCLS_PAPER = DRN_PAPER | dict(
    patch=256, batch=64, steps=500_000, rate=4e-4,
    milestones=(200_000 / 500_000, 400_000 / 500_000),
    search_patch=256, search_rate=1e-5, search_decay=0, search_clip=0.1,
    select_patch=256, select_rate=1e-5, tune_steps=500_000, tune_rate=4e-4, epsilon=1e-20)


@pytest.mark.parametrize("family, expected", [
    ("drn", DRN_PAPER), ("swinir", SWINIR_PAPER), ("dat", DAT_PAPER), ("dcls", DCLS_PAPER)])
def test_the_paper_preset_is_the_papers(family, expected):
    """The numbers above were written down by hand from the papers and not from settings.py, so that
    a slip there shows: training and fine-tuning from DRC (arXiv 2207.07929, Section 5.1), search
    and selection from its Sections 4.1 and 4.2 and its release, λ from DRN (arXiv 2003.07018,
    Section 3.1); SwinIR, DAT and DCLS from their own papers' sections on training and the releases.
    """
    found = asdict(PRESETS[family, "paper"])
    assert {name: found[name] for name in expected} == expected


def test_a_typo_in_a_preset_is_an_error_at_once():
    with pytest.raises(TypeError, match="serach_steps"):
        replace(PRESETS["drn", "quick"], serach_steps=3)


def test_settings_do_not_change_under_way():
    with pytest.raises(FrozenInstanceError):
        PRESETS["drn", "quick"].steps = 3


def test_every_setting_is_explained():
    source = (ROOT / "settings.py").read_text()
    for field in fields(Settings):
        assert re.search(rf"^    {field.name}: .*# \S", source, re.MULTILINE), field.name


# ---- presets ------------------------------------------------------------------------------------
def test_without_flags_the_settings_are_the_preset():
    chosen = settings("--arch drn_s --preset default")
    expected = asdict(PRESETS["drn", "default"]) | dict(arch="drn_s", preset="default")
    assert asdict(chosen) == expected


def test_a_family_shares_its_presets():
    line = "--preset quick --scale 4 --arch "
    light, full = asdict(settings(line + "swinir_light")), asdict(settings(line + "swinir"))
    assert {name for name in light if light[name] != full[name]} == {"arch"}
    assert light["steps"] == 800


def test_the_preset_is_default_with_a_gpu_and_quick_without(monkeypatch):
    monkeypatch.setattr(flags, "usable_device", torch.device)      # as if there were one
    _, with_gpu = flags.parse_args(["--arch", "drn_s", "--device", "cuda"])
    assert with_gpu.preset == "default"
    assert with_gpu.steps == 30_000
    assert settings("--arch drn_s").preset == "quick"


def test_the_headline_says_what_runs_why_with_these_numbers_and_where_the_result_goes():
    for line, why in (("", "preset quick (chosen because there is no GPU; --preset default"),
                      ("--preset quick", "preset quick (given)")):
        args, chosen = parse(f"--arch drn_s {line}")
        text = flags.headline(args, chosen, "kernels: torch")
        for words in ("drn_s x4", why, "kernels: torch", "runs/drn_s_x4_p00"):
            assert words in text


def test_a_network_without_settings_is_told_which_line_to_add(monkeypatch, capsys):
    monkeypatch.setitem(models.PRESETS, "edsr", (DRN, {4: dict(feats=8, blocks=1)}))
    with pytest.raises(SystemExit, match="2"):
        parse("--arch edsr")
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("error: no settings for edsr: add settings.PRESETS['edsr', 'quick']")


# ---- what flags change --------------------------------------------------------------------------
@pytest.mark.parametrize("line, changed", [
    ("--steps 7 --rate 0.5", dict(steps=7, rate=0.5, continue_training=True)),
    ("--search-steps 3 --tune-steps 4", dict(search_steps=3, tune_steps=4)),
    ("--first-order --round 8 --seed 5", dict(first_order=True, round=8, seed=5)),
    ("--no-first-order", dict(first_order=False)),
    ("--dual-weight 0", dict(dual_weight=0)),
    ("--prune 0.3 --widths uniform", dict(prune=0.3, widths="uniform")),
    ("--prune 0.25 --pictures 9", dict(prune=0.25, pictures=9)),
    ("--data D --teacher drn_l:t.pt", dict(data="D", teacher="drn_l:t.pt")),
    ("--pretrained a --pretrained-dual b --channels c",
     dict(pretrained="a", pretrained_dual="b", channels="c"))])
def test_a_flag_changes_its_own_number_alone(line, changed):
    plain = asdict(settings("--arch drn_s"))
    assert asdict(settings(f"--arch drn_s {line}")) == plain | changed


@pytest.mark.parametrize("name, value, flag, given", [
    ("seed", 7, "--seed 0", 0), ("round", 8, "--round 4", 4), ("scale", 8, "--scale 4", 4),
    ("prune", 0.3, "--prune 0", 0)])
def test_what_a_preset_sets_is_taken_unless_a_flag_is_given(name, value, flag, given, monkeypatch):
    """Also what the presets of this project leave to the flags; a flag of 0 is a flag."""
    own = replace(PRESETS["drn", "quick"], **{name: value})
    monkeypatch.setitem(PRESETS, ("drn", "quick"), own)
    assert getattr(settings("--arch drn_s"), name) == value
    assert getattr(settings(f"--arch drn_s {flag}"), name) == given


@pytest.mark.parametrize("flag, name, value", [
    ("--test T", "test", "T"), ("--memory 0.5", "memory", 0.5),
    ("--cache C", "cache", Path("C")), ("--strict", "strict", True),
    ("--kernels torch", "kernels", "torch")])
def test_resources_are_no_settings(flag, name, value):
    """A run may be continued with more memory, other kernels, or a corrected test folder."""
    plain = settings("--arch drn_s")
    args, changed = parse(f"--arch drn_s {flag}")
    assert changed == plain
    assert getattr(args, name) == value


@pytest.mark.parametrize("flag, found", [
    # (patch, search_patch, select_patch) of the quick preset: 64, 64, 48
    ("", (64, 64, 48)),
    ("--patch 96", (96, 64, 48)),
    ("--patch 56", (56, 56, 48)),
    ("--patch 24", (24, 24, 24))])
def test_a_smaller_patch_is_meant_for_all_stages(flag, found):
    s = settings(f"--arch drn_s {flag}")
    assert (s.patch, s.search_patch, s.select_patch) == found


@pytest.mark.parametrize("flag, found", [
    # (batch, search_batch, select_batch) of the quick preset: 4, 2, 2
    ("", (4, 2, 2)), ("--batch 8", (8, 2, 2)), ("--batch 1", (1, 1, 1))])
def test_a_smaller_batch_is_meant_for_all_stages(flag, found):
    s = settings(f"--arch drn_s {flag}")
    assert (s.batch, s.search_batch, s.select_batch) == found


def test_patches_of_a_preset_are_cut_to_a_multiple_of_the_scale():
    """64, 64 and 48 for scale 3: 63, 63, 48; a given patch stays as it is."""
    s = settings("--arch swinir_light --scale 3")
    assert (s.patch, s.search_patch, s.select_patch) == (63, 63, 48)
    s = settings("--arch swinir_light --scale 3 --patch 36")
    assert (s.patch, s.search_patch, s.select_patch) == (36, 36, 36)


def test_a_budget_brings_its_own_ratio_unless_one_is_given():
    """The candidates must surround the target: 1 − 0.6 / 0.75 = 0.2, if all could be pruned."""
    s = settings("--arch drn_s --budget params=0.6")
    assert s.budget == ("params", 0.6)
    assert s.prune == pytest.approx(0.2, abs=0.005)
    # 363,246 of DAT-light's 572,766 parameters belong to no width
    rest = 363_246 / 572_766
    s = settings("--arch dat_light --budget params=0.8")
    assert rest + (1 - rest) * (1 - s.prune) * 0.75 == pytest.approx(0.8, abs=1e-4)
    assert settings("--arch drn_s --budget madds=.6 --prune 0.3").prune == 0.3
    s = settings("--arch drn_s --budget latency=0.6 --round 16")
    assert (s.budget, s.round) == (("latency", 0.6), 16)
    assert s.prune == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("line, folder", [
    ("--arch drn_s --prune 0.3", "runs/drn_s_x4_p30"),
    ("--arch drn_s --prune 0.3 --widths uniform", "runs/drn_s_x4_p30_uniform"),
    ("--arch drn_s --scale 8", "runs/drn_s_x8_p00"),
    ("--arch dat --scale 2 --budget params=0.7", "runs/dat_x2_params70"),
    ("--arch drn_s --budget latency=0.65", "runs/drn_s_x4_latency65"),
    ("--arch drn_s --run here", "here")])
def test_the_run_folder_tells_what_the_run_is(line, folder):
    assert str(parse(line)[0].run) == folder


# ---- what is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize("line, words", [
    ("--arch drn_m", "invalid choice: 'drn_m'"),
    ("--arch drn_s --scale 3", "--scale: drn_s has no scale 3: choose one of 4, 8"),
    ("--arch drn_s --prune 1", "--prune: 1 is outside [0, 1)"),
    ("--arch drn_s --prune -0.1", "--prune: -0.1 is outside [0, 1)"),
    ("--arch drn_s --prune nan", "--prune: nan is outside [0, 1)"),
    ("--arch drn_s --prune x", "invalid float value: 'x'"),
    ("--arch drn_s --steps 0", "--steps: 0 is outside [1, "),
    ("--arch drn_s --rate 0", "--rate: 0 must be above 0"),
    ("--arch drn_s --dual-weight -0.1", "--dual-weight: -0.1 is below 0"),
    ("--arch drn_s --dual-weight inf", "--dual-weight: inf is no finite number"),
    ("--arch drn_s --dual-weight nan", "--dual-weight: nan is no finite number"),
    ("--arch drn_s --prune 0.3 --widths even", "--widths: invalid choice: 'even'"),
    ("--arch drn_s --widths uniform", "add --prune R or --budget"),
    ("--arch drn_s --prune 0.3 --widths uniform --search-steps 3",
     "--search-steps and --first-order belong to --widths searched"),
    ("--arch drn_s --prune 0.3 --widths uniform --first-order",
     "--search-steps and --first-order belong to --widths searched"),
    ("--arch drn_s --seed -1", "--seed: -1 is outside [0, "),
    (f"--arch drn_s --seed {2**64}", "--seed: 18446744073709551616 is outside"),
    (f"--arch drn_s --steps {'9' * 400}", "is outside [1, 1000000000)"),
    ("--arch drn_s --memory 1e300", "--memory: 1e300 is outside"),
    ("--arch drn_s --data=", "--data: it is empty"),
    ("--arch drn_s --pretrained=", "--pretrained: it is empty"),
    ("--arch drn_s --patch 30", "--patch 30 is not a multiple of the scale 4"),
    ("--arch drn_s --budget params=1.5", "'params=1.5' is not params=F, madds=F or latency=F"),
    ("--arch drn_s --budget params=0.0", "with F in (0, 1]"),
    ("--arch drn_s --budget latency=0", "'latency=0' is not params=F, madds=F or latency=F"),
    ("--arch drn_s --budget latency=2", "with F in (0, 1]"),
    ("--arch drn_s --budget madds=x", "'madds=x' is not params=F, madds=F or latency=F"),
    ("--arch drn_s --budget time=0.7", "'time=0.7' is not params=F, madds=F or latency=F"),
    ("--arch drn_s --teacher drn_l", "'drn_l' is not ARCH:FILE with ARCH one of drn_s, drn_l"),
    ("--arch drn_s --teacher drn_x:a.pt", "'drn_x:a.pt' is not ARCH:FILE"),
    ("--arch drn_s --preset paper", "--preset paper needs --data DIR"),
    ("--arch drn_s --channels c.txt", "belong to --pretrained FILE"),
    ("--arch drn_s --pretrained-dual d.pt", "belong to --pretrained FILE"),
    ("--arch dat_light --batch 1",
     "--batch 1: dat_light has BatchNorm over the patches of a step, give at least 2"),
    ("--arch drn_s --degradation linear", "--degradation: invalid choice: 'linear'"),
    ("--arch dcls --degradation nearest", "dcls is blind and trained with blurs of its own"),
    ("--arch drn_s --unpaired D --unpaired-share 0", "--unpaired-share: 0 is outside (0, 1)"),
    ("--arch drn_s --unpaired D --unpaired-share 1", "--unpaired-share: 1 is outside (0, 1)"),
    ("--arch drn_s --unpaired D --unpaired-share nan", "--unpaired-share: nan is outside (0, 1)"),
    ("--arch drn_s --unpaired-share 0.2", "--unpaired-share belongs to --unpaired DIR"),
    ("--arch dcls --unpaired D", "--unpaired: dcls is blind"),
    ("--arch drn_s --unpaired D --dual-weight 0", "--dual-weight 0 leaves nothing to learn from"),
    ("--arch drn_s --unpaired D --batch 1", "--batch 1 cannot hold a pair and a photograph"),
    ("--arch drn_s --unpaired D --pretrained a.pt", "--unpaired adapts --pretrained weights by"),
    ("--arch drn_s --round 6", "--round: invalid choice: 6 (choose from 4, 8, 16)"),
    ("--arch drn_s --device toaster", "--device: 'toaster' cannot be used here: try cpu")])
def test_wrong_flags_are_one_sentence(line, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(line)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in said
    assert words in said


def test_batchnorm_needs_no_two_patches_where_nothing_is_trained():
    assert settings("--arch dat_light --batch 1 --pretrained a.pt").batch == 1
