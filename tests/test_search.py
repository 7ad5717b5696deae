"""The search for how many channels: the release's numbers, sums by hand, budgets by brute force."""
import copy
import itertools

import numpy as np
import pytest
import torch

import prune
import search
from tiny import (
    blind_batch,
    golden,
    native_loss,
    parameters,
    pooled_batch,
    tiny_dat,
    tiny_dcls,
    tiny_drn,
    tiny_swinir,
)

GOLDEN_SEARCH = golden("search_drn")


# ---- the candidates -----------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, widths", [
    ((64, 0.3), [20, 24, 32, 36, 40, 44]),
    ((10, 0.3), [4, 4, 4, 4, 4, 8]),
    ((16, 0.3), [4, 4, 8, 8, 8, 12]),              # 16·0.7·0.6 = 6.7 -> 6: goes down to 4
    ((3, 0.9), [3, 3, 3, 3, 3, 3]),
    ((64, 0.0), [32, 36, 44, 52, 56, 64]),         # 38 lies between 36 and 40: it goes down
    ((64, 0.3, 8), [24, 24, 32, 32, 40, 40]),      # 44: it goes down
    ((24, 0.0, 8), [8, 16, 16, 16, 24, 24]),       # 12: it goes down
])
def test_candidates_by_hand(arguments, widths):
    assert search.candidates(*arguments) == widths


@pytest.mark.parametrize("width, ratio", [(16, 0.3), (32, 0.5), (64, 0.7), (180, 0.45)])
def test_candidates_are_the_nearest_multiples_of_four(width, ratio):
    fours = range(4, width + 1, 4)
    for part, n in zip((0.5, 0.6, 0.7, 0.8, 0.9, 1.0), search.candidates(width, ratio)):
        whole = int(width * (1 - ratio) * part)
        assert n == min(fours, key=lambda four: (abs(four - whole), four))


# ---- the relaxation -----------------------------------------------------------------------------
def golden_search(case):
    """(Search as in the release's run, a training batch, a validation batch)."""
    config = case["config"]
    model, duals = tiny_drn(config["n_resblocks"], config["n_feats"])
    searcher = search.Search(
        model, native_loss(duals), config["rate"], rate=config["w_lr"],
        decay=config["w_weight_decay"], second_order=config["corrected"])
    for i, alpha in enumerate(searcher.alphas):
        values = 0.3 * np.random.RandomState(50 + i).standard_normal(6)
        alpha.data = torch.from_numpy(values).float()
    low = config["lr_size"]
    return searcher, pooled_batch(200, 2, low), pooled_batch(201, 2, low)


def test_importance_is_the_l1_norm_of_what_reads_a_channel():
    model, _ = tiny_drn()
    pair = model.pairs()[2]                                   # up0.rcab0, read by body.2
    weight = torch.zeros(32, pair.width, 3, 3)
    weight[:, 5] = -1.0                                       # 32 outputs of 3×3
    weight[0, 9, 0] = 2.0                                     # one row of one kernel
    model.up_blocks[0][0].body[2].weight.data = weight
    found = search.importance(model, pair)
    assert found[5] == 288
    assert found[9] == 6
    assert found.sum() == 294


def test_importance_of_attention_is_over_all_heads():
    model, _ = tiny_swinir()
    weight = model.layers[0].residual_group.blocks[0].attn.proj.weight     # (12, 2 heads of 6)
    strength = weight.abs().sum(0)
    both = strength[:6] + strength[6:]
    assert torch.allclose(search.importance(model, model.pairs()[0]), both)


def test_importance_of_the_latent_of_dcls_is_over_all_five_consumers():
    model, _ = tiny_dcls()
    pair = model.pairs()[3]
    assert pair.name == "estimator.latent"
    expected = sum(dec.weight.abs().sum(0) for dec in model.Estimator.dec)
    assert torch.allclose(search.importance(model, pair), expected)


