"""evaluate.py: the measures against scikit-image and by hand, published costs, the command."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

import data
import degradation
import evaluate
import leaves
import models
import preflight
from backbones.base import SR
from pictures import picture, save
from tiny import golden_channels, parameters, run_command, tiny_dat, tiny_drn, tiny_swinir
from upscale import upscale


def y_of(image):
    """Y from the three weighted channels one by one: not the product that evaluate.luma uses."""
    r, g, b = (image[..., c].astype(float) for c in range(3))
    return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255


# ---- measures -----------------------------------------------------------------------------------
@pytest.mark.parametrize("height, width, crop", [(64, 48, 4), (31, 19, 4), (40, 90, 0)])
def test_measures_agree_with_scikit_image(height, width, crop):
    a = leaves.dead_leaves((1, 0), 96)[:height, :width]
    b = np.clip(a + picture(height, width) % 30, 0, 255).astype(np.uint8)
    y, z = (y_of(image)[crop:height - crop, crop:width - crop] for image in (a, b))
    psnr = peak_signal_noise_ratio(y, z, data_range=255)
    ssim = structural_similarity(y, z, gaussian_weights=True, sigma=1.5,
                                 use_sample_covariance=False, data_range=255)
    assert evaluate.psnr_y(a, b, crop) == pytest.approx(psnr, abs=1e-6)
    assert evaluate.ssim_y(a, b, crop) == pytest.approx(ssim, abs=1e-6)


def test_ssim_agrees_with_a_window_by_window_sum():
    a, b = picture(17, 14, 3), picture(17, 14, 4)
    d = np.arange(-5, 6)
    window = np.exp(-(d[:, None] ** 2 + d ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    y, z = y_of(a)[1:-1, 1:-1], y_of(b)[1:-1, 1:-1]
    values = []
    for i in range(y.shape[0] - 10):
        for j in range(y.shape[1] - 10):
            u, v = y[i:i + 11, j:j + 11], z[i:i + 11, j:j + 11]
            mu, mv = (window * u).sum(), (window * v).sum()
            var_u = (window * (u - mu) ** 2).sum()
            var_v = (window * (v - mv) ** 2).sum()
            cov = (window * (u - mu) * (v - mv)).sum()
            c1, c2 = 6.5025, 58.5225
            values.append((2 * mu * mv + c1) * (2 * cov + c2)
                          / ((mu ** 2 + mv ** 2 + c1) * (var_u + var_v + c2)))
    assert evaluate.ssim_y(a, b, 1) == pytest.approx(np.mean(values), abs=1e-9)


def test_equal_pictures():
    a = picture(24, 24)
    assert evaluate.psnr_y(a, a, 4) == math.inf
    assert evaluate.ssim_y(a, a, 4) == 1.0


@pytest.mark.parametrize("a, b, words", [
    (picture(20, 20), picture(20, 21), "cannot be compared"),
    (picture(8, 8), picture(8, 8), "too small"),
    (picture(20, 20).astype(float), picture(20, 20), "uint8"),
    (picture(20, 20)[..., 0], picture(20, 20), "(H, W, 3)")])
def test_what_cannot_be_compared(a, b, words):
    with pytest.raises(ValueError) as error:
        evaluate.psnr_y(a, b, 4)
    assert words in str(error.value)


def test_ssim_needs_a_window():
    with pytest.raises(ValueError, match="at least 11x11"):
        evaluate.ssim_y(picture(18, 18), picture(18, 18), 4)


# ---- costs: DRC's tables and the released networks ----------------------------------------------
# Numbers of parameters are in test_models.py, and of the pruned networks in golden/.
@pytest.mark.parametrize("arch, scale, channels, madds", [
    ("drn_s", 4, None, 109_922_538_480),
    ("drn_l", 4, None, 224_763_814_032),
    ("drn_s", 8, None, 197_943_158_508),
    ("drn_l", 8, None, 366_379_966_800),
    ("drn_s", 4, "search_x4p03", 72_197_174_256),
    ("drn_s", 8, "search_x8p03", 123_832_989_420),
    ("drn_s", 4, "search_x4p05", 53_016_282_096),
    ("drn_s", 8, "search_x8p05", 94_243_067_628),
    ("drn_s", 4, "search_x4p07", 32_745_505_776),
    ("drn_s", 8, "search_x8p07", 53_341_574_892),
    ("swinir_light", 4, None, 9_815_592_960),
    ("swinir", 4, None, 120_502_038_528),
    ("swinir_light", 4, "swinir_light_drc_channel_config", 6_698_668_032),
    ("dat_light", 4, None, 7_594_155_054),
    ("dat", 4, None, 153_712_666_764)])
def test_costs_are_the_published_ones(arch, scale, channels, madds):
    model = models.build(arch, scale, golden_channels(channels) if channels else None)
    assert evaluate.count(model, 96, 96) == (parameters(model), madds)


def test_counting_leaves_the_model_alone():
    model, _ = tiny_swinir()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate.count(model, 16, 16)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and tensor.equal(before[name])
    assert not any(module._forward_hooks for module in model.modules())


def test_count_by_hand():
    """conv 3→5 of 3×3 with a bias on 7×6 pixels: 5·3·9 weights and 5 biases."""
    model = nn.Conv2d(3, 5, 3, padding=1)
    assert evaluate.count(model, 7, 6) == (140, 135 * 42)
    model.madds_count_bias = True
    assert evaluate.count(model, 7, 6) == (140, 140 * 42)


@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat])
@pytest.mark.parametrize("kind", ["params", "madds"])
def test_what_belongs_to_no_width_is_what_counting_each_width_leaves(tiny, kind):
    model, _ = tiny()
    dense, of_channel = preflight.costs(model, kind)
    fixed = dense - sum(each * model.widths[name] for name, each in of_channel.items())
    assert 0 < fixed < dense
    assert evaluate.fixed_part(model, kind) == pytest.approx(fixed / dense, abs=1e-9)


# ---- a set of pictures --------------------------------------------------------------------------
def test_rows_are_the_network_and_the_measures():
    model, _ = tiny_swinir()
    photographs = data.photographs((1, 4))[:1]
    images = photographs[0].images
    [row] = evaluate.evaluate(model, photographs)
    image = upscale(model, images[1])
    height, width = image.shape[:2]
    truth = images[4][:height, :width]
    assert np.array_equal(row.image, image)
    assert row.psnr == evaluate.psnr_y(image, truth, 4)
    assert row.ssim == evaluate.ssim_y(image, truth, 4)
    assert row.kernel is None and row.seconds > 0


def test_any_function_can_be_measured_and_bicubic_is_the_baseline_of_our_tables():
    """30.276 dB and 0.8065 stand in every table: with another baseline they would all be void."""
    photographs = data.photographs((1, 4))
    rows = evaluate.evaluate(lambda low: data.imresize(low, 4), photographs)
    assert [row.name for row in rows] == list(photographs.names)
    assert all(20 < row.psnr < 45 and 0.5 < row.ssim < 1 for row in rows)
    assert np.mean([row.psnr for row in rows]) == pytest.approx(30.276, abs=0.0005)
    assert np.mean([row.ssim for row in rows]) == pytest.approx(0.8065, abs=0.00005)


def test_a_picture_that_is_too_small_is_named(tmp_path):
    save(tmp_path / "small.png", picture(16, 16))
    pictures = data.open_folder(tmp_path, (1, 4))
    with pytest.raises(ValueError, match=r"small.*too small"):
        evaluate.evaluate(lambda low: data.imresize(low, 4), pictures)


class Damaged(nn.Module):
    scale = 4

    def forward(self, x):
        return SR({4: torch.full((1, 3, 4 * x.shape[2], 4 * x.shape[3]), math.nan)})


def test_weights_that_are_not_finite_are_told():
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluate.evaluate(Damaged().eval(), data.photographs((1, 4))[:1])


# ---- the command --------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(["a.png", "deep/b.jpg"]):
        save(tmp_path / "set" / name, leaves.dead_leaves((seed, 0), 96))
    return tmp_path / "set"


def test_bicubic_of_a_folder(folder, tmp_path, monkeypatch, capsys):
    code, out, errors = run_command(evaluate, monkeypatch, capsys, "--bicubic", "--scale", 4,
                                    "--data", folder, "--save", tmp_path / "saved")
    assert code == 0, errors
    high = np.array(Image.open(folder / "a.png"))
    low = data.imresize(high, 1 / 4)
    image = data.imresize(low, 4)
    assert f"{evaluate.psnr_y(image, high, 4):.3f} {evaluate.ssim_y(image, high, 4):.5f}" in out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "saved" / "a.png")), image)
    assert len([line for line in out.splitlines() if line.startswith("mean")]) == 1


def test_pictures_are_made_small_as_asked(folder, monkeypatch, capsys):
    code, out, _ = run_command(evaluate, monkeypatch, capsys, "--bicubic", "--scale", 2, "--data",
                               folder, "--degradation", "nearest")
    assert code == 0
    [row] = evaluate.evaluate(lambda low: data.imresize(low, 2),
                              data.open_folder(folder, (1, 2), degradation="nearest"))[:1]
    assert f"{row.psnr:9.3f} {row.ssim:.5f}" in out


def test_a_network_beside_bicubic(folder, tmp_path, monkeypatch, capsys):
    file = tmp_path / "weights.pt"
    model = models.build("swinir_light", 4)
    torch.save(model.state_dict(), file)
    code, out, errors = run_command(evaluate, monkeypatch, capsys, "--weights", file, "--arch",
                                    "swinir_light", "--data", folder, "--device", "cpu")
    assert code == 0, errors
    assert "swinir_light x4" in out and "bicubic" in out
    cost = evaluate.count(model, 96, 96)
    assert f"{cost.params:,} parameters; MAdds {cost.madds / 1e9:.2f} G" in out
    assert "s per picture" in out


def test_no_picture_is_overwritten_by_save(folder, tmp_path, monkeypatch, capsys):
    """Not the originals, not an earlier result without --force, not one result by another."""
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    base = ["--bicubic", "--scale", 4, "--data", folder]
    call = partial(run_command, evaluate, monkeypatch, capsys)
    (tmp_path / "link").symlink_to(folder)
    for target in (folder, tmp_path / "link", folder / "results", folder / "deep"):
        code, _, errors = call(*base, "--save", target, "--force")
        assert code == 2
        assert "its pictures would be overwritten or become more" in errors
    assert call(*base, "--save", tmp_path / "out")[0] == 0
    code, _, errors = call(*base, "--save", tmp_path / "out")
    assert code == 2
    assert "a.png exists already: give another --save, or --force" in errors
    assert call(*base, "--save", tmp_path / "out", "--force")[0] == 0
    assert before == {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    save(folder / "x.jpg", leaves.dead_leaves(0, 96))
    save(folder / "x.jpg.png", leaves.dead_leaves(0, 96))
    code, _, errors = call(*base, "--save", tmp_path / "other")
    assert code == 2
    assert "x.jpg and x.jpg.png would both be written to" in errors
    assert not (tmp_path / "other").exists()


def test_results_are_handed_over_and_not_kept(folder):
    """A thousand photographs would fill the memory."""
    pictures = data.open_folder(folder, (1, 4))
    given = []
    rows = evaluate.evaluate(lambda low: data.imresize(low, 4), pictures, given.append)
    assert [row.image for row in rows] == [None, None]
    assert [row.image.shape for row in given] == [(96, 96, 3)] * 2


@pytest.mark.parametrize("arguments, code, words", [
    ([], 2, "give --weights FILE, or --bicubic"),
    (["--bicubic"], 2, "needs --scale"),
    (["--bicubic", "--scale", 4, "--weights", "w.pt"], 2, "exclude each other"),
    (["--arch", "drn_s"], 2, "random weights"),
    (["--weights", "none.pt"], 1, "none.pt"),
    (["--bicubic", "--scale", 4, "--data", "nowhere"], 1, "nowhere"),
    (["--bicubic", "--scale", 1], 2, "--scale"),
    (["--bicubic", "--scale", 4, "--overlap", 500], 2, "--tile"),
    (["--bicubic", "--scale", 4, "--tile", 32], 2, "at least 128"),
    (["--bicubic", "--scale", 4, "--device", "cuda:99"], 2, "cuda:99"),
    (["--bicubic", "--scale", 4, "--data", ""], 2, "--data: it is empty"),
    (["--bicubic", "--scale", 4, "--save", ""], 2, "--save: it is empty"),
    (["--weights", ""], 2, "--weights: it is empty"),
    (["--bicubic", "--scale", 4, "--device", "meta"], 2, "'meta' cannot be used here"),
    (["--input", "x.png"], 2, "unrecognized arguments")])
def test_wrong_usage_is_one_sentence(arguments, code, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    got, _, errors = run_command(evaluate, monkeypatch, capsys, *arguments)
    assert got == code
    assert words in errors
    assert "Traceback" not in errors


# ---- blurred pictures whose kernels are known ---------------------------------------------------
@pytest.fixture
def blurred(tmp_path):
    """Two pictures laid out as DIV2KRK, and the weights of a blind network."""
    y, x = np.mgrid[-15:16, -15:16]
    for i in (2, 10):
        kernel = np.exp(-((x - 1) ** 2 / i + y ** 2 / 3))
        high = leaves.dead_leaves((i, 0), 128)
        low = degradation.correlated(high, kernel / kernel.sum(), 4)
        save(tmp_path / "set" / "gt" / f"img_{i}_gt.png", high)
        save(tmp_path / "set" / "lr_x4" / f"im_{i}.png", low.round().clip(0, 255).astype(np.uint8))
        (tmp_path / "set" / "gt_k_x4").mkdir(exist_ok=True)
        savemat(tmp_path / "set" / "gt_k_x4" / f"kernel_{i}.mat", {"Kernel": kernel})
    torch.save(models.build("dcls").state_dict(), tmp_path / "dcls.pt")
    return tmp_path


def of_blurred(blurred, monkeypatch, capsys):
    return run_command(evaluate, monkeypatch, capsys, "--weights", blurred / "dcls.pt", "--arch",
                       "dcls", "--data", blurred / "set", "--device", "cpu")


def test_kernels_of_a_blurred_set_are_compared(blurred, monkeypatch, capsys):
    code, out, errors = of_blurred(blurred, monkeypatch, capsys)
    assert code == 0, errors
    assert "up to 0.00 grey levels, the worst up to 0.00" in out
    found = []
    pictures = data.open_folder(blurred / "set", (1, 4))
    rows = evaluate.evaluate(models.inference(models.load(blurred / "dcls.pt", "dcls")), pictures)
    for row, each, i in zip(rows, pictures, (10, 2)):
        assert row.name == f"img_{i}_gt.png"
        kernel = degradation.read_kernel(blurred / "set" / "gt_k_x4" / f"kernel_{i}.mat")
        low = degradation.correlated(each.images[4], kernel, 4)
        true = degradation.kernel_of_blurred(each.images[4], low, 4, 31)
        found.append(np.abs(row.kernel - true).mean())
    assert f"blur kernels: mean |k - k*| {np.mean(found):.2e}" in out


def test_kernels_that_do_not_belong_to_the_pictures_show(blurred, monkeypatch, capsys):
    folder = blurred / "set" / "gt_k_x4"
    (folder / "kernel_2.mat").replace(folder / "other")
    (folder / "kernel_10.mat").replace(folder / "kernel_2.mat")
    (folder / "other").replace(folder / "kernel_10.mat")
    code, out, _ = of_blurred(blurred, monkeypatch, capsys)
    worst = float(out.split("the worst up to ")[1].split()[0])
    assert code == 0 and worst > 0.5


def test_a_kernel_that_is_missing_is_named(blurred, monkeypatch, capsys):
    (blurred / "set" / "gt_k_x4" / "kernel_2.mat").unlink()
    code, _, errors = of_blurred(blurred, monkeypatch, capsys)
    assert code == 1 and "kernel_2.mat is not a MATLAB file" in errors


def test_a_blurred_set_without_kernels_is_measured_all_the_same(blurred, monkeypatch, capsys):
    (blurred / "set" / "gt_k_x4").rename(blurred / "set" / "elsewhere")
    code, out, errors = of_blurred(blurred, monkeypatch, capsys)
    assert code == 0, errors
    assert "mean" in out and "blur kernels" not in out
