"""data.py: what a folder becomes, and what is promised of the batches."""
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import data
import leaves
from backbones.base import SR
from data import Picture
from degradation import degrade_picture
from pictures import picture, same_images, save
from tiny import ROOT, same

SCRIPT = {**os.environ, "PYTHONPATH": str(ROOT)}  # of a script that imports data


# ---- sets of pictures ----------------------------------------------------------------------------
def test_a_slice_is_a_set_that_shares_the_loader():
    loaded = []

    def load(i):
        loaded.append(i)
        return i

    whole = data.Pictures(["a", "b", "c", "d"], load, (1, 2))
    part = whole[1:4]
    assert part.names == ["b", "c", "d"]
    assert part.scales == (1, 2)
    assert len(part) == 3
    assert loaded == []
    assert [part[0], part[-1], part[1:][0], whole[::-1][0]] == [1, 3, 2, 3]
    assert list(part) == [1, 2, 3]
    for i in (3, -4):
        with pytest.raises(IndexError):
            part[i]


def test_pictures_are_read_once_until_the_limit(tmp_path, monkeypatch):
    read = []
    decode = data.decode

    def noted(path):
        read.append(path.stem)
        return decode(path)

    for i in range(4):
        save(tmp_path / f"{i}.png", picture(8, 8, i))
    monkeypatch.setattr(data, "decode", noted)
    one = 3 * (64 + 16)  # bytes of a picture and its half
    p = data.open_folder(tmp_path, (1, 2), limit=2 * one + 10)
    assert read == []
    first = [p[i].images for i in range(4)]
    assert "".join(read) == "0123"
    assert all(same_images(a, b.images) for a, b in zip(first, p))
    assert "".join(read[4:]) == "23"  # 0 and 1 stayed, the others are read again
    assert same_images(p[1:4][-1].images, first[3])
    assert same_images(p[1:4][0].images, first[1])
    assert "".join(read[6:]) == "3"


@pytest.mark.parametrize("scales", [(2, 4), (1,), (1, 3, 4), ()])
def test_scales_must_hold_1_and_divide_the_largest(tmp_path, scales):
    save(tmp_path / "a.png", picture(8, 8))
    with pytest.raises(ValueError, match="scales"):
        data.open_folder(tmp_path, scales)
    with pytest.raises(ValueError, match="scales"):
        data.photographs(scales)
    with pytest.raises(ValueError, match="scales"):
        data.generate(1, 24, scales, 0)


# ---- built-in pictures ---------------------------------------------------------------------------
def test_generated_pictures_are_the_same_in_any_number_of_processes():
    p = data.generate(3, 32, (1, 2), seed=5, workers=1)
    q = data.generate(3, 32, (1, 2), seed=5, workers=2)
    assert p.names == ["leaves0000", "leaves0001", "leaves0002"]
    assert len(p) == 3
    assert all(same_images(a.images, b.images) for a, b in zip(p, q))
    assert not same_images(p[0].images, p[1].images)
    assert p[2].kernel is None
    high = leaves.dead_leaves((5, 2), 32)
    assert same_images(p[2].images, {1: data.imresize(high, 1 / 2), 2: high})


@pytest.mark.parametrize("count, side, seed", [(0, 32, 0), (1, 33, 0), (1, 0, 0), (1, 32, -1)])
def test_generate_refuses(count, side, seed):
    with pytest.raises(ValueError, match="cannot generate"):
        data.generate(count, side, (1, 2), seed)


