"""The choice by measurement: on a clock that the ways turn, and end to end, interpreted."""
import json
import os
from pathlib import Path

import pytest
import torch

import kernels
import parallel
from kernels import choice, switch
from triton_path import (
    DEVICE,
    GPU,
    attention,
    attention_case,
    attention_results,
    chosen_triton,
    needs_triton,
    precision_of,
    triton_attention,
    triton_attention_backward,
    triton_pixel_shuffle,
)

LARGE = "triton large tiles"                 # a variant of the kernels, invented here
pytestmark = needs_triton                     # without it nothing is chosen


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing chosen, nothing failed, an empty cache folder; all is set back afterwards."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(switch, "IMPL", "fastest")
    for name in ("chosen", "failed", "recorded"):
        monkeypatch.setattr(choice, name, {})
    monkeypatch.setattr(choice, "record", None)


def forget() -> None:
    """As a new process begins: what is on the disk remains."""
    choice.chosen.clear()
    choice.recorded.clear()
    choice.failed.clear()


@pytest.fixture
def timed(monkeypatch):
    """timed(triton=3, eager=4) -> ways that take so many seconds, or raise what is no number.

    Each way multiplies its input by 2. `timed.calls` counts them.
    """
    now = [0.0]
    monkeypatch.setattr(choice, "clock", lambda: now[0])

    def make(**seconds):
        def way_of(name):
            def way(x, factor):
                make.calls.append(name)
                if isinstance(seconds[name], Exception):
                    raise seconds[name]
                now[0] += seconds[name]
                return x * factor
            return way
        return {name: way_of(name) for name in seconds}

    make.calls = []
    return make


def call(ways, kind="small", x=None):
    """choice.call; the result must be right, whatever the way."""
    x = torch.ones(3) if x is None else x
    out = choice.call("doubling", kind, ways, (x,), dict(factor=2))
    assert torch.equal(out, 2 * x)


