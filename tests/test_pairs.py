"""pairs.py: which widths are found, in our own backbones and in other people's, and which not."""
import pytest
import torch
from torch import nn

import networks
import prune
from narrow import narrow
from pairs import examine, find_pairs, table
from tiny import same, tiny_dat, tiny_dcls, tiny_drn, tiny_swinir

LOW = (1, 3, 8, 8)


def look(model):
    return examine(model, torch.rand(LOW))


def wires(pair):
    """What a pair joins, to compare: {(layer, its table as a list)} of both sides."""
    return tuple(frozenset((layer, tuple(t.flatten().tolist())) for layer, t in side)
                 for side in (pair.producers, pair.consumers))


def compare(model, found):
    """(names of declared pairs that were not found, names of found ones that are not declared)."""
    declared = {wires(pair): pair.name for pair in model.pairs()}
    mine = {wires(pair): pair.name for pair in found.pairs}
    return ({declared[key] for key in declared.keys() - mine.keys()},
            {mine[key] for key in mine.keys() - declared.keys()})


# ---- our own backbones --------------------------------------------------------------------------
def test_all_pairs_of_drn_are_found():
    """Beside them the two widths that the last tail alone sees again, in its concatenation."""
    model, _ = tiny_drn()
    assert compare(model, look(model)) == (set(), {"head", "up_blocks.1.2"})


def test_all_pairs_of_dcls_are_found():
    """Beside them the widths between plain layers that the paper leaves whole."""
    model, _ = tiny_dcls()
    found = look(model)
    assert compare(model, found) == (set(), {
        "Estimator.tail.0", "Estimator.tail.2", "Restorer.upscale.2",
        "Restorer.body.0.body.0.body1.2", "Restorer.body.0.body.1.body1.2"})
    [latent] = [pair for pair in found.pairs if pair.name == "Estimator.tail.4"]
    assert [layer for layer, _ in latent.consumers] == [f"Estimator.dec.{i}" for i in range(5)]
    assert latent.block == "Estimator"


def test_of_swinir_the_mlps_are_found_and_attention_is_refused():
    model, _ = tiny_swinir()
    found = look(model)
    missed, more = compare(model, found)
    assert missed == {f"group{g}.block{b}.attn" for g in (0, 1) for b in (0, 1)} and not more
    for pair in model.pairs():
        if pair.heads > 1:
            assert "attention" in found.refused[pair.producers[0][0]]


def test_of_dat_the_gated_mlp_is_refused_for_its_norm():
    model, _ = tiny_dat()
    found = look(model)
    missed, more = compare(model, found)
    assert missed == {f"group0.block{b}.ffn" for b in range(4)}
    assert more == {"layers.0.conv.0", "layers.0.conv.2", "conv_after_body.0", "conv_after_body.2"}
    assert "norm" in found.refused["layers.0.blocks.0.ffn.fc1"]


# ---- other people's networks --------------------------------------------------------------------
PAIRS = {
    "EDSR": ["body.0.body.0", "body.1.body.0", "tail.0"],
    "RCAN": [f"groups.{g}.{b}.{layer}" for g in (0, 1) for b in (0, 1)
             for layer in ("0", "3.squeeze.1")],
    "RRDB": [*(f"body.{b}.conv{i}" for b in (0, 1) for i in (0, 1, 2)), "up"],
    "IMDN": ["blocks.0.conv3", "blocks.1.conv3", "gather.0"],
    "SRResNet": ["body.0.0", "body.1.0", "up.0"]}


@pytest.mark.parametrize("name", PAIRS)
def test_the_pairs_of_networks_as_people_have_them(name):
    found = look(getattr(networks, name)(scale=2))
    assert [pair.name for pair in found.pairs] == PAIRS[name]
    layers = table(found)
    assert "stay whole" in layers and "skip connection" in layers


def test_a_dense_block_has_groups_of_consumers_with_columns_of_their_own():
    pairs = {pair.name: pair for pair in look(networks.RRDB()).pairs}
    consumers = dict(pairs["body.1.conv1"].consumers)
    assert consumers["body.1.conv2"].flatten().tolist() == list(range(24, 32))
    assert set(consumers) == {"body.1.conv2", "body.1.conv3"}
    assert pairs["body.1.conv1"].block == "body.1"