def test_generate_in_a_script_without_a_guard(tmp_path):
    """With torch's threads running, and without `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text("import data, torch\n"
                      "torch.rand(300, 300) @ torch.rand(300, 300)\n"
                      "print(len(data.generate(4, 32, (1, 2), 0, workers=2)))\n")
    run = subprocess.run([sys.executable, "-W", "always", script], capture_output=True, text=True,
                         timeout=60, env=SCRIPT)
    assert (run.returncode, run.stdout) == (0, "4\n"), run.stderr
    assert "multi-threaded" not in run.stderr


def test_photographs():
    p = data.photographs((1, 4))
    assert len(p) == 8
    assert p.names[0] == "astronaut"
    assert "ihc" in p.names
    images = p[0].images
    assert images[4].shape == (512, 512, 3)
    assert same_images(images, {1: data.imresize(images[4], 1 / 4), 4: images[4]})
    assert p[0].kernel is None
    for other in p[1:3]:
        high = other.images[4]
        assert high.shape[0] == 4 * other.images[1].shape[0]
        assert high.std() > 20


def test_blurred_photographs_are_always_the_same():
    plain = data.photographs((1, 4))
    first = data.photographs((1, 4), 31)
    second = data.photographs((1, 4), 31)
    for i in (1, 2):
        a = first[i]
        assert same_images(a.images, second[i].images)
        assert np.array_equal(a.kernel, second[i].kernel)
        assert a.kernel.shape == (31, 31)
        assert a.kernel.dtype == np.float32
        assert np.array_equal(a.images[4], plain[i].images[4])
        detail = np.abs(np.diff(a.images[1].astype(int), axis=0)).mean()
        sharp = np.abs(np.diff(plain[i].images[1].astype(int), axis=0)).mean()
        assert detail < 0.8 * sharp


def test_each_photograph_is_blurred_by_a_kernel_of_its_own():
    p = data.photographs((1, 4), 31)
    for i in (1, 2):
        low, kernel = degrade_picture(p[i].images[4], 4, 31, i)  # i: the seed
        assert np.array_equal(p[i].images[1], low)
        assert np.array_equal(p[i].kernel, kernel)
    drawn = [data.blind_kernels(1, 31, torch.Generator().manual_seed(i)) for i in (1, 2)]
    assert (drawn[0] - drawn[1]).abs().max() > 0.001


# ---- folders -------------------------------------------------------------------------------------
def test_any_folder(tmp_path):
    high = picture(18, 23)
    for name in ("b.PNG", "sub/a.bmp", "a.TIFF"):
        save(tmp_path / name, high)
    save(tmp_path / ".hidden.png", high)
    (tmp_path / "notes.txt").write_text("no picture")
    p = data.open_folder(tmp_path, (4, 1, 2))
    assert p.names == ["a.TIFF", "b.PNG", "sub/a.bmp"]
    assert p.scales == (1, 2, 4)
    assert len(p) == 3
    cropped = high[:16, :20]
    expected = {1: data.imresize(cropped, 1 / 4), 2: data.imresize(cropped, 1 / 2), 4: cropped}
    for each in p:
        assert list(each.images) == [1, 2, 4]
        assert same_images(each.images, expected)
        assert each.kernel is None


@pytest.mark.parametrize("high, low", data.LAYOUTS)
def test_layouts_use_the_files_and_make_the_others(tmp_path, high, low):
    """Of 18×23 pixels, ×4 uses 16×20, but ×2 alone 18×22: its file is larger than twice ×4's."""
    originals = [picture(18, 23, 0), picture(18, 23, 1)]
    save(tmp_path / high / "0001.png", originals[0])
    save(tmp_path / high / "0002.png", originals[1])
    x4 = picture(4, 5, 9)
    x2 = picture(9, 11, 9)
    save(tmp_path / low / "X4/0001x4.png", x4)
    save(tmp_path / low / "X2/0001x2.png", x2)
    p = data.open_folder(tmp_path, (1, 2, 4))
    assert p.names == ["0001.png", "0002.png"]
    assert same_images(p[0].images, {1: x4, 2: x2[:8, :10], 4: originals[0][:16, :20]})
    made = originals[1][:16, :20]
    expected = {1: data.imresize(made, 1 / 4), 2: data.imresize(made, 1 / 2), 4: made}
    assert same_images(p[1].images, expected)
    x2_alone = data.open_folder(tmp_path, (1, 2))
    assert same_images(x2_alone[0].images, {1: x2, 2: originals[0][:18, :22]})


