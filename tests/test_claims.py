"""bench.claims: other rules for which channels and how many, its tables, stop and continue."""
import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import models
import prune
import train
from bench import channels, claims
from small_runs import photo
from tiny import native_loss, parameters, pooled_batch, run_command, tiny_drn, tiny_swinir

BATCHES = [pooled_batch(k, 2, 8) for k in range(2)]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The networks of the benchmark, known to the table for one test only."""
    monkeypatch.setattr(models, "PRESETS", {**models.PRESETS, **claims.SIZES})


# ---- which channels: by reconstruction ----------------------------------------------------------
def contributions(model, pair):
    """(width, numbers): what each channel adds to the output of the pair's consumer."""
    [(layer, columns)] = pair.consumers
    module = model.get_submodule(layer)
    inputs = []
    hook = module.register_forward_pre_hook(lambda module, x: inputs.append(x[0]))
    for batch in BATCHES:
        model(batch.images[1])
    hook.remove()
    rows = []
    for own in columns:
        weight = module.weight[:, own]
        if isinstance(module, torch.nn.Conv2d):
            found = [F.conv2d(x[:, own], weight, None, module.stride, module.padding)
                     for x in inputs]
        else:
            found = [F.linear(x[..., own], weight) for x in inputs]
        rows.append(torch.stack(found).flatten().double())
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("tiny, name", [
    (tiny_drn, "up0.rcab0"), (tiny_drn, "down1"), (tiny_drn, "up1.shuffle"),
    (tiny_swinir, "group0.block1.attn"), (tiny_swinir, "group1.block0.mlp")])
def test_inner_products_are_those_of_what_the_channels_contribute(tiny, name):
    model, _ = tiny()
    model.eval()
    [pair] = [pair for pair in model.pairs() if pair.name == name]
    [consumer] = pair.consumers
    G = channels.inner_products(model.requires_grad_(False), *consumer, BATCHES)
    z = contributions(model, pair)
    assert np.abs(G - z @ z.T).max() < 1e-5 * np.abs(G).max()


def test_greedy_removes_what_adds_least_to_the_removed_sum():
    z = np.random.default_rng(0).normal(size=(7, 3))
    removed = []
    for _ in range(3):
        left = [j for j in range(7) if j not in removed]
        removed.append(min(left, key=lambda j: np.linalg.norm(z[[*removed, j]].sum(0))))
    assert channels.greedy(z @ z.T, 4) == [j for j in range(7) if j not in removed]


def test_lasso_keeps_no_two_channels_that_say_the_same():
    z = np.diag([5.0, 4.0, 1.0, 3.0])
    assert sorted(channels.lasso(z @ z.T, 2)) == [0, 1]
    twice = np.concatenate([z[:1], z], 0)              # 0 and 1 are the same
    chosen = channels.lasso(twice @ twice.T, 3)
    assert len({0, 1} & set(chosen)) == 1
    assert {2, 4} <= set(chosen)


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_lasso_takes_what_least_angles_take(n):
    """Orthogonal contributions with a known sum: β_j = (1 − λ/|z_j|²)₊, so the longest go first."""
    z = np.diag(np.random.default_rng(n).permutation(np.arange(1.0, 9)))
    assert sorted(channels.lasso(z @ z.T, n)) == sorted(np.argsort(-z.sum(1))[:n])


