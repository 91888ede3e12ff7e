"""The test suite with its tensors on a GPU, and a record of what it did.

    python -m benchmarks.gpu_suite --processes 8        every test, minutes
    python -m benchmarks.gpu_suite -k paged             some; pytest's arguments; records nothing
    python -m benchmarks.gpu_suite --render FILE        the line of a recorded run; needs no GPU

Writes results/<gpu>/tests.json, read from pytest's JUnit XML, when the suite ran to its end, with
failures or without; the exit status is pytest's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.records import (
    ROOT,
    gpu_provenance,
    origin,
    read_record,
    results_path,
    write_record,
)

SLOWEST = 10


def outcome(test: ElementTree.Element) -> str:
    """Of a <testcase>; a test that passes and whose teardown errs has failed."""
    if test.find("failure") is not None or test.find("error") is not None:
        return "failed"
    return "passed" if test.find("skipped") is None else "skipped"


def summary(junit: str) -> dict[str, Any]:
    """Counts, reasons and times from pytest's JUnit XML."""
    suite = next(ElementTree.fromstring(junit).iter("testsuite"))
    tests = list(suite.iter("testcase"))
    counts = Counter(map(outcome, tests))
    reasons = Counter(skip.get("message") for skip in suite.iter("skipped"))
    slowest = sorted(tests, key=lambda test: -float(test.attrib["time"]))[:SLOWEST]
    return {
        **{name: counts[name] for name in ("passed", "failed", "skipped")},
        "skip_reasons": dict(reasons.most_common()),
        "seconds": round(float(suite.attrib["time"]), 1),
        "slowest": [
            {
                "test": f"{test.get('classname')}::{test.get('name')}",
                "seconds": round(float(test.attrib["time"]), 1),
            }
            for test in slowest
        ],
    }


def run(processes: int, arguments: list[str]) -> tuple[int, dict[str, Any] | None]:
    """pytest's exit status, and the summary unless it was cut short."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder, "junit.xml")
        command = [sys.executable, "-m", "pytest", f"--junitxml={junit}", *arguments]
        command += ["--numprocesses", str(processes), "--dist", "worksteal"]
        environment = os.environ | {"FLASH_ATTN_TEST_DEVICE": "cuda"}
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        whole = status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        return status, summary(junit.read_text()) if whole else None


def render(record: dict[str, Any]) -> str:
    """One line; why tests were skipped stands in the record."""
    return (
        f"{origin(record)}: {record['passed']:,} tests passed, {record['failed']:,} failed, "
        f"{record['skipped']:,} skipped, {record['seconds']:.0f} s "
        f"in {record['processes']} processes."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--render", type=Path, help="print the line of a recorded run, if any")
    options, selection = parser.parse_known_args(arguments)
    if options.render:
        if options.render.exists():
            print(render(read_record(options.render)))
        return 0
    status, found = run(options.processes, selection)
    if found and not selection:
        record = gpu_provenance("python -m benchmarks.gpu_suite")
        record |= {"processes": options.processes} | found
        path = results_path(record, "tests.json")
        write_record(path, record)
        print(f"recorded in {path}")
    return status


if __name__ == "__main__":
    sys.exit(main())
