"""Selection gives the release's numbers, replay changes nothing, cutting is masking."""
import copy
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import prune
import replay
from backbones.base import Pair
from backbones.drn import RCAB
from tiny import (
    blind_batch,
    difference,
    golden,
    native_loss,
    parameters,
    pooled_batch,
    rule,
    same,
    tiny_dat,
    tiny_dcls,
    tiny_drn,
    tiny_swinir,
)

GOLDEN_PRUNE = golden("prune_drn")
TINY = [tiny_drn, tiny_swinir, tiny_dat, tiny_dcls]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have equal weights, to the last bit."""
    return same(a.state_dict(), b.state_dict())


class Selected(NamedTuple):
    model: nn.Module
    kept: dict
    losses: list


def losses_of(rounds) -> list[float]:
    """The loss before each round, of what prune.select tells about a pair."""
    return [loss for loss, _ in rounds]


def golden_selection(case, **settings) -> Selected:
    """The selection of the release's run."""
    config = case["config"]
    model, duals = tiny_drn(config["n_resblocks"], config["n_feats"])
    calibration = []
    for b in range(config["batches"]):
        calibration.append(pooled_batch(config["seed0"] + b, config["batch_size"],
                                        config["lr_size"]))
    widths = dict(zip(model.widths, case["channels"]))
    losses = []
    kept = prune.select(model, calibration, native_loss(duals.requires_grad_(False)), widths,
                        rate=config["layer_wise_lr"],
                        on_pair=lambda pair, kept, rounds: losses.append(losses_of(rounds)),
                        **settings)
    return Selected(model, kept, losses)


def calibration_of(tiny) -> list:
    if tiny is tiny_dcls:
        return [blind_batch(5), blind_batch(6)]
    return [pooled_batch(k, 2, 10) for k in range(2)]


def select(tiny, part=0.5, model=None, **settings) -> Selected:
    """A selection of a part of every width, in rounds of up to 8 channels."""
    fresh, duals = tiny()
    model = model or fresh
    widths = {pair.name: pair.heads * int(pair.width * part) for pair in model.pairs()}
    rate = 1e-5 if tiny is tiny_dcls else 5e-5
    losses = []

    def on_pair(pair, kept, rounds):
        losses.append(losses_of(rounds))

    settings = dict(per_round=8, on_pair=on_pair) | settings
    kept = prune.select(model, calibration_of(tiny),
                        native_loss(duals.requires_grad_(False), model.rgb_range), widths,
                        rate=rate, **settings)
    return Selected(model, kept, losses)


# ---- selection ----------------------------------------------------------------------------------
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize("case", GOLDEN_PRUNE)
def test_selection_and_cut_are_the_releases(case, replay):
    model, kept, losses = golden_selection(case, replay=replay)
    assert list(kept.values()) == case["order"]
    assert losses == [pytest.approx(row, rel=1e-6) for row in case["selection_loss"]]
    smaller = prune.cut(model, kept)
    low = case["config"]["lr_size"]
    x = rule.image(7, 1, low, low)
    assert parameters(smaller) == case["params_after"]
    assert difference(255 * smaller(x).images[4], case["sr_after"]) < 1e-5
    # Cutting is masking.
    assert torch.allclose(smaller(x).images[4], model(x).images[4], atol=1e-6)


def test_scores_by_hand():
    """Channels 0 and 1 of a 2×2 convolution with two outputs: norms 5 + 1 and 2 + 0."""
    gradient = torch.zeros(2, 2, 2, 2)
    gradient[0, 0] = torch.tensor([[3., 0.], [0., -4.]])
    gradient[1, 0] = torch.tensor([[0., 1.], [0., 0.]])
    gradient[0, 1] = torch.tensor([[1., -1.], [1., -1.]])
    one = torch.arange(2).view(2, 1)
    pair = Pair("p", "block", 2, (("a", one),), (("b", one),))
    assert prune.channel_scores([gradient], pair).tolist() == [6, 2]


def test_scores_of_linear_layers_sum_over_heads_and_consumers():
    """Two heads of two channels, read by two layers: columns 0, 2 and 1, 3 belong together."""
    columns = torch.tensor([[0, 2], [1, 3]])
    pair = Pair("p", "block", 2, (("a", columns),), (("b", columns), ("c", columns)), heads=2)
    first = torch.tensor([[1., -10., 100., 1000.]])
    second = torch.tensor([[0., 1., 0., 0.], [3., 0., 0., -1.]])
    assert prune.channel_scores([first, second], pair).tolist() == [104, 1012]


