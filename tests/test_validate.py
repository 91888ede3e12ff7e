"""validate_determinism.py: what it prints and writes, and that its exit status can be relied on."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from device import DEVICE, FINEST, ON_GPU

import validate_determinism
from flash_attn import determinism
from flash_attn.verification import CLAIMS, FlashAttention, Problem, claims, costs, verify

SCRIPT = Path(validate_determinism.__file__).resolve()
QUICK = ["--quick", "--device", str(DEVICE)]
RELEVANT_CLAIMS = [key for key in CLAIMS if not (ON_GPU and "threads" in key)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One real run of --quick: the finished process and the folder that it wrote into."""
    folder = tmp_path_factory.mktemp("validate")
    command = [sys.executable, str(SCRIPT), *QUICK, "--json", "r.json", "--plot", "r.png"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    return done, folder


def test_quick_run_succeeds(quick):
    """Every claim holds on this machine, and the control is caught."""
    done, folder = quick
    assert done.returncode == 0, done.stdout + done.stderr
    text = (folder / "verification_results.txt").read_text()
    assert text in done.stdout
    count = len(RELEVANT_CLAIMS)
    assert f"{count} of {count} claims held" in text
    assert all(claim.title in text for claim in CLAIMS.values())
    assert "Where the controls first differed" in text
    for point in ("(b=4, s=2048, h=32, d=64)", "(b=8, s=4096, h=32, d=64)"):
        assert point in text
    assert ("Scaled down" in text) != ON_GPU
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_the_evidence(quick):
    """The JSON file says for each claim and engine what was compared and what came of it."""
    _, folder = quick
    record = json.loads((folder / "r.json").read_text())
    assert record["ok"] and record["held"] and record["control_caught"]
    assert [claim["key"] for claim in record["claims"]] == list(CLAIMS)
    for claim in record["claims"]:
        if claim["key"] not in RELEVANT_CLAIMS:
            continue
        ours = claim["engines"]["deterministic"]
        assert ours["verdict"] == "held" and ours["mismatch"] is None
        assert ours["cases"] >= 10 and ours["bytes_compared"] >= 10_000
        if claim["control_must_differ"]:
            control = claim["engines"]["standard"]
            assert control["verdict"] == "differs"
            assert "instead of" in control["mismatch"] and control["problem"]
    assert {"torch", "flash_attn", "device", "kernels", "date"} <= set(record["environment"])
    for cost in record["costs"]:
        assert cost["standard"] > 0 and cost["deterministic"] > 0


@pytest.fixture
def in_a_moment(tmp_path, monkeypatch):
    """Makes `main` fast: the claims that have a control, and no measurements."""
    monkeypatch.chdir(tmp_path)
    few = {key: claim for key, claim in CLAIMS.items() if claim.control}
    monkeypatch.setattr(claims, "CLAIMS", few)
    monkeypatch.setattr(costs, "memory_rows", lambda effort, device: [])
    monkeypatch.setattr(costs, "time_rows", lambda effort, device: [])


def test_status_is_zero_when_all_is_well(in_a_moment, tmp_path):
    """The counterpart of the next two: the same few claims, nothing tampered with."""
    assert validate_determinism.main(QUICK) == 0


def test_status_tells_of_a_broken_claim(in_a_moment, tmp_path, monkeypatch, capsys):
    """A claim that breaks is named with its first differing coordinate, and the status is 1."""
    wrong = dataclasses.replace(CLAIMS["position"], relation=compare_with_another_seed)
    monkeypatch.setitem(claims.CLAIMS, "position", wrong)
    assert validate_determinism.main(QUICK) == 1
    text = (tmp_path / "verification_results.txt").read_text()
    assert "BROKEN position in the batch" in text
    assert "out, another seed at (0, 0, 0)" in text
    assert capsys.readouterr().out.strip().endswith("FAILED")


def compare_with_another_seed(problem, subject, outcome):
    """Other values must give other bytes: a relation that is wrong on purpose."""
    other = problem.replace(seed=problem.seed + 1)
    results = [subject.run(p, p.sequences(), "dense")[0] for p in (problem, other)]
    outcome.compare("another seed", *results)


def test_status_tells_of_a_control_that_was_not_caught(in_a_moment, tmp_path, monkeypatch):
    """A standard mode that is deterministic in secret would prove nothing, and fails the run."""
    secret = FlashAttention(deterministic=True)
    secret.name = "standard"
    monkeypatch.setitem(claims.ENGINES, "standard", secret)
    assert validate_determinism.main(QUICK) == 1
    text = (tmp_path / "verification_results.txt").read_text()
    assert "THE CONTROL WAS NOT CAUGHT" in text


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--quick", "--full"], "not allowed with"),
        (["--device", "cuda:99"], "no such CUDA device"),
        (["--device", "nonsense"], "nonsense"),
    ],
    ids=["both efforts", "no such gpu", "no such device"],
)
def test_wrong_arguments_are_refused_at_once(arguments, message, capsys):
    """Status 2 and a sentence, before anything has run."""
    with pytest.raises(SystemExit) as stopped:
        validate_determinism.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_verify_on_shapes_of_ones_own():
    """`verify` takes a problem or its fields, and runs claims without controls unless asked."""
    shapes = {"seqlens_q": (1, 1), "seqlens_k": (600, 70), "h_q": 4, "h_kv": 1, "d": 24}
    shapes |= {"dtype": FINEST, "device": str(DEVICE)}
    chosen = ["run", "batch", "layout", "grad_batch"]
    steps = []
    report = determinism.verify(**shapes, claims=chosen, progress=lambda *step: steps.append(step))
    assert report.ok and report.held and not report.has_control
    assert [result.key for result in report.results] == chosen
    assert not report.results[-1].ran, "nobody trains through decoding"
    assert "3 of 3 claims held, byte for byte; no control was run" in str(report)
    assert [(step, steps_in_all) for _, step, steps_in_all in steps] == [(i, 4) for i in range(4)]

    with pytest.raises(TypeError, match="a problem or its fields"):
        verify(Problem((1,), (5,)), h_q=4)
    with pytest.raises(ValueError, match="h_kv=3 must divide h_q=4"):
        verify(seqlens_q=(1,), seqlens_k=(5,), h_q=4, h_kv=3)


def test_dropout_is_held_to_run_to_run_alone():
    """Its bits depend on batch index and head by definition, so the batch claims do not apply."""
    problem = Problem([70, 70], [70, 70], dropout_p=0.3, dtype=FINEST, device=str(DEVICE))
    report = verify(problem, claims=["run", "batch", "grad_run", "grad_batch"])
    assert report.ok
    assert [result.ran for result in report.results] == [True, False, True, False]


def test_a_report_of_nothing_is_no_success():
    """A problem to which no chosen claim applies is not verified."""
    report = verify(Problem((1,), (5,), device=str(DEVICE)), claims=["grad_batch"])
    assert not report.held and not report.ok
