"""benchmarks.host_time: what it measures, and what its table says."""

import json
import types
from pathlib import Path

import pytest
import torch

from benchmarks import host_time

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.cpu_only


def record(*ratios):
    us = {"deterministic": 20.0, "standard": 19.5, "sdpa": 10.0}
    rows = [
        {"call": call, "us": us, "ratio": ratio}
        for call, ratio in zip(host_time.TARGETS, ratios, strict=False)
    ]
    return {
        "cpu": "Test",
        "threads": 1,
        "versions": {"torch": "0"},
        "date": "today",
        "digest": "0123456789abcdef",
        "calls": rows,
    }


def test_every_call_is_measured():
    rows = host_time.measure("cpu", turns=3, repeats=2)
    assert [row["call"] for row in rows] == list(host_time.TARGETS)
    for row in rows:
        assert all(0.0 < us < 1e6 for us in row["us"].values()) and row["ratio"] > 0.0


def test_a_slower_call_is_seen(monkeypatch):
    """The clock that advances by a second for each of our dense calls is what the ratio shows."""
    now = [0.0]
    ours, peers = host_time.calls("cpu", 1)
    slow = {name: lambda n=name: now.__setitem__(0, now[0] + len(n)) for name in ours}
    fast = {name: lambda: now.__setitem__(0, now[0] + 1.0) for name in peers}
    monkeypatch.setattr(host_time, "calls", lambda *arguments: (slow, fast))
    monkeypatch.setattr(host_time.time, "perf_counter", lambda: now[0])
    rows = host_time.measure("cpu", turns=3, repeats=2)
    assert [row["ratio"] for row in rows] == [len(row["call"]) for row in rows]


def test_the_table_says_what_reaches_its_target():
    table = host_time.render(record(1.0, 1.21))
    assert "| dense | 20 | 19.5 | 10 | 1.00 (1) | PASS |" in table
    assert "| varlen | 20 | 19.5 | 10 | 1.21 (1.2) | above target |" in table


def test_fa3_has_a_column_where_it_is_installed():
    with_fa3 = record(1.0, 1.0)
    with_fa3["calls"][0]["us"] = with_fa3["calls"][0]["us"] | {"fa3": 12.5}
    table = host_time.render(with_fa3)
    assert "| call | deterministic | standard | SDPA | FA3 | deterministic / SDPA" in table
    assert "| dense | 20 | 19.5 | 10 | 12.5 | 1.00 (1) | PASS |" in table
    assert "| varlen | 20 | 19.5 | 10 |  | 1.00 (1.2) | PASS |" in table


def test_calls_of_fa3_are_timed(monkeypatch):
    """A stand-in with FA3's names: its calls get what ours get."""
    seen = []

    def stand_in(name):
        def call(q, *others, **options):
            seen.append((name, sorted(options)))
            return q * 1.0, None

        return call

    names = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    fa3 = types.SimpleNamespace(**{name: stand_in(name) for name in names})
    monkeypatch.setattr(host_time, "import_fa3", lambda: fa3)
    make = torch.randn
    on_cpu = {"device": "cpu", "dtype": torch.float32}
    monkeypatch.setattr(torch, "randn", lambda *sizes, **options: make(*sizes, **on_cpu))
    for function in ("arange", "full", "tensor"):
        real = getattr(torch, function)
        monkeypatch.setattr(
            torch, function, lambda *a, real=real, **o: real(*a, **(o | {"device": "cpu"}))
        )
    _, peers = host_time.calls("cuda", 1)
    for name in ("dense", "varlen", "kvcache"):
        peers[f"fa3, {name}"]()
    assert [name for name, _ in seen] == list(names)
    assert all("causal" in options for _, options in seen)


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/host_time.json")), ids=str)
def test_records_are_whole(path):
    recorded = json.loads(path.read_text())
    assert [row["call"] for row in recorded["calls"]] == list(host_time.TARGETS)
