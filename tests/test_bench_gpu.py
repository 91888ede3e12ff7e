"""The GPU benchmark, sanitizer and suite run, without a GPU: what they check, read and print."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import alternate, bench_gpu, gpu_suite, records, sanitize, sanitized_calls
from benchmarks.cases import Case
from benchmarks.child import answer_of
from benchmarks.gpu import cases, memory
from benchmarks.gpu.attentions import ours, sdpa_on
from benchmarks.gpu.tables import render
from benchmarks.gpu.timing import disagreement, time_case

ROOT = Path(__file__).resolve().parent.parent

MACHINE = {"gpu": "NVIDIA Test", "versions": {"torch": "2.11"}, "date": "2026-01-02"}


def time_row(kind="prefill", ours=100.0, standard=100.0, flash=120.0, **changes):
    """A case of which every number is known: 1e9 flops in 100 us are 10 TFLOP/s."""
    row = {
        "case": f"{kind}-shape",
        "kind": kind,
        "flops": 1e9,
        "bytes": 2e7,
        "us": {
            "sdpa_flash": [flash] * 3,
            "sdpa_cudnn": None,
            "deterministic": [ours] * 3,
            "standard": [standard] * 3,
        },
        "speedup": [flash / ours] * 3,
        "price": [ours / standard] * 3,
        "missing": {"sdpa_cudnn": "no kernel"},
    }
    return row | changes


def memory_row(mib, backward=False):
    names = ("deterministic", "standard", "sdpa_flash")
    return {
        "case": "shape",
        "why": "reference",
        "backward": backward,
        "mib": dict(zip(names, mib, strict=True)),
        "missing": {},
    }


def record(*rows, memory=()):
    return {**MACHINE, "digest": "0" * 64, "cases": list(rows), "memory": list(memory)}


def line_of(text, beginning):
    return next(line for line in text.splitlines() if line.startswith(beginning))


def test_tables_say_what_was_measured():
    text = render(record(time_row(), time_row("decode", case="decode-b1")))
    assert line_of(text, "| shape") == (
        "| shape | 100.0 | 100.0 | 120.0 | 10 | 1.20 | 1.000 (1.000..1.000) | PASS |"
    )
    assert "| 200 | 1.20 |" in line_of(text, "| b1"), "decode is counted in GB/s"
    assert "cuDNN us" not in text, "a peer that never ran has no column"
    assert "* SDPA cuDNN: no kernel (prefill-shape and 1 more)" in text
    assert text.endswith("2 of 2 cases reach their targets.")


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (time_row(ours=125.0, standard=125.0), "below target: speed < 1x"),
        (time_row(ours=103.0), "below target: price > 1.02"),
        (time_row(ours=102.0), "PASS"),
        (time_row(us={"deterministic": None, "standard": None}, speedup=None), "not available"),
    ],
)
def test_verdicts_on_time(row, verdict):
    if row["us"]["deterministic"] is None:
        row["price"] = None
    text = render(record(row))
    assert line_of(text, "| shape").endswith(f"| {verdict} |")
    assert text.endswith(f"{int(verdict == 'PASS')} of 1 cases reach their targets.")


@pytest.mark.parametrize(
    ("mib", "backward", "verdict"),
    [
        ((64.0, 64.0, 1.0), False, "PASS"),
        ((65.0, 65.0, 1.0), False, "below target: > 64 MiB"),
        ((40.0, 30.0, 1.0), False, "below target: > standard"),
        ((70.0, 70.0, 70.0), True, "PASS"),
        ((72.0, 72.0, 70.0), True, "below target: > SDPA flash"),
        ((None, None, 70.0), True, "not available"),
    ],
)
def test_verdicts_on_memory(mib, backward, verdict):
    text = render(record(memory=[memory_row(mib, backward)]))
    assert line_of(text, "| reference").endswith(f"| {verdict} |")


def test_render_needs_no_gpu(tmp_path):
    """The command that the tables in results/ come from."""
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record(time_row())))
    command = [sys.executable, "-m", "benchmarks.bench_gpu", "--render", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == render(record(time_row()))


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/bench.json")))
def test_records_are_whole(path):
    """A committed record of a GPU has every part; one cut short must not stand for a whole one."""
    found = json.loads(path.read_text())
    if "gpu" not in found:
        return
    measured = {row["kind"] for row in found["cases"]}
    assert measured == set(cases.TIMED)
    assert len(found["cases"]) == sum(map(len, cases.TIMED.values()))
    assert len(found["memory"]) == len(cases.MEMORY)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*/sanitize.json")))
def test_the_recorded_sanitizer_run_is_clean(path):
    """It was read as clean once when it was not."""
    tools = json.loads(path.read_text())["tools"]
    assert [row["tool"] for row in tools] == list(sanitize.TOOLS)
    assert all(map(sanitize.clean, tools)), [row["reports"][:1] for row in tools]


def test_disagreements_are_found():
    """Non-finite positions come before any tolerance, and one wrong tile is seen."""
    expected = torch.randn(1, 4096, 4, 64)
    assert disagreement(expected.bfloat16(), expected) == ""
    wrong = expected.clone()
    wrong[0, 64:128, 1] = 0
    assert disagreement(wrong, expected).startswith("off by")
    wrong = expected.clone()
    wrong[0, 5, 0, 0] = torch.inf
    assert disagreement(wrong, expected) == "non-finite at 1 other places"
    assert disagreement(wrong, wrong) == ""
    assert disagreement(wrong[:, 1:], wrong).startswith("shape")


CANDIDATES = [sdpa_on("sdpa_flash", SDPBackend.MATH), ours(True), ours(False)]


def on_the_cpu(kind, candidates=CANDIDATES):
    """A small case with a clock that tells the implementations apart by the order of turns."""
    ticks = iter(range(1, 100))

    def clock(call):
        call()
        return float(next(ticks))

    case = Case(kind, 1, 65, 65, 2, 2, 64, torch.bfloat16, causal=True)
    return time_case(case, candidates, device="cpu", clock=clock)


@pytest.mark.parametrize("kind", ["prefill", "backward"])
def test_a_case_is_compared_and_timed_in_turns(kind):
    """Turns go forth and back: 1 2 3, 6 5 4, 7 8 9, ..."""
    row = on_the_cpu(kind)
    assert row["missing"] == {}
    assert [row["us"][name][1] for name in ("sdpa_flash", "deterministic", "standard")] == [
        7000.0,
        8000.0,
        9000.0,
    ]
    assert row["price"][1] == pytest.approx(14 / 15, abs=1e-4)  # of 2/3 5/4 8/9 11/10 14/15


def test_a_refusal_is_recorded():
    """Ours may not have a gradient yet, a peer may fail in any way: the rest is measured."""

    def refuse(*_):
        raise RuntimeError("flash_attn: not on this GPU\nmore")

    def fail(*_):
        raise AssertionError("a peer's own mistake")

    refusing = [replace(attention, dense=refuse) for attention in CANDIDATES[1:]]
    row = on_the_cpu("prefill", [CANDIDATES[0], *refusing])
    assert row["us"]["deterministic"] is None and row["us"]["sdpa_flash"] is not None
    assert row["missing"]["standard"] == "flash_attn: not on this GPU"
    assert row["speedup"] is None and row["price"] is None

    failing = replace(CANDIDATES[0], name="sdpa_cudnn", dense=fail)
    row = on_the_cpu("prefill", [CANDIDATES[0], failing, *CANDIDATES[1:]])
    assert row["missing"] == {"sdpa_cudnn": "a peer's own mistake"}
    assert row["speedup"] is not None


def test_a_wrong_result_is_never_timed():
    wrong = replace(ours(True), dense=lambda q, k, v, causal: v.clone())
    with pytest.raises(SystemExit, match="deterministic is wrong"):
        on_the_cpu("prefill", [CANDIDATES[0], wrong])
    peer = replace(wrong, name="fa3")
    row = on_the_cpu("prefill", [*CANDIDATES, peer])
    assert row["missing"]["fa3"].startswith("another result")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("lengths", [(), (65, 16, 16)])
def test_memory_cases_run(backward, lengths, monkeypatch):
    """Everything but the allocator's counters, which a CPU has not."""
    monkeypatch.setattr(memory, "beyond_results", lambda call: float(len(call())))
    shape = Case("memory", 1, 65, 65, 4, 2, 64, torch.bfloat16, causal=True)
    case = cases.MemoryCase("small", backward, shape, lengths)
    row = memory.measure_memory(case, copy.copy(CANDIDATES), device="cpu")
    tensors = 3.0 if backward else 1.0  # dq, dk, dv; out
    assert row["mib"]["deterministic"] == row["mib"]["standard"] == tensors
    if lengths:
        assert row["missing"] == {"sdpa_flash": "has no packed batches"}
        assert row["case"].endswith("-packed3")
    else:
        assert row["mib"]["sdpa_flash"] == tensors


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "needs a GPU" in capsys.readouterr().err