def test_batch_norm_and_prelu_are_pruned_along():
    pairs = {pair.name: pair for pair in look(networks.SRResNet()).pairs}
    assert [layer for layer, _ in pairs["body.0.0"].producers] == ["body.0.0", "body.0.1",
                                                                   "body.0.2"]
    rows = dict(pairs["up.0"].producers)     # BatchNorm before PixelShuffle: four rows, too
    assert rows["up.0"].tolist() == rows["up.1"].tolist()
    assert rows["up.0"][1].tolist() == [4, 5, 6, 7]


def test_a_split_is_refused_with_the_reason():
    assert "split" in look(networks.IMDN()).refused["blocks.0.conv1"]


# ---- what must be refused -----------------------------------------------------------------------
class Two(nn.Module):
    """a then b, and whatever `between` does with the channels in between."""
    def __init__(self, between, after=None):
        super().__init__()
        self.a = networks.conv(3, 16)
        self.b = networks.conv(16, 3)
        self.between = between
        self.after = after

    def forward(self, x):
        hidden = self.a(x)
        y = self.b(self.between(hidden))
        return self.after(y, hidden) if self.after else y


def ramp(x):
    return x * torch.linspace(0.5, 1.5, 16)[:x.shape[1], None, None]


def norm(x):
    return nn.functional.layer_norm(x.movedim(1, -1), (16,)).movedim(-1, 1)


REFUSED = [
    (Two(norm), "norm"),
    (Two(torch.relu, lambda y, hidden: y + hidden.mean(1, True)), "without a further layer"),
    # no gradient tells of it: the proof does
    (Two(torch.relu, lambda y, hidden: y + hidden.detach().mean()), "in another way"),
    (Two(lambda x: x.detach() * torch.rand(16, 1, 1)), "no layer takes"),
    (Two(lambda x: x.view(-1, 16, 8, 8)), "forward fails without some"),
    (Two(lambda x: x.flip(1)), ""),          # mirrored columns are columns, too
    (Two(ramp), "changes the output")]


@pytest.mark.parametrize("model, reason", REFUSED, ids=[reason for _, reason in REFUSED])
def test_refused_with_the_reason(model, reason):
    found = look(model)
    if reason:
        assert found.pairs == [] and reason in found.refused["a"]
    else:
        [pair] = found.pairs
        assert pair.producers[0][1].flatten().tolist() == list(range(15, -1, -1))


class Twice(Two):
    def forward(self, x):
        return super().forward(super().forward(x))


def test_a_layer_that_runs_twice_is_refused():
    assert "runs more than once" in look(Twice(torch.relu)).refused["a"]


def test_one_bad_pair_does_not_spoil_the_others():
    model = nn.Sequential(networks.conv(3, 16), nn.ReLU(), networks.conv(16, 3), Two(norm),
                          Two(lambda x: x.view(-1, 16, 8, 8)), Two(torch.relu))
    assert [pair.name for pair in look(model).pairs] == ["0", "5.a"]


class Late(Two):
    def __init__(self):
        super().__init__(torch.relu)
        self.gain = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        hidden = self.a(x)
        return self.b(torch.relu(hidden)) + self.gain * hidden.detach().mean()


def test_a_zero_weight_hides_nothing():
    """It is drawn anew for the proof: behind a fresh zero everything would pass."""
    assert "in another way" in look(Late()).refused["a"]


# ---- nothing else changes -----------------------------------------------------------------------
def test_neither_the_network_nor_the_random_numbers_change():
    model = networks.SRResNet().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    pairs = prune.find_pairs(model, torch.rand(LOW, generator=torch.Generator()))
    assert same(model.state_dict(), state) and model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert [pair.name for pair in pairs] == [p.name for p in find_pairs(model, torch.rand(LOW))]


def test_narrow_keeps_what_is_frozen_frozen_and_counts_anew():
    model = networks.RRDB().eval()
    model.up.requires_grad_(False)
    pairs = look(model).pairs
    kept = {pair.name: [0, 2, 3] for pair in pairs}
    smaller = narrow(model, pairs, kept)
    assert not model.up.weight.requires_grad and model.body[0].conv1.weight.requires_grad
    assert model.body[0].conv3.in_channels == model.body[0].conv3.weight.shape[1] == 16 + 3 * 3
    [third] = [pair for pair in smaller if pair.name == "body.0.conv2"]
    assert third.width == 3 and dict(third.consumers)["body.0.conv3"].flatten().tolist() == [
        22, 23, 24]
    assert model(torch.rand(LOW)).shape == (1, 3, 16, 16)