@pytest.mark.parametrize("settings", [
    dict(per_round=4), dict(reuse=True), dict(per_round=16, reuse=True)])
def test_faster_selection_keeps_the_right_number_and_cuts_exactly(settings):
    model, kept, losses = golden_selection(GOLDEN_PRUNE[0], **settings)
    assert [len(order) for order in kept.values()] == GOLDEN_PRUNE[0]["channels"]
    assert all(len(set(order)) == len(order) for order in kept.values())
    rounds = [math.ceil(n / settings.get("per_round", 1)) for n in GOLDEN_PRUNE[0]["channels"]]
    assert [len(record) for record in losses] == rounds
    x = rule.image(7, 1, 8, 8)
    cut = prune.cut(model, kept)
    assert torch.allclose(cut(x).images[4], model(x).images[4], atol=1e-6)


def largest_curvature(model, pair, i: int, low: torch.Tensor) -> float:
    """The largest eigenvalue of the Hessian of the i-th consumer's MSE, by power iteration."""
    layer = pair.consumers[i][0]
    weight = model.get_submodule(layer).weight
    with prune.collecting(model, pair) as targets, torch.no_grad():
        model(low)

    def times_hessian(direction):
        """The gradient at weight + direction: the MSE is a parabola, with its minimum at 0."""
        shifted = {f"{layer}.weight": weight + direction.requires_grad_()}
        with prune.collecting(model, pair) as found:
            torch.func.functional_call(model, shifted, (low,))
        loss = F.mse_loss(found[i], targets[i])
        return torch.autograd.grad(loss, direction)[0]

    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for _ in range(30):
        direction = times_hessian((direction / direction.norm()).detach())
    return direction.norm().item()


@pytest.mark.parametrize("tiny, name", [(tiny_drn, "up0.rcab0"), (tiny_swinir, "group0.block0.mlp"),
                                        (tiny_dcls, "estimator.latent")])
def test_the_curvature_is_bounded(tiny, name):
    model, _ = tiny()
    model.eval().requires_grad_(False)
    [pair] = [pair for pair in model.pairs() if pair.name == name]
    batch = blind_batch(0) if model.kernel_size else pooled_batch(0, 2, 8)
    with prune.collecting(model, pair, prune.curvature) as found:
        model(batch.images[1])
    bound = max(found).item()
    largest = max(largest_curvature(model, pair, i, batch.images[1])
                  for i in range(len(pair.consumers)))
    assert 0.2 * bound < largest <= bound * 1.001