SANITIZER_OUTPUT = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at void fa::gpu::forward_kernel<fa::gpu::Rows>(fa::gpu::Launch)+0x70 in a.cuh:12
=========     by thread (0,0,0) in block (1,0,0)
=========
========= Invalid __global__ read of size 4 bytes
=========     at void at::native::fill_kernel(float *)+0x10
=========     by thread (0,0,0) in block (0,0,0)
=========
left out: backward d=64: flash_attn: not on this GPU
all calls returned
========= ERROR SUMMARY: 2 errors
"""


def test_only_our_kernels_errors_count():
    row = sanitize.judge("memcheck", 0, SANITIZER_OUTPUT, 1.0)
    assert row["finished"] and row["errors"] == 1 and row["errors_of_all_kernels"] == 2
    assert "forward_kernel" in row["reports"][0] and not sanitize.clean(row)
    assert row["left_out"] == ["backward d=64: flash_attn: not on this GPU"]


def test_a_tool_that_did_not_finish_is_not_clean():
    without_summary = SANITIZER_OUTPUT.split("all calls returned")[0].replace("fa::", "")
    row = sanitize.judge("racecheck", -9, without_summary, 1.0)
    assert row["errors"] == 0 and not sanitize.clean(row)


def test_sanitized_calls_run(monkeypatch, capsys):
    """Every call is a legal one: the CPU answers them all."""
    monkeypatch.setattr(sanitized_calls, "DEVICE", "cpu")
    sanitized_calls.main()
    assert capsys.readouterr().out == "all calls returned\n"


SMALL_SUITE = """
import time
import pytest

