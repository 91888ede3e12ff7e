"""compute-sanitizer's four tools over a small call of every kind of GPU kernel.

    python -m benchmarks.sanitize                  all tools side by side, under three minutes
    python -m benchmarks.sanitize --only memcheck

The calls are those of sanitized_calls.py, in a process of their own for each tool, with PyTorch's
caching allocator off: in its large blocks an access beyond a tensor would go unnoticed. Only errors
of our kernels (namespace fa) count. Writes results/<gpu>/sanitize.json; the exit status is 1 when
an error was found or a tool did not finish.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tqdm.auto import tqdm

from benchmarks.records import ROOT, gpu_provenance, results_path, write_record

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
TIMEOUT_S = 170
FIRST_PORT = 49152
OUR_MANGLED_NAMES = "_ZN2fa"  # everything in namespace fa, and nothing of PyTorch's
OUR_NAMES = re.compile(r"\bfa::|_ZN2fa")


def sanitizer() -> str:
    """The program; CUDA's own folder is not always on the path."""
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"
    )
    if not found:
        raise SystemExit("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    return found


def filter_options(program: str, tool: str) -> list[str]:
    """Watch our kernels alone: much faster. Releases differ in the option's name.

    Not for initcheck, which must see who wrote what our kernels read.
    """
    if tool == "initcheck":
        return []
    listed = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    for option in ("--kernel-name", "--kernel-regex"):
        if re.search(rf"{option}\b(?!-)", listed):
            return [option, f"kernel_substring={OUR_MANGLED_NAMES}"]
    return []


def reports_of(output: str) -> list[str]:
    """The tool's reports: a line flush with the prefix and the indented ones that follow it."""
    reports: list[str] = []
    for line in output.splitlines():
        if re.match(r"========= \S", line):
            reports.append(line)
        elif line.startswith("=========  ") and reports:
            reports[-1] += "\n" + line
    return [report for report in reports if "\n" in report]


def judge(tool: str, status: int, output: str, seconds: float) -> dict[str, Any]:
    """One row of the record, read from what a tool printed."""
    ours = [report for report in reports_of(output) if OUR_NAMES.search(report)]
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    return {
        "tool": tool,
        "exit_status": status,
        "finished": summary is not None and "all calls returned" in output,
        "errors": len(ours),
        "errors_of_all_kernels": int(summary[1]) if summary else None,
        "left_out": re.findall(r"^left out: (.*)$", output, re.MULTILINE),
        "seconds": round(seconds, 1),
        "reports": ours[:20],
    }


def run_tool(program: str, tool: str) -> dict[str, Any]:
    command = [program, "--tool", tool, *filter_options(program, tool)]
    # Each tool talks to its program over ports of its own.
    command += ["--print-limit", "1000", "--port", str(FIRST_PORT + 100 * TOOLS.index(tool))]
    if tool == "memcheck":
        command += ["--report-api-errors", "no"]  # PyTorch asks what a driver may not know
    command += [sys.executable, "-m", "benchmarks.sanitized_calls"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the tool and the program that it watches
            output, _ = process.communicate()
    row = judge(tool, process.returncode, output, time.monotonic() - start)
    if not row["finished"]:
        print(f"{tool} did not finish:\n{output[-3000:]}", file=sys.stderr)
    return row


def clean(row: dict[str, Any]) -> bool:
    return row["finished"] and row["errors"] == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=TOOLS, help="one tool; records nothing")
    options = parser.parse_args(arguments)
    program = sanitizer()
    tools = [options.only] if options.only else TOOLS
    rows = []
    # Each process keeps one core and little of the GPU busy.
    with ThreadPoolExecutor(len(tools)) as pool:
        running = [pool.submit(run_tool, program, tool) for tool in tools]
        for done in tqdm(as_completed(running), total=len(running), unit="tool"):
            rows.append(done.result())
    rows.sort(key=lambda row: TOOLS.index(row["tool"]))
    for row in rows:
        print("\n".join(row["reports"]))
        print(
            f"{row['tool']}: {'clean' if clean(row) else 'FAILED'}, {row['errors']} errors, "
            f"{len(row['left_out'])} calls refused, {row['seconds']} s"
        )
    if not options.only:
        version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        record = gpu_provenance("python -m benchmarks.sanitize")
        record["versions"]["compute-sanitizer"] = re.findall(r"Version (\S+)", version)[-1]
        path = results_path(record, "sanitize.json")
        write_record(path, record | {"tools": rows})
        print(f"recorded in {path}")
    return 0 if all(map(clean, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
