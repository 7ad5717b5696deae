"""evaluate.py: the measures against scikit-image and a brute-force window, the published counts, tiles that must not
show, checkpoints that must not run anything, and the command with the files and flags that users really give it."""
import math
import os
import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_command, tiny_swinir
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch.nn import functional as F

import data
import evaluate
import models
from models import DCLS

ROOT = Path(__file__).parents[1]
CHANNELS = Path(__file__).parent / "golden" / "channels"


def picture(height, width, seed=0):
    """Smooth colours with noise and a few edges, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, max(2, height // 8), max(2, width // 8))))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0].permute(1, 2, 0).numpy()
    return (255 * smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)


# ---- measures
def y_of(image):
    """Y from the three weighted channels one by one: not the product that evaluate.luma uses."""
    r, g, b = (image[..., c].astype(float) for c in range(3))
    return 16 + (65.481 * r + 128.553 * g + 24.966 * b) / 255


@pytest.mark.parametrize("height, width, crop", [(64, 48, 4), (31, 19, 4), (40, 90, 0), (101, 53, 8)])
def test_measures_agree_with_scikit_image(height, width, crop):
    a, b = picture(height, width, 1), picture(height, width, 2)
    y, z = (y_of(image)[crop:height - crop, crop:width - crop] for image in (a, b))
    assert evaluate.psnr_y(a, b, crop) == pytest.approx(peak_signal_noise_ratio(y, z, data_range=255), abs=1e-6)
    theirs = structural_similarity(y, z, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
    assert evaluate.ssim_y(a, b, crop) == pytest.approx(theirs, abs=1e-6)


def test_ssim_agrees_with_a_window_by_window_sum():
    a, b = picture(17, 14, 3), picture(17, 14, 4)
    d = np.arange(-5, 6)
    window = np.exp(-(d[:, None] ** 2 + d ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    y, z, values = y_of(a)[1:-1, 1:-1], y_of(b)[1:-1, 1:-1], []
    for i in range(y.shape[0] - 10):
        for j in range(y.shape[1] - 10):
            p, q = y[i:i + 11, j:j + 11], z[i:i + 11, j:j + 11]
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append((2 * mp * mq + 2.55 ** 2) * (2 * cov + 7.65 ** 2)
                          / ((mp ** 2 + mq ** 2 + 2.55 ** 2) * (vp + vq + 7.65 ** 2)))
    assert evaluate.ssim_y(a, b, 1) == pytest.approx(np.mean(values), abs=1e-9)


def test_measures_of_equal_images_and_of_a_known_error():
    a = picture(20, 20)
    assert evaluate.psnr_y(a, a.copy(), 4) == math.inf and evaluate.ssim_y(a, a.copy(), 4) == 1.0
    black, grey = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 10, np.uint8)    # Y differs by 2190/255 everywhere
    assert evaluate.psnr_y(black, grey, 2) == pytest.approx(20 * math.log10(255 * 255 / 2190), abs=1e-9)


@pytest.mark.parametrize("a, b, crop, word", [
    (picture(20, 20), picture(20, 21), 0, "20x20 and 21x20"), (picture(18, 20), picture(18, 20), 4, "20x18"),
    (picture(20, 20)[..., 0], picture(20, 20)[..., 0], 0, r"\(20, 20\)"),
    (picture(20, 20) / 255, picture(20, 20), 0, "float64"),
    (np.zeros((0, 20, 3), np.uint8), np.zeros((0, 20, 3), np.uint8), 0, r"\(0, 20, 3\)")])
def test_measures_refuse(a, b, crop, word):
    with pytest.raises(ValueError, match=word):
        evaluate.ssim_y(a, b, crop)


# ---- costs
@pytest.mark.parametrize("arch, scale, channels, params, madds", [
    ("drn_s", 4, None, 4_804_065, 109_922_538_480), ("drn_l", 4, None, 9_825_893, 224_763_814_032),
    ("drn_s", 8, None, 5_403_000, 197_943_158_508), ("drn_l", 8, None, 10_004_018, 366_379_966_800),
    ("drn_s", 4, "search_x4p03", 3_116_637, 72_197_174_256), ("drn_s", 8, "search_x8p03", 3_490_832, 123_832_989_420),
    ("drn_s", 4, "search_x4p05", 2_267_417, 53_016_282_096), ("drn_s", 8, "search_x8p05", 2_548_420, 94_243_067_628),
    ("drn_s", 4, "search_x4p07", 1_427_545, 32_745_505_776), ("drn_s", 8, "search_x8p07", 1_572_288, 53_341_574_892),
    ("swinir_light", 4, None, 929_628, 9_815_592_960), ("swinir", 4, None, 11_900_199, 120_502_038_528),       # 9.82, 120.50 G
    ("swinir_light", 4, "swinir_light_drc_channel_config", 631_632, 6_698_668_032),                            # 6.70 G
    ("dat_light", 4, None, 572_766, 7_594_155_054), ("dat", 4, None, 14_802_051, 153_712_666_764)])            # 7.594, 153.71 G
def test_published_costs(arch, scale, channels, params, madds):
    widths = channels and [int(n) for n in (CHANNELS / f"{channels}.txt").read_text().split()]
    assert evaluate.count(models.build(arch, scale, widths), 96, 96) == (params, madds)


def test_count_leaves_the_model_alone_and_counts_biases_only_where_asked():
    net = Local()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    weights = 7 * 5 * (3 * 8 * 49 + 8 * 12 * 9)
    assert evaluate.count(net, 7, 5).madds == weights
    net.madds_count_bias = True
    assert evaluate.count(net, 7, 5) == (3 * 8 * 49 + 8 + 8 * 12 * 9, weights + 7 * 5 * 8)      # the second has no bias
    assert all(v.device.type == "cpu" and v.equal(before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())


# ---- upscaling
class Local(nn.Module):
    """×2, sees 4 LR pixels to every side; float64, so that summation order cannot tip a rounding."""
    scale = 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 7, padding=3).double(), nn.Conv2d(8, 12, 3, padding=1, bias=False).double()
        self.eval()

    def forward(self, x):
        x = x.to(self.a.weight)
        return models.SR({2: F.interpolate(x, scale_factor=2) + F.pixel_shuffle(self.b(self.a(x).relu()), 2)})


class Strided(Local):
    """The same below a bicubic enlargement and strides, as in DRN, and above a stride of 8 in LR pixels, as windows."""
    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 3, 3, stride=2, padding=1).double()
        self.coarse = nn.Conv2d(3, 3, 8, stride=8).double()
        self.eval()

    def forward(self, x):
        x = x.to(self.a.weight)
        height, width = x.shape[2:]
        blocks = self.coarse(F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate"))
        blocks = F.interpolate(blocks, scale_factor=8)[..., :height, :width]
        large = F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False)
        return super().forward(self.down(large) + blocks)


@pytest.mark.parametrize("net", [Local(), Strided()], ids=["local", "strided"])
@pytest.mark.parametrize("height, width, tile, overlap", [
    (200, 150, 96, 16), (97, 96, 96, 16), (33, 300, 96, 13), (129, 130, 100, 16), (1, 257, 96, 16), (300, 95, 120, 20)])
def test_tiles_do_not_show(net, height, width, tile, overlap):
    low = picture(height, width)
    assert np.array_equal(evaluate.upscale(net, low, tile, overlap), evaluate.upscale(net, low))


def test_tiles_show_where_the_overlap_is_too_small():
    low = picture(200, 150)
    assert not np.array_equal(evaluate.upscale(Local(), low, 96, 2), evaluate.upscale(Local(), low))


def test_tiles_cover_are_aligned_and_as_few_as_possible():
    for overlap in (0, 7, 32):
        for tile in (evaluate.smallest_tile(overlap), 193, 384):
            for length in (*range(tile - 2, tile + 70), 1000, 4097):
                starts, side = evaluate.tile_starts(length, tile, overlap)
                assert side <= tile and starts[0] == 0 and starts[-1] + side == length
                assert all(start % evaluate.ALIGN == 0 for start in starts)
                assert all(b <= a + side - 2 * overlap for a, b in zip(starts, starts[1:]))
                assert len(starts) == 1 or (len(starts) - 2) * (tile - 2 * overlap - 2 * evaluate.ALIGN) < length
    assert evaluate.tile_starts(520, 512, 32) == ([0, 224], 296)                          # not two tiles of 512


@pytest.mark.parametrize("height, width", [(1, 1), (1, 9), (5, 2)])
def test_any_size_from_one_pixel(height, width):
    low = picture(height, width)
    for model in (Local(), tiny()):
        for options in ({}, {"tile": 128}, {"ensemble": True}):
            high = evaluate.upscale(model, low, **options)
            assert high.shape == (height * model.scale, width * model.scale, 3) and high.dtype == np.uint8


def test_rounding_is_to_nearest_and_clamped():
    class Constant(nn.Module):
        scale = 1

        def forward(self, x):
            return models.SR({1: torch.tensor([-0.2, 99.6 / 255, 1.3]).view(1, 3, 1, 1).expand_as(x)})
    assert evaluate.upscale(Constant(), picture(1, 1)).tolist() == [[[0, 100, 255]]]


@pytest.mark.parametrize("bad", [picture(8, 8)[..., 0], picture(8, 8) / 255.0, np.zeros((0, 4, 3), np.uint8)])
def test_upscale_refuses_other_arrays(bad):
    with pytest.raises(ValueError, match="uint8 array of shape"):
        evaluate.upscale(Local(), bad)


def test_upscale_refuses_a_tile_without_room_and_a_result_that_is_not_finite():
    with pytest.raises(ValueError, match="tile 100 is too small for an overlap of 32: give at least 128"):
        evaluate.upscale(Local(), picture(8, 8), tile=100)
    net = Local()
    net.a.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError):
        evaluate.upscale(net, picture(8, 8))


def test_self_ensemble_turns_with_the_picture():
    net, low = Local(), picture(24, 17)
    high = evaluate.upscale(net, low, ensemble=True)
    assert not np.array_equal(high, evaluate.upscale(net, low))
    for turn in (np.fliplr, np.flipud, np.rot90, lambda x: x.transpose(1, 0, 2)):
        assert np.array_equal(evaluate.upscale(net, turn(low), ensemble=True), turn(high))
        assert not np.array_equal(evaluate.upscale(net, turn(low)), turn(evaluate.upscale(net, low)))
    low = picture(150, 20)
    assert np.array_equal(evaluate.upscale(net, low, 96, 16, True), evaluate.upscale(net, low, ensemble=True))


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    """A DRN of 2 blocks and 4 channels, so that tests of everything around a network do not wait for the network; and
    one thread, for on a busy machine several wait for each other far longer than so little work takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sizes = dict(feats=4, blocks=2)
    monkeypatch.setitem(models.PRESETS, "tiny", (models.PRESETS["drn_s"][0], {4: sizes, 8: sizes}))
    sizes = dict(filters=(11, 9, 7, 5, 3), feats=16, groups=1, blocks=1, latent=4)
    monkeypatch.setitem(models.PRESETS, "tiny_blind", (DCLS, {4: sizes}))
    yield
    torch.set_num_threads(threads)


