"""A record of bench_gpu as Markdown, and what counts as reaching a target."""

from __future__ import annotations

from typing import Any

from benchmarks.records import origin

# The names that the record uses, as columns; a peer that never ran gets none.
TITLES = {
    "deterministic": "deterministic",
    "standard": "standard",
    "sdpa_flash": "SDPA flash",
    "sdpa_cudnn": "SDPA cuDNN",
    "fa3": "FA3",
}

# SDPA's flash backend (FlashAttention-2's kernels) over ours, and deterministic over standard.
MIN_SPEEDUP, MAX_PRICE = 1.0, 1.02
MAX_FORWARD_MIB = 64.0
SAME_MIB = 0.5  # as much memory: what rounding to the allocator's blocks can add

KINDS = {"prefill": ("TFLOP/s", "flops", 1e6), "backward": ("TFLOP/s", "flops", 1e6)}
KINDS["decode"] = ("GB/s", "bytes", 1e3)


def verdict_of_time(row: dict[str, Any]) -> str:
    if row["us"]["deterministic"] is None:
        return "not available"
    missed = []
    if row["speedup"] and row["speedup"][1] < MIN_SPEEDUP:
        missed.append(f"speed < {MIN_SPEEDUP:g}x")
    if row["price"] and row["price"][1] > MAX_PRICE:
        missed.append(f"price > {MAX_PRICE:g}")
    return f"below target: {', '.join(missed)}" if missed else "PASS"


def verdict_of_memory(row: dict[str, Any]) -> str:
    """Forward: a limit. Backward, which needs sums: the peer's. Both: no more than standard."""
    mib = row["mib"]
    ours = mib["deterministic"]
    if ours is None:
        return "not available"
    missed = []
    if not row["backward"] and ours > MAX_FORWARD_MIB:
        missed.append(f"> {MAX_FORWARD_MIB:g} MiB")
    if row["backward"] and mib["sdpa_flash"] is not None and ours > mib["sdpa_flash"] + SAME_MIB:
        missed.append("> SDPA flash")
    if mib["standard"] is not None and ours > mib["standard"] * MAX_PRICE + SAME_MIB:
        missed.append("> standard")
    return f"below target: {', '.join(missed)}" if missed else "PASS"


def _columns(rows: list[dict[str, Any]], values: str) -> list[str]:
    """The implementations that answered at least once, and always our two modes."""
    answered = {name for row in rows for name, value in row[values].items() if value is not None}
    return [name for name in TITLES if name in answered | {"deterministic", "standard"}]


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return [
        "",
        f"| {' | '.join(header)} |",
        "|---" * len(header) + "|",
        *(f"| {' | '.join(cells)} |" for cells in body),
    ]


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Each reason for a missing number once, with the cases that it holds for."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["missing"].items():
            cases.setdefault((name, reason), []).append(row["case"])
    lines = [
        f"* {TITLES[name]}: {reason} ({found[0]}{f' and {len(found) - 1} more' * (len(found) > 1)})"
        for (name, reason), found in cases.items()
    ]
    return ["", "Not measured:", "", *lines] if lines else []


def _time_table(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    unit, work, scale = KINDS[kind]
    names = _columns(rows, "us")
    header = [kind, *(f"{TITLES[name]} us" for name in names), unit]
    header += [
        f"SDPA flash / ours (target {MIN_SPEEDUP:g})",
        f"det / std (target {MAX_PRICE:g})",
        "verdict",
    ]
    body = []
    for row in rows:
        times = ["-" if row["us"].get(n) is None else f"{row['us'][n][1]:.1f}" for n in names]
        ours = row["us"]["deterministic"]
        rate = "-" if ours is None else f"{row[work] / ours[1] / scale:.0f}"
        speedup = "-" if row["speedup"] is None else f"{row['speedup'][1]:.2f}"
        price = "-" if row["price"] is None else "{1:.3f} ({0:.3f}..{2:.3f})".format(*row["price"])
        case = row["case"].removeprefix(f"{kind}-")
        body.append([case, *times, rate, speedup, price, verdict_of_time(row)])
    return _table(header, body)


def _memory_table(rows: list[dict[str, Any]]) -> list[str]:
    names = _columns(rows, "mib")
    header = ["scratch memory", "pass", "shape", *(f"{TITLES[n]} MiB" for n in names), "verdict"]
    body = [
        [
            row["why"],
            "backward" if row["backward"] else "forward",
            row["case"],
            *("-" if row["mib"].get(n) is None else f"{row['mib'][n]:.1f}" for n in names),
            verdict_of_memory(row),
        ]
        for row in rows
    ]
    return _table(header, body)


def render(record: dict[str, Any]) -> str:
    """A line about the machine, one table a kind, the reasons for gaps, one line of counts."""
    lines = [f"{origin(record)}. Medians; memory beyond inputs and outputs."]
    for kind in KINDS:
        rows = [row for row in record["cases"] if row["kind"] == kind]
        if rows:
            lines += _time_table(kind, rows)
    if record["memory"]:
        lines += _memory_table(record["memory"])
    lines += _reasons([*record["cases"], *record["memory"]])
    verdicts = [verdict_of_time(row) for row in record["cases"]]
    verdicts += [verdict_of_memory(row) for row in record["memory"]]
    passed = verdicts.count("PASS")
    return "\n".join([*lines, "", f"{passed} of {len(verdicts)} cases reach their targets."])
