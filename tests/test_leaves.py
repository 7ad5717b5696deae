"""leaves.py: the same picture for the same seed, and statistics as they are meant."""
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import leaves
from tiny import ROOT


# ---- pictures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", [64, 50])
def test_a_picture_depends_on_its_seed_only(side):
    image = leaves.dead_leaves(7, side)
    assert image.shape == (side, side, 3)
    assert image.dtype == np.uint8
    assert image.std() > 10
    assert np.array_equal(image, leaves.dead_leaves(7, side))
    assert not np.array_equal(image, leaves.dead_leaves(8, side))


def test_about_half_of_the_pictures_are_out_of_focus(monkeypatch):
    blurred = []
    monkeypatch.setattr(leaves, "out_of_focus", lambda rng, image: blurred.append(1) or image)
    for seed in range(40):
        leaves.dead_leaves(seed, 8)
    assert 10 < len(blurred) < 30


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_pictures_come_in_the_order_of_their_seeds(workers):
    seeds = [(5, 0), (5, 1), 9]
    drawn = list(leaves.draw(seeds, 32, workers))
    assert len(drawn) == 3
    for seed, image in zip(seeds, drawn):
        assert np.array_equal(image, leaves.dead_leaves(seed, 32))


def test_much_work_is_shared_by_the_cores(monkeypatch):
    """Two pictures of 4 pixels are drawn here, unless 32 pixels count as much work."""
    started = []

    class Pool(leaves.ProcessPoolExecutor):
        def __init__(self, workers, *more):
            started.append(workers)
            super().__init__(workers, *more)

    monkeypatch.setattr(leaves, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(sys, "platform", "linux")
    list(leaves.draw([1, 2], 4))
    assert started == []
    monkeypatch.setattr(leaves, "WORTH_IT", 32)
    list(leaves.draw([1, 2], 4))
    assert started == [3]
    monkeypatch.setattr(sys, "platform", "darwin")
    list(leaves.draw([1, 2], 4))
    assert started == [3]


def test_drawing_in_a_script_without_a_guard(tmp_path):
    """Neither are processes started by importing the script again, nor does Python's warning of a
    fork beside threads (3.12 and later) reach the user."""
    script = tmp_path / "script.py"
    script.write_text("import leaves, threading, time\n"
                      "threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
                      "print(len(list(leaves.draw([1, 2, 3, 4], 32, workers=2))))\n")
    run = subprocess.run([sys.executable, "-W", "always", script], capture_output=True, text=True,
                         timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stdout) == (0, "4\n"), run.stderr
    assert "multi-threaded" not in run.stderr


# ---- leaves --------------------------------------------------------------------------------------
@pytest.mark.parametrize("low, high", [(3, 4), (4, 10), (10, 50), (50, 200)])
def test_radii_follow_their_density(low, high):
    def integral(a, b):
        """Of r^-3 (100 + 2r)^2 = 10000 r^-3 + 400 r^-2 + 4 r^-1 from a to b."""
        return 5000 * (a ** -2 - b ** -2) + 400 * (1 / a - 1 / b) + 4 * math.log(b / a)

    radii = leaves.radii(np.random.default_rng(0), 200_000, 3.0, 100)
    share = ((radii >= low) & (radii < high)).mean()
    assert abs(share - integral(low, high) / integral(3, 200)) < 0.005


def test_leaves_have_the_area_of_their_disk_and_stay_within_their_reach():
    thrown = leaves.throw(np.random.default_rng(0), 100, 3.0)
    disks = [shape for shape in thrown if shape.height == 0]
    assert 400 < len(disks) < 600
    for shape in thrown:
        assert 3 <= shape.radius <= 200
        assert -shape.reach <= shape.y <= 100 + shape.reach
        if shape.height == 0:
            assert shape.width == 0
            assert shape.reach == shape.radius
            continue
        assert 4 * shape.height * shape.width == pytest.approx(math.pi * shape.radius ** 2)
        assert 0.49 < shape.height / shape.width < 2.01
        assert shape.reach == pytest.approx(math.hypot(shape.height, shape.width))


def shape(**changes):
    """A disk of radius 1.5 at (2, 1)."""
    disk = leaves.Shape(radius=1.5, height=0, width=0, angle=0, reach=1.5, y=2, x=1)
    return disk._replace(**changes)


@pytest.mark.parametrize("thrown, expected", [
    (shape(), ["....", "###.", "###.", "###."]),  # the corners are √2 from the centre, within 1.5
    (shape(height=0.1, width=1.2, reach=1.3), ["....", "....", "###.", "...."]),
    (shape(height=0.1, width=1.2, reach=1.3, angle=math.pi / 2), ["....", ".#..", ".#..", ".#.."]),
    (shape(height=0.1, width=1.5, reach=1.6, angle=math.pi / 4), ["....", "..#.", ".#..", "#..."]),
    (shape(y=-3), ["....", "....", "....", "...."])])
def test_pixels_of_a_leaf_by_hand(thrown, expected):
    free = np.ones((4, 4), bool)
    box = leaves.bounding_box(thrown, 4)
    leaf = leaves.lay_down(thrown, box, free)
    covered = np.zeros((4, 4), bool)
    covered[box] = leaf.seen
    assert ["".join(".#"[pixel] for pixel in row) for row in covered.astype(int)] == expected


def test_a_leaf_is_seen_only_where_nothing_lies_yet():
    free = np.ones((4, 4), bool)
    free[2] = False
    leaf = leaves.lay_down(shape(), leaves.bounding_box(shape(), 4), free)
    assert leaf.seen.sum() == 6  # of 9


def test_leaves_cover_the_ground_and_each_pixel_once(monkeypatch):
    monkeypatch.setattr(leaves, "throw", partial(leaves.throw, count=50))  # it takes several throws
    painted = np.zeros((80, 80), int)
    for leaf in leaves.scatter(np.random.default_rng(0), 80, 3):
        painted[leaf.box] += leaf.seen
        assert leaf.seen.any()
        assert leaf.dy.shape == (len(leaf.seen), 1)
        assert leaf.dx.shape == leaf.seen.shape[1:]
        rows, columns = np.nonzero(leaf.seen)
        reach = 1.5 * leaf.radius  # of a rectangle twice as long as wide
        assert np.hypot(leaf.dy[rows, 0], leaf.dx[columns]).max() < reach
    assert painted.max() == 1
    assert (painted == 0).mean() <= leaves.UNCOVERED


# ---- paint ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("slope", [0.5, 2.0])
def test_noise_has_its_spectrum(slope):
    noise = leaves.noise(np.random.default_rng(0), 256, slope)
    assert abs(noise.std() - 1) < 1e-4
    assert abs(noise.mean()) < 1e-4
    power = np.abs(np.fft.fft2(noise)) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(256), np.fft.fftfreq(256)))
    rings = [power[(radius > f) & (radius < 1.2 * f)].mean() for f in (0.02, 0.2)]
    found = math.log(rings[0] / rings[1], 10) / 2  # power is the square of the amplitude
    assert abs(found - slope) < 0.1


