"""Search and selection are the paper's (golden numbers of the release), caching changes nothing, cutting is masking."""
import copy

import numpy as np
import pytest
import torch
from conftest import (blind_batch, blind_loss, difference, golden, native_loss, pooled_batch, rule, tiny_dat, tiny_dcls, tiny_drn,
                      tiny_swinir)

import evaluate
import prune

PRUNE, SEARCH = golden("prune_drn"), golden("search_drn")


# ---- search
def test_candidates_are_the_papers():
    assert prune.candidates(64, 0.3) == [20, 24, 32, 36, 40, 44]
    assert prune.candidates(10, 0.3) == [4, 4, 4, 4, 4, 8]
    assert prune.candidates(3, 0.9) == [3] * 6
    assert prune.candidates(64, 0.0) == [32, 36, 44, 52, 56, 64]           # 38 lies between 36 and 40: it goes down
    assert prune.candidates(64, 0.3, 8) == [24, 24, 32, 32, 40, 40]         # 44: it goes down
    assert prune.candidates(24, 0.0, 8) == [8, 16, 16, 16, 24, 24]         # 12: it goes down
    for width, ratio in ((16, 0.3), (32, 0.5), (64, 0.7), (180, 0.45)):
        for p, n in zip(prune.FRACTIONS, prune.candidates(width, ratio)):
            whole = int(width * (1 - ratio) * p)
            nearest = [m for m in range(0, 2 * width, 4) if abs(m - whole) == min(abs(k - whole) for k in range(0, 2 * width, 4))]
            assert n == min(max(min(nearest), 4), width)


def golden_search(case):
    config = case["config"]
    model, duals = tiny_drn(config["n_resblocks"], config["n_feats"])
    searcher = prune.Search(model, native_loss(duals), config["rate"], rate=config["w_lr"], decay=config["w_weight_decay"],
                            second_order=config["corrected"])
    for i, alpha in enumerate(searcher.alphas):
        alpha.data = torch.from_numpy(0.3 * np.random.RandomState(50 + i).standard_normal(6)).float()
    return searcher, pooled_batch(200, 2, config["lr_size"]), pooled_batch(201, 2, config["lr_size"])


@pytest.mark.parametrize("case", SEARCH)
def test_alpha_gradients_are_the_releases(case):
    searcher, train, valid = golden_search(case)
    weights = [w.detach().clone() for w in searcher.weights]
    assert searcher.candidates == case["channel_sets"]
    assert searcher.loss(train).item() == pytest.approx(case["train_loss"], rel=1e-6)
    loss, gradients = searcher.alpha_gradient(train, valid)
    assert loss.item() == pytest.approx(case["val_loss"], rel=1e-6)
    ours, theirs = torch.stack(gradients), torch.tensor(case["alpha_grad"])
    assert (ours - theirs)[0].abs().max() < 1e-6                        # equal candidates: the true gradient is 0
    relative = (ours - theirs)[1:].abs().amax(1) / theirs[1:].abs().amax(1)
    assert relative.max() < (1e-4 if case["config"]["corrected"] and case["config"]["w_lr"] == 0.01 else 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights, searcher.weights))      # the virtual step is undone exactly


def test_relaxation_is_the_mixture_of_truncated_layers():
    searcher, _, _ = golden_search(SEARCH[0])
    pair, alpha = searcher.pairs[2], searcher.alphas[2]
    layer = searcher.model.get_submodule(pair.consumers[0][0])
    x = torch.rand(1, pair.width, 5, 5)
    order = layer.weight.abs().sum((0, 2, 3)).argsort(descending=True)
    mixture = 0
    for p, n in zip(alpha.softmax(0), searcher.candidates[2]):
        truncated = torch.zeros_like(layer.weight)
        truncated[:, order[:n]] = layer.weight[:, order[:n]]
        mixture = mixture + p * torch.conv2d(x, truncated, padding=1)
    scaled = searcher.scaled_weights()[pair.consumers[0][0] + ".weight"]
    assert torch.allclose(torch.conv2d(x, scaled, padding=1), mixture, atol=1e-5)


def test_search_resumes_exactly_and_includes_the_duals():
    batches = [pooled_batch(k, 1, 8) for k in range(4)]

    def searcher():
        torch.manual_seed(1)
        model, duals = tiny_drn()
        return prune.Search(model, native_loss(duals), 0.3, duals.parameters()), duals

    (a, duals), (b, _) = searcher(), searcher()
    before = [p.detach().clone() for p in duals.parameters()]
    for k in range(3):
        a.step(batches[k], batches[k + 1])
        a.hold(batches[:1])
    assert not any(torch.equal(p, q) for p, q in zip(before, duals.parameters()))
    b.step(batches[0], batches[1])
    b.hold(batches[:1])
    saved = copy.deepcopy(b.state_dict())
    b, _ = searcher()
    b.load_state_dict(saved)
    for k in (1, 2):
        b.step(batches[k], batches[k + 1])
        b.hold(batches[:1])
    assert all(torch.equal(p, q) for p, q in zip(a.weights + a.alphas, b.weights + b.alphas)) and a.widths() == b.widths()


