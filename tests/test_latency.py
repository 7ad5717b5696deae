"""Timing in turns, with a clock of our own; widths for a given time, against sums by hand."""
import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import latency
import models
import prune
from backbones.drn import DRN
from bench import budget
from tiny import run_command, tiny_dat, tiny_dcls, tiny_drn, tiny_swinir

CPU = torch.device("cpu")
LOW = torch.zeros(1, 3, 16, 16)


def pass_of(clock, model, widths) -> float:
    """Milliseconds of one pass of a network with these widths."""
    network = latency.ready(model.with_widths(widths), CPU)
    start = clock.seconds
    with torch.inference_mode():
        network(LOW)
    return 1000 * (clock.seconds - start)


def options_of(model, ratio: float = 0.0, multiple: int = 1) -> dict[str, list[int]]:
    return {pair.name: [pair.heads * n for n in prune.candidates(pair.width, ratio, multiple)]
            for pair in model.pairs()}


# ---- whole networks -----------------------------------------------------------------------------
def steps(clock, log, name, seconds):
    """A network that takes the next of these times in each pass, the last one from then on."""
    waiting = list(seconds)

    def network(low):
        log.append(name)
        clock.seconds += waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return network


def test_networks_run_in_turns_after_a_pass_that_does_not_count(clock):
    log = []
    networks = dict(a=steps(clock, log, "a", [99, 2]), b=steps(clock, log, "b", [77, 1]))
    found = latency.interleaved(networks, LOW, rounds=3)
    assert "".join(log) == "ab" + 3 * "ab"
    assert found["a"] == (2, 0, 1, 0)
    assert found["b"] == (1, 0, 0.5, 0)


def test_ratios_are_taken_within_a_round(clock):
    """Everything becomes ten times slower under way: the ratio does not notice, the median does."""
    log = []
    slow = [1, 1, 1, 1, 10, 10, 10]
    networks = dict(a=steps(clock, log, "a", [0, *slow]),
                    b=steps(clock, log, "b", [0, *(s / 4 for s in slow)]))
    found = latency.interleaved(networks, LOW, rounds=7)
    assert len(log) == 16                              # no more rounds: the ratio is certain
    assert found["b"].ratio == 0.25
    assert found["b"].ratio_spread == 0
    assert found["b"].seconds == 0.25
    assert found["b"].spread > 1


def test_rounds_go_on_while_the_ratio_is_uncertain(clock):
    log = []
    networks = dict(a=steps(clock, log, "a", [1]), b=steps(clock, log, "b", [0, 1, 2, 3, 2]))
    found = latency.interleaved(networks, LOW, rounds=3)
    assert 2 * 4 < len(log) <= 2 * (1 + 3 * latency.MOST)
    assert found["b"].ratio == 2
    log.clear()
    never = dict(a=steps(clock, log, "a", [1]), b=steps(clock, log, "b", range(1, 40)))
    assert latency.interleaved(never, LOW, rounds=3)["b"].ratio_spread > latency.SMALL
    assert len(log) == 2 * (1 + 3 * latency.MOST)


def test_the_spread_by_hand():
    """Of 1, 2, 3, 4, 5: median 3, quartiles 2 and 4."""
    assert latency.middle([5, 1, 4, 2, 3]) == (3, pytest.approx(2 / 3))


