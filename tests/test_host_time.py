"""benchmarks.host_time: what it measures, and what its table says."""

import json
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/host_time.json")), ids=str)
def test_records_are_whole(path):
    recorded = json.loads(path.read_text())
    assert [row["call"] for row in recorded["calls"]] == list(host_time.TARGETS)
