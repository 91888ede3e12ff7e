"""Speed and memory on a GPU against PyTorch's attention, and the price of determinism.

    python -m benchmarks.bench_gpu                   everything, four to five minutes
    python -m benchmarks.bench_gpu --only decode     one part; records nothing unless told where
    python -m benchmarks.bench_gpu --render FILE     the tables of a recorded run; needs no GPU

Every result is compared with PyTorch's before it is timed. What an implementation cannot do is
recorded with its reason. `benchmarks/gpu/` says what is measured and how; results/<gpu>/bench.json
is written after each part, so that a run cut short keeps what it has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.gpu.attentions import attentions
from benchmarks.gpu.cases import MEMORY, TIMED
from benchmarks.gpu.memory import measure_memory
from benchmarks.gpu.tables import render
from benchmarks.gpu.timing import time_case
from benchmarks.records import gpu_provenance, read_record, results_path, write_record


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints; a missed target is a result, not a failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*TIMED, "memory"], help="one part of it")
    parser.add_argument("--json", type=Path, help="where to record the results")
    parser.add_argument("--render", type=Path, help="print the tables of a recorded run and stop")
    options = parser.parse_args(arguments)
    if options.render:
        print(render(read_record(options.render)))
        return 0
    if not torch.cuda.is_available():
        parser.error("needs a GPU; --render prints what was measured on one")

    parts = [options.only] if options.only else [*TIMED, "memory"]
    record = gpu_provenance("python -m benchmarks.bench_gpu")
    path = options.json or (None if options.only else results_path(record, "bench.json"))
    record |= {"cases": [], "memory": []}
    candidates = attentions()
    with tqdm(total=sum(len(TIMED.get(part, MEMORY)) for part in parts), unit="case") as progress:
        for part in parts:
            for case in TIMED.get(part, []):
                progress.set_postfix_str(case.name)
                record["cases"].append(time_case(case, candidates))
                progress.update()
            for problem in MEMORY if part == "memory" else []:
                progress.set_postfix_str(problem.why)
                record["memory"].append(measure_memory(problem, candidates))
                progress.update()
            if path:
                write_record(path, record)
    print(render(record))
    if path:
        print(f"\nrecorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