@pytest.mark.parametrize("kind", ["nearest", "blur-down"])
def test_another_reduction_makes_the_input_alone(kind, tmp_path):
    """Files of reductions are bicubic and not taken for it; what lies between stays bicubic."""
    original = picture(16, 24)
    save(tmp_path / "HR" / "a.png", original)
    save(tmp_path / "LR_bicubic" / "X4" / "ax4.png", picture(4, 6, 1))
    save(tmp_path / "LR_bicubic" / "X2" / "ax2.png", picture(8, 12, 2))
    [found] = data.open_folder(tmp_path, (1, 2, 4), degradation=kind)
    assert np.array_equal(found.images[1], data.reduce(original, 4, kind))
    assert np.array_equal(found.images[2], picture(8, 12, 2))
    [found] = data.open_folder(tmp_path, (1, 2, 4))
    assert np.array_equal(found.images[1], picture(4, 6, 1))
    for pictures in (data.photographs((1, 2, 4), degradation=kind),
                     data.generate(1, 64, (1, 2, 4), 0, degradation=kind)):
        images = pictures[0].images
        assert np.array_equal(images[1], data.reduce(images[4], 4, kind))
        assert np.array_equal(images[2], data.imresize(images[4], 1 / 2))


def test_layouts_are_those_of_the_authors():
    assert [high for high, _ in data.LAYOUTS] == ["DF2K/DF2K_HR", "DIV2K/DIV2K_train_HR",
                                                  "Flickr2K/Flickr2K_HR", "HR"]
    assert [low for _, low in data.LAYOUTS] == ["DF2K/DF2K_LR_bicubic",
                                                "DIV2K/DIV2K_train_LR_bicubic",
                                                "Flickr2K/Flickr2K_LR_bicubic", "LR_bicubic"]


def test_df2k_goes_before_div2k(tmp_path):
    save(tmp_path / "DIV2K/DIV2K_train_HR/0001.png", picture(8, 8))
    save(tmp_path / "DF2K/DF2K_HR/f.png", picture(8, 8))
    assert data.open_folder(tmp_path, (1, 2)).names == ["f.png"]


@pytest.mark.parametrize("size", [(3, 6), (5, 6), (4, 5), (4, 7)])  # 4×6 would be right
def test_sizes_that_do_not_match_are_named(tmp_path, size):
    save(tmp_path / "HR/a.png", picture(18, 24))
    save(tmp_path / "LR_bicubic/X4/ax4.png", picture(*size))
    p = data.open_folder(tmp_path, (1, 4))
    with pytest.raises(ValueError) as caught:
        p[0]
    for part in ("HR/a.png", "24x18", "X4/ax4.png", f"{size[1]}x{size[0]}"):
        assert part in str(caught.value)


@pytest.mark.parametrize("name, words", [
    ("missing", "missing: give a folder"),
    ("file", "a file: give a folder"),
    ("empty", "no picture"),
    ("benchmark", "mixes originals and reductions")])
def test_open_folder_refuses(tmp_path, name, words):
    save(tmp_path / "benchmark/Set5/HR/a.png", picture(8, 8))
    save(tmp_path / "benchmark/Set5/LR_bicubic/X2/ax2.png", picture(4, 4))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=words):
        data.open_folder(tmp_path / name, (1, 2))


def test_a_picture_that_is_too_small_is_named(tmp_path):
    save(tmp_path / "a.png", picture(3, 9))
    with pytest.raises(ValueError, match="a.png has 9x3 pixels, too few for scale 4"):
        data.open_folder(tmp_path, (1, 4))[0]


def blurred_set(tmp_path):
    """DIV2KRK as it is published, with three pictures."""
    for i in (1, 2, 10):
        save(tmp_path / "gt" / f"img_{i}_gt.png", picture(17, 24, i))
        save(tmp_path / "lr_x4" / f"im_{i}.png", picture(4, 6, 100 + i))
    (tmp_path / "gt_k_x4").mkdir()
    return tmp_path


