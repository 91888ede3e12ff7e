#!/usr/bin/env python3
"""See the guarantee proven on this machine: same bytes under every schedule, controls that break.

Every claim compares the bytes of the same rows computed under two schedules, in deterministic mode.
The same claims then run in standard mode and with PyTorch's own attention, and some must break
there: a harness that catches nothing proves nothing. Last come time and memory of both modes. The
table also goes to verification_results.txt.

Exit status: 0 when every claim held and the control was caught, 1 when not, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# A busy machine is the rule here: a waiting OpenMP thread must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import flash_attn
from flash_attn import determinism, verification
from flash_attn.verification import costs
from flash_attn.verification.report import Report, save_plot, table

TEXT_FILE = Path("verification_results.txt")
COST_STEPS = 2  # memory, time: the bar counts them with the claims


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n")[2]
    )
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument(
        "--quick", dest="effort", action="store_const", const="quick", help="about half a minute"
    )
    effort.add_argument(
        "--full",
        dest="effort",
        action="store_const",
        const="full",
        help="more problems, and the cost reference points unscaled; about twenty minutes",
    )
    parser.add_argument(
        "--claims",
        nargs="+",
        metavar="KEY",
        choices=verification.CLAIMS,
        help=f"only these, and no costs: {', '.join(verification.CLAIMS)}",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .svg)")
    parser.set_defaults(effort="default")
    options = parser.parse_args(arguments)
    # What would fail at the end fails now.
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    try:
        device = torch.device(options.device)
    except RuntimeError as error:
        parser.error(f"--device {options.device}: {error}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f"--device {options.device}: no such CUDA device")
    return options


def environment(device: str) -> dict[str, str]:
    """What a reader needs to judge or repeat the run."""
    plan = determinism.explain(
        1, 4096, 32, 8, 128, torch.bfloat16, device=device, deterministic=True
    )
    where = torch.device(device)
    if where.type == "cuda":
        major, minor = torch.cuda.get_device_capability(where)
        hardware = f"{torch.cuda.get_device_name(where)} (sm_{major}{minor})"
    else:
        hardware = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "flash_attn": flash_attn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": hardware,
        "kernels": f"{plan.kernels}, {plan.block} keys a block,"
        f" {plan.boundaries[1]} keys in the first segment",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def progress_bar() -> Any:
    """A tqdm bar, or None when tqdm is not installed: the result does not need it."""
    if importlib.util.find_spec("tqdm") is None:
        print("(pip install tqdm for a progress bar)", file=sys.stderr)
        return None
    from tqdm.auto import tqdm

    return tqdm(total=0, unit="check", bar_format="{percentage:3.0f}% |{bar:30}| {elapsed} {desc}")


def run(options: argparse.Namespace) -> tuple[Report, list[dict[str, Any]]]:
    """All claims and controls, then memory and time."""
    bar = progress_bar()
    done = 0

    def show(what: str, step: int, steps: int) -> None:
        nonlocal done
        if bar is None:
            return
        bar.total = steps + COST_STEPS
        bar.update(step - done)
        bar.set_description_str(what)
        done = step

    report = verification.verify(
        effort=options.effort, claims=options.claims, device=options.device, progress=show
    )
    claims = done + 1
    rows = []
    if options.claims is None:
        show("memory", claims, claims)
        rows += costs.memory_rows(options.effort, options.device)
        show("time", claims + 1, claims)
        rows += costs.time_rows(options.effort, options.device)
    show("done", claims + COST_STEPS, claims)
    if bar is not None:
        bar.close()
    return report, rows


def render(report: Report, rows: list[dict[str, Any]], facts: dict[str, str], effort: str) -> str:
    """The text that is printed and written."""
    width = max(len(name) for name in facts)
    parts = [
        "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items()),
        f"Claims in deterministic mode, and the controls that must break ({effort}).\n"
        "A dash: the control has no such thing.",
        str(report),
        *_examples(report),
        *([_cost_text(rows)] if rows else []),
    ]
    return "\n\n".join(parts) + "\n"


def _examples(report: Report) -> list[str]:
    """Where the controls first differed, for the claims that standard mode has to break."""
    lines = []
    for result in report.results:
        for name, outcome in result.outcomes.items():
            if result.control and name != "deterministic" and outcome.mismatch:
                lines.append(f"  {name}, {result.title}: {outcome.mismatch}")
    return ["Where the controls first differed:\n" + "\n".join(lines)] if lines else []


def _cost_text(rows: list[dict[str, Any]]) -> str:
    def number(value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"

    cells = []
    for row in rows:
        ratio = "not measured" if row["ratio"] is None else f"{row['ratio']:.3f}"
        numbers = [number(row[mode]) for mode in ("standard", "deterministic")]
        cells.append([row["what"], row["unit"], *numbers, ratio, number(row["pytorch"])])
    header = ["cost", "unit", "standard", "deterministic", "ratio", "PyTorch"]
    points = f"memory at {costs.MEMORY_POINT}, time at {costs.TIME_POINT}"
    reference = (
        f"Reference points: {points}, causal."
        + (" Scaled down in batch and heads for this run." if _scaled_down(rows) else "")
        + "\nMemory: peak beyond the inputs, each mode in its own process. Time: medians of turns."
    )
    return f"{reference}\n\n{table(header, cells)}"


def _scaled_down(rows: list[dict[str, Any]]) -> bool:
    measured = " ".join(row["what"] for row in rows)
    return not all(str(point) in measured for point in (costs.MEMORY_POINT, costs.TIME_POINT))


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    started = time.perf_counter()
    facts = environment(options.device)
    report, rows = run(options)
    facts["took"] = f"{time.perf_counter() - started:.0f} s"
    text = render(report, rows, facts, options.effort)
    print(text)
    TEXT_FILE.write_text(text)
    written = [TEXT_FILE]
    if options.json:
        record = {"environment": facts, "effort": options.effort, "costs": rows, **report.to_dict()}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
        written.append(options.json)
    if options.plot:
        save_plot(options.plot, report, rows)
        written.append(options.plot)
    print(f"written: {', '.join(map(str, written))}")
    print("OK" if report.ok else "FAILED")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