def test_a_layer_with_large_inputs_does_not_run_away():
    """With inputs 30 times as large, the rate of the release makes the loss grow without end."""
    model, duals = tiny_drn()
    for pair in model.pairs():
        for layer, _ in pair.producers:
            for p in model.get_submodule(layer).parameters(recurse=False):
                p.data *= 30
        for layer, _ in pair.consumers:
            model.get_submodule(layer).weight.data /= 30
    duals.requires_grad_(False)
    told = {}
    widths = {pair.name: pair.width * 3 // 4 for pair in model.pairs()}
    prune.select(model, [pooled_batch(0, 2, 8), pooled_batch(1, 2, 8)], native_loss(duals), widths,
                 rate=5e-5, on_pair=lambda pair, kept, rounds: told.update({pair.name: rounds}))
    for name, rounds in told.items():
        losses = losses_of(rounds)
        assert losses[-1] <= 1.01 * losses[0], name


def test_reuse_saves_the_scoring_pass_of_all_rounds_but_the_first():
    model, duals = tiny_drn()
    calls = []

    def loss_fn(out, batch):
        calls.append(batch)
        return native_loss(duals)(out, batch)

    widths = dict.fromkeys(model.widths, 4)
    for reuse in (False, True):
        prune.select(copy.deepcopy(model), [pooled_batch(0, 1, 8)], loss_fn, widths, rate=5e-5,
                     reuse=reuse)
    pairs = len(widths)
    assert len(calls) == pairs * (4 + 4) + pairs * (1 + 4)    # scoring + tuning passes


@pytest.mark.parametrize("tiny", TINY)
def test_selection_leaves_nothing_behind(tiny):
    model, _ = tiny()
    frozen = next(model.parameters()).requires_grad_(False)
    original = copy.deepcopy(model)
    before = copy.deepcopy(model)
    select(tiny, model=model, original=original)
    assert not model.training
    assert same_weights(original, before)
    for parameter in model.parameters():
        assert parameter.requires_grad == (parameter is not frozen)
        assert parameter.grad is None
    assert_untouched(model)
    assert_untouched(original)


def test_a_selection_that_is_stopped_leaves_nothing_behind(monkeypatch):
    """Stopped in the middle of a forward pass, with the first block replayed already."""
    model, duals = tiny_drn()
    original = copy.deepcopy(model)
    forward = RCAB.forward
    calls = []

    def stop(self, x):
        calls.append(x)
        if "forward" in vars(model.down[0]) and len(calls) > 20:
            raise KeyboardInterrupt
        return forward(self, x)

    monkeypatch.setattr(RCAB, "forward", stop)
    widths = dict.fromkeys(model.widths, 2)
    with pytest.raises(KeyboardInterrupt):
        prune.select(model, calibration_of(tiny_drn), native_loss(duals), widths, rate=1e-5,
                     original=original)
    assert_untouched(model)
    assert_untouched(original)


def assert_untouched(network) -> None:
    """No hook and no replaced forward pass in any module."""
    for module in network.modules():
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_silence_zeroes_the_rows_of_all_heads_and_no_others():
    model, _ = tiny_swinir()
    qkv = model.layers[0].residual_group.blocks[0].attn.qkv
    before = qkv.weight.detach().clone()
    prune.silence(model, model.pairs()[0], [0, 2, 3, 4])
    gone = [part + j for part in range(0, 36, 6) for j in (1, 5)]      # q, k, v of 2 heads of 6
    silent = (qkv.weight == 0).all(1) & (qkv.bias == 0)
    assert silent.nonzero().flatten().tolist() == gone
    assert torch.equal(qkv.weight[~silent], before[~silent])


def test_silence_leaves_a_layer_norm_what_it_looks_at():
    model, _ = tiny_dat()
    before = copy.deepcopy(model)
    prune.silence(model, model.pairs()[0], [3])
    assert same_weights(model, before)


# ---- replay -------------------------------------------------------------------------------------
@pytest.mark.parametrize("tiny", TINY)
def test_replay_changes_nothing(tiny):
    replayed = select(tiny, replay=True)
    full = select(tiny, replay=False)
    assert replayed.kept == full.kept
    assert replayed.losses == full.losses
    assert same_weights(replayed.model, full.model)


def count_runs(monkeypatch, networks: list, blocks: set, clock: list) -> dict:
    """{(block, pairs finished at that time): how often the class's own forward ran}."""
    names = {}
    for network in networks:
        for block in blocks:
            names[network.get_submodule(block)] = block
    runs = {}

    def counted(forward):
        def wrapper(self, *inputs):
            if self in names:
                at = (names[self], len(clock))
                runs[at] = runs.get(at, 0) + 1
            return forward(self, *inputs)
        return wrapper

    for cls in {type(module) for module in names}:
        monkeypatch.setattr(cls, "forward", counted(cls.forward))
    return runs


@pytest.mark.parametrize("tiny", TINY)
def test_a_finished_block_never_runs_again(tiny, monkeypatch):
    """After its last pair it runs once per batch and network, to be stored, and that was it."""
    model, _ = tiny()
    original = copy.deepcopy(model)
    finished = {}
    for k, pair in enumerate(model.pairs()):
        finished[pair.block] = k + 1
    clock = []
    runs = count_runs(monkeypatch, [model, original], set(finished), clock)
    select(tiny, model=model, original=original,
           on_pair=lambda pair, kept, losses: clock.append(pair))
    assert len(clock) == len(model.pairs())
    for block, after in finished.items():
        assert runs[block, after] == 2 * 2
        for pairs_done in range(after + 1, len(clock) + 1):
            assert (block, pairs_done) not in runs


def test_without_replay_every_block_runs_for_every_pair(monkeypatch):
    """The counter of the test above counts: otherwise it would pass by seeing nothing."""
    model, _ = tiny_drn()
    blocks = {pair.block for pair in model.pairs()}
    clock = []
    runs = count_runs(monkeypatch, [model], blocks, clock)
    select(tiny_drn, model=model, replay=False,
           on_pair=lambda pair, kept, losses: clock.append(pair))
    assert set(runs) == {(block, k) for block in blocks for k in range(len(blocks))}


def test_only_the_last_output_of_a_chain_is_kept():
    """DRN-S has 30 blocks in a row: 30 feature maps per batch and network would be gigabytes."""
    model, _ = tiny_drn(blocks=3)
    model.eval()
    batch = pooled_batch(0, 1, 8)
    stored = {}
    once = replay.called_once(model, batch.images[1])
    held = []
    for pair in model.pairs():
        replay.advance(model, pair.block, batch, stored, once)
        held.append([name for name, output in stored.items() if output is not None])
    # add_mean is called at every scale: it is never replayed
    first = ["enlarge", "sub_mean", "head", "down.0"]
    below = [*first, "down.1", "tail.0"]       # no chain: the copies go to the other end
    half = [*below, "up_blocks.0"]
    assert held == [
        first, [*first, "down.1"],
        [*below, "up_blocks.0.0"], [*below, "up_blocks.0.1"], [*below, "up_blocks.0.2"], half,
        [*half, "tail.1", "up_blocks.1.0"], [*half, "tail.1", "up_blocks.1.1"],
        [*half, "tail.1", "up_blocks.1.2"], [*half, "tail.1", "up_blocks.1"]]


def test_a_pass_ends_at_the_block_it_is_run_to():
    model, _ = tiny_drn()
    low = rule.image(0, 1, 8, 8)
    wanted, after = [], []
    hook = model.down[1].register_forward_hook(lambda module, x, output: wanted.append(output))
    model(low)
    hook.remove()
    hook = model.tail[0].register_forward_hook(lambda module, x, output: after.append(output))
    assert torch.equal(replay.run_to(model, "down.1", low), wanted[0])
    hook.remove()
    assert not after
    assert_untouched(model)


def test_a_block_that_forward_never_calls_is_named():
    """An own backbone may loop over a ModuleList, and then cannot give that list as a block."""
    model, duals = tiny_drn()
    pairs = [pair._replace(block="up_blocks") for pair in model.pairs()]
    model.pairs = lambda: pairs
    with pytest.raises(ValueError, match="DRN.forward never calls its module 'up_blocks'"):
        prune.select(model, calibration_of(tiny_drn), native_loss(duals), model.widths, rate=1e-5)


# ---- selection continues where it was stopped ---------------------------------------------------
class Stop(Exception):
    pass


@pytest.mark.parametrize("tiny", TINY)
@pytest.mark.parametrize("pairs_done", [1, 2])
def test_selection_resumes_exactly(tiny, pairs_done):
    """Also between two pairs of one block, as SwinIR has them; in DRN with the paper's rounds."""
    per_round = 1 if tiny is tiny_drn else 8
    whole = select(tiny, 0.25, per_round=per_round)
    saved = {}

    def stop(pair, kept, rounds):
        if len(kept) == pairs_done:
            saved.update(model=copy.deepcopy(model.state_dict()), done=dict(kept))
            raise Stop

    model, _ = tiny()
    original = copy.deepcopy(model)
    with pytest.raises(Stop):
        select(tiny, 0.25, model=model, per_round=per_round, on_pair=stop)
    again, _ = tiny()
    again.load_state_dict(saved["model"])
    resumed = select(tiny, 0.25, model=again, per_round=per_round, original=original,
                     done=saved["done"])
    assert resumed.kept == whole.kept
    assert resumed.losses == whole.losses[pairs_done:]
    assert same_weights(resumed.model, whole.model)


# ---- the cut ------------------------------------------------------------------------------------
def test_cut_of_everything_kept_is_the_network_itself():
    model, _ = tiny_drn()
    x = rule.image(1, 1, 6, 6)
    assert torch.equal(prune.cut(model, {})(x).images[4], model(x).images[4])
    pair = model.pairs()[3]
    backwards = list(range(pair.width))[::-1]
    cut = prune.cut(model, {pair.name: backwards})
    assert torch.equal(cut(x).images[4], model(x).images[4])


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir])
def test_cutting_is_masking(tiny):
    model, kept, _ = select(tiny)
    x = rule.image(7, 1, 13, 9)
    cut = prune.cut(model, kept).eval()
    assert torch.allclose(cut(x).images[4], model(x).images[4], atol=2e-6)
    assert parameters(cut) < parameters(model)