def test_channels_that_repeat_others_cost_nothing_with_lasso():
    """Every second channel is made a copy of the one before: half of them, doubled, are enough."""
    model, _ = tiny_drn()
    model.eval().requires_grad_(False)
    for pair in model.pairs():
        for layer, rows in pair.producers:
            module = model.get_submodule(layer)
            module.weight[rows[1::2]] = module.weight[rows[::2]]
            if module.bias is not None:
                module.bias[rows[1::2]] = module.bias[rows[::2]]
        for layer, columns in pair.consumers:
            weight = model.get_submodule(layer).weight
            weight[:, columns[1::2]] = weight[:, columns[::2]]
    low = BATCHES[0].images[1]
    before = model(low).images[4]
    widths = {pair.name: pair.width // 2 for pair in model.pairs()}
    kept = channels.by_reconstruction(model, BATCHES, widths, channels.lasso)
    assert {name: len({j // 2 for j in order}) for name, order in kept.items()} == widths
    after = prune.cut(model, kept).eval()(low).images[4]
    assert (after - before).abs().max() < 1e-3 * before.abs().max()


def test_channels_by_norm_and_by_chance_count_a_channel_once_per_head():
    model, _ = tiny_swinir()
    widths = {pair.name: pair.heads * 4 for pair in model.pairs()}
    for kept in (channels.by_l1_norm(model, widths), channels.by_chance(model, widths, 0)):
        for pair in model.pairs():
            assert len(set(kept[pair.name])) == 4
            assert max(kept[pair.name]) < pair.width
    norms = prune.importance(model, model.pairs()[1])
    strongest = channels.by_l1_norm(model, widths)["group0.block0.mlp"]
    assert norms[strongest].min() >= norms.sort().values[-4]
    assert channels.by_chance(model, widths, 0) != channels.by_chance(model, widths, 1)


# ---- which channels: parts of the loss ----------------------------------------------------------
def test_selection_by_the_output_alone_leaves_the_features_out(monkeypatch):
    widths = {pair.name: 4 for pair in tiny_drn()[0].pairs()}

    def chosen(what):
        model, duals = tiny_drn()
        duals.requires_grad_(False)
        loss, rate = claims.selection_loss(what, native_loss(duals), 5e-5)
        return prune.select(model, BATCHES, loss, widths, rate=rate)

    both = chosen("features + L_DR")
    output = chosen("L_DR")
    monkeypatch.setattr(prune.F, "mse_loss", lambda a, b: 0.0 * a.sum())
    assert chosen("features + L_DR") == output
    assert both != output


def test_selection_by_the_features_alone_leaves_the_output_out():
    widths = {pair.name: 4 for pair in tiny_drn()[0].pairs()}
    loss, rate = claims.selection_loss("features", lambda *a: pytest.fail("called"), 5e-5)
    one, other = tiny_drn()[0], tiny_drn()[0]
    kept = prune.select(one, BATCHES, loss, widths, rate=rate)
    truth = [batch._replace(images={**batch.images, 4: 1 - batch.images[4]}) for batch in BATCHES]
    assert prune.select(other, truth, loss, widths, rate=rate) == kept


# ---- how many -----------------------------------------------------------------------------------
def test_widths_by_l1_mass_hold_the_same_part_of_the_norms():
    model, _ = tiny_drn(blocks=12)
    for i, pair in enumerate(model.pairs()):              # from even norms to very uneven ones
        for layer, columns in pair.consumers:
            weight = model.get_submodule(layer).weight
            fall = (1 - 0.02 * i) ** torch.arange(pair.width)
            weight.data[:, columns[:, 0]] = fall.view(1, -1, 1, 1).expand(weight.shape)

    def cost(widths):
        return 100 + sum(widths.values())

    budget = prune.Budget(cost, 0.6 * cost(model.widths))
    widths = claims.by_l1_mass(model, 2, budget)
    assert 0.99 * budget.limit <= cost(widths) <= budget.limit
    enough, too_little = [], []
    for pair in model.pairs():
        norms = prune.importance(model, pair).sort(descending=True).values
        share = norms.cumsum(0) / norms.sum()
        n = widths[pair.name]
        if n > 2:
            too_little.append(share[n - 3].item())        # with a multiple of 2 less
        enough.append(share[n - 1].item())
    assert max(too_little) <= min(enough) + 1e-6
    assert widths["down0"] / 8 > widths["up1.rcab11"] / 32


# ---- tables -------------------------------------------------------------------------------------
def test_a_table_by_hand():
    def results(*values):
        return [dict(psnr=dict(photographs=v), cut=v - 1, seconds=2.0, params=1000,
                     madds=5e9)
                for v in values]

    text = claims.table({"ours": results(30, 31, 32), "theirs": results(30.1, 31.1, 31.7)},
                        ["photographs"], timed=True)
    assert text.splitlines() == [
        "|  | CPU seconds | parameters | MAdds | cut | photographs | difference | won |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| ours | 2.0 ± 0.0 | 1,000 | 5.000 G | 30.000 ± 1.000 | 31.000 ± 1.000 | – | – |",
        "| theirs | 2.0 ± 0.0 | 1,000 | 5.000 G | 29.967 ± 0.808 | 30.967 ± 0.808 | "
        "-0.033 ± 0.231 | 2 of 3 |"]
    single = claims.table({"a": results(30), "b": results(31)}, ["photographs"], timed=False)
    assert single.splitlines()[-1] == "| b | 1,000 | 5.000 G | 30.000 | 31.000 | +1.000 | 1 of 1 |"


def test_every_recipe_has_a_folder_of_its_own():
    recipes = set()
    for _, rows in itertools.islice(claims.QUESTIONS.values(), 1, None):
        recipes |= set(rows.values())
    folders = {recipe.folder() for recipe in recipes}
    assert len(folders) == len(recipes)
    assert claims.Recipe().folder() == "reference"
    assert claims.Recipe(tune=(("dual_weight", 0),)).folder() == "tune, dual_weight 0"


def test_the_settings_of_all_rows_exist():
    for _, rows in itertools.islice(claims.QUESTIONS.values(), 1, None):
        for recipe in rows.values():
            for stage in (recipe.search, recipe.select, recipe.tune):
                replace(claims.NETWORKS["drn_small"], **dict(stage))


# ---- the command --------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path, monkeypatch):
    """The command on tiny sizes: call it with its flags."""
    for name in ("photographs", "Set1"):
        (tmp_path / name).mkdir()
        photo(96).save(tmp_path / name / "a.png")
    monkeypatch.setattr(data, "photographs",
                        lambda scales: data.open_folder(tmp_path / "photographs", scales))
    monkeypatch.setattr(claims, "QUICK", claims.QUICK | dict(
        pictures=4, side=64, steps=3, search_steps=2, tune_steps=2, per_round=16, batch=1,
        select_batch=1))
    return partial(run_command, claims)


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def test_the_command_continues_and_measures_new_test_sets_only(small, monkeypatch, capsys,
                                                               tmp_path):
    line = ["--quick", "--seeds", 1, "--only", "c,d", "--networks", "drn_small", "--device", "cpu",
            "--run", tmp_path / "run"]
    fit = train.fit
    calls = []

    def stop(run, stage, *rest):
        calls.append(stage)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fit(run, stage, *rest)

    monkeypatch.setattr(train, "fit", stop)
    assert small(monkeypatch, capsys, *line)[0] == 130
    code, output, _ = small(monkeypatch, capsys, *line)
    assert code == 0
    # 6 rows of c and 4 of d, of which "uniform" and "both" are the same; one was begun twice
    assert calls.count("train") == 1
    assert calls.count("tune") == 6 + 4 - 1 + 1
    rows = cells(output)
    assert [row[0] for row in rows if row[0] in claims.QUESTIONS["d"][1]] == [
        "L1 loss alone", "and dual", "and distillation", "and both (DRC)"]
    [uniform] = [row for row in rows if row[0] == "uniform"]
    [both] = [row for row in rows if row[0] == "and both (DRC)"]
    assert uniform[1:5] == both[1:5]
    counts = [int(row[1].replace(",", "")) for row in rows
              if row[0] in claims.QUESTIONS["c"][1]]
    assert len(counts) == 6
    whole = parameters(models.build("drn_small"))
    assert 0.99 * 0.6 * whole <= min(counts) <= max(counts) <= 0.6 * whole
    # nothing is trained again for another set of pictures
    monkeypatch.setattr(train, "fit", lambda *a: pytest.fail("trained again"))
    code, output, _ = small(monkeypatch, capsys, *line, "--test", tmp_path / "Set1")
    assert code == 0
    again = cells(output)
    for before, after in zip(rows, again):
        assert after[:len(before)] == before
        assert len(after) == len(before) + 3


def test_the_rows_of_b_and_e(small, monkeypatch, capsys, tmp_path):
    code, output, _ = small(
        monkeypatch, capsys, "--quick", "--seeds", 1, "--only", "b,e", "--networks", "swinir_small",
        "--device", "cpu", "--run", tmp_path / "run")
    assert code == 0
    found = [row[0] for row in cells(output)]
    for q in "be":
        assert set(claims.QUESTIONS[q][1]) <= set(found)


@pytest.mark.parametrize("flags, code, words", [
    (["--only", "a,g"], 2, "'g' is no question: choose among a, b, c, d, e, f"),
    (["--networks", "drn_s"], 2, "'drn_s' is no network: choose among drn_small, swinir_small"),
    (["--seeds", "0"], 2, "--seeds: 0 is below 1"),
    (["--test", "nowhere"], 1, "nowhere is missing"),
    (["--data", "nowhere"], 1, "nowhere is missing")])
def test_wrong_flags_are_one_sentence(flags, code, words, small, monkeypatch, capsys, tmp_path):
    found, _, errors = small(monkeypatch, capsys, "--quick", "--run", tmp_path / "run", *flags)
    assert found == code
    assert words in errors
    assert "Traceback" not in errors


def test_another_kind_of_run_in_the_same_folder_is_refused(small, monkeypatch, capsys, tmp_path):
    line = ["--quick", "--seeds", 1, "--only", "a", "--networks", "swinir_small", "--device",
            "cpu", "--run", tmp_path / "run"]
    assert small(monkeypatch, capsys, *line)[0] == 0
    monkeypatch.setattr(claims, "QUICK", claims.QUICK | dict(steps=4))
    code, _, errors = small(monkeypatch, capsys, *line)
    assert code == 2
    assert "was made with --steps 3, now it is 4" in errors