def test_widths_are_of_the_best_held_out_epoch():
    model, duals = tiny_drn()
    searcher = prune.Search(model, native_loss(duals), 0.3)
    good = pooled_batch(1, 1, 8)
    for alpha in searcher.alphas:
        alpha.data = torch.tensor([0., 0, 0, 0, 0, 9])
    searcher.hold([good])
    for alpha in searcher.alphas:
        alpha.data = torch.tensor([9., 0, 0, 0, 0, 0])
    for weight in searcher.weights:
        weight.data += 0.3                                              # ruined: a worse epoch
    searcher.hold([good])
    assert list(searcher.widths().values()) == [sizes[5] for sizes in searcher.candidates]


def test_search_function_leaves_the_model_alone():
    model, duals = tiny_drn()
    before = copy.deepcopy(model.state_dict())
    batches = [pooled_batch(k, 1, 8) for k in range(3)]
    widths = prune.search(model, iter(batches), iter(batches), batches[:1], native_loss(duals), 0.3, steps=2)
    assert list(widths) == list(model.widths) and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(n in prune.candidates(model.widths[name], 0.3) for name, n in widths.items())


# ---- budget
def brute_force(scores, sizes, cost, limit):
    """Best total score among all choices whose cost lies within 1 % below the limit."""
    import itertools
    best = -np.inf
    for picks in itertools.product(range(6), repeat=len(sizes)):
        c = cost([s[k] for s, k in zip(sizes, picks)])
        if 0.99 * limit <= c <= limit:
            best = max(best, sum(row[k] for row, k in zip(scores, picks)))
    return best


@pytest.mark.parametrize("limit", [700, 800, 950])
def test_budget_is_met_and_the_best_choice_is_taken(limit):
    rng = np.random.default_rng(limit)
    sizes, unit, names = [prune.candidates(w, 0.1) for w in (64, 32, 32, 16, 64)], [5, 3, 11, 7, 2], list("abcde")
    scores = np.log(rng.dirichlet(np.ones(6), 5))
    cost = lambda ns: 100 + sum(u * n for u, n in zip(unit, ns))                                           # noqa: E731
    dense = dict(zip(names, (64, 32, 32, 16, 64)))
    picks = prune.fit_budget(scores, sizes, names, prune.Budget(lambda w: cost({**dense, **w}.values()), limit))
    chosen = cost([s[k] for s, k in zip(sizes, picks)])
    assert 0.99 * limit <= chosen <= limit
    assert sum(row[k] for row, k in zip(scores, picks)) == pytest.approx(brute_force(scores, sizes, cost, limit), abs=1e-9)


def test_budget_out_of_reach_is_refused():
    with pytest.raises(ValueError, match="the budget of 50 cannot be met"):
        prune.fit_budget(np.zeros((1, 6)), [[4, 4, 8, 8, 12, 12]], ["a"], prune.Budget(lambda w: 100 + w["a"], 50))


# ---- selection
def selected(case, **settings):
    config = case["config"]
    model, duals = tiny_drn(config["n_resblocks"], config["n_feats"])
    calibration = [pooled_batch(config["seed0"] + b, config["batch_size"], config["lr_size"]) for b in range(config["batches"])]
    losses = []
    widths = dict(zip(model.widths, case["channels"]))
    kept = prune.select(model, calibration, native_loss(duals.requires_grad_(False)), widths, rate=config["layer_wise_lr"],
                        on_pair=lambda pair, kept, record: losses.append(record), **settings)
    return model, kept, losses


@pytest.mark.parametrize("case", PRUNE)
def test_selection_and_cut_are_the_releases(case):
    model, kept, losses = selected(case)
    assert list(kept.values()) == case["order"]
    assert losses == [pytest.approx(row, rel=1e-6) for row in case["selection_loss"]]
    smaller = prune.cut(model, kept)
    low = case["config"]["lr_size"]
    x = rule.image(7, 1, low, low)
    assert sum(p.numel() for p in smaller.parameters()) == case["params_after"]
    assert difference(255 * smaller(x).images[4], case["sr_after"]) < 1e-5
    assert torch.allclose(smaller(x).images[4], model(x).images[4], atol=1e-6)              # cutting is masking