def tiny(contrast=1):
    torch.manual_seed(0)
    net = models.build("tiny", 4, [4] * 8)
    for tail in net.tail:
        tail.weight.data *= contrast
    return net


def test_tiles_keep_the_windows_of_transformers():
    """Tiles start at multiples of every window, so a SwinIR that sees less far than the overlap gives the same picture,
    but for the order of additions."""
    model, _ = tiny_swinir(scale=2, depths=(2,))
    low = picture(150, 139)
    difference = np.abs(evaluate.upscale(model, low, 128).astype(int) - evaluate.upscale(model, low))
    assert difference.max() <= 1 and difference.mean() < 1e-3
    with pytest.MonkeyPatch.context() as patch:                                           # tiles that cut windows apart do show
        patch.setattr(evaluate, "ALIGN", 4)
        assert np.abs(evaluate.upscale(model, low, 100).astype(int) - evaluate.upscale(model, low)).max() > 1


def test_tiles_of_drn_stay_close():
    """DRN's channel attention pools over a tile instead of the picture, so tiles cannot be exact, but must stay close.
    The last layer is scaled up until the random network's image has the contrast of a photograph. Measured: mean 0.0003
    and at most 1 grey level with the default overlap, 0.17 and 166 without one."""
    net, low = models.inference(tiny(contrast=5)), picture(150, 140)
    whole = evaluate.upscale(net, low).astype(int)
    error, careless = (np.abs(evaluate.upscale(net, low, 128, overlap) - whole) for overlap in (evaluate.OVERLAP, 0))
    assert whole.std() > 30 and error.mean() < 0.01 and error.max() <= 2 and careless.max() > 20