def test_a_gpu_has_finished_before_the_clock_is_read(clock, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    latency.now(torch.device("cuda", 0))
    assert done == [torch.device("cuda", 0)]
    latency.now(CPU)
    assert len(done) == 1


def test_the_input_leaves_the_random_numbers_of_a_run_alone():
    state = torch.get_rng_state()
    assert latency.noise(CPU).shape == (1, 3, 96, 96)
    assert torch.equal(state, torch.get_rng_state())


# ---- the time of every width --------------------------------------------------------------------
@pytest.mark.parametrize("tiny", [tiny_drn, tiny_swinir, tiny_dat, tiny_dcls])
def test_the_table_gives_the_time_of_any_choice(tiny, stairs, tmp_path):
    """The clock's stairs add up, so the sum of the table is the time of a whole pass, exactly."""
    model, _ = tiny()
    options = options_of(model, ratio=0.2)
    state = torch.get_rng_state()
    table = latency.measure_pairs(model, options, CPU, tmp_path / "latency.json", side=16)
    assert torch.equal(state, torch.get_rng_state())
    draw = np.random.default_rng(0)
    for _ in range(3):
        widths = {name: int(draw.choice(each)) for name, each in options.items()}
        expected = table["rest"] + sum(table["pairs"][name][n] for name, n in widths.items())
        assert pass_of(stairs, model, widths) == pytest.approx(expected)
    assert table["dense"] == pytest.approx(pass_of(stairs, model, model.widths))
    assert table["rounds"] == latency.ROUNDS
    times = [set(each.values()) for each in table["pairs"].values()]
    assert max(len(each) for each in times) > 1        # some width does matter


def test_every_candidate_is_timed_in_a_network_of_mixed_widths():
    options = {f"p{i}": [4, 8, 12, 16, 20, 24] for i in range(20)} | {"q": [2, 2, 2, 2, 2, 4]}
    choices = latency.mixed(options)
    assert len(choices) == 6
    for name, each in options.items():
        assert sorted(choice[name] for choice in choices) == each
    for choice in choices:
        assert len(set(choice.values())) > 3


def test_the_time_of_an_rcab_by_hand(stairs, tmp_path):
    """conv 32 -> 16 -> 32 in vectors of 6: ⌈32/6⌉·⌈16/6⌉ ms, twice: 6·3·2."""
    model, _ = tiny_drn()
    options = options_of(model, ratio=0.0, multiple=4)
    assert options["up0.rcab0"][0] == 16
    table = latency.measure_pairs(model, options, CPU, tmp_path / "latency.json", side=16)
    assert table["pairs"]["up0.rcab0"][16] == pytest.approx(36)


def test_what_is_folded_away_costs_the_same_at_every_width(stairs, tmp_path):
    """DRN's 1×1 behind the shuffle is merged into the 3×3: its hidden width is gone."""
    model, _ = tiny_drn()
    table = latency.measure_pairs(model, options_of(model), CPU, tmp_path / "l.json", side=16)
    assert len(set(table["pairs"]["up0.shuffle"].values())) == 1


def test_pairs_are_alike_when_weights_and_maps_are():
    """In DRN the RCABs of up 1 have as many channels as those of up 0, on a larger map."""
    model, _ = tiny_drn(blocks=2)
    like = latency.identical(model, LOW)
    assert like["up0.rcab1"] == "up0.rcab0" == like["up0.rcab0"]
    assert like["up1.rcab1"] == "up1.rcab0" == like["up1.rcab0"]
    assert like["down0"] == "down0"
    assert like["down1"] == "down1"


def test_the_summary_by_hand():
    """Two pairs alike, two levels: medians over three rounds, then the mean over both pairs."""
    choices = [dict(a=8, b=8), dict(a=4, b=4), dict(a=6, b=6)]
    dense = {"": 30.0, "a": 10.0, "b": 10.0}
    times = [[dense, {"": 15.0, "a": a, "b": 5.0}, {"": 19.0, "a": 7.0, "b": 7.0}]
             for a in (3.0, 90.0, 3.0)]
    table = latency.summary(times, choices, dict(a="a", b="a"))
    assert table["dense"] == 30
    assert table["pairs"] == dict(a={8: 10, 4: 4, 6: 7}, b={8: 10, 4: 4, 6: 7})
    assert table["rest"] == pytest.approx((10 + 7 + 5) / 3)


def test_measuring_continues_where_it_was_stopped(stairs, tmp_path, monkeypatch):
    model, _ = tiny_drn()
    file = tmp_path / "latency.json"
    measure = partial(latency.measure_pairs, model, options_of(model), CPU, file, side=16)
    original = latency.time_pass
    passes = []

    def counted(*arguments):
        passes.append(1)
        if len(passes) > 7 * 3 + 2:                    # warm, two rounds, and a part of one
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(latency, "time_pass", counted)
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert len(json.loads(file.read_text())["times"]) == 2
    monkeypatch.setattr(latency, "time_pass", original)
    table = measure()
    assert table["rounds"] == latency.ROUNDS
    monkeypatch.setattr(latency, "time_pass", lambda *_: pytest.fail("measured again"))
    assert measure() == table


@pytest.mark.parametrize("change", ["device", "candidates", "damaged"])
def test_the_times_of_something_else_are_not_used(change, stairs, tmp_path, monkeypatch):
    model, _ = tiny_drn()
    file = tmp_path / "latency.json"
    options = options_of(model)
    latency.measure_pairs(model, options, CPU, file, side=16)
    if change == "device":
        monkeypatch.setattr(latency, "device_name", lambda _: "another one")
    elif change == "candidates":
        options = options_of(model, ratio=0.5)
    else:
        file.write_text('{"device": ')
    stairs.seconds = 0.0
    table = latency.measure_pairs(model, options, CPU, file, side=16)
    assert stairs.seconds > 0
    assert table["device"] == latency.device_name(CPU)
    assert json.loads(file.read_text())["options"] == options


# ---- widths for a given time --------------------------------------------------------------------
TABLE = dict(device="a toaster", dense=100.0, rest=20.0,
             pairs=dict(a={4: 10.0, 8: 30.0}, b={4: 12.0, 8: 11.0}))
OPTIONS = dict(a=[4, 4, 8], b=[4, 8, 8])


def test_a_budget_of_time_by_hand():
    budget = latency.budget(TABLE, 0.5, OPTIONS)
    assert budget.limit == 50
    assert budget.cost(dict(a=8, b=4)) == 62


@pytest.mark.parametrize("part", [0.4, 0.9])
def test_a_time_out_of_reach_is_refused_in_a_sentence(part):
    """The least is 20 + 10 + 11, the most 20 + 30 + 12."""
    with pytest.raises(ValueError, match=rf"latency={part} cannot be met: on a toaster the "
                       r"candidate widths take 0.41 to 0.62 of the dense network's time"):
        latency.budget(TABLE, part, OPTIONS)


def test_a_limit_just_above_the_slowest_candidates_is_theirs():
    assert latency.budget(TABLE, 0.64, OPTIONS).limit == 62


def corrected(monkeypatch, error, part=0.5, refuse=0.0):
    """(best width, its ratio, limits tried) of latency.fit, if real times are error(predicted)."""
    model, _ = tiny_drn()
    limits = []

    def widths_within(budget):
        if budget.limit < refuse:
            raise ValueError("cannot be met")
        limits.append(budget.limit)
        n = max(1, min(32, round(32 * budget.limit / 100)))
        return {"up0.rcab0": n}

    def measured(networks, low):
        ratio = error(networks["pruned"].widths["up0.rcab0"] / 32)
        return dict(pruned=latency.Timing(1.0, 0.0, ratio, 0.0))

    monkeypatch.setattr(latency, "interleaved", measured)
    budget = prune.Budget(lambda widths: 0, 100 * part)
    widths, timing = latency.fit(widths_within, model, budget, part, CPU, side=16)
    return widths["up0.rcab0"], timing.ratio, limits


def test_the_limit_is_corrected_by_the_measured_time(monkeypatch):
    n, ratio, limits = corrected(monkeypatch, lambda predicted: 1.25 * predicted)
    assert limits == [50, 40]
    assert n == 13                                     # 1.25 · 13/32 = 0.508
    assert ratio == pytest.approx(0.508, abs=1e-3)


def test_a_limit_that_fits_is_left_alone(monkeypatch):
    n, _, limits = corrected(monkeypatch, lambda predicted: 1.01 * predicted)
    assert (n, limits) == (16, [50])


def test_the_closest_network_is_taken_when_none_fits(monkeypatch):
    """Times jump from 0.3 to 0.6, which is closer to 0.5; the last one tried is not the closest."""
    n, ratio, limits = corrected(monkeypatch, lambda predicted: 0.6 if predicted > 0.6 else 0.3)
    assert len(limits) == latency.TRIES
    assert limits[-1] < 60
    assert ratio == 0.6
    assert n > 0.6 * 32


def test_a_correction_out_of_reach_keeps_what_there_is(monkeypatch):
    n, ratio, limits = corrected(monkeypatch, lambda predicted: 1.25 * predicted, refuse=45)
    assert (n, ratio, limits) == (16, 0.625, [50])
    with pytest.raises(ValueError, match="cannot be met"):
        corrected(monkeypatch, lambda predicted: predicted, refuse=60)


def test_a_search_within_a_time_takes_it(stairs, tmp_path):
    """Candidates, table, knapsack and correction together, on the clock's stairs."""
    model, _ = tiny_drn(blocks=3)
    options = options_of(model, ratio=0.1)
    table = latency.measure_pairs(model, options, CPU, tmp_path / "latency.json", side=16)
    scores = np.log(np.random.default_rng(0).dirichlet(np.ones(6), len(options)))

    def choose(budget):
        picks = prune.fit_budget(scores, list(options.values()), list(options), budget)
        return {name: each[k] for (name, each), k in zip(options.items(), picks)}

    widths, timing = latency.fit(choose, model, latency.budget(table, 0.8, options), 0.8, CPU, 16)
    part = pass_of(stairs, model, widths) / pass_of(stairs, model, model.widths)
    assert timing.ratio == pytest.approx(part)
    assert 0.99 * 0.8 <= part <= 0.8


def test_the_benchmark_measures_the_chosen_network_once_more(stairs, monkeypatch, capsys):
    monkeypatch.setitem(models.PRESETS, "drn_tiny", (DRN, {4: dict(feats=8, blocks=2)}))
    noise = latency.noise
    monkeypatch.setattr(latency, "noise", lambda device, side=16: noise(device, 16))
    code, output, errors = run_command(budget, monkeypatch, capsys, "--arch", "drn_tiny", "--part",
                                       0.8, "--seeds", 1, "--device", "cpu")
    assert code == 0, errors
    numbers = map(float, output.splitlines()[-1].split())
    _, asked, _, _, _, corrected, _, again, spread, madds = numbers
    assert asked == 0.8 and spread == 0 and madds < 1
    assert again == corrected                # on this clock
    assert abs(again / asked - 1) <= 0.05


def test_devices_have_names(monkeypatch):
    name = latency.device_name(CPU)
    assert f"{torch.get_num_threads()} threads" in name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert latency.device_name(torch.device("cuda", 1)) == "GPU 1"


def test_networks_are_timed_as_they_are_used():
    model, _ = tiny_drn()
    ready = latency.ready(model, CPU)
    assert not ready.training
    assert isinstance(ready.up_blocks[0][-1], nn.Identity)             # folded
    x = torch.rand(1, 3, 8, 8)
    expected = models.inference(model)(x).images[4]
    assert torch.equal(ready(x).images[4], expected)


# ---- on a GPU -----------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a real CUDA graph needs a GPU")
def test_a_graph_tells_the_times_of_pairs(capsys):
    """Each takes some time, all together hardly more than the whole, which launches prolong."""
    device = torch.device("cuda", torch.cuda.current_device())
    model = tiny_drn()[0]
    low = latency.noise(device)
    network = models.inference(model, device=device)
    called = set(latency.count_calls(network, low))
    one_pass = latency.timed_pass(network, model.pairs(), called, low)
    passes = [one_pass() for _ in range(9)]
    assert "no CUDA graph" not in capsys.readouterr().err
    for found in passes:
        assert found.keys() == {"", *model.widths}
        assert min(found.values()) > 0
        assert sum(found.values()) <= 2 * found[""] + 1e-3
    usual = latency.time_pass(network, model.pairs(), called, low)
    assert found[""] < usual[""]
    timing = latency.interleaved(dict(model=latency.ready(model, device)), low)["model"]
    assert timing.seconds < usual[""] / 1000