# ---- which way ----------------------------------------------------------------------------------
@pytest.mark.parametrize("seconds, best", [
    (dict(triton=1.0, eager=2.0, fused=3.0), "triton"),
    (dict(triton=2.0, eager=3.0, fused=1.0), "fused"),
    (dict(triton=1.0, eager=1.02, fused=9.0), "eager"),          # not 3 % faster
    (dict(triton=1.0, eager=1.04, fused=9.0), "triton"),
    (dict(triton=1.0, eager=ValueError("no"), fused=2.0), "triton"),
    (dict(triton=3.0, eager=ValueError("no"), fused=2.0), "fused"),
    (dict(triton=9.0, eager=ValueError("no"), fused=torch.OutOfMemoryError("full")), "triton"),
    (dict(triton=torch.OutOfMemoryError("full"), eager=5.0, fused=7.0), "eager"),
    ({"triton": 2.0, LARGE: 1.0, "eager": 1.5}, LARGE),          # a variant of the kernels
    ({"triton": 1.0, LARGE: 1.01, "eager": 1.5}, "triton"),
    ({"triton": 2.0, LARGE: 1.0, "eager": 1.02}, "eager"),       # not 3 % faster, it neither
    ({"triton": 1.0, LARGE: RuntimeError("no"), "eager": 1.5}, "triton"),
    ({"triton": RuntimeError("no"), LARGE: 1.0, "eager": 1.5}, LARGE),
    ({"triton": RuntimeError("no"), LARGE: RuntimeError("no"), "eager": 9.0}, "eager"),
])
def test_the_fastest_is_kept_and_said_in_one_line(seconds, best, timed, capsys):
    ways = timed(**seconds)
    call(ways)
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kernels: {best} for doubling small, inference (µs: ")
    for name, value in seconds.items():
        known = f"{name} {value * 1e6:.0f}" if isinstance(value, float) else f"{name} failed ("
        assert known in line
    timed.calls.clear()
    call(ways)
    assert timed.calls == [best], "timed a second time"
    assert capsys.readouterr().err == ""


def test_a_slow_moment_does_not_decide(timed, monkeypatch):
    """The ways take turns, and the fastest round of each counts."""
    ways = timed(triton=1.0, eager=2.0)
    quick = ways["triton"]
    rounds = []

    def slow_at_first(x, factor):
        rounds.append(None)
        if len(rounds) < 2 * choice.CALLS:
            ways["eager"](x, factor)
        return quick(x, factor)

    call(dict(ways, triton=slow_at_first))
    assert list(choice.chosen.values()) == ["triton"]


def test_a_gpu_is_timed_apart_from_python_and_sleeps_while_it_is_asked(monkeypatch):
    """A GPU that does in 5 ms what takes Python 3 s to ask for; its sleep is not counted."""
    now = [0.0]
    gpu = dict(asleep=0.0, busy=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu["busy"]

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    def ask():
        now[0] += 3.0
        gpu["asleep"] -= 3.0
        gpu["busy"] += 0.005
        return 3.0

    def sleep(cycles):
        gpu["asleep"] = cycles / choice.CYCLES
        gpu["busy"] += gpu["asleep"]

    monkeypatch.setattr(choice, "clock", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert choice.on_the_gpu(ask) == (3, pytest.approx(0.005))
    assert gpu["asleep"] > 0, "it woke up before all was asked"


def test_training_is_timed_with_its_gradients_apart_from_inference(timed):
    """A way whose backward pass is slow wins at inference only."""
    ways = timed(triton=1.0, eager=2.0)
    forward = ways["triton"]

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            ways["eager"](dout, 2)
            ways["eager"](dout, 2)
            return dout

    ways["triton"] = lambda x, factor: Slow.apply(forward(x, factor))
    x = torch.ones(3, requires_grad=True)
    call(ways, x=x)
    assert x.grad is None, "timing must leave no gradient"
    with torch.no_grad():
        call(ways, x=x)
    names = {key.split(", ")[1].split(";")[0]: way for key, way in choice.chosen.items()}
    assert names == dict(training="eager", inference="triton")


def test_the_random_numbers_of_a_run_stay(timed):
    state = torch.get_rng_state()
    call(timed(triton=1.0, eager=2.0), x=torch.ones(3, requires_grad=True))
    assert torch.equal(state, torch.get_rng_state())


def test_where_triton_failed_it_is_tried_and_said_again_by_the_next_process(timed, capsys):
    ways = timed(triton=RuntimeError("no driver\nand more"), eager=2.0)
    for _ in range(2):
        call(ways)
        call(ways)
        assert capsys.readouterr().err.count("triton failed (RuntimeError: no driver)") == 1
        forget()


def test_where_one_variant_failed_the_choice_of_another_is_kept(timed, capsys):
    ways = timed(**{"triton": RuntimeError("no"), LARGE: 1.0, "eager": 2.0})
    call(ways)
    assert "triton failed (RuntimeError: no)" in capsys.readouterr().err
    forget()
    timed.calls.clear()
    call(ways)
    assert timed.calls == [LARGE]


def test_kernels_that_were_asked_for_are_the_first_variant_without_timing(timed, monkeypatch):
    monkeypatch.setattr(switch, "IMPL", "triton")
    call(timed(**{"triton": 2.0, LARGE: 1.0, "eager": 3.0}))
    assert timed.calls == ["triton"] and choice.chosen == {}


def test_a_variant_that_fails_after_it_was_chosen_leaves_the_operation_to_pytorch(timed, capsys):
    """Not to another variant: what is wrong with one may be wrong with all."""
    call(timed(**{"triton": 2.0, LARGE: 1.0, "eager": 3.0}))
    timed.calls.clear()
    broken = timed(**{"triton": 2.0, LARGE: RuntimeError("no"), "eager": 3.0})
    call(broken)
    call(broken)
    assert timed.calls == [LARGE, "eager", "eager"]
    assert capsys.readouterr().err.count("PyTorch takes over doubling, Triton failed") == 1


# ---- where it is kept ---------------------------------------------------------------------------
def test_the_next_process_finds_the_choice_in_the_cache_folder(timed, capsys):
    ways = timed(triton=1.0, eager=2.0)
    call(ways)
    forget()
    timed.calls.clear()
    call(ways)
    assert timed.calls == ["triton"]
    assert capsys.readouterr().err.count("kernels:") == 1


def test_the_key_holds_what_the_time_depends_on(monkeypatch):
    def keys():
        choice.surroundings.cache_clear()
        return choice.full_key("conv 2^3", False, torch.device("cpu"))

    known = {keys()}
    assert torch.__version__ in keys() and "interpreted" in keys() and "source " in keys()
    known.add(choice.full_key("conv 2^3", True, torch.device("cpu")))
    known.add(choice.full_key("conv 2^4", False, torch.device("cpu")))
    with precision_of(torch.backends.cuda.matmul, "tf32"):
        known.add(keys())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        known.add(keys())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda file: b"another source")
        known.add(keys())
    choice.surroundings.cache_clear()
    assert len(known) == 6


@pytest.mark.parametrize("content", [b"", b"{", b"numpy", b"\xff\xfe\xfd"])
def test_a_damaged_or_foreign_entry_of_the_cache_is_timed_anew(content, timed, tmp_path):
    ways = timed(triton=1.0, eager=2.0)
    call(ways)
    file, = (tmp_path / "cache").rglob("choice.txt")
    assert file.read_text() == "triton"
    file.write_bytes(content)
    forget()
    timed.calls.clear()
    call(ways)
    assert len(timed.calls) > 2


def test_a_cache_folder_that_cannot_be_written_is_no_error(timed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    call(timed(triton=1.0, eager=2.0))
    assert list(choice.chosen.values()) == ["triton"]


def test_a_run_that_continues_keeps_its_choices(timed, tmp_path):
    """Even where the cache folder was emptied, and the clock would choose otherwise."""
    file = tmp_path / "kernels.json"
    kernels.remember_in(file)
    call(timed(triton=1.0, eager=2.0), "small")
    call(timed(triton=2.0, eager=1.0), "large")
    assert list(json.loads(file.read_text()).values()) == ["triton", "eager"]
    forget()
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path / "another")
    kernels.remember_in(file)
    timed.calls.clear()
    call(timed(triton=2.0, eager=1.0), "small")
    assert timed.calls == ["triton"]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ""] == ["kernels.json"]


def test_a_way_of_a_run_that_is_no_more_is_timed_anew(timed, tmp_path):
    file = tmp_path / "kernels.json"
    kernels.remember_in(file)
    call(timed(**{"triton": 2.0, LARGE: 1.0, "eager": 3.0}))
    forget()
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path / "another")
    kernels.remember_in(file)
    call(timed(triton=2.0, eager=3.0))
    assert list(json.loads(file.read_text()).values()) == ["triton"]