def test_attention_is_cut_equally_in_all_heads():
    model, kept, _ = select(tiny_swinir)
    smaller = prune.cut(model, kept)
    attention = smaller.layers[0].residual_group.blocks[1].attn
    assert smaller.widths["group0.block1.attn"] == 6
    assert attention.qkv.out_features == 18
    assert attention.scale == 6 ** -0.5                       # of the unpruned head
    old = model.layers[0].residual_group.blocks[0].attn
    new = smaller.layers[0].residual_group.blocks[0].attn
    order = sorted(kept["group0.block0.attn"])
    for part in range(3):                                     # q, k, v
        for head in range(2):
            here = new.qkv.weight[part * 6 + head * 3:][:3]
            assert torch.equal(here, old.qkv.weight[part * 12 + head * 6:][order])
    assert torch.equal(new.proj.weight[:, :3], old.proj.weight[:, order])
    assert torch.equal(new.proj.weight[:, 3:], old.proj.weight[:, [6 + j for j in order]])


# ---- DAT: a LayerNorm within the pair -----------------------------------------------------------
def inputs_and_outputs(model, layer, low) -> tuple:
    """What goes into one layer and what comes out, in one forward pass."""
    seen = []
    hook = layer.register_forward_hook(lambda module, x, output: seen.append((x[0], output)))
    with torch.no_grad():
        model(low)
    hook.remove()
    return seen[0]


