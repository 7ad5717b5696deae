"""The losses, on numbers small enough to compute by hand; the duals; distillation."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dual
import models
from backbones.base import SR
from tiny import fill, rule, tiny_dat, tiny_dcls, tiny_drn, tiny_swinir


class Mean2(nn.Module):
    """A dual 2 → 1 for sums by hand: the mean of every 2×2 pixels."""
    src = 2
    dst = 1

    def forward(self, x):
        return F.avg_pool2d(x, 2)


def image(*rows) -> torch.Tensor:
    """(1, 1, H, W)."""
    return torch.tensor(rows)[None, None].requires_grad_()


# One pixel at scale 1 and 2×2 pixels at scale 2:
#   |P_1 − y_1| = |0.3 − 0.5|                                          = 0.2
#   |P_2 − y_2| = (|0.1 − 0| + |0.2 − 0.4| + |0.3 − 0.3| + |0.8 − 0.4|) / 4 = 0.175
#   D(P_2)      = (0.1 + 0.2 + 0.3 + 0.8) / 4 = 0.35, and |0.35 − y_1| = 0.15
def predictions() -> dict:
    return {1: image([0.3]), 2: image([0.1, 0.2], [0.3, 0.8])}


TRUTH = {1: torch.tensor([[[[0.5]]]]), 2: torch.tensor([[[[0.0, 0.4], [0.3, 0.4]]]])}


# ---- the dual regression loss -------------------------------------------------------------------
@pytest.mark.parametrize("weight, loss", [(0.0, 0.375), (0.1, 0.39), (1.0, 0.525)])
def test_dr_loss_by_hand(weight, loss):
    found = dual.dr_loss(predictions(), TRUTH, [Mean2()], weight)
    assert found.item() == pytest.approx(loss)


def test_the_default_weight_of_the_dual_term_is_a_tenth():
    assert dual.dr_loss(predictions(), TRUTH, [Mean2()]).item() == pytest.approx(0.39)


def test_dr_loss_of_a_network_with_one_scale_needs_the_input_for_its_dual():
    images = {2: predictions()[2]}
    assert dual.dr_loss(images, TRUTH, [Mean2()], 1.0).item() == pytest.approx(0.175 + 0.15)


def test_the_dual_term_pulls_at_the_prediction_it_came_from():
    images = predictions()
    dual.dr_loss(images, TRUTH, [Mean2()], 1.0).backward()
    # D(P_2) = 0.35 lies below 0.5: each of its four pixels gets −1/4. The primal term adds the
    # sign of its own difference, also over 4, and 0 where prediction and truth are equal.
    assert images[2].grad.flatten().tolist() == pytest.approx([0.0, -0.5, -0.25, 0.0])
    assert images[1].grad.item() == pytest.approx(-1.0)


def test_duals_and_network_are_trained_by_dr_loss():
    model, duals = tiny_drn()
    y = {s: rule.image(s, 1, 8 * s, 8 * s) for s in (1, 2, 4)}
    dual.dr_loss(model(y[1]).images, y, duals).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in duals.parameters())
    assert all(p.grad is not None for p in model.parameters())


# ---- inputs without originals -------------------------------------------------------------------
class Halve(Mean2):
    """The same from any scale to half of it, with a factor that tells which duals were used."""
    def __init__(self, src, factor):
        super().__init__()
        self.src, self.dst, self.factor = src, src // 2, factor

    def forward(self, x):
        return self.factor * super().forward(x)


def test_the_way_back_takes_one_dual_after_the_other():
    duals = [Halve(4, 2.0), Halve(2, 3.0)]
    image = torch.ones(1, 3, 8, 8)
    assert torch.equal(dual.way_back(image, 4, duals), torch.full((1, 3, 2, 2), 6.0))
    assert torch.equal(dual.way_back(image, 2, duals), torch.full((1, 3, 4, 4), 3.0))
    assert dual.way_back(image, 1, duals) is image


@pytest.mark.parametrize("src, dst", [(2, 1), (4, 1), (8, 4), (8, 1), (3, 1)])
def test_duals_that_start_from_averages_average(src, dst):
    duals = nn.ModuleList([dual.Dual(src, dst, 8)])
    dual.start_from_averages(duals)
    image = torch.rand(2, 3, 4 * src, 5 * src)
    factor = src // dst
    assert (duals[0](image) - F.avg_pool2d(image, factor)).abs().max() < 1e-6
    spare = [p for p in duals.parameters() if p.shape[0] == 8]
    assert all(p[3:].abs().max() > 0 for p in spare), "channels to learn with stay random"


def test_unpaired_loss_by_hand():
    """P_2 = 1 comes back as 3, P_4 = 1 as 2 and then as 6: |3 − 0.5| + |6 − 0.5|."""
    images = {s: torch.ones(1, 3, s, s) for s in (1, 2, 4)}
    low = torch.full((1, 3, 1, 1), 0.5)
    found = dual.unpaired_loss(images, low, [Halve(4, 2.0), Halve(2, 3.0)])
    assert found.item() == pytest.approx(2.5 + 5.5)


def mixed_batch(tiny=tiny_drn):
    """Three pairs and an input alone: predictions, what they should be, all four originals."""
    model, duals = tiny()
    whole = {s: rule.image(s, 4, 8 * s, 8 * s) for s in (1, 2, 4)}
    y = {s: x if s == 1 else x[:3] for s, x in whole.items()}
    return model(whole[1]).images, y, whole, duals


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat])
def test_mixed_loss_is_the_mean_over_the_batch(tiny):
    images, y, whole, duals = mixed_batch(tiny)
    loss = 0
    for i in range(4):
        out = {s: x[i:i + 1] for s, x in images.items()}
        true = {s: x[i:i + 1] for s, x in whole.items()}
        if i < 3:
            loss += dual.dr_loss(out, true, duals, 0.3) / 4
        else:
            loss += 0.3 * dual.unpaired_loss(out, true[1], duals) / 4
    found = dual.mixed_loss(images, y, duals, 0.3)
    assert found.item() == pytest.approx(loss.item(), rel=1e-6)
    native = dual.native_loss(SR(images), SR(y), duals, 0.3, 255)
    assert native.item() == pytest.approx(255 * loss.item(), rel=1e-6)


def test_with_all_originals_or_none_it_is_one_term():
    images, _, whole, duals = mixed_batch()
    assert torch.equal(dual.mixed_loss(images, whole, duals), dual.dr_loss(images, whole, duals))
    none = {s: x if s == 1 else x[:0] for s, x in whole.items()}
    alone = 0.1 * dual.unpaired_loss(images, whole[1], duals)
    assert torch.equal(dual.mixed_loss(images, none, duals), alone)


def test_an_input_alone_trains_network_and_duals():
    model, duals = tiny_drn()
    low = rule.image(1, 1, 8, 8)
    dual.unpaired_loss(model(low).images, low, duals).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in duals.parameters())
    tail = [p for name, p in model.named_parameters() if "tail.2" in name]
    assert tail and all(p.grad.abs().max() > 0 for p in tail)


def test_blind_loss_by_hand():
    kernel = image([0.1, 0.2], [0.3, 0.4])
    flat = torch.full((1, 1, 2, 2), 0.25)
    assert dual.blind_loss(kernel, flat).item() == pytest.approx(0.1)   # (.15 + .05 + .05 + .15)/4


def test_native_loss_is_measured_in_the_range_of_the_network():
    batch = SR(TRUTH)
    for rgb_range in (1, 255):
        found = dual.native_loss(SR(predictions()), batch, [Mean2()], 0.1, rgb_range)
        assert found.item() == pytest.approx(rgb_range * 0.39)


def test_native_loss_adds_the_kernel_as_it_is():
    kernel = image([0.1, 0.2], [0.3, 0.4])
    batch = SR(TRUTH, torch.full((1, 1, 2, 2), 0.25))
    found = dual.native_loss(SR(predictions(), kernel), batch, [Mean2()], 0.1, 2)
    assert found.item() == pytest.approx(2 * 0.39 + 0.1)


# ---- the duals ----------------------------------------------------------------------------------
@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat, tiny_dcls])
def test_duals_take_a_prediction_back_to_the_size_of_their_target(tiny):
    model, duals = tiny()
    height, width = (7, 9) if tiny is tiny_dcls else (5, 6)
    images = {1: torch.rand(1, 3, height, width)} | model(torch.rand(1, 3, height, width)).images
    assert [(d.src, d.dst) for d in duals] == ([(2, 1), (4, 2)] if tiny is tiny_drn else [(4, 1)])
    for d in duals:
        assert d(images[d.src]).shape == images[d.dst].shape


@pytest.mark.parametrize("arch, spec", [
    ("drn_s", [(2, 1), (4, 2), (8, 4)]), ("swinir_light", [(8, 1)])])
def test_duals_at_scale_8(arch, spec):
    with torch.device("meta"):
        duals = dual.make_duals(models.build(arch, 8))
    assert [(d.src, d.dst) for d in duals] == spec


@pytest.mark.parametrize("src, dst", [(2, 1), (3, 1), (4, 1), (8, 1), (4, 2), (8, 4)])
def test_a_dual_divides_odd_sizes_too(src, dst):
    back = dual.Dual(src, dst, 4)
    assert back(torch.rand(2, 3, 5 * src, 7 * src)).shape == (2, 3, 5 * dst, 7 * dst)


@pytest.mark.parametrize("src, dst", [(2, 1), (3, 1), (4, 1)])
def test_duals_are_homogeneous(src, dst):
    """So that the same dual serves images in 0..1 and in 0..255; a bias would break it."""
    back = fill(dual.Dual(src, dst, 8))
    x = rule.image(0, 1, 24, 24)
    assert torch.allclose(back(255 * x), 255 * back(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("src, picked", [(2, [0, 2, 4, 6, 8, 10]), (3, [1, 4, 7, 10]),
                                         (4, [0, 4, 8])])
def test_where_a_dual_looks(src, picked):
    """With kernels that only copy their centre it picks pixels: ×3 the middle one of three."""
    back = dual.Dual(src, 1, 3)
    for layer in back.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.dirac_(layer.weight)
    x = torch.arange(12.).expand(1, 3, 12, 12)
    assert back(x)[0, 0, 0].tolist() == picked


def test_restore_duals_gives_saved_weights_back():
    model, duals = tiny_drn()
    states = [d.state_dict() for d in duals]
    again = dual.restore_duals(model, states)
    for name, tensor in again.state_dict().items():
        assert tensor.equal(duals.state_dict()[name])


def test_restore_duals_refuses_what_does_not_fit():
    model, duals = tiny_drn()
    states = [d.state_dict() for d in duals]
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        dual.restore_duals(model, states[:1])
    with pytest.raises(RuntimeError, match="dual_module"):
        dual.restore_duals(tiny_swinir()[0], states[:1])


# ---- distillation -------------------------------------------------------------------------------
def test_feature_loss_by_hand():
    """Means over channels (2, 3) and (1, 5): (1² + 2²) / 2. The number of channels differs."""
    student = torch.tensor([[[[1., 2.]], [[3., 4.]]]])                  # (1, 2, 1, 2)
    teacher = torch.tensor([[[[0., 4.]], [[2., 5.]], [[1., 6.]]]])      # (1, 3, 1, 2)
    assert dual.feature_loss(student, teacher).item() == pytest.approx(2.5)


class Toy(nn.Module):
    """×1: the features are `factor` times the input in each of `channels`; `last` adds them up."""
    scale = 1
    rgb_range = 255.0

    def __init__(self, feature, factor, channels):
        super().__init__()
        self.feature = feature
        self.factor = nn.Parameter(torch.tensor(factor))
        self.channels = channels
        self.last = nn.Conv2d(channels, 1, 1, bias=False)
        nn.init.ones_(self.last.weight)

    def forward(self, low):
        return SR({1: self.last((self.factor * low).expand(-1, self.channels, -1, -1))})


LOW = torch.tensor([[[[1., 2.], [3., 4.]]]])


def test_distillation_compares_the_features_that_the_backbone_names():
    """Features 1·x and 3·x: 4·(1 + 4 + 9 + 16)/4 = 30, whatever the last layers make of them."""
    student = Toy("last", 1.0, 1)
    teacher = Toy("last", 3.0, 2)
    with dual.distillation(student, teacher) as distance:
        found = distance(LOW, student(LOW))
    assert found.item() == pytest.approx(30)
    found.backward()
    assert student.factor.grad.item() == pytest.approx(-30)             # 2·(1 − 3)·30/4
    assert teacher.factor.grad is None


def test_distillation_compares_images_where_no_feature_is_named():
    """Images 1·x and 2·x, the mean difference is (1 + 2 + 3 + 4)/4 = 2.5, in 0..255."""
    student = Toy("", 1.0, 1)
    teacher = Toy("", 1.0, 2)
    with dual.distillation(student, teacher) as distance:
        found = distance(LOW, student(LOW))
    assert found.item() == pytest.approx(255 * 2.5)
    found.backward()
    assert student.factor.grad.item() == pytest.approx(-255 * 2.5)
    assert teacher.factor.grad is None


def number_channels(module, inputs):
    """What enters a layer becomes 0 everywhere in channel 0, 1 in channel 1, and so on."""
    x, = inputs
    return torch.arange(float(x.shape[1])).view(1, -1, 1, 1).expand_as(x)


@pytest.mark.parametrize("tiny, expected", [
    (tiny_drn, 64), (tiny_swinir, 0.5), (tiny_dat, 0.5), (tiny_dcls, 0.5)])
def test_which_networks_are_distilled_by_features(tiny, expected):
    """DRN by what enters its last convolution, from a wider teacher too; the others by images.

    Features 0 to 15 of the student have the mean 7.5, 0 to 31 of the teacher 15.5: 8² = 64. Images
    are 0.25 and 0.75 everywhere, in 0..1: 0.5 (for DRN, in 0..255, it would be 127.5).
    """
    student, _ = tiny()
    teacher = tiny_drn(feats=16)[0] if tiny is tiny_drn else tiny()[0]
    if tiny is tiny_drn:
        student.tail[2].register_forward_pre_hook(number_channels)
        teacher.tail[2].register_forward_pre_hook(number_channels)
    for network, grey in ((student, 0.25), (teacher, 0.75)):
        network.register_forward_hook(
            lambda module, inputs, out, grey=grey: SR({4: torch.full_like(out.images[4], grey)}))
    low = rule.image(0, 1, 8, 8)
    with dual.distillation(student, teacher) as distance:
        found = distance(low, student(low))
    assert found.item() == pytest.approx(expected)


def test_distillation_removes_its_hooks():
    student = Toy("last", 1.0, 1)
    teacher = Toy("last", 3.0, 2)
    with dual.distillation(student, teacher):
        assert student.last._forward_pre_hooks
        assert teacher.last._forward_pre_hooks
    assert not student.last._forward_pre_hooks
    assert not teacher.last._forward_pre_hooks
    with pytest.raises(KeyboardInterrupt), dual.distillation(student, teacher):
        raise KeyboardInterrupt
    assert not student.last._forward_pre_hooks