def test_a_gradient_goes_from_seven_tenths_to_thirteen_tenths():
    disk = shape(radius=20, reach=20, y=30, x=30)
    leaf = leaves.lay_down(disk, leaves.bounding_box(disk, 60), np.ones((60, 60), bool))
    factor = leaves.gradient(np.random.default_rng(0), leaf)
    assert factor.shape == leaf.seen.shape
    seen = factor[leaf.seen]
    assert seen.min() == pytest.approx(0.7, abs=0.01)
    assert seen.max() == pytest.approx(1.3, abs=0.01)
    y = np.flatnonzero(leaf.dy == 0)[0]
    x = np.flatnonzero(leaf.dx == 0)[0]
    centre = factor[y, x]
    steepness = math.hypot(factor[y + 1, x] - centre, factor[y, x + 1] - centre)
    assert centre == 1
    assert steepness == pytest.approx(0.3 / 20, rel=1e-4)  # in any direction


def test_averaging_2x2_by_hand():
    canvas = np.zeros((2, 4, 3), np.float32)
    canvas[..., 0] = [[1, 2, 0, 0], [3, 6, 0, 4]]
    assert leaves.halved(canvas)[..., 0].tolist() == [[3, 1]]


# ---- depth of field ------------------------------------------------------------------------------
def test_blurring_a_point_gives_a_gaussian():
    image = np.zeros((41, 41, 1), np.float32)
    image[20, 20] = 1
    blurred = leaves.gaussian_blur(image, 2.0)[..., 0]
    y, x = np.mgrid[-20:21, -20:21]
    expected = np.exp(-(y ** 2 + x ** 2) / (2 * 2.0 ** 2))
    assert np.abs(blurred - expected / expected.sum()).max() < 2e-4  # it ends at 3 deviations
    assert blurred.sum() == pytest.approx(1, abs=1e-5)


def test_blurring_keeps_the_sum_at_a_mirrored_border():
    image = np.zeros((20, 30, 1), np.float32)
    image[0, 29] = 1
    assert leaves.gaussian_blur(image, 1.5).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("side", [64, 50])  # 50 is no multiple of 4, by which depth is coarser
def test_what_is_out_of_focus_has_less_detail(side):
    rng = np.random.default_rng(0)
    sharp = rng.random((side, side, 3), np.float32)
    blurred = leaves.out_of_focus(rng, sharp)
    assert blurred.shape == sharp.shape
    assert np.abs(np.diff(blurred, axis=0)).mean() < 0.8 * np.abs(np.diff(sharp, axis=0)).mean()
    assert abs(blurred.mean() - sharp.mean()) < 0.01


ORPHANS = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import leaves
drawn = leaves.draw([(0, i) for i in range(50)], 256, workers=2)
next(drawn)
import multiprocessing
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
input()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_the_process_that_started_them(number):
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], text=True, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.send_signal(number)
    parent.wait()
    give_up = time.monotonic() + 30
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < give_up, "a worker lives on without its parent"
        time.sleep(0.05)
    parent.communicate()


def is_alive(worker: int) -> bool:
    """Whether a process computes or waits; one that nobody has buried yet does neither."""
    try:
        state = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