# ---- evaluating
def test_evaluate_takes_networks_and_functions_and_crops_the_truth():
    class Two:
        names = ["a", "b"]
        __len__ = lambda self: 2
        __getitem__ = lambda self, i: {1: picture(20, 24, i), 2: picture(41, 49, 9 + i)}
    rows = evaluate.evaluate(Local(), Two())
    assert [row.name for row in rows] == ["a", "b"]
    truth = Two()[1][2][:40, :48]
    assert rows[1].psnr == evaluate.psnr_y(evaluate.upscale(Local(), Two()[1][1]), truth, 2) and rows[1].seconds > 0
    bicubic = evaluate.evaluate(lambda low: data.imresize(low, 2), Two())
    assert bicubic[0].ssim == evaluate.ssim_y(data.imresize(Two()[0][1], 2), Two()[0][2][:40, :48], 2)
    assert np.array_equal(evaluate.evaluate(Local(), Two(), ensemble=True)[0].image,
                          evaluate.upscale(Local(), Two()[0][1], ensemble=True))
    with pytest.raises(ValueError, match="^a: images of"):
        evaluate.evaluate(lambda low: low, Two())


def test_evaluate_runs_a_network_in_training_mode_as_inference(monkeypatch):
    seen = []
    monkeypatch.setattr(models, "inference", lambda model: seen.append(model) or Local())
    pictures = data.Pictures(["a"], lambda i: {1: picture(20, 24), 2: picture(40, 48)}, (1, 2))
    evaluate.evaluate(Local().train(), pictures)
    evaluate.evaluate(Local(), pictures)
    assert len(seen) == 1 and seen[0].training