def test_factors_by_hand():
    """8 channels, candidates 4, 4, 4, 4, 8, 8, equal α: rank below 4 counts 1, the others 2/6."""
    model, duals = tiny_drn()
    pair = model.pairs()[0]                                   # down0: 8 channels
    weight = model.down[0].dual_module[1].weight
    strength = torch.tensor([3., 8, 1, 7, 2, 6, 5, 4]).view(1, 8, 1, 1)
    weight.data = torch.ones_like(weight) * strength
    searcher = search.Search(model, native_loss(duals), 0.0)
    assert searcher.candidates[0] == [4, 4, 4, 4, 8, 8]
    m = searcher.factors(pair, torch.zeros(6), searcher.candidates[0])
    third = 1 / 3
    assert m.tolist() == pytest.approx([third, 1, third, 1, third, 1, 1, third])


def test_relaxation_is_the_mixture_of_truncated_layers():
    searcher, _, _ = golden_search(GOLDEN_SEARCH[0])
    pair = searcher.pairs[2]
    name = pair.consumers[0][0]
    weight = searcher.model.get_submodule(name).weight
    x = torch.rand(1, pair.width, 5, 5)
    order = weight.abs().sum((0, 2, 3)).argsort(descending=True)
    mixture = 0
    for p, n in zip(searcher.alphas[2].softmax(0), searcher.candidates[2]):
        truncated = torch.zeros_like(weight)
        truncated[:, order[:n]] = weight[:, order[:n]]
        mixture = mixture + p * torch.conv2d(x, truncated, padding=1)
    scaled = searcher.scaled_weights()[f"{name}.weight"]
    assert torch.allclose(torch.conv2d(x, scaled, padding=1), mixture, atol=1e-5)


def test_a_channel_of_attention_is_scaled_in_all_heads():
    model, duals = tiny_swinir()
    searcher = search.Search(model, native_loss(duals, 1), 0.0)
    name, _ = searcher.pairs[0].consumers[0]
    m = searcher.factors(searcher.pairs[0], searcher.alphas[0], searcher.candidates[0])
    scaled = searcher.scaled_weights()[f"{name}.weight"]      # (12, 2 heads of 6)
    weight = model.get_submodule(name).weight
    assert torch.allclose(scaled[:, :6], weight[:, :6] * m)
    assert torch.allclose(scaled[:, 6:], weight[:, 6:] * m)
    assert m.min() < m.max()


# ---- the descent --------------------------------------------------------------------------------
@pytest.mark.parametrize("case", GOLDEN_SEARCH)
def test_alpha_gradients_are_the_releases(case):
    searcher, train, valid = golden_search(case)
    weights = [w.detach().clone() for w in searcher.weights]
    assert searcher.candidates == case["channel_sets"]
    assert searcher.loss(train).item() == pytest.approx(case["train_loss"], rel=1e-6)
    loss, gradients = searcher.alpha_gradient(train, valid)
    assert loss.item() == pytest.approx(case["val_loss"], rel=1e-6)
    ours = torch.stack(gradients)
    theirs = torch.tensor(case["alpha_grad"])
    assert (ours - theirs)[0].abs().max() < 1e-6              # equal candidates: truly 0
    relative = (ours - theirs)[1:].abs().amax(1) / theirs[1:].abs().amax(1)
    differences = case["config"]["corrected"] and case["config"]["w_lr"] == 0.01
    assert relative.max() < (1e-4 if differences else 1e-5)
    # The virtual step is undone exactly.
    assert all(torch.equal(a, b) for a, b in zip(weights, searcher.weights))


@pytest.mark.parametrize("options, alpha_rate", [({}, 3e-4), (dict(alpha_rate=0.1), 0.1)])
def test_the_first_step_of_adam_moves_by_the_learning_rates(options, alpha_rate):
    """Adam's first step is rate · sign(gradient): `alpha_rate` for an α, `rate` for a weight."""
    model, duals = tiny_drn()
    searcher = search.Search(model, native_loss(duals), 0.3, rate=2e-3, **options)
    alphas = torch.stack(searcher.alphas).detach()
    weight = model.head.weight.detach().clone()
    searcher.step(pooled_batch(0, 1, 8), pooled_batch(1, 1, 8))
    moved = (torch.stack(searcher.alphas).detach() - alphas).abs()
    assert torch.allclose(moved[1:], torch.full_like(moved[1:], alpha_rate), rtol=1e-2)
    assert (model.head.weight - weight).abs().median().item() == pytest.approx(2e-3, rel=1e-3)


