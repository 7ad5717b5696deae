"""The report on the kernels: its steps, with the interpreter in place of a GPU, and its tables."""
import json
import sys
import time

import pytest
import torch

import kernels
import run
from bench import kernels as bench_kernels
from bench import kernels_report as report
from bench import measuring
from kernels import attention, choice, switch
from triton_path import chosen_triton, needs_triton

CASES = {"swinir 16x64x64": bench_kernels.Attention(1, 8, 8, 1, 4, (8, 8), (4, 4), False)}
MLPS = {"mlp 180->360 16x64x64": (1, 8, 8, 16, 24)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it takes minutes")
def test_without_a_gpu_it_is_refused_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--report"])
    with pytest.raises(SystemExit) as ended:
        run.command(bench_kernels.main)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: --report measures a GPU, and there is none")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Measurements in this process, tiny, with the Triton kernels interpreted."""
    def measure(arguments, limit):
        kept = dict(path=None, machine=measuring.machine(), rows=[], choices={})
        with monkeypatch.context() as patch:
            patch.setattr(measuring, "kept", kept)
            patch.setattr(sys, "argv", ["kernels", *arguments, "--repeat", "1"])
            bench_kernels.main()
        return report.Result(kept["machine"], kept["rows"], kept["choices"], "")

    def ways(ready):
        return dict(triton=kernels.window_attention, eager=attention.torch_path)

    def ways_of(ours, plain):
        def in_bfloat16(*tensors):
            return ours(*(t.bfloat16() for t in tensors))        # the kernel takes nothing else

        return dict(triton=in_bfloat16, eager=plain)

    def timed_at_first_use(rows):
        def rows_of(name, case, repeat):
            monkeypatch.setattr(switch, "IMPL", "fastest")
            return rows(name, case, repeat)

        return rows_of

    for name in ("chosen", "failed"):
        monkeypatch.setattr(choice, name, {})
    monkeypatch.setattr(choice, "ROUNDS", 1)
    monkeypatch.setattr(choice, "CALLS", 1)
    monkeypatch.setattr(choice, "store", lambda key, way: None)
    monkeypatch.setattr(report, "GPU", True)
    (tmp_path / "test_good.py").write_text("def test_right():\n    assert True\n")
    monkeypatch.setattr(report, "TESTS", [str(tmp_path / "test_good.py")])
    steps = [("small", ["--only", "swinir"], 60), ("MLPs", ["--only", "mlp"], 60)]
    monkeypatch.setattr(report, "STEPS", steps)
    monkeypatch.setattr(report, "measure", measure)
    monkeypatch.setattr(bench_kernels, "ATTENTION", CASES)
    monkeypatch.setattr(bench_kernels, "ways_of_attention", ways)
    monkeypatch.setattr(bench_kernels, "MLP", MLPS)
    monkeypatch.setattr(bench_kernels, "ways_of", ways_of)
    for name in ("attention_rows", "mlp_rows"):
        rows = getattr(bench_kernels, name)
        monkeypatch.setattr(bench_kernels, name, timed_at_first_use(rows))
    with chosen_triton():
        yield


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it takes minutes")
def test_the_report_holds_the_tests_the_times_and_the_choices(small, tmp_path, capsys):
    report.make(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "tests: 1 passed" in text
    assert f"torch {torch.__version__}" in text
    lines = text.splitlines()
    header, = [line for line in lines if line.startswith("| attention, µs")]
    assert header == "| attention, µs | triton | eager | % of floor | memory |"
    row, = [line for line in lines if line.startswith("| swinir 16x64x64 forward |")]
    assert all(float(cell) > 0 for cell in row.split(" | ")[1:3])
    assert "| norm, MLP and sum, µs | triton | eager | % of floor | memory |" in lines
    row, = [line for line in lines if line.startswith("| mlp 180->360 16x64x64 |")]
    assert all(float(cell) > 0 for cell in row.split(" | ")[1:3])
    assert not any("whole networks" in line for line in lines)
    assert "| class of inputs | fastest |" in lines
    assert any(line.startswith("| residual_mlp 16 channels, 24 hidden, bf16") for line in lines)
    assert any(line.startswith("| window_attention 1 heads of 16") for line in lines)
    assert "small, at most" in capsys.readouterr().out


def test_tests_that_fail_are_named(monkeypatch, tmp_path):
    (tmp_path / "test_bad.py").write_text("def test_wrong():\n    assert False\n")
    monkeypatch.setattr(report, "TESTS", [str(tmp_path / "test_bad.py")])
    words = report.test(60)
    assert words.startswith("tests: 1 failed in ") and "; FAILED " in words
    assert words.endswith("test_bad.py::test_wrong")


@pytest.mark.parametrize("ending, problem", [
    ("raise ValueError('no kernel image')", "--only x: ended with ValueError: no kernel image"),
    ("time.sleep(60)", "--only x: not finished after 3 s"),
])
def test_what_a_step_wrote_counts_even_if_it_ends_early(ending, problem, monkeypatch, tmp_path):
    """A crash, and a step that takes too long."""
    row = dict(case="conv", way="triton", seconds=1.0)
    script = tmp_path / "step"
    script.write_text(
        f"#!{sys.executable} -S\nimport sys, time\n"
        f"open(sys.argv[-1], 'w').write({json.dumps(dict(machine={}, rows=[row], choices={}))!r})"
        f"\n{ending}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    start = time.monotonic()
    result = report.measure(["--only", "x"], 3)
    assert time.monotonic() - start < 30
    assert result.rows == [row]
    assert result.problem.strip() == problem


def test_a_table_shows_failures_and_what_was_not_reached():
    rows = [
        dict(case="a forward", way="triton", seconds=2e-6, peak=10, of_floor=0.5),
        dict(case="a forward", way="eager", seconds=8e-6, peak=40),
        dict(case="a forward", way="flex", failed="OutOfMemoryError: full"),
        dict(case="b forward", way="triton", seconds=3e-6, peak=None),
    ]
    text = report.markdown("tests: 3 passed", [report.Result(dict(gpu="H"), rows, {}, "late\n")])
    assert "| attention, µs | triton | eager | flex | % of floor | memory |" in text
    assert "| a forward | 2 | 8 | – | 50 | 0.25 |" in text
    assert "| b forward | 3 | – | – | – | – |" in text
    assert "- a forward, flex: OutOfMemoryError: full" in text
    assert "- late" in text
    assert sum(seconds for _, _, seconds in report.STEPS) + report.TEST_SECONDS <= 570