def test_a_blurred_set_is_matched_by_number(tmp_path):
    p = data.open_folder(blurred_set(tmp_path), (1, 4))
    assert p.names == ["img_10_gt.png", "img_1_gt.png", "img_2_gt.png"]
    for each, i in zip(p, (10, 1, 2)):
        assert same_images(each.images, {1: picture(4, 6, 100 + i), 4: picture(17, 24, i)[:16]})


def test_a_blurred_set_must_be_complete(tmp_path):
    root = blurred_set(tmp_path)
    words = "img_10_gt.png has no blurred picture .* in .*lr_x2: .* another scale"
    with pytest.raises(ValueError, match=words):
        data.open_folder(root, (1, 2))
    (root / "lr_x4" / "im_2.png").unlink()
    with pytest.raises(ValueError, match="img_2_gt.png has no blurred picture"):
        data.open_folder(root, (1, 4))


# ---- training batches ----------------------------------------------------------------------------
def coordinates(height, width):
    """A picture whose pixels say where they are: red row, green column, blue scale."""
    images = {}
    for s in (1, 2, 4):
        rows, columns = np.mgrid[:height * s, :width * s]
        images[s] = np.stack([rows, columns, np.full_like(rows, s)], -1).astype(np.uint8)
    return Picture(images)


def located(count=3):
    names = [f"p{i}" for i in range(count)]
    return data.Pictures(names, lambda i: coordinates(20 + i, 30 - i), (1, 2, 4))


def take(pictures, number, seed=1, start=0):
    return list(itertools.islice(data.batches(pictures, 32, 4, seed, start), number))


def places(images):
    """Row and column that the red and green of (N, 3, h, w) say, int64 (N, 2, h, w)."""
    return (images[:, :2] * 255).round().long()


def test_batches_are_float_images_between_0_and_1():
    for batch in take(located(), 3):
        assert batch.kernel is None
        assert list(batch.images) == [1, 2, 4]
        for s, x in batch.images.items():
            assert x.shape == (4, 3, 8 * s, 8 * s)
            assert x.dtype == torch.float32
            assert x.is_contiguous()
            assert 0 <= x.min() <= x.max() <= 1
            assert (x[:, 2] * 255 - s).abs().max() < 1e-5