def test_right(): pass
def test_slow(): time.sleep(0.3)
def test_wrong(): assert False
def test_left_out(): pytest.skip("no such kernel")
@pytest.mark.skip(reason="no such kernel")
def test_marked(): pass
@pytest.mark.skip(reason="about the CPU alone")
def test_of_the_cpu(): pass
@pytest.fixture
def untidy():
    yield
    raise RuntimeError
def test_untidy(untidy): pass
"""


@pytest.fixture
def recorded_suite(tmp_path, monkeypatch):
    """main() in a folder of its own, of a small suite; its exit status and tests.json."""
    (tmp_path / "test_small.py").write_text(SMALL_SUITE)
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_suite, "results_path", lambda _, name: tmp_path / "results" / name)
    monkeypatch.setattr(
        gpu_suite, "gpu_provenance", lambda command: {**MACHINE, "digest": "0" * 64}
    )

    def record(*arguments):
        return gpu_suite.main(["--processes", "2", *arguments]), tmp_path / "results/tests.json"

    return record


def test_the_suite_is_recorded(recorded_suite, capsys):
    """Every outcome, each test once, whichever process ran it."""
    status, path = recorded_suite()
    found = json.loads(path.read_text())
    assert status == pytest.ExitCode.TESTS_FAILED
    assert found["gpu"] == MACHINE["gpu"] and found["processes"] == 2
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 3)
    assert found["skip_reasons"] == {"no such kernel": 2, "about the CPU alone": 1}
    assert len(found["slowest"]) == 7 and found["seconds"] >= found["slowest"][0]["seconds"] >= 0.3
    assert found["slowest"][0]["test"] == "test_small::test_slow"

    capsys.readouterr()
    assert gpu_suite.main(["--render", str(path)]) == 0
    assert capsys.readouterr().out == (
        "NVIDIA Test, torch 2.11, 2026-01-02, sources 000000000000: 2 tests passed, 2 failed, "
        f"3 skipped, {found['seconds']:.0f} s in 2 processes.\n"
    )


@pytest.mark.parametrize("arguments", [["-k", "right"], ["--no-such-option"]])
def test_control_a_part_of_the_suite_is_not_recorded(recorded_suite, arguments):
    status, path = recorded_suite(*arguments)
    assert status == (0 if arguments[0] == "-k" else pytest.ExitCode.USAGE_ERROR)
    assert not path.exists()


def test_control_a_suite_cut_short_is_not_recorded(recorded_suite, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--maxfail=1")
    status, path = recorded_suite()
    assert status == pytest.ExitCode.INTERRUPTED and not path.exists()


def test_without_a_record_there_is_no_line(tmp_path, capsys):
    assert gpu_suite.main(["--render", str(tmp_path / "tests.json")]) == 0
    assert capsys.readouterr().out == ""


# ---- Two builds in turns ----


def turn(this, other):
    """A turn of one case: microseconds of both builds, twice as long in standard mode."""
    builds = {"this": this, "other": other}
    return {
        b: {"prefill-shape": {"deterministic": x, "standard": 2 * x}} for b, x in builds.items()
    }


def test_builds_are_compared_turn_by_turn():
    """A drift that meets both builds alike reaches no ratio; a slower build is seen."""
    drifting = [turn(100.0, 100.0), turn(150.0, 150.0), turn(200.0, 200.0)]
    (row,) = alternate.compare(drifting)
    assert row["deterministic"]["ratio"] == row["standard"]["ratio"] == 1.0
    assert row["deterministic"]["this"] == 150.0 and row["standard"]["other"] == 300.0
    slower = [turn(103.0, 100.0), turn(154.5, 150.0), turn(203.0, 200.0)]
    (row,) = alternate.compare(slower)
    assert row["deterministic"]["ratio"] == 1.03
    compared = {**record(), "other": "before", "turns": 3, "cases": [row]}
    table = alternate.render(compared)
    assert "| 1.030 (1.015..1.030) |" in table and "0 of 1 cases reach the target" in table
    assert "against before, 3 turns" in table
    table = alternate.render(compared | {"other_digest": "ab" * 32})
    assert "against before (sources abababababab), 3 turns" in table


def test_the_other_build_is_known_by_its_sources(tmp_path):
    """The same sources in another folder have one digest; a changed byte has another."""
    for folder in ("a", "b"):
        (tmp_path / folder / "csrc").mkdir(parents=True)
        (tmp_path / folder / "csrc/x.h").write_text("int x;\n")
    a, b = (records.source_digest(tmp_path / folder) for folder in ("a", "b"))
    assert a == b
    (tmp_path / "b/csrc/x.h").write_text("int y;\n")
    assert records.source_digest(tmp_path / "b") != a


def test_what_times_another_build_does_not_bring_this_one():
    code = "import sys, benchmarks.alternate, benchmarks.gpu.instruments; "
    code += "print('flash_attn' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_measurement_in_a_process_answers_or_says_why():
    noisy = "print('loading'); print('[1, 2]')"
    assert answer_of([sys.executable, "-c", noisy], "noisy") == [1, 2]
    with pytest.raises(SystemExit, match=r"(?s)broken: .*no such build"):
        answer_of([sys.executable, "-c", "raise SystemExit('no such build')"], "broken")


def test_the_other_build_is_the_one_that_is_timed(tmp_path):
    """Without a package in the tree, the one that is installed must not answer in its place."""
    command = [sys.executable, "-m", "benchmarks.alternate", str(tmp_path), "--child", "decode"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and f"not from {tmp_path}" in done.stderr