def test_search_resumes_exactly_and_includes_the_duals():
    batches = [pooled_batch(k, 1, 8) for k in range(4)]

    def new():
        torch.manual_seed(1)
        model, duals = tiny_drn()
        return search.Search(model, native_loss(duals), 0.3, duals.parameters()), duals

    def steps(searcher, numbers):
        for k in numbers:
            searcher.step(batches[k], batches[k + 1])
            searcher.hold(batches[:1])

    whole, duals = new()
    before = [p.detach().clone() for p in duals.parameters()]
    steps(whole, range(3))
    assert not any(torch.equal(p, q) for p, q in zip(before, duals.parameters()))
    stopped, _ = new()
    steps(stopped, [0])
    state = copy.deepcopy(stopped.state_dict())
    resumed, _ = new()
    resumed.load_state_dict(state)
    assert resumed.best[0] == stopped.best[0]
    assert all(torch.equal(a, b) for a, b in zip(resumed.best[1], stopped.best[1]))
    steps(resumed, [1, 2])
    for a, b in zip(whole.weights + whole.alphas, resumed.weights + resumed.alphas):
        assert torch.equal(a, b)
    assert whole.best[0] == resumed.best[0]
    assert whole.widths() == resumed.widths()


def test_widths_are_of_the_best_held_out_epoch():
    model, duals = tiny_drn()
    searcher = search.Search(model, native_loss(duals), 0.3)
    batch = pooled_batch(1, 1, 8)
    for alpha in searcher.alphas:
        alpha.data = torch.tensor([0., 0, 0, 0, 0, 9])
    searcher.hold([batch])
    for alpha in searcher.alphas:
        alpha.data = torch.tensor([9., 0, 0, 0, 0, 0])
    for weight in searcher.weights:
        weight.data += 0.3                                    # ruined: a worse epoch
    searcher.hold([batch])
    assert list(searcher.widths().values()) == [sizes[5] for sizes in searcher.candidates]


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat])
def test_search_leaves_the_model_alone_and_answers_with_candidates(tiny):
    model, duals = tiny()
    before = copy.deepcopy(model.state_dict())
    batches = [pooled_batch(k, 1, 8) for k in range(3)]
    loss = native_loss(duals, model.rgb_range)
    widths = prune.search(model, iter(batches), iter(batches), batches[:1], loss, 0.3, steps=2)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert list(widths) == list(model.widths)
    for pair in model.pairs():
        assert widths[pair.name] // pair.heads in search.candidates(pair.width, 0.3)
        assert widths[pair.name] % pair.heads == 0


def test_search_moves_every_alpha_of_a_blind_network():
    """The pairs of the estimator by |k − k*| alone."""
    model, duals = tiny_dcls()
    loss = native_loss(duals, 1)
    searcher = search.Search(model, loss, 0.1, duals.parameters(), rate=1e-5, clip=0.1)
    _, gradients = searcher.alpha_gradient(blind_batch(1), blind_batch(2))
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def test_search_of_a_blind_network_leaves_it_alone():
    model, duals = tiny_dcls()
    before = copy.deepcopy(model.state_dict())
    batches = [blind_batch(k) for k in range(2)]
    widths = prune.search(model, iter(batches), iter(batches), batches[:1], native_loss(duals, 1),
                          0.1, steps=1, rate=1e-5)
    assert list(widths) == list(model.widths)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())


# ---- budgets ------------------------------------------------------------------------------------
def brute_force(scores, sizes, cost, limit):
    """Best total score among all choices whose cost lies within 1 % below the limit."""
    best = -np.inf
    for picks in itertools.product(range(6), repeat=len(sizes)):
        total = cost([options[k] for options, k in zip(sizes, picks)])
        if 0.99 * limit <= total <= limit:
            best = max(best, sum(row[k] for row, k in zip(scores, picks)))
    return best


@pytest.mark.parametrize("limit", [700, 800, 950])
def test_budget_is_met_and_the_best_choice_is_taken(limit):
    dense = dict(a=64, b=32, c=32, d=16, e=64)
    sizes = [search.candidates(width, 0.1) for width in dense.values()]
    scores = np.log(np.random.default_rng(limit).dirichlet(np.ones(6), 5))

    def cost(widths):
        return 100 + sum(unit * n for unit, n in zip((5, 3, 11, 7, 2), widths))

    def cost_of_names(widths):
        return cost({**dense, **widths}.values())

    budget = prune.Budget(cost_of_names, limit)
    picks = prune.fit_budget(scores, sizes, list(dense), budget)
    chosen = cost([options[k] for options, k in zip(sizes, picks)])
    assert 0.99 * limit <= chosen <= limit
    found = sum(row[k] for row, k in zip(scores, picks))
    assert found == pytest.approx(brute_force(scores, sizes, cost, limit), abs=1e-9)