def test_crops_are_aligned_and_use_all_symmetries():
    ways = set()
    for batch in take(located(), 60):
        low = places(batch.images[1])
        high = places(batch.images[4])
        assert torch.equal(high[:, :, ::4, ::4] // 4, low)  # the top left of each 4×4 pixels
        for crop in low:
            assert crop[0].max() - crop[0].min() == 7
            assert crop[1].max() - crop[1].min() == 7
            down = crop[:, 1, 0] - crop[:, 0, 0]
            right = crop[:, 0, 1] - crop[:, 0, 0]
            ways.add((*down.tolist(), *right.tolist()))
    assert len(ways) == 8


def test_crops_reach_every_corner():
    corners = [places(batch.images[1]).amin((2, 3)) for batch in take(located(1), 200)]
    rows, columns = torch.cat(corners).T
    assert rows.unique().tolist() == list(range(20 - 8 + 1))
    assert columns.unique().tolist() == list(range(30 - 8 + 1))


def test_batches_repeat_and_continue():
    steps = take(located(), 6)
    assert all(same(a, b) for a, b in zip(steps, take(located(), 6), strict=True))
    assert all(same(a, b) for a, b in zip(steps[4:], take(located(), 2, start=4), strict=True))
    assert not same(steps[0], steps[1])
    assert not same(steps[0], take(located(), 1, seed=2)[0])


@pytest.mark.parametrize("pictures, patch, batch, seed, start, words", [
    (located(), 30, 4, 0, 0, "patch=30 must be a positive multiple of the scale 4"),
    (located(), 0, 4, 0, 0, "patch=0"),
    (located(), 32, 0, 0, 0, "batch=0"),
    (located(), 32, 4, -1, 0, "seed=-1"),
    (located(), 32, 4, 0, -1, "start=-1"),
    (located()[:0], 32, 4, 0, 0, "from 0 pictures")])
def test_batches_refuse(pictures, patch, batch, seed, start, words):
    with pytest.raises(ValueError, match=words):
        data.batches(pictures, patch, batch, seed, start)


def test_a_picture_smaller_than_the_patch_is_named():
    with pytest.raises(ValueError, match=r"p\d .*smaller than the patch .84."):
        next(data.batches(located(), 84, 4, 0))


def test_to_device_keeps_the_values_and_closes_the_stream():
    closed = []

    def stream():
        try:
            yield from data.batches(located(), 32, 4, 1)
        finally:
            closed.append(True)

    below = stream()  # held here, or it would be closed by being dropped
    source = data.to_device(below, torch.device("cpu"))
    batch = next(source)
    assert same(batch, take(located(), 1)[0])
    for x in batch.images.values():
        assert x.is_contiguous(memory_format=torch.channels_last)
    source.close()
    assert closed == [True]


def test_to_device_takes_the_kernel_along():
    batch = SR({1: torch.rand(1, 3, 4, 4)}, torch.rand(1, 1, 3, 3))
    moved = next(data.to_device((b for b in [batch]), torch.device("meta")))
    assert moved.images[1].device.type == "meta"
    assert moved.kernel.device.type == "meta"


# ---- the threads that work ahead -----------------------------------------------------------------
def other_threads():
    return [t for t in threading.enumerate() if t is not threading.main_thread()]


def test_the_threads_end_with_their_iterator():
    before = len(other_threads())
    stream = data.batches(located(), 32, 4, 0)
    next(stream)
    assert before < len(other_threads()) <= before + data.WORKERS
    stream.close()
    assert len(other_threads()) == before
    stream = data.batches(located(), 32, 4, 0)
    next(stream)
    del stream
    assert len(other_threads()) == before


def test_errors_of_the_threads_arrive():
    before = len(other_threads())

    def broken(i):
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        next(data.batches(data.Pictures(["x"], broken, (1, 2)), 32, 4, 0))
    assert len(other_threads()) == before


def test_the_threads_work_ahead_but_not_far():
    made = []
    reached = threading.Event()

    def make(k):
        made.append(k)
        if len(made) == 1 + data.AHEAD:
            reached.set()
        return k

    stream = data.ahead(make, itertools.count(7))
    assert next(stream) == 7
    assert reached.wait(10)  # one was taken, so many are ready
    assert sorted(made) == list(range(7, 8 + data.AHEAD))
    assert next(stream) == 8
    stream.close()


def test_results_come_in_order_whichever_thread_is_first():
    """The first to be asked for is the last to be made."""
    second = threading.Event()

    def make(k):
        if k:
            second.set()
        assert k or second.wait(10)
        return k

    assert list(data.ahead(make, range(6), workers=2, depth=3)) == list(range(6))


@pytest.mark.parametrize("ending, code", [
    ("", 0),
    ("keep = [stream]; keep.append(keep); 1 / 0", 1)])
def test_a_stream_that_is_never_closed_does_not_hang_at_exit(ending, code):
    script = ("import data, numpy as np\n"
              "def load(i):\n"
              "    return data.Picture({s: np.zeros((9 * s, 9 * s, 3), 'uint8') for s in (1, 2)})\n"
              "p = data.Pictures(['x'], load, (1, 2))\n"
              "stream = data.batches(p, 8, 4, 0); next(stream); print('done'); ")
    run = subprocess.run([sys.executable, "-c", script + ending], capture_output=True, text=True,
                         timeout=60, env=SCRIPT)
    assert (run.returncode, run.stdout) == (code, "done\n"), run.stderr