# ---- files
class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    file, marker = tmp_path / "evil.pt", tmp_path / "marker"
    for save in (torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))):
        save({"model": Evil(marker)}, file)
        with pytest.raises(ValueError, match="^refused: .*evil.pt is not a plain .*; nothing in it was executed$"):
            evaluate.read_checkpoint(file)
        assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"not one", b"PK\x03\x04 broken", "truncated", "list", "folder", "missing"])
def test_damaged_files_are_refused_by_name(tmp_path, content):
    file = tmp_path / "file.pt"
    if content == "folder":
        file.mkdir()
    elif content == "list":
        torch.save([{}, {}], file)
    elif content == "truncated":
        torch.save(Local().state_dict(), file)
        file.write_bytes(file.read_bytes()[:-500])
    elif content != "missing":
        file.write_bytes(content)
    with pytest.raises(ValueError, match="file.pt") as caught:
        evaluate.read_checkpoint(file)
    assert "\n" not in str(caught.value)


def checkpoint(path, **changes):
    """One of our checkpoints, with a small DRN."""
    net = tiny()
    ours = {"arch": "tiny", "scale": 4, "widths": net.widths, "model": net.state_dict(), "duals": []}
    torch.save(ours | changes, path)
    return net


def test_our_checkpoints_rebuild_themselves(tmp_path):
    net = checkpoint(tmp_path / "a.pt")
    again = evaluate.load_model(tmp_path / "a.pt")
    assert again.widths == net.widths and all(v.equal(net.state_dict()[k]) for k, v in again.state_dict().items())
    evaluate.load_model(tmp_path / "a.pt", "tiny", 4)
    for arguments, words in ((("drn_l",), "tiny.*drn_l"), (("tiny", 8), "4.*8"),
                             ((None, None, "x.txt"), "leave --channels out")):
        with pytest.raises(ValueError, match=words):
            evaluate.load_model(tmp_path / "a.pt", *arguments)
    checkpoint(tmp_path / "b.pt", scale=8)
    with pytest.raises(ValueError, match="b.pt: "):
        evaluate.load_model(tmp_path / "b.pt")


def test_official_files_need_their_arch_and_channels(tmp_path):
    net, file, channels = tiny(), tmp_path / "official.pt", tmp_path / "channels.txt"
    torch.save({"params": net.state_dict()}, file)
    channels.write_text("4\n" * 8)
    again = evaluate.load_model(file, "tiny", channels=channels)
    assert all(v.equal(net.state_dict()[k]) for k, v in again.state_dict().items())
    for arguments, words in (((), "does not say.*--arch"), (("tiny",), "official.pt: .*shape"), (("none",), "none"),
                             (("tiny", 8, channels), "8 channel numbers, this network needs 12")):
        with pytest.raises(ValueError, match=words):
            evaluate.load_model(file, *arguments)