@pytest.mark.parametrize("limit", [26, 31, 38])
def test_a_budget_of_costs_that_are_no_lines(limit):
    """Measured times: stairs, and a wider layer that is faster than a narrower one."""
    draw = np.random.default_rng(limit)
    sizes = [search.candidates(width, 0.1) for width in (64, 32, 32, 16, 64)]
    terms = []
    for options in sizes:
        terms.append({n: 3 * draw.random() + 2 * np.ceil(n / 16) for n in options})
    assert any(term[a] > term[b] for term in terms for a in term for b in term if a < b)
    scores = np.log(draw.dirichlet(np.ones(6), 5))
    names = list("abcde")

    def cost(widths):
        return 5 + sum(term[n] for term, n in zip(terms, widths))

    budget = prune.Budget(lambda widths: cost([widths[name] for name in names]), limit)
    picks = prune.fit_budget(scores, sizes, names, budget)
    chosen = cost([options[k] for options, k in zip(sizes, picks)])
    assert 0.99 * limit <= chosen <= limit
    found = sum(row[k] for row, k in zip(scores, picks))
    # each of the five costs is rounded up to a grid of 20,000
    best = brute_force(scores, sizes, cost, limit)
    best_on_grid = brute_force(scores, sizes, cost, limit * (1 - 5 / 20_000))
    assert best_on_grid - 1e-9 <= found <= best + 1e-9


@pytest.mark.parametrize("limit", [50, 500])
def test_a_budget_out_of_reach_is_refused(limit):
    budget = prune.Budget(lambda widths: 100 + widths["a"], limit)
    with pytest.raises(ValueError, match=f"the budget of {limit} cannot be met"):
        prune.fit_budget(np.zeros((1, 6)), [[4, 4, 8, 8, 12, 12]], ["a"], budget)


def test_a_budget_between_two_candidates_is_refused():
    """One layer of 4 or 12 channels cannot cost 108 of 104 or 112."""
    budget = prune.Budget(lambda widths: 10 * widths["a"], 80)
    with pytest.raises(ValueError, match="no choice of the candidate widths comes within 1 %"):
        prune.fit_budget(np.zeros((1, 6)), [[4, 4, 4, 12, 12, 12]], ["a"], budget)


@pytest.mark.parametrize("target, fixed, ratio", [
    (0.75, 0.0, 0.0), (0.9, 0.0, 0.0), (0.375, 0.0, 0.5), (0.6, 0.0, 0.2),
    (0.8, 0.5, 0.2),             # 0.5 + 0.5 · 0.8 · 0.75 = 0.8
    (0.4, 0.5, 0.9),             # out of reach
    (1.0, 1.0, 0.9),             # nothing can be pruned
])
def test_the_ratio_for_a_budget_by_hand(target, fixed, ratio):
    """The candidates' mean is 0.75 of what the ratio leaves: 0.8 · 0.75 = 0.6."""
    assert prune.budget_ratio(target, fixed) == pytest.approx(ratio)


@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_search_within_a_budget_of_parameters(tiny):
    model, duals = tiny()
    batches = [pooled_batch(k, 1, 8) for k in range(3)]

    def cost(widths):
        with torch.device("meta"):
            return parameters(model.with_widths(widths))

    smallest, largest = {}, {}
    for pair in model.pairs():
        options = search.candidates(pair.width, 0.1)
        smallest[pair.name] = pair.heads * min(options)
        largest[pair.name] = pair.heads * max(options)
    limit = (cost(smallest) + cost(largest)) / 2
    widths = prune.search(model, iter(batches), iter(batches), batches[:1], native_loss(duals, 1),
                          0.1, 1, budget=prune.Budget(cost, limit))
    assert 0.99 * limit <= cost(widths) <= limit
    for pair in model.pairs():
        assert widths[pair.name] // pair.heads in search.candidates(pair.width, 0.1)