def test_caching_changes_nothing():
    (a, kept_a, losses_a), (b, kept_b, losses_b) = (selected(PRUNE[0], cache=cache) for cache in (True, False))
    assert kept_a == kept_b and losses_a == losses_b
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("settings", [dict(per_round=4), dict(reuse=True), dict(per_round=16, reuse=True)])
def test_faster_selection_keeps_the_right_number_and_cuts_exactly(settings):
    model, kept, _ = selected(PRUNE[0], **settings)
    assert [len(order) for order in kept.values()] == PRUNE[0]["channels"]
    assert all(len(set(order)) == len(order) for order in kept.values())
    assert torch.allclose(prune.cut(model, kept)(rule.image(7, 1, 8, 8)).images[4], model(rule.image(7, 1, 8, 8)).images[4], atol=1e-6)


def test_selection_resumes_exactly():
    """Stopped after two pairs and continued from what was saved: the same orders and weights."""
    whole, kept, _ = selected(PRUNE[0])

    class Stop(Exception):
        pass

    config = PRUNE[0]["config"]
    model, duals = tiny_drn(config["n_resblocks"], config["n_feats"])
    original, loss = copy.deepcopy(model), native_loss(duals.requires_grad_(False))
    calibration = [pooled_batch(config["seed0"] + b, config["batch_size"], config["lr_size"]) for b in range(config["batches"])]
    widths, saved = dict(zip(model.widths, PRUNE[0]["channels"])), {}

    def stop(pair, done, record):
        if len(done) == 2:
            saved.update(model=copy.deepcopy(model.state_dict()), done=dict(done))
            raise Stop

    with pytest.raises(Stop):
        prune.select(model, calibration, loss, widths, rate=5e-5, on_pair=stop)
    model = copy.deepcopy(original)
    model.load_state_dict(saved["model"])
    again = prune.select(model, calibration, loss, widths, rate=5e-5, original=original, done=saved["done"])
    assert again == kept
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values()))


def test_cut_of_everything_kept_is_the_network_itself():
    model, _ = tiny_drn()
    x = rule.image(1, 1, 6, 6)
    assert torch.equal(prune.cut(model, {})(x).images[4], model(x).images[4])
    order = list(range(model.pairs()[3].width))[::-1]
    assert torch.equal(prune.cut(model, {model.pairs()[3].name: order})(x).images[4], model(x).images[4])