def test_read_channels(tmp_path):
    file = tmp_path / "channels.txt"
    file.write_text(" 12\n\n20 \r\n36")
    assert evaluate.read_channels(file, 3) == [12, 20, 36]
    with pytest.raises(ValueError, match="channels.txt has 3 channel numbers, this network needs 64"):
        evaluate.read_channels(file, 64)
    for line in ("4.0", "-4", "0", "four", "４", "4 8"):
        file.write_text(f"12\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match="channels.txt, entry 2: .* no positive integer"):
            evaluate.read_channels(file, 2)
    file.write_text('{"arch": "drn_s", "widths": {"down0": 12, "down1": 20}}')
    assert evaluate.read_channels(file, 2) == [12, 20]
    for text in ('{"widths": [4]}', '{"arch": 3}', "{", '{"widths": {"down0": 0}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="channels.txt"):
            evaluate.read_channels(file, 1)


# ---- the command
call = partial(run_command, evaluate)


def is_one_sentence(stderr, code):
    lines = stderr.strip().splitlines()
    return "Traceback" not in stderr and "error: " in lines[-1] and (code == 2 or len(lines) == 1)


@pytest.mark.parametrize("code, arguments, words", [
    (1, "--weights missing.pt", "missing.pt does not exist"),
    (1, "--weights {evil}", "nothing in it was executed"),
    (1, "--weights {good} --arch drn_l", "holds arch tiny, --arch drn_l"),
    (1, "--weights {good} --scale 8", "holds scale 4, --scale 8"),
    (1, "--weights {plain}", "does not say what network"),
    (1, "--weights {plain} --arch drn_s --channels missing.txt", "missing.txt: No such file"),
    (1, "--weights {good} --data missing", "missing"),
    (1, "--weights {good} --input missing.png --output o.png", "missing.png does not exist"),
    (1, "--weights {good} --input {plain} --output o.png", "plain.pt"),
    (1, "--weights {good} --input {clear} --output o.jpg", "transparent parts"),
    (1, "--weights {good} --input {clear} --output missing/o.png", "its folder does not exist"),
    (1, "--weights {good} --input {long} --output o.webp", "16383 pixels a side"),
    (1, "--weights {good} --input {clear} --output o.png --kernel k.png", "--kernel k.png: only a blind network"),
    (1, "--weights {blind} --input {clear} --output o.png --kernel missing/k.png", "missing/k.png: its folder does not"),
    (1, "--weights {blind} --input {long} --output o.png", "image of 4096x1 pixels: give at least 7x7"),
    (2, "--weights {good} --kernel k.png", "--kernel belongs to --input"),
    (2, "--weights {good} --input {clear} --output o.png --kernel k.jpg", "--kernel k.jpg: use a name with .png"),
    (2, "--weights {good} --input {clear} --output o.xyz", "unknown extension"),
    (2, "--weights {good} --input {clear} --output o", "unknown extension"),
    (2, "--weights {good} --input {clear}", "need each other"),
    (2, "--weights {good} --input {clear} --output o.png --data d", "exclude each other"),
    (2, "--weights {good} --input {clear} --output o.png --save d", "--save"),
    (2, "--weights {good} --bicubic --scale 4", "exclude each other"),
    (2, "--weights {good} --tile 100", "--overlap 32 needs"),
    (2, "--weights {good} --tile -1", "'-1' must be an integer"),
    (2, "--weights {good} --overlap 200", "--overlap 200 needs"),
    (1, "--weights {good} --kernels triton", "kernels triton cannot run here"),
    (2, "--weights {good} --device cuda:99", "'cuda:99' cannot be used"),
    (2, "--weights {good} --precision half", "invalid choice: 'half'"),
    (2, "--arch drn_s", "random weights"), (2, "--arch nothing", "invalid choice: 'nothing'"),
    (2, "", "give --weights FILE"),
    (2, "--bicubic", "--bicubic needs --scale"), (2, "--bicubic --scale 1", "at least 2")])
def test_refusals(code, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {name: f"{name}.pt" for name in ("good", "plain", "evil", "blind")} | {"clear": "clear.png", "long": "long.png"}
    checkpoint(files["good"])
    blind_checkpoint(files["blind"])
    torch.save(tiny().state_dict(), files["plain"])
    torch.save({"model": Evil(tmp_path / "marker")}, files["evil"])
    Image.new("RGBA", (9, 7), (255, 0, 0, 90)).save("clear.png")
    Image.new("L", (4096, 1)).save("long.png")
    before = set(tmp_path.iterdir())
    arguments += " --device cpu" * ("--device" not in arguments)
    result, out, err = call(monkeypatch, capsys, *arguments.format(**files).split())
    assert result == code and words in err.splitlines()[-1] and is_one_sentence(err, code) and not out
    assert set(tmp_path.iterdir()) == before


def test_the_command_in_a_process_of_its_own(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--weights", tmp_path / "missing.pt"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert is_one_sentence(done.stderr, 1) and done.stderr.startswith("error: ")


FULL = "error: out of memory: use smaller tiles, patches or batches\n"


@pytest.mark.parametrize("error, code, words", [
    (KeyboardInterrupt(), 130, ""), (FloatingPointError("loss is nan"), 1, "error: loss is nan\n"),
    (torch.OutOfMemoryError("CUDA out of\nmemory"), 1, FULL), (MemoryError(), 1, FULL),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 1, FULL),
    (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: x.txt: No such file or directory\n")])
def test_run(error, code, words, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        evaluate.run(main)
    assert end.value.code == code and capsys.readouterr().err == words


def test_run_shows_the_traceback_in_development_mode(monkeypatch, capsys):
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))             # python -X dev
    with pytest.raises(SystemExit, match="1"):
        evaluate.run(lambda: int("x"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: invalid literal")


def test_run_shows_bugs_and_returns_when_all_is_well():
    assert evaluate.run(lambda: None) is None
    for bug in (RuntimeError("size mismatch"), KeyError("x")):
        with pytest.raises(type(bug)):
            evaluate.run(lambda: (_ for _ in ()).throw(bug))


def odd_pictures():
    """name: (picture as Pillow writes it, mode of the result, words on the terminal)"""
    rgb = Image.fromarray(picture(6, 9))
    exif = Image.Exif()
    exif[0x0112] = 6                                                       # stored lying on its side
    transparent = rgb.quantize(8)
    transparent.info["transparency"] = 0
    wide = np.linspace(0, 65535, 54).astype(np.uint16).reshape(6, 9)
    return {"rgb.png": (rgb, "RGB", ""), "grey.png": (rgb.convert("L"), "L", ""),
            "one.png": (rgb.convert("1"), "L", ""),
            "alpha.png": (rgb.convert("RGBA"), "RGBA", ""), "greyalpha.png": (rgb.convert("LA"), "LA", ""),
            "palette.png": (transparent, "RGBA", ""),
            "sixteen.png": (Image.fromarray(wide), "L", "note: sixteen.png has 16 bits"),
            "sixteen.tif": (Image.fromarray(wide), "L", "note: sixteen.tif has 16 bits"),
            "cmyk.jpg": (rgb.convert("CMYK"), "RGB", ""), "turned.jpg": (rgb, "RGB", "", {"exif": exif})}


@pytest.mark.parametrize("name", odd_pictures())
def test_input_of_any_mode(name, tmp_path, monkeypatch, capsys):
    image, mode, words, *save = odd_pictures()[name]
    monkeypatch.chdir(tmp_path)
    checkpoint("a.pt")
    image.save(name, **(save[0] if save else {}))
    code, out, err = call(monkeypatch, capsys, *"--weights a.pt --device cpu --output out.png --input".split(), name)
    assert code == 0, err
    assert words in out and ("note" in out) == bool(words)
    result = Image.open("out.png")
    assert result.mode == mode and result.size == ((24, 36) if name == "turned.jpg" else (36, 24))
    low = data.decode(name)
    high = evaluate.upscale(models.inference(evaluate.load_model("a.pt")), low.rgb)
    expected = Image.fromarray(high).convert("L") if low.grey else high
    assert np.array_equal(np.asarray(result.convert("L" if low.grey else "RGB")), expected)
    if low.alpha is not None:
        assert np.array_equal(np.asarray(result)[..., -1], data.imresize(low.alpha, 4))


def test_sixteen_bit_colour_is_said(tmp_path, monkeypatch, capsys):
    """Pillow cannot write 16-bit RGB: this PNG is put together by hand."""
    import struct
    import zlib
    monkeypatch.chdir(tmp_path)
    rows = b"".join(b"\0" + bytes(range(6 * 4)) for _ in range(3))                        # 4×3 pixels of 3×2 bytes
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    Path("wide.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks))
    code, out, _ = call(monkeypatch, capsys, "--bicubic", "--scale", "3", "--input", "wide.png", "--output", "o.png")
    assert code == 0 and "note: wide.png has 16 bits" in out and Image.open("o.png").size == (12, 9)


@pytest.mark.parametrize("output, mode", [("o.jpg", "RGB"), ("o.JPEG", "RGB"), ("o.bmp", "RGB"), ("o.tif", "RGBA")])
def test_output_formats_and_opaque_alpha(output, mode, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture(6, 9)).convert("RGBA").save("in.png")
    code, _, err = call(monkeypatch, capsys, "--bicubic", "--scale", "2", "--input", "in.png", "--output", output)
    assert code == 0, err
    assert Image.open(output).size == (18, 12) and Image.open(output).mode == mode
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_big_inputs_are_tiled_by_themselves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint("a.pt")
    Image.fromarray(picture(6, 9)).save("in.png")
    monkeypatch.setattr(evaluate, "AUTO_PIXELS", 50)
    seen, upscale = [], evaluate.upscale
    monkeypatch.setattr(evaluate, "upscale", lambda *args, **how: seen.append(how["tile"]) or upscale(*args, **how))
    for extra in ((), ("--tile", "0"), ("--tile", "200")):
        code, out, _ = call(monkeypatch, capsys, "--weights", "a.pt", "--input", "in.png", "--output", "o.png", *extra)
        assert code == 0 and ("--tile 0: all at once" in out) == (not extra)
    assert seen == [evaluate.AUTO_TILE, 0, 200]


def test_evaluation_of_a_folder(tmp_path, monkeypatch, capsys):
    """The whole command as a user runs it: a table, means that are means, costs, and the saved pictures."""
    (tmp_path / "set").mkdir()
    for i in range(2):
        Image.fromarray(picture(96, 81, i)).save(tmp_path / "set" / f"p{i}.png")
    net = checkpoint(tmp_path / "a.pt")
    code, out, err = call(monkeypatch, capsys, "--weights", tmp_path / "a.pt", "--data", tmp_path / "set",
                          "--save", tmp_path / "out", "--device", "cpu", "--precision", "bf16")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines() if re.match(r"(p\d|mean)", line)]
    table = {name: [float(x) for x in numbers] for name, *numbers in lines}
    assert len(table) == 3
    assert table["mean"] == pytest.approx(np.mean([table["p0.png"], table["p1.png"]], 0).tolist(), abs=1e-3)
    truth = data.open_folder(tmp_path / "set", (1, 4))[0]
    assert table["p0.png"][2:] == pytest.approx([evaluate.psnr_y(bicubic := data.imresize(truth[1], 4), truth[4], 4),
                                                 evaluate.ssim_y(bicubic, truth[4], 4)], abs=1e-3)
    saved = np.asarray(Image.open(tmp_path / "out" / "p0.png"))
    assert table["p0.png"][0] == pytest.approx(evaluate.psnr_y(saved, truth[4], 4), abs=1e-3)
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in out
    assert "1280x720" in out and "cpu, bf16" in out


def test_bicubic_alone(tmp_path, monkeypatch, capsys):
    Image.fromarray(picture(48, 48)).save(tmp_path / "p.png")
    code, out, _ = call(monkeypatch, capsys, "--bicubic", "--scale", "3", "--arch", "drn_s", "--data", tmp_path)
    assert code == 0 and "bicubic" in out and "parameters" not in out and "drn_s" not in out


# ---- blind networks
class Blind(nn.Module):
    """Its kernel points to the brightest corner; its image is the picture, blurred by the kernel that it is given."""
    scale = 1

    def __init__(self):
        super().__init__()
        self.estimated, self.given, self.sizes = 0, [], []

    def estimate(self, x):
        self.estimated += 1
        self.sizes.append(tuple(x.shape[2:]))
        kernel = torch.zeros(1, 1, 3, 3)
        corners = x.mean(1)[0][[0, 0, -1, -1], [0, -1, 0, -1]]
        kernel[0, 0].flatten()[[0, 2, 6, 8][int(corners.argmax())]] = 1
        return kernel

    def forward(self, x, kernel):
        self.given.append(kernel)
        blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), "replicate").transpose(0, 1), kernel.flip(2, 3)).transpose(0, 1)
        return models.SR({1: blurred}, kernel)


def blind_checkpoint(path):
    torch.manual_seed(0)
    net = models.build("tiny_blind")
    net.start_from_interpolation()
    torch.save(dict(arch="tiny_blind", scale=4, widths=net.widths, model=net.state_dict()), path)
    return net


def test_one_kernel_serves_all_tiles_and_turns_with_the_picture():
    low, net = picture(150, 100), Blind().eval()
    low[0, -1] = 255
    whole = evaluate.upscale(net, low)
    assert np.array_equal(whole[:-1, 1:], low[1:, :-1])                        # moved to the upper right, by convolution
    tiled, kernel = evaluate.upscale(net, low, 96, 16), net.given[0]
    assert np.array_equal(tiled, whole) and net.estimated == 2 and len(net.given) > 3
    assert all(torch.equal(k, kernel) for k in net.given)
    net = Blind().eval()
    assert np.array_equal(evaluate.upscale(net, low, ensemble=True), whole) and net.estimated == 1 and len(net.given) == 8
    other = np.zeros((3, 3), np.float32)
    other[1, 1] = 1
    assert np.array_equal(evaluate.upscale(net, low, kernel=other), low) and net.estimated == 1


def test_kernels_of_big_pictures_are_of_their_centre(monkeypatch):
    net, low = Blind(), picture(40, 60)
    low[15, 34] = 255                                                          # upper right of the central 10x10
    monkeypatch.setattr(evaluate, "AUTO_PIXELS", 100)
    assert evaluate.estimate_kernel(net, low)[0, 2] == 1 and net.sizes == [(10, 10)]
    monkeypatch.setattr(evaluate, "AUTO_PIXELS", 2400)
    assert evaluate.estimate_kernel(net, low).shape == (3, 3) and net.sizes[1] == (40, 60)
    assert evaluate.estimate_kernel(tiny(), low) is None


def test_kernel_picture():
    image = evaluate.kernel_picture(np.array([[0, 0.1], [-0.2, 0.4]]), 2)
    assert np.array_equal(image, np.array([[0, 0, 64, 64]] * 2 + [[0, 0, 255, 255]] * 2)) and image.dtype == np.uint8


def test_input_writes_its_kernel(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net, low = blind_checkpoint("a.pt"), picture(20, 30)
    Image.fromarray(low).save("in.png")
    code, out, err = call(monkeypatch, capsys, "--weights", "a.pt", "--input", "in.png", "--output", "o.png", "--kernel",
                          "k.png", "--device", "cpu")
    assert code == 0 and "o.png: 30x20 -> 120x80" in out, err
    expected = evaluate.kernel_picture(evaluate.estimate_kernel(net, low))
    assert Image.open("k.png").mode == "L" and np.array_equal(np.asarray(Image.open("k.png")), expected)
    assert expected.shape == (248, 248) and np.array_equal(np.asarray(Image.open("o.png")), evaluate.upscale(net, low))


def test_evaluation_of_blurred_photographs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "PHOTOGRAPHS", ("chelsea.png", "coffee.png"))
    net = blind_checkpoint(tmp_path / "a.pt")
    code, out, err = call(monkeypatch, capsys, "--weights", tmp_path / "a.pt", "--save", tmp_path / "out",
                          "--device", "cpu")
    assert code == 0, err
    pictures = data.photographs((1, 4), 31)
    rows = evaluate.evaluate(net, pictures)
    error = np.mean([np.abs(row.kernel - pictures[i]["kernel"]).mean() for i, row in enumerate(rows)])
    assert f"blur kernels: mean |k - k*| {error:.2e}" in out
    assert re.search(rf"chelsea +{rows[0].psnr:.3f} {rows[0].ssim:.5f}", out)
    saved = np.asarray(Image.open(tmp_path / "out" / "coffee_kernel.png"))
    assert np.array_equal(saved, evaluate.kernel_picture(rows[1].kernel))


def test_evaluation_of_a_blurred_set(tmp_path, monkeypatch, capsys):
    for folder in ("gt", "lr_x4"):
        (tmp_path / folder).mkdir()
    for i in (1, 2):
        Image.fromarray(picture(96, 80, i)).save(tmp_path / "gt" / f"img_{i}_gt.png")
        Image.fromarray(picture(24, 20, 9 + i)).save(tmp_path / "lr_x4" / f"im_{i}.png")
    net = blind_checkpoint(tmp_path / "a.pt")
    code, out, err = call(monkeypatch, capsys, "--weights", tmp_path / "a.pt", "--data", tmp_path, "--device", "cpu")
    assert code == 0 and "blur kernels" not in out, err
    expected = evaluate.psnr_y(evaluate.upscale(net, picture(24, 20, 11)), picture(96, 80, 2), 4)
    assert re.search(rf"img_2_gt.png +{expected:.3f}", out)