# ---- uniform widths -----------------------------------------------------------------------------
def linear_cost(pairs, units):
    """A cost that is linear in every width, each channel of pair i costing units[i]."""
    def cost(widths):
        return 1000 + sum(unit * widths[pair.name] for pair, unit in zip(pairs, units))
    return cost


def test_uniform_widths_are_every_layers_widest_candidate():
    model, _ = tiny_swinir()                     # attention: 2 heads of 6, MLP 24
    widths = prune.uniform_widths(model.pairs(), 0.3, 4)
    assert set(widths) == set(model.widths)
    for pair in model.pairs():
        assert widths[pair.name] == pair.heads * {6: 4, 24: 16}[pair.width]


def test_within_a_budget_every_layer_has_the_width_of_the_part_or_the_next_one():
    """All of one dense width differ by one step at most, and one more step would cost too much."""
    model, _ = tiny_drn(blocks=20)
    pairs = model.pairs()
    cost = linear_cost(pairs, [3 + i % 4 for i in range(len(pairs))])
    floor = cost({pair.name: 4 for pair in pairs})
    for part in (0.35, 0.5, 0.62, 0.8, 1.0):
        limit = floor + part * (cost(model.widths) - floor)
        widths = prune.uniform_widths(pairs, 0.0, 4, prune.Budget(cost, limit))
        assert 0.99 * limit <= cost(widths) <= limit
        for width in {pair.width for pair in pairs}:
            found = [widths[pair.name] for pair in pairs if pair.width == width]
            assert max(found) - min(found) <= 4
    assert widths == model.widths


def test_uniform_widths_of_a_part_are_its_candidates():
    """Where the budget is what a ratio costs, the widths are those of the ratio, and no others."""
    model, _ = tiny_drn(blocks=3)
    pairs = model.pairs()
    cost = linear_cost(pairs, [7] * len(pairs))
    for ratio in (0.0, 0.22, 0.3, 0.41, 0.55):
        expected = prune.uniform_widths(pairs, ratio)
        budget = prune.Budget(cost, cost(expected))
        assert prune.uniform_widths(pairs, 0.9, 4, budget) == expected


def test_layers_that_are_rounded_up_early_are_spread_over_the_network():
    model, _ = tiny_drn(blocks=12)
    pairs = [pair for pair in model.pairs() if pair.name.startswith("up0.rcab")]
    cost = linear_cost(pairs, [1] * len(pairs))
    budget = prune.Budget(cost, 1000 + 12 * 16 + 4 * 6)      # six of twelve take one step more
    widths = prune.uniform_widths(pairs, 0.0, 4, budget)
    wide = [i for i, pair in enumerate(pairs) if widths[pair.name] == 20]
    assert len(wide) == 6
    assert max(b - a for a, b in zip(wide, wide[1:])) <= 3
    assert wide[-1] - wide[0] >= 8                            # not six in a row


@pytest.mark.parametrize("limit, words", [
    (1010, "the budget of 1,010 cannot be met: layers of 4 channels cost 1,012"),
    (2000, "come within 1 % of the budget of 2,000, the nearest cost 1,024")])
def test_uniform_widths_out_of_reach_are_refused(limit, words):
    model, _ = tiny_drn()
    pairs = [pair for pair in model.pairs() if pair.width == 8]        # one: down0
    budget = prune.Budget(linear_cost(pairs, [3]), limit)
    with pytest.raises(ValueError, match=words):
        prune.uniform_widths(pairs, 0.3, 4, budget)


# ---- has it decided? ----------------------------------------------------------------------------
def test_the_decision_in_words():
    sure = torch.tensor([0., 0, 9, 0, 0, 0])
    words = search.decision([torch.zeros(6), sure, torch.zeros(6), sure])
    assert "a chance of 0.58 on average (0.17: undecided, 1: decided)" in words   # (1 + 1/6) / 2
    assert "in 2 of 4 layers more than one half" in words


def test_chances_are_the_softmax_of_the_moment():
    model, duals = tiny_drn()
    searcher = search.Search(model, native_loss(duals), 0.3)
    searcher.alphas[1].data = torch.tensor([0., 0, 0, 0, 0, 2]).log1p()        # 1, ..., 1, 3
    found = searcher.chances()
    assert len(found) == len(model.pairs())
    assert found[1] == [0.125] * 5 + [0.375]