@pytest.mark.parametrize("content", ["[1]", '{"conv": 1}', "{", ""])
def test_a_damaged_file_of_a_run_is_named(content, tmp_path):
    file = tmp_path / "kernels.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="kernels.json is damaged: delete it"):
        kernels.remember_in(file)


# ---- where nothing may be timed -----------------------------------------------------------------
def test_while_a_graph_is_captured_only_the_memory_is_asked(timed, monkeypatch):
    x = torch.ones(3)
    ways = timed(triton=1.0, eager=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(choice, "may_time", lambda tensors: False)
        call(ways, x=x)
        assert timed.calls == ["eager"] and choice.chosen == {}
        choice.chosen[choice.full_key("doubling small", False, x.device)] = "triton"
        call(ways, x=x)
        assert timed.calls == ["eager", "triton"]


def test_capturing_and_fake_tensors_forbid_timing(monkeypatch):
    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not choice.may_time((OnGpu(),))
    assert choice.may_time((torch.ones(1), None, torch.nn.Parameter(torch.ones(1))))
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert not choice.may_time((torch.ones(1),))


def test_torch_compile_asks_the_memory_and_keeps_one_graph(timed):
    ways = timed(triton=1.0, eager=2.0)

    def double(x):
        return choice.call("doubling", f"2^{choice.bucket(len(x))}", dict(
            triton=lambda x, factor: x * factor + 1e-9 - 1e-9,
            eager=lambda x, factor: x * factor), (x,), dict(factor=2))

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert choice.chosen == {} and timed.calls == []
    call(ways, kind="2^2")
    torch._dynamo.reset()
    compiled(torch.ones(4))
    assert list(choice.chosen.values()) == ["triton"]


# ---- several processes --------------------------------------------------------------------------
@pytest.fixture
def processes(monkeypatch):
    """processes(rank): as one of several; what is broadcast lies in `processes.sent`."""
    def pretend(rank):
        def from_main(make):
            if rank != 0:
                return pretend.sent.pop()
            pretend.sent.append(make())
            return pretend.sent[-1]

        monkeypatch.setattr(parallel, "is_main", lambda: rank == 0)
        monkeypatch.setattr(parallel, "from_main", from_main)

    pretend.sent = []
    return pretend


def test_the_first_process_decides_for_all_in_training(timed, processes, tmp_path):
    x = torch.ones(3, requires_grad=True)
    kernels.remember_in(tmp_path / "kernels.json")
    processes(rank=0)
    call(timed(triton=1.0, eager=2.0), x=x)
    assert processes.sent == ["triton"]
    written = (tmp_path / "kernels.json").read_text()
    forget()
    processes(rank=1)
    timed.calls.clear()
    call(timed(triton=2.0, eager=1.0), x=x)
    assert timed.calls == ["triton"] and processes.sent == []
    with torch.no_grad():                                        # for itself, and waits for nobody
        call(timed(triton=2.0, eager=1.0), x=x)
    assert sorted(choice.chosen.values()) == ["eager", "triton"]
    assert (tmp_path / "kernels.json").read_text() == written, "one process writes"


# ---- the operations, end to end -----------------------------------------------------------------
@pytest.fixture
def interpreter(monkeypatch):
    """The operations on this machine, timed in earnest, but once; 64 tokens."""
    with chosen_triton():
        monkeypatch.setattr(switch, "IMPL", "fastest")
        monkeypatch.setattr(choice, "CALLS", 1)
        monkeypatch.setattr(choice, "ROUNDS", 1)
        yield


def small_attention():
    return attention_case(1, 8, 8, 1, 4, (8, 8), (4, 4))


def convolve(requires_grad=False):
    x = torch.randn(1, 3, 4, 5, device=DEVICE, requires_grad=requires_grad)
    weight = torch.randn(8, 3, 3, 3, device=DEVICE)
    out = kernels.conv3x3_pixel_shuffle(x, weight, None, 2)
    expected = torch.pixel_shuffle(torch.conv2d(x, weight, padding=1), 2)
    assert (out - expected).abs().max() < 1e-5
    return x, out, expected


def test_operations_are_timed_at_first_use(interpreter, capsys):
    results = attention_results(kernels.window_attention, *small_attention())
    assert all(x.isfinite().all() for x in results.values())
    convolve()
    first, second = capsys.readouterr().err.splitlines()
    assert "for window_attention 1 heads of 4, window 8x8, shifted, fp32, 2^6 tokens, training" in (
        first)
    assert "for conv3x3_pixel_shuffle 3 to 8 channels, r 2, fp32, 2^5 pixels, inference" in second
    of_attention = ("triton", "triton more warps", "eager", "fused")
    of_convolution = ("triton", "cuDNN", "cuDNN channels-last")
    for line, names in (first, of_attention), (second, of_convolution):
        assert "failed" not in line and all(f"{name} " in line for name in names)


@pytest.mark.parametrize("way", ["triton", "triton more warps", "eager", "fused"])
def test_every_way_computes_the_same(way, interpreter, monkeypatch):
    monkeypatch.setattr(choice, "time_all", lambda *_: way)
    case = small_attention()
    results = attention_results(kernels.window_attention, *case)
    for name, exact in attention_results(attention.reference, *case, torch.float64).items():
        assert (results[name] - exact).norm() < 5e-6 * exact.norm(), name


def fail(*arguments, **settings):
    """As Triton does where a GPU has less shared memory than the kernel wants."""
    from triton.runtime.errors import OutOfResources
    raise OutOfResources(147456, 101376, "shared memory")


FAILURES = [
    (triton_attention, "forward"),
    (triton_attention_backward, "backward"),
    (triton_pixel_shuffle, "forward"),
]


@pytest.mark.parametrize("module, name", FAILURES)
def test_a_kernel_that_fails_at_its_first_use_leaves_the_work_to_pytorch(
        module, name, interpreter, monkeypatch, capsys):
    monkeypatch.setattr(module, name, fail)
    case = small_attention()
    results = attention_results(kernels.window_attention, *case)
    for output, exact in attention_results(attention.reference, *case, torch.float64).items():
        assert (results[output] - exact).norm() < 5e-6 * exact.norm(), output
    convolve()
    lines = capsys.readouterr().err.splitlines()
    failures = [line for line in lines if "triton failed (OutOfResources: out of res" in line]
    assert len(failures) == 1


@pytest.mark.parametrize("module, name", FAILURES)
@pytest.mark.parametrize("error", [
    fail, RuntimeError("Triton Error [CUDA]: no kernel image is available"), SyntaxError("at 1:2")])
def test_a_kernel_that_fails_later_leaves_the_operation_to_pytorch(
        module, name, error, interpreter, monkeypatch, capsys):
    """It was the fastest once, and said to be so by the memory."""
    def broken(*arguments, **settings):
        tried.append(name)
        if error is fail:
            fail()
        raise error

    tried = []
    monkeypatch.setattr(choice, "time_all", lambda *_: "triton")
    monkeypatch.setattr(module, name, broken)
    case = small_attention()
    exact = attention_results(attention.reference, *case, torch.float64)
    for _ in range(2):
        results = attention_results(kernels.window_attention, *case)
        for output in exact:
            assert (results[output] - exact[output]).norm() < 5e-6 * exact[output].norm(), output
        x, out, expected = convolve(requires_grad=True)
        slope, = torch.autograd.grad(out.square().sum(), x)
        true_slope, = torch.autograd.grad(expected.square().sum(), x)
        assert (slope - true_slope).norm() < 1e-5 * true_slope.norm()
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("kernels: PyTorch takes over ") and "Triton failed (" in line
    assert tried == [name], "tried again after it had failed"


@pytest.mark.parametrize("module, name", FAILURES)
def test_kernels_that_were_asked_for_fail_with_a_sentence(module, name, interpreter, monkeypatch):
    monkeypatch.setattr(switch, "IMPL", "triton")
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(ValueError, match="kernels triton: .* failed .OutOfResources: .* shared"):
        attention_results(kernels.window_attention, *small_attention())
        convolve()


def test_a_lack_of_memory_is_not_taken_for_a_failure_of_triton(interpreter, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(choice, "time_all", lambda *_: "triton")
    monkeypatch.setattr(triton_pixel_shuffle, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        convolve()
    assert choice.failed == {}


# ---- streams, devices, large offsets, autocast --------------------------------------------------
@pytest.mark.skipif(GPU, reason="it watches the interpreter")
def test_every_launch_is_made_on_the_device_of_its_tensors(interpreter, monkeypatch):
    """Triton launches on the current device: with cuda:1 beside cuda:0, a guard must set it."""
    from triton.runtime import interpreter as triton_interpreter
    depth = []
    guarded = []
    launch = triton_interpreter.GridExecutor.__call__

    def spy(self, *arguments, **settings):
        guarded.append(len(depth))
        return launch(self, *arguments, **settings)

    monkeypatch.setattr(torch.cuda.device, "__enter__", lambda self: depth.append(self))
    monkeypatch.setattr(torch.cuda.device, "__exit__", lambda self, *error: depth.pop() and None)
    monkeypatch.setattr(triton_interpreter.GridExecutor, "__call__", spy)
    monkeypatch.setattr(switch, "IMPL", "triton")
    attention_results(kernels.window_attention, *small_attention())
    convolve()
    assert len(guarded) >= 4 and all(guarded)


@pytest.mark.skipif(GPU, reason="it is a probe for the interpreter")
def test_rows_past_two_to_the_31st_are_found(interpreter):
    """A probe: the places that the kernels compute for the last window of a map of 2^30 tokens."""
    import triton
    import triton.language as tl

    @triton.jit
    def probe(rows_out, window, H, W, rows, columns):
        token = tl.arange(0, 64)
        row, _ = triton_attention.locate(window, token, H, W, rows, columns, 0, 0, 8, 8)
        tl.store(rows_out + token, row.to(tl.int64) * 540)       # as in load_head

    side = 2**15
    out = torch.zeros(64, dtype=torch.int64)
    probe[(1,)](out, (side // 8) ** 2 - 1, side, side, side // 8, side // 8)
    y = torch.arange(side - 8, side)
    assert torch.equal(out.view(8, 8), 540 * (y[:, None] * side + y))
    assert out.max() > 2**38


def test_operations_follow_autocast_whichever_way_they_go(interpreter, monkeypatch):
    """As in training with --precision bf16: qkv in bfloat16, or not yet, the table in float32."""
    qkv, table, _, settings = small_attention()
    exact = attention.reference(qkv.double(), table.double(), **settings)
    for way in ("triton", "eager", "fused"):
        choice.chosen.clear()
        monkeypatch.setattr(choice, "time_all", lambda *_, way=way: way)
        for x in (qkv, qkv.bfloat16()):
            with torch.autocast(DEVICE, torch.bfloat16):
                out = kernels.window_attention(x, table, **settings)
            assert out.dtype == torch.bfloat16
            assert (out.double() - exact).norm() < 0.02 * exact.norm()
