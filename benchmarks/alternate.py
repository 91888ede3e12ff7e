"""What a change costs in time: two builds of the package in turns, each in processes of its own.

    git worktree add ../before COMMIT && make -C ../before build      on the machine that has nvcc
    python -m benchmarks.alternate ../before                          this tree against that one
    python -m benchmarks.alternate ../before --only decode --turns 5
    python -m benchmarks.alternate --render results/<gpu>/alternate.json

A turn times every case of the other build, then of this one; the next turn goes the other way
round, so that a drift of the clock meets both alike. A ratio is the median over turns of this
build's time over the other's. Writes results/<gpu>/alternate.json unless --only leaves cases out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.child import answer_of
from benchmarks.records import (
    ROOT,
    gpu_provenance,
    read_record,
    results_path,
    source_digest,
    write_record,
)

MODES = ("deterministic", "standard")
TARGET = 1.01  # a change of numerics may cost a percent


def time_cases(tree: Path, parts: list[str]) -> dict[str, dict[str, float]]:
    """Microseconds by case and mode, of the package that lies in `tree`."""
    sys.path.insert(0, str(tree))
    import flash_attn

    where = Path(flash_attn.__file__).resolve()
    if not where.is_relative_to(tree.resolve()):
        raise SystemExit(f"flash_attn comes from {where}, not from {tree}")
    from benchmarks.gpu.attentions import ours
    from benchmarks.gpu.cases import TIMED
    from benchmarks.gpu.timing import time_case

    candidates = [ours(True), ours(False)]
    cases = [case for part in parts for case in TIMED[part]]
    rows = [time_case(case, candidates, turns_wanted=1) for case in cases]
    return {row["case"]: {mode: row["us"][mode][1] for mode in MODES} for row in rows}


def in_a_process(tree: Path, parts: list[str]) -> dict[str, dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.alternate", str(tree), "--child", *parts]
    found: dict[str, dict[str, float]] = answer_of(command, str(tree))
    return found


def compare(turns: list[dict[str, dict[str, dict[str, float]]]]) -> list[dict[str, Any]]:
    """A row a case: medians of both builds' microseconds, and the ratios by mode."""
    rows = []
    for case in turns[0]["this"]:
        row: dict[str, Any] = {"case": case}
        for mode in MODES:
            times = {build: [turn[build][case][mode] for turn in turns] for build in turns[0]}
            ratios = [a / b for a, b in zip(times["this"], times["other"], strict=True)]
            row[mode] = {build: round(statistics.median(x), 2) for build, x in times.items()}
            row[mode] |= {"ratio": round(statistics.median(ratios), 4)}
            row[mode] |= {"ratios": [round(x, 4) for x in sorted(ratios)]}
        rows.append(row)
    return rows


def render(record: dict[str, Any]) -> str:
    other = record["other"]
    if "other_digest" in record:  # a folder's name says little
        other += f" (sources {record['other_digest'][:12]})"
    lines = [
        f"{record['gpu']}, torch {record['versions']['torch']}, {record['date']}: this build "
        f"(sources {record['digest'][:12]}) against {other}, {record['turns']} turns; "
        f"medians in microseconds, target {TARGET:g}.",
        "",
        "| case | other, deterministic | this | this / other (range) | standard: this / other |",
        "|---|---|---|---|---|",
    ]
    for row in record["cases"]:
        mine, standard = row["deterministic"], row["standard"]
        lines.append(
            f"| {row['case']} | {mine['other']:g} | {mine['this']:g} | {mine['ratio']:.3f} "
            f"({mine['ratios'][0]:.3f}..{mine['ratios'][-1]:.3f}) | {standard['ratio']:.3f} |"
        )
    within = sum(row["deterministic"]["ratio"] <= TARGET for row in record["cases"])
    return "\n".join([*lines, "", f"{within} of {len(record['cases'])} cases reach the target."])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="a tree with a built package")
    parser.add_argument("--only", choices=["prefill", "decode", "backward"], help="one part of it")
    parser.add_argument("--turns", type=int, default=4, help="pairs of processes (default 4)")
    parser.add_argument("--render", type=Path, help="print the table of a recorded run and stop")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.render:
        print(render(read_record(options.render)))
        return 0
    if options.other is None:
        parser.error("names no tree to compare with")
    if options.child:
        print(json.dumps(time_cases(options.other, options.child)))
        return 0

    import torch
    from tqdm.auto import tqdm

    if not torch.cuda.is_available():
        parser.error("needs a GPU; --render prints what was measured on one")
    parts = [options.only] if options.only else ["prefill", "decode", "backward"]
    trees = {"other": options.other.resolve(), "this": ROOT}
    turns = []
    for turn in tqdm(range(options.turns), unit="turn"):
        order = list(trees) if turn % 2 == 0 else list(reversed(trees))
        turns.append({build: in_a_process(trees[build], parts) for build in order})
    record = gpu_provenance("python -m benchmarks.alternate")
    record |= {"other": trees["other"].name, "other_digest": source_digest(trees["other"])}
    record |= {"turns": options.turns, "cases": compare(turns)}
    print(render(record))
    if not options.only:
        path = results_path(record, "alternate.json")
        write_record(path, record)
        print(f"\nrecorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