def test_cutting_the_gated_mlp_refits_its_norm():
    model, kept, _ = select(tiny_dat)
    calibration = calibration_of(tiny_dat)
    gate = model.layers[0].blocks[0].ffn.sg.norm
    x, output = inputs_and_outputs(model, gate, calibration[0].images[1])
    chosen = sorted(kept["group0.block0.ffn"])
    z = F.layer_norm(x[..., chosen], (16,)).flatten(0, 2).double().numpy()
    wanted = output[..., chosen].flatten(0, 2).double().numpy()
    norm = prune.cut(model, kept, calibration).layers[0].blocks[0].ffn.sg.norm
    for j in range(16):                                       # an independent least squares
        columns = np.stack((z[:, j], np.ones(len(z))), 1)
        (slope, shift), *_ = np.linalg.lstsq(columns, wanted[:, j], rcond=None)
        assert norm.weight[j].item() == pytest.approx(slope, rel=1e-4, abs=1e-5)
        assert norm.bias[j].item() == pytest.approx(shift, rel=1e-4, abs=1e-5)


def test_refitting_the_norm_helps():
    model, kept, _ = select(tiny_dat)
    x = rule.image(7, 1, 12, 12)
    errors = []
    for calibration in (None, calibration_of(tiny_dat)):
        smaller = prune.cut(model, kept, calibration).eval()
        errors.append((smaller(x).images[4] - model(x).images[4]).square().mean())
    assert errors[1] < errors[0]


def test_nothing_cut_means_no_refit():
    model, _ = tiny_dat()
    x = rule.image(7, 1, 12, 12)
    same_network = prune.cut(model, {}, calibration_of(tiny_dat)).eval()
    assert torch.equal(same_network(x).images[4], model(x).images[4])


# ---- DCLS: five consumers, two outputs ----------------------------------------------------------
def test_selection_of_dcls_compares_features_of_every_pair_and_the_cut_is_masking():
    """The loss given here is 0: selection minimises the feature term alone, which no pair lacks."""
    model, _ = tiny_dcls()
    calibration = [pooled_batch(5, 1, 8)]
    widths = {name: n - 3 for name, n in model.widths.items()}
    records = {}
    kept = prune.select(
        model, calibration, lambda out, batch: 0 * out.images[4].sum(), widths, rate=1e-5,
        per_round=8, reuse=True,
        on_pair=lambda pair, kept, rounds: records.update({pair.name: losses_of(rounds)}))
    assert list(records) == list(model.widths)
    assert all(losses[0] > 0 for losses in records.values())
    assert {name: len(set(order)) for name, order in kept.items()} == widths
    smaller = prune.cut(model, kept).double()
    assert smaller.widths == widths
    x = rule.image(6, 1, 10, 9).double()
    wanted = model.double()(x)
    found = smaller(x)
    assert torch.allclose(found.kernel, wanted.kernel, rtol=1e-9)
    assert torch.allclose(found.images[4], wanted.images[4], atol=1e-9)


def test_the_latent_is_cut_in_all_five_consumers():
    model, _ = tiny_dcls()
    cut = prune.cut(model, {"estimator.latent": [5, 1]})
    assert cut.Estimator.tail[4].weight.equal(model.Estimator.tail[4].weight[[1, 5]])
    for old, new in zip(model.Estimator.dec, cut.Estimator.dec, strict=True):
        assert new.weight.equal(old.weight[:, [1, 5]])