# ---- transformers
def transformer_selection(tiny, **settings):
    model, duals = tiny()
    calibration = [pooled_batch(k, 2, 10) for k in range(2)]
    widths = {pair.name: pair.count * (pair.width // 2) for pair in model.pairs()}
    kept = prune.select(model, calibration, native_loss(duals.requires_grad_(False), 1), widths, rate=1e-4, per_round=8, **settings)
    return model, kept, calibration


@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_caching_changes_nothing_for_transformers(tiny):
    (a, kept_a, _), (b, kept_b, _) = (transformer_selection(tiny, cache=cache) for cache in (True, False))
    assert kept_a == kept_b and all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_attention_is_cut_equally_in_all_heads_and_cutting_is_masking():
    model, kept, calibration = transformer_selection(tiny_swinir)
    smaller = prune.cut(model, kept, calibration).eval()
    assert smaller.widths["group0.block1.attn"] == 6 and smaller.layers[0].residual_group.blocks[1].attn.qkv.out_features == 18
    assert smaller.layers[0].residual_group.blocks[1].attn.scale == 6 ** -0.5             # of the unpruned head
    x = rule.image(7, 1, 13, 9)
    assert torch.allclose(smaller(x).images[4], model(x).images[4], atol=2e-6)
    order = sorted(kept["group0.block0.attn"])
    old, new = (m.layers[0].residual_group.blocks[0].attn for m in (model, smaller))
    for part in range(3):
        for head in range(2):
            assert torch.equal(new.qkv.weight[part * 6 + head * 3:][:3], old.qkv.weight[part * 12 + head * 6:][order])
    assert torch.equal(new.proj.weight[:, 3:], old.proj.weight[:, [6 + j for j in order]])


def test_channels_of_attention_are_scored_over_all_heads():
    model, _ = tiny_swinir()
    pair = model.pairs()[0]
    weight = model.layers[0].residual_group.blocks[0].attn.proj.weight                     # (12, 2 heads of 6)
    both = weight.abs().sum(0).view(2, 6).sum(0)
    assert torch.allclose(prune.importance(model, pair), both)
    assert torch.allclose(prune.channel_scores([weight], pair), both)


def test_cutting_the_gated_mlp_refits_its_norm():
    model, kept, calibration = transformer_selection(tiny_dat)
    gate = model.layers[0].blocks[0].ffn.sg.norm
    seen = []
    hook = gate.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(calibration[0][1])
    hook.remove()
    smaller = prune.cut(model, kept, calibration)
    chosen = sorted(kept["group0.block0.ffn"])
    z = torch.nn.functional.layer_norm(seen[0][0][..., chosen], (16,)).flatten(0, 2).double().detach().numpy()
    wanted = seen[0][1][..., chosen].flatten(0, 2).double().detach().numpy()
    norm = smaller.layers[0].blocks[0].ffn.sg.norm
    for j in range(16):                                                                     # an independent least squares
        (slope, shift), *_ = np.linalg.lstsq(np.stack((z[:, j], np.ones(len(z))), 1), wanted[:, j], rcond=None)
        assert (norm.weight[j].item(), norm.bias[j].item()) == pytest.approx((slope, shift), rel=1e-4, abs=1e-5)
    x = rule.image(7, 1, 12, 12)
    error = [(prune.cut(model, kept, batches).eval()(x).images[4] - model(x).images[4]).square().mean()
             for batches in (None, calibration)]
    assert error[1] < error[0]
    assert torch.allclose(prune.cut(model, {}, calibration).eval()(x).images[4], model(x).images[4])   # nothing cut: no refit


@pytest.mark.parametrize("tiny", [tiny_swinir, tiny_dat])
def test_search_and_budget_of_transformers(tiny):
    model, duals = tiny()
    batches = [pooled_batch(k, 1, 8) for k in range(3)]

    def cost(widths) -> int:
        with torch.device("meta"):
            return evaluate.count(model.with_widths(widths), 8, 8).params

    ends = [cost({pair.name: pair.count * pick(prune.candidates(pair.width, 0.1)) for pair in model.pairs()}) for pick in (min, max)]
    limit = sum(ends) / 2
    widths = prune.search(model, iter(batches), iter(batches), batches[:1], native_loss(duals, 1), 0.1, 1,
                          budget=prune.Budget(cost, limit))
    assert 0.99 * limit <= cost(widths) <= limit
    assert all(n // pair.count in prune.candidates(pair.width, 0.1) for n, pair in zip(widths.values(), model.pairs()))


# ---- DCLS
def test_selection_of_dcls_compares_features_of_every_pair_and_the_cut_is_masking():
    """The loss given here is 0, so what selection minimises is the feature term alone: no pair may lack it."""
    model, _ = tiny_dcls()
    calibration, records = [{1: rule.image(5, 1, 8, 8)}], {}
    widths = {name: n - 3 for name, n in model.widths.items()}
    kept = prune.select(model, calibration, lambda out, y: 0 * out.images[4].sum(), widths, rate=1e-5, per_round=8,
                        reuse=True, on_pair=lambda pair, done, losses: records.update({pair.name: losses}))
    assert list(records) == list(model.widths) and all(losses[0] > 0 for losses in records.values())
    assert {name: len(set(order)) for name, order in kept.items()} == widths
    smaller, x = prune.cut(model, kept).double(), rule.image(6, 1, 10, 9).double()
    wanted, got = model.double()(x), smaller(x)
    assert smaller.widths == widths
    assert torch.allclose(got.kernel, wanted.kernel, rtol=1e-9)
    assert torch.allclose(got.images[4], wanted.images[4], atol=1e-9)


def test_caching_changes_nothing_in_a_blind_network():
    calibration, results = [blind_batch(5), blind_batch(6)], []
    for cache in (True, False):
        model, duals = tiny_dcls()
        widths = {name: 2 for name in model.widths}
        kept = prune.select(model, calibration, blind_loss(duals.requires_grad_(False)), widths, rate=1e-5, cache=cache)
        results.append((kept, model.state_dict()))
    (kept_a, a), (kept_b, b) = results
    assert kept_a == kept_b and all(torch.equal(a[name], b[name]) for name in a)


def test_importance_of_the_latent_is_over_all_five_consumers():
    model, _ = tiny_dcls()
    pair = model.pairs()[3]
    expected = sum(dec.weight.abs().sum(0) for dec in model.Estimator.dec)
    assert pair.name == "estimator.latent" and torch.allclose(prune.importance(model, pair), expected)
    assert prune.cut(model, {pair.name: [5, 1]}).Estimator.dec[2].weight.equal(model.Estimator.dec[2].weight[:, [1, 5]])


def test_search_moves_every_alpha_of_a_blind_network():
    model, duals = tiny_dcls()
    before = copy.deepcopy(model.state_dict())
    searcher = prune.Search(copy.deepcopy(model), blind_loss(duals), 0.1, duals.parameters(), rate=1e-5, clip=0.1)
    _, gradients = searcher.alpha_gradient(blind_batch(1), blind_batch(2))
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)         # the estimator's pairs by |k − k*|
    batches = [blind_batch(k) for k in range(2)]
    widths = prune.search(model, iter(batches), iter(batches), batches[:1], blind_loss(duals), 0.1, steps=1, rate=1e-5)
    assert list(widths) == list(model.widths) and all(torch.equal(before[k], v) for k, v in model.state_dict().items())
